"""How much decisions depend on a method's first tokens: against a loop, on a model that is known, and in trainings."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from globenc_lightning import GlobEncCallback, ProbeSet, attribute
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.explained import Explained
from globenc_lightning.faithfulness import Faithfulness, put_together
from globenc_lightning.functional.perturbation import random_row
from globenc_lightning.measurement import measure
from globenc_lightning.perturbing import maskable_tokens, masked_again
from globenc_lightning.settings import Settings
from tests.training import (
    CLS,
    MASK,
    PAD,
    SEP,
    Row,
    Sentences,
    Steps,
    build_trainer,
    classifier,
    fit,
    loader,
    redrawn,
    said,
    tokenizer,
)

METHODS = ("N-Enc", "W")
BY_METHOD = ("gain", "sufficiency_gain", "log_odds")
NAN = float("nan")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_masks(*args: Any, **options: Any) -> Sentences:
    """Sentences in which the mask token is no word."""
    data = Sentences(*args, **options)
    for row in data.rows:
        row["input_ids"][row["input_ids"] == MASK] = 8
    return data


def by_position(row: Sequence[float], maskable: Sequence[int]) -> list[int]:
    """A fifth of the tokens that may be masked, those with the largest numbers first."""
    count = 0 if len(maskable) < 2 else max(1, int(0.2 * len(maskable) + 0.5))
    return sorted(maskable, key=lambda place: (-row[place], place))[:count]


def alone(
    model: nn.Module, ids: Tensor, method: str, hide: Callable[[Tensor, list[int]], Row], special: set[int]
) -> Row:
    """The figures of one text, run by itself: every copy is made by hand.

    Args:
        model: gives ``logits``.
        ids: (k,) the text.
        method: the method.
        hide: makes the inputs (1, k) of a copy without some tokens.
        special: the places that are never masked.
    """

    def score(hidden: list[int]) -> float:
        with torch.no_grad():
            return float(model(**hide(ids, hidden)).logits[0].double().softmax(0)[decided])

    with torch.no_grad():
        decided = int(model(**hide(ids, [])).logits.argmax())
    row = attribute(model, hide(ids, []), methods=(method,)).rows[method][0, -1].tolist()
    maskable = [place for place in range(len(ids)) if place not in special]
    first, drawn = by_position(row, maskable), by_position(random_row(ids.tolist()), maskable)
    full, nothing = score([]), score(maskable)
    span = full - nothing
    without, without_drawn = score(first), score(drawn)
    only, only_drawn = (score([one for one in maskable if one not in kept]) for kept in (first, drawn))
    counts = span >= 0.05
    if len(maskable) < 2:
        # There is nothing to choose.
        full = span = NAN
    return {
        "masked": torch.tensor([place in first for place in range(len(ids))]),
        "span": torch.tensor(span),
        "gain": torch.tensor(((full - without) - (full - without_drawn)) / span if counts else NAN),
        "sufficiency_gain": torch.tensor(((full - only_drawn) - (full - only)) / span if counts else NAN),
        "log_odds": torch.tensor(odds(full) - odds(without)),
    }


def odds(probability: float) -> float:
    kept = min(max(probability, 1e-6), 1 - 1e-6)
    return math.log(kept / (1 - kept)) if probability == probability else NAN


def by_mask_token(ids: Tensor, hidden: list[int]) -> Row:
    copied = ids.clone()
    copied[hidden] = MASK
    return {"input_ids": copied.unsqueeze(0), "attention_mask": torch.ones(1, len(ids)).long()}


def by_attention(ids: Tensor, hidden: list[int]) -> Row:
    mask = torch.ones(1, len(ids)).long()
    mask[0, hidden] = 0
    return {"input_ids": ids.unsqueeze(0), "attention_mask": mask}


class MeanPooled(nn.Module):
    """Reads the mean of the real tokens, wherever the padding is; its head asks the batch's own mask, not a copy's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = sharp()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        of_encoder: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        told = attention_mask if of_encoder is None else of_encoder
        hidden = self.model.bert(input_ids, told, position_ids=position_ids).last_hidden_state
        weights = attention_mask.unsqueeze(2).float()
        return SequenceClassifierOutput(logits=self.model.classifier((hidden * weights).sum(1) / weights.sum(1)))


