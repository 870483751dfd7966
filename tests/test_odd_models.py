"""Models that are written in unusual ways: the right figures, or a refusal in words that are true."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from globenc_lightning import METHODS, Attributions, attribute
from globenc_lightning.encoder.reading import find_encoders
from globenc_lightning.errors import ModelCallError, ProbeError, UnsupportedEncoderError
from tests import models

LENGTHS = (9, 5, 7)
DOUBLE = torch.float64


def texts(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    return models.batch(lengths)


def everything(model: nn.Module, inputs: Any = None, **options: Any) -> Attributions:
    return attribute(model, texts() if inputs is None else inputs, methods=METHODS, **options)


def assert_same(left: Attributions, right: Attributions, tolerance: float = 1e-9) -> None:
    """The same maps, saliency, head and logits."""
    pairs = [(left.local[method], right.local[method]) for method in METHODS]
    pairs += [(left.saliency, right.saliency), (left.logits, right.logits)]
    assert left.head_gradient is not None
    assert right.head_gradient is not None
    pairs.append((left.head_gradient, right.head_gradient))
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
    assert float(right.saliency.max()) > 1e-6
    assert torch.equal(left.attention_mask, right.attention_mask)
    assert left.input_ids is not None
    assert torch.equal(left.input_ids, texts()["input_ids"])


def state(model: nn.Module) -> list[Any]:
    """All of a model that an analysis touches."""
    return [
        (
            dict(vars(one)).keys(),
            len(one._forward_hooks) + len(one._forward_pre_hooks),
            one.training,
            [(id(parameter), parameter.requires_grad, parameter.grad) for parameter in one.parameters(recurse=False)],
            [(id(buffer), buffer.requires_grad) for buffer in one.buffers(recurse=False)],
            vars(one).get("forward"),
        )
        for one in model.modules()
    ]


def bert(family: str = "bert", dtype: torch.dtype = DOUBLE) -> Any:
    return models.build(family, dtype=dtype).base_model


class Plain(nn.Module):
    """An encoder with a head of its own; the others below differ in how they call it."""

    def __init__(self, family: str = "bert", dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.encoder = bert(family, dtype)
        torch.manual_seed(0)
        self.head = nn.Linear(32, models.CLASSES).to(dtype)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0].tanh()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.read(input_ids, attention_mask))


# ---- what a model holds, not what its class says


class OwnWithHead(transformers.PreTrainedModel):
    config_class = transformers.BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.head = nn.Linear(config.hidden_size, models.CLASSES)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0].tanh())


class OwnAroundOwn(OwnWithHead):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = OwnWithHead(config)
        del self.bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids, attention_mask)


class OwnNamesTheMaskOtherwise(OwnWithHead):
    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, mask)


class OwnWithTwo(OwnWithHead):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.other = transformers.BertModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        other = self.other(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return super().forward(input_ids, attention_mask) + self.head(other)


class OwnLayers(transformers.PreTrainedModel):
    """Layers of one's own: the model is the encoder itself."""

    config_class = transformers.BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        inner = transformers.BertModel(config)
        self.embeddings, self.layers = inner.embeddings, inner.encoder.layer
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embeddings(input_ids)
        allowed = attention_mask.bool()[:, None, None].expand(-1, -1, input_ids.shape[1], -1)
        for layer in self.layers:
            output = layer(hidden, allowed)
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden


class OwnLayersBelowAName(OwnLayers):
    """Its class names the list of its layers as the base model."""

    base_model_prefix = "layers"


