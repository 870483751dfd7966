import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from globenc_lightning.functional import (
    METHODS,
    FrozenNorm,
    attribution,
    devices,
    gradient_x_input,
    gram_kernel,
    local_maps,
    readout_row,
    rollout,
    spearman,
)
from globenc_lightning.functional.attribution import linearized, source_gram
from tests import naive

REFERENCE = Path(__file__).parents[1] / "reference"

randomized = settings(deadline=None, derandomize=True, database=None, max_examples=80)


@dataclass(frozen=True)
class Layer:
    attention: Tensor
    values: Tensor
    projection: Tensor
    bias: Tensor | None
    residual: Tensor
    norms: tuple[naive.Norm, ...]
    mask: Tensor
    first_norms: int = 1

    def naive_maps(self) -> dict[str, Tensor]:
        return naive.local_maps(
            self.attention,
            self.values,
            self.projection,
            self.bias,
            self.residual,
            self.norms,
            self.mask,
            self.first_norms,
        )

    def arguments(self) -> dict[str, Any]:
        b, h, s, v = self.values.shape
        context = (self.attention @ self.values).transpose(1, 2).reshape(b, s, h * v)
        mixed = context @ self.projection.T + self.residual
        enters = mixed if self.bias is None else mixed + self.bias
        frozen = [
            FrozenNorm(
                norm.weight,
                norm.deviation(enters if norm.real is None else norm.real).squeeze(-1),
                norm.centered,
            )
            for norm in self.norms
        ]
        return {
            "attention": self.attention,
            "values": self.values,
            "projection": self.projection,
            "residual": self.residual,
            # As it is read from a model, with the rounding of the way there and back.
            "mixed": mixed if self.bias is None else enters - self.bias,
            "norms": {"N-ResLN": frozen[: self.first_norms], "N-Enc": frozen},
            "mask": self.mask,
        }

    def maps(self, methods: Sequence[str] = METHODS) -> dict[str, Tensor]:
        return local_maps(**self.arguments(), methods=methods)

    def to(self, dtype: torch.dtype) -> "Layer":
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return replace(
            self,
            attention=self.attention.to(dtype),
            values=self.values.to(dtype),
            projection=self.projection.to(dtype),
            bias=cast(self.bias),
            residual=self.residual.to(dtype),
            norms=tuple(replace(norm, weight=cast(norm.weight), real=cast(norm.real)) for norm in self.norms),
        )


