"""Signed scores: DecompX without biases, proven to add up, or refused in words."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
)

from globenc_lightning import Attributions, GlobEncCallback, attribute, signing, study
from globenc_lightning.encoder import frozen
from globenc_lightning.errors import GlobEncWarning, OutOfMemoryError, RecordError
from globenc_lightning.history import HistoryEntry
from globenc_lightning.record.reading import Record
from globenc_lightning.record.writing import RecordOptions
from tests import families, naive_signed
from tests.models import _SIZES, batch, redraw
from tests.task.torch_zoo import TORCH_CASES
from tests.task.zoo import CASES, TRAINING, VALIDATION
from tests.training import OwnHead, Sentences, Steps, build_trainer, fit, loader

LENGTHS = (9, 5, 12)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
    "gelu_python": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu2": lambda z: F.relu(z).square(),
    "mish": F.mish,
}


def drawn(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    redraw(model)
    return model.to(dtype).eval()


def bert(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return drawn(BertForSequenceClassification(BertConfig(**_SIZES, **options)), dtype)


def prenorm(**options: Any) -> Any:
    config = RobertaPreLayerNormConfig(**_SIZES, pad_token_id=0, **options)
    return drawn(RobertaPreLayerNormForSequenceClassification(config))


def quietly(model: nn.Module, inputs: Any, **options: Any) -> Attributions:
    """What is found where nothing may be refused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no signed scores", category=GlobEncWarning)
        found = attribute(model, inputs, signed=True, **options)
    assert found.signed is not None
    assert found.left_out is not None
    assert found.score is not None
    assert torch.equal(found.left_out, found.score.to(found.signed) - found.signed.sum(1))
    assert not bool(found.signed[~found.attention_mask].any())
    return found


def refused(model: nn.Module, inputs: Any, words: str, **options: Any) -> Attributions:
    """What is found where signed scores are refused: everything else, and a word."""
    with pytest.warns(GlobEncWarning, match=words) as said:
        found = attribute(model, inputs, signed=True, **options)
    assert len([one for one in said if "no signed scores" in str(one.message)]) == 1
    assert found.signed is None
    assert found.left_out is None
    without = attribute(model, inputs, **options)
    assert torch.equal(found.saliency, without.saliency)
    assert torch.equal(found.rows["N-Enc"], without.rows["N-Enc"])
    return found


def assert_equal(found: Tensor, expected: Tensor, share: float = 1e-12) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


# ---- against the paper's own form


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("make", "by_hand"), [(bert, "of_bert"), (prenorm, "of_prenorm_roberta")])
def test_they_are_decompx_without_biases(make: Any, by_hand: str, activation: str) -> None:
    model = make(hidden_act=activation)
    inputs = batch(LENGTHS)
    found = quietly(model, inputs)
    for place, length in enumerate(LENGTHS):
        ids = inputs["input_ids"][place, :length]
        with torch.no_grad():
            real, parts = getattr(naive_signed, by_hand)(model, ids, ACTIVATIONS[activation])
            logits = model(ids.unsqueeze(0)).logits
        assert_equal(real, logits)
        predicted = int(logits.argmax())
        assert_equal(found.signed[place, :length], parts[0, :, predicted])
        assert_equal(found.left_out[place], real[0, predicted] - parts[0, :, predicted].sum())


def test_without_biases_nothing_is_left_out() -> None:
    model = bert()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    found = quietly(model, batch(LENGTHS))
    assert float(found.left_out.abs().max()) < 1e-12 * float(found.signed.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(9,), (5, 12, 9), (1, 4)])
def test_an_example_in_a_padded_batch_is_the_example_alone(attention: str, lengths: tuple[int, ...]) -> None:
    model = bert(attn_implementation=attention)
    inputs = batch(lengths)
    together = quietly(model, inputs)
    for place, length in enumerate(lengths):
        alone = quietly(model, {name: one[place : place + 1, :length] for name, one in inputs.items()})
        assert_equal(together.signed[place, :length], alone.signed[0])


# ---- where they must be gradient x input, and where they must not


