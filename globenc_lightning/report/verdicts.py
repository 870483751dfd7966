"""What an example was decided to be, in words: the one place that turns answers, labels and probabilities into text.

Every picture, the tab, the page of choices, the notebook and the stills take their words from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from globenc_lightning.report.canvas import visible
from globenc_lightning.task.kinds import BY_TOKEN, VALUES
from globenc_lightning.tokenizers import naming

if TYPE_CHECKING:
    from globenc_lightning.measurement import Measurement
    from globenc_lightning.probe import ProbeSet

TEXT_LIMIT = 60
SHOWN_LABELS = 4
"""So many labels of an example with several are named; the others are counted."""
OF_TOKENS = ("masked token", "next token", "text to text")
"""Kinds whose answer is an entry of a vocabulary."""
MARKS = {
    "token classification": "decided token",
    "masked token": "decided token",
    "next token": "predicted after this token",
    "span": "predicted answer",
}
"""Kinds whose decision is at some of the text's tokens, and what these are."""
_NAMES = {
    "classification": ("predicted", "label"),
    "binary": ("predicted", "label"),
    "multi-label": ("predicted", "labels"),
    "regression": ("value", "target"),
    "similarity": ("similarity", ""),
    "loss": ("loss", ""),
    "token classification": ("predicted", "label"),
    "masked token": ("predicted", "label"),
    "next token": ("predicted", "label"),
    "text to text": ("predicted first", "label"),
    "span": ("answer", "true answer"),
    "choice": ("predicted", "label"),
}

TokenName = Callable[[int], str]
"""The text of an entry of the vocabulary, by its id."""


@dataclass(frozen=True)
class Verdict:
    """What one example was decided to be, in words.

    Attributes:
        name: what the answer is: ``"predicted"``, ``"value"``, ``"answer"``, ...
        answer: the answer; a class by its name where that is known, a token by its text.
        truth_name: what the truth is: ``"label"``, ``"target"``, ``"true answer"``.
        truth: what the data say, in the words of the answer; empty where they say nothing.
        right: whether both agree; None where there is nothing to agree on: a value, no label, some of several labels.
        chance: the probability of the answer; None where it has none, or the answer tells one of each label.
        chance_name: what the probability was computed by: ``"softmax"`` or ``"sigmoid"``.
        where: which token was decided, for a kind that decides per token; else empty.
        marked: the tokens, counted from 0, that are marked in pictures.
    """

    name: str
    answer: str
    truth_name: str = ""
    truth: str = ""
    right: bool | None = None
    chance: float | None = None
    chance_name: str = ""
    where: str = ""
    marked: tuple[int, ...] = ()

    def __str__(self) -> str:
        """All of it in one line."""
        chance = "" if self.chance is None else f" ({self.chance_name} {self.chance:.2f})"
        line = f"{self.where}: " if self.where else ""
        line += f"{self.name} {self.answer}{chance}"
        if self.truth:
            line += f", {self.truth_name} {self.truth}"
        return line if self.right is None else f"{line}: {'right' if self.right else 'wrong'}"