class OwnBody(nn.Module):
    """The body of the next, with a forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.inner = OwnLayers(config)
        self.embeddings, self.layers = self.inner.embeddings, self.inner.layers
        del self.inner

    forward = OwnLayers.forward


class OwnBodyBelowAHead(transformers.PreTrainedModel):
    config_class = transformers.BertConfig
    base_model_prefix = "body"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.body = OwnBody(config)
        self.head = nn.Linear(config.hidden_size, models.CLASSES)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.body(input_ids, attention_mask)[:, 0])


def own(kind: Any) -> Any:
    model = kind(models.FAMILIES["bert"].config())
    models.redraw(model)
    return model.to(DOUBLE).eval()


def naive(model: Any) -> Plain:
    plain = Plain()
    plain.encoder, plain.head = model.bert, model.head
    return plain


@pytest.mark.parametrize("kind", [OwnWithHead, OwnAroundOwn, OwnNamesTheMaskOtherwise])
@pytest.mark.parametrize("known", [False, True], ids=["first", "again"])
def test_an_encoder_inside_a_model_of_ones_own_is_found(kind: Any, known: bool) -> None:
    model = own(kind)
    inputs = texts()
    if kind is OwnNamesTheMaskOtherwise:
        inputs["mask"] = inputs.pop("attention_mask")
    if known:
        everything(model, inputs)
    found = everything(model, inputs)
    assert_same(found, everything(naive(getattr(model, "inner", model))))
    assert found.encoder == ("inner.bert" if kind is OwnAroundOwn else "bert")


def test_a_model_of_ones_own_is_taken_as_a_head_where_the_module_has_no_forward() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = own(OwnWithHead)

    module = Module()
    assert_same(everything(module), everything(naive(module.model)))


def test_two_encoders_inside_a_model_of_ones_own() -> None:
    model = own(OwnWithTwo)
    found = everything(model)
    assert [one.encoder for one in (found, *found.others)] == ["other", "bert"]
    torch.testing.assert_close(found.others[0].local["N-Enc"], everything(naive(model)).local["N-Enc"])


@pytest.mark.parametrize("kind", [OwnLayers, OwnLayersBelowAName])
def test_layers_of_ones_own_are_an_encoder(kind: Any) -> None:
    plain = Plain()
    plain.encoder = own(kind)
    config = models.FAMILIES["bert"].config()
    same = transformers.BertModel(config).to(DOUBLE).eval()
    same.embeddings, same.encoder.layer = plain.encoder.embeddings, plain.encoder.layers

    def forward(module: Any, batch: Any) -> Tensor:
        return module.head(module.encoder(batch["input_ids"], batch["attention_mask"])[:, 0].tanh())

    found = everything(plain, forward=forward)
    other = Plain()
    other.encoder, other.head = same, plain.head
    assert_same(found, everything(other))
    assert found.encoder == "encoder"


def test_a_body_of_ones_own_below_a_head() -> None:
    found = everything(own(OwnBodyBelowAHead))
    assert found.encoder == "body"
    assert float(found.saliency.min()) >= 0


def small(name: str, **options: Any) -> Any:
    config = getattr(transformers, name)
    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return config(**{**sizes, "intermediate_size": 48, "max_position_embeddings": 64, **options})


def headed(kind: str) -> tuple[Any, Any, str]:
    """A model of transformers', its score, and where its encoder is."""
    if kind == "pretraining":
        model: Any = transformers.BertForPreTraining(small("BertConfig"))
        return model, lambda module, batch: module(**batch).seq_relationship_logits, "bert"
    if kind == "dpr":
        model = transformers.DPRQuestionEncoder(small("DPRConfig"))
        return model, lambda module, batch: module(**batch).pooler_output[:, :2], "question_encoder.bert_model"
    if kind == "t5":
        config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model = transformers.T5EncoderModel(config)
        return model, lambda module, batch: module(**batch).last_hidden_state[:, 0, :3], ""
    model = transformers.CLIPTextModelWithProjection(small("CLIPTextConfig", projection_dim=8, eos_token_id=2))
    return model, lambda module, batch: module(**batch).text_embeds, ""


@pytest.mark.parametrize("kind", ["pretraining", "dpr", "t5", "clip"])
def test_wrappers_of_transformers_without_a_head_for_classes(kind: str) -> None:
    model, forward, path = headed(kind)
    models.redraw(model)
    found = everything(model.eval(), forward=forward)
    assert float(found.reconstruction_error.max()) < 1e-4
    if path:
        assert found.encoder == path


def test_two_towers_of_transformers_are_two_encoders() -> None:
    text, image = (
        small("BertConfig"),
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=12,
            patch_size=4,
        ),
    )
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(image, text, projection_dim=8)
    model = transformers.VisionTextDualEncoderModel(config)
    assert list(find_encoders(model)) == ["vision_model", "text_model"]


