import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
)

from globenc_lightning import METHODS, Attributions, attribute
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.encoder.layers import POST_LN, effective_linear
from globenc_lightning.encoder.reading import find_encoders, read
from globenc_lightning.encoder.structure import Structure
from globenc_lightning.encoder.trace import AttentionCall
from globenc_lightning.encoder.undisturbed import undisturbed
from globenc_lightning.errors import ModelCallError, NonFiniteError, UnsupportedEncoderError
from globenc_lightning.settings import Settings
from tests import models

EVERYTHING = Settings(METHODS)


def batch(name: str = "bert", seed: int = 0) -> dict[str, Tensor]:
    return models.batch((9, 5, 12), pad=models.FAMILIES[name].pad if name in models.FAMILIES else 0, seed=seed)


def reader_of(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Reader:
    """A reader that already knows the model's structure."""
    reader = Reader(model)
    analyze(reader, batch() if inputs is None else inputs, EVERYTHING)
    return reader


def structure_of(reader: Reader) -> Structure:
    assert reader.structure is not None
    return reader.structure


def read_again(reader: Reader, structure: Structure) -> list[float]:
    """The run-time identity alone: a structure that is wrong is not looked for again."""
    inputs = batch(seed=1)
    with undisturbed(reader.model, parameters_require_grad=False) as handles:
        return (
            read(reader.model, (structure,), lambda given: reader.model(**given), inputs, lambda _: None, handles)
            .calls[0]
            .errors
        )


def assert_same(left: Attributions, right: Attributions, tolerance: float) -> None:
    for method in METHODS:
        torch.testing.assert_close(left.local[method], right.local[method], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(left.saliency, right.saliency, rtol=tolerance, atol=tolerance)


# ---- what is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "attn"), models.VARIANTS)
def test_every_layer_of_every_family_is_read_and_proven(name: str, attn: str, dtype: torch.dtype) -> None:
    model = models.build(name, attn, dtype)
    assert model.config._attn_implementation == attn
    reader = reader_of(model, batch(name))
    structure = structure_of(reader)
    again = analyze(reader, batch(name, seed=1), EVERYTHING)
    # DeBERTa v1's norms compute in float32 whatever they are given, so float64 buys nothing there.
    exact = dtype == torch.float64 and name not in models.FLOAT32_NORMS
    assert max(structure.errors) < (1e-12 if exact else 1e-5)
    assert float(again.reconstruction_error.max()) < (1e-12 if exact else 1e-5)
    allowed = {layer.tolerance(dtype) for layer in structure.layers}
    assert allowed == {1e-9 if exact else 1e-4}
    assert len(structure.layers) == len(again.reconstruction_error) == models.FAMILIES[name].layers


@pytest.mark.parametrize("name", models.FAMILIES)
def test_layers_stand_in_call_order(name: str) -> None:
    model = models.build(name)
    order: list[int] = []
    structure = structure_of(reader_of(model, batch(name)))
    modules = dict(model.named_modules())
    for module in {id(layer.projection): layer.projection for layer in structure.layers}.values():
        module.register_forward_hook(lambda module, *_: order.append(id(module)))
    with torch.no_grad():
        model(**batch(name))
    assert [id(layer.projection) for layer in structure.layers] == order
    for layer in structure.layers:
        assert modules[layer.projection_name] is layer.projection
        assert layer.rule == structure.rule == POST_LN
        assert len(layer.norms) == 2
        assert all(modules[norm.name] is norm.module for norm in layer.norms)
        assert layer.projection_name.startswith(layer.name + ".")


def test_names_of_a_plain_encoder() -> None:
    structure = structure_of(reader_of(models.build("bert")))
    assert structure.encoder_name == "bert"
    assert [layer.name for layer in structure.layers] == [f"bert.encoder.layer.{index}" for index in range(3)]
    assert structure.layers[1].projection_name == "bert.encoder.layer.1.attention.output.dense"
    assert [norm.name for norm in structure.layers[1].norms] == [
        "bert.encoder.layer.1.attention.output.LayerNorm",
        "bert.encoder.layer.1.output.LayerNorm",
    ]


def test_a_shared_layer_is_read_once_per_call() -> None:
    structure = structure_of(reader_of(models.build("albert")))
    assert len(structure.layers) == 3
    assert len({id(layer.projection) for layer in structure.layers}) == 1
    structure = structure_of(reader_of(models.build("albert_groups")))
    projections = [id(layer.projection) for layer in structure.layers]
    assert len(set(projections)) == 4
    assert projections[:2] == projections[2:4] != projections[4:6] == projections[6:]


def test_single_token_structure_is_proven_again_with_more() -> None:
    reader = Reader(models.build("bert"))
    analyze(reader, models.batch((1, 1)), EVERYTHING)
    assert structure_of(reader).length == 1
    analyze(reader, batch(), EVERYTHING)
    assert structure_of(reader).length == 12


def test_known_structure_is_kept() -> None:
    reader = reader_of(models.build("bert"))
    structure = structure_of(reader)
    analyze(reader, batch(seed=1), EVERYTHING)
    assert structure_of(reader) is structure


def test_training_in_between_needs_no_second_look() -> None:
    model = models.build("bert", dtype=torch.float64)
    reader = reader_of(model)
    structure = structure_of(reader)
    models.redraw(model, seed=5)
    found = analyze(reader, batch(), EVERYTHING)
    assert structure_of(reader) is structure
    assert_same(found, attribute(models.build("bert", dtype=torch.float64, seed=5), batch(), methods=METHODS), 1e-12)


# ---- the identity at run time: one thing wrong at a time


def with_second_layer(structure: Structure, **changes: Any) -> Structure:
    layers = list(structure.layers)
    layers[1] = dataclasses.replace(layers[1], **changes)
    return dataclasses.replace(structure, layers=tuple(layers))


def with_norm(structure: Structure, which: int, **changes: Any) -> Structure:
    norms = list(structure.layers[1].norms)
    norms[which] = dataclasses.replace(norms[which], **changes)
    return with_second_layer(structure, norms=tuple(norms))


def one_layer_late(structure: Structure) -> Structure:
    return dataclasses.replace(structure, layers=(*structure.layers[1:], structure.layers[0]))


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda s: with_norm(s, 0, weight=None), id="weight of norm 1 forgotten"),
        pytest.param(lambda s: with_norm(s, 1, weight=None), id="weight of norm 2 forgotten"),
        pytest.param(lambda s: with_norm(s, 0, bias=None), id="bias of norm 1 forgotten"),
        pytest.param(lambda s: with_norm(s, 1, bias=None), id="bias of norm 2 forgotten"),
        pytest.param(lambda s: with_norm(s, 0, centered=False), id="mean not taken off"),
        pytest.param(lambda s: with_norm(s, 1, epsilon=0.1), id="another epsilon"),
        pytest.param(lambda s: with_second_layer(s, projection=s.layers[2].projection), id="another's projection"),
        pytest.param(lambda s: with_second_layer(s, norms=s.layers[1].norms[::-1]), id="norms swapped"),
        pytest.param(one_layer_late, id="off by one in call order"),
    ],
)
def test_a_wrong_structure_does_not_pass_the_identity(broken: Callable[[Structure], Structure]) -> None:
    reader = reader_of(models.build("bert"))
    assert max(read_again(reader, structure_of(reader))) < 1e-5
    with pytest.raises(UnsupportedEncoderError, match=r"layer \d \(bert\.encoder\.layer\.\d\): .* misses "):
        read_again(reader, broken(structure_of(reader)))


