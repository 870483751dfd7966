"""ALTI, Value-Zeroing and attention flow on whole models and in whole trainings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from globenc_lightning import GlobEncCallback, attribute
from globenc_lightning.analysis import Reader
from globenc_lightning.functional import readout_row, rollout, spearman
from globenc_lightning.functional.flow import attention_flow
from globenc_lightning.measurement import measure
from globenc_lightning.probe import ProbeSet
from globenc_lightning.settings import Settings
from tests import models, torch_models, zeroing
from tests.families import FAMILIES, Family, build, example_inputs
from tests.neutrality import COLUMNS, SETTINGS, compare
from tests.training import Sentences, Steps, classifier, events, fit

RIVALS = ("ALTI", "Value-Zeroing")
BY_NAME = {one.name: one for one in FAMILIES}
ZEROED = [
    *(("bert", "sdpa"), ("bert", "eager"), ("distilbert", "sdpa"), ("deberta", "sdpa"), ("mpnet", "sdpa")),
    *(("vit", "sdpa"), ("eurobert", "eager"), ("beit", "sdpa"), ("llama", "sdpa"), ("llama", "eager"), ("opt", "sdpa")),
    *(
        ("gemma3", "sdpa"),
        ("granite", "sdpa"),
        ("gpt_neox", "sdpa"),
        ("falcon", "eager"),
        ("opt (norms after)", "sdpa"),
    ),
]
"""Families of every rule; shared key-value heads, causal masks, LayerScale, numbers, joined texts, eager and sdpa."""


def layers_of(model: nn.Module, count: int) -> list[nn.Module]:
    return next(list(one) for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == count)


def made(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> tuple[Family, nn.Module, Any]:
    family = BY_NAME[name]
    if family.missing or attention not in family.kinds:
        pytest.skip(family.missing or f"this transformers has no {attention} attention for {name}")
    # Some models keep a part in float32, which no product with float64 takes.
    dtype = dtype if attention in family.doubled else torch.float32
    return family, build(family, attention, dtype), example_inputs(family, dtype)


def near(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else 5e-6


@pytest.mark.parametrize(("name", "attention"), ZEROED)
def test_value_zeroing_is_what_the_layer_gives_with_the_values_at_zero(name: str, attention: str) -> None:
    family, model, inputs = made(name, attention)
    found = attribute(model, inputs, methods=("Value-Zeroing",))
    maps = found.local["Value-Zeroing"]
    naive = zeroing.scores(model, inputs, layers_of(model, family.layers), found.attention_mask)
    assert naive.max() > 0.1
    torch.testing.assert_close(maps.double(), naive, rtol=0, atol=near(maps.dtype))
    rolled, _ = rollout(naive)
    rows = readout_row(rolled, found.attention_mask, found.readout) if found.readout in ("cls", "last") else None
    if rows is not None:
        ours, theirs = (one / one.sum(-1, keepdim=True) for one in (found.rows["Value-Zeroing"].double(), rows))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * near(maps.dtype))


def layer_norm(norm: nn.Module, real: Tensor, vectors: Tensor) -> Tensor:
    """A LayerNorm (b, q, k, d) with its statistics at the real input (b, q, d)."""
    scale = (real.var(-1, correction=0) + norm.eps).sqrt()[:, :, None, None]
    return norm.weight * (vectors - vectors.mean(-1, keepdim=True)) / scale


def rms_norm(norm: nn.Module, real: Tensor, vectors: Tensor) -> Tensor:
    """The same of Gemma's RMSNorm."""
    return (1 + norm.weight) * vectors / (real.square().mean(-1) + norm.eps).sqrt()[:, :, None, None]


