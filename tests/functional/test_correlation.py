import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ConstantInputWarning, rankdata, spearmanr
from torch import Tensor

from globenc_lightning.functional import spearman, summarize
from globenc_lightning.functional.correlation import masked_ranks

randomized = settings(deadline=None, derandomize=True, database=None, max_examples=60)

TIED = (float("-inf"), -1.0, -0.0, 0.0, 0.5, 1.0, float("inf"))


def in_order(values: np.ndarray) -> np.ndarray:
    """Finite numbers in the same order: scipy before 1.13 takes infinities of both signs for NaN."""
    return np.where(np.isnan(values), np.nan, np.unique(values, return_inverse=True)[1])


def scipy_spearman(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """One call of scipy for each pair of vectors."""
    shape = torch.broadcast_shapes(left.shape, right.shape, mask.shape)
    rows = zip(*(x.expand(shape).reshape(-1, shape[-1]).numpy() for x in (left, right, mask.bool())), strict=True)
    results = []
    for x, y, kept in rows:
        if kept.sum() < 2:
            results.append(np.nan)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            results.append(spearmanr(in_order(x[kept]), in_order(y[kept])).statistic)
    return torch.tensor(results, dtype=torch.float64).view(shape[:-1])


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, equal_nan=True)


def draw(shape: tuple[int, ...], kind: str, generator: np.random.Generator, tokens: int) -> Tensor:
    shape = (*shape, tokens)
    if kind == "tied":
        return torch.from_numpy(generator.choice(TIED, shape))
    if kind == "integers":
        return torch.from_numpy(generator.integers(-2, 3, shape))
    values = torch.from_numpy(generator.standard_normal(shape))
    if kind == "nan":
        values[torch.from_numpy(generator.random(shape) < 0.05)] = float("nan")
    return values


@randomized
@given(
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
    st.integers(1, 40),
    st.tuples(*[st.sampled_from(["tied", "integers", "continuous", "nan"])] * 2),
    st.sampled_from([0.0, 0.3, 0.8]),
    st.integers(0, 2**31),
)
def test_spearman_equals_scipy(shape: list[int], tokens: int, kinds: tuple[str, str], masked: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    left, right = (draw(tuple(shape), kind, generator, tokens) for kind in kinds)
    mask = torch.from_numpy(generator.random((*shape, tokens)) >= masked)
    assert_same(spearman(left, right, mask), scipy_spearman(left, right, mask))


@randomized
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**31))
def test_spearman_broadcasts_one_saliency_over_layers_and_methods(
    b: int, layer: int, m: int, k: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    rows, saliency = draw((b, layer, m), "tied", generator, k), draw((b, 1, 1), "tied", generator, k)
    mask = torch.from_numpy(generator.random((b, 1, 1, k)) < 0.8)
    expected = scipy_spearman(rows, saliency, mask)
    assert expected.shape == (b, layer, m)
    assert_same(spearman(rows, saliency, mask), expected)
    assert_same(spearman(saliency, rows, mask), expected)
    assert_same(spearman(rows, saliency, mask.expand(b, layer, m, k).long()), expected)


@randomized
@given(st.integers(0, 30), st.floats(0, 1), st.integers(0, 2**31))
def test_ranks_equal_scipys(tokens: int, masked: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = draw((3,), "tied", generator, tokens)
    mask = torch.from_numpy(generator.random((3, tokens)) >= masked)
    ranks = masked_ranks(values, mask)
    assert ranks.dtype == torch.float64
    for row in range(3):
        kept = mask[row].numpy()
        assert np.array_equal(ranks[row, mask[row]], rankdata(in_order(values[row].numpy()[kept])))
    assert (ranks[~mask] == 0).all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 0.5])
def test_what_is_masked_does_not_matter(garbage: float) -> None:
    generator = np.random.default_rng(0)
    left, right = draw((40,), "tied", generator, 12), draw((40,), "continuous", generator, 12)
    mask = torch.from_numpy(generator.random((40, 12)) < 0.6)
    expected = scipy_spearman(left, right, mask)
    assert_same(spearman(left.masked_fill(~mask, garbage), right.masked_fill(~mask, garbage), mask), expected)


def test_perfect_correlation_is_exactly_one() -> None:
    for tokens in range(2, 60):
        values = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
        mask = torch.ones(tokens)
        assert spearman(values, values.exp() * 1e6, mask) == 1
        assert spearman(values, -values, mask) == -1


@pytest.mark.parametrize(
    ("left", "mask"),
    [
        ([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1]),
        ([0.0, -0.0, 0.0, -0.0], [1, 1, 1, 1]),
        ([float("inf")] * 4, [1, 1, 1, 1]),
        ([1.0, 1.0, 2.0, 1.0], [1, 1, 0, 1]),
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 0]),
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 0, 0]),
        ([1.0, float("nan"), 3.0, 4.0], [1, 1, 1, 1]),
        ([float("nan")] * 4, [1, 1, 1, 1]),
    ],
)
def test_undefined_is_nan_and_never_zero(left: list[float], mask: list[int]) -> None:
    one, other = torch.tensor(left), torch.tensor([0.3, 0.1, 0.7, 0.2])
    assert spearman(one, other, torch.tensor(mask)).isnan()
    assert spearman(other, one, torch.tensor(mask)).isnan()


