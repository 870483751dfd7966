import copy
import functools
import gc
import json
import pickle
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from globenc_lightning import METHODS, Attributions, analysis, attribute, rolling
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.errors import (
    GlobEncWarning,
    ModelCallError,
    NonFiniteError,
    ProbeError,
    UnsupportedEncoderError,
)
from globenc_lightning.settings import Settings
from tests import models, naive

REFERENCE = Path(__file__).parent / "reference"


# ---- the figures of the authors' code


@cache
def reference() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "bert_tiny.npz") as arrays:
        return dict(arrays)


def reference_inputs() -> dict[str, Tensor]:
    return {key: torch.tensor(reference()[key]) for key in ("input_ids", "attention_mask")}


def reference_model(attn: str, dtype: torch.dtype) -> Any:
    config = json.loads((REFERENCE / "bert_tiny.json").read_text())
    config.pop("kind")
    config["attn_implementation"] = attn
    model: Any = BertForSequenceClassification(BertConfig(**config))
    model.load_state_dict(load_file(REFERENCE / "bert_tiny.safetensors"))
    return model.to(dtype)


@cache
def found(attn: str, dtype: torch.dtype) -> Attributions:
    return attribute(reference_model(attn, dtype), reference_inputs(), methods=METHODS)


def relative(actual: Tensor, expected: np.ndarray) -> float:
    """Largest relative difference, entry by entry; entries that are zero must be zero."""
    wanted = torch.tensor(expected).double()
    assert actual.shape == wanted.shape
    zero = wanted == 0
    assert not actual[zero].any()
    return float(((actual.double() - wanted).abs()[~zero] / wanted.abs()[~zero]).max())


PRECISIONS = [
    pytest.param(attn, dtype, tolerance, id=f"{attn}-{dtype}".replace("torch.", ""))
    for attn in ("eager", "sdpa")
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4))
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("attn", "dtype", "tolerance"), PRECISIONS)
def test_local_maps_are_those_of_the_authors(attn: str, dtype: torch.dtype, tolerance: float, method: str) -> None:
    assert relative(found(attn, dtype).local[method], reference()[f"local/{method}"]) < tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("attn", "dtype", "tolerance"), PRECISIONS)
def test_rollouts_are_those_of_the_authors_up_to_scale(
    attn: str, dtype: torch.dtype, tolerance: float, method: str
) -> None:
    rollout, expected = found(attn, dtype).rollout[method].double(), reference()[f"rollout/{method}"]
    # One positive factor per example and layer.
    factor = torch.tensor(expected).sum((2, 3), keepdim=True) / rollout.sum((2, 3), keepdim=True)
    assert bool((factor > 0).all())
    assert relative(rollout * factor, expected) < tolerance
    raw = rollout * found(attn, dtype).log_scale[method].exp()[..., None, None]
    assert relative(raw, expected) < tolerance


@pytest.mark.parametrize(("attn", "dtype", "tolerance"), PRECISIONS)
def test_saliency_and_decisions_are_those_of_the_authors(attn: str, dtype: torch.dtype, tolerance: float) -> None:
    assert relative(found(attn, dtype).saliency, reference()["saliency_l2"]) < tolerance
    assert found(attn, dtype).predicted.tolist() == reference()["predicted"].tolist()
    assert relative(found(attn, dtype).logits, reference()["logits"]) < tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_correlations_are_those_of_scipy(attn: str, method: str) -> None:
    difference = found(attn, torch.float64).correlation[method].numpy() - reference()[f"spearman_cls/{method}"]
    assert np.abs(difference).max() < 1e-12


@pytest.mark.parametrize(("attn", "dtype", "tolerance"), PRECISIONS)
def test_what_is_derived_fits_together(attn: str, dtype: torch.dtype, tolerance: float) -> None:
    one = found(attn, dtype)
    assert one.methods == METHODS
    assert torch.equal(one.attention_mask, reference_inputs()["attention_mask"].bool())
    for method in METHODS:
        assert torch.equal(one.last[method], one.rollout[method][:, -1])
        assert torch.equal(one.rows[method], one.rollout[method][:, :, 0])
    assert float(one.reconstruction_error.max()) < tolerance * 1e-1