def make_layer(
    lengths: Sequence[int] = (5,),
    *,
    heads: int = 2,
    width: int = 3,
    hidden: int = 8,
    left: bool = False,
    causal: bool = False,
    sharpness: float = 1.0,
    norms: str = "LL",
    weightless: bool = False,
    first_norms: int = 1,
    bias: bool = True,
    seed: int = 0,
) -> Layer:
    """``norms``: one letter per norm, L for LayerNorm and R for RMSNorm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def norm_weight() -> Tensor:
        size = 0.3 + 1.6 * torch.rand(hidden, generator=generator, dtype=torch.float64)
        return size * torch.where(normal(hidden) < -0.5, -1.0, 1.0)

    b, s = len(lengths), max(lengths)
    position = torch.arange(s).expand(b, s)
    length = torch.tensor(lengths).unsqueeze(1)
    mask = position >= s - length if left else position < length
    scores = (sharpness * normal(b, heads, s, s)).masked_fill(~mask.view(b, 1, 1, s), float("-inf"))
    if causal:
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
    made = tuple(
        naive.Norm(
            weight=None if weightless else norm_weight(),
            eps=1e-6,
            centered=kind == "L",
            real=None if index == 0 else 0.5 + (1 + index) * normal(b, s, hidden),
        )
        for index, kind in enumerate(norms)
    )
    return Layer(
        # A query without a single key to attend to (left padding, causal) has no softmax: zeros, as models give it.
        attention=scores.softmax(-1).nan_to_num(0.0),
        values=0.3 + normal(b, heads, s, width),
        projection=normal(hidden, heads * width) / (heads * width) ** 0.5,
        bias=1 + normal(hidden) if bias else None,
        residual=0.2 + normal(b, s, hidden),
        norms=made,
        mask=mask,
        first_norms=first_norms,
    )


layers = st.builds(
    make_layer,
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    heads=st.integers(1, 16),
    width=st.integers(1, 8),
    # Few dimensions let the heads cancel by chance, where no formula keeps nine digits: see the test for those.
    hidden=st.integers(6, 20),
    left=st.booleans(),
    causal=st.booleans(),
    sharpness=st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    norms=st.sampled_from(["LL", "L", "LLL", "RR", "LR", "RLR"]),
    weightless=st.sampled_from([False, False, True]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)


def assert_maps_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, floor: float) -> None:
    """``floor``: tolerance for entries that are small beside the largest of their example."""
    assert list(actual) == list(expected)
    for method, expected_map in expected.items():
        assert actual[method].shape == expected_map.shape
        difference = (actual[method].double() - expected_map.double()).abs()
        largest = expected_map.double().flatten(1).amax(1).view(-1, 1, 1)
        excess = difference - rtol * expected_map.double() - floor * largest
        # Not `(excess > 0).any()`, which a NaN would pass.
        assert (excess <= 0).all(), f"{method}: {excess.max().item()} beyond the tolerance"


@randomized
@given(layers)
def test_every_method_equals_the_naive_form(layer: Layer) -> None:
    assert_maps_close(layer.maps(), layer.naive_maps(), rtol=1e-9, floor=1e-14)


@randomized
@given(layers)
def test_every_method_equals_the_naive_form_in_single_precision(layer: Layer) -> None:
    single = layer.to(torch.float32)
    actual = single.maps()
    assert {matrix.dtype for matrix in actual.values()} == {torch.float32}
    assert_maps_close(actual, single.to(torch.float64).naive_maps(), rtol=1e-4, floor=1e-5)


@randomized
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(2, 5), st.integers(0, 2**31))
def test_heads_that_cancel_in_few_dimensions(lengths: list[int], hidden: int, seed: int) -> None:
    layer = make_layer(lengths, heads=8, hidden=hidden, seed=seed)
    assert_maps_close(layer.maps(), layer.naive_maps(), rtol=1e-7, floor=1e-9)


def test_vectors_that_cancel_exactly_have_no_length_and_no_nan() -> None:
    layer = make_layer((12,), heads=3, width=4, norms="", first_norms=0)
    one, other = layer.projection[:, :4], layer.projection[:, 4:8]
    layer = replace(
        layer,
        attention=layer.attention[:, :1].expand(-1, 3, -1, -1),
        values=layer.values[:, :1].expand(-1, 3, -1, -1),
        projection=torch.cat([one, other, -one - other], 1),
    ).to(torch.float32)
    maps = layer.maps(["N", "N-Res"])
    assert (maps["N"] >= 0).all()
    assert maps["N"].max() < 1e-3
    torch.testing.assert_close(maps["N-Res"].diagonal(dim1=1, dim2=2), layer.residual.norm(dim=-1))


@settings(randomized, max_examples=25)
@given(layers)
def test_padding_is_exactly_zero_and_what_it_holds_is_ignored(layer: Layer) -> None:
    real = layer.mask.unsqueeze(1) & layer.mask.unsqueeze(2)
    clean = layer.maps()
    for matrix in clean.values():
        assert (matrix[~real] == 0).all()
    for garbage in (float("nan"), float("inf"), -1e30):
        arguments = layer.arguments()
        padding = ~layer.mask
        arguments["values"] = layer.values.masked_fill(padding.unsqueeze(1).unsqueeze(-1), garbage)
        for name in ("residual", "mixed"):
            arguments[name] = arguments[name].masked_fill(padding.unsqueeze(-1), garbage)
        arguments["attention"] = layer.attention.masked_fill(~real.unsqueeze(1), garbage)
        arguments["norms"] = {
            method: [replace(norm, scale=norm.scale.masked_fill(padding, garbage)) for norm in norms]
            for method, norms in arguments["norms"].items()
        }
        assert_maps_close(local_maps(**arguments), clean, rtol=1e-13, floor=1e-15)


def test_garbage_in_a_real_token_stays_in_its_own_example() -> None:
    layer = make_layer((5, 5, 3))
    values = layer.values.clone()
    values[1, 0, 2] = float("nan")
    maps = replace(layer, values=values).maps()
    assert maps["N-Enc"][1].isnan().any()
    for method, matrix in layer.maps().items():
        torch.testing.assert_close(maps[method][[0, 2]], matrix[[0, 2]], rtol=1e-13, atol=0)


@pytest.mark.parametrize("left", [False, True])
def test_an_example_alone_gives_what_it_gives_in_a_padded_batch(left: bool) -> None:
    layer = make_layer((9, 4, 1), left=left)
    together = layer.maps()
    for index, length in enumerate((9, 4, 1)):
        cut = slice(9 - length, 9) if left else slice(0, length)
        alone = replace(
            layer,
            attention=layer.attention[index : index + 1, :, cut, cut],
            values=layer.values[index : index + 1, :, cut],
            residual=layer.residual[index : index + 1, cut],
            norms=tuple(
                norm if norm.real is None else replace(norm, real=norm.real[index : index + 1, cut])
                for norm in layer.norms
            ),
            mask=torch.ones(1, length),
        )
        for method, matrix in alone.maps().items():
            torch.testing.assert_close(together[method][index, cut, cut], matrix[0], rtol=1e-12, atol=1e-14)


def test_mask_of_any_type_with_holes() -> None:
    layer = make_layer((6, 6))
    holes = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]])
    attention = layer.attention * holes.view(2, 1, 1, 6)
    layer = replace(layer, attention=attention / attention.sum(-1, keepdim=True), mask=holes)
    expected = layer.naive_maps()
    for dtype in (torch.int64, torch.bool, torch.float32):
        assert_maps_close(replace(layer, mask=holes.to(dtype)).maps(), expected, rtol=1e-9, floor=1e-14)


def test_a_single_token_keeps_all_of_itself() -> None:
    for dtype in (torch.float64, torch.float32):
        layer = make_layer((1, 4), heads=12, width=8, hidden=96).to(dtype)
        maps = layer.maps()
        for method in ("W", "W-FixedRes", "W-Res", "N-FixedRes"):
            assert maps[method][0, 0, 0] == pytest.approx(1, abs=1e-6)
        # The same vector two ways: a product of matrices and a difference that rounding keeps from zero.
        assert maps["W-Res"][0, 0, 0] == 1


def test_a_query_that_attends_to_itself_alone_mixes_nothing() -> None:
    layer = make_layer((4,))
    layer = replace(layer, attention=torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4))
    assert torch.equal(layer.maps()["W-Res"], torch.eye(4, dtype=torch.float64)[None])


def test_rows_of_the_methods_that_are_distributions_sum_to_one() -> None:
    layer = make_layer((7, 3), sharpness=3.0)
    maps = layer.maps()
    for method in ("W", "W-FixedRes", "W-Res", "N-FixedRes"):
        torch.testing.assert_close(maps[method].sum(-1), layer.mask.double(), rtol=1e-12, atol=0)


def test_an_example_of_padding_alone_gives_zeros() -> None:
    layer = make_layer((4, 4))
    layer = replace(layer, mask=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    for matrix in layer.maps().values():
        assert torch.equal(matrix[0], torch.zeros(4, 4, dtype=torch.float64))
        assert matrix[1].isfinite().all()


@pytest.mark.parametrize(
    "methods", [*[(method,) for method in METHODS], ("N-Enc", "W"), ("N-FixedRes", "N-ResLN"), ("W-Res", "N"), ()]
)
def test_some_methods_are_what_all_of_them_are(methods: tuple[str, ...]) -> None:
    layer = make_layer((6, 3))
    together = layer.maps()
    maps = layer.maps(methods)
    assert tuple(maps) == methods
    for method in methods:
        assert torch.equal(maps[method], together[method])


def test_methods_without_norms_need_none() -> None:
    layer = make_layer((4,))
    methods = ("W", "W-FixedRes", "N", "N-FixedRes", "N-Res")
    maps = local_maps(**{**layer.arguments(), "norms": {}}, methods=methods)
    for method, matrix in layer.maps(methods).items():
        assert torch.equal(maps[method], matrix)


def test_unknown_method_names_the_choices() -> None:
    with pytest.raises(ValueError, match="'N-enc'") as caught:
        make_layer().maps(["N", "N-enc"])
    for method in METHODS:
        assert method in str(caught.value)


@pytest.mark.parametrize("norms", ["R", "RR", "LR", "RLR", "LLL"])
@pytest.mark.parametrize("weightless", [False, True])
def test_other_chains_of_norms(norms: str, weightless: bool) -> None:
    layer = make_layer((5, 2), norms=norms, weightless=weightless)
    assert_maps_close(layer.maps(), layer.naive_maps(), rtol=1e-10, floor=1e-14)


def test_two_norms_before_the_ffn() -> None:
    layer = make_layer((5, 2), norms="LRL", first_norms=2)
    assert_maps_close(layer.maps(), layer.naive_maps(), rtol=1e-10, floor=1e-14)


def test_without_norms_three_methods_are_one() -> None:
    layer = make_layer((5, 2), norms="", first_norms=0)
    maps = layer.maps()
    assert_maps_close(maps, layer.naive_maps(), rtol=1e-10, floor=1e-14)
    assert torch.equal(maps["N-Res"], maps["N-ResLN"])
    assert torch.equal(maps["N-Res"], maps["N-Enc"])


def test_centring_is_not_the_same_as_none() -> None:
    maps = {centered: make_layer((5,), norms="L" if centered else "R").maps()["N-Enc"] for centered in (True, False)}
    assert not torch.allclose(maps[True], maps[False], rtol=1e-2)


def test_frozen_norm_is_the_norm_at_its_own_input() -> None:
    layer = torch.nn.LayerNorm(6, eps=1e-5, dtype=torch.float64)
    torch.nn.init.normal_(layer.weight)
    real = 0.7 + torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = FrozenNorm(layer.weight.detach(), (real.var(-1, unbiased=False) + layer.eps).sqrt())
    torch.testing.assert_close(linearized(real, [norm]), layer(real).detach(), rtol=1e-12, atol=1e-12)
    # Linear, unlike the norm itself.
    torch.testing.assert_close(linearized(3 * real, [norm]), 3 * linearized(real, [norm]))


@pytest.mark.parametrize("norms", ["", "L", "LR"])
def test_gram_matrices_are_inner_products_of_transformed_values(norms: str) -> None:
    layer = make_layer((4, 4), heads=3, width=2, hidden=7, norms=norms)
    matrix = torch.eye(7, dtype=torch.float64)  # M, column by column
    for norm in layer.norms:
        if norm.centered:
            matrix = matrix - matrix.mean(0, keepdim=True)
        assert norm.weight is not None
        matrix = norm.weight.unsqueeze(1) * matrix
    transformed = torch.einsum("bhkv,dhv->bkhd", layer.values, (matrix @ layer.projection).view(7, 3, 2))
    frozen = [FrozenNorm(norm.weight, torch.full((2, 4), 5.0), norm.centered) for norm in layer.norms]
    gram = source_gram(layer.values, gram_kernel(layer.projection, frozen))
    torch.testing.assert_close(gram, transformed @ transformed.transpose(2, 3), rtol=1e-12, atol=1e-12)


class LargestResult(TorchDispatchMode):
    """Remembers the largest number of elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_query_by_key_by_hidden_is_ever_made() -> None:
    b, h, s, v = 2, 8, 48, 16
    layer = make_layer((s, s - 5), heads=h, width=v, hidden=h * v).to(torch.float32)
    arguments = layer.arguments()
    with LargestResult() as ours:
        local_maps(**arguments)
    with LargestResult() as direct:
        layer.naive_maps()
    assert ours.numel <= max(b * h * s * s, b * s * h * v, (h * v) ** 2)
    assert direct.numel >= s * s * h * v > 5 * ours.numel


