"""Signed scores: DecompX without biases, proven to add up, or refused in words."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
)

from globenc_lightning import Attributions, attribute
from globenc_lightning.errors import GlobEncWarning
from tests import naive_signed
from tests.models import _SIZES, batch, redraw

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
    assert torch.equal(found.left_out, found.score - found.signed.sum(1))
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
    """Reads the mean of the last hidden states; attention alone is not linear in it, unless it is uniform."""

    def __init__(self, *, uniform: bool, activation: str, norms: bool) -> None:
        super().__init__()
        config = BertConfig(**_SIZES, hidden_act=activation)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(32, 3)
        redraw(self)
        with torch.no_grad():
            for layer in self.encoder.encoder.layer if uniform else ():
                layer.attention.self.query.weight.zero_()
                layer.attention.self.query.bias.zero_()
        if not norms:
            # Norms whose statistics do not depend on what enters them: all of it is epsilon.
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e12
                    with torch.no_grad():
                        module.weight.mul_(1e6)
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
    assert distance < 1e-7 if same else distance > 0.01


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
    "in place": lambda self, h, m: self.outer(F.relu(self.inner(h[:, 0]), inplace=True).add_(1.0).mul_(0.5)),
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