class At:
    """Where the vectors of a layer's attention can be seen, for the naive ALTI.

    Attributes:
        vectors: the module that is given the attention's output (or gives it, ``gives``), with or without the residual.
        attended: the module that is given the stream after the attention; None to add it up.
        frozen: what the vectors pass through, with the module and its real input; the residual as well if ``post``.
    """

    def __init__(
        self,
        vectors: Callable[[Any], nn.Module],
        attended: Callable[[Any], nn.Module] | None,
        frozen: Callable[..., Tensor] | None = None,
        post: bool = False,
        gives: bool = False,
    ) -> None:
        self.vectors, self.attended, self.frozen, self.post, self.gives = vectors, attended, frozen, post, gives


ALTI = {
    "bert": At(lambda one: one.attention.output.LayerNorm, None, layer_norm, post=True),
    "llama": At(lambda one: one.post_attention_layernorm, lambda one: one.post_attention_layernorm),
    "beit": At(lambda one: one.layernorm_after, lambda one: one.layernorm_after),
    "esm": At(lambda one: one.LayerNorm, lambda one: one.LayerNorm),
    "gemma3": At(lambda one: one.post_attention_layernorm, lambda one: one.pre_feedforward_layernorm, rms_norm),
    "gpt_neox": At(lambda one: one.attention.dense, None, gives=True),
}


@pytest.mark.parametrize("name", ALTI)
def test_alti_is_the_distance_of_each_tokens_vector(name: str) -> None:
    family, model, inputs = made(name)
    at = ALTI[name]
    found = attribute(model, inputs, methods=("ALTI",))
    s = found.attention_mask.shape[1]
    maps = []
    for index, layer in enumerate(layers_of(model, family.layers)):
        x = zeroing.run(model, inputs, index, None, layer)[0].double()
        seen = at.vectors(layer)
        side = int(at.gives)
        real = zeroing.run(model, inputs, index, None, seen)
        without = [zeroing.run(model, inputs, index, token, seen)[side] for token in range(s)]
        # What a token adds is what is missing without it.
        vectors = torch.stack([real[side] - one for one in without], 2).double()
        itself = torch.eye(s, dtype=torch.float64).view(1, s, s, 1) * x.unsqueeze(2)
        vectors = vectors + itself if at.post else vectors
        if at.frozen is not None:
            vectors = at.frozen(seen, real[0].double(), vectors)
        vectors = vectors if at.post else vectors + itself
        if at.post:
            output = real[1]
        else:
            output = (
                x + real[1] if at.attended is None else zeroing.run(model, inputs, index, None, at.attended(layer))[0]
            )
        output = output.double()
        closeness = output.abs().sum(-1, keepdim=True) - (output.unsqueeze(2) - vectors).abs().sum(-1)
        maps.append(closeness.clamp(min=0))
    naive = zeroing.shares(torch.stack(maps, 1), found.attention_mask)
    ours = found.local["ALTI"]
    assert (naive > 0.05).sum() > 30
    torch.testing.assert_close(ours.double(), naive, rtol=0, atol=near(ours.dtype))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: torch_models.Classifier(batch_first=True), id="post-LN encoder"),
        pytest.param(lambda: torch_models.Classifier(norm_first=True, final=True), id="pre-LN encoder, tokens first"),
        pytest.param(lambda: torch_models.Blocks(pre=False, sequence_first=True, first=False), id="post-LN blocks"),
        pytest.param(lambda: torch_models.Blocks(pre=True, asked=(False, False)), id="pre-LN blocks"),
    ],
)
def test_value_zeroing_of_torchs_own_modules(model: Callable[[], nn.Module]) -> None:
    drawn, ids = torch_models.drawn(model()), torch_models.texts()
    found = attribute(drawn, {"input_ids": ids}, methods=RIVALS)
    for place, maps in enumerate(torch_models.by_hand(drawn, ids).maps):
        torch.testing.assert_close(
            found.local["Value-Zeroing"][:, place], maps["Value-Zeroing"], rtol=0, atol=1e-9, equal_nan=True
        )
    sums = found.local["ALTI"].sum(-1)
    torch.testing.assert_close(sums, found.attention_mask[:, None].expand_as(sums).to(sums))