class Linear(nn.Module):
    """Reads the mean of the last hidden states, which are small beside the epsilons of its norms.

    Args:
        uniform: whether every token gets the same attention, whatever the hidden states are.
        activation: of its feed-forward networks.
        norms: whether its norms divide by what enters them, and not by the root of their epsilons alone.
    """

    def __init__(self, *, uniform: bool, activation: str, norms: bool) -> None:
        super().__init__()
        config = BertConfig(**_SIZES, hidden_act=activation)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(32, 3)
        redraw(self)
        small = 1.0 if norms else 1e-9
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.mul_(small)
            self.encoder.embeddings.LayerNorm.weight.mul_(small)
            for layer in self.encoder.encoder.layer:
                # Queries and keys are small, too.
                layer.attention.self.query.weight.mul_(0.0 if uniform else small**-2)
                layer.attention.self.query.bias.mul_(0.0 if uniform else small**-1)
        for module in self.encoder.encoder.modules():
            if isinstance(module, nn.LayerNorm) and not norms:
                module.eps = 0.9
        self.double().eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits

    def gradient_x_input(self, inputs: Any, found: Attributions) -> Tensor:
        """(b, k) of the score, through the network as it is."""
        hidden = self.encoder.embeddings(inputs["input_ids"]).detach().requires_grad_()
        handle = self.encoder.embeddings.register_forward_hook(lambda *_: hidden)
        logits = self(**inputs)
        handle.remove()
        (gradient,) = torch.autograd.grad(logits.gather(1, found.predicted.unsqueeze(1)).sum(), hidden)
        return (gradient * hidden).sum(-1).detach().masked_fill(inputs["attention_mask"] == 0, 0.0)


@pytest.mark.parametrize(
    ("uniform", "activation", "norms", "same"),
    [
        (True, "linear", False, True),
        (True, "relu", False, True),
        (True, "gelu", False, False),
        (False, "linear", False, False),
        (True, "linear", True, False),
    ],
)
def test_they_are_gradient_x_input_of_a_network_that_is_linear(
    uniform: bool, activation: str, norms: bool, same: bool
) -> None:
    model, inputs = Linear(uniform=uniform, activation=activation, norms=norms), batch(LENGTHS)
    found = quietly(model, inputs, readout="mean")
    plain = model.gradient_x_input(inputs, found)
    distance = float((found.signed - plain).abs().max() / plain.abs().max())
    assert distance < 1e-8 if same else distance > 1e-7


# ---- heads