def test_inputs_are_left_alone_and_results_repeat() -> None:
    arguments = make_layer((6, 3), causal=True).arguments()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    tensors |= {f"scale {index}": norm.scale for index, norm in enumerate(arguments["norms"]["N-Enc"])}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    first, second = local_maps(**arguments), local_maps(**arguments)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
    for method in METHODS:
        assert torch.equal(first[method], second[method])
        assert not first[method].requires_grad


def test_one_result_does_not_share_memory_with_another() -> None:
    for norms, first_norms in (("LL", 1), ("", 0)):
        layer = make_layer((5,), norms=norms, first_norms=first_norms)
        maps, untouched = layer.maps(), layer.maps()
        for method in METHODS:
            maps[method].fill_(-1.0)
            for other in METHODS[METHODS.index(method) + 1 :]:
                assert torch.equal(maps[other], untouched[other]), (method, other)


def test_tensors_that_require_a_gradient_are_accepted() -> None:
    layer = make_layer((5, 3))
    plain = layer.maps()
    tracked = replace(layer, values=layer.values.clone().requires_grad_(), projection=layer.projection.requires_grad_())
    for method, matrix in tracked.maps().items():
        assert torch.equal(matrix.detach(), plain[method])
    with torch.inference_mode():
        for method, matrix in tracked.maps().items():
            assert torch.equal(matrix, plain[method])