def by_attention_of_encoder(ids: Tensor, hidden: list[int]) -> Row:
    copied = by_attention(ids, hidden)
    return {**copied, "attention_mask": torch.ones_like(copied["input_ids"]), "of_encoder": copied["attention_mask"]}


def ends(ids: Tensor) -> set[int]:
    return {0, len(ids) - 1}


def assert_equal(found: Faithfulness, model: nn.Module, texts: Sequence[Tensor], hide: Any) -> None:
    """Every figure of every example is that of its text alone."""
    assert found.gain.keys() == set(METHODS)
    for method in METHODS:
        for index, ids in enumerate(texts):
            expected = alone(model, ids, method, hide, ends(ids))
            assert torch.equal(found.masked[method][index], expected["masked"])
            values = {"span": found.span, **{name: getattr(found, name)[method] for name in BY_METHOD}}
            for name, value in values.items():
                wanted = expected[name].float()
                torch.testing.assert_close(value[index], wanted, rtol=1e-3, atol=1e-4, equal_nan=True)


def texts_of(probe: ProbeSet) -> list[Tensor]:
    return [row["input_ids"] for row in probe.rows]


def sharp(seed: int = 3) -> Any:
    """A classifier whose probabilities move when tokens are masked."""
    return redrawn(classifier().eval(), seed)


def faithfulness_of(model: nn.Module, probe: ProbeSet, **options: Any) -> Faithfulness:
    found = measure(Reader(model, **options), probe, Settings(METHODS), masked=METHODS)
    assert found.unmasked == ""
    assert found.faithfulness is not None
    return found.faithfulness


@pytest.mark.parametrize("max_tokens", [4096, 25], ids=["one batch", "several batches"])
@pytest.mark.parametrize("left", [False, True], ids=["padding behind", "padding before"])
@pytest.mark.parametrize("masked_by", ["mask token", "attention mask"])
def test_every_example_has_the_figures_of_its_text_alone(masked_by: str, left: bool, max_tokens: int) -> None:
    model, batch = MeanPooled().eval() if left else sharp(), without_masks(40, longest=14, seed=2).first(40)
    by_mask = by_attention
    if left:
        by_mask = by_attention_of_encoder
        for row in range(40):
            turn = 14 - int(batch["attention_mask"][row].sum())
            for name in ("input_ids", "attention_mask"):
                batch[name][row] = batch[name][row].roll(turn)
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    words = tokenizer(mask=True) if masked_by == "mask token" else None
    probe = ProbeSet.from_batch(batch, tokenizer=words)
    found = faithfulness_of(model, probe, max_tokens=max_tokens)
    assert (found.masking, found.unit, found.passes) == (masked_by, "probability", 7)
    texts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert_equal(found, model, texts, by_mask_token if words else by_mask)
    assert int((~found.gain["N-Enc"].isnan()).sum()) > 3


def test_the_order_of_a_probe_changes_nothing() -> None:
    model, batch = sharp(), Sentences(8, seed=3).first(8)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    one, other = (
        faithfulness_of(model, ProbeSet.from_batch({name: value[chosen] for name, value in batch.items()}))
        for chosen in (torch.arange(8), order)
    )
    for method in METHODS:
        torch.testing.assert_close(one.gain[method][order], other.gain[method], equal_nan=True, rtol=1e-3, atol=1e-4)
        assert all(
            torch.equal(one.masked[method][index], tokens)
            for index, tokens in zip(order.tolist(), other.masked[method], strict=True)
        )


