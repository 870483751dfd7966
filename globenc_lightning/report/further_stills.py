"""What stills show of signed scores and faithfulness, and what a strip of tokens over a training looks like."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.report import curves, further_curves, heatmap, signed
from globenc_lightning.report.further_curves import Moments


class Look(NamedTuple):
    """How the values of a strip are shown.

    Attributes:
        table: Name of matplotlib's colour table.
        ends: What stands at the beginning, the middle and the end of the colour scale.
        key: Name of the colour scale.
    """

    table: str
    ends: tuple[str, str, str]
    key: str


SHARES = Look(heatmap.TABLE, ("0", "0.5", "1"), "share of the validation's largest value")
SIGNED = Look(signed.TABLE, ("−1", "0", "1"), signed.SCALE)


class Strip(NamedTuple):
    """What a strip shows.

    Attributes:
        rows: (n, k) places on the colour scale, 0 to 1, one row per step; NaN where there are none.
        tokens: (k,).
        steps: (n,).
        beside: Name -> (n,) texts, what stands beside each row.
        others: The rows that are of another text than the tokens.
        marked: One per row: the tokens that are framed.
        mark_label: What a framed token is.
        look: The colours.
    """

    rows: NDArray[np.float64]
    tokens: Sequence[str]
    steps: Sequence[int]
    beside: dict[str, list[str]]
    others: Sequence[int]
    marked: Sequence[Sequence[int]]
    mark_label: str
    look: Look = SHARES


def signed_strip(moments: Moments, example: int, tokens: Sequence[str], others: Sequence[int]) -> Strip:
    """Returns an example's signed contributions over the training.

    Raises:
        ValueError: there are none.
    """
    found = signed.timeline(moments, example)
    if found is None:
        raise ValueError("there are no signed scores: train with GlobEncCallback(signed=True).")
    if not len(tokens) or found.rows.shape[1] != len(tokens):
        raise ValueError(f"example {example} has no signed scores: its rows are empty.")
    texts = ([signed.number(one) for one in values] for values in (found.score, found.left_out))
    beside = dict(zip(signed.COLUMNS, texts, strict=True))
    nothing: list[tuple[int, ...]] = [()] * len(found.steps)
    return Strip(signed.two_sided(found.rows), tokens, found.steps, beside, others, nothing, "", SIGNED)


def masked_tokens(moments: Moments, method: str, example: int, others: Collection[int]) -> list[tuple[int, ...]]:
    """Returns the tokens of an example that were masked for a method, one sequence of places per validation.

    Raises:
        ValueError: nothing was masked for the method.
    """
    known = further_curves.methods_with(moments, "masked")
    if method not in known:
        asked = f"nothing was masked for {method!r}"
        if known:
            raise ValueError(f"{asked}; choose from {', '.join(known)}.")
        raise ValueError(f"{asked}: train with GlobEncCallback(faithfulness=True).")
    places: list[tuple[int, ...]] = []
    for row, (_, entry) in enumerate(moments):
        flags = None
        if entry is not None and entry.faithfulness is not None and row not in others:
            flags = entry.faithfulness.masked.get(method)
        places.append(() if not flags else tuple(np.flatnonzero(flags[example].numpy()).tolist()))
    return places


def faithfulness_curves(
    moments: Moments, figure: str, methods: Sequence[str] | None
) -> tuple[curves.Curves, Faithfulness]:
    """Returns the curves of a figure of faithfulness over the training, and its newest measurement.

    Args:
        moments: the validations.
        figure: one of ``further_curves.FIGURES``.
        methods: those that are drawn; all when None.

    Raises:
        ValueError: there is no such figure or method, or it was not measured.
    """
    if figure not in further_curves.FIGURES:
        raise ValueError(f"figure must be one of {', '.join(map(repr, further_curves.FIGURES))}; got {figure!r}.")
    measured = further_curves.with_faithfulness(moments)
    if not measured:
        raise ValueError("faithfulness was not measured: train with GlobEncCallback(faithfulness=True).")
    known = further_curves.methods_with(moments, figure)
    if not known:
        why = "the score is a value, which has none" if measured[-1][1].unit == "value" else "it was not measured"
        raise ValueError(f"there is no {figure}: {why}.")
    chosen = [methods] if isinstance(methods, str) else known if methods is None else list(methods)
    for method in chosen:
        if method not in known:
            raise ValueError(f"nothing was masked for {method!r}; choose from {', '.join(known)}.")
    if not chosen:
        raise ValueError(f"methods must name at least one of {', '.join(known)}.")
    return further_curves.faithfulness_over_training(moments, figure, chosen), measured[-1][1]
