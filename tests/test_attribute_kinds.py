"""``attribute()`` tells what is decided from outputs' names and the labels in the inputs, with no step to watch.

Saliency and row are compared with gradient x input of the score and the rollout's row, computed here through the model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForTokenClassification,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForQuestionAnswering,
    ElectraForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMultipleChoice,
    T5Config,
    T5ForConditionalGeneration,
)

from globenc_lightning import ProbeSet, attribute
from globenc_lightning.analysis import Reader
from globenc_lightning.errors import ModelCallError, ProbeError
from globenc_lightning.measurement import measure
from globenc_lightning.settings import Settings
from tests import models

LENGTHS = (9, 5, 12, 3)
SIZES = models._SIZES
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": 3}
CAUSAL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

Score = Callable[[Any, Mapping[str, Any], int], Tensor]


def made(kind: type, config: Any) -> Any:
    model = kind(config).double().eval()
    models.redraw(model)
    return model


def inputs(**extra: Any) -> dict[str, Any]:
    return {**models.batch(LENGTHS), **extra}


def expected(model: Any, given: Mapping[str, Any], score: Score) -> tuple[Tensor, Tensor]:
    """The scores (b,), and the saliency (rows, s) through the model's own forward."""
    seen: list[Tensor] = []
    whole = model.config.is_encoder_decoder
    named = dict(model.named_modules())
    place = named["encoder.embed_tokens" if whole else next(name for name in named if name.endswith("embeddings"))]
    handle = place.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(**given)
    handle.remove()
    size = len(given["input_ids"])
    scores = torch.stack([score(output, given, place) for place in range(size)])
    (gradient,) = torch.autograd.grad(scores.sum(), seen[0])
    saliency = (gradient * seen[0]).norm(dim=-1).detach()
    return scores.detach(), saliency.masked_fill(given["attention_mask"].view_as(saliency) == 0, 0.0)


def labels_per_token() -> Tensor:
    """Two of three labels are rare: each once in an example, at another place."""
    labels = torch.zeros(4, 12, dtype=torch.long)
    for example, place in enumerate((3, 1, 10, 2)):
        labels[example, place] = 1 + example % 2
    labels[:, 0] = -100
    return labels.masked_fill(models.batch(LENGTHS)["attention_mask"] == 0, -100)


TAGGED = (3, 1, 10, 2)

