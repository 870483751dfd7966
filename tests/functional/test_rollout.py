import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Tensor

from globenc_lightning.functional import READOUTS, normalize_rows, readout_row, rollout, rollout_step
from globenc_lightning.functional.rollout import log_scale
from tests import naive

randomized = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def make_local(
    b: int = 2, layers: int = 3, s: int = 5, size: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(b, l, q, k), another size in every example and layer; the last example's last token is padding."""
    generator = torch.Generator().manual_seed(seed)
    local = torch.rand(b, layers, s, s, generator=generator, dtype=torch.float64)
    local = local * size * 10 ** torch.randn(b, layers, 1, 1, generator=generator, dtype=torch.float64)
    if s > 1:
        local[-1, :, -1] = 0
        local[-1, :, :, -1] = 0
    return local.to(dtype)


random_local = st.builds(
    make_local,
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e5, 1e12]),
    st.integers(0, 2**31),
)


@randomized
@given(random_local, st.booleans())
def test_rollout_is_the_naive_product_up_to_its_scale(local: Tensor, normalize: bool) -> None:
    scaled, log = rollout(local, normalize=normalize)
    expected = naive.rollout(local, normalize)
    assert log.dtype == torch.float64
    assert log.shape == local.shape[:2]
    torch.testing.assert_close(scaled * log.exp().unsqueeze(-1).unsqueeze(-1), expected, rtol=1e-9, atol=0)


@randomized
@given(random_local)
def test_the_scale_is_a_power_of_two_and_changes_no_digit(local: Tensor) -> None:
    scaled, log = rollout(local)
    exponent = log / math.log(2.0)
    torch.testing.assert_close(exponent, exponent.round(), rtol=0, atol=1e-9)
    raw = local[:, 0]
    for layer in range(local.shape[1]):
        raw = raw if layer == 0 else local[:, layer] @ raw
        power = exponent[:, layer].round().int().view(-1, 1, 1)
        assert torch.equal(torch.ldexp(scaled[:, layer], power), raw)
    peak = scaled.flatten(2).amax(2)
    assert ((peak >= 0.5) & (peak < 1) | (peak == 0)).all()


@randomized
@given(random_local)
def test_a_first_layer_keeps_order_and_ties(local: Tensor) -> None:
    tied = (local / local.flatten(1).amax(1).view(-1, 1, 1, 1) * 4).round() * 1e9
    scaled, _ = rollout_step(tied[:, 0])
    for ours, raw in zip(scaled.flatten(1), tied[:, 0].flatten(1), strict=True):
        assert np.array_equal(rankdata(ours), rankdata(raw))


def exact_rollout(local: np.ndarray) -> list[np.ndarray]:
    """(l, q, k) integers -> the raw products as Python's own integers, of any size."""
    product = local[0].astype(object)
    products = [product]
    for layer in local[1:]:
        product = layer.astype(object) @ product
        products.append(product)
    return products


@pytest.mark.parametrize("largest", [9, 10**6])
def test_sixty_layers_neither_overflow_nor_lose_their_order(largest: int) -> None:
    layers, s = 60, 7
    local = np.random.default_rng(0).integers(1, largest, (2, layers, s, s))
    scaled, log = rollout(torch.tensor(local, dtype=torch.float32))
    assert scaled.dtype == torch.float32
    assert scaled.isfinite().all()
    for example in range(2):
        exact = exact_rollout(local[example])
        assert exact[-1].max() > 10**38  # what float32 cannot hold
        for layer in range(layers):
            peak = exact[layer].max()
            expected = np.array([[float(Fraction(int(x), int(peak))) for x in row] for row in exact[layer]])
            ours = scaled[example, layer].double().numpy()
            np.testing.assert_allclose(ours / ours.max(), expected, rtol=1e-4)
            assert np.array_equal(rankdata(ours[0]), rankdata(expected[0]))
            assert log[example, layer].item() + math.log(ours.max()) == pytest.approx(math.log(peak), rel=1e-6)


