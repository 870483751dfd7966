"""Curves of what was asked for besides: correlations with further references, and faithfulness.

Axes: ``b`` example, ``l`` layer, ``n`` validation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.measurement import HistoryEntry
from globenc_lightning.report import curves, scales
from globenc_lightning.report.averages import mean_and_interval

FIGURES = ("gain", "sufficiency_gain", "log_odds")
UNITS = {"gain": "gain", "sufficiency_gain": "gain", "log_odds": "log-odds"}
HEADINGS = {
    "gain": "Faithfulness over training: gain over masking random tokens",
    "sufficiency_gain": "Sufficiency over training: gain over keeping random tokens",
    "log_odds": "Log-odds lost by masking a method’s first tokens, over training",
}
"""Figure of faithfulness -> the title of its picture."""

Moments = Sequence[tuple[int, HistoryEntry | None]]
"""Validations in their order: a step, and what was found; None where the analysis failed."""


def correlation_by_layer(entry: HistoryEntry, reference: str, methods: Sequence[str]) -> curves.Curves:
    """Returns the correlations with a reference through the layers, of one validation."""
    rho = {method: entry.reference_rho[reference][method].double().numpy() for method in methods}
    return curves.by_layer(rho)._replace(scale=scales.correlation(reference))


def correlation_over_training(moments: Moments, reference: str, methods: Sequence[str]) -> curves.Curves:
    """Returns the last layer's correlations with a reference; a gap where a validation has none."""

    def found(entry: HistoryEntry, method: str) -> Tensor | None:
        rho = entry.reference_rho.get(reference, {}).get(method)
        return None if rho is None else rho[:, -1]

    means, halves = {}, {}
    for method in methods:
        each = [None if entry is None else found(entry, method) for _, entry in moments]
        means[method], halves[method], _, _ = averaged(each)
    shown = curves.over_training([step for step, _ in moments], means, halves)
    return shown._replace(scale=scales.correlation(reference))


def faithfulness_over_training(moments: Moments, figure: str, methods: Sequence[str]) -> curves.Curves:
    """Returns a figure of faithfulness over the training, at the validations where it was measured.

    Args:
        moments: the validations.
        figure: one of ``FIGURES``.
        methods: those that are drawn.
    """
    measured = [(step, one) for step, one in with_faithfulness(moments) if getattr(one, figure)]
    means, halves, counts, missing = {}, {}, [], []
    for method in methods:
        each = [getattr(one, figure).get(method) for _, one in measured]
        means[method], halves[method], n, left_out = averaged(each)
        counts.append(n)
        missing.append(left_out)
    newest = measured[-1][1]
    steps = [step for step, _ in measured]
    scale = scales.faithfulness(figure, newest.share, [*means.values()], [*halves.values()])
    reach = np.concatenate([np.abs(means[method]) + halves[method] for method in methods])
    cut = bool((reach[np.isfinite(reach)] > max(abs(scale.low), scale.high)).any())
    return curves.Curves(
        np.asarray(steps, dtype=np.float64),
        means,
        halves,
        ticks=curves.spaced(steps),
        x_name="training step",
        caption=_caption(figure, np.stack(counts), np.stack(missing), cut),
        scale=scale,
        references={} if figure == "log_odds" else {scales.RANDOM: 0.0},
        unit=UNITS[figure],
    )


def with_faithfulness(moments: Moments) -> list[tuple[int, Faithfulness]]:
    """Returns the validations at which tokens were masked."""
    return [
        (step, entry.faithfulness) for step, entry in moments if entry is not None and entry.faithfulness is not None
    ]


def methods_with(moments: Moments, figure: str) -> list[str]:
    """Returns the methods that have a figure of faithfulness at any validation."""
    named: Mapping[str, None] = {
        method: None for _, one in with_faithfulness(moments) for method in getattr(one, figure)
    }
    return [*named]


def averaged(
    each: Sequence[Tensor | None],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns mean, half the interval, n and the number of examples that are left out, (n,) each.

    Args:
        each: (b,) of every validation, NaN where an example has no figure; None where the validation has none.
    """
    found = [[] if one is None else one.tolist() for one in each]
    values = np.array(list(zip_longest(*found, fillvalue=np.nan)), dtype=np.float64).reshape(-1, len(found))
    mean, half, n, _ = mean_and_interval(values)
    sizes = np.array([len(one) for one in found], dtype=np.int64)
    return mean, half, n, sizes - n


def _caption(figure: str, n: NDArray[np.int64], left_out: NDArray[np.int64], cut: bool) -> list[str]:
    """What lines and bands are, of how many examples, and why some are left out."""
    fewest, most = int(n.min()), int(n.max())
    examples = f"{fewest}" if fewest == most else f"{fewest}–{most}"
    said = [
        f"Lines: mean over the examples that have a {UNITS[figure]}, n = {examples}; numbers: the line’s last point."
    ]
    if figure == "log_odds":
        said[0] = f"Lines: mean over the examples with finite log-odds, n = {examples}; numbers: the line’s last point."
    if most > 1:
        ending = ", wider than the axis" if cut else ""
        said.append(f"Bands: 95 % confidence interval of the mean (Student’s t){ending}.")
    else:
        said.append("No bands: an interval needs two examples.")
    fewest, most = int(left_out.min()), int(left_out.max())
    if most:
        count = f"{fewest}" if fewest == most else f"{fewest}–{most}"
        why = "masking every token costs too little of their score" if figure != "log_odds" else "they have none"
        said.append(f"Left out: {count} of {int((n + left_out).max())} examples, since {why}.")
    else:
        said.append("No example is left out.")
    said.append("An example’s random tokens are the same at every step.")
    return said
