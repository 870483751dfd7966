"""Deliberate errors in the reading: each one must be caught by the identity that every analysis checks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from globenc_lightning import METHODS
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.encoder import layers, reading, rules
from globenc_lightning.encoder.layers import Branch, LayerActivations
from globenc_lightning.encoder.norms import Norm
from globenc_lightning.encoder.reading import read
from globenc_lightning.encoder.structure import Structure
from globenc_lightning.encoder.trace import AttentionCall, AttentionTrace
from globenc_lightning.encoder.undisturbed import undisturbed
from globenc_lightning.errors import UnsupportedEncoderError
from globenc_lightning.settings import Settings
from tests.families import FAMILIES, Classifier, build, example_inputs

# One with LayerNorm and biases everywhere for each rule, one with RMSNorm and shared key-value heads, one with gains,
# one with numbers, one whose attention's output is normed, one with parallel sub-layers.
NAMES = ("bert", "roberta_prelayernorm", "vit", "dinov2", "llama", "granite", "gemma3", "gpt_neox")
BIASED = ("bert", "roberta_prelayernorm", "vit", "dinov2")


class Adapted(nn.Linear):
    """A linear map with an adapter: its ``weight`` is not what it multiplies with."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator) * 0.2)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def inputs(name: str) -> dict[str, Tensor]:
    return example_inputs(next(one for one in FAMILIES if one.name == name))


def known(name: str, change: Callable[[Classifier], None] | None = None) -> Reader:
    """A reader that has found the structure of a model, by a right analysis."""
    model = build(next(one for one in FAMILIES if one.name == name))
    if change is not None:
        change(model)
    reader = Reader(model)
    analyze(reader, inputs(name), Settings(METHODS))
    assert reader.structure is not None
    return reader


def read_alone(reader: Reader, name: str, structures: tuple[Structure, ...] | None = None) -> None:
    """One analysed forward pass: nothing is found anew where it fails."""
    with undisturbed(reader.model, parameters_require_grad=False) as handles:
        read(
            reader.model,
            reader.structures if structures is None else structures,
            lambda batch: reader.model(**batch),
            inputs(name),
            lambda done: None,
            handles,
        )


def assert_caught(reader: Reader, name: str, reason: str = "the .* decomposition through .* misses") -> None:
    with pytest.raises(UnsupportedEncoderError, match=reason):
        read_alone(reader, name)
    # Once more with everything found anew: the error is made there, too.
    with pytest.raises(UnsupportedEncoderError):
        analyze(reader, inputs(name), Settings(METHODS))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_mutation_nothing_is_caught(name: str) -> None:
    reader = known(name)
    read_alone(reader, name)
    analyze(reader, inputs(name), Settings(METHODS))


@pytest.mark.parametrize("name", NAMES)
def test_dropped_norm_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, original = known(name), Norm.parameter
    monkeypatch.setattr(
        Norm, "parameter", lambda self, key: None if key is not None and key == self.weight else original(self, key)
    )
    assert_caught(reader, name)


@pytest.mark.parametrize("name", NAMES)
def test_base_weight_under_an_adapter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = ("attention.output.dense", "attention.o_proj", "self_attn.o_proj", "attention.dense")

    def adapt(model: Classifier) -> None:
        for path, module in [*model.encoder.named_modules()]:
            if path.endswith(ends) and isinstance(module, nn.Linear):
                parent, _, child = path.rpartition(".")
                setattr(model.encoder.get_submodule(parent), child, Adapted(module))

    reader = known(name, adapt)
    assert sum(isinstance(module, Adapted) for module in reader.model.modules()) == 3

    def base(module: nn.Linear, *_: Any) -> tuple[Tensor, Tensor | None]:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()

    monkeypatch.setattr(layers, "effective_linear", base)
    assert_caught(reader, name)


@pytest.mark.parametrize("name", NAMES)
def test_swapped_residual(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = known(name)

    def swapped(attention: AttentionCall, residual: Tensor, *rest: Any, **named: Any) -> LayerActivations:
        return LayerActivations(attention, residual.roll(1, 1), *rest, **named)

    monkeypatch.setattr(reading, "LayerActivations", swapped)
    monkeypatch.setattr(rules, "LayerActivations", swapped)
    assert_caught(reader, name)


@pytest.mark.parametrize("name", BIASED)
def test_forgotten_value_bias(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 0.3

    def same_bias(model: Classifier) -> None:
        found = [
            parameter
            for path, parameter in model.encoder.named_parameters()
            if path.endswith(("attention.self.value.bias", "attention.v_proj.bias", "attention.attention.value.bias"))
        ]
        assert len(found) == 3
        for parameter in found:
            parameter.data.copy_(bias)

    reader, original = known(name, same_bias), AttentionCall.repeated_values

    def forgotten(self: AttentionCall) -> Tensor:
        values = original(self)
        return values - bias.view(1, values.shape[1], 1, -1)

    monkeypatch.setattr(AttentionCall, "repeated_values", forgotten)
    assert_caught(reader, name)


@pytest.mark.parametrize("name", NAMES)
def test_attention_calls_off_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, original = known(name), AttentionTrace.__init__

    def late(self: AttentionTrace, report: Callable[[AttentionCall], None], **options: bool) -> None:
        seen: list[AttentionCall] = []

        def previous(call: AttentionCall) -> None:
            seen.append(call)
            report(seen[max(0, len(seen) - 2)])

        original(self, previous, **options)

    monkeypatch.setattr(AttentionTrace, "__init__", late)
    assert_caught(reader, name, "layer 2 .* misses")


def wrong_branches(part: str, first: Branch, second: Branch) -> tuple[Branch, Branch]:
    if part in ("own norm", "norm left out"):
        wrong = None if first.norm is None or part == "norm left out" else replace(first.norm, offset=0.0)
        return first._replace(norm=wrong), second
    if part == "network":
        return first, second._replace(factor=second.factor * 1.01)
    changed = {part: getattr(first, part) * 1.01}
    return first._replace(**changed), second


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, part) for name in NAMES for part in ("projection", "order")),
        ("bert", "norms"),
        ("dinov2", "branches"),
        *((name, part) for name in ("granite", "gemma3", "gpt_neox") for part in ("factor", "kept", "network")),
        *(("bert", part) for part in ("factor", "kept")),
        ("gemma3", "own norm"),
        ("gemma3", "norm left out"),
    ],
)
def test_a_wrong_structure_is_caught_and_then_found_anew(name: str, part: str) -> None:
    reader = known(name)
    right = analyze(reader, inputs(name), Settings(METHODS))
    (found,) = reader.structures
    own = found.layers
    if part == "projection":
        changed = [replace(layer, projection=own[index - 1].projection) for index, layer in enumerate(own)]
    elif part == "norms":
        changed = [replace(layer, norms=layer.norms[::-1]) for layer in own]
    elif part == "branches":
        changed = [replace(layer, branches=layer.branches[::-1]) for layer in own]
    elif part == "order":
        changed = [*own]
    else:
        changed = [replace(layer, branches=wrong_branches(part, *layer.branches)) for layer in own]
    wrong = replace(found, layers=tuple(changed))
    if part == "order":
        wrong = replace(found, order=(*found.order[1:], found.order[0]))
    reason = "in another order" if part == "order" else "misses"
    with pytest.raises(UnsupportedEncoderError, match=reason):
        read_alone(reader, name, (wrong,))

    reader.structures = (wrong,)
    healed = analyze(reader, inputs(name), Settings(METHODS))
    for method in METHODS:
        assert torch.equal(healed.local[method], right.local[method])