def test_a_wrong_order_of_calls_is_noticed() -> None:
    reader = reader_of(models.build("bert"))
    structure = structure_of(reader)
    order = list(structure.order)
    order[-1], order[-3] = order[-3], order[-1]
    with pytest.raises(UnsupportedEncoderError, match=r"bert: .* in another order"):
        read_again(reader, dataclasses.replace(structure, order=tuple(order)))
    with pytest.raises(UnsupportedEncoderError, match=r"bert: .* in another order"):
        read_again(reader, dataclasses.replace(structure, order=(*structure.order, structure.order[-1])))


def test_a_wrong_residual_does_not_pass_the_identity() -> None:
    reader = reader_of(models.build("bert"))
    structure = structure_of(reader)
    # The hidden states are read where the second layer receives them.
    late = dataclasses.replace(structure, entry=reader.model.get_submodule("bert.encoder.layer.1"))
    with pytest.raises(UnsupportedEncoderError, match="bert"):
        read_again(reader, late)


def test_a_forgotten_value_bias_does_not_pass_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("bert")
    reader = reader_of(model)
    whole = AttentionCall.repeated_values
    bias = model.bert.encoder.layer[1].attention.self.value.bias.detach().view(models.HEADS, 1, -1)
    monkeypatch.setattr(AttentionCall, "repeated_values", lambda call: whole(call) - bias)
    with pytest.raises(UnsupportedEncoderError, match=r"layer 1 \(bert\.encoder\.layer\.0\)"):
        read_again(reader, structure_of(reader))


