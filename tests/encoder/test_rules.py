"""Layers that are put together in another way than the paper's: read right by hand, and their neighbours refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from globenc_lightning import METHODS, attribute
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.encoder.fitting import fitted
from globenc_lightning.encoder.layers import PARALLEL, POST_LN, PRE_LN, SUBLAYER_NORM
from globenc_lightning.errors import UnsupportedEncoderError
from globenc_lightning.settings import Settings
from tests import models
from tests.families import FAMILIES, Classifier, Family, build, example_inputs
from tests.naive_families import assert_same_maps, naive_maps

EVERYTHING = Settings(METHODS)


def family(name: str) -> Family:
    return next(one for one in FAMILIES if one.name == name)


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[Family, Classifier, dict[str, Tensor]]:
    own = family(name)
    return own, build(own, dtype=dtype), example_inputs(own, dtype)


# ---- numbers that a sub-layer's output and the stream are multiplied by


class Summed(nn.Module):
    """A post-LN sum with numbers, as DeepNorm has it, in place of BERT's."""

    def __init__(self, base: Any, kept: float | nn.Parameter, factor: float | nn.Parameter) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.kept, self.factor = base.dense, base.LayerNorm, kept, factor

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        return self.LayerNorm(self.kept * given + self.factor * self.dense(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "numbers",
    [(0.4, 1.7, 2.1, 0.6), (1.0, 2.5, 2.5, 1.0), (0.22, 1.0, 1.0, 0.22), (1.0, 1.0, 1.8, 1.0), (3.0, -1.0, -1.5, 0.5)],
    ids=str,
)
def test_numbers_in_a_post_ln_layer(numbers: tuple[float, float, float, float], dtype: torch.dtype) -> None:
    own, model, inputs = built("bert", dtype)
    for layer in model.encoder.encoder.layer:
        layer.attention.output = Summed(layer.attention.output, numbers[1], numbers[0])
        layer.output = Summed(layer.output, numbers[2], numbers[3])
    found = attribute(model, inputs, methods=METHODS)
    assert found.rule == POST_LN
    exact = dtype == torch.float64
    assert float(found.reconstruction_error.max()) < (1e-12 if exact else 1e-5)
    expected = naive_maps(own, model, inputs, (numbers[0], numbers[1], numbers[2]))
    assert_same_maps(found.local, expected, 1e-9 if exact else 1e-4)


def test_numbers_that_are_learned_are_read_as_they_stand() -> None:
    own, model, inputs = built("bert")
    numbers = [nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (0.4, 1.7, 2.1, 0.6)]
    for layer in model.encoder.encoder.layer:
        layer.attention.output = Summed(layer.attention.output, numbers[1], numbers[0])
        layer.output = Summed(layer.output, numbers[2], numbers[3])
    reader = Reader(model)
    for value in (0.4, 0.9):
        with torch.no_grad():
            numbers[0].fill_(value)
        found = analyze(reader, inputs, EVERYTHING)
        assert_same_maps(found.local, naive_maps(own, model, inputs, (value, 1.7, 2.1)), 1e-9)


@pytest.mark.parametrize("multiplier", [0.22, 1.4, -0.7])
def test_numbers_in_a_pre_ln_layer(multiplier: float) -> None:
    own, model, inputs = built("granite", torch.float32)
    for layer in model.encoder.layers:
        layer.residual_multiplier = multiplier
    found = attribute(model, inputs, methods=METHODS)
    assert found.rule == PRE_LN
    assert_same_maps(found.local, naive_maps(own, model, inputs, (multiplier, 1, 1)), 1e-4)


def test_a_number_that_changes_is_found_again() -> None:
    own, model, inputs = built("granite", torch.float32)
    reader = Reader(model)
    analyze(reader, inputs, EVERYTHING)
    for layer in model.encoder.layers:
        layer.residual_multiplier = 0.5
    found = analyze(reader, inputs, EVERYTHING)
    assert_same_maps(found.local, naive_maps(own, model, inputs, (0.5, 1, 1)), 1e-4)


class Gated(Summed):
    """The attention's output is multiplied by a number that depends on the token."""

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        return self.LayerNorm(given + (1 + 0.05 * given[..., :1].tanh()) * self.dense(hidden))


@pytest.mark.parametrize("place", ["attention", "network"])
def test_a_number_that_depends_on_the_token_is_refused(place: str) -> None:
    _, model, inputs = built("bert")
    layer = model.encoder.encoder.layer[1]
    if place == "attention":
        layer.attention.output = Gated(layer.attention.output, 1.0, 1.0)
    else:
        layer.output = Gated(layer.output, 1.0, 1.0)
    with pytest.raises(UnsupportedEncoderError, match=r"neither a post-LN nor a pre-LN|added neither to what leaves"):
        attribute(model, inputs)


def test_a_layer_without_its_residual_is_refused() -> None:
    _, model, inputs = built("bert")
    layer = model.encoder.encoder.layer[1]
    layer.attention.output = Summed(layer.attention.output, 0.0, 1.0)
    with pytest.raises(UnsupportedEncoderError, match="neither a post-LN nor a pre-LN"):
        attribute(model, inputs)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize("numbers", [(1.0, 1.0), (1.0, 0.22), (2.5, 1.0), (-0.3, 1.7)])
def test_numbers_are_found_at_the_real_tokens(numbers: tuple[float, float]) -> None:
    stream, output = drawn(2, 3, 8), drawn(2, 3, 8, seed=1)
    stream[..., 2] *= 1e4  # one large channel beside the others
    total = numbers[0] * stream + numbers[1] * output
    total[1, 2] = float("nan")
    found = fitted(total, stream, output, MASK)
    assert found is not None
    torch.testing.assert_close(torch.tensor(found), torch.tensor(numbers), rtol=1e-9, atol=1e-9)
    assert [one for one, number in zip(found, numbers, strict=True) if number == 1.0] == [1.0] * numbers.count(1.0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda stream, output: (output, stream, output), id="the stream is not in it"),
        pytest.param(lambda stream, output: (stream, stream, output), id="the output is not in it"),
        pytest.param(lambda stream, output: (3 * stream, stream, 2 * stream), id="both are the same"),
        pytest.param(lambda stream, output: (stream + output.square(), stream, output), id="something else"),
        pytest.param(lambda stream, output: (stream + output[:, :2].sum(), stream, output[:, :2]), id="another shape"),
        pytest.param(lambda stream, output: (stream * float("nan"), stream, output), id="not finite"),
    ],
)
def test_no_numbers_fit(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    assert fitted(*change(drawn(2, 3, 8), drawn(2, 3, 8, seed=1)), MASK) is None


# ---- a norm on the attention's output


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("name", ["olmo2", "glm4"])
def test_norms_of_both_kinds_on_the_attentions_output(name: str, kind: type[nn.Module]) -> None:
    """LayerNorm takes off a mean and adds a bias, which none of the families' own norms does."""
    own, model, inputs = built(name)
    attribute_name = "post_self_attn_layernorm" if name == "glm4" else "post_attention_layernorm"
    generator = torch.Generator().manual_seed(3)
    for layer in model.encoder.layers:
        norm = kind(32, dtype=torch.float64, eps=1e-5)
        for parameter in norm.parameters():
            parameter.data.copy_(torch.rand(32, generator=generator) + 0.3)
        setattr(layer, attribute_name, norm)
    found = attribute(model, inputs, methods=METHODS)
    assert found.rule == SUBLAYER_NORM

    # The naive form of the family, with LayerNorms where the table of paths says RMSNorm.
    expected = naive_maps(own, model, inputs, own_centered=kind is nn.LayerNorm)
    assert_same_maps(found.local, expected, 1e-6)


def mixed(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output + 0.02 * output.mean(1, keepdim=True)


def bent(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output + 0.02 * output.square()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("hook", [mixed, bent])
@pytest.mark.parametrize("name", ["gemma3", "olmo2", "glm4"])
def test_what_is_no_norm_on_the_attentions_output_is_refused(
    name: str, hook: Callable[..., Tensor], known: bool
) -> None:
    _, model, inputs = built(name, torch.float32)
    reader = Reader(model)
    if known:
        analyze(reader, inputs, EVERYTHING)
    layer = model.encoder.layers[1]
    (layer.post_self_attn_layernorm if name == "glm4" else layer.post_attention_layernorm).register_forward_hook(hook)
    with pytest.raises(UnsupportedEncoderError, match=r"attention call 2: .* neither a post-LN nor a pre-LN"):
        analyze(reader, inputs, EVERYTHING)


@pytest.mark.parametrize("hook", [mixed, bent])
def test_what_follows_the_networks_own_norm_is_a_part_of_the_network(hook: Callable[..., Tensor]) -> None:
    _, model, inputs = built("gemma3", torch.float32)
    model.encoder.layers[1].mlp.register_forward_hook(hook)
    if hook is bent:
        assert attribute(model, inputs).rule == SUBLAYER_NORM
        return
    with pytest.raises(UnsupportedEncoderError, match=r"layer 2 .*: the feed-forward network of one token depends on"):
        attribute(model, inputs)


# ---- parallel sub-layers


def twice(module: nn.Module, given: Any, output: Any) -> Any:
    return (2 * output[0], *output[1:])


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", ["gpt_neox", "phi", "cohere", "gptj", "falcon"])
def test_attention_that_is_added_twice_is_refused(name: str, known: bool) -> None:
    _, model, inputs = built(name, torch.float32)
    reader = Reader(model)
    if known:
        analyze(reader, inputs, EVERYTHING)
    layers = model.encoder.h if hasattr(model.encoder, "h") else model.encoder.layers
    layer = layers[1]
    attention = next(
        getattr(layer, key) for key in ("attention", "attn", "self_attn", "self_attention") if hasattr(layer, key)
    )
    attention.register_forward_hook(twice)
    with pytest.raises(UnsupportedEncoderError, match=r"attention call 2: .*nor .* in parallel"):
        analyze(reader, inputs, EVERYTHING)


@pytest.mark.parametrize("name", ["gpt_neox", "phi", "cohere"])
def test_a_parallel_network_that_mixes_tokens_is_refused(name: str) -> None:
    _, model, inputs = built(name, torch.float32)
    layer = (model.encoder.h if hasattr(model.encoder, "h") else model.encoder.layers)[1]
    layer.mlp.register_forward_hook(mixed)
    with pytest.raises(UnsupportedEncoderError, match=r"layer 2 .*: the feed-forward network of one token depends on"):
        attribute(model, inputs)


def test_a_network_that_reads_the_attention_is_not_parallel() -> None:
    """x + attention + network(x + attention), with no norm that tells it."""
    _, model, inputs = built("gpt_neox", torch.float32)
    layer = model.encoder.layers[1]
    given: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    layer.attention.register_forward_hook(lambda module, args, output: given.append(output[0]))
    network = layer.mlp.forward
    layer.mlp.forward = lambda hidden: network(F.layer_norm(given[-2] + given[-1], (32,)))
    with pytest.raises(UnsupportedEncoderError, match=r"layer 2 .*: the feed-forward network of one token depends on"):
        attribute(model, inputs)


def test_a_parallel_layer_whose_network_is_wrong_does_not_pass() -> None:
    """What the network adds is proven at every analysis, and so is what the projection gives."""
    _, model, inputs = built("gpt_neox", torch.float32)
    reader = Reader(model)
    right = analyze(reader, inputs, EVERYTHING)
    assert (right.rule, len(right.reconstruction_error)) == (PARALLEL, 3)
    layer = model.encoder.layers[1]
    for wrong in (layer.mlp, layer.attention.dense):
        handle = wrong.register_forward_hook(bent)
        if wrong is layer.mlp:
            # A hook changes the network itself, which may be anything that looks at one token at a time.
            assert float(analyze(reader, inputs, EVERYTHING).reconstruction_error.max()) < 1e-5
        else:
            with pytest.raises(UnsupportedEncoderError, match=r"layer 2 .* misses"):
                analyze(reader, inputs, EVERYTHING)
        handle.remove()


# ---- texts that are joined


@pytest.mark.parametrize("name", ["opt", "opt (norms after)"])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(0, 1), slice(2, 3)])
def test_joined_texts_are_taken_apart(name: str, rows: slice) -> None:
    own, model, inputs = built(name)
    some = {key: value[rows] for key, value in inputs.items()}
    found = attribute(model, some, methods=METHODS)
    assert_same_maps(found.local, naive_maps(own, model, some), 1e-9)


def test_texts_that_are_joined_in_another_order_are_refused_with_the_reason() -> None:
    _, model, inputs = built("opt", torch.float32)
    layer = model.encoder.decoder.layers[0]

    def forward(hidden_states: Tensor, **others: Any) -> Tensor:
        attention = layer.self_attn(hidden_states=layer.self_attn_layer_norm(hidden_states), **others)[0]
        turned = (hidden_states + attention).transpose(0, 1)
        joined = turned.reshape(-1, turned.shape[-1])
        joined = joined + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(joined))))
        return joined.view(turned.shape).transpose(0, 1)

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("a layer of this OPT returns a tuple")
    layer.forward = forward
    with pytest.raises(
        UnsupportedEncoderError, match=r"layers\.0\.final_layer_norm is given tensors that are not of the"
    ):
        attribute(model, inputs)