@pytest.mark.parametrize("masked_by", ["mask token", "attention mask"])
def test_in_a_training_they_are_those_of_its_weights(masked_by: str) -> None:
    words = tokenizer(mask=True) if masked_by == "mask token" else None
    callback = GlobEncCallback(methods=METHODS, faithfulness=True, num_examples=7, tokenizer=words)
    module = Steps(sharp().train())
    fit(module, callback, max_epochs=2, val=loader(without_masks()))
    entry = callback.history[-1]
    assert entry.faithfulness is not None
    assert entry.faithfulness.masking == masked_by
    texts = [torch.tensor(without_masks().ids(index)) for index in range(7)]
    assert_equal(entry.faithfulness, module.model.eval(), texts, by_mask_token if words else by_attention)
    assert callback.history.reasons == []
    assert callback.history.about is not None
    assert callback.history.about.faithfulness == METHODS


# ---- a model that is known


class Searches(nn.Module):
    """Says whether one word is in a text, by an encoder whose attention is the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.model = classifier(num_hidden_layers=1).eval()
        layer = self.model.bert.encoder.layer[0]
        with torch.no_grad():
            for part in (layer.attention.self.query, layer.attention.self.key):
                part.weight.zero_()
                part.bias.zero_()
            for part in (layer.attention.self.value, layer.attention.output.dense):
                part.weight.copy_(torch.eye(16) * 3)
                part.bias.zero_()
            # Nothing but what makes out the word is handed on.
            layer.attention.self.value.weight[1:] = 0
            layer.output.dense.weight.zero_()
            table = self.model.bert.embeddings.word_embeddings.weight
            table[:, 0] = 0.0
            table[WORD] = 0.0
            table[WORD, 0] = 30.0
            batch = searched()
            without = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == WORD, MASK)}
            least, most = float(self.found(**batch).min()), float(self.found(**without).max())
        assert least > most
        self.threshold, self.scale = (least + most) / 2, 20 / (least - most)

    def found(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden[:, 0, 0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logit = self.scale * (self.found(input_ids, attention_mask) - self.threshold)
        return torch.stack([-logit, logit], 1)


WORD = 50


def searched(count: int = 60, words: int = 10) -> Row:
    """Texts of ten words, one of which decides."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 49, (count, words + 2), generator=draw)
    for row in ids:
        row[1 + int(torch.randint(words, (1,), generator=draw))] = WORD
    ids[:, 0], ids[:, -1] = CLS, SEP
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_method_that_knows_the_answer_gains_and_one_that_turns_it_around_loses() -> None:
    batch, explained = searched(), list[Explained]()
    found = analyze(Reader(Searches().eval()), batch, Settings(("N-Enc",)), explained=explained)
    knows = (batch["input_ids"] == WORD).float()
    drawn = torch.stack([torch.tensor(random_row(ids)) for ids in batch["input_ids"].tolist()])
    rows = {
        "knows": knows,
        "inverse": -knows,
        "as drawn": drawn,
        "drawn anew": torch.rand(knows.shape, generator=torch.Generator().manual_seed(1)),
        "N-Enc": found.rows["N-Enc"][:, -1],
    }
    special = torch.tensor([place in (0, 11) for place in range(12)])
    masked = masked_again(explained[0], rows, batch["attention_mask"].bool(), [special] * 60, MASK)
    assert masked.passes == 3 + 2 * 5
    assert bool((masked.span > 0.95).all())
    gain, sufficiency = (
        {method: float(one[place].nanmean()) for method, one in masked.gains.items()} for place in (0, 1)
    )
    # How often two random words of ten are the one that decides: in a fifth of the texts, about.
    chance = float((masked.tokens["as drawn"] & (knows > 0)).any(1).double().mean())
    assert 0.1 < chance < 0.3
    for one in (gain, sufficiency):
        assert one["as drawn"] == 0
        assert abs(one["drawn anew"]) < 0.15
        assert one["knows"] == pytest.approx(1 - chance, abs=0.02)
        assert one["N-Enc"] == pytest.approx(one["knows"], abs=1e-6)
        assert one["inverse"] == pytest.approx(-chance, abs=0.02)


# ---- passes