def test_one_padded_batch_gives_what_each_sentence_gives() -> None:
    inputs, together = reference_inputs(), found("sdpa", torch.float64)
    model = reference_model("sdpa", torch.float64)
    for example, length in enumerate((12, 7, 19, 2)):
        alone = attribute(model, {"input_ids": inputs["input_ids"][example : example + 1, :length]}, methods=METHODS)
        for method in METHODS:
            cut = together.local[method][example, :, :length, :length]
            torch.testing.assert_close(alone.local[method][0], cut, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(alone.correlation[method][0], together.correlation[method][example])
        torch.testing.assert_close(alone.saliency[0], together.saliency[example, :length], rtol=1e-9, atol=1e-12)


# ---- every family against the definition, without the structure pass


LENGTHS = (9, 5, 12, 2)

PLACES: dict[str, tuple[str, str, str, str, str]] = {
    # layer, value vectors, output projection, norm 1, norm 2: where they are in each family
    "bert": ("encoder.layer.{}", "attention.self.value", "attention.output.dense", "attention.output.LayerNorm", ""),
    "distilbert": (
        "transformer.layer.{}",
        "attention.v_lin",
        "attention.out_lin",
        "sa_layer_norm",
        "output_layer_norm",
    ),
    "albert": (
        "encoder.albert_layer_groups.{}",
        "attention.value",
        "attention.dense",
        "attention.LayerNorm",
        "full_layer_layer_norm",
    ),
    "mpnet": ("encoder.layer.{}", "attention.attn.v", "attention.attn.o", "attention.LayerNorm", ""),
    "deberta": (
        "encoder.layer.{}",
        "attention.self.in_proj",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "",
    ),
    "deberta_v2": (
        "encoder.layer.{}",
        "attention.self.value_proj",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "",
    ),
}
SAME_PLACES = {
    "roberta": "bert",
    "xlm_roberta": "bert",
    "electra": "bert",
    "albert_groups": "albert",
    "deberta_v3": "deberta_v2",
}
LAYER_PATHS = {
    "albert": ["0.albert_layers.0"] * 3,
    "albert_groups": [f"{group}.albert_layers.{inner}" for group in (0, 0, 1, 1) for inner in (0, 1)],
}


def inputs_of(name: str, lengths: tuple[int, ...] = LENGTHS, width: int | None = None) -> dict[str, Tensor]:
    return models.batch(lengths, width, models.FAMILIES[name].pad)


def value_vectors(family: str, layer: Any, output: Tensor) -> Tensor:
    """(b, h, k, v) from what the family's value module gave."""
    b, k, _ = output.shape
    if family == "deberta":
        # Queries, keys and values of one head stand side by side; the bias is a parameter of its own.
        values = output.view(b, k, models.HEADS, -1).chunk(3, dim=-1)[2]
        values = values + layer.attention.self.v_bias.detach().view(models.HEADS, -1)
        return values.transpose(1, 2)
    return output.view(b, k, models.HEADS, -1).transpose(1, 2)


def by_definition(name: str, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """All local maps (b, l, q, k) and the saliency (b, k): hooks at known places, and the naive formulas."""
    model = models.build(name, "eager", torch.float64)
    family = SAME_PLACES.get(name, name)
    pattern, value_path, projection_path, norm1_path, norm2_path = PLACES[family]
    paths = [pattern.format(path) for path in LAYER_PATHS.get(name, range(models.FAMILIES[name].layers))]
    norm2_path = norm2_path or "output.LayerNorm"
    seen: dict[str, list[Tensor]] = {}

    def record(key: str, tensor: Tensor) -> None:
        seen.setdefault(key, []).append(tensor.detach())

    for path in dict.fromkeys(paths):
        layer = model.base_model.get_submodule(path)
        layer.register_forward_pre_hook(lambda module, args, path=path: record(path + ":x", args[0]))
        layer.get_submodule(value_path).register_forward_hook(lambda m, a, out, path=path: record(path + ":v", out))
        for which, norm_path in (("p1", norm1_path), ("p2", norm2_path)):
            layer.get_submodule(norm_path).register_forward_pre_hook(
                lambda m, args, key=f"{path}:{which}": record(key, args[0])
            )
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == len(paths)

    taken: dict[str, int] = {}
    maps: dict[str, list[Tensor]] = {}
    for path, attention in zip(paths, output.attentions, strict=True):
        turn = taken.get(path, 0)
        taken[path] = turn + 1
        x, v, p1, p2 = (seen[f"{path}:{what}"][turn] for what in ("x", "v", "p1", "p2"))
        layer = model.base_model.get_submodule(path)
        projection = layer.get_submodule(projection_path)
        norms = []
        for norm_path, real in ((norm1_path, p1), (norm2_path, p2)):
            norm = layer.get_submodule(norm_path)
            eps = norm.variance_epsilon if family == "deberta" else norm.eps
            norms.append(naive.Norm(norm.weight.detach(), eps=eps, real=real))
        found = naive.local_maps(
            attention.detach(),
            value_vectors(family, layer, v),
            projection.weight.detach(),
            projection.bias.detach(),
            x,
            norms,
            inputs["attention_mask"],
        )
        for method, one in found.items():
            maps.setdefault(method, []).append(one)
    hidden = output.hidden_states[0]
    (gradient,) = torch.autograd.grad(output.logits.amax(1).sum(), hidden)
    saliency = naive.saliency(gradient, hidden.detach(), inputs["attention_mask"])
    return {method: torch.stack(found, 1) for method, found in maps.items()}, saliency


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_is_what_the_definition_says(name: str) -> None:
    inputs = inputs_of(name)
    expected, saliency = by_definition(name, inputs)
    # DeBERTa v1's norms compute in float32 whatever they are given.
    tolerance = 1e-5 if name in models.FLOAT32_NORMS else 1e-9
    mask = inputs["attention_mask"].bool()
    for attn in [attn for family, attn in models.VARIANTS if family == name]:
        one = attribute(models.build(name, attn, torch.float64), inputs, methods=METHODS)
        for method in METHODS:
            torch.testing.assert_close(one.local[method], expected[method], rtol=tolerance, atol=tolerance)
            raw = one.rollout[method] * one.log_scale[method].exp()[..., None, None]
            torch.testing.assert_close(raw, naive.rollout(expected[method]), rtol=tolerance, atol=tolerance)
            for example in range(len(mask)):
                real = mask[example]
                for layer in range(one.rows[method].shape[1]):
                    rho = spearmanr(one.rows[method][example, layer, real], one.saliency[example, real]).statistic
                    assert float(one.correlation[method][example, layer]) == pytest.approx(rho, abs=1e-12)
        torch.testing.assert_close(one.saliency, saliency, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "attn"), models.VARIANTS)
def test_a_sentence_alone_is_the_same_as_in_a_padded_batch(name: str, attn: str) -> None:
    model = models.build(name, attn, torch.float64)
    tolerance = 1e-4 if name in models.FLOAT32_NORMS else 1e-9
    widths: list[tuple[bool, int]] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(
            (torch.is_grad_enabled(), kwargs.get("input_ids", args[0] if args else None).shape[1])
        ),
        with_kwargs=True,
    )
    inputs = inputs_of(name, width=40)
    together = attribute(model, inputs, methods=METHODS)
    # What costs is done without the columns of padding, once an evaluation has shown that the logits stay the same.
    assert {width for gradients, width in widths if gradients} == {12}
    assert widths.count((False, 40)) == 1
    assert together.attention_mask.shape == (4, 12)
    assert inputs["input_ids"].shape == (4, 40)
    for example, length in enumerate(LENGTHS):
        alone = attribute(
            model, {key: value[example : example + 1, :length] for key, value in inputs.items()}, methods=METHODS
        )
        for method in METHODS:
            cut = together.local[method][example]
            torch.testing.assert_close(alone.local[method][0], cut[:, :length, :length], rtol=tolerance, atol=tolerance)
            assert not cut[:, length:].any()
            assert not cut[:, :, length:].any()
            if name not in models.FLOAT32_NORMS:
                assert torch.equal(alone.correlation[method][0], together.correlation[method][example])
        torch.testing.assert_close(
            alone.saliency[0], together.saliency[example, :length], rtol=tolerance, atol=tolerance
        )
        assert not together.saliency[example, length:].any()
        torch.testing.assert_close(alone.logits[0], together.logits[example], rtol=tolerance, atol=tolerance)


