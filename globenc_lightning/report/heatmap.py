"""Heatmaps of one example: the rollout's readout row through the layers, and one layer's whole map."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

from globenc_lightning.report import canvas

TABLE = "magma_r"
"""Colour table of all attribution pictures: light for nothing, dark for the row's largest value."""


def layers_by_tokens(
    rows: ArrayLike,
    tokens: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    scale_label: str = "share of the layer's largest value",
    marked: Collection[int] = (),
    mark_label: str = "decided token",
) -> canvas.Picture:
    """Draw the rollout's readout row of every layer over the tokens.

    Layer 1 is at the bottom and the last layer on top, as encoders are drawn: reading upwards is reading through the
    network. Each row is divided by its own largest value, since an unnormalised rollout grows from layer to layer.

    Args:
        rows: Readout row of the rollout for each layer, (l, k), non-negative, in any unit. NaN cells are hatched.
        tokens: The k tokens. Made readable, and shortened where they are very long.
        title: The picture's title, wrapped where needed.
        subtitle: A second, quieter text; may be empty.
        scale_label: Name of the colour scale.
        marked: The tokens, counted from 0, that were decided about: their columns are framed.
        mark_label: What a framed token is.

    Returns:
        The picture (height, width, 3). All tokens are labelled up to 128 of them, every m-th beyond that.

    Raises:
        ValueError: If `rows` is not (l, k) with at least one value, or k is not the number of tokens.
    """
    values = canvas.checked_grid(rows, tokens, "rows")
    layers = len(values)
    marks = np.zeros(values.shape, dtype=bool)
    marks[:, list(marked)] = True
    cell_width = canvas.cell_width_for(len(tokens))
    return canvas.labelled_grid(
        values[::-1],
        [str(layer) for layer in range(layers, 0, -1)],
        tokens,
        cell_height=max(1, min(36, max(24, cell_width), max(16, 400 // layers), 768 // layers)),
        cell_width=cell_width,
        title=title,
        subtitle=subtitle,
        scale_label=scale_label,
        row_axis="layer",
        column_axis="token",
        table=TABLE,
        marks=marks,
        mark_label=mark_label,
    )


def tokens_by_tokens(
    matrix: ArrayLike,
    tokens: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    scale_label: str = "share of the row's largest value",
    marked: Collection[int] = (),
    mark_label: str = "decided token",
) -> canvas.Picture:
    """Draw one layer's map from every attended token to every receiving token.

    Args:
        matrix: The map (q, k), q = k, non-negative, in any unit. Rows are the receiving tokens q, columns the attended
            tokens k; each row is divided by its own largest value. NaN cells are hatched.
        tokens: The k tokens. Made readable, and shortened where they are very long.
        title: The picture's title, wrapped where needed.
        subtitle: A second, quieter text; may be empty.
        scale_label: Name of the colour scale.
        marked: The tokens, counted from 0, that were decided about: their rows are framed.
        mark_label: What a framed token is.

    Returns:
        The picture (height, width, 3). All tokens are labelled up to 128 of them, every m-th beyond that.

    Raises:
        ValueError: If `matrix` is not square with at least one value, or k is not the number of tokens.
    """
    values = canvas.checked_grid(matrix, tokens, "matrix")
    if values.shape[0] != values.shape[1]:
        raise ValueError(f"`matrix` must have as many receiving as attended tokens, got shape {values.shape}.")
    marks = np.zeros(values.shape, dtype=bool)
    marks[list(marked)] = True
    cell = max(1, min(48, max(16, 720 // len(tokens)), 2048 // len(tokens)))
    return canvas.labelled_grid(
        values,
        [canvas.readable(token, canvas.LABEL_LIMIT) for token in tokens],
        tokens,
        cell_height=cell,
        cell_width=cell,
        title=title,
        subtitle=subtitle,
        scale_label=scale_label,
        row_axis="receiving token ↓",
        column_axis="attended token →",
        table=TABLE,
        marks=marks,
        mark_label=mark_label,
    )