class Head(nn.Module):
    """An encoder and what a user may put on it."""

    def __init__(self, head: Callable[["Head", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = BertModel(BertConfig(**_SIZES), add_pooling_layer=False)
        self.inner, self.gate, self.outer = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.norm, self.group, self.scores = nn.LayerNorm(32), nn.GroupNorm(4, 32), nn.Linear(32, 1)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.question = nn.Parameter(torch.zeros(1, 1, 32))
        self.own = head
        redraw(self)
        self.double().eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        return self.own(self, hidden, attention_mask.unsqueeze(-1))

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(b, d) an attention over the tokens, which is held fixed."""
        weights = self.scores(hidden).tanh().masked_fill(mask == 0, -1e9).softmax(1)
        return (weights * hidden).sum(1)


LINEAR_HEADS: dict[str, Callable[[Head, Tensor, Tensor], Tensor]] = {
    "tanh": lambda self, h, m: self.outer(torch.tanh(self.inner(h[:, 0]))),
    "sigmoid": lambda self, h, m: self.outer(torch.sigmoid(self.inner(h[:, 0]))),
    "in place": lambda self, h, m: self.outer(F.relu(self.inner(h[:, 0]), inplace=True).clone().add_(1.0).mul_(0.5)),
    "gelu written out": lambda self, h, m: self.outer(
        (lambda z: 0.5 * z * (1.0 + torch.erf(z / 2**0.5)))(self.inner(h[:, 0]))
    ),
    "gelu of tanh written out": lambda self, h, m: self.outer(
        (lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))))(self.inner(h[:, 0]))
    ),
    "gated": lambda self, h, m: self.outer(F.gelu(self.gate(h[:, 0])) * self.inner(h[:, 0])),
    "gated tanh": lambda self, h, m: self.outer(torch.sigmoid(self.gate(h[:, 0])) * torch.tanh(self.inner(h[:, 0]))),
    "glu": lambda self, h, m: self.outer(F.glu(torch.cat([self.inner(h[:, 0]), self.gate(h[:, 0])], -1))),
    "highway": lambda self, h, m: self.outer(
        (lambda t: t * F.relu(self.inner(h[:, 0])) + (1 - t) * h[:, 0])(torch.sigmoid(self.gate(h[:, 0])))
    ),
    "unit length": lambda self, h, m: self.outer(F.normalize(h[:, 0], dim=-1)),
    "unit length written out": lambda self, h, m: self.outer(h[:, 0] / h[:, 0].norm(dim=-1, keepdim=True)),
    "norm": lambda self, h, m: self.outer(self.norm(h.mean(1))),
    "norm written out": lambda self, h, m: self.outer(
        (lambda z: (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, keepdim=True) + 1e-5))(h[:, 0])
    ),
    "norm by products": lambda self, h, m: self.outer(h[:, 0] * torch.rsqrt((h[:, 0] * h[:, 0]).mean(-1, True) + 1e-5)),
    "groups": lambda self, h, m: self.outer(self.group(h[:, 0])),
    "constants": lambda self, h, m: self.outer(
        torch.cat([h[:, :1], torch.ones_like(h[:, :1])], 1).masked_fill(h[:, :1] > 2, 0.3).sum(1) - 1.0
    ),
    "written into": lambda self, h, m: (lambda z: (z.__setitem__((slice(None), 0), h[:, 0]), self.outer(z.sum(1)))[1])(
        torch.ones_like(h[:, :2].detach())
    ),
    "attention": lambda self, h, m: self.outer(self.pooled(h, m)),
    "attention of torch": lambda self, h, m: self.outer(
        self.attend(self.question.expand(len(h), -1, -1), h, h, key_padding_mask=m[..., 0] == 0)[0][:, 0]
    ),
    "largest": lambda self, h, m: self.outer(h.masked_fill(m == 0, -1e9).amax(1)),
    "probabilities": lambda self, h, m: self.outer(h[:, 0]).softmax(-1),
}
"""Heads that are linear once attention, norms and slopes are held fixed."""

OTHER_HEADS: dict[str, tuple[Callable[[Head, Tensor, Tensor], Tensor], str]] = {
    "products": (lambda self, h, m: self.outer(self.inner(h[:, 0]) * self.gate(h[:, 0])), "mul.* of two vectors"),
    "softmax as a vector": (lambda self, h, m: self.outer(self.inner(h[:, 0]).softmax(-1)), "add up"),
    "square root as a vector": (lambda self, h, m: self.outer(h[:, 0].abs().sqrt()), "add up"),
    "logarithm": (lambda self, h, m: self.outer(torch.log(h[:, 0].abs() + 1)), "log"),
    "matrices": (lambda self, h, m: (h.transpose(1, 2) @ h)[:, :3, 0], "matmul.* of two vectors"),
}
"""Heads that are not, with the words of their refusal."""


def contributions(model: Head, inputs: Any) -> Attributions:
    return quietly(model, inputs, readout="cls")


@pytest.mark.parametrize("name", LINEAR_HEADS)
def test_heads_add_up(name: str) -> None:
    found = contributions(Head(LINEAR_HEADS[name]), batch(LENGTHS))
    assert float(found.signed.abs().max()) > 1e-3


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_heads_that_are_linear_in_nothing_are_refused(name: str) -> None:
    head, words = OTHER_HEADS[name]
    refused(Head(head), batch(LENGTHS), words, readout="cls")


def frozen_by_hand(name: str, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A head's signed scores, and those of the line that a test writes down for it: (b, k) each."""
    model, inputs = Head(LINEAR_HEADS[name]), batch((9, 9))
    found = contributions(model, inputs)
    last: list[Tensor] = []
    other = Head(lambda self, h, m: (last.append(h.detach()), self.outer(head(self, h, h.detach())))[1])  # type: ignore[call-arg]
    expected = quietly(other, inputs, readout="cls", target=lambda logits, _: found.predicted)
    return found.signed, expected.signed


GATED: dict[str, Callable[[Head, Tensor, Tensor], Tensor]] = {
    "gated": lambda self, h, real: F.gelu(self.gate(real[:, 0])) * self.inner(h[:, 0]),
    "glu": lambda self, h, real: torch.sigmoid(self.gate(real[:, 0])) * self.inner(h[:, 0]),
    "gelu written out": lambda self, h, real: F.gelu(self.inner(h[:, 0])),
    "gelu of tanh written out": lambda self, h, real: F.gelu(self.inner(h[:, 0]), approximate="tanh"),
    "unit length": lambda self, h, real: h[:, 0] / real[:, 0].norm(dim=-1, keepdim=True),
    "unit length written out": lambda self, h, real: h[:, 0] / real[:, 0].norm(dim=-1, keepdim=True),
    "norm written out": lambda self, h, real: F.layer_norm(h[:, 0], (32,)) * (31 / 32) ** 0.5,
    "norm by products": lambda self, h, real: F.rms_norm(h[:, 0], (32,), eps=1e-5),
    "attention": lambda self, h, real: (self.scores(real).tanh().softmax(1) * h).sum(1),
}
"""What is held fixed in a head, written down: ``real`` is outside the graph."""


@pytest.mark.parametrize("name", GATED)
def test_a_gate_an_attention_and_a_norm_are_held_fixed(name: str) -> None:
    found, expected = frozen_by_hand(name, GATED[name])  # type: ignore[arg-type]
    # One epsilon of the variance is not where torch has it.
    assert_equal(found, expected, 1e-5 if name == "norm written out" else 1e-12)


# ---- every family


def variant_of(family: families.Family) -> tuple[str, torch.dtype]:
    return family.variants[-1]


@pytest.mark.parametrize("name", [one.name for one in families.FAMILIES if one.supported])
def test_every_family_adds_up(name: str) -> None:
    family = next(one for one in families.FAMILIES if one.name == name)
    if family.missing:
        pytest.skip(family.missing)
    kind, dtype = variant_of(family)
    if dtype == torch.float64 and families.without_doubles(name, kind):
        dtype = torch.float32
    found = quietly(families.build(family, kind, dtype), families.example_inputs(family, dtype), readout="cls")
    assert bool(torch.isfinite(found.signed).all())
    assert float(found.signed.abs().sum(1).min()) > 1e-3


@pytest.mark.parametrize("name", ["deberta_v3", "modernbert", "llama", "gemma2", "gptj", "t5 (encoder)", "beit"])
def test_a_family_without_biases_leaves_nothing_out(name: str) -> None:
    family = next(one for one in families.FAMILIES if one.name == name)
    model = families.build(family, family.kinds[0], torch.float32)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "bias" in part and "relative" not in part:
                parameter.zero_()
    # The longest example alone: the head of these models reads padding, too.
    found = quietly(model, {key: one[:1] for key, one in families.example_inputs(family).items()}, readout="cls")
    assert float(found.left_out.abs().max()) < 1e-5 * float(found.signed.abs().sum(1).max())


# ---- every freezing counts


def like_the_network(*args: Any, **kwargs: Any) -> Any:
    """In place of a rule of the frozen network: the function as it is."""
    _, func, *rest = args
    return func(*rest, **kwargs)


def as_it_is(self: Any, func: Any, args: Any, kwargs: Any, *_: Any) -> Any:
    return func(*args, **kwargs)


BROKEN: dict[str, tuple[str, Any]] = {
    "attention": ("_attention", lambda self, *args, **kwargs: F.scaled_dot_product_attention(*args, **kwargs)),
    "norms": ("_norm", like_the_network),
    "activations": ("_activation", as_it_is),
    "biases": ("_note", lambda *_: None),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("make", [bert, prenorm])
def test_the_sum_tells_that_something_is_not_held_fixed(what: str, make: Any, monkeypatch: Any) -> None:
    name, instead = BROKEN[what]
    monkeypatch.setattr(frozen.FrozenNetwork, name, instead)
    refused(make(), batch(LENGTHS), "do not add up to the score")


@pytest.mark.parametrize("what", ["_product", "_quotient", "_statistic"])
def test_the_sum_tells_that_what_is_written_out_is_not_held_fixed(what: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(frozen.FrozenNetwork, what, as_it_is)
    family = next(one for one in families.FAMILIES if one.name == ("deberta" if what == "_quotient" else "llama"))
    refused(families.build(family, family.kinds[0]), families.example_inputs(family), "do not add up", readout="cls")


def test_other_scores_the_second_time_are_refused(monkeypatch: Any) -> None:
    class Doubled(frozen.FrozenNetwork):
        """Linear, and another network."""

        def _affine(self, func: Any, name: str, args: Any, kwargs: Any, live: Any) -> Any:
            result = super()._affine(func, name, args, kwargs, live)
            return result * 2 if name == "dropout" and result.dim() == 2 else result

    monkeypatch.setattr(signing, "FrozenNetwork", Doubled)
    refused(bert(), batch(LENGTHS), "other scores when it was run a second time")


# ---- kinds of decision, targets


def of_kind(kind: type, **options: Any) -> Any:
    return drawn(kind(BertConfig(**{**_SIZES, **options})))


def with_labels(**labels: Any) -> dict[str, Tensor]:
    return {**batch(LENGTHS), **labels}


SPAN = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 4])}
DECISIONS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "classification": (lambda: of_kind(BertForSequenceClassification), with_labels),
    "binary": (lambda: of_kind(BertForSequenceClassification, num_labels=1), with_labels),
    "regression": (
        lambda: of_kind(BertForSequenceClassification, num_labels=1, problem_type="regression"),
        lambda: with_labels(labels=torch.tensor([0.5, 2.0, -1.0])),
    ),
    "multi-label": (
        lambda: of_kind(BertForSequenceClassification, problem_type="multi_label_classification"),
        with_labels,
    ),
    "span": (lambda: of_kind(BertForQuestionAnswering, num_labels=2), lambda: with_labels(**SPAN)),
    "token classification": (
        lambda: of_kind(BertForTokenClassification),
        lambda: with_labels(labels=torch.where(batch(LENGTHS)["attention_mask"] == 1, 1, -100)),
    ),
    "choice": (
        lambda: of_kind(BertForMultipleChoice),
        lambda: {name: one.view(2, 3, -1) for name, one in batch((9, 5, 12, 4, 8, 7)).items()},
    ),
}


@pytest.mark.parametrize("kind", DECISIONS)
@pytest.mark.parametrize("biases", [True, False])
def test_every_kind_of_decision_adds_up(kind: str, biases: bool) -> None:
    make, inputs = DECISIONS[kind]
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not biases:
                parameter.zero_()
    found = quietly(model, inputs())
    assert found.task == kind
    # Example by example: the score of one is never that of another's tokens.
    assert biases or float(found.left_out.abs().max()) < 1e-12 * float(found.signed.abs().max())


def test_targets_that_are_linear_in_the_logits() -> None:
    model, inputs = bert(), batch(LENGTHS)
    first, second = (
        quietly(model, {**inputs, "labels": torch.full((3,), one)}, target="label").signed for one in (0, 1)
    )
    margin = quietly(model, inputs, target=lambda logits, _: logits[:, 0] - logits[:, 1])
    assert_equal(margin.signed, first - second)
    classes = quietly(model, inputs, target=lambda logits, _: torch.zeros(3, dtype=torch.long))
    assert_equal(classes.signed, first)


@pytest.mark.parametrize(
    "target",
    [
        lambda logits, _: logits.log_softmax(1)[:, 0],
        lambda logits, _: logits.softmax(1)[:, 0],
        lambda logits, _: logits.square().sum(1),
    ],
    ids=["logarithm of a probability", "probability", "squares"],
)
def test_targets_that_are_not(target: Any) -> None:
    refused(bert(), batch(LENGTHS), "target= has to be linear in the logits", target=target)


# ---- precision, cut graphs, grouped heads


def test_half_precision_is_computed_in_float32() -> None:
    model, inputs = bert(torch.bfloat16), batch(LENGTHS)
    low = quietly(model, inputs)
    high = quietly(model.float(), inputs)
    label = torch.equal(low.predicted, high.predicted)
    assert label
    assert_equal(low.signed.double(), high.signed.double(), 1e-5)


@pytest.mark.parametrize("cut", ["no_grad", "detach", "checkpoint"])
def test_a_graph_that_the_forward_cuts(cut: str) -> None:
    def head(self: Head, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(hidden[:, 0])))

    class Cut(Head):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if cut == "no_grad":
                with torch.no_grad():
                    return super().forward(input_ids, attention_mask)
            hidden = self.encoder(input_ids, attention_mask).last_hidden_state
            if cut == "checkpoint":
                return torch.utils.checkpoint.checkpoint(head, self, hidden, attention_mask, use_reentrant=True)
            return head(self, hidden.detach(), attention_mask)

    whole = quietly(Head(head), batch(LENGTHS), readout="cls")
    found = quietly(Cut(head), batch(LENGTHS), readout="cls")
    assert_equal(found.signed, whole.signed)