def test_padding_on_the_left() -> None:
    model = models.build("bert", dtype=torch.float64)
    ids = models.batch((5,))["input_ids"]
    left = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1),
        "attention_mask": (torch.arange(8) >= 3).long().unsqueeze(0),
        "position_ids": (torch.arange(8) - 3).clamp(min=0).unsqueeze(0),
    }
    plain, padded = attribute(model, {"input_ids": ids}, methods=METHODS), attribute(model, left, methods=METHODS)
    for method in METHODS:
        torch.testing.assert_close(padded.local[method][:, :, 3:, 3:], plain.local[method], rtol=1e-9, atol=1e-12)
        assert not padded.local[method][:, :, :3].any()
        # The first real token's row is read, not the first column's.
        torch.testing.assert_close(padded.correlation[method], plain.correlation[method])


# ---- targets, readouts, settings


def bert(dtype: torch.dtype = torch.float64) -> Any:
    return models.build("bert", dtype=dtype)


def gradient_length(model: Any, inputs: dict[str, Tensor], score: Callable[[Tensor], Tensor]) -> Tensor:
    hidden: list[Tensor] = []
    handle = model.bert.embeddings.register_forward_hook(lambda module, args, output: hidden.append(output))
    logits = model(**inputs).logits
    handle.remove()
    (gradient,) = torch.autograd.grad(score(logits).sum(), hidden[0])
    length = (gradient * hidden[0]).norm(dim=-1)
    return length.masked_fill(inputs["attention_mask"] == 0, 0.0).detach()


def test_target_predicted() -> None:
    one = attribute(bert(), models.batch(LENGTHS))
    assert one.target == "predicted"
    assert torch.equal(one.predicted, one.logits.argmax(1))
    torch.testing.assert_close(one.saliency, gradient_length(bert(), models.batch(LENGTHS), lambda y: y.amax(1)))


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_target_label(key: str) -> None:
    labels = torch.tensor([2, 0, 1, 1])
    one = attribute(bert(), {**models.batch(LENGTHS), key: labels}, target="label")
    expected = gradient_length(bert(), models.batch(LENGTHS), lambda y: y.gather(1, labels.unsqueeze(1)))
    assert one.target == "label"
    torch.testing.assert_close(one.saliency, expected)


