"""Integrated gradients and hidden token attribution against plain loops over single examples."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    RobertaPreLayerNormConfig,
)
from transformers import RobertaPreLayerNormForSequenceClassification as PreLayerNorm

from globenc_lightning import METHODS, Attributions, attribute
from globenc_lightning.encoder.reading import EncoderCall
from globenc_lightning.errors import GlobEncWarning
from globenc_lightning.functional import spearman
from globenc_lightning.functional.references import directions, largest_deviation
from globenc_lightning.references import DIRECTIONS, INCOMPLETE, POINTS, jacobian_lengths, row_weights
from tests import models, torch_models

INTEGRATED, HTA, EXACT = "integrated gradients", "HTA", "exact HTA"
LENGTHS = (9, 5, 12)


def pre_ln(dtype: torch.dtype = torch.float64) -> Any:
    config = RobertaPreLayerNormConfig(
        **{**models._SIZES, "num_hidden_layers": 2}, pad_token_id=0, attn_implementation="sdpa"
    )
    model = PreLayerNorm(config)
    models.redraw(model)
    return model.to(dtype).eval()


def build(rule: str, dtype: torch.dtype = torch.float64) -> Any:
    return models.build("bert", dtype=dtype) if rule == "post-LN" else pre_ln(dtype)


def parts_of(model: Any) -> tuple[Any, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The embeddings, the encoder and the head of one of the two."""
    if hasattr(model, "bert"):
        return (
            model.bert.embeddings,
            lambda states: model.bert.encoder(states)[0],
            lambda last: model.classifier(model.bert.pooler(last)),
        )
    base = model.roberta_prelayernorm
    return base.embeddings, lambda states: base.LayerNorm(base.encoder(states)[0]), model.classifier


def rule_of(points: int) -> list[tuple[float, float]]:
    """The midpoint rule: places between 0 and 1, and the weight of each."""
    return [((2 * number + 1) / (2 * points), 1 / points) for number in range(points)]


def singles(batch: dict[str, Tensor]) -> list[Tensor]:
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].unsqueeze(0) for ids, mask in rows]


def naive_integrated(model: Any, ids: Tensor, points: int, chosen: int | None = None) -> tuple[Tensor, float, float]:
    """(k, d) of one example, and its score on the input and on the baseline."""
    embeddings, encoder, head = parts_of(model)
    full = embeddings(ids).detach()
    base = full.mean(1, keepdim=True).expand_as(full)
    with torch.no_grad():
        logits = head(encoder(full))[0]
        chosen = int(logits.argmax()) if chosen is None else chosen
        before = float(head(encoder(base))[0, chosen])
    total = torch.zeros_like(full)
    for place, weight in rule_of(points):
        states = (base + place * (full - base)).requires_grad_()
        (gradient,) = torch.autograd.grad(head(encoder(states))[0, chosen], states)
        total += weight * gradient
    return (total * (full - base))[0], float(logits[chosen]), before