def test_grouped_heads_of_a_causal_model() -> None:
    config = LlamaConfig(**_SIZES, num_key_value_heads=2, pad_token_id=0)
    model = drawn(LlamaForSequenceClassification(config), torch.float32)
    found = quietly(model, batch(LENGTHS))
    # No bias anywhere.
    assert float(found.left_out.abs().max()) < 1e-5 * float(found.signed.abs().sum(1).max())


# ---- what it costs, and leaves behind


def forwards(signed: bool) -> int:
    model, inputs, calls = bert(), batch(LENGTHS), []
    attribute(model, inputs, readout="cls")
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    attribute(model, inputs, readout="cls", signed=signed)
    handle.remove()
    return len(calls)


def test_it_takes_one_more_forward_pass() -> None:
    assert forwards(signed=True) == forwards(signed=False) + 1


def test_off_it_is_nowhere() -> None:
    found = attribute(bert(), batch(LENGTHS))
    assert found.signed is None
    assert found.left_out is None


@pytest.mark.parametrize("signed", [False, True])
def test_other_figures_stay_to_the_last_bit(signed: bool) -> None:
    model, inputs = bert(), batch(LENGTHS)
    without, found = attribute(model, inputs), attribute(model, inputs, signed=signed)
    for name in ("saliency", "score", "logits"):
        assert torch.equal(getattr(found, name), getattr(without, name))
    assert torch.equal(found.rows["N-Enc"], without.rows["N-Enc"])