def test_target_that_chooses_a_class() -> None:
    def second(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return torch.full((len(logits),), 1)

    one = attribute(bert(), models.batch(LENGTHS), target=second)
    assert one.target == "second"
    torch.testing.assert_close(one.saliency, gradient_length(bert(), models.batch(LENGTHS), lambda y: y[:, 1]))


def test_target_that_gives_a_score() -> None:
    def margin(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        assert set(batch) == {"input_ids", "attention_mask"}
        return logits[:, 0] - logits[:, 2]

    one = attribute(bert(), models.batch(LENGTHS), target=margin)
    expected = gradient_length(bert(), models.batch(LENGTHS), lambda y: y[:, 0] - y[:, 2])
    torch.testing.assert_close(one.saliency, expected)


@pytest.mark.parametrize(
    "wrong", [lambda y, b: y, lambda y, b: y.sum(), lambda y, b: [0, 1, 2, 0]], ids=["matrix", "scalar", "list"]
)
def test_target_that_gives_no_vector(wrong: Callable[..., Any]) -> None:
    with pytest.raises(ModelCallError, match=r"one class index or one score per example, a tensor of shape \(4,\)"):
        attribute(bert(), models.batch(LENGTHS), target=wrong)


def test_target_that_does_not_depend_on_the_model() -> None:
    with pytest.raises(ModelCallError, match="does not depend on the encoder's hidden states"):
        attribute(bert(), models.batch(LENGTHS), target=lambda logits, batch: logits.detach()[:, 0])


def test_readouts() -> None:
    inputs = models.batch(LENGTHS)
    found = {readout: attribute(bert(), inputs, readout=readout) for readout in ("cls", "last", "mean")}
    rollout = found["cls"].rollout["N-Enc"]
    for readout, one in found.items():
        assert one.readout == readout
        assert torch.equal(one.rollout["N-Enc"], rollout)
        for example, length in enumerate(LENGTHS):
            rows = {
                "cls": rollout[example, :, 0],
                "last": rollout[example, :, length - 1],
                "mean": rollout[example, :, :length].mean(1),
            }
            row = one.rows["N-Enc"][example]
            torch.testing.assert_close(row, rows[readout], rtol=1e-12, atol=1e-15)
            for layer in range(3):
                rho = spearmanr(row[layer, :length], one.saliency[example, :length]).statistic
                assert float(one.correlation["N-Enc"][example, layer]) == pytest.approx(rho, abs=1e-12)


def test_normalized_rollout() -> None:
    inputs = models.batch(LENGTHS)
    plain = attribute(bert(), inputs, methods=METHODS)
    shares = attribute(bert(), inputs, methods=METHODS, normalize=True)
    assert shares.normalize
    assert not plain.normalize
    for method in METHODS:
        assert torch.equal(plain.local[method], shares.local[method])
        raw = shares.rollout[method] * shares.log_scale[method].exp()[..., None, None]
        expected = naive.rollout(plain.local[method], normalize=True)
        torch.testing.assert_close(raw, expected, rtol=1e-12, atol=1e-15)


def test_special_tokens_are_left_out_on_request() -> None:
    inputs = models.batch((9, 5, 12))
    special = torch.zeros_like(inputs["input_ids"])
    special[:, 0] = 1
    for example, length in enumerate((9, 5, 12)):
        special[example, length - 1] = 1
    one = attribute(bert(), {**inputs, "special_tokens_mask": special}, exclude_special_tokens=True)
    plain = attribute(bert(), inputs)
    assert torch.equal(one.rollout["N-Enc"], plain.rollout["N-Enc"])
    assert torch.equal(one.saliency, plain.saliency)
    assert not torch.equal(one.correlation["N-Enc"], plain.correlation["N-Enc"])
    for example, length in enumerate((9, 5, 12)):
        words = slice(1, length - 1)
        for layer in range(3):
            row, saliency = one.rows["N-Enc"][example, layer, words], one.saliency[example, words]
            rho = spearmanr(row, saliency).statistic
            assert float(one.correlation["N-Enc"][example, layer]) == pytest.approx(rho, abs=1e-12)


def test_special_tokens_mask_reaches_a_forward_that_may_pool_with_it() -> None:
    def forward(model: Any, batch: dict[str, Any]) -> Any:
        assert set(batch) == {"input_ids", "attention_mask", "special_tokens_mask"}
        return model(batch["input_ids"], batch["attention_mask"])

    inputs = models.batch(LENGTHS)
    given = {**inputs, "special_tokens_mask": torch.ones_like(inputs["input_ids"])}
    found = attribute(bert(), given, forward=forward)
    assert torch.equal(found.correlation["N-Enc"], attribute(bert(), inputs).correlation["N-Enc"])


def test_special_tokens_that_nobody_knows() -> None:
    with pytest.raises(ProbeError, match="return_special_tokens_mask=True"):
        attribute(bert(), models.batch(LENGTHS), exclude_special_tokens=True)


def test_one_method_is_the_same_alone_as_among_others() -> None:
    everything = attribute(bert(), models.batch(LENGTHS), methods=METHODS)
    for method in METHODS:
        one = attribute(bert(), models.batch(LENGTHS), methods=(method,))
        assert one.methods == (method,)
        assert set(one.local) == set(one.rollout) == set(one.rows) == set(one.last) == {method}
        torch.testing.assert_close(one.local[method], everything.local[method], rtol=1e-12, atol=1e-14)


def test_methods_keep_the_order_they_were_asked_for() -> None:
    assert attribute(bert(), models.batch((4,)), methods=("N-Enc", "W", "N")).methods == ("N-Enc", "W", "N")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("N-Enc", "GlobEnc")}, "unknown method 'GlobEnc': choose from W, W-FixedRes"),
        ({"methods": ()}, "at least one method"),
        ({"methods": ("W", "W")}, "each once"),
        ({"readout": "pooler"}, "unknown readout 'pooler': choose from auto, cls, last, mean"),
        ({"target": "gold"}, "unknown target 'gold': choose 'predicted' or 'label'"),
        ({"target": None}, "unknown target None"),
    ],
)
def test_wrong_choices_name_the_right_ones(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(bert(), models.batch((4,)), **wrong)


# ---- the work that is done


def refers_back(model: Any) -> None:
    object.__setattr__(model.bert.encoder, "owner", model)


def has_another_forward(model: Any) -> None:
    old = model.bert.encoder.forward
    model.bert.encoder.forward = lambda *args, _owner=model, **kwargs: old(*args, **kwargs)


def has_a_bound_forward(model: Any) -> None:
    layer = model.bert.encoder.layer[0]
    layer.owner = [model]
    layer.forward = types.MethodType(type(layer).forward, layer)


def has_a_hook(model: Any) -> None:
    seen: list[int] = []
    model.bert.encoder.layer[1].register_forward_hook(lambda *_: seen.append(model.num_labels))


def holds_its_own_method(model: Any) -> None:
    model.bert.embeddings.called_by = model.forward


def has_a_partial_forward(model: Any) -> None:
    model.bert.encoder.forward = functools.partial(model.bert.encoder.forward)
    model.bert.encoder.owner = (model,)


def has_a_parameter_with_a_hook(model: Any) -> None:
    model.bert.encoder.layer[0].output.LayerNorm.weight.register_hook(lambda gradient: gradient * model.num_labels)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: None,
        refers_back,
        has_another_forward,
        has_a_bound_forward,
        has_a_hook,
        holds_its_own_method,
        has_a_partial_forward,
        has_a_parameter_with_a_hook,
    ],
)
def test_a_model_dies_and_costs_one_structure_pass_while_it_lives(prepare: Callable[[Any], None]) -> None:
    known = len(analysis._KNOWN)
    alive: list[weakref.ref[nn.Module]] = []
    for _ in range(3):
        model = bert()
        prepare(model)
        forwards: list[int] = []
        counter = model.bert.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        first = attribute(model, models.batch(LENGTHS))
        assert len(forwards) > 1
        found = len(forwards)
        before = [dict(vars(one)) for one in model.modules()]
        again = attribute(model, models.batch(LENGTHS))
        assert len(forwards) == found + 1
        assert [dict(vars(one)) for one in model.modules()] == before
        assert torch.equal(first.rows["N-Enc"], again.rows["N-Enc"])
        counter.remove()
        alive.append(weakref.ref(model))
        del model, before
    gc.collect()
    assert [one() is None for one in alive] == [True] * 3
    assert len(analysis._KNOWN) == known


