"""Puts text on pictures: coverage masks are blended into them as ink.

Coverage counts in steps of 32 of 255. All text of one ink then has 9 colours instead of 256, which no eye tells apart,
and a picture has few enough of them for a small file (`png`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""A picture (height, width, 3) or a coverage mask (height, width)."""

PAPER = 255
INK = (32, 36, 42)


def stamp(picture: Picture, mask: Picture, x: int, y: int, ink: tuple[int, int, int] = INK) -> None:
    """Blend `ink` into `picture` (height, width, 3), in place, where `mask` (h, w), placed at x, y, covers it."""
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + mask.shape[1], picture.shape[1]), min(y + mask.shape[0], picture.shape[0])
    if x1 <= x0 or y1 <= y0:
        return
    cover, place = mask[y0 - y : y1 - y, x0 - x : x1 - x], picture[y0:y1, x0:x1]
    if place.min() == PAPER:
        place[:] = _on_paper(ink).take(cover, axis=0)
    else:
        place[:] = _blended(place.astype(np.int32), cover[..., None], ink)


def stamp_all(picture: Picture, placed: Sequence[tuple[Picture, int, int]], ink: tuple[int, int, int] = INK) -> None:
    """Blend masks into a picture, in place, as one: for texts near each other, whose empty corners may overlap.

    Args:
        picture: (height, width, 3).
        placed: Each mask (h, w) with the x and y of its upper left corner.
        ink: The colour.
    """
    if not placed:
        return
    left, top = min(x for _, x, _ in placed), min(y for _, _, y in placed)
    right, bottom = max(x + mask.shape[1] for mask, x, _ in placed), max(y + mask.shape[0] for mask, _, y in placed)
    cover = np.zeros((bottom - top, right - left), dtype=np.uint8)
    for mask, x, y in placed:
        part = cover[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]]
        np.maximum(part, mask, out=part)
    stamp(picture, cover, left, top, ink)


@lru_cache(maxsize=64)
def _on_paper(ink: tuple[int, int, int]) -> Picture:
    """The colours (256, 3) of an ink on paper, by coverage."""
    return _blended(np.full((256, 3), PAPER), np.arange(256)[:, None], ink).astype(np.uint8)


def _blended(below: NDArray[np.integer], cover: NDArray[np.integer], ink: tuple[int, int, int]) -> NDArray[np.integer]:
    """Blend an ink into colours (..., 3) of a signed type by its coverage (..., 1), 0 to 255."""
    stepped = np.minimum((cover.astype(np.int32) + 16) // 32 * 32, 255)
    return below + (np.array(ink, dtype=np.int32) - below) * stepped // 255