def test_nan_in_one_row_leaves_the_others() -> None:
    generator = np.random.default_rng(0)
    left, right = draw((3,), "continuous", generator, 6), draw((3,), "continuous", generator, 6)
    mask = torch.ones(3, 6)
    expected = spearman(left, right, mask)
    left[1, 2] = float("nan")
    rho = spearman(left, right, mask)
    assert rho.isnan().tolist() == [False, True, False]
    assert torch.equal(rho[[0, 2]], expected[[0, 2]])


def test_no_tokens_at_all() -> None:
    for shape in ((0,), (2, 0), (2, 3, 0)):
        rho = spearman(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape))
        assert rho.shape == shape[:-1]
        assert rho.dtype == torch.float64
        assert rho.isnan().all()
    assert spearman(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_types_of_numbers(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    left = torch.from_numpy(generator.integers(0, 9, (5, 20))).to(dtype)
    right = torch.from_numpy(generator.integers(0, 99, (5, 20))).to(dtype)
    mask = torch.from_numpy(generator.random((5, 20)) < 0.8)
    assert_same(spearman(left, right, mask), scipy_spearman(left.double(), right.double(), mask))


def test_half_precision_beyond_its_largest_rank() -> None:
    # bfloat16 counts to 256: ranks must not be kept in the type of the values.
    values = torch.arange(1000).flip(0).float().exp().clamp(max=6e4).to(torch.bfloat16)
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    expected = scipy_spearman(values.double(), noise.double(), torch.ones(1000))
    assert_same(spearman(values, noise, torch.ones(1000)), expected)


def test_order_of_the_tokens_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    left, right = draw((4,), "tied", generator, 25), draw((4,), "tied", generator, 25)
    mask = torch.from_numpy(generator.random((4, 25)) < 0.8)
    order = torch.from_numpy(generator.permutation(25))
    shuffled = spearman(left[:, order], right[:, order], mask[:, order])
    torch.testing.assert_close(shuffled, spearman(left, right, mask), rtol=0, atol=1e-14)


@randomized
@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 4), max_size=2),
    st.sampled_from([0.0, 0.4, 0.9]),
    st.integers(0, 2**31),
)
def test_summary_equals_numpys(b: int, shape: list[int], undefined: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rho = generator.uniform(-1, 1, (b, *shape))
    rho[generator.random(rho.shape) < undefined] = np.nan
    summary = summarize(torch.from_numpy(rho))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean, sd = np.nanmean(rho, 0), np.nanstd(rho, 0, ddof=1)
    np.testing.assert_allclose(summary.mean, mean, rtol=0, atol=1e-14)
    np.testing.assert_allclose(summary.sd, sd, rtol=0, atol=1e-14)
    assert np.array_equal(summary.n, (~np.isnan(rho)).sum(0))
    assert np.array_equal(summary.undefined, np.isnan(rho).sum(0))


def test_summary_of_nothing_defined_is_nan_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rho in (torch.full((3, 2), float("nan")), torch.zeros(0, 2)):
            summary = summarize(rho)
            assert summary.mean.isnan().all()
            assert summary.sd.isnan().all()
            assert summary.n.tolist() == [0, 0]
            assert summary.undefined.tolist() == [len(rho)] * 2


def test_summary_of_one_has_no_spread() -> None:
    summary = summarize(torch.tensor([float("nan"), 0.25, float("nan")]))
    assert summary.mean == 0.25
    assert summary.sd.isnan()
    assert summary.n == 1
    assert summary.undefined == 2


def test_summary_of_equal_correlations_has_spread_zero() -> None:
    summary = summarize(torch.full((5,), 0.1, dtype=torch.float64))
    assert summary.mean.item() == pytest.approx(0.1)
    assert summary.sd.item() == pytest.approx(0, abs=1e-15)


def test_inputs_are_left_alone_and_results_repeat() -> None:
    generator = np.random.default_rng(0)
    left, right = draw((2, 3), "nan", generator, 8), draw((2, 1), "tied", generator, 8)
    mask = torch.from_numpy(generator.random((2, 1, 8)) < 0.8)
    before = [tensor.clone() for tensor in (left, right, mask)]
    rho = spearman(left, right, mask)
    torch.testing.assert_close(rho, spearman(left, right, mask), rtol=0, atol=0, equal_nan=True)
    kept = rho.clone()
    summarize(rho)
    torch.testing.assert_close(rho, kept, rtol=0, atol=0, equal_nan=True)
    for tensor, copy in zip((left, right, mask), before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
