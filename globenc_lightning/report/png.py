"""Encodes pictures as PNG files that hold a table of at most 256 colours and one byte per pixel.

Such a file is a third as large as one with three bytes per pixel and is made in a quarter of the time. A picture with
at most 256 colours, as most heatmaps have, is encoded exactly. In one with more the commonest colours stay exact and
the others become the nearest colour of the table; if one of them were off by more than `TOLERANCE`, the picture keeps
its three bytes per pixel.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from globenc_lightning.report.canvas import Picture

MOST_COLOURS = 256
TOLERANCE = 24
"""So far may red, green or blue of a pixel be off, of 255."""
COMMONEST = 96
"""So many of the commonest colours stay exact in any picture: paper, ink, lines and bands."""
MOST_CANDIDATES = 1024
LEVEL = 6
"""Pillow's `compress_level`: 9 saves 5 % of the bytes and takes five times as long, 3 half as long for 30 % more."""


def encoded(picture: Picture) -> bytes:
    """Return the PNG file of a picture (height, width, 3)."""
    found = indexed(picture)
    if found is None:
        image = Image.fromarray(picture)
    else:
        image = Image.fromarray(found[0])
        image.putpalette(found[1].tobytes())
    file = BytesIO()
    image.save(file, "PNG", compress_level=LEVEL)
    return file.getvalue()


def indexed(picture: Picture) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
    """Return a picture as places in a table of colours.

    Args:
        picture: (height, width, 3).

    Returns:
        The places (height, width), and the table (n, 3) with n of at most 256. None where 256 colours are too few.
    """
    # Rows of a heatmap and pixels of a row are mostly like those before: what follows is done once for all that are.
    fresh = np.concatenate([[True], (picture[1:] != picture[:-1]).any(axis=(1, 2))])
    rows = picture[fresh]
    packed = rows[..., 0].astype(np.uint32)
    for channel in (1, 2):
        packed <<= 8
        packed |= rows[..., channel]
    pixels = packed.ravel()
    starts = np.flatnonzero(np.concatenate([[True], pixels[1:] != pixels[:-1]]))
    lengths = np.diff(starts, append=len(pixels))
    values = np.unique(pixels[starts])
    places = np.searchsorted(values, pixels[starts])
    table = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1).astype(np.uint8)
    if len(table) > MOST_COLOURS:
        colours = table
        table, nearest = fewer(colours, np.bincount(places, lengths).astype(np.float64))
        if np.abs(colours.astype(np.int16) - table[nearest]).max() > TOLERANCE:
            return None
        places = nearest[places]
    return places.astype(np.uint8).repeat(lengths).reshape(packed.shape)[fresh.cumsum() - 1], table


def fewer(colours: NDArray[np.uint8], weights: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Choose 256 of more colours so that none is far from its nearest: the commonest, then always the farthest one.

    Args:
        colours: (n, 3), n of more than 256.
        weights: (n,) how common each is.

    Returns:
        The table (256, 3), and for each colour the place (n,) of the nearest one in it.
    """
    commonest = np.argsort(-weights, kind="stable")
    candidates = commonest
    if len(colours) > MOST_CANDIDATES:
        # Of thousands of shades that lie close together the commonest one is tried.
        coarse = colours[commonest].astype(np.int32) // 8 @ (1024, 32, 1)
        candidates = commonest[np.sort(np.unique(coarse, return_index=True)[1])]
    points = colours.astype(np.float32)
    chosen = commonest[:COMMONEST].tolist()
    red, green, blue = points[candidates].T
    distances = np.full(len(candidates), np.inf, dtype=np.float32)
    for place in range(MOST_COLOURS):
        if place >= COMMONEST:
            chosen.append(int(candidates[distances.argmax()]))
        r, g, b = points[chosen[place]]
        np.minimum(distances, (red - r) ** 2 + (green - g) ** 2 + (blue - b) ** 2, out=distances)
    table = points[chosen]
    # The squared distance but for what is the same at every place: whole numbers below 2**24, so it is exact.
    factors = np.concatenate([-2 * table, (table * table).sum(axis=1, keepdims=True)], axis=1)
    nearest = (np.pad(points, ((0, 0), (0, 1)), constant_values=1) @ factors.T).argmin(axis=1)
    return colours[chosen], nearest