# ---- encoder.forward(...)


class ByForward(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder.forward(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0].tanh()


class ByForwardAndKeyword(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = {"attention_mask": attention_mask, "input_ids": input_ids}
        return self.encoder.forward(**given)[0][:, 0].tanh()


class ByBoundForward(Plain):
    """Someone has set the encoder's forward on the instance."""

    def __init__(self, family: str = "bert") -> None:
        super().__init__(family)
        self.encoder.forward = partial(type(self.encoder).forward, self.encoder)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder.forward(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0].tanh()


class BothWays(Plain):
    """One call each way: two calls of the encoder."""

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        first = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return (first + self.encoder.forward(input_ids, attention_mask).last_hidden_state[:, 0]).tanh()


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
@pytest.mark.parametrize("kind", [ByForward, ByForwardAndKeyword, ByBoundForward])
def test_an_encoder_that_is_called_by_its_forward(kind: Any, family: str) -> None:
    model = kind(family).eval()
    before = state(model)
    found = everything(model)
    assert not found.others
    assert_same(found, everything(Plain(family).eval()))
    assert_same(everything(model), found)
    assert state(model) == before


def test_a_call_of_the_encoder_that_fails_while_the_forward_goes_on_is_named() -> None:
    class Tries(Plain):
        fails = True

        def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            with suppress(ValueError):
                if self.fails:
                    self.encoder(None, attention_mask=attention_mask)
            return super().read(input_ids, attention_mask)

    model = Tries().eval()
    with pytest.raises(UnsupportedEncoderError, match="a call of the encoder raised ValueError"):
        everything(model)
    model.fails = False
    assert_same(everything(model), everything(Plain().eval()))
    model.fails = True
    with pytest.raises(UnsupportedEncoderError, match="a call of the encoder raised ValueError"):
        everything(model)


@pytest.mark.parametrize("call", [lambda m: m.encoder.encoder, lambda m: type(m.encoder).forward])
def test_an_encoder_whose_call_is_not_seen_is_refused_with_the_reason(call: Any) -> None:
    class Parts(Plain):
        def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if call(self) is self.encoder.encoder:
                return call(self)(self.encoder.embeddings(input_ids))[0][:, 0]
            return call(self)(self.encoder, input_ids, attention_mask)[0][:, 0]

    with pytest.raises(UnsupportedEncoderError, match=r"calls none of them, neither by encoder\(\.\.\.\) nor by"):
        everything(Parts().eval())


def test_calls_of_both_ways_are_counted_once_each() -> None:
    found = everything(BothWays().eval())
    assert len(found.others) == 1
    torch.testing.assert_close(found.local["N-Enc"], found.others[0].local["N-Enc"])
    torch.testing.assert_close(found.saliency, found.others[0].saliency)


# ---- no_grad, inference_mode, detach: the graph is cut


class BelowNoGrad(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            return super().read(input_ids, attention_mask)


class BelowInferenceMode(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().read(input_ids * 1, attention_mask).clone()


class Detaches(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, attention_mask).last_hidden_state.detach()[:, 0].tanh()


class DetachesByData(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, attention_mask).last_hidden_state.data[:, 0].tanh()


class DecoratedForward(Plain):
    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask)


class DecoratedWithInferenceMode(Plain):
    @torch.inference_mode()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask)


class SwitchesGradientsOff(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        try:
            return super().forward(input_ids, attention_mask)
        finally:
            torch.set_grad_enabled(True)


class KeepsStatistics(Plain):
    """Writes into a buffer below no_grad, as batch norms and momentum encoders do."""

    def __init__(self, family: str = "bert") -> None:
        super().__init__(family)
        self.register_buffer("mean", torch.zeros(32, dtype=DOUBLE))
        self.mean: Tensor

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = super().read(input_ids, attention_mask)
            self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
            self.mean[0] = hidden[0, 0]
            return hidden


class FlagsAndCopies(Plain):
    """What is allowed for a tensor without a gradient alone."""

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = super().read(input_ids, attention_mask)
        hidden = copy.deepcopy(hidden).requires_grad_(False)
        hidden.requires_grad = False
        return hidden.detach_()


class LeavesTorch(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = super().read(input_ids, attention_mask)
            assert hidden.numpy().shape == hidden.detach().cpu().numpy().shape
        return hidden


CUT = [
    BelowNoGrad,
    BelowInferenceMode,
    Detaches,
    DetachesByData,
    DecoratedForward,
    DecoratedWithInferenceMode,
    SwitchesGradientsOff,
    KeepsStatistics,
    FlagsAndCopies,
    LeavesTorch,
]


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
@pytest.mark.parametrize("kind", CUT)
def test_a_graph_that_the_forward_cuts_is_kept_whole(kind: Any, family: str) -> None:
    model = kind(family).eval().requires_grad_(False)
    model.head.requires_grad_(True)
    before = state(model)
    plain = everything(Plain(family).eval())
    assert_same(everything(model), plain)
    assert_same(everything(model), plain)
    assert state(model) == before
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    if kind is KeepsStatistics:
        assert not model.mean.any()


def test_a_frozen_encoder_whose_pooled_output_is_used() -> None:
    class Pooled(Plain):
        cut = True

        def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            with torch.set_grad_enabled(not self.cut):
                return self.encoder(input_ids, attention_mask).pooler_output

    model = Pooled().eval()
    model.encoder.requires_grad_(False)
    found = everything(model)
    model.cut = False
    assert_same(found, everything(model))


def test_a_gradient_that_is_stopped_in_part_stays_as_the_training_has_it() -> None:
    class Gated(Plain):
        def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            read = super().read(input_ids, attention_mask)
            return read * read.detach().sigmoid()

    model = Gated().eval()
    hidden: list[Tensor] = []
    handle = model.encoder.embeddings.register_forward_hook(lambda module, args, output: hidden.append(output))
    inputs = texts()
    logits = model(**inputs)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), hidden[0])
    expected = (gradient * hidden[0]).norm(dim=-1).masked_fill(inputs["attention_mask"] == 0, 0.0)
    torch.testing.assert_close(everything(model).saliency, expected.detach())


# ---- checkpoint


class Checkpointed(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(checkpoint(self.read, input_ids, attention_mask, use_reentrant=False))


class CheckpointedEncoder(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        def run(ids: Tensor, mask: Tensor) -> Tensor:
            return self.encoder(ids, attention_mask=mask).last_hidden_state

        return checkpoint(run, input_ids, attention_mask, use_reentrant=False)[:, 0].tanh()


def _layers(encoder: Any) -> list[nn.Module]:
    layers = getattr(encoder, "encoder", None) or encoder.transformer
    return list(layers.albert_layer_groups if hasattr(layers, "albert_layer_groups") else layers.layer)


class CheckpointedLayers(Plain):
    """Each layer's forward goes through checkpoint, as training scripts do by hand."""

    def __init__(self, family: str = "bert") -> None:
        super().__init__(family)
        for layer in _layers(self.encoder):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


class CheckpointedHead(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return checkpoint(self.head, self.read(input_ids, attention_mask), use_reentrant=False)


class CheckpointedReentrant(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(checkpoint(self.read, input_ids, attention_mask, use_reentrant=True))


class ReentrantEncoder(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        def run(ids: Tensor, mask: Tensor) -> Tensor:
            return self.encoder(ids, attention_mask=mask).last_hidden_state

        return checkpoint(run, input_ids, attention_mask, use_reentrant=True)[:, 0].tanh()


class ReentrantLayers(Plain):
    def __init__(self, family: str = "bert") -> None:
        super().__init__(family)
        for layer in _layers(self.encoder):
            layer.forward = partial(_reentrant, layer.forward)  # type: ignore[method-assign]


def _reentrant(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(lambda *given: forward(*given, **kwargs), *args, use_reentrant=True)


class ReentrantHead(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return checkpoint(self.head, self.read(input_ids, attention_mask), use_reentrant=True)


class SwitchedOn(Plain):
    """transformers' own, with the flag on."""

    def __init__(self, family: str = "bert") -> None:
        super().__init__(family)
        if self.encoder.supports_gradient_checkpointing:
            self.encoder.gradient_checkpointing_enable()
        self.encoder.train()


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
@pytest.mark.parametrize(
    "kind",
    [
        Checkpointed,
        CheckpointedEncoder,
        CheckpointedLayers,
        CheckpointedHead,
        CheckpointedReentrant,
        ReentrantEncoder,
        ReentrantLayers,
        ReentrantHead,
        SwitchedOn,
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True", "ignore:.*activation_checkpointing")
def test_checkpoint_in_the_forward(kind: Any, family: str) -> None:
    model = kind(family)
    before = state(model)
    plain = everything(Plain(family).eval())
    assert_same(everything(model), plain)
    assert_same(everything(model), plain)
    assert state(model) == before


# ---- autocast


class Autocast(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(input_ids, attention_mask).float()


class AutocastAroundTheEncoder(Plain):
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().read(input_ids, attention_mask)


class AutocastAsADecorator(Plain):
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask)


class AutocastBelowNoGrad(Plain):
    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
@pytest.mark.parametrize("kind", [Autocast, AutocastAroundTheEncoder, AutocastAsADecorator, AutocastBelowNoGrad])
def test_autocast_in_the_forward_is_set_aside(kind: Any, family: str) -> None:
    model = kind(family, torch.float32).eval()
    found = everything(model)
    assert_same(found, everything(Plain(family, torch.float32).eval()), 1e-6)
    assert not torch.is_autocast_enabled("cpu")


class Casts(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.read(input_ids, attention_mask).bfloat16())


def test_a_cast_that_only_autocast_allows_is_set_aside_too() -> None:
    found = everything(Casts("bert", torch.float32).eval())
    assert_same(found, everything(Plain("bert", torch.float32).eval()), 1e-6)


def test_types_that_only_autocast_puts_together_are_named() -> None:
    model = Casts("bert", torch.float32).eval()
    model.encoder.to(torch.bfloat16)
    with pytest.raises(ModelCallError, match=r"analysed without it[\s\S]*module\.weight\.dtype"):
        everything(model)


class Widens(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.head(self.read(input_ids, attention_mask))
        return logits.float() * 100


def test_what_autocast_rounds_off_is_no_difference_to_the_models_own_logits() -> None:
    model = Widens("bert", torch.float32).eval()
    with torch.no_grad():
        rounded = model(**models.batch(LENGTHS))
    found = everything(model)
    assert float((found.logits - rounded).abs().max()) > 1e-3 * float(rounded.abs().max())


# ---- quantised and offloaded weights


class Int8Weight(Tensor):
    """A weight of eight bits that knows no other function than ``linear``."""

    whole: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> "Int8Weight":
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.detach().abs().amax(1, keepdim=True) / 127
        self.whole = (weight.detach() / self.scale).round().to(torch.int8)

    def dequantised(self) -> Tensor:
        return self.whole.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0], args[1].dequantised(), *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            found = Int8Weight.__new__(cls, args[0].scale.expand(args[0].shape))
            found.scale, found.whole = args[0].scale, args[0].whole
            return found
        raise NotImplementedError(f"{func} of eight-bit weights")


class Linear8bit(nn.Linear):
    """As bitsandbytes has it: integers in the parameter, and a scale beside them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        quantised = Int8Weight(base.weight)
        self.weight, self.bias = nn.Parameter(quantised.whole, requires_grad=False), base.bias
        self.register_buffer("scale", quantised.scale)
        self.scale: Tensor

    def forward(self, given: Tensor) -> Tensor:
        return nn.functional.linear(given, self.weight.to(self.scale.dtype) * self.scale, self.bias)


class Dynamic(Linear8bit):
    """Quantises what it is given, too."""

    def forward(self, given: Tensor) -> Tensor:
        step = given.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return super().forward((given / step).round() * step)


def subclassed(base: nn.Linear) -> nn.Linear:
    base.weight = nn.Parameter(Int8Weight(base.weight), requires_grad=False)
    return base


def forward_on_the_instance(base: nn.Linear) -> nn.Linear:
    """The weights elsewhere until the forward fetches them, as an offloading hook has it."""
    weight = Int8Weight(base.weight).dequantised()
    base.forward = lambda given: nn.functional.linear(given, weight, base.bias)  # type: ignore[method-assign]
    return base


def dequantised(base: nn.Linear) -> nn.Linear:
    base.weight = nn.Parameter(Int8Weight(base.weight).dequantised())
    return base


def with_linears(change: Callable[[nn.Linear], nn.Module], family: str) -> Plain:
    model = Plain(family).eval()
    for name, module in list(model.encoder.named_modules()):
        if type(module) is nn.Linear:
            model.encoder.set_submodule(name, change(module))
    return model


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
@pytest.mark.parametrize("change", [subclassed, Linear8bit, forward_on_the_instance])
def test_quantised_weights(change: Callable[[nn.Linear], nn.Module], family: str) -> None:
    model = with_linears(change, family)
    found = everything(model)
    assert_same(found, everything(with_linears(dequantised, family)))
    assert_same(everything(model), found)
    assert float((found.local["N-Enc"] - everything(Plain(family).eval()).local["N-Enc"]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_quantised_activations_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedEncoderError, match="misses what the layer itself computes"):
        everything(with_linears(Dynamic, family))


def meta_layer(model: Plain) -> Plain:
    model.encoder.encoder.layer[1].to("meta")
    return model


def all_meta(model: Plain) -> Plain:
    return model.to("meta")


def offloaded(model: Plain) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("away", [meta_layer, all_meta, offloaded])
def test_weights_that_are_not_in_memory_are_refused(away: Callable[[Plain], Any]) -> None:
    model = away(Plain().eval())
    with pytest.raises(UnsupportedEncoderError, match=r"encoder: .* on the meta device[\s\S]*onto one device"):
        everything(model)


def test_a_head_that_is_offloaded_does_no_harm() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Plain().eval()
    accelerate.cpu_offload(model.head, execution_device=torch.device("cpu"))
    assert_same(everything(model), everything(Plain().eval()))


# ---- texts and ids that the model has no embedding for


def too_long(length: int) -> dict[str, Tensor]:
    return models.batch((length, 3))


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("distilbert", 64), ("roberta", 62)])
@pytest.mark.parametrize("known", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("own", [False, True], ids=["forward", "forward="])
def test_a_text_longer_than_the_positions(family: str, limit: int, known: bool, own: bool) -> None:
    model = models.build(family)
    options: Any = {"forward": lambda module, batch: module(**batch).logits} if own else {}
    if known:
        attribute(model, texts(), **options)
    expected = (
        rf"raised .*[\s\S]*input_ids is {limit + 1} tokens long[\s\S]*positions for {limit} [\s\S]*max_length={limit}"
    )
    with pytest.raises(ModelCallError, match=expected):
        attribute(model, too_long(limit + 1), **options)
    assert attribute(model, too_long(limit), **options).logits.shape == (2, 3)


@pytest.mark.parametrize(("place", "word"), [(0, 99), (5, 1000), (2, -1)])
@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_ids_beyond_the_vocabulary(family: str, place: int, word: int) -> None:
    inputs = texts()
    inputs["input_ids"][0, place] = word
    with pytest.raises(ModelCallError, match=rf"holds the token id {word}, [\s\S]*0 to 98[\s\S]*tokenizer"):
        attribute(models.build(family), inputs)


@pytest.mark.parametrize("shape", [(2, 3, 9), (1, 4, 2, 5), (3, 1, 7)])
def test_several_texts_per_example_are_refused_with_their_shape(shape: tuple[int, ...]) -> None:
    ids = torch.ones(shape, dtype=torch.long)
    model = transformers.BertForMultipleChoice(models.FAMILIES["bert"].config()).eval()
    with pytest.raises(ProbeError, match="several texts per example") as caught:
        attribute(model, {"input_ids": ids, "attention_mask": ids})
    assert str(shape) in str(caught.value)