# ---- where methods agree, and where they do not


def to_itself() -> Any:
    """A model whose tokens attend to themselves alone: of vectors of one length, none is as near as a vector itself."""
    options = {**models._SIZES, "num_attention_heads": 1, "num_hidden_layers": 2}
    model: Any = BertForSequenceClassification(BertConfig(**options, attn_implementation="sdpa"))
    models.redraw(model)
    with torch.no_grad():
        for norm in (model.bert.embeddings.LayerNorm, *(layer.output.LayerNorm for layer in model.bert.encoder.layer)):
            norm.weight.fill_(1)
            norm.bias.zero_()
        for layer in model.bert.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key):
                linear.weight.copy_(100 * torch.eye(32))
                linear.bias.zero_()
    return model.double().eval()


def test_where_each_token_attends_to_itself_alone_all_methods_agree() -> None:
    model, inputs = to_itself(), models.batch([7, 5, 1])
    found = attribute(model, inputs, methods=("W", "N-Enc", *RIVALS))
    flows = attribute(model, inputs, methods=("W", "N-Enc", *RIVALS), aggregation="maxflow")
    first = torch.zeros(3, 7, dtype=torch.float64)
    first[:, 0] = 1
    for method in found.methods:
        for one in (found, flows):
            rows = one.rows[method] / one.rows[method].sum(-1, keepdim=True)
            torch.testing.assert_close(rows, first.unsqueeze(1).expand_as(rows), msg=method)


def test_where_attention_moves_nothing_its_weights_alone_do_not_show_it() -> None:
    """Values at zero: only the residual is left for ALTI, nothing for Value-Zeroing, and W is as it was."""
    model, inputs = models.build("bert", dtype=torch.float64), models.batch([7, 5])
    before = attribute(model, inputs, methods=("W",)).local["W"]
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.value.weight.zero_()
            layer.attention.self.value.bias.zero_()
            # The output projection's bias would be nobody's.
            layer.attention.output.dense.bias.zero_()
    found = attribute(model, inputs, methods=("W", *RIVALS))
    real = found.attention_mask[:, None, :, None] & found.attention_mask[:, None, None, :]
    identity = torch.eye(7, dtype=torch.float64).expand_as(before) * real
    torch.testing.assert_close(found.local["ALTI"], identity)
    assert (found.local["Value-Zeroing"] == 0).all()
    assert (found.local["W"] - identity).abs().max() > 0.5
    assert found.correlation["Value-Zeroing"].isnan().all()
    assert before.shape == found.local["W"].shape


# ---- attention flow


@pytest.mark.parametrize("readout", ["cls", "last", "mean", "auto"])
@pytest.mark.parametrize("normalize", [False, True])
def test_flows_go_from_what_is_read_through_the_maps(readout: str, normalize: bool) -> None:
    model, inputs = models.build("bert"), models.batch([7, 5, 1])
    methods = ("Value-Zeroing", "W", "ALTI")
    found = attribute(model, inputs, methods=methods, aggregation="maxflow", readout=readout, normalize=normalize)
    assert (found.rollout, found.last, found.log_scale, found.aggregation) == ({}, {}, {}, "maxflow")
    assert found.methods == methods
    mask = found.attention_mask
    for method in methods:
        maps = found.local[method]
        maps = maps / maps.sum(-1, keepdim=True).masked_fill(~mask[:, None, :, None], 1) if normalize else maps
        read = torch.stack([readout_row(maps[:, layer], mask, found.readout) for layer in range(3)], 1)
        for example, length in enumerate([7, 5, 1]):
            real = maps[example, :, :length, :length].double().numpy()
            for layer in range(3):
                flow = attention_flow(read[example, layer, :length].double().numpy(), real[:layer])
                np.testing.assert_allclose(found.rows[method][example, layer, :length], flow, rtol=1e-5, atol=1e-6)
            assert (found.rows[method][example, :, length:] == 0).all()
        expected = spearman(found.rows[method], found.saliency[:, None], mask[:, None])
        torch.testing.assert_close(found.correlation[method], expected, equal_nan=True)


