"""A whole training in one picture: one row per validation.

TensorBoard keeps a handful of images per tag and promises only the latest, so a development over time is drawn into one
image that is logged anew at every validation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

from globenc_lightning.report import canvas
from globenc_lightning.report.heatmap import TABLE


def filmstrip(
    rows: ArrayLike,
    tokens: Sequence[str],
    steps: Sequence[int],
    *,
    title: str,
    subtitle: str = "",
    scale_label: str = "share of the validation's largest value",
    marked: Sequence[Collection[int]] = (),
    mark_label: str = "decided token",
    others: Collection[int] = (),
) -> canvas.Picture:
    """Draw one row of token attributions per validation, the newest at the bottom.

    The rows shrink as the history grows: 22 pixels each up to 29 validations, one pixel each from 640 on. So the
    picture's height stays about the same up to 640 validations and then grows by one pixel per validation.

    Args:
        rows: Attributions (n, k), one row per validation, oldest first, non-negative, in any unit. A row of NaN, a
            validation without a result, is hatched in grey, as is a single NaN.
        tokens: The k tokens. Made readable, and shortened where they are very long.
        steps: The n training steps of the rows. As many are written as fit, the first and the last always.
        title: The picture's title, wrapped where needed.
        subtitle: A second, quieter text; may be empty.
        scale_label: Name of the colour scale.
        marked: The tokens, counted from 0, that each validation decided about: they are framed. None when empty.
        mark_label: What a framed token is.
        others: The rows of validations that another text was shown of (another choice, say). They are hatched.

    Returns:
        The picture (height, width, 3).

    Raises:
        ValueError: If `rows` is not (n, k) with at least one value, k is not the number of tokens, or n is not the
            number of steps.
    """
    values = canvas.checked_grid(rows, tokens, "rows")
    if len(values) != len(steps):
        raise ValueError(f"`rows` has {len(values)} rows for {len(steps)} steps; give one step per row.")
    marks = np.zeros(values.shape, dtype=bool)
    for row, places in enumerate(marked):
        marks[row, [place for place in places if place < len(tokens)]] = row not in others
    return canvas.labelled_grid(
        values,
        [str(int(step)) for step in steps],
        tokens,
        cell_height=max(1, min(22, 640 // len(values))),
        cell_width=canvas.cell_width_for(len(tokens)),
        title=title,
        subtitle=subtitle,
        scale_label=scale_label,
        row_axis="step ↓",
        column_axis="token",
        table=TABLE,
        marks=marks,
        mark_label=mark_label,
        others=others,
    )