# ---- in a training


def trained(module: Steps, record: Any = None, **options: Any) -> tuple[GlobEncCallback, list[str]]:
    callback = GlobEncCallback(signed=True, heatmap_examples=0, record=record)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(module, callback, val=loader(Sentences(8)), **options)
    return callback, [str(one.message) for one in said if "signed scores" in str(one.message)]


def test_a_training_keeps_them() -> None:
    callback, said = trained(OwnHead(), max_epochs=2)
    assert not said
    assert len(callback.history) >= 2
    for entry in callback.history:
        assert [len(one) for one in entry.signed] == [len(one) for one in entry.saliency]
        sums = torch.stack([one.sum() for one in entry.signed])
        assert_equal(sums + entry.left_out, entry.score, 1e-5)
        read = HistoryEntry.from_state_dict(entry.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(read.signed, entry.signed, strict=True))
        assert torch.equal(read.left_out, entry.left_out)


def test_a_checkpoint_has_one_tensor_of_them() -> None:
    callback, _ = trained(OwnHead())
    state = callback.history[-1].state_dict()
    assert state["signed"]["values"].shape == (sum(map(len, callback.history[-1].saliency)),)
    assert state["signed"]["lengths"] is state["packed"]["lengths"]
    without = GlobEncCallback(heatmap_examples=0)
    fit(OwnHead(), without)
    assert not {"signed", "left_out"} & set(without.history[-1].state_dict())