def verdict(
    task: str,
    answer: Sequence[int],
    truth: Sequence[float] = (),
    *,
    chances: Sequence[float] = (),
    value: float = math.nan,
    position: int | None = None,
    tokens: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
    token_name: TokenName | None = None,
    distance: bool = False,
) -> Verdict:
    """Say what an example was decided to be, and whether that is right.

    Args:
        task: The kind of decision, one of ``SCORES``.
        answer: What was decided: a class, token or choice; the labels that hold; a span's first and last token.
        truth: What the data say, in the same form; a value's target; empty where they say nothing.
        chances: The answer's probability; of several labels, that of each. For one logit, that of class 1.
        value: The value of a regression, a similarity or a loss.
        position: The token that is decided, counted from 0, or None.
        tokens: (k,) the example's tokens.
        class_names: The model's names of its classes, or None.
        token_name: Names an entry of the vocabulary; its number is shown when None.
        distance: Whether a similarity is a distance.

    Returns:
        The words.
    """
    name, truth_name = _NAMES.get(task, _NAMES["classification"])
    answer = [int(one) for one in answer]
    if task in VALUES:
        target = _number(truth[0]) if task == "regression" and truth else ""
        return Verdict("distance" if distance else name, _number(value), truth_name if target else "", target)
    if task == "multi-label":
        return _labels(answer, [int(one) for one in truth], chances, class_names)
    if task == "span":
        return _span(answer, [int(one) for one in truth], chances, tokens)
    # A label below 0 is one that does not count.
    known = [int(one) for one in truth[:1] if one >= 0]
    in_words = _entry(token_name) if task in OF_TOKENS else _choice if task == "choice" else _class(class_names)
    chance = next((float(one) for one in chances if not math.isnan(one)), None)
    if task == "binary" and chance is not None and answer == [0]:
        chance = 1 - chance
    marked = (position,) if task in MARKS and position is not None and position >= 0 else ()
    return Verdict(
        name=name,
        answer=in_words(answer[0]) if answer else "nothing",
        truth_name=truth_name if known else "",
        truth=in_words(known[0]).removeprefix(_prefix(task, class_names)) if known else "",
        right=answer[:1] == known if known and answer else None,
        chance=chance,
        chance_name="" if chance is None else "sigmoid" if task == "binary" else "softmax",
        where=_where(task, position, tokens),
        marked=marked,
    )


def verdicts(measurement: Measurement, probe: ProbeSet, class_names: Sequence[str] | None = None) -> list[Verdict]:
    """Say what every example of a measurement was decided to be.

    Args:
        measurement: The figures.
        probe: The examples, and the tokenizer that names tokens.
        class_names: The model's names of its classes, or None.

    Returns:
        One per example.
    """
    token_name = named_by(probe.tokenizer) if measurement.task in OF_TOKENS else None
    return [
        verdict(
            measurement.task,
            measurement.answer(index),
            measurement.truth(index, probe.rows[index]),
            chances=measurement.chance(index),
            value=measurement.value(index),
            position=measurement.position[index] if measurement.position else None,
            tokens=measurement.names[index],
            class_names=class_names,
            token_name=token_name,
            distance=measurement.distance,
        )
        for index in range(len(measurement.names))
    ]


def marked(task: str, answer: Sequence[int], position: int | None, length: int) -> tuple[int, ...]:
    """The tokens, counted from 0, that a decision is at: those that are marked in pictures.

    Args:
        task: The kind of decision.
        answer: What was decided.
        position: The token that is decided, or None.
        length: The number of the example's tokens.

    Returns:
        The places; none for a kind that decides about the whole text.
    """
    if task == "span":
        return tuple(_places(answer, length))
    return (position,) if task in MARKS and position is not None and 0 <= position < length else ()


def named_by(tokenizer: Any) -> TokenName | None:
    """How a tokenizer names one entry of its vocabulary; None without a tokenizer."""
    if tokenizer is None:
        return None
    name = naming(tokenizer)
    return lambda token: "".join(name([token]))


def plain(tokens: Sequence[str], limit: int = TEXT_LIMIT) -> str:
    """A few tokens as a text: words are joined where ``▁`` or ``##`` says how."""
    shown = [visible(token) for token in tokens]
    if any(token.startswith(("▁", "⋯")) for token in shown):
        text = "".join(shown).replace("⋯", "").replace("▁", " ").strip()
    else:
        text = " ".join(shown).replace(" ##", "")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _class(names: Sequence[str] | None) -> Callable[[int], str]:
    def in_words(number: int) -> str:
        known = names is not None and 0 <= number < len(names)
        return visible(names[number], TEXT_LIMIT) if names is not None and known else f"class {number}"

    return in_words