# ---- what is written into


class Inplace(nn.Module):
    """BERT's last step with the residual added into what the linear map returned."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.dense, self.LayerNorm = base.dense, base.LayerNorm

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        out = self.dense(hidden)
        out += given
        return self.LayerNorm(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["attention", "network", "both"])
def test_a_residual_that_is_added_in_place(place: str, dtype: torch.dtype) -> None:
    _, model, inputs = built("bert", dtype)
    expected = attribute(model, inputs, methods=METHODS)
    for layer in model.encoder.encoder.layer:
        if place != "network":
            layer.attention.output = Inplace(layer.attention.output)
        if place != "attention":
            layer.output = Inplace(layer.output)
    found = attribute(model, inputs, methods=METHODS)
    assert_same_maps(found.local, expected.local, 1e-6)


# ---- true reasons


class Squashed(nn.Module):
    """What some put in place of a norm: no statistics at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(0.5 * x)


def test_a_norm_of_an_unknown_kind_is_named() -> None:
    _, model, inputs = built("llama", torch.float32)
    model.encoder.layers[0].post_attention_layernorm = Squashed()
    with pytest.raises(UnsupportedEncoderError) as caught:
        attribute(model, inputs)
    assert "encoder.layers.0.post_attention_layernorm (Squashed) does" in str(caught.value)
    assert "neither a LayerNorm nor an RMSNorm" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_learned_number_is_found_anew_when_it_has_moved(dtype: torch.dtype) -> None:
    model, batch = models.build("bert"), models.batch([7, 5, 6])
    for layer in model.bert.encoder.layer:
        output = layer.attention.output
        output.alpha = nn.Parameter(torch.tensor(0.5))

        def forward(hidden_states: Tensor, input_tensor: Tensor, output: Any = output) -> Tensor:
            found: Tensor = output.LayerNorm(output.alpha * output.dense(hidden_states) + input_tensor)
            return found

        output.forward = forward
    model.to(dtype)
    reader = Reader(model)
    analyze(reader, batch, Settings())
    for number in (0.52, 0.6):
        with torch.no_grad():
            for layer in model.bert.encoder.layer:
                layer.attention.output.alpha.fill_(number)
        again, anew = (analyze(one, batch, Settings()) for one in (reader, Reader(model)))
        assert reader.structure is not None
        assert reader.structure.layers[0].branches[0].factor == pytest.approx(number, rel=4e-3)
        torch.testing.assert_close(again.rows["N-Enc"], anew.rows["N-Enc"], rtol=1e-4, atol=1e-6)