class Squared(OwnHead):
    """Its logits are products of features."""

    def loss_of(self, batch: Any) -> Tensor:
        hidden = self.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return F.cross_entropy(self.head(hidden[:, 0] * hidden[:, 1]), batch["labels"])


def test_a_training_is_told_once_and_has_its_other_figures() -> None:
    callback, said = trained(Squared(), max_epochs=3)
    assert len(said) == 1
    assert "mul of two vectors of hidden states" in said[0]
    assert len(callback.history) >= 3
    for entry in callback.history:
        assert bool(torch.isfinite(entry.correlation["N-Enc"]).all())
        assert not entry.signed
        assert not len(entry.left_out)
    # Where warnings are switched off, the reason is still told, and nothing says that there were such scores.
    assert callback.history.about is not None
    assert not callback.history.about.signed
    [(_, reason)] = callback.history.reasons
    assert reason.startswith("GlobEncCallback: signed=True gives no scores: ")
    assert "mul of two vectors of hidden states" in reason


def test_a_record_of_refused_scores_has_none(tmp_path: Path) -> None:
    trained(Squared(), record=RecordOptions(tmp_path, run="a"))
    record = Record.open(tmp_path)
    assert "signed" not in record.columns("a", "tokens")
    assert "left_out" not in record.columns("a", "examples")
    with pytest.raises(RecordError, match="no signed scores"):
        study.load(tmp_path).signed()