def test_probabilities_that_are_not_the_models_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import globenc_lightning.encoder.trace as trace

    reader = reader_of(models.build("bert"))
    right = trace.attention_probabilities

    def without_mask(query: Tensor, key: Tensor, attn_mask: Any, *others: Any) -> Tensor:
        return right(query, key, None, *others)

    monkeypatch.setattr(trace, "attention_probabilities", without_mask)
    with pytest.raises(UnsupportedEncoderError, match=r"layer 1 \(bert\.encoder\.layer\.0\): .* misses "):
        read_again(reader, structure_of(reader))


# ---- models that change after they were read


class Adapter(nn.Module):
    """A linear layer with a low-rank term of its own; its ``weight`` is not what it computes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator).to(base.weight))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator).to(base.weight))
        self.dropout = nn.Dropout(0.5)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.down.T @ self.up.T


class Rescaled(nn.Linear):
    """A linear layer that is not what its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5 + 1.0


class Transposed(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().T.contiguous())
        self.bias = nn.Parameter(base.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def merged(module: nn.Module) -> nn.Linear:
    """The plain linear layer that computes the same."""
    weight, bias = effective_linear(module, 32, next(module.parameters()))
    assert bias is not None
    plain = nn.Linear(32, 32, dtype=weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        plain.bias.copy_(bias)
    return plain


def rescaled(base: nn.Linear) -> nn.Module:
    other = Rescaled(32, 32, dtype=base.weight.dtype)
    other.load_state_dict(base.state_dict())
    return other


def weight_normed(base: nn.Linear) -> nn.Module:
    module = nn.utils.parametrizations.weight_norm(copy.deepcopy(base))
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(1.7)
    return module


@pytest.mark.parametrize("wrapped", [Adapter, rescaled, Transposed, weight_normed])
@pytest.mark.parametrize("known", [True, False])
def test_a_projection_is_read_as_what_it_computes(wrapped: Callable[[nn.Linear], nn.Module], known: bool) -> None:
    model = models.build("bert", dtype=torch.float64)
    reader = reader_of(model) if known else Reader(model)
    output = model.bert.encoder.layer[1].attention.output
    output.dense = wrapped(output.dense)
    model.train()
    found = analyze(reader, batch(), EVERYTHING)
    assert float(found.reconstruction_error.max()) < 1e-12

    plain = models.build("bert", dtype=torch.float64)
    inner = plain.bert.encoder.layer[1].attention.output
    with torch.no_grad():
        module = wrapped(inner.dense).eval()
        given = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        inner.dense = merged(module)
        torch.testing.assert_close(inner.dense(given), module(given), rtol=1e-12, atol=1e-12)
    assert_same(found, attribute(plain, batch(), methods=METHODS), 1e-10)


def test_a_norm_that_is_exchanged_is_read_again() -> None:
    model = models.build("bert", dtype=torch.float64)
    reader = reader_of(model)
    layer = model.bert.encoder.layer[1].output
    layer.LayerNorm = nn.RMSNorm(32, eps=1e-3, dtype=torch.float64)
    models.redraw(layer.LayerNorm, seed=3)
    found = analyze(reader, batch(), EVERYTHING)
    assert not structure_of(reader).layers[1].norms[1].centered
    assert_same(found, attribute(model, batch(), methods=METHODS), 1e-12)


def change_residual(model: Any) -> None:
    output = model.bert.encoder.layer[1].attention.output
    output.forward = lambda hidden, given: output.LayerNorm(output.dense(hidden) + given.tanh())


def change_second_residual(model: Any) -> None:
    output = model.bert.encoder.layer[1].output
    output.forward = lambda hidden, given: output.LayerNorm(output.dense(hidden) + given.tanh())


def change_projection_output(model: Any) -> None:
    dense = model.bert.encoder.layer[1].attention.output.dense
    dense.register_forward_hook(lambda module, given, output: output + 0.1 * output.square())


def stretched(module: nn.Module, given: Any, output: Any) -> Any:
    """A layer gives its hidden states, or in transformers before 5.0 a tuple that begins with them."""
    return (output[0] * 1.01, *output[1:]) if isinstance(output, tuple) else output * 1.01


def change_between_layers(model: Any) -> None:
    model.bert.encoder.layer[1].register_forward_hook(stretched)


def change_after_last_layer(model: Any) -> None:
    model.bert.encoder.layer[2].register_forward_hook(stretched)


def change_norm_output(model: Any) -> None:
    norm = model.bert.encoder.layer[1].attention.output.LayerNorm
    norm.register_forward_hook(lambda module, given, output: output + 0.05 * output.roll(1, -1))


def drop_residual(model: Any) -> None:
    output = model.bert.encoder.layer[1].attention.output
    output.forward = lambda hidden, given: output.LayerNorm(output.dense(hidden))


@pytest.mark.parametrize(
    "change",
    [
        change_residual,
        change_second_residual,
        change_projection_output,
        change_between_layers,
        change_after_last_layer,
        change_norm_output,
        drop_residual,
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_layer_that_computes_something_else_is_refused(change: Callable[[Any], None], known: bool) -> None:
    model = models.build("bert")
    reader = reader_of(model) if known else Reader(model)
    change(model)
    with pytest.raises(UnsupportedEncoderError, match=r"bert"):
        analyze(reader, batch(), EVERYTHING)


# ---- what no rule covers


REASONS = {
    "deberta_v2_convolution": (r"deberta, attention call 2: .*deberta\.encoder\.layer\.1\..*", "a convolution"),
    "fnet": (r"fnet \(FNetModel\)", "no attention call was seen"),
    "xlnet": (r"transformer \(XLNetModel\)", "einsum"),
    "convbert": (r"convbert, attention call 1", "no module takes the heads' concatenated context"),
    "mobilebert": (
        r"mobilebert, attention call 1: .*mobilebert\.encoder\.layer\.0\..*",
        "neither a post-LN nor a pre-LN layer",
    ),
}


@pytest.mark.parametrize("lengths", [(9, 5, 12), (6,), (1,)], ids=["batch", "one example", "one token"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", models.REFUSED)
def test_refused_families_are_refused_with_the_place_and_the_reason(
    name: str, attn: str, lengths: tuple[int, ...]
) -> None:
    place, reason = REASONS[name]
    with pytest.raises(UnsupportedEncoderError, match=place) as raised:
        attribute(models.build(name, attn), models.batch(lengths))
    assert reason in str(raised.value)


def test_a_convolution_after_the_only_layer() -> None:
    config = DebertaV2Config(**{**models._SIZES, "num_hidden_layers": 1, "conv_kernel_size": 3})
    model = DebertaV2ForSequenceClassification(config).eval()
    models.redraw(model)
    with pytest.raises(UnsupportedEncoderError, match="not the output of its last layer"):
        attribute(model, batch())


class TokenMixing(nn.Module):
    """A linear layer followed by a convolution over the tokens."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        width = base.out_features
        self.over_tokens = nn.Conv1d(width, width, 3, padding=1, groups=width, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.over_tokens(self.base(x).transpose(1, 2)).transpose(1, 2)


class Shifting(nn.Module):
    """A linear layer that adds a little of the token before."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + 1e-3 * out.roll(1, 1)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("mixing", [TokenMixing, Shifting])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_values_that_mix_tokens_are_refused(attn: str, mixing: type[nn.Module], known: bool) -> None:
    model = models.build("bert", attn)
    reader = reader_of(model) if known else Reader(model)
    attention = model.bert.encoder.layer[1].attention.self
    attention.value = mixing(attention.value)
    with pytest.raises(UnsupportedEncoderError, match=r"layer 2 \(bert\.encoder\.layer\.1\): the values of one token"):
        analyze(reader, batch(), EVERYTHING)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("mixing", [TokenMixing, Shifting])
@pytest.mark.parametrize("place", ["intermediate", "output"])
def test_a_feed_forward_network_that_mixes_tokens_is_refused(place: str, mixing: type[nn.Module], known: bool) -> None:
    model = models.build("bert")
    reader = reader_of(model) if known else Reader(model)
    part = getattr(model.bert.encoder.layer[2], place)
    part.dense = mixing(part.dense)
    with pytest.raises(UnsupportedEncoderError, match=r"layer 3 \(bert\.encoder\.layer\.2\): the feed-forward network"):
        analyze(reader, batch(), EVERYTHING)


def test_queries_and_keys_may_mix_tokens() -> None:
    model = models.build("bert", dtype=torch.float64)
    attention = model.bert.encoder.layer[1].attention.self
    attention.key = TokenMixing(attention.key)
    assert float(attribute(model, batch()).reconstruction_error.max()) < 1e-12


# ---- which encoder


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = models.build("bert").bert
        self.right = models.build("bert", seed=1).bert
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        left = self.left(input_ids, attention_mask=attention_mask).pooler_output
        return self.head(left + self.right(input_ids, attention_mask=attention_mask).pooler_output)


class OneOfTwo(Two):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.right(input_ids, attention_mask=attention_mask).pooler_output)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = models.build("bert").bert
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        first = self.encoder(input_ids, attention_mask=attention_mask).pooler_output
        return self.head(first - self.encoder(input_ids.flip(0), attention_mask=attention_mask.flip(0)).pooler_output)


class NotCalled(Two):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.left.embeddings(input_ids).mean(1))


class NoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, 32)
        self.memory = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.memory(self.embedding(input_ids))[0][:, 0])


def with_one(side: str) -> Callable[[Any, Any], Tensor]:
    def forward(module: Any, inputs: Any) -> Tensor:
        encoder = getattr(module, side)
        return module.head(encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output)

    return forward


def test_two_encoders_are_read_each_for_itself() -> None:
    model = Two().double()
    found = attribute(model, batch(), methods=METHODS)
    assert found.encoder == "left"
    assert [other.encoder for other in found.others] == ["right"]
    for side, one in (("left", found), ("right", found.others[0])):
        alone = attribute(model, batch(), methods=METHODS, forward=with_one(side))
        assert alone.encoder == side
        for method in METHODS:
            torch.testing.assert_close(one.local[method], alone.local[method], rtol=1e-12, atol=1e-12)
        assert float(one.reconstruction_error.max()) < 1e-12


def test_an_encoder_that_is_called_twice_is_read_twice() -> None:
    model = Twice().double()
    inputs = batch()
    found = attribute(model, inputs, methods=METHODS)
    (other,) = found.others
    assert found.encoder == other.encoder == "encoder"
    for method in METHODS:
        torch.testing.assert_close(other.local[method], found.local[method].flip(0), rtol=1e-12, atol=1e-12)


def test_one_of_two_encoders_can_be_read() -> None:
    reader = reader_of(OneOfTwo())
    assert structure_of(reader).encoder_name == "right"


def test_an_encoder_that_is_not_called_is_refused() -> None:
    with pytest.raises(UnsupportedEncoderError, match="calls none of them"):
        attribute(NotCalled(), batch())


def test_a_module_without_an_encoder_is_refused() -> None:
    with pytest.raises(UnsupportedEncoderError, match="there is no encoder in NoEncoder"):
        attribute(NoEncoder(), batch())


def test_a_second_encoder_that_is_called_later_is_noticed() -> None:
    model: Any = OneOfTwo()
    reader = reader_of(model)
    model.forward = Two.forward.__get__(model)
    found = analyze(reader, batch(), EVERYTHING)
    assert [found.encoder, *(other.encoder for other in found.others)] == ["left", "right"]


def test_a_second_encoder_that_is_no_longer_called_is_noticed() -> None:
    model: Any = Two()
    reader = reader_of(model)
    model.forward = OneOfTwo.forward.__get__(model)
    found = analyze(reader, batch(), EVERYTHING)
    assert found.encoder == "right"
    assert found.others == ()


def test_outermost_encoders_are_found() -> None:
    model = Two()
    assert list(find_encoders(model)) == ["left", "right"]
    assert list(find_encoders(models.build("electra"))) == ["electra"]
    assert list(find_encoders(models.build("bert").bert)) == [""]
    assert find_encoders(nn.Linear(3, 3)) == {}


def test_an_encoder_that_is_shared_counts_once() -> None:
    model = OneOfTwo()
    model.left = model.right
    assert len(structure_of(reader_of(model)).layers) == 3


def test_hidden_states_that_leave_torch_have_no_saliency() -> None:
    class Detached(OneOfTwo):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            pooled = self.right(input_ids, attention_mask=attention_mask).pooler_output
            return self.head(torch.tensor(pooled.tolist(), dtype=pooled.dtype))

    with pytest.raises((ModelCallError, UnsupportedEncoderError)):
        attribute(Detached(), batch())


@pytest.mark.parametrize(
    "place",
    ["embeddings.word_embeddings", "encoder.layer.1.attention.output.dense", "encoder.layer.2.output.dense"],
)
@pytest.mark.parametrize("known", [True, False])
def test_weights_that_are_not_finite(place: str, known: bool) -> None:
    model = models.build("bert")
    reader = reader_of(model) if known else Reader(model)
    with torch.no_grad():
        model.bert.get_submodule(place).weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        analyze(reader, batch(), EVERYTHING)


def opt_config(**changes: Any) -> OPTConfig:
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTConfig(**sizes, ffn_dim=48, max_position_embeddings=40, word_embed_proj_dim=32, **changes)


class LanguageModel(nn.Module):
    """Its forward goes past the module that is called the base, to a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = OPTForCausalLM(opt_config())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -1]


@pytest.mark.parametrize(
    "model",
    [LanguageModel, lambda: OPTForSequenceClassification(opt_config(pad_token_id=0, num_labels=3))],
    ids=["past the base", "classifier"],
)
def test_texts_that_are_joined_before_the_norm_are_taken_apart(model: Any) -> None:
    inputs = {"input_ids": torch.randint(4, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    found = attribute(model().eval(), inputs)
    assert found.rule == "pre-LN"
    assert float(found.reconstruction_error.max()) < 1e-5
