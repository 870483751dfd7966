"""Signed contributions of one example over a training, in two-sided colours, beside the score and what they leave out.

Each validation's row is divided by its largest contribution, whichever its sign. Blue to white to red can be told apart
with every common kind of colour blindness, and nothing is told by brightness alone: towards either end both get darker.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.measurement import HistoryEntry
from globenc_lightning.report import canvas

TABLE = "RdBu_r"
"""Colour table of signed contributions: blue speaks against the score, white says nothing, red speaks for it."""
SCALE = "share of the largest; red raises, blue lowers"
COLUMNS = ("score", "left out")
"""What stands beside each row: the score that is explained, and the part of it that no token contributes."""
NOTE = "left out: the score less the sum of all contributions, which biases contribute"
TITLE = "Example {example}: contributions to the score over training"


class Signed(NamedTuple):
    """Signed contributions of one example.

    Attributes:
        rows: (n, k) contributions, one row per validation; NaN where there are none.
        steps: (n).
        score: (n) the score that is explained; NaN where unknown.
        left_out: (n) the score less the sum of the row.
    """

    rows: NDArray[np.float64]
    steps: list[int]
    score: list[float]
    left_out: list[float]


def timeline(moments: Sequence[tuple[int, HistoryEntry | None]], example: int) -> Signed | None:
    """Returns an example's contributions at every validation; None where none of them has any.

    Args:
        moments: the validations: a step, and what was found; None where the analysis failed.
        example: the example's number.
    """
    known = [entry for _, entry in moments if entry is not None and example < len(entry.signed)]
    sizes = [len(entry.signed[example]) for entry in known if len(entry.signed[example])]
    if not sizes:
        return None
    size = sizes[-1]
    rows, score, left_out = [], [], []
    for _, entry in moments:
        if entry is None or example >= len(entry.signed) or len(entry.signed[example]) != size:
            rows.append(np.full(size, np.nan))
            score.append(math.nan)
            left_out.append(math.nan)
            continue
        rows.append(entry.signed[example].double().numpy())
        score.append(float(entry.score[example]) if len(entry.score) else math.nan)
        left_out.append(float(entry.left_out[example]))
    return Signed(np.stack(rows), [step for step, _ in moments], score, left_out)


def two_sided(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """Divide every row (n, k) by its largest magnitude, and move it to 0..1 with nothing at a half; NaN stays."""
    finite = np.isfinite(rows)
    filled = np.where(finite, rows, 0.0).astype(np.float64)
    largest = np.abs(filled).max(axis=1, keepdims=True, initial=0.0)
    part = np.divide(filled, largest, out=np.zeros_like(filled), where=largest > 0)
    return np.where(finite, (part + 1) / 2, np.nan)


def number(value: float) -> str:
    """Returns a score with two decimals, or one digit where it is smaller than these, and a minus sign that is one."""
    if math.isnan(value):
        return "–"
    text = f"{value:.2f}" if abs(value) >= 0.005 or not value else f"{value:.0e}"
    return text.replace("-", "−")


def contributions(
    found: Signed, tokens: Sequence[str], *, title: str, subtitle: str = "", others: Collection[int] = ()
) -> canvas.Picture:
    """Draw one row of signed contributions per validation, the newest at the bottom.

    Args:
        found: the contributions.
        tokens: the k tokens. Made readable, and shortened where they are very long.
        title: the picture's title, wrapped where needed.
        subtitle: a second, quieter text; may be empty.
        others: the rows of validations that another text was shown of. They are hatched.

    Returns:
        The picture (height, width, 3).

    Raises:
        ValueError: the rows are not (n, k) with at least one value, or k is not the number of tokens.
    """
    values = canvas.checked_grid(found.rows, tokens, "rows")
    values = np.where(np.isin(np.arange(len(values)), list(others))[:, None], 0.0, values)
    part = two_sided(values)
    cell_height, cell_width = max(1, min(22, 640 // len(values))), canvas.cell_width_for(len(tokens))
    steps = [str(int(step)) for step in found.steps]
    small = canvas.SMALL_SIZE
    told = {row: (number(found.score[row]), number(found.left_out[row])) for row in _told(found, others)}
    columns = [[name, *(texts[place] for texts in told.values())] for place, name in enumerate(COLUMNS)]
    widths = [max(canvas.text_width(text, small) for text in texts) for texts in columns]
    grid = canvas.grid_layout(steps, tokens, cell_height=cell_height, cell_width=cell_width, top=0)
    right = grid.left + len(tokens) * cell_width
    ends = [right + 14 + widths[0], right + 14 + widths[0] + 18 + widths[1]]
    width = max(grid.width, ends[1] + canvas.MARGIN)
    missing = bool(np.isnan(part).any())
    above = np.concatenate([canvas.header(title, subtitle, width), _scale_bar(width, missing, bool(others))])
    layout = canvas.grid_layout(steps, tokens, cell_height=cell_height, cell_width=cell_width, top=len(above))
    picture = canvas.blank(layout.height, width)
    picture[: len(above)] = above
    painted = canvas.cells(part, cell_height, cell_width, TABLE)
    for row in others:
        top = row * cell_height
        painted[top : top + cell_height] = canvas.other_hatch(cell_height, painted.shape[1], top)
    picture[layout.top : layout.top + len(painted), layout.left : right] = painted
    canvas.stamp_all(picture, [(label.mask, label.x, label.y) for label in layout.labels])
    for place, name in enumerate(COLUMNS):
        _right(picture, name, ends[place], layout.row_axis_y)
    line = canvas.line_height(small)
    for row in canvas.thinned(len(values), cell_height, line):
        middle = layout.top + row * cell_height + (cell_height - line) // 2
        for place, text in enumerate(told.get(row, ())):
            _right(picture, text, ends[place], middle)
    step_name = canvas.text_mask("step ↓", small)
    left = max(canvas.MARGIN, layout.left - 8 - step_name.shape[1])
    canvas.stamp(picture, step_name, left, layout.row_axis_y, canvas.MUTED)
    canvas.stamp(picture, canvas.text_mask("token", small), layout.left, layout.column_axis_y, canvas.MUTED)
    return picture


def _told(found: Signed, others: Collection[int]) -> list[int]:
    """The rows beside which numbers stand."""
    return [row for row, values in enumerate(found.rows) if row not in others and np.isfinite(values).any()]


def _right(picture: canvas.Picture, text: str, end: int, top: int) -> None:
    mask = canvas.text_mask(text, canvas.SMALL_SIZE)
    canvas.stamp(picture, mask, end - mask.shape[1], top, canvas.MUTED)


def _scale_bar(width: int, missing: bool, others: bool) -> canvas.Picture:
    """The colours from -1 to 1 with their name, the keys of hatches, and what is left out."""
    bar_width, bar_height, small = 180, 12, canvas.SMALL_SIZE
    left = canvas.MARGIN + bar_width + 14
    pitch = canvas.line_height(small) + 2
    lines = [line for text in (SCALE, NOTE) for line in canvas.wrap(text, small, width - left - canvas.MARGIN)]
    keys = [("no value", canvas.hatch)] * missing + [("another text", canvas.other_hatch)] * others
    rows = len(lines) + len(keys)
    picture = canvas.blank(max(bar_height + 4 + canvas.line_height(small - 1), rows * pitch) + 12, width)
    ramp = canvas.colour_table(TABLE)[np.round(np.linspace(0, 255, bar_width)).astype(np.intp)]
    picture[2 : 2 + bar_height, canvas.MARGIN : canvas.MARGIN + bar_width] = ramp
    for share, text in ((0.0, "−1"), (0.5, "0"), (1.0, "1")):
        x = canvas.MARGIN + round(share * (bar_width - 1))
        picture[2 + bar_height : 5 + bar_height, x] = canvas.MUTED
        mask = canvas.text_mask(text, small - 1)
        x = min(max(x - mask.shape[1] // 2, canvas.MARGIN), canvas.MARGIN + bar_width - mask.shape[1])
        canvas.stamp(picture, mask, x, bar_height + 5, canvas.MUTED)
    for place, line in enumerate(lines):
        canvas.stamp(picture, canvas.text_mask(line, small), left, place * pitch, canvas.MUTED)
    for place, (text, hatched) in enumerate(keys, len(lines)):
        picture[place * pitch + 2 : place * pitch + 2 + bar_height, left : left + 24] = hatched(bar_height, 24)
        canvas.stamp(picture, canvas.text_mask(text, small), left + 32, place * pitch, canvas.MUTED)
    return picture