def test_a_part_that_was_exchanged_since_is_found_anew() -> None:
    model, other = bert(), bert()
    attribute(model, models.batch(LENGTHS))
    other.bert.encoder.layer[1].load_state_dict(model.bert.encoder.layer[0].state_dict())
    model.bert.encoder.layer[1] = copy.deepcopy(model.bert.encoder.layer[0])
    gc.collect()
    rows = [attribute(one, models.batch(LENGTHS)).rows["N-Enc"] for one in (model, other)]
    assert torch.equal(*rows)


def test_a_forward_that_nobody_can_refer_to_weakly_is_no_obstacle() -> None:
    class Called:
        """Stands in for a forward, and takes no weak reference."""

        __slots__ = ("old",)

        def __init__(self, old: Any) -> None:
            self.old = old

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.old(*args, **kwargs)

    model = bert()
    plain = attribute(model, models.batch(LENGTHS))
    model.bert.encoder.forward = Called(model.bert.encoder.forward)
    for _ in range(2):
        assert torch.equal(attribute(model, models.batch(LENGTHS)).rows["N-Enc"], plain.rows["N-Enc"])


def test_one_forward_and_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    reader = Reader(model)
    forwards, gradients, backwards = [], [], []
    # Before the structure is found: a hook that comes later is another model, whose structure is looked for again.
    model.bert.register_forward_hook(lambda *_: forwards.append(1))
    analyze(reader, models.batch(LENGTHS), Settings(METHODS))
    forwards.clear()
    right = torch.autograd.grad

    def counted(scores: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # Those through the head alone, which show which text each example is decided from, cost next to nothing.
        gradients.append(isinstance(inputs, list | tuple))
        return right(scores, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kwargs: backwards.append(1))
    analyze(reader, models.batch(LENGTHS), Settings(METHODS))
    assert (len(forwards), sum(gradients), len(backwards)) == (1, 1, 0)


@pytest.mark.parametrize("name", ["bert", "albert", "distilbert"])
def test_no_more_than_one_layers_attention_is_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    b, s = 3, 11
    model = models.build(name, "sdpa")
    reader = Reader(model)
    settings = Settings(METHODS)
    inputs = models.batch((11, 9, 10))
    analyze(reader, inputs, settings)
    size = b * models.HEADS * s * s
    refs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    held: list[int] = []
    right = rolling.local_maps

    def storages() -> set[int]:
        return {
            tensor.untyped_storage().data_ptr()
            for tensor in gc.get_objects()
            if issubclass(type(tensor), Tensor) and tensor.numel() == size and tensor.dim() == 4
        }

    def watched(attention: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(attention))
        held.append(len(storages()))
        return right(attention, *args, **kwargs)

    gc.collect()
    assert not storages()
    monkeypatch.setattr(rolling, "local_maps", watched)
    analyze(reader, inputs, settings)
    assert alive == [0, 0, 0]
    assert held == [1, 1, 1]
    assert not storages()


def test_only_rows_are_kept_on_request() -> None:
    whole = attribute(bert(), models.batch(LENGTHS), methods=METHODS)
    rows = analyze(Reader(bert()), models.batch(LENGTHS), Settings(METHODS), keep_maps=False)
    assert rows.local == rows.rollout == {}
    for method in METHODS:
        assert torch.equal(rows.rows[method], whole.rows[method])
        assert torch.equal(rows.last[method], whole.last[method])
        assert torch.equal(rows.correlation[method], whole.correlation[method])


def test_everything_is_a_detached_tensor() -> None:
    one = attribute(bert(), models.batch(LENGTHS), methods=METHODS)
    tensors = [one.saliency, one.attention_mask, one.predicted, one.logits, one.reconstruction_error]
    for group in (one.local, one.rollout, one.log_scale, one.rows, one.last, one.correlation):
        assert type(group) is dict
        tensors += group.values()
    assert {type(tensor) for tensor in tensors} == {Tensor}
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)
    assert one.attention_mask.dtype == torch.bool
    assert one.predicted.dtype == torch.long
    assert {rho.dtype for rho in one.correlation.values()} == {torch.float64}


