"""How a run's attributions develop: drift from one validation to another, and the share of chosen tokens.

Axes: ``v`` validation, ``b`` sentence, ``k`` token. numpy alone: the tab imports it inside
TensorBoard, a study beside pandas.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]

AGAINST = ("previous", "first", "last")
"""The validation that a row is compared with."""
MEASURES = ("spearman", "jaccard")
"""How alike two rows are: Spearman's rho, or the share of their largest tokens that they have in common."""
TOP = 0.25
"""Jaccard compares so large a share of a sentence's tokens, one token at least."""


def ranks(rows: Rows) -> Rows:
    """Ranks from 1 in each row (v, k); ties share their mean rank."""
    order = np.argsort(rows, axis=-1, kind="stable")
    ordered = np.take_along_axis(rows, order, -1)
    differs = ordered[..., 1:] != ordered[..., :-1]
    edge = np.ones((*rows.shape[:-1], 1), dtype=bool)
    places = np.arange(rows.shape[-1])
    # Where the run of equal values around each place begins and ends.
    first = np.maximum.accumulate(np.where(np.concatenate([edge, differs], -1), places, 0), axis=-1)
    ends = np.where(np.concatenate([differs, edge], -1), places, rows.shape[-1])
    last = np.flip(np.minimum.accumulate(np.flip(ends, -1), axis=-1), -1)
    result = np.empty(rows.shape)
    np.put_along_axis(result, order, (first + last) / 2 + 1, axis=-1)
    return result


def partners(known: Sequence[bool], against: str) -> list[int | None]:
    """The validation that each one is compared with, among those that have figures; None where there is none.

    Args:
        known: (v) whether each validation has figures.
        against: one of ``AGAINST``.
    """
    there = [place for place, one in enumerate(known) if one]
    if against == "previous":
        before = dict(zip(there[1:], there, strict=False))
        return [before.get(place) for place in range(len(known))]
    fixed = None if not there else there[0] if against == "first" else there[-1]
    return [fixed if one and place != fixed else None for place, one in enumerate(known)]


def drift(rows: Rows, pairs: Sequence[int | None], by: str) -> Rows:
    """How far one sentence's row moved: 1 - similarity to the row of another validation.

    Args:
        rows: (..., v, k) the tokens that count; NaN where a validation has no figures.
        pairs: what :func:`partners` gave.
        by: one of ``MEASURES``.

    Returns:
        (..., v) 0 where the rows are alike; NaN where there is nothing to compare: no figures, fewer than two tokens
        or, for Spearman, a constant row.
    """
    found = np.full(rows.shape[:-1], np.nan)
    places = [place for place, other in enumerate(pairs) if other is not None]
    others = [other for other in pairs if other is not None]
    if places:
        compared = comparable(rows, by)
        found[..., places] = 1 - similarity(compared[..., places, :], compared[..., others, :], by)
    return found


def comparable(rows: Rows, by: str) -> Rows:
    """What :func:`similarity` compares rows (..., v, k) by: ranks around 0, or 1 for the largest tokens; else NaN."""
    if rows.shape[-1] < 2:
        # The largest of one token is the same for every model.
        return np.full(rows.shape, np.nan)
    made = ranks(rows) - (rows.shape[-1] + 1) / 2 if by == "spearman" else _tops(rows).astype(np.float64)
    made[np.isnan(rows).any(-1)] = np.nan
    return made


def similarity(one: Rows, other: Rows, by: str) -> Rows:
    """How alike rows are (..., v), out of what :func:`comparable` gave (..., v, k); NaN where that cannot be told."""
    shared = (one * other).sum(-1)
    if by == "spearman":
        scale = np.sqrt((one * one).sum(-1) * (other * other).sum(-1))
    else:
        scale = one.sum(-1) + other.sum(-1) - shared
    return np.divide(shared, scale, out=np.full(shared.shape, np.nan), where=scale > 0)


def top_count(tokens: int) -> int:
    """How many of so many tokens Jaccard compares."""
    return max(1, math.ceil(TOP * tokens))


def _tops(rows: Rows) -> NDArray[np.bool_]:
    """Which tokens of each row (..., v, k) are among its largest; of equal ones, the first."""
    most = top_count(rows.shape[-1])
    order = np.argsort(-rows, axis=-1, kind="stable")[..., :most]
    tops = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(tops, order, True, axis=-1)
    return tops


def chance(lengths: Collection[int], by: str) -> float | None:
    """The drift of rows whose tokens were shuffled: what is as far as rows get that have nothing to do with each other.

    1 for Spearman, whose expectation is 0 then. For Jaccard of the ``m`` largest of ``k`` tokens, the number ``j`` in
    common is hypergeometric, and the expectation is that of ``j / (2 m - j)``.

    Args:
        lengths: how many tokens of each sentence count.
        by: one of ``MEASURES``.

    Returns:
        The mean over the sentences that have two tokens or more; None where there is none.
    """
    lengths = [one for one in lengths if one > 1]
    if not lengths:
        return None
    if by == "spearman":
        return 1.0
    each = {}
    for tokens in set(lengths):
        most = top_count(tokens)
        ways = math.comb(tokens, most)
        each[tokens] = sum(
            math.comb(most, j) * math.comb(tokens - most, most - j) / ways * j / (2 * most - j)
            for j in range(max(0, 2 * most - tokens), most + 1)
        )
    return 1 - sum(each[one] for one in lengths) / len(lengths)


def marked(tokens: Sequence[str], special: Sequence[bool], wanted: Mapping[str, bool] | Collection[str]) -> list[bool]:
    """Which tokens of a sentence are among those that were asked for.

    Args:
        tokens: (k) as the tab shows them.
        special: (k).
        wanted: words in lower case; ``"[special]"`` stands for all special tokens, ``"[punctuation]"`` for tokens
            without a letter or digit.

    Returns:
        (k) A token counts without the signs of a tokenizer (``##``, ``▁``), in any case; special tokens only by their
        own name, or by ``"[special]"``.
    """
    names = {one.lower() for one in wanted}
    found = []
    for token, mark in zip(tokens, special, strict=True):
        plain = token.lower()
        bare = plain.removeprefix("##").strip("▁").removesuffix("</w>")
        if mark:
            found.append(plain in names or "[special]" in names)
            continue
        is_sign = bool(bare) and not any(one.isalnum() for one in bare)
        found.append(plain in names or bare in names or ("[punctuation]" in names and is_sign))
    return found


def mass(rows: Rows, chosen: Sequence[bool]) -> Rows:
    """The share (..., v) of a sentence's attribution (..., v, k) on chosen tokens; NaN where there are no figures."""
    total = rows.sum(-1)
    found: Rows = np.divide(rows[..., list(chosen)].sum(-1), total, out=np.full(total.shape, np.nan), where=total > 0)
    return found


def mean(values: NDArray[np.float64]) -> list[float | None]:
    """The mean over the sentences (b, v), of those that have a value; None where none has."""
    count = (~np.isnan(values)).sum(0)
    total = np.nansum(values, axis=0)
    return [round(float(one) / int(n), 5) if n else None for one, n in zip(total, count, strict=True)]