class Counts:
    """Counts calls of an encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        self.calls = 0
        self.with_gradients = 0
        encoder.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1
        self.with_gradients += torch.is_grad_enabled()


@pytest.mark.parametrize(("methods", "passes"), [(("N-Enc",), 5), (("N-Enc", "W"), 7), (("N", "W", "N-Res"), 9)])
@pytest.mark.parametrize("batches", [1, 3])
def test_so_many_forward_passes_per_batch_are_made(methods: tuple[str, ...], passes: int, batches: int) -> None:
    model = classifier().eval()
    probe = ProbeSet.from_batch(Sentences(6, shortest=8, longest=8, width=8).first(6))
    counts, reader, calls = Counts(model.bert), Reader(model, max_tokens=6 * 8 // batches), []
    for masked in ((), (), methods, methods, ()):
        counts.calls = 0
        with_gradients = counts.with_gradients
        found = measure(reader, probe, Settings(methods), masked=masked)
        assert counts.with_gradients - with_gradients == batches or not calls
        assert (found.faithfulness.passes if found.faithfulness else 0) == (passes if masked else 0)
        calls.append(counts.calls)
    # The first analysis finds the structure, too.
    assert calls[1:] == [batches, batches * (1 + passes), batches * (1 + passes), batches]


@pytest.mark.parametrize("every", [1, 2])
def test_in_a_training_as_many_passes_are_made_and_none_where_nobody_asks(every: int) -> None:
    calls = {}
    for name, options in {"off": {}, "on": {"faithfulness": ["N-Enc"], "faithfulness_every_n": every}}.items():
        module = Steps()
        counts = Counts(module.model.bert)
        callback = GlobEncCallback(methods=METHODS, num_examples=8, **options)
        fit(module, callback, max_epochs=4)
        calls[name] = counts.calls
        masked = [entry.faithfulness is not None for entry in callback.history]
        # The model before the first step, and every validation.
        assert masked == ([False] * 5 if name == "off" else [True, *(place % every == 0 for place in range(4))])
    assert calls["on"] - calls["off"] == 5 * (5 if every == 1 else 3)


# ---- what can be masked, and what cannot


def reason_of(callback: GlobEncCallback) -> str:
    (found,) = [text for _, text in callback.history.reasons]
    return found


class Embeds(Steps):
    """Calls its encoder with embeddings of its own."""

    def loss_of(self, batch: Any) -> Tensor:
        embeddings = self.model.bert.embeddings.word_embeddings(batch["input_ids"]) * 1.1
        loss: Tensor = self.model(
            inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
        return loss


class OneLoss(Steps):
    """Tells one number of all examples."""

    def loss_of(self, batch: Any) -> Tensor:
        hidden = self.model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
        loss: Tensor = self.model.classifier(hidden).square().mean()
        return loss


class FailsAtMasks(Steps):
    """Its model cannot do with the mask token."""

    def __init__(self) -> None:
        super().__init__()
        self.model.bert.embeddings.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if bool((kwargs["input_ids"] == MASK).any()):
            raise ArithmeticError("no masks here")


@pytest.mark.parametrize(
    ("make", "expected"),
    [(Embeds, "given no token ids"), (OneLoss, "one loss of all of them"), (FailsAtMasks, "no masks here")],
)
def test_what_cannot_be_masked_is_said_once_and_loses_no_other_figure(make: Any, expected: str) -> None:
    histories = []
    for asks in (True, False):
        torch.manual_seed(3)
        data = without_masks()
        callback = GlobEncCallback(faithfulness=asks, num_examples=6, tokenizer=tokenizer(mask=True))
        with said() as messages:
            fit(make(), callback, max_epochs=3, val=loader(data), train=loader(data))
        histories.append(callback.history)
        assert [entry.faithfulness for entry in callback.history] == [None] * 4
        told = [text for text in messages if "faithfulness" in text]
        assert len(told) == asks
        if asks:
            assert expected in told[0]
            assert expected in reason_of(callback)
        else:
            assert callback.history.reasons == []
    for one, other in zip(*histories, strict=True):
        assert torch.equal(one.rho, other.rho)
        assert torch.equal(one.score, other.score)
        assert one.step == other.step


def test_a_batch_that_fails_leaves_out_its_examples_alone() -> None:
    model = sharp()

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        if int((kwargs["input_ids"] != PAD).sum()) > 8 and not torch.is_grad_enabled():
            raise ArithmeticError("too long")

    batch = Sentences(6, seed=2).first(6)
    model.bert.embeddings.register_forward_pre_hook(look, with_kwargs=True)
    found = measure(Reader(model, max_tokens=1), ProbeSet.from_batch(batch), Settings(METHODS), masked=METHODS)
    assert "too long" in found.unmasked
    assert found.faithfulness is not None
    long = batch["attention_mask"].sum(1) > 8
    assert 0 < int(long.sum()) < 6
    # Three tokens have but one that may be masked.
    assert torch.equal(found.faithfulness.span.isnan(), long | (batch["attention_mask"].sum(1) < 4))
    assert not found.score.isnan().any()


def test_where_the_memory_does_not_suffice_batches_are_smaller() -> None:
    model = sharp()

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 2 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")

    probe = ProbeSet.from_batch(Sentences(6, shortest=8, longest=8, width=8, seed=2).first(6))
    expected = faithfulness_of(model, probe)
    model.bert.embeddings.register_forward_pre_hook(look, with_kwargs=True)
    reader = Reader(model, max_tokens=48)
    found = measure(reader, probe, Settings(METHODS), masked=METHODS)
    assert found.unmasked == ""
    assert reader.max_tokens == 12
    assert found.faithfulness is not None
    torch.testing.assert_close(found.faithfulness.span, expected.span)


def test_memory_that_does_not_suffice_for_one_example_loses_no_other_figure() -> None:
    model = sharp()

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.bert.embeddings.register_forward_pre_hook(look, with_kwargs=True)
    reader, probe = Reader(model, max_tokens=16, whole=True), ProbeSet.from_batch(Sentences(2).first(2))
    measure(reader, probe, Settings(METHODS))
    found = measure(reader, probe, Settings(METHODS), masked=METHODS)
    assert "out of memory" in found.unmasked
    assert found.faithfulness is None
    assert not found.score.isnan().any()


def test_without_a_tokenizer_the_first_and_the_last_token_stay() -> None:
    real = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    ids = torch.arange(20).view(4, 5)
    assert maskable_tokens(real, ids, [None] * 4, None).nonzero().tolist() == [[0, 2], [0, 3]]


def test_special_tokens_and_tokens_that_are_masked_already_stay() -> None:
    real = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    ids = torch.tensor([[9, 9, 5, 6, 7], [1, 2, 3, 9, 5]])
    special = [torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 0, 0, 0])]
    assert maskable_tokens(real, ids, special, 9).nonzero().tolist() == [[0, 2], [0, 4], [1, 0], [1, 1], [1, 2], [1, 4]]


def test_a_mask_token_that_the_encoder_does_not_know_is_none() -> None:
    model, words = sharp(), tokenizer(mask=True)
    words.add_special_tokens({"mask_token": "[another]"})
    assert words.mask_token_id == 60
    found = faithfulness_of(model, ProbeSet.from_batch(Sentences(4).first(4), tokenizer=words))
    assert found.masking == "attention mask"


# ---- over a training


class Still(Steps):
    """Learns nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_random_tokens_of_an_example_are_the_same_at_each_validation() -> None:
    callback = GlobEncCallback(Sentences(6).first(6), faithfulness=True, at_steps=[1])
    fit(Still(sharp()), callback, max_epochs=3, val=loader(Sentences(), shuffle=True))
    spans = [entry.faithfulness for entry in callback.history]
    assert len(spans) == 5
    assert any(not entry.validation for entry in callback.history)
    assert int((~spans[0].gain["N-Enc"].isnan()).sum()) >= 2
    for one in spans:
        assert torch.equal(one.gain["N-Enc"].nan_to_num(), spans[0].gain["N-Enc"].nan_to_num())
        assert torch.equal(one.sufficiency_gain["N-Enc"].nan_to_num(), spans[0].sufficiency_gain["N-Enc"].nan_to_num())


