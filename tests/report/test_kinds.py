"""What the pictures, the page and the tab's records show of a real training of every kind of decision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from globenc_lightning.measurement import History
from globenc_lightning.report import page
from globenc_lightning.report.canvas import MARK, OTHER_HATCH
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.images import timeline, told_apart
from globenc_lightning.report.verdicts import MARKS
from globenc_lightning.task.kinds import VALUES
from globenc_lightning.tokenizers import naming
from tests.report.kinds import ENTITIES, KINDS, SENTIMENTS, TOPICS, batch_of, train
from tests.training import events, tokenizer

NEW_IN_ENTRIES = ("score", "position", "answers", "probability", "texts")
NEW_IN_ABOUT = ("task", "score", "call", "truths", "text")


class Shown:
    """A training, and what it wrote."""

    def __init__(self, kind: str, folder: Path) -> None:
        logger = TensorBoardLogger(str(folder), name=None, version="run")
        self.callback = train(kind, logger, heatmap_examples=2)
        self.history = self.callback.history
        self.events = events(logger.log_dir)
        self.summaries = [self.summary(ordinal) for ordinal in range(len(self.history))]

    def summary(self, ordinal: int) -> store.Summary:
        data = self.events.Tensors(store.tag("globenc", "summary", ordinal))[-1].tensor_proto.string_val[0]
        found = store.summary_from_bytes(data)
        assert isinstance(found, store.Summary)
        return found

    def has_colour(self, tag: str, colour: tuple[int, int, int]) -> bool:
        from io import BytesIO

        from PIL import Image

        image = self.events.Images(tag)[-1].encoded_image_string
        pixels = np.asarray(Image.open(BytesIO(image)).convert("RGB"))
        return bool((pixels == np.array(colour)).all(-1).any())


@pytest.fixture(scope="module")
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    return Shown(request.param, tmp_path_factory.mktemp("kind"))


def task_of(kind: str) -> str:
    return "similarity" if kind == "cosine" else kind


def by_kind(*kinds: str) -> Any:
    return pytest.mark.parametrize("shown", kinds, indirect=True, scope="module")


@by_kind(*KINDS)
def test_each_kind_is_shown_as_what_it_is(shown: Shown, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["shown"]
    task = task_of(kind)
    about, newest = shown.history.about, shown.summaries[-1]
    assert about is not None
    assert shown.history.reasons == []
    assert about.task == newest.words["task"] == task
    assert newest.words["score"].endswith(about.score)
    assert len(newest.decided) == 6
    truths = [one.truth for one in newest.decided]
    assert list(about.truths) == truths
    assert all(truths) is (task != "similarity")
    for one in newest.decided:
        assert (one.right is None) == (task in VALUES) or task == "multi-label"
        assert (one.chance is None) == (task in (*VALUES, "multi-label"))
        assert one.chance_name == ("" if one.chance is None else "sigmoid" if task == "binary" else "softmax")
    text = page.markdown(about)
    assert f"| decision | {task} |" in text
    assert "predicted class" not in text
    # The words say what was decided; the marks say where.
    assert newest.words["marked"] == MARKS.get(task, "")
    if task in ("token classification", "masked token", "next token"):
        position = [entry.position for entry in shown.history][-1]
        assert [one.marked for one in newest.decided] == [(place,) for place in position]
        for tag in ("heatmap/layers", "heatmap/last_layer", "filmstrip"):
            assert shown.has_colour(f"globenc/{tag}/example_00", MARK)
    elif task != "span":
        assert not any(one.marked for one in newest.decided)
        assert not shown.has_colour("globenc/heatmap/layers/example_00", MARK)
    # Stills are drawn from the history alone.
    for example in range(6):
        shown.history.save_sentence(Path(shown.events.path) / "still.svg", example)


@by_kind("classification", "multi-label", "token classification")
def test_classes_go_by_their_names(shown: Shown, request: pytest.FixtureRequest) -> None:
    names = {"classification": SENTIMENTS, "multi-label": TOPICS, "token classification": ENTITIES}
    known = names[request.node.callspec.params["shown"]]
    for one in shown.summaries[-1].decided:
        assert any(name in one.answer for name in known) or one.answer == "no label"
        assert any(name in one.truth for name in known)


@by_kind("masked token", "next token", "text to text")
def test_tokens_go_by_their_text(shown: Shown) -> None:
    name = tokenizer().convert_ids_to_tokens
    for one, answer in zip(shown.summaries[-1].decided, shown.history[-1].answers, strict=True):
        text = name(answer[0])
        assert one.answer == f"“{text}”" or not text.isascii() or not text.isprintable()


@by_kind("span")
def test_a_span_is_the_text_between_its_ends(shown: Shown) -> None:
    batch = batch_of("span")
    about, newest = shown.history.about, shown.summaries[-1]
    assert about is not None
    for index, one in enumerate(newest.decided):
        start, end = int(batch["start_positions"][index]), int(batch["end_positions"][index])
        text = " ".join(newest.sentences[index].tokens[start : end + 1])
        assert one.truth == f"“{text}”, tokens {start + 1} to {end + 1}"
        first, last = shown.history[-1].answers[index]
        inside = 0 <= first <= last < len(newest.sentences[index].tokens)
        assert one.marked == (tuple(range(first, last + 1)) if inside else ())
        assert ("token" in one.answer and one.answer.startswith("“")) is inside


@by_kind("choice")
def test_another_choice_is_another_text(shown: Shown) -> None:
    """Rows of it are hatched, whether its number of tokens differs or not."""
    history = shown.history
    answers = [[one[0] for one in entry.answers] for entry in history]
    changed = [example for example in range(6) if len({one[example] for one in answers}) > 1]
    assert changed, "no example's choice changed: the test shows nothing"
    for example in range(6):
        others, _ = told_apart(history, [], "choice", example)
        assert others == [row for row, one in enumerate(answers) if one[example] != answers[-1][example]]
        rows, _ = timeline(history, [], "N-Enc", example)
        assert rows.shape == (len(history), len(history[-1].saliency[example]))
        for summary, answer in zip(shown.summaries, answers, strict=True):
            ids = batch_of("choice")["input_ids"][example, answer[example]]
            own = [int(one) for one in ids if one]
            assert list(summary.sentences[example].tokens) == naming(tokenizer())(own)
    for example in range(2):
        others, _ = told_apart(history, [], "choice", example)
        assert shown.has_colour(f"globenc/filmstrip/example_{example:02d}", OTHER_HATCH) is bool(others)


@by_kind("similarity", "cosine")
def test_both_texts_of_a_pair_go_by_their_names(shown: Shown) -> None:
    about, newest = shown.history.about, shown.summaries[-1]
    assert about is not None
    assert about.text == newest.words["text"] == "text 1 of 2, query"
    ids = batch_of("similarity")["passage_input_ids"]
    for one, row in zip(newest.decided, ids, strict=True):
        ((name, text),) = one.others
        assert name == "passage"
        assert text.split() == tokenizer().convert_ids_to_tokens([int(token) for token in row if token])


def test_the_other_text_of_a_pair_can_be_shown(tmp_path: Path) -> None:
    history = train("cosine", encoder_call=1).history
    assert history.about is not None
    assert history.about.text == "text 2 of 2, passage"


def test_one_logit_is_shown_by_the_sigmoid_of_its_class() -> None:
    callback = train("binary", epochs=1)
    newest = callback.history[-1]
    assert torch.allclose(newest.probability, torch.sigmoid(newest.score))
    assert [one for (one,) in newest.answers] == (newest.score > 0).long().tolist()


def test_a_value_is_shown_with_its_target(tmp_path: Path) -> None:
    shown = Shown("regression", tmp_path)
    targets = batch_of("regression")["labels"].tolist()
    for one, score, target in zip(shown.summaries[-1].decided, shown.history[-1].score, targets, strict=True):
        assert (one.name, one.truth_name) == ("value", "target")
        assert float(one.answer.replace("−", "-")) == pytest.approx(float(score), abs=6e-4)
        assert float(one.truth.replace("−", "-")) == pytest.approx(target, abs=6e-4)


def test_a_similarity_is_that_of_the_two_texts(tmp_path: Path) -> None:
    shown = Shown("cosine", tmp_path)
    for one in shown.summaries[-1].decided:
        assert one.name == "similarity"
        assert -1 <= float(one.answer.replace("−", "-")) <= 1


@by_kind("classification", "token classification", "choice")
def test_a_checkpoint_of_an_earlier_version_is_still_drawn(shown: Shown, tmp_path: Path) -> None:
    state = shown.history.state_dict()
    for entry in state["history"]:
        for name in NEW_IN_ENTRIES:
            del entry[name]
    for name in NEW_IN_ABOUT:
        del state["about"][name]
    old = History.from_state_dict(state)
    assert old.about is not None
    assert (old.about.task, old.about.truths) == ("classification", ())
    for example in range(6):
        assert old.save_sentence(tmp_path / "old.svg", example).exists()
    old.save_correlation(tmp_path / "old.svg")
    assert "input of the predicted class" in page.markdown(old.about)
    # And one that goes on has entries of both.
    both = History([*old, *shown.history], shown.history.about)
    for example in range(6):
        assert both.save_sentence(tmp_path / "both.svg", example).exists()


@by_kind("span", "choice", "similarity")
def test_a_checkpoint_keeps_what_is_shown(shown: Shown) -> None:
    back = History.from_state_dict(shown.history.state_dict())
    assert back.about == shown.history.about
    for one, other in zip(back, shown.history, strict=True):
        assert (one.answers, one.texts, one.position) == (other.answers, other.texts, other.position)
        torch.testing.assert_close(one.probability, other.probability, equal_nan=True)


@by_kind("token classification")
def test_records_of_an_earlier_version_are_still_read(shown: Shown) -> None:
    newest = shown.summaries[-1]
    old = store.summary_from_bytes(store.to_bytes(replace(newest, decided=(), words={})))
    assert isinstance(old, store.Summary)
    assert (old.decided, old.words) == ((), {})
    assert old.sentences == newest.sentences


@by_kind("token classification", "masked token", "next token")
def test_the_token_that_is_marked_is_the_one_that_was_decided(shown: Shown, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["shown"]
    lengths = batch_of(kind)["attention_mask"].sum(1).tolist()
    # The labels of these examples were put there; a text's last label is predicted at the token before its last.
    expected = {
        "token classification": [4] * 6,
        "masked token": [2 + place % 4 for place in range(6)],
        "next token": [length - 2 for length in lengths],
    }[kind]
    for entry, summary in zip(shown.history, shown.summaries, strict=True):
        assert entry.position == expected
        assert [one.marked for one in summary.decided] == [(place,) for place in expected]
        for one, sentence, place in zip(summary.decided, summary.sentences, expected, strict=True):
            assert f"token {place + 1} " in one.where
            assert len(sentence.tokens) > place