def without_biases(case: Any) -> Any:
    module = case.module()
    module.configure_model()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    "name",
    [
        *("sorted_by_length", "multiple_choice", "multiple_choice_by_hand", "tagging_active", "tagging_by_class"),
        *("question_answering", "masked_lm", "two_tasks_second", "attention_pooling", "torch_encoder_sequence_first"),
    ],
)
def test_every_example_of_a_step_gets_its_own_tokens(name: str) -> None:
    case = next(one for one in (*CASES, *TORCH_CASES) if one.name == name)
    callback = GlobEncCallback(**case.arguments, signed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build_trainer([callback]).fit(without_biases(case), case.loader(TRAINING), case.loader(VALIDATION))
    entry = callback.history[-1]
    assert all(float(one.abs().sum()) > 1e-4 for one in entry.signed)
    for one, rest in zip(entry.signed, entry.left_out, strict=True):
        assert abs(float(rest)) < 1e-5 * max(1.0, float(one.abs().sum()))


@pytest.mark.parametrize(
    ("name", "words"),
    [("simcse", "a similarity multiplies"), ("several_values", "a loss is not linear"), ("lstm", "stands lstm")],
)
def test_steps_whose_scores_have_no_parts(name: str, words: str) -> None:
    case = next(one for one in CASES if one.name == name)
    callback = GlobEncCallback(**case.arguments, signed=True)
    with pytest.warns(GlobEncWarning, match=words):
        build_trainer([callback]).fit(case.module(), case.loader(TRAINING), case.loader(VALIDATION))
    assert len(callback.history)


def test_whatever_fails_there_the_other_figures_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn(of_kind(BertForTokenClassification), torch.float32)
    inputs = with_labels(labels=torch.where(batch(LENGTHS)["attention_mask"] == 1, 1, -100))

    def fails(error: Exception) -> Callable[..., Any]:
        def proven(*_: Any) -> Any:
            raise error

        return proven

    monkeypatch.setattr(signing, "_proven", fails(ArithmeticError("not here")))
    refused(model, inputs, "ArithmeticError: not here")
    monkeypatch.setattr(signing, "_proven", fails(torch.OutOfMemoryError("full")))
    with pytest.raises(OutOfMemoryError):
        attribute(model, inputs, signed=True)