@pytest.mark.parametrize("size", [1e-7, 1e-30])
def test_sixty_layers_of_small_entries_do_not_vanish(size: float) -> None:
    local = make_local(layers=60, size=1.0).float()
    scaled, log = rollout(local * size)
    expected, expected_log = rollout(local)
    ours, theirs = (x / x.flatten(2).amax(2)[..., None, None] for x in (scaled, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    grown = (log + scaled.double().flatten(2).amax(2).log())[:, -1]
    base = (expected_log + expected.double().flatten(2).amax(2).log())[:, -1]
    torch.testing.assert_close(grown, base + 60 * math.log(size), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-42), (torch.float64, 1e-320)])
def test_entries_below_the_normal_numbers_stay_finite(dtype: torch.dtype, size: float) -> None:
    local = torch.tensor([[[[4.0, 0.0], [1.0, 2.0]]]], dtype=torch.float64).mul(size).to(dtype)
    scaled, log = rollout(local)
    torch.testing.assert_close(scaled / scaled.max(), local / local.max(), rtol=0.01, atol=0)
    assert log.item() + scaled.double().max().log().item() == pytest.approx(local.double().max().log().item())


def test_ties_of_the_raw_product_stay_ties() -> None:
    # Small integers: every product is exact in float32, and two tokens that nothing distinguishes tie in all layers.
    local = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (1, 6, 6, 6))).float()
    local[0, 0, :, 4] = local[0, 0, :, 1]
    scaled, _ = rollout(local)
    exact = exact_rollout(local[0].numpy().astype(int))
    for layer in range(6):
        assert exact[layer].max() < 2**24
        assert torch.equal(scaled[0, layer, :, 4], scaled[0, layer, :, 1])
        assert np.array_equal(rankdata(scaled[0, layer]), rankdata(exact[layer].astype(float)))


def test_one_example_sets_no_other_examples_scale() -> None:
    local = make_local(3, 4, seed=3)
    local[0] *= 1e9
    together, log = rollout(local)
    for example in range(3):
        alone, alone_log = rollout(local[example : example + 1])
        assert torch.equal(together[example], alone[0])
        assert torch.equal(log[example], alone_log[0])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_stays_in_its_own_example(garbage: float) -> None:
    local = make_local(3, 4)
    expected, expected_log = rollout(local)
    local[1, 2, 0, 0] = garbage
    scaled, log = rollout(local)
    assert torch.equal(scaled[[0, 2]], expected[[0, 2]])
    assert torch.equal(log[[0, 2]], expected_log[[0, 2]])
    assert torch.equal(scaled[1, :2], expected[1, :2])
    assert not scaled[1, 2:].isfinite().all()
    assert log.isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_matrix_of_zeros_stays_zero(normalize: bool) -> None:
    local = make_local(2, 3)
    local[0] = 0
    scaled, log = rollout(local, normalize=normalize)
    assert torch.equal(scaled[0], torch.zeros(3, 5, 5, dtype=torch.float64))
    assert log.isfinite().all()
    assert (scaled[1] > 0).any()


def test_nothing_to_roll_out() -> None:
    for shape in ((0, 2, 3, 3), (2, 2, 0, 0)):
        scaled, log = rollout(torch.zeros(shape))
        assert scaled.shape == shape
        assert log.shape == shape[:2]


def test_step_by_step_is_the_whole() -> None:
    local = make_local(2, 4)
    scaled, log = rollout(local)
    previous, exponents = None, []
    for layer in range(4):
        previous, exponent = rollout_step(local[:, layer], previous)
        exponents.append(exponent)
        assert torch.equal(previous, scaled[:, layer])
    assert torch.equal(log_scale(torch.stack(exponents, 1)), log)