def test_inputs_are_not_changed_and_not_shared() -> None:
    inputs = models.batch(LENGTHS, width=20)
    before = {key: value.clone() for key, value in inputs.items()}

    def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        batch["input_ids"].zero_()
        return logits

    one = attribute(bert(), inputs, forward=forward)
    assert set(inputs) == set(before)
    assert all(torch.equal(inputs[key], value) for key, value in before.items())
    one.attention_mask.zero_()
    assert torch.equal(inputs["attention_mask"], before["attention_mask"])


# ---- the model is left as it was


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in model.modules()
        ],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": str(getattr(model, "config", "")),
    }


@pytest.mark.parametrize(("name", "attn"), models.VARIANTS)
def test_a_model_is_left_bitwise_as_it_was(name: str, attn: str) -> None:
    model = models.build(name, attn).train()
    model.base_model.embeddings.eval()
    frozen = next(model.base_model.embeddings.parameters())
    frozen.requires_grad_(False)
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    pickled = pickle.dumps(model)
    attribute(model, inputs_of(name), methods=METHODS)
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert len(pickle.dumps(model)) == len(pickled)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_below_any_gradient_mode(mode: Callable[[], Any]) -> None:
    expected = attribute(bert(), models.batch(LENGTHS), methods=METHODS)
    model = bert()
    with mode():
        one = attribute(model, models.batch(LENGTHS), methods=METHODS)
    assert torch.equal(one.saliency, expected.saliency)
    for method in METHODS:
        assert torch.equal(one.local[method], expected.local[method])
        assert torch.equal(one.correlation[method], expected.correlation[method])
        # What was found can be used further like any other tensor.
        assert not one.local[method].is_inference()
        assert not one.correlation[method].is_inference()