@pytest.mark.parametrize(("dtype", "rtol", "atol_rho"), [(torch.float64, 1e-9, 1e-12), (torch.float32, 1e-4, 1e-4)])
def test_the_figures_of_the_authors_code(dtype: torch.dtype, rtol: float, atol_rho: float) -> None:
    configuration = json.loads((REFERENCE / "bert_tiny.json").read_text())
    configuration.pop("kind")
    # Any: torch types the children of a module as tensor or module.
    model: Any = BertForSequenceClassification._from_config(BertConfig(**configuration), attn_implementation="eager")
    model.load_state_dict(load_file(REFERENCE / "bert_tiny.safetensors"))
    model.to(dtype).eval()
    with np.load(REFERENCE / "bert_tiny.npz") as file:
        figures = {name: torch.from_numpy(file[name]) for name in file.files}

    seen: dict[str, Tensor] = {}

    def remember_input(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach()

        return hook

    def remember_output(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output.detach()

        return hook

    for index, layer in enumerate(model.bert.encoder.layer):
        layer.attention.self.value.register_forward_hook(remember_output(f"values {index}"))
        layer.attention.output.LayerNorm.register_forward_pre_hook(remember_input(f"p1 {index}"))
        layer.output.LayerNorm.register_forward_pre_hook(remember_input(f"p2 {index}"))
    mask = figures["attention_mask"]
    output = model(
        input_ids=figures["input_ids"], attention_mask=mask, output_attentions=True, output_hidden_states=True
    )
    embeddings = output.hidden_states[0]
    (gradient,) = torch.autograd.grad(output.logits.gather(1, figures["predicted"].view(-1, 1)).sum(), embeddings)
    saliency = gradient_x_input(gradient, embeddings.detach(), mask)
    torch.testing.assert_close(saliency.double(), figures["saliency_l2"], rtol=rtol, atol=0)

    local: dict[str, list[Tensor]] = {method: [] for method in METHODS}
    for index, layer in enumerate(model.bert.encoder.layer):
        frozen = [
            FrozenNorm(norm.weight.detach(), (seen[real].var(-1, unbiased=False) + norm.eps).sqrt())
            for norm, real in (
                (layer.attention.output.LayerNorm, f"p1 {index}"),
                (layer.output.LayerNorm, f"p2 {index}"),
            )
        ]
        dense = layer.attention.output.dense
        heads = layer.attention.self.num_attention_heads
        maps = local_maps(
            attention=output.attentions[index].detach(),
            values=seen[f"values {index}"].unflatten(-1, (heads, -1)).transpose(1, 2),
            projection=dense.weight.detach(),
            residual=output.hidden_states[index].detach(),
            mixed=seen[f"p1 {index}"] - dense.bias.detach(),
            norms={"N-ResLN": frozen[:1], "N-Enc": frozen},
            mask=mask,
        )
        for method, matrix in maps.items():
            local[method].append(matrix)

    for method in METHODS:
        stacked = torch.stack(local[method], 1)
        scaled, log = rollout(stacked)
        raw = scaled.double() * log.exp()[..., None, None]
        rho = spearman(readout_row(scaled, mask), saliency.unsqueeze(1), mask.unsqueeze(1))
        torch.testing.assert_close(stacked.double(), figures[f"local/{method}"], rtol=rtol, atol=rtol / 100)
        torch.testing.assert_close(raw, figures[f"rollout/{method}"], rtol=rtol, atol=rtol / 100)
        torch.testing.assert_close(rho, figures[f"spearman_cls/{method}"], rtol=0, atol=atol_rho)


@pytest.mark.parametrize("chunk", [1, 7, 40, 200, 1000])
def test_the_size_of_a_chunk_changes_no_figure(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer((9, 5, 7), heads=3, width=4, hidden=10)
    expected = layer.naive_maps()
    monkeypatch.setattr(devices, "CHUNK", chunk)
    assert_maps_close(layer.maps(), expected, rtol=1e-9, floor=1e-12)


@pytest.mark.parametrize("entries", [0, 1, 3, 50])
@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (7, 1), (1, 9), (3, 0)])
def test_chunks_cover_everything_once(shape: tuple[int, int], entries: int) -> None:
    seen = torch.zeros(shape)
    for part in attribution.chunks(*shape, entries, 12):
        assert 0 < seen[part].numel() <= max(1, 12 // max(1, entries))
        seen[part] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 700])
