"""How far sentences' attributions moved from one validation to another, many sentences at once.

TensorBoard's process imports this module: the standard library, numpy, werkzeug and tensorboard alone.

Axes: ``b`` sentence, ``k`` token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from globenc_lightning import dynamics
from globenc_lightning.report.dashboard.answering import Answer

_Pair = tuple[ArrayLike, ArrayLike]


def movement(before: ArrayLike, after: ArrayLike, most: int) -> Answer:
    """Returns how far one sentence's attributions (k) moved; see :func:`movements`."""
    return movements([(before, after)], most)[0]


def movements(pairs: Sequence[_Pair], most: int) -> list[Answer]:
    """How far sentences' attributions moved.

    Args:
        pairs: (b) one sentence's attributions (k), not negative, and the same tokens' later.
        most: how many of the largest are compared.

    Returns:
        For each sentence ``distance``, 1 - Spearman's rho of the two, None where it is undefined; ``overlap``, the
        share of the ``most`` largest tokens in common; ``gained`` and ``lost``, the tokens whose share of the sum grew
        and shrank, the most first.
    """
    found: list[Answer] = [{} for _ in pairs]
    by_length: dict[int, list[int]] = {}
    for place, (before, _) in enumerate(pairs):
        by_length.setdefault(len(np.asarray(before)), []).append(place)
    for length, places in by_length.items():
        old, new = (np.array([np.asarray(pairs[one][side], np.float64) for one in places]) for side in (0, 1))
        for place, answer in zip(places, _of_one_length(old, new, min(most, length)), strict=True):
            found[place] = answer
    return found


def _of_one_length(old: NDArray[np.float64], new: NDArray[np.float64], most: int) -> list[Answer]:
    """The answers for sentences of as many tokens (b, k)."""
    gain = new / np.maximum(new.sum(-1, keepdims=True), 1e-300) - old / np.maximum(old.sum(-1, keepdims=True), 1e-300)
    order = np.argsort(-gain, axis=-1, kind="stable")
    ordered = np.take_along_axis(gain, order, -1)
    grown, shrunk = (ordered > 0).sum(-1), (ordered < 0).sum(-1)
    tops = np.zeros((2, *old.shape), dtype=bool)
    for place, values in enumerate((old, new)):
        largest = np.argsort(-values, axis=-1, kind="stable")[:, :most]
        np.put_along_axis(tops[place], largest, True, axis=-1)
    overlap = (tops[0] & tops[1]).sum(-1) / most if most else np.ones(len(old))
    rho = _spearman(old, new)
    return [
        {
            "distance": None if np.isnan(rho[b]) else round(float(1 - rho[b]), 4),
            "overlap": round(float(overlap[b]), 4),
            "gained": order[b, : min(most, grown[b])].tolist(),
            "lost": order[b, ::-1][: min(most, shrunk[b])].tolist(),
        }
        for b in range(len(old))
    ]


def _spearman(old: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rho of the rows (b, k); NaN where one of them is constant."""
    if not old.shape[-1]:
        return np.full(len(old), np.nan)
    x, y = (dynamics.ranks(rows) - (rows.shape[-1] + 1) / 2 for rows in (old, new))
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.full(len(old), np.nan), where=scale > 0)