def test_below_autocast() -> None:
    expected = attribute(bert(torch.float32), models.batch(LENGTHS), methods=METHODS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = attribute(bert(torch.float32), models.batch(LENGTHS), methods=METHODS)
    assert torch.equal(one.saliency, expected.saliency)
    assert torch.equal(one.local["N-Enc"], expected.local["N-Enc"])


def test_inputs_made_in_inference_mode() -> None:
    with torch.inference_mode():
        inputs = models.batch(LENGTHS)
    assert torch.equal(attribute(bert(), inputs).saliency, attribute(bert(), models.batch(LENGTHS)).saliency)


def test_a_frozen_encoder_has_a_saliency() -> None:
    model = bert()
    model.bert.requires_grad_(False)
    assert torch.equal(
        attribute(model, models.batch(LENGTHS)).saliency, attribute(bert(), models.batch(LENGTHS)).saliency
    )
    model.requires_grad_(False)
    assert torch.equal(
        attribute(model, models.batch(LENGTHS)).saliency, attribute(bert(), models.batch(LENGTHS)).saliency
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dropout_is_off() -> None:
    model = bert().train()
    one = attribute(model, models.batch(LENGTHS))
    assert torch.equal(one.logits, attribute(bert(), models.batch(LENGTHS)).logits)
    assert model.training


@pytest.mark.parametrize(("name", "attn"), models.VARIANTS)
def test_a_model_in_bfloat16_is_read(name: str, attn: str) -> None:
    one = attribute(models.build(name, attn, torch.bfloat16), inputs_of(name), methods=METHODS)
    assert one.local["N-Enc"].dtype == torch.float32
    assert all(torch.isfinite(rho).all() for rho in one.correlation.values())
    assert float(one.reconstruction_error.max()) < 5e-2


# ---- odd input


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_row_of_padding_has_no_figures_and_disturbs_nobody(attn: str) -> None:
    model = models.build("bert", attn)
    alone = attribute(model, models.batch((9, 5)), methods=METHODS)
    inputs = models.batch((9, 5))
    with_padding = {key: torch.cat([value, torch.zeros_like(value[:1])]) for key, value in inputs.items()}
    with pytest.warns(GlobEncWarning, match=r"rows without a real token have no figures: \[2\]"):
        one = attribute(model, with_padding, methods=METHODS)
    assert not one.saliency[2].any()
    for method in METHODS:
        assert one.correlation[method][2].isnan().all()
        assert not one.local[method][2].any()
        assert not one.rollout[method][2].any()
        assert torch.equal(one.local[method][:2], alone.local[method])
        # All examples and methods are multiplied at once, and the last bit depends on where a matrix lies in memory.
        torch.testing.assert_close(one.rollout[method][:2], alone.rollout[method], rtol=1e-6, atol=0)
        assert torch.equal(one.correlation[method][:2], alone.correlation[method])
    assert torch.equal(one.saliency[:2], alone.saliency)


def test_a_row_of_padding_that_comes_first() -> None:
    inputs = {key: torch.cat([torch.zeros_like(value[:1]), value]) for key, value in models.batch((9,)).items()}
    with pytest.warns(GlobEncWarning, match=r"\[0\]"):
        one = attribute(bert(), inputs)
    assert one.correlation["N-Enc"].isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize(("name", "attn"), models.VARIANTS)
def test_a_single_token_has_maps_and_no_correlation(name: str, attn: str) -> None:
    model = models.build(name, attn)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GlobEncWarning)
        for lengths in ((1,), (1, 1), (6, 1)):
            one = attribute(model, inputs_of(name, lengths), methods=METHODS)
            for method in METHODS:
                assert torch.isfinite(one.local[method]).all()
                assert torch.isfinite(one.rollout[method]).all()
                assert one.correlation[method][-1].isnan().all()
                if lengths[0] > 1:
                    assert torch.isfinite(one.correlation[method][0]).all()
            assert torch.isfinite(one.saliency).all()
            assert bool((one.saliency[:, 0] > 0).all())


@pytest.mark.parametrize("name", models.FAMILIES)
def test_weights_that_are_not_finite(name: str) -> None:
    model = models.build(name)
    with torch.no_grad():
        list(model.base_model.parameters())[-3].fill_(float("nan"))
        next(model.base_model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        attribute(model, inputs_of(name))


def test_a_head_that_is_not_finite() -> None:
    model = bert()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="gradient"):
        attribute(model, models.batch(LENGTHS))


def test_all_padding() -> None:
    inputs = {key: torch.zeros_like(value) for key, value in models.batch((9, 5)).items()}
    with pytest.raises(ProbeError, match="no real token"):
        attribute(bert(), inputs)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_an_empty_batch(shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ProbeError, match="empty"):
        attribute(bert(), {"input_ids": empty, "attention_mask": empty})


@pytest.mark.parametrize("shape", [(4, 11), (3, 12), (12, 4), (4, 12, 1)])
def test_a_mask_of_another_shape(shape: tuple[int, ...]) -> None:
    inputs = {**models.batch(LENGTHS), "attention_mask": torch.ones(shape)}
    with pytest.raises(ProbeError, match=r"attention_mask must have the shape \(4, 12\)"):
        attribute(bert(), inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(2, 3, dtype=torch.long), "a Tensor, not a mapping"),
        ((torch.ones(2, 3), torch.ones(2, 3)), "a tuple, not a mapping"),
        (["a text"], "a list, not a mapping"),
        (None, "a NoneType, not a mapping"),
        ({}, "the inputs need input_ids"),
        ({"tokens": [[1, 2]]}, "they hold tokens"),
        ({"input_ids": [[1, 2]]}, "a tensor of shape"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, "a tensor of shape"),
    ],
)
def test_inputs_that_are_none(inputs: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message) as raised:
        attribute(bert(), inputs)
    assert "tokenizer(texts, padding=True, return_tensors='pt')" in str(raised.value)


def test_labels_that_are_missing() -> None:
    with pytest.raises(ProbeError, match=r"target='label' needs labels in the batch.*input_ids, attention_mask"):
        attribute(bert(), models.batch(LENGTHS), target="label")


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [-1, 0, 0, 0], [0, -100, 0, 0]])
def test_labels_out_of_range(labels: list[int]) -> None:
    inputs = {**models.batch(LENGTHS), "labels": torch.tensor(labels)}
    with pytest.raises(ProbeError, match="between 0 and 2"):
        attribute(bert(), inputs, target="label")
    assert torch.isfinite(attribute(bert(), inputs).correlation["N-Enc"]).any()