def test_normalized_rows_sum_to_one_and_zero_rows_stay() -> None:
    local = make_local(2, 3)
    rows = normalize_rows(local)
    expected = torch.ones(2, 3, 5, dtype=torch.float64)
    expected[-1, :, -1] = 0
    torch.testing.assert_close(rows.sum(-1), expected)
    torch.testing.assert_close(rows * local.sum(-1, keepdim=True), local)
    scaled, log = rollout(local, normalize=True)
    torch.testing.assert_close((scaled * log.exp()[..., None, None]).sum(-1), expected)


def test_normalizing_is_another_method() -> None:
    local = make_local(1, 4, 9)
    local[:, :, 0] *= 50
    one, other = rollout(local)[0][0, -1, 0], rollout(local, normalize=True)[0][0, -1, 0]
    assert not np.array_equal(rankdata(one), rankdata(other))


MASKS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])


def first(rows: Tensor) -> Tensor:
    return rows[0]


def last(rows: Tensor) -> Tensor:
    return rows[-1]


def mean(rows: Tensor) -> Tensor:
    return rows.mean(0)


@pytest.mark.parametrize(("readout", "pick"), [("cls", first), ("last", last), ("mean", mean)])
@pytest.mark.parametrize("layers", [(), (3,), (2, 3)])
def test_readouts(readout: str, pick: Callable[[Tensor], Tensor], layers: tuple[int, ...]) -> None:
    matrix = torch.rand(5, *layers, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mask in (MASKS, MASKS.bool(), MASKS.float()):
        row = readout_row(matrix, mask, readout)
        assert row.shape == (5, *layers, 5)
        for example in range(4):
            kept = MASKS[example].bool()
            expected = pick(matrix[example][..., kept, :].movedim(-2, 0))
            torch.testing.assert_close(row[example], expected, rtol=1e-12, atol=0)
        assert torch.equal(row[4], torch.zeros_like(row[4]))


def test_the_default_readout_is_the_first_token() -> None:
    matrix = make_local()[:, -1]
    assert torch.equal(readout_row(matrix, torch.ones(2, 5)), matrix[:, 0])


@pytest.mark.parametrize("readout", READOUTS)
def test_readout_keeps_the_dtype(readout: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        local = make_local(dtype=torch.float32).to(dtype)
        scaled, log = rollout(local)
        assert scaled.dtype == dtype
        assert log.dtype == torch.float64
        assert readout_row(scaled, torch.ones(2, 5), readout).dtype == dtype


@pytest.mark.parametrize("readout", ["cls", "last"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_rows_that_are_not_read_do_not_matter(readout: str, garbage: float) -> None:
    matrix = make_local(1, 2)
    expected = readout_row(matrix, torch.ones(1, 5), readout)
    matrix[:, :, 2] = garbage
    assert torch.equal(readout_row(matrix, torch.ones(1, 5), readout), expected)


@pytest.mark.parametrize("readout", READOUTS)
def test_rows_of_padding_do_not_matter(readout: str) -> None:
    matrix = make_local(1, 2)
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    expected = readout_row(matrix, mask, readout)
    matrix[:, :, [0, 4]] = float("nan")
    assert torch.equal(readout_row(matrix, mask, readout), expected)


def test_unknown_readout_names_the_choices() -> None:
    with pytest.raises(ValueError, match="'CLS'") as caught:
        readout_row(make_local(), torch.ones(2, 5), "CLS")
    for readout in READOUTS:
        assert readout in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda local: rollout(local),
        lambda local: rollout(local, normalize=True),
        lambda local: rollout_step(local[:, 0]),
        lambda local: rollout_step(local[:, 0], local[:, 1]),
        lambda local: (normalize_rows(local),),
        lambda local: tuple(readout_row(local, MASKS[:2], readout) for readout in READOUTS),
    ],
)
def test_inputs_are_left_alone_and_results_repeat(call: Callable[[Tensor], Any]) -> None:
    local = make_local()
    before = local.clone()
    first_results, second_results = call(local), call(local)
    assert torch.equal(local, before)
    for one, other in zip(first_results, second_results, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != local.data_ptr()
