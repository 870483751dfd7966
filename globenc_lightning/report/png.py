"""Encodes pictures as PNG files that hold a table of at most 256 colours and one byte per pixel.

Such a file is a third as large as one with three bytes per pixel and is made in a quarter of the time. A picture with
at most 256 colours, as a heatmap of a short text has, is encoded exactly. In any other picture the commonest colours
stay exact and the others become the nearest colour of the table.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from globenc_lightning.report.canvas import Picture

MOST_COLOURS = 256
COMMONEST = 64
"""So many of the commonest colours stay exact in any picture: paper, ink, lines and bands."""
MOST_CANDIDATES = 1024
LEVEL = 6
"""Pillow's `compress_level`: 9 saves 5 % of the bytes and takes five times as long, 3 takes half as long for 30 % more."""


def encoded(picture: Picture) -> bytes:
    """Return the PNG file of a picture (height, width, 3)."""
    indices, table = indexed(picture)
    image = Image.fromarray(indices)
    image.putpalette(table.tobytes())
    file = BytesIO()
    image.save(file, "PNG", compress_level=LEVEL)
    return file.getvalue()


def indexed(picture: Picture) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a picture as places in a table of colours.

    Args:
        picture: (height, width, 3).

    Returns:
        The places (height, width), and the table (n, 3) with n of at most 256.
    """
    height, width = picture.shape[:2]
    pixels = picture[..., 0].astype(np.uint32)
    for channel in (1, 2):
        pixels <<= 8
        pixels |= picture[..., channel]
    pixels = pixels.ravel()
    # Neighbours are mostly alike, and what follows is done once for all that are.
    starts = np.flatnonzero(np.concatenate([[True], pixels[1:] != pixels[:-1]]))
    lengths = np.diff(starts, append=len(pixels))
    found = np.unique(pixels[starts])
    which = np.searchsorted(found, pixels[starts])
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.uint8)
    if len(colours) > MOST_COLOURS:
        colours, nearest = fewer(colours, np.bincount(which, weights=lengths))
        which = nearest[which]
    return which.astype(np.uint8).repeat(lengths).reshape(height, width), colours


def fewer(colours: NDArray[np.uint8], weights: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Choose 256 of more colours so that none is far from its nearest: the commonest, then always the farthest one.

    Args:
        colours: (n, 3), n of more than 256.
        weights: (n,) how many pixels have each.

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
    # Whole numbers below 2**24: exact. What is left out of the squared distance is the same for every place.
    nearest = ((table * table).sum(axis=1) - 2 * points @ table.T).argmin(axis=1)
    return colours[chosen], nearest