@pytest.mark.parametrize("labels", [torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, 3, dtype=torch.long)])
def test_labels_that_are_no_class_indices(labels: Tensor) -> None:
    with pytest.raises(ProbeError, match="one class index per example"):
        attribute(bert(), {**models.batch(LENGTHS), "labels": labels}, target="label")


def test_a_single_logit_has_nothing_to_choose() -> None:
    model = BertForSequenceClassification(BertConfig(**{**models._SIZES, "num_labels": 1})).eval()
    models.redraw(model)
    inputs = {**models.batch(LENGTHS), "labels": torch.tensor([0, 1, 1, 0])}
    assert torch.equal(attribute(model, inputs, target="label").saliency, attribute(model, inputs).saliency)


def token_classifier() -> Any:
    model = BertForTokenClassification(BertConfig(**models._SIZES)).eval()
    models.redraw(model)
    return model


def test_token_level_logits_need_a_score() -> None:
    with pytest.raises(ModelCallError, match=r"shape \(4, 12, 3\).*target=lambda logits, batch"):
        attribute(token_classifier(), models.batch(LENGTHS))
    with pytest.raises(ModelCallError, match=r"class indices need logits of shape \(b, c\)"):
        attribute(token_classifier(), models.batch(LENGTHS), target=lambda logits, batch: torch.zeros(4).long())


def test_token_level_logits_with_a_score() -> None:
    one = attribute(token_classifier(), models.batch(LENGTHS), target=lambda logits, batch: logits[:, 0].amax(-1))
    assert torch.isfinite(one.correlation["N-Enc"]).all()
    assert one.logits.shape == (4, 12, 3)
    assert one.predicted.shape == (4,)


def test_embeddings_instead_of_ids() -> None:
    model = bert()
    inputs = models.batch(LENGTHS)
    embeddings = model.bert.embeddings.word_embeddings(inputs["input_ids"]).detach()
    one = attribute(model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]})
    torch.testing.assert_close(one.saliency, attribute(model, inputs).saliency)


def test_without_a_mask_every_token_is_real() -> None:
    inputs = models.batch((7, 7))
    bare, masked = attribute(bert(), {"input_ids": inputs["input_ids"]}), attribute(bert(), inputs)
    assert bool(bare.attention_mask.all())
    torch.testing.assert_close(bare.local["N-Enc"], masked.local["N-Enc"], rtol=1e-12, atol=1e-12)


def test_an_error_leaves_the_reader_usable() -> None:
    reader = Reader(bert())
    with pytest.raises(ProbeError):
        analyze(reader, models.batch(LENGTHS), Settings(target="label"))
    assert torch.isfinite(analyze(reader, models.batch(LENGTHS), Settings()).saliency).all()


def test_an_encoder_that_is_refused_is_left_as_it_was() -> None:
    for name in models.REFUSED:
        model = models.build(name).train()
        before = snapshot(model)
        with pytest.raises(UnsupportedEncoderError):
            attribute(model, models.batch((6, 4)))
        assert snapshot(model) == before


# ---- long texts: the structure is found with their beginning


class AtLeast(nn.Module):
    """A classifier that wants texts of some length, and can take another way for shorter ones."""

    def __init__(self, least: int, other: nn.Module | None = None) -> None:
        super().__init__()
        self.model = models.build("bert")
        self.other = other
        self.least = least

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        short = input_ids.shape[1] < self.least
        if short and self.other is None:
            raise ValueError(f"texts need {self.least} tokens")
        model = self.other if short and self.other is not None else self.model
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def left_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.flip(1) for key, value in inputs.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta_v3"])
def test_the_structure_of_long_texts_is_found_with_their_beginning(
    name: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = models.build(name), models.batch((17, 12, 20), width=23)
    inputs = left_padded(inputs) if side == "left" else inputs
    whole = analyze(Reader(model), inputs, Settings(METHODS))
    monkeypatch.setattr(analysis, "FIND_TOKENS", 6)
    reader = Reader(model)
    found = analyze(reader, inputs, Settings(METHODS))
    assert reader.structure is not None
    assert reader.structure.length == 6
    assert found.attention_mask.shape == whole.attention_mask.shape
    for method in METHODS:
        assert torch.equal(found.rollout[method], whole.rollout[method])
    assert torch.equal(found.saliency, whole.saliency)


def test_a_model_that_wants_whole_texts_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "FIND_TOKENS", 6)
    model, inputs = AtLeast(10), models.batch((17, 12))
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = attribute(model, inputs)
    # The beginning in vain, the whole, the whole as in an evaluation, and the analysis itself.
    assert lengths == [6, 17, 17, 17]
    assert torch.equal(found.rows["N-Enc"], attribute(model.model, inputs).rows["N-Enc"])
    with pytest.raises(ModelCallError, match="texts need 30 tokens"):
        attribute(AtLeast(30), inputs, forward=lambda module, batch: module(**batch))


def test_a_model_that_takes_another_way_for_short_texts_is_found_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "FIND_TOKENS", 6)
    model, inputs = AtLeast(10, models.build("distilbert", seed=3)), models.batch((17, 12))
    found = attribute(model, inputs)
    assert found.encoder == "model.bert"
    assert torch.equal(found.rows["N-Enc"], attribute(model.model, inputs).rows["N-Enc"])
