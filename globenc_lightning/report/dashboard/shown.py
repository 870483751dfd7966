"""Which sentences of a probe a run's records show, of how many, and of which of them a method's rows are stored.

TensorBoard's process imports this module: the standard library, numpy, werkzeug and tensorboard alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.answering import Answer

_OF = re.compile(r"of ([0-9,]{1,20}) examples")


def examples_of(summary: store.Summary) -> int:
    """Returns how many examples the probe has; earlier versions of the package told it in words alone."""
    said = summary.words.get("examples", "")
    found = _OF.search(summary.words.get("shown", ""))
    if not (said.isascii() and said.isdigit() and len(said) < 16):
        said = found[1].replace(",", "") if found else ""
    return max(len(summary.sentences), int(said or 0))


def begin_alike(one: store.Summary, other: store.Summary) -> bool:
    """Whether two validations show the same sentences of one probe, one of them perhaps fewer.

    Versions of the package differ in how many they have room for, and a training may go on with another.
    """
    if one.sentences == other.sentences:
        return True
    count = min(len(one.sentences), len(other.sentences))
    same = one.settings.get("probe") == other.settings.get("probe") is not None
    return same and count > 0 and one.sentences[:count] == other.sentences[:count]


def cut(summary: store.Summary, count: int) -> store.Summary:
    """Returns the summary of so many of its first sentences; means stay those of the whole probe."""
    if len(summary.sentences) <= count:
        return summary
    return replace(
        summary,
        sentences=summary.sentences[:count],
        predicted=summary.predicted[:count],
        probability=summary.probability[:count],
        rho=summary.rho[:, :count],
        decided=summary.decided[:count],
        words={**summary.words, "examples": str(examples_of(summary))},
    )


def lengths_agree(detail: store.Detail, summary: store.Summary) -> bool:
    """Whether a detail holds the sentences of a summary, which may have been cut."""
    wanted = tuple(len(one.tokens) for one in summary.sentences)
    return len(detail.lengths) >= len(wanted) and detail.lengths[: len(wanted)] == wanted


def nbytes(detail: store.Detail) -> int:
    """Returns how much memory a detail's attributions take."""
    rows = sum(codes.nbytes for of in detail.rows.values() for codes in of.values())
    maps = sum(codes.nbytes for of in detail.maps.values() for codes in of.values())
    return rows + maps + sum(codes.nbytes for codes in detail.saliency)


def stored_rows(detail: store.Detail, methods: Sequence[str], count: int, method: str) -> Answer:
    """Describe whose rows a validation holds.

    Args:
        detail: its attributions.
        methods: those that were computed.
        count: so many sentences are shown.
        method: the one that is looked at.

    Returns:
        ``stored``, the number of sentences by method; ``instead``, for each sentence that lacks the method's rows the
        methods whose rows it has; ``room``, how many bytes they could take.
    """
    there = {one: {place for place in detail.rows.get(one, {}) if place < count} for one in methods}
    lacking = [place for place in range(count) if place not in there[method]]
    return {
        "stored": {one: len(places) for one, places in there.items()},
        "instead": {str(place): [one for one in methods if place in there[one]] for place in lacking},
        "room": detail.budget,
    }


NO_MAPS = "Attention flow goes from the token that is read alone, so that there is no map of all tokens."
"""Why no map is stored where the layers' maps were put together as flows."""


def note(things: str, methods: Sequence[str], stored: Mapping[str, Any], budget: int) -> str | None:
    """Write which methods' rows or maps of a sentence are not stored; None where all are."""
    absent = [method for method in methods if method not in stored]
    if not absent:
        return None
    which = "all methods" if len(absent) == len(methods) else ", ".join(absent)
    return (
        f"The {things} of {which} are not stored for this sentence: a validation takes at most {budget // 1024:,} kB."
    )