def _entry(token_name: TokenName | None) -> Callable[[int], str]:
    def in_words(number: int) -> str:
        return f"token {number}" if token_name is None else f"“{visible(token_name(number), TEXT_LIMIT)}”"

    return in_words


def _prefix(task: str, class_names: Sequence[str] | None) -> str:
    """What a number has in front of it, which says no more beside the word label."""
    return "choice " if task == "choice" else "class " if class_names is None and task not in OF_TOKENS else ""


def _choice(number: int) -> str:
    # Counted as its label is.
    return f"choice {number}"


def _where(task: str, position: int | None, tokens: Sequence[str]) -> str:
    if task not in BY_TOKEN or task == "text to text" or position is None or position < 0:
        return ""
    token = f" “{visible(tokens[position], TEXT_LIMIT)}”" if position < len(tokens) else ""
    return f"{'after' if task == 'next token' else 'at'} token {position + 1}{token}"


def _labels(
    answer: Sequence[int], truth: Sequence[int], chances: Sequence[float], names: Sequence[str] | None
) -> Verdict:
    """Several labels that may hold at once, the most certain first."""
    in_words = _class(names) if names is not None else str
    known = dict(zip(answer, chances, strict=False))
    ordered = sorted(answer, key=lambda label: -known.get(label, 0.0))
    shown = [
        in_words(label) + (f" (sigmoid {known[label]:.2f})" if label in known else "")
        for label in ordered[:SHOWN_LABELS]
    ]
    named = [in_words(label) for label in truth[:SHOWN_LABELS]]
    right = None
    if truth and set(answer) == set(truth):
        right = True
    elif truth and not set(answer) & set(truth):
        right = False
    prefix = "" if names is not None or not answer else "label " if len(answer) == 1 else "labels "
    return Verdict(
        name="predicted",
        answer=prefix + ", ".join([*shown, *_more(answer)]) if answer else "no label",
        truth_name=("label" if len(truth) == 1 else "labels") if truth else "",
        truth=", ".join([*named, *_more(truth)]),
        right=right,
    )


def _more(labels: Sequence[int]) -> list[str]:
    return [f"{len(labels) - SHOWN_LABELS} more"] if len(labels) > SHOWN_LABELS else []


def _span(answer: Sequence[int], truth: Sequence[int], chances: Sequence[float], tokens: Sequence[str]) -> Verdict:
    places = _places(answer, len(tokens))
    chance = next((float(one) for one in chances if not math.isnan(one)), None)
    known = len(truth) == 2 and bool(_places(truth, len(tokens)))
    return Verdict(
        name="answer",
        answer=_stretch(answer, tokens),
        truth_name="true answer" if known else "",
        truth=_stretch(truth, tokens) if known else "",
        right=list(answer) == list(truth) if known else None,
        chance=chance,
        chance_name="" if chance is None else "softmax",
        marked=tuple(places),
    )


def _places(span: Sequence[int], length: int) -> range:
    """The tokens of a span; none where its end comes before its start, or it lies outside of the text."""
    start, end = (span[0], span[-1]) if span else (0, -1)
    return range(start, end + 1) if 0 <= start <= end < length else range(0)


def _stretch(span: Sequence[int], tokens: Sequence[str]) -> str:
    places = _places(span, len(tokens))
    if not places:
        if len(span) == 2 and min(span) >= 0 and span[1] < span[0]:
            return f"none: its end, token {span[1] + 1}, comes before its start, token {span[0] + 1}"
        return "none within the text"
    text = plain([tokens[place] for place in places])
    which = f"token {places[0] + 1}" if len(places) == 1 else f"tokens {places[0] + 1} to {places[-1] + 1}"
    return f"“{text}”, {which}"


def _number(value: float) -> str:
    """A value in a few digits, with a proper minus sign."""
    if math.isnan(value):
        return "undefined"
    size = abs(value)
    digits = f"{value:.3f}" if 0.001 <= size < 100 or not value else f"{value:.4g}"
    return digits.replace("-", "−")