def naive_jacobian(model: Any, ids: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """(k,) of one example."""
    embeddings, encoder, _ = parts_of(model)
    full = embeddings(ids).detach()
    jacobian = torch.autograd.functional.jacobian(lambda states: read(encoder(states)[0]), full)
    return jacobian[:, 0].square().sum((0, 2)).sqrt()


def compare(found: Tensor, example: int, expected: Tensor) -> None:
    length = len(expected)
    torch.testing.assert_close(found[example, :length], expected, rtol=1e-6, atol=1e-9)
    assert not found[example, length:].any()


# ---- integrated gradients


@pytest.mark.parametrize("rule", ["post-LN", "pre-LN"])
def test_integrated_gradients_are_those_of_a_loop_over_single_examples(rule: str) -> None:
    model, batch = build(rule), models.batch(LENGTHS)
    found = attribute(model, batch, references=(INTEGRATED,))
    for example, ids in enumerate(singles(batch)):
        expected, score, before = naive_integrated(model, ids, POINTS)
        compare(found.references[INTEGRATED], example, expected.norm(dim=-1))
        signed = expected.sum(-1)
        error = abs(float(signed.sum()) - (score - before)) / float(signed.abs().sum())
        assert float(found.reference_error[INTEGRATED][example]) == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert float(found.reference_error[INTEGRATED].max()) < INCOMPLETE


def test_the_class_that_is_predicted_on_the_text_stays_the_one_that_is_explained() -> None:
    """Halfway to the baseline, another class would be the largest: the largest logit's integral is another."""
    model, batch = build("post-LN"), models.batch([6] * 8, seed=2)
    with torch.no_grad():
        # No class is the largest of all examples.
        model.classifier.bias -= model(**batch).logits.mean(0)
    found = attribute(model, batch, references=(INTEGRATED,))
    embeddings, encoder, head = parts_of(model)
    changes = 0
    for example, ids in enumerate(singles(batch)):
        expected, *_ = naive_integrated(model, ids, POINTS)
        compare(found.references[INTEGRATED], example, expected.norm(dim=-1))
        full = embeddings(ids)
        changes += int(head(encoder(full.mean(1, keepdim=True).expand_as(full))).argmax() != found.predicted[example])
    assert changes > 0


class Linear(nn.Module):
    """A linear score of the first hidden states around an encoder of its own, which leaves them alone."""

    def __init__(self, squares: bool) -> None:
        super().__init__()
        self.model = models.build("bert", dtype=torch.float64)
        self.squares = squares
        draw = torch.Generator().manual_seed(3)
        self.head = nn.Parameter(torch.randn(12, 32, generator=draw, dtype=torch.float64))
        self.kept: list[Tensor] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = self.model.bert.encoder.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        last = self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        handle.remove()
        states = kept[0].square() if self.squares else kept[0]
        # The encoder is there, and counts for nothing.
        score = (states * self.head[: states.shape[1]]).sum((1, 2)) + 0.0 * last.sum((1, 2))
        return torch.stack([score, score - 1.0], 1)


def signed_parts(model: Linear, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    hidden = model.model.bert.embeddings(batch["input_ids"]).detach()
    return hidden, hidden - hidden.mean(1, keepdim=True), model.head[: hidden.shape[1]].detach()


def test_of_a_linear_score_integrated_gradients_are_gradient_times_input_less_baseline() -> None:
    model, batch = Linear(squares=False), models.batch([7, 7])
    found = attribute(model, batch, references=(INTEGRATED,))
    hidden, way, weights = signed_parts(model, batch)
    torch.testing.assert_close(found.saliency, (weights * hidden).norm(dim=-1))
    torch.testing.assert_close(found.references[INTEGRATED], (weights * way).norm(dim=-1))
    assert float(found.reference_error[INTEGRATED].max()) < 1e-12


def test_of_a_score_that_is_not_linear_they_are_not() -> None:
    model, batch = Linear(squares=True), models.batch([7, 7])
    found = attribute(model, batch, references=(INTEGRATED,))
    hidden, way, weights = signed_parts(model, batch)
    # The mean of 2 x between the ends.
    exact = (weights * (2 * hidden - way) * way).norm(dim=-1)
    torch.testing.assert_close(found.references[INTEGRATED], exact)
    assert not torch.allclose(found.references[INTEGRATED], (2 * weights * hidden * way).norm(dim=-1), rtol=0.1)
    assert float(found.reference_error[INTEGRATED].max()) < 1e-12


def tagger() -> Any:
    model = BertForTokenClassification(BertConfig(**{**models._SIZES, "num_hidden_layers": 2}))
    models.redraw(model)
    return model.double().eval()


def test_tokens_are_explained_by_the_class_that_they_have_on_the_text() -> None:
    model, batch = tagger(), models.batch([7, 5])
    batch["labels"] = torch.full((2, 7), -100)
    batch["labels"][0, 3], batch["labels"][1, 2] = 1, 0
    found = attribute(model, batch, references=(INTEGRATED, EXACT))
    assert found.readout == "token"
    for example, (ids, token) in enumerate(zip(singles(batch), (3, 2), strict=True)):
        full = model.bert.embeddings(ids).detach()
        way = full - full.mean(1, keepdim=True)

        def score(states: Tensor, token: int = token) -> Tensor:
            return model.classifier(model.bert.encoder(states)[0])[0, token]

        chosen, total = int(score(full).argmax()), torch.zeros_like(full)
        for place, weight in rule_of(POINTS):
            states = (full + (place - 1) * way).requires_grad_()
            total += weight * torch.autograd.grad(score(states)[chosen], states)[0]
        compare(found.references[INTEGRATED], example, (total * way)[0].norm(dim=-1))
        jacobian = torch.autograd.functional.jacobian(
            lambda states, token=token: model.bert.encoder(states)[0][0, token], full
        )
        compare(found.references[EXACT], example, jacobian[:, 0].square().sum((0, 2)).sqrt())


@pytest.mark.parametrize("kind", ["label", "index", "score"])
def test_a_target_of_one_s_own_is_explained_along_the_path(kind: str) -> None:
    model, batch = build("post-LN"), models.batch(LENGTHS)
    classes = torch.tensor([2, 0, 1])
    batch["labels"] = classes
    targets: dict[str, Any] = {
        "label": "label",
        "index": lambda logits, inputs: (logits.argmax(1) + 1) % 3,
        "score": lambda logits, inputs: logits[:, 1] - logits[:, 0],
    }
    found = attribute(model, batch, references=(INTEGRATED,), target=targets[kind])
    for example, ids in enumerate(singles(batch)):
        by_class = [naive_integrated(model, ids, POINTS, one)[0] for one in range(3)]
        best = int(model(input_ids=ids).logits.argmax())
        expected = {
            "label": by_class[int(classes[example])],
            "index": by_class[(best + 1) % 3],
            "score": by_class[1] - by_class[0],
        }
        compare(found.references[INTEGRATED], example, expected[kind].norm(dim=-1))


def test_incomplete_integrated_gradients_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.build("bert"), models.batch(LENGTHS)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            # Attention that jumps from one token to another on the way.
            layer.attention.self.query.weight.mul_(30)
    with pytest.warns(GlobEncWarning, match="integrated gradients miss .* of what they sum up"):
        found = attribute(model, batch, references=(INTEGRATED,))
    assert float(found.reference_error[INTEGRATED].max()) > INCOMPLETE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(models.build("bert"), batch, references=(INTEGRATED,))


# ---- hidden token attribution


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda last: last[0],
    "last": lambda last: last[-1],
    "mean": lambda last: last.mean(0),
    "auto": lambda last: last[0],
}


@pytest.mark.parametrize("readout", READS)
@pytest.mark.parametrize("rule", ["post-LN", "pre-LN"])
def test_exact_hta_is_the_length_of_the_jacobian(rule: str, readout: str) -> None:
    model, batch = build(rule), models.batch(LENGTHS)
    found = attribute(model, batch, references=(EXACT,), readout=readout)
    for example, ids in enumerate(singles(batch)):
        compare(found.references[EXACT], example, naive_jacobian(model, ids, READS[readout]))
    assert not found.reference_error[EXACT].any()


class Weighted(nn.Module):
    """A head that reads every token, each with another weight."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = models.build("bert", dtype=torch.float64).bert
        self.head = nn.Linear(32, 3, dtype=torch.float64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        last = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        share = torch.arange(1.0, last.shape[1] + 1, dtype=last.dtype) * attention_mask
        logits: Tensor = self.head((last * share.unsqueeze(-1)).sum(1))
        return logits


def test_a_row_that_is_weighted_is_weighted_as_the_rollout_s() -> None:
    torch.manual_seed(0)
    model, batch = Weighted(), models.batch(LENGTHS)
    found = attribute(model, batch, references=(EXACT,))
    assert found.readout == "weighted"
    for example, ids in enumerate(singles(batch)):
        share = torch.arange(1.0, ids.shape[1] + 1, dtype=torch.float64)
        share = share / share.sum()
        full = model.bert.embeddings(ids).detach()
        jacobian = torch.autograd.functional.jacobian(
            lambda states, share=share: (share.unsqueeze(1) * model.bert.encoder(states)[0][0]).sum(0), full
        )
        compare(found.references[EXACT], example, jacobian[:, 0].square().sum((0, 2)).sqrt())


def test_projected_hta_is_as_near_as_stated() -> None:
    """32 hidden units, 16 directions: the error of a token stays below four standard deviations of the worst case."""
    model, batch = build("post-LN"), models.batch([12] * 6)
    found = attribute(model, batch, references=(HTA, EXACT))
    apart = found.references[HTA] / found.references[EXACT] - 1
    worst = largest_deviation(32, DIRECTIONS)
    assert 0 < float(apart.abs().max()) < 4 * worst
    # What an example is told to be off by is what it is off by, on average.
    told = float(found.reference_error[HTA].mean())
    assert told < worst
    assert 0.5 < float(apart.square().mean().sqrt()) / told < 2


def test_projected_hta_is_made_of_the_directions_that_are_stated() -> None:
    model, batch = build("pre-LN"), models.batch(LENGTHS)
    found = attribute(model, batch, references=(HTA,))
    drawn = directions(32, DIRECTIONS)
    for example, ids in enumerate(singles(batch)):
        embeddings, encoder, _ = parts_of(model)
        full = embeddings(ids).detach()
        jacobian = torch.autograd.functional.jacobian(lambda states, encoder=encoder: encoder(states)[0, 0], full)[:, 0]
        expected = torch.einsum("rd,dke->rke", drawn, jacobian).square().sum((0, 2)).sqrt()
        compare(found.references[HTA], example, expected)


def test_a_call_whose_graph_is_whole_can_be_asked_again() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    matrix = torch.randn(4, 5, generator=draw, dtype=torch.float64)
    call = EncoderCall(hidden, torch.ones(2, 3).bool(), [], (hidden @ matrix).cumsum(1), None, 3)
    weights = row_weights(None, call.mask, "last", chosen=True)
    first, second = (jacobian_lengths(call, weights, None) for _ in range(2))
    torch.testing.assert_close(first.lengths, matrix.norm().expand(2, 3))
    assert torch.equal(first.lengths, second.lengths)


# ---- both


def test_an_example_alone_has_the_figures_that_it_has_in_a_padded_batch() -> None:
    model, batch = build("pre-LN"), models.batch(LENGTHS)
    asked: dict[str, Any] = {"references": (INTEGRATED, HTA), "methods": METHODS}
    together = attribute(model, batch, **asked)
    for example, ids in enumerate(singles(batch)):
        alone = attribute(model, {"input_ids": ids}, **asked)
        for name in (INTEGRATED, HTA):
            compare(together.references[name], example, alone.references[name][0])
            for method in METHODS:
                torch.testing.assert_close(
                    together.reference_correlation[name][method][example],
                    alone.reference_correlation[name][method][0],
                )


def test_correlations_are_spearman_s_with_and_without_special_tokens() -> None:
    model, batch = models.build("bert"), models.batch([9, 6])
    batch["special_tokens_mask"] = torch.zeros_like(batch["input_ids"])
    batch["special_tokens_mask"][:, 0] = 1
    for exclude in (False, True):
        found = attribute(
            model, batch, references=(INTEGRATED, HTA), methods=("N-Enc", "W"), exclude_special_tokens=exclude
        )
        counted = batch["attention_mask"].bool() & ~(batch["special_tokens_mask"].bool() & exclude)
        for name, by_method in found.reference_correlation.items():
            for method, rho in by_method.items():
                expected = spearman(found.rows[method], found.references[name][:, None], counted[:, None])
                torch.testing.assert_close(rho, expected)
    assert list(found.references) == list(found.reference_correlation) == [INTEGRATED, HTA]


def kept(found: Attributions) -> list[Tensor]:
    return [found.saliency, found.logits, *found.rows.values(), *found.correlation.values(), *found.last.values()]


def test_nothing_else_moves_and_nothing_is_given_where_it_is_not_asked_for() -> None:
    model, batch = models.build("bert"), models.batch(LENGTHS)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    bare = attribute(model, batch)
    more = attribute(model, batch, references=(INTEGRATED, HTA))
    assert bare.references == bare.reference_correlation == bare.reference_error == {}
    assert all(torch.equal(*pair) for pair in zip(kept(bare), kept(more), strict=True))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert not any("forward" in vars(one) for one in model.modules())


class Counting(nn.Module):
    """Counts its forward passes, and the backward passes through its embeddings' output."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.build("bert")

    def forward(self, **inputs: Tensor) -> Tensor:
        COUNTS[0] += 1
        logits: Tensor = self.model(**inputs).logits
        if logits.requires_grad:
            last = logits.grad_fn
            assert last is not None
            last.register_hook(lambda *_: COUNTS.__setitem__(1, COUNTS[1] + 1))
        return logits


COUNTS = [0, 0]


def count(references: tuple[str, ...]) -> tuple[int, int]:
    model, batch = Counting(), models.batch([6, 6])
    attribute(model, batch)
    COUNTS[:] = [0, 0]
    attribute(model, batch, references=references)
    return COUNTS[0], COUNTS[1]


def test_what_is_not_asked_for_costs_nothing() -> None:
    bare = count(("saliency",))
    assert count((INTEGRATED,)) == (bare[0] + POINTS + 1, bare[1] + POINTS)
    # The Jacobian goes through no head.
    assert count((HTA,)) == bare
    assert count((EXACT,)) == bare


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, batch = models.build("bert", dtype=dtype), models.batch([10, 10])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attribute(model, batch, references=(INTEGRATED, HTA))
    exact = attribute(models.build("bert", dtype=dtype).double(), batch, references=(INTEGRATED, HTA))
    for name in (INTEGRATED, HTA):
        assert found.references[name].dtype == torch.float32
        rho = spearman(found.references[name], exact.references[name], batch["attention_mask"])
        assert float(rho.min()) > 0.9


# ---- further kinds of decision, of models and of calls


def along(full: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """(k,) lengths of the integrated gradients of a differentiable score of one example's states (1, k, d)."""
    way, total = full - full.mean(1, keepdim=True), torch.zeros_like(full)
    for place, weight in rule_of(POINTS):
        states = (full + (place - 1) * way).requires_grad_()
        total += weight * torch.autograd.grad(score(states), states)[0]
    return (total * way)[0].norm(dim=-1)


def small(kind: Any, **options: Any) -> Any:
    model = kind(BertConfig(**{**models._SIZES, "num_hidden_layers": 2, **options}))
    models.redraw(model)
    return model.double().eval()


def test_a_span_is_explained_by_the_tokens_where_it_begins_and_ends_on_the_text() -> None:
    model, batch = small(BertForQuestionAnswering, num_labels=2), models.batch([8, 8, 8])
    found = attribute(model, batch, references=(INTEGRATED,))
    for example, ids in enumerate(singles(batch)):
        output = model(input_ids=ids)
        start, end = int(output.start_logits.argmax()), int(output.end_logits.argmax())

        def score(states: Tensor, start: int = start, end: int = end) -> Tensor:
            found: Tensor = model.qa_outputs(model.bert.encoder(states)[0])[0]
            return found[start, 0] + found[end, 1]

        compare(found.references[INTEGRATED], example, along(model.bert.embeddings(ids).detach(), score))


def test_a_choice_is_explained_in_the_text_of_the_one_that_is_chosen() -> None:
    model, flat = small(BertForMultipleChoice), models.batch([7, 5, 6, 7, 4, 7])
    batch = {key: value.view(2, 3, 7) for key, value in flat.items()}
    found = attribute(model, batch, references=(INTEGRATED, EXACT))
    texts = singles(flat)
    for example in range(2):
        ids = texts[3 * example + int(found.predicted[example])]

        def score(states: Tensor) -> Tensor:
            return model.classifier(model.bert.pooler(model.bert.encoder(states)[0]))[0, 0]

        full = model.bert.embeddings(ids).detach()
        compare(found.references[INTEGRATED], example, along(full, score))
        jacobian = torch.autograd.functional.jacobian(lambda states: model.bert.encoder(states)[0][0, 0], full)
        compare(found.references[EXACT], example, jacobian[:, 0].square().sum((0, 2)).sqrt())


class Pair(nn.Module):
    """Compares two texts, by one encoder that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = models.build("bert", dtype=torch.float64).bert
        self.head = nn.Linear(64, 3, dtype=torch.float64)

    def forward(
        self, query_input_ids: Tensor, query_attention_mask: Tensor, doc_input_ids: Tensor, doc_attention_mask: Tensor
    ) -> Tensor:
        query = self.bert(input_ids=query_input_ids, attention_mask=query_attention_mask)[0]
        document = self.bert(input_ids=doc_input_ids, attention_mask=doc_attention_mask)[0]
        logits: Tensor = self.head(torch.cat([query[:, 0], document[:, 0] * query[:, 0]], -1))
        return logits


def test_of_two_texts_both_go_along_the_path() -> None:
    torch.manual_seed(0)
    model, query, document = Pair(), models.batch([7, 4], seed=1), models.batch([5, 9], seed=2)
    batch = {f"query_{key}": value for key, value in query.items()}
    batch |= {f"doc_{key}": value for key, value in document.items()}
    found = attribute(model, batch, references=(INTEGRATED,))
    (other,) = found.others
    for example, (left, right) in enumerate(zip(singles(query), singles(document), strict=True)):
        full = [model.bert.embeddings(ids).detach() for ids in (left, right)]
        base = [one.mean(1, keepdim=True).expand_as(one) for one in full]
        total = [torch.zeros_like(one) for one in full]
        for place, weight in rule_of(POINTS):
            share = place
            states = [(b + share * (f - b)).requires_grad_() for f, b in zip(full, base, strict=True)]
            first, second = (model.bert.encoder(one)[0][:, 0] for one in states)
            logit = model.head(torch.cat([first, second * first], -1))[0, found.predicted[example]]
            for one, gradient in zip(total, torch.autograd.grad(logit, states), strict=True):
                one += weight * gradient
        for mine, gradient, f, b in zip((found, other), total, full, base, strict=True):
            compare(mine.references[INTEGRATED], example, (gradient * (f - b))[0].norm(dim=-1))
        assert float(found.reference_error[INTEGRATED][example]) < INCOMPLETE


class InARow(Pair):
    """The second call of its encoder goes on from what the first one gave."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        first = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        last = self.bert(inputs_embeds=first, attention_mask=attention_mask)[0]
        logits: Tensor = self.head(torch.cat([first[:, 0], last[:, 0]], -1))
        return logits


def test_states_that_are_made_of_another_call_s_have_no_path_of_their_own() -> None:
    torch.manual_seed(0)
    model, batch = InARow(), models.batch([7, 4])
    found = attribute(model, batch, references=(INTEGRATED, EXACT))
    (other,) = found.others
    for example, ids in enumerate(singles(batch)):

        def score(states: Tensor, example: int = example) -> Tensor:
            first = model.bert.encoder(states)[0]
            last = model.bert(inputs_embeds=first)[0]
            return model.head(torch.cat([first[:, 0], last[:, 0]], -1))[0, found.predicted[example]]

        compare(found.references[INTEGRATED], example, along(model.bert.embeddings(ids).detach(), score))
    real = batch["attention_mask"].bool()
    assert other.references[INTEGRATED][real].isnan().all()
    assert not other.references[INTEGRATED][~real].any()
    assert other.reference_correlation[INTEGRATED]["N-Enc"].isnan().all()
    assert other.references[EXACT][real].isfinite().all()


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_of_torch_s_own_whatever_axis_comes_first(norm_first: bool, final: bool) -> None:
    built = [
        torch_models.drawn(torch_models.Classifier(batch_first=first, norm_first=norm_first, final=final))
        .double()
        .eval()
        for first in (True, False)
    ]
    built[1].load_state_dict(built[0].state_dict())
    batch = {"input_ids": torch_models.texts()}
    one, other = (attribute(model, batch, references=(INTEGRATED, HTA)) for model in built)
    for name in (INTEGRATED, HTA):
        torch.testing.assert_close(one.references[name], other.references[name])
        assert one.references[name].gt(0).sum() > 10
    ids = batch["input_ids"][:1]
    full = built[0].embedded(ids).detach()
    score = lambda states: built[0].head(built[0].encoder(states)[:, 0])[0, one.predicted[0]]  # noqa: E731
    compare(one.references[INTEGRATED], 0, along(full, score))


CACHE: list[Tensor] = []


class Below(nn.Module):
    """Calls its encoder with embeddings, where gradients are off or on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.model = pre_ln()

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.how != "no_grad"):
            found: Tensor = self.model(inputs_embeds=inputs_embeds).logits
            return found


@pytest.mark.parametrize("how", ["as it is", "no_grad"])
def test_models_that_are_called_with_embeddings(how: str) -> None:
    model = Below(how)
    embeddings = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, plain = embeddings.clone(), Below("as it is").model
    base = plain.roberta_prelayernorm

    def logits(states: Tensor) -> Tensor:
        return plain.classifier(base.LayerNorm(base.encoder(states)[0]))[0]

    for _ in range(2):
        found = attribute(
            model,
            {"inputs_embeds": embeddings},
            references=(INTEGRATED, HTA),
            forward=lambda module, batch: module(**batch),
        )
        for example, chosen in enumerate(found.predicted.tolist()):
            full = base.embeddings(inputs_embeds=embeddings[example : example + 1]).detach()
            expected = along(full, lambda states, chosen=chosen: logits(states)[chosen])
            compare(found.references[INTEGRATED], example, expected)
    assert torch.equal(embeddings, before)


class Cached(torch_models.Classifier):
    """Makes its first hidden states once: whoever writes into them changes the next forward pass."""

    def embedded(self, ids: Tensor) -> Tensor:
        return CACHE[0] if CACHE else super().embedded(ids)


def test_first_hidden_states_that_somebody_keeps_are_put_back() -> None:
    CACHE.clear()
    model, batch = (
        torch_models.drawn(Cached(batch_first=True, padded=False)).double().eval(),
        {"input_ids": torch_models.texts((6, 6))},
    )
    # Its structure is found while it still makes them.
    attribute(model, batch)
    CACHE.append(model.embedded(batch["input_ids"]).detach())
    before = CACHE[0].clone()
    one, other = (attribute(model, batch, references=(INTEGRATED,)) for _ in range(2))
    assert torch.equal(CACHE[0], before)
    assert bool((one.references[INTEGRATED] > 0).all())
    torch.testing.assert_close(other.references[INTEGRATED], one.references[INTEGRATED])
    CACHE.clear()