def test_a_kernel_made_in_panels_is_the_whole_product(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    projection = torch.randn(40, width, generator=generator, dtype=torch.float64)
    weight = torch.rand(40, generator=generator, dtype=torch.float64) + 0.5
    kernel = gram_kernel(projection, [FrozenNorm(weight, torch.ones(1, 1))])
    through = (projection - projection.mean(0)) * weight.unsqueeze(1)
    torch.testing.assert_close(kernel, through.T @ through, rtol=1e-12, atol=1e-12)


def test_maps_are_written_where_the_caller_wants_them() -> None:
    layer = make_layer((6, 4), heads=2, width=3, hidden=8)
    methods = ("N-Enc", "W-Res", "N-FixedRes", "W")
    kept = torch.full((2, len(methods), 3, 6, 6), float("nan"), dtype=layer.values.dtype)
    room = kept[:, :, 1].transpose(0, 1)
    found = local_maps(**layer.arguments(), methods=methods, out=room)
    for place, (method, expected) in enumerate(layer.maps(methods).items()):
        assert torch.equal(kept[:, place, 1], expected)
        assert found[method].data_ptr() == room[place].data_ptr()
    assert kept[:, :, ::2].isnan().all()


@pytest.mark.parametrize(("heads", "width"), [(12, 32), (5, 48), (3, 100), (7, 40), (1, 300)])
def test_a_kernel_for_heads_holds_all_that_their_gram_matrices_need(heads: int, width: int) -> None:
    draw = torch.Generator().manual_seed(heads)
    hidden = 32
    projection = torch.randn(hidden, heads * width, generator=draw, dtype=torch.float64)
    values = torch.randn(2, heads, 3, width, generator=draw, dtype=torch.float64)
    weight = torch.rand(hidden, generator=draw, dtype=torch.float64) + 0.5
    norms = [FrozenNorm(weight, torch.ones(1, 1))]
    vectors = weight.unsqueeze(1) * (projection - projection.mean(0))
    transformed = torch.einsum("dhv,bhkv->bkhd", vectors.view(hidden, heads, width), values)
    expected = transformed @ transformed.transpose(2, 3)
    for kernel in (gram_kernel(projection, norms, heads), gram_kernel(projection, norms)):
        torch.testing.assert_close(source_gram(values, kernel), expected)
