"""Answers on what was asked for besides the methods and the saliency: references, masked copies, signed scores.

TensorBoard's process imports this module: the standard library, numpy, werkzeug and tensorboard alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from globenc_lightning.report.dashboard import asked, store
from globenc_lightning.report.dashboard.answering import Answer, RefusalError, Request, all_as_shares, numbers
from globenc_lightning.report.dashboard.trainings import Training

SALIENCY = "saliency"
SHOWN = ("masked", "signed")
"""What the view Tokens can show of a sentence besides the references."""
LEAST_PROBABILITY = 1e-6
"""Probabilities were kept so far away from 0 and 1 before their log-odds were taken."""


def of_training(training: Training, newest: store.Summary) -> Answer:
    """Returns what the index says of what was asked for: curves over the validations; empty where nothing was.

    Args:
        training: its validations.
        newest: the newest that has figures.
    """
    summaries = [one.summary for one in training.validations]
    names = [*dict.fromkeys(name for one in summaries if one is not None for name in one.references)]
    return {
        "references": names,
        "reference_correlation": {name: _curves(summaries, newest, name) for name in names},
        "masking": _masking(summaries),
    }


def reference_of(request: Request, training: Training) -> str:
    """Returns the reference that a browser asks for, the saliency where it names none."""
    name = request.text("reference") if request.has("reference") else SALIENCY
    summaries = [one.summary for one in training.validations]
    if name != SALIENCY and not any(one is not None and name in one.references for one in summaries):
        raise RefusalError(f"There are no figures of the reference {name!r}.", 404)
    return name


def rho_with(summary: store.Summary, reference: str) -> np.ndarray | None:
    """Returns rho (m, b, l) with a reference; None where this validation has none."""
    if reference == SALIENCY:
        return summary.rho
    found = summary.references.get(reference)
    return None if found is None else found.rho


def rows_of(detail: store.Detail, reference: str, count: int) -> list[list[Any] | None]:
    """Returns each sentence's row (k,) of a reference as shares; None where it is not stored."""
    if reference == SALIENCY:
        return all_as_shares(detail.saliency[:count], store.ROW_LEVELS)
    of = detail.parts.references.get(reference, {})
    return all_as_shares([of.get(one) for one in range(count)], store.ROW_LEVELS)


def of_tokens(shown: str, summary: store.Summary, detail: store.Detail, method: str, count: int) -> Answer:
    """Returns what the view Tokens shows of each sentence besides its rows.

    Args:
        shown: one of ``SHOWN``.
        summary: the validation's.
        detail: the validation's.
        method: the one that is looked at.
        count: so many sentences are shown.
    """
    if shown == "signed":
        signed, left_out = detail.parts.signed, detail.parts.left_out
        rows = [[_short(one) for one in signed[place].tolist()] if place in signed else None for place in range(count)]
        return {"rows": rows, "left_out": [_short(left_out.get(place)) for place in range(count)]}
    masking = summary.masking
    answer: Answer = {"methods": [] if masking is None else masking.methods, "tokens": [None] * count}
    if masking is None or method not in masking.methods:
        return answer
    place = masking.methods.index(method)
    of = detail.parts.masked.get(method, {})
    answer["tokens"] = [np.flatnonzero(of[one]).tolist() if one in of else None for one in range(count)]
    answer |= {name: numbers(figure.each[place][:count]) for name, figure in masking.measures.items()}
    chances = [one.chance for one in summary.decided[:count]] if masking.unit == "probability" else []
    odds = answer.get("log_odds", [])
    pairs = zip(chances, odds, strict=True) if len(chances) == len(odds) else ()
    answer["probability"] = [_probabilities(chance, lost) for chance, lost in pairs]
    return answer


def _curves(summaries: Sequence[store.Summary | None], newest: store.Summary, reference: str) -> Answer:
    found = [None if one is None else one.references.get(reference) for one in summaries]
    return {
        method: {
            name: [None if one is None else numbers(getattr(one, name)[place]) for one in found]
            for name in asked.STATISTICS
        }
        for place, method in enumerate(newest.methods)
    }


def _masking(summaries: Sequence[store.Summary | None]) -> Answer | None:
    """Curves of every method that was masked at any validation; None where none was."""
    found = [None if one is None else one.masking for one in summaries]
    there = [one for one in found if one is not None]
    if not there:
        return None
    newest = there[-1]
    return {
        "methods": newest.methods,
        "unit": newest.unit,
        "share": newest.share,
        "score": newest.score,
        "masking": newest.masking,
        "examples": [None if one is None else one.examples for one in found],
        "measures": {
            measure: {
                method: {name: [_at(one, measure, method, name) for one in found] for name in asked.STATISTICS}
                for method in newest.methods
            }
            for measure in asked.MEASURES
            if any(measure in one.measures for one in there)
        },
    }


def _at(masking: asked.Masking | None, measure: str, method: str, statistic: str) -> float | int | None:
    """One number of a validation; None where it has none."""
    if masking is None or measure not in masking.measures or method not in masking.methods:
        return None
    value = getattr(masking.measures[measure], statistic)[masking.methods.index(method)].item()
    return value if isinstance(value, int) else _short(value)


def _probabilities(chance: float | None, lost: float | None) -> list[float] | None:
    """Returns the probability of what is decided on the whole text, and on the copy, by the log-odds that it loses."""
    if chance is None or lost is None:
        return None
    kept = min(max(chance, LEAST_PROBABILITY), 1 - LEAST_PROBABILITY)
    left = math.log(kept) - math.log1p(-kept) - lost
    return [round(chance, 5), round(1 / (1 + math.exp(-left)), 5)]


def _short(value: float | None) -> float | None:
    """A number as JSON can hold it, to six digits."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