class GatedOutput(nn.Module):
    """The last step of a sub-layer, with a gate that is computed from the hidden states."""

    def __init__(self, of: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.of, self.axes = of, axes

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        gate = torch.sigmoid(3 * input_tensor.mean(self.axes, keepdim=True))
        found: Tensor = self.of.LayerNorm(gate * self.of.dense(hidden_states) + input_tensor)
        return found


@pytest.mark.parametrize("examples", [1, 2, 3])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2)], ids=["of the batch", "of the example"])
@pytest.mark.parametrize("part", ["attention", "feed-forward"])
def test_a_gate_that_is_computed_is_no_number(part: str, axes: tuple[int, ...], examples: int) -> None:
    model, batch = models.build("bert"), models.batch([7] * examples)
    for layer in model.bert.encoder.layer:
        if part == "attention":
            layer.attention.output = GatedOutput(layer.attention.output, axes)
        else:
            layer.output = GatedOutput(layer.output, axes)
    with pytest.raises(UnsupportedEncoderError):
        attribute(model, batch)


@pytest.mark.parametrize("examples", [1, 2])
def test_a_gate_that_is_computed_earlier_is_no_number(examples: int) -> None:
    model, batch = models.build("bert"), models.batch([7] * examples)
    embeddings, output = model.bert.embeddings, model.bert.encoder.layer[1].attention.output
    seen: list[Tensor] = []
    embeddings.register_forward_hook(lambda _, __, found: seen.append(torch.sigmoid(3 * found.mean())))

    def forward(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        found: Tensor = output.LayerNorm(seen[-1] * output.dense(hidden_states) + input_tensor)
        return found

    output.forward = forward
    with pytest.raises(UnsupportedEncoderError):
        attribute(model, batch)