BY_TOKEN: dict[str, tuple[Callable[[], Any], Tensor, tuple[int, ...], str]] = {
    "bert tags": (
        lambda: made(BertForTokenClassification, BertConfig(**SIZES)),
        labels_per_token(),
        TAGGED,
        "token classification",
    ),
    "electra tags": (
        lambda: made(ElectraForTokenClassification, ElectraConfig(**SIZES, embedding_size=32)),
        labels_per_token(),
        TAGGED,
        "token classification",
    ),
    "distilbert tags": (
        lambda: made(DistilBertForTokenClassification, DistilBertConfig(**DISTIL)),
        labels_per_token(),
        TAGGED,
        "token classification",
    ),
    "bert masks": (
        lambda: made(BertForMaskedLM, BertConfig(**SIZES)),
        labels_per_token().masked_fill(labels_per_token() == 0, -100),
        TAGGED,
        "masked token",
    ),
    "electra masks": (
        lambda: made(ElectraForMaskedLM, ElectraConfig(**SIZES, embedding_size=32)),
        labels_per_token().masked_fill(labels_per_token() == 0, -100),
        TAGGED,
        "masked token",
    ),
    "distilbert masks": (
        lambda: made(DistilBertForMaskedLM, DistilBertConfig(**DISTIL)),
        labels_per_token().masked_fill(labels_per_token() == 0, -100),
        TAGGED,
        "masked token",
    ),
}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_one_token_of_each_example_is_decided(name: str) -> None:
    make, labels, places, task = BY_TOKEN[name]
    model, given = make(), inputs()
    found = attribute(model, {**given, "labels": labels})
    scores, saliency = expected(model, given, lambda output, _, place: output.logits[place, places[place]].max())
    assert found.task == task
    assert found.score is not None
    assert found.position is not None
    torch.testing.assert_close(found.score, scores)
    torch.testing.assert_close(found.saliency, saliency)
    assert found.position.tolist() == list(places)
    chosen = found.logits[torch.arange(4), list(places)]
    assert found.predicted.tolist() == chosen.argmax(1).tolist() == [one for (one,) in found.answers]
    assert found.truths == tuple((float(labels[example, place]),) for example, place in enumerate(places))
    rollout = found.rollout["N-Enc"]
    if name != "electra masks":
        torch.testing.assert_close(found.rows["N-Enc"], rollout[torch.arange(4), :, list(places)])
    by_label = attribute(model, {**given, "labels": labels}, target="label")
    assert by_label.score is not None
    torch.testing.assert_close(by_label.score, chosen.gather(1, torch.tensor(found.truths).long())[:, 0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_the_last_labelled_token_is_the_next_token(name: str) -> None:
    model = {
        "gpt2": lambda: made(GPT2LMHeadModel, GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)),
        "llama": lambda: made(LlamaForCausalLM, LlamaConfig(**CAUSAL, intermediate_size=48)),
        "qwen2": lambda: made(Qwen2ForCausalLM, Qwen2Config(**CAUSAL, num_key_value_heads=2, intermediate_size=48)),
    }[name]()
    given = inputs()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    found = attribute(model, {**given, "labels": labels})
    # The label of a token is decided at the token before it.
    places = [length - 2 for length in LENGTHS]
    assert found.task == "next token"
    assert found.score is not None
    assert found.position is not None
    assert found.position.tolist() == places
    logits = model(**given).logits[torch.arange(4), places].detach()
    torch.testing.assert_close(found.score, logits.amax(1))
    assert found.predicted.tolist() == logits.argmax(1).tolist()
    assert found.truths == tuple((float(labels[example, place + 1]),) for example, place in enumerate(places))
    torch.testing.assert_close(found.rows["N-Enc"], found.rollout["N-Enc"][torch.arange(4), :, places])


@pytest.mark.parametrize("holder", ["the model", "a module without forward", "a forward with keywords"])
def test_text_to_text_at_the_first_labelled_position(holder: str) -> None:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = made(T5ForConditionalGeneration, T5Config(vocab_size=99, **size))

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    class Keywords(Holder):
        def forward(self, **kwargs: Any) -> Any:
            return self.model(**kwargs)

    module = {"the model": lambda: model, "a module without forward": Holder}.get(holder, Keywords)()
    labels = torch.randint(5, 99, (4, 5), generator=torch.Generator().manual_seed(1))
    labels[1, 0] = -100
    given = inputs(labels=labels)
    found = attribute(module, given)
    first = (0, 1, 0, 0)
    scores, saliency = expected(model, given, lambda output, _, place: output.logits[place, first[place]].max())
    assert found.task == "text to text"
    assert found.score is not None
    torch.testing.assert_close(found.score, scores)
    torch.testing.assert_close(found.saliency, saliency)
    with pytest.raises(ModelCallError, match="raised ValueError" if "keywords" in holder else "decoder_input_ids"):
        attribute(module, inputs())


SPANS: dict[str, Callable[[], Any]] = {
    "bert": lambda: made(BertForQuestionAnswering, BertConfig(**{**SIZES, "num_labels": 2})),
    "electra": lambda: made(
        ElectraForQuestionAnswering, ElectraConfig(**{**SIZES, "num_labels": 2}, embedding_size=32)
    ),
    "distilbert": lambda: made(DistilBertForQuestionAnswering, DistilBertConfig(**{**DISTIL, "num_labels": 2})),
}


class Pair(nn.Module):
    """A forward that returns a span's logits as a tuple."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.base_model = model, model.config, model.base_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return output.start_logits, output.end_logits


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("labelled", [False, True])
def test_a_span(name: str, labelled: bool) -> None:
    model = SPANS[name]()
    labels = {"start_positions": torch.tensor([1, 2, 3, 0]), "end_positions": torch.tensor([4, 3, 9, 1])}
    given = inputs()
    found = attribute(model, {**given, **labels} if labelled else given)
    scores, saliency = expected(
        model, given, lambda output, _, place: output.start_logits[place].max() + output.end_logits[place].max()
    )
    assert found.task == "span"
    assert found.score is not None
    torch.testing.assert_close(found.score, scores)
    torch.testing.assert_close(found.saliency, saliency)
    starts, ends = (getattr(model(**given), one).argmax(1).tolist() for one in ("start_logits", "end_logits"))
    assert found.answers == tuple(zip(starts, ends, strict=True))
    assert found.truths == (((1, 4), (2, 3), (3, 9), (0, 1)) if labelled else ((),) * 4)
    if labelled:
        by_label = attribute(model, {**given, **labels}, target="label")
        output, place = model(**given), torch.arange(4)
        wanted = (
            output.start_logits[place, labels["start_positions"]] + output.end_logits[place, labels["end_positions"]]
        )
        assert by_label.score is not None
        torch.testing.assert_close(by_label.score, wanted.detach())
        assert torch.equal(attribute(Pair(model), {**given, **labels}).saliency, found.saliency)
    else:
        with pytest.raises(ProbeError, match="start_positions and end_positions"):
            attribute(model, given, target="label")


CHOICES: dict[str, Callable[[], Any]] = {
    "bert": lambda: made(BertForMultipleChoice, BertConfig(**SIZES)),
    "electra": lambda: made(ElectraForMultipleChoice, ElectraConfig(**SIZES, embedding_size=32)),
    "roberta": lambda: made(RobertaForMultipleChoice, RobertaConfig(**SIZES, pad_token_id=1)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_decided_from_their_own_texts(name: str) -> None:
    model = CHOICES[name]()
    texts = models.batch((9, 5, 12, 3, 7, 8), pad=1)
    given = {key: value.view(2, 3, 12) for key, value in texts.items()}
    label = torch.tensor([2, 0])
    logits = model(**given).logits.detach()
    for target, chosen in (
        ("predicted", logits.argmax(1)),
        ("label", label),
        (lambda y, b: y[:, 1], torch.ones(2).long()),
    ):
        found = attribute(model, {**given, "labels": label}, target=target)
        rows = torch.arange(2) * 3 + chosen
        _, saliency = expected(
            model, given, lambda output, _, place, chosen=chosen: output.logits[place, chosen[place]]
        )
        assert found.task == "choice"
        assert torch.equal(found.attention_mask, texts["attention_mask"][rows].bool())
        assert found.input_ids is not None
        assert torch.equal(found.input_ids, texts["input_ids"][rows])
        torch.testing.assert_close(found.saliency, saliency[rows])
        assert found.answers == tuple((int(one),) for one in logits.argmax(1))
        assert found.truths == ((2,), (0,))
    # A probe of choices, as a callback may be given one.
    measured = measure(Reader(model), ProbeSet.from_batch({**given, "labels": label}), Settings())
    assert measured.task == "choice"
    assert measured.predicted.tolist() == logits.argmax(1).tolist()


def classifier(classes: int, **config: Any) -> Any:
    return made(BertForSequenceClassification, BertConfig(**{**SIZES, "num_labels": classes}, **config))


@pytest.mark.parametrize(
    ("classes", "labels", "task", "truths"),
    [
        (1, None, "binary", ((),) * 4),
        (1, torch.tensor([0, 1, 1, 0]), "binary", ((0,), (1,), (1,), (0,))),
        (1, torch.tensor([[0.0], [1.0], [1.0], [0.0]]), "binary", ((0,), (1,), (1,), (0,))),
        (1, torch.tensor([0.5, -1.5, 2.0, 0.0]), "regression", ((0.5,), (-1.5,), (2.0,), (0.0,))),
        (1, torch.tensor([[0.5], [3.0], [2.0], [0.0]]), "regression", ((0.5,), (3.0,), (2.0,), (0.0,))),
        (3, torch.tensor([[0.0, 1, 1]] * 4), "multi-label", ((1, 2),) * 4),
        (3, torch.tensor([[1, 0, 0]] * 4), "multi-label", ((0,),) * 4),
        (3, torch.tensor([[0.2, 0.7, 0.1]] * 4), "classification", ((1,),) * 4),
        (3, torch.tensor([0, 1, 2, 0]), "classification", ((0,), (1,), (2,), (0,))),
        (3, None, "classification", ((),) * 4),
    ],
)
def test_one_vector_of_logits(classes: int, labels: Tensor | None, task: str, truths: Any) -> None:
    model = classifier(classes)
    found = attribute(model, inputs(**({} if labels is None else {"labels": labels})))
    logits = model(**inputs()).logits.detach()
    assert found.task == task
    assert found.truths == truths
    assert found.probability is not None
    if task == "binary":
        torch.testing.assert_close(found.probability, torch.sigmoid(logits[:, 0]).float())
        assert found.predicted.tolist() == (logits[:, 0] > 0).long().tolist()
    elif task == "regression":
        assert found.answers == ((),) * 4
        assert bool(found.probability.isnan().all())
    elif task == "multi-label":
        assert found.answers == tuple(tuple(one.nonzero().flatten().tolist()) for one in logits > 0)
    else:
        torch.testing.assert_close(found.probability, logits.softmax(1).amax(1).float())
    assert torch.equal(found.score, logits.amax(1)) or torch.allclose(found.score, logits.amax(1))


def test_a_head_that_is_configured_for_values_is_a_regression() -> None:
    zeros_and_ones = inputs(labels=torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert attribute(classifier(1, problem_type="regression"), zeros_and_ones).task == "regression"
    assert attribute(classifier(3, problem_type="multi_label_classification"), inputs()).task == "multi-label"


def test_several_values_need_a_target() -> None:
    given = inputs(labels=torch.tensor([[0.5, -1.5, 7.0]] * 4))
    with pytest.raises(ModelCallError, match=r"shape \(4, 3\).*target=lambda logits, batch: logits\[:, 0\]"):
        attribute(classifier(3), given)
    found = attribute(classifier(3), given, target=lambda logits, batch: logits[:, 0])
    torch.testing.assert_close(found.score, found.logits[:, 0])


def test_an_example_whose_labels_do_not_count() -> None:
    labels = labels_per_token()
    labels[1] = -100
    with pytest.raises(ProbeError, match=r"the examples \[1\] have no label that counts"):
        attribute(BY_TOKEN["bert tags"][0](), inputs(labels=labels))


# ---- probabilities are taken back to the logits that they were made of


class Squashed(nn.Module):
    def __init__(self, classes: int, squash: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.squash = classifier(classes), squash

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.squash(6 * self.model(input_ids=input_ids, attention_mask=attention_mask).logits)


@pytest.mark.parametrize("readout", ["auto", "mean"])
@pytest.mark.parametrize(
    ("classes", "squash", "task"),
    [
        (3, lambda y: y.softmax(-1), "classification"),
        (3, nn.Softmax(dim=1), "classification"),
        (3, lambda y: torch.log_softmax(y, -1), "classification"),
        (3, lambda y: {"loss": None, "logits": nn.functional.softmax(y, -1)}, "classification"),
        (3, lambda y: (y.sum(), y.softmax(-1)), "classification"),
        (3, lambda y: y.softmax(-1).clamp(min=1e-9).log(), "classification"),
        (1, torch.sigmoid, "binary"),
        (1, lambda y: y.squeeze(-1).sigmoid(), "binary"),
        (3, nn.Sigmoid(), "multi-label"),
    ],
)
def test_probabilities_are_those_of_the_logits(
    classes: int, squash: Callable[[Tensor], Any], task: str, readout: str
) -> None:
    plain, found = (
        attribute(Squashed(classes, one).eval(), inputs(), readout=readout) for one in (lambda y: y, squash)
    )
    assert found.task == task
    torch.testing.assert_close(found.logits, plain.logits)
    torch.testing.assert_close(found.saliency, plain.saliency)
    assert torch.equal(found.predicted, plain.predicted) or task == "multi-label"
    probability = torch.sigmoid(plain.logits).amax(1) if task != "classification" else plain.logits.softmax(1).amax(1)
    torch.testing.assert_close(found.probability, probability.float())
    # The next call knows it, too.
    module = Squashed(classes, squash).eval()
    for _ in range(2):
        torch.testing.assert_close(attribute(module, inputs(), readout=readout).saliency, plain.saliency)


def test_a_softmax_within_the_model_is_no_probability_of_it() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits * logits.softmax(-1)

    model = Gated().eval()
    torch.testing.assert_close(attribute(model, inputs()).logits, model(**inputs()).detach())


# ---- padding: cut off where nothing depends on it, else kept as it was given


class Head(nn.Module):
    def __init__(self, kind: str, width: int = 16) -> None:
        super().__init__()
        self.bert = models.build("bert", dtype=torch.float64).bert
        torch.manual_seed(4)
        self.kind, self.head = kind, nn.Linear(32 * width if kind == "flat" else 32, 3).double()
        self.lstm = nn.LSTM(32, 16, bidirectional=True, batch_first=True).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(2)
        pooled = {
            "flat": lambda: states.flatten(1),
            "max": lambda: states.amax(1),
            "mean": lambda: states.mean(1),
            "lstm": lambda: self.lstm(states)[0][:, -1],
            "last": lambda: states[:, -1],
            "share of the width": lambda: (states * mask).sum(1) / states.shape[1],
            "cls": lambda: states[:, 0],
            "masked mean": lambda: (states * mask).sum(1) / mask.sum(1),
        }[self.kind]()
        return self.head(pooled)


SENSITIVE = ("flat", "max", "mean", "lstm", "last", "share of the width")


def padded(left: bool = False) -> dict[str, Tensor]:
    given = models.batch((9, 4, 7), width=16)
    return {key: value.flip(1) for key, value in given.items()} if left else given


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", [*SENSITIVE, "cls", "masked mean"])
def test_the_logits_are_those_of_the_whole_batch(kind: str, left: bool) -> None:
    model, given = Head(kind).eval(), padded(left)
    own = model(**given).detach()
    for found in (attribute(model, given), attribute(model, given)):
        torch.testing.assert_close(found.logits, own)
    # BERT counts positions from the first column, so nothing can be cut off at the left.
    cut = kind not in SENSITIVE and not left
    assert found.attention_mask.shape[1] == (9 if cut else 16)
    probe = ProbeSet.from_batch(given)
    for max_tokens in (4096, 20):
        measured = measure(Reader(model, max_tokens=max_tokens), probe, Settings())
        torch.testing.assert_close(measured.score, own.amax(1).float())
        assert [len(one) for one in measured.saliency] == [9, 4, 7]


@pytest.mark.parametrize("max_tokens", [4096, 30])
def test_a_last_token_head_on_a_left_padded_probe(max_tokens: int) -> None:
    model = made(LlamaForCausalLM, LlamaConfig(**CAUSAL, intermediate_size=48))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = model.model
            torch.manual_seed(0)
            self.head = nn.Linear(32, 3).double()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.llama(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1])

    module, given = Last().eval(), padded(left=True)
    probe = ProbeSet.from_batch(given)
    measured = measure(Reader(module, max_tokens=max_tokens), probe, Settings())
    torch.testing.assert_close(measured.score, module(**given).detach().amax(1).float())
    assert measured.readout == "last"
    assert measured.names[1] == tuple(str(token) for token in given["input_ids"][1, -4:].tolist())


def test_a_target_that_reads_the_last_column_gets_the_whole_batch() -> None:
    model, given = BY_TOKEN["bert tags"][0](), padded()
    found = attribute(model, given, target=lambda logits, batch: logits[:, -1].amax(-1))
    assert found.score is not None
    torch.testing.assert_close(found.score, model(**given).logits[:, -1].amax(-1).detach())


def test_a_special_tokens_mask_is_cut_with_its_text() -> None:
    model, given = classifier(3), padded()
    special = torch.zeros_like(given["input_ids"])
    special[:, 0] = 1
    found = attribute(model, {**given, "special_tokens_mask": special}, exclude_special_tokens=True)
    short = {key: value[:, :9] for key, value in {**given, "special_tokens_mask": special}.items()}
    assert torch.equal(
        found.correlation["N-Enc"], attribute(model, short, exclude_special_tokens=True).correlation["N-Enc"]
    )
