import math
from typing import Any

import pytest

from globenc_lightning.report.verdicts import Verdict, marked, named_by, plain, verdict
from globenc_lightning.task.kinds import SCORES
from tests.training import tokenizer

TOKENS = ("[CLS]", "in", "##to", "Paris", "or", "Rome", "[SEP]")
NAMES = ("bad", "good", "great")


def words(number: int) -> str:
    return f"w{number}"


@pytest.mark.parametrize(
    ("task", "answer", "truth", "options", "line"),
    [
        ("classification", (2,), (1,), {"chances": (0.9,)}, "predicted class 2 (softmax 0.90), label 1: wrong"),
        (
            "classification",
            (1,),
            (1,),
            {"chances": (0.5,), "class_names": NAMES},
            "predicted good (softmax 0.50), label good: right",
        ),
        ("classification", (2,), (), {"chances": (0.9,)}, "predicted class 2 (softmax 0.90)"),
        ("classification", (2,), (-100,), {"chances": (0.9,)}, "predicted class 2 (softmax 0.90)"),
        ("classification", (5,), (7,), {"class_names": NAMES}, "predicted class 5, label class 7: wrong"),
        ("binary", (1,), (1,), {"chances": (0.8,)}, "predicted class 1 (sigmoid 0.80), label 1: right"),
        ("binary", (0,), (1,), {"chances": (0.2,)}, "predicted class 0 (sigmoid 0.80), label 1: wrong"),
        ("binary", (0,), (0,), {"chances": (0.2,)}, "predicted class 0 (sigmoid 0.80), label 0: right"),
        (
            "multi-label",
            (0, 2),
            (0, 2),
            {"chances": (0.6, 0.9)},
            "predicted labels 2 (sigmoid 0.90), 0 (sigmoid 0.60), labels 0, 2: right",
        ),
        (
            "multi-label",
            (0, 2),
            (2,),
            {"chances": (0.6, 0.9), "class_names": NAMES},
            "predicted great (sigmoid 0.90), bad (sigmoid 0.60), label great",
        ),
        ("multi-label", (1,), (2,), {"chances": (0.7,)}, "predicted label 1 (sigmoid 0.70), label 2: wrong"),
        ("multi-label", (), (2,), {}, "predicted no label, label 2: wrong"),
        ("multi-label", (), (), {}, "predicted no label"),
        (
            "multi-label",
            tuple(range(6)),
            tuple(range(7)),
            {"chances": (0.9,) * 6},
            "predicted labels 0 (sigmoid 0.90), 1 (sigmoid 0.90), 2 (sigmoid 0.90), 3 (sigmoid 0.90), 2 more, "
            "labels 0, 1, 2, 3, 3 more",
        ),
        ("regression", (), (0.5,), {"value": -0.25}, "value −0.250, target 0.500"),
        ("regression", (), (), {"value": 1234.5}, "value 1234"),
        ("regression", (), (-1.0,), {"value": 0.0}, "value 0.000, target −1.000"),
        ("similarity", (), (), {"value": 0.81}, "similarity 0.810"),
        ("similarity", (), (3,), {"value": 1.5, "distance": True}, "distance 1.500"),
        ("loss", (), (1,), {"value": 0.00012345}, "loss 0.0001234"),
        ("loss", (), (), {}, "loss undefined"),
        (
            "token classification",
            (1,),
            (0,),
            {"position": 3, "chances": (0.7,), "class_names": NAMES},
            "at token 4 “Paris”: predicted good (softmax 0.70), label bad: wrong",
        ),
        (
            "masked token",
            (5,),
            (5,),
            {"position": 1, "token_name": words, "chances": (0.1,)},
            "at token 2 “in”: predicted “w5” (softmax 0.10), label “w5”: right",
        ),
        ("masked token", (5,), (6,), {"position": None}, "predicted token 5, label token 6: wrong"),
        (
            "next token",
            (5,),
            (6,),
            {"position": 4, "token_name": words},
            "after token 5 “or”: predicted “w5”, label “w6”: wrong",
        ),
        (
            "text to text",
            (5,),
            (6,),
            {"position": 2, "token_name": words},
            "predicted first “w5”, label “w6”: wrong",
        ),
        (
            "span",
            (1, 3),
            (3, 3),
            {"chances": (0.25,)},
            "answer “into Paris”, tokens 2 to 4 (softmax 0.25), true answer “Paris”, token 4: wrong",
        ),
        ("span", (3, 3), (3, 3), {}, "answer “Paris”, token 4, true answer “Paris”, token 4: right"),
        ("span", (5, 3), (), {}, "answer none: its end, token 4, comes before its start, token 6"),
        ("span", (-1, 3), (9, 9), {}, "answer none within the text"),
        ("choice", (2,), (0,), {"chances": (0.6,)}, "predicted choice 2 (softmax 0.60), label 0: wrong"),
        ("choice", (2,), (2,), {"class_names": NAMES}, "predicted choice 2, label 2: right"),
    ],
)
def test_every_kind_is_told_in_its_words(
    task: str, answer: tuple[int, ...], truth: tuple[float, ...], options: dict[str, Any], line: str
) -> None:
    assert str(verdict(task, answer, truth, **{"tokens": TOKENS, **options})) == line