def test_the_first_layers_flow_is_its_rollout() -> None:
    model, inputs = models.build("bert", dtype=torch.float64), models.batch([7, 5])
    rolled = attribute(model, inputs, methods=("N-Enc", "ALTI"))
    flows = attribute(model, inputs, methods=("N-Enc", "ALTI"), aggregation="maxflow")
    for method in rolled.methods:
        ours, theirs = (
            one[:, 0] / one[:, 0].sum(-1, keepdim=True) for one in (flows.rows[method], rolled.rows[method])
        )
        torch.testing.assert_close(ours, theirs)
        # Where paths share an edge, the product and the flow differ.
        assert (flows.correlation[method][:, 1:] != rolled.correlation[method][:, 1:]).any()


def test_flows_of_a_tagger_go_from_the_tokens_that_are_decided() -> None:
    model: Any = BertForTokenClassification(BertConfig(**models._SIZES)).eval()
    models.redraw(model)
    labels = torch.tensor([[-100, 2, 1, 0, 1, 1, 0], [-100, -100, 1, 0, 1, -100, -100]])
    inputs = {**models.batch([7, 5]), "labels": labels}
    rolled, flows = (attribute(model, inputs, methods=("ALTI",), aggregation=how) for how in ("rollout", "maxflow"))
    assert flows.readout == rolled.readout == "token"
    ours, theirs = (one.rows["ALTI"][:, 0] for one in (flows, rolled))
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), theirs / theirs.sum(-1, keepdim=True))


# ---- whole trainings


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        ("shuffled loaders", "maxflow"),
        ("torch.compile", "rollout"),
        ("precision=bf16-true", "rollout"),
        ("metrics, lists and a file behind the loss", "rollout"),
        ("output_hidden_states", "rollout"),
    ],
)
def test_a_training_with_rivals_is_the_same_to_the_last_bit(name: str, aggregation: str) -> None:
    setting = SETTINGS[name]
    same, analysed = compare(
        setting,
        lambda: GlobEncCallback(
            methods=("N-Enc", *RIVALS), aggregation=aggregation, num_examples=3, heatmap_examples=1
        ),
    )
    assert same == dict.fromkeys(COLUMNS, True)
    assert analysed >= setting.analysed


@pytest.mark.parametrize("aggregation", ["rollout", "maxflow"])
@pytest.mark.parametrize("methods", [("ALTI",), ("Value-Zeroing",), ("W", *RIVALS)], ids=str)
def test_a_training_shows_rivals_in_every_place(methods: tuple[str, ...], aggregation: str, tmp_path: Path) -> None:
    callback = GlobEncCallback(methods=methods, aggregation=aggregation, num_examples=3, heatmap_examples=2)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(Steps(), callback, logger=logger)
    assert callback.history.about is not None
    assert callback.history.about.aggregation == aggregation
    assert set(callback.history[-1].correlation) == set(methods)
    tags = events(tmp_path).Tags()
    for method in methods:
        assert f"globenc/spearman/{method}" in tags["scalars"]
    pictures = {tag for tag in tags["images"] if "example_00" in tag}
    expected = {"globenc/heatmap/layers/example_00", "globenc/filmstrip/example_00"}
    expected |= {"globenc/heatmap/last_layer/example_00"} if aggregation == "rollout" else set()
    assert pictures == expected


def test_progress_goes_on_within_a_batch_of_flows() -> None:
    told: list[tuple[int, int]] = []
    probe = ProbeSet.from_batch(Sentences(5).first(5))
    measure(Reader(classifier()), probe, Settings(aggregation="maxflow"), tell=lambda *one: told.append(one))
    assert [done for done, _ in told][:5] == [0, 1, 2, 3, 4]
    assert told[-1] == (5, 5)