def test_steps_between_validations_are_left_out_where_not_every_validation_is_asked_for() -> None:
    callback = GlobEncCallback(Sentences(6).first(6), faithfulness=True, faithfulness_every_n=2, at_steps=[1])
    fit(Steps(), callback, max_epochs=3)
    found = [(entry.validation, entry.faithfulness is not None) for entry in callback.history]
    assert found == [(True, True), (False, False), (True, True), (True, False), (True, True)]


def test_a_resumed_training_goes_on_counting(tmp_path: Any) -> None:
    whole = GlobEncCallback(faithfulness=True, faithfulness_every_n=2, num_examples=4)
    fit(Steps(), whole, max_epochs=4)
    first = GlobEncCallback(faithfulness=True, faithfulness_every_n=2, num_examples=4)
    trainer = fit(Steps(), first, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = GlobEncCallback(faithfulness=True, faithfulness_every_n=2, num_examples=4)
    again = build_trainer([resumed], max_epochs=4)
    again.fit(Steps(), loader(Sentences(16, seed=1)), loader(Sentences()), ckpt_path=tmp_path / "last.ckpt")
    masked = [entry.faithfulness is not None for entry in resumed.history]
    assert masked == [entry.faithfulness is not None for entry in whole.history] == [True, True, False, True, False]
    kept, own = resumed.history[0].faithfulness, first.history[0].faithfulness
    assert kept is not None
    assert own is not None
    assert_same(kept, own)


def assert_same(one: Faithfulness, other: Faithfulness) -> None:
    left, right = vars(one), vars(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if name == "masked":
            for method, tokens in value.items():
                assert all(torch.equal(a, b) for a, b in zip(tokens, right[name][method], strict=True))
        elif isinstance(value, dict):
            assert value.keys() == right[name].keys()
            assert all(torch.equal(value[method].nan_to_num(), right[name][method].nan_to_num()) for method in value)
        elif isinstance(value, Tensor):
            assert torch.equal(value, right[name])
        else:
            assert value == right[name]


# ---- the figures themselves


def figures(size: int = 5, seed: int = 0, value: bool = False) -> Faithfulness:
    draw = torch.Generator().manual_seed(seed)

    def some() -> dict[str, Tensor]:
        return {method: torch.randn(size, generator=draw) for method in METHODS}

    masked = {method: [torch.rand(3 + index, generator=draw) > 0.5 for index in range(size)] for method in METHODS}
    unit = "value" if value else "probability"
    return Faithfulness(some(), some(), {} if value else some(), torch.randn(size, generator=draw), masked, unit)


@pytest.mark.parametrize("value", [True, False])
def test_they_travel_in_few_tensors(value: bool) -> None:
    own = figures(value=value)
    state = own.state_dict()
    assert (
        sum(
            isinstance(one, Tensor)
            for part in state.values()
            for one in (part.values() if isinstance(part, dict) else [part])
        )
        <= 10
    )
    assert_same(Faithfulness.from_state_dict(copy.deepcopy(state)), own)
    without = Faithfulness.from_state_dict({**vars(own), "masked": {}})
    assert_same(Faithfulness.from_state_dict(without.state_dict()), without)


def test_shares_of_processes_are_put_together() -> None:
    one, other = figures(seed=1), figures(seed=2)
    both = put_together([((0, 2, 4), one), ((1, 3), other)])
    assert both is not None
    for index in range(5):
        source = one if index % 2 == 0 else other
        for method in METHODS:
            assert float(both.gain[method][index]) == float(source.gain[method][index])
            assert float(both.log_odds[method][index]) == float(source.log_odds[method][index])
            assert torch.equal(both.masked[method][index], source.masked[method][index])
        assert float(both.span[index]) == float(source.span[index])
    half = put_together([((0, 2, 4), one), ((1, 3), None)])
    assert half is not None
    assert half.gain["W"].isnan().tolist() == [False, True, False, True, False]
    assert put_together([((0,), None)]) is None


def test_the_first_examples_alone() -> None:
    own = figures()
    found = own.first(2)
    assert torch.equal(found.gain["W"], own.gain["W"][:2])
    assert len(found.masked["W"]) == len(found.span) == len(found.log_odds["N-Enc"]) == 2