def test_every_kind_has_words_of_its_own() -> None:
    """A kind that is added must not pass for a classification."""
    for task in SCORES:
        found = verdict(task, (1, 1), (1, 1), value=0.5, chances=(0.5,), position=1, tokens=TOKENS)
        decides = task not in ("regression", "similarity", "loss")
        assert (found.right is not None) is decides
        assert (found.chance is None) is (not decides or task == "multi-label")


@pytest.mark.parametrize("task", ["regression", "similarity", "loss"])
def test_a_value_has_no_class_no_probability_and_no_verdict(task: str) -> None:
    found = verdict(task, (), (1.0,), chances=(math.nan,), value=0.5, class_names=NAMES)
    assert (found.right, found.chance, found.marked) == (None, None, ())
    assert "predicted" not in str(found)
    assert not any(name in str(found) for name in NAMES)


@pytest.mark.parametrize(
    ("task", "answer", "position", "places"),
    [
        ("token classification", (1,), 3, (3,)),
        ("masked token", (1,), 0, (0,)),
        ("next token", (1,), 6, (6,)),
        ("span", (1, 3), None, (1, 2, 3)),
        ("span", (3, 1), None, ()),
        ("span", (3, 9), None, ()),
        ("token classification", (1,), None, ()),
        ("classification", (1,), 0, ()),
        ("choice", (1,), 0, ()),
        ("text to text", (1,), 4, ()),
        ("similarity", (), 0, ()),
    ],
)
def test_what_was_decided_about_is_marked(
    task: str, answer: tuple[int, ...], position: int | None, places: tuple[int, ...]
) -> None:
    assert marked(task, answer, position, len(TOKENS)) == places
    assert verdict(task, answer, position=position, tokens=TOKENS).marked == places


def test_odd_names_are_visible() -> None:
    found = verdict("classification", (0,), (0,), class_names=("a\x07b\n",))
    assert (found.answer, found.truth) == ("a\\x07b\\n", "a\\x07b\\n")
    found = verdict("masked token", (3,), token_name=lambda token: "x" * 300, position=0, tokens=("\u202e",))
    assert len(found.answer) < 80
    assert found.where == "at token 1 “U+202E”"


def test_a_vocabulary_s_entry_goes_by_its_name() -> None:
    name = named_by(tokenizer())
    assert name is not None
    assert name(4) == "<script>"
    assert named_by(None) is None
    # An id that the tokenizer does not know.
    assert name(10_000) == "10000"


def test_tokens_become_a_text() -> None:
    assert plain(("in", "##to", "Paris")) == "into Paris"
    assert plain(("▁in", "to", "▁Paris")) == "into Paris"
    assert plain(("a",) * 100, 9) == "a a a a …"


def test_a_verdict_without_anything_is_its_answer() -> None:
    assert str(Verdict("predicted", "class 1")) == "predicted class 1"
