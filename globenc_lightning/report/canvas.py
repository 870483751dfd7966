"""What all pictures share: fonts, colour tables, text that always fits, and the labelled grid of cells.

Pictures are plain `numpy.uint8` arrays (height, width, 3). Text is rendered by Pillow into small coverage masks, which
are cached, since a probe set shows the same tokens at every validation. Matplotlib lends its fonts and its colour
tables and is imported when the first picture is drawn. Characters that its font does not have are drawn with a font of
the system, where there is one (`fonts`).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from globenc_lightning.report import fonts as system_fonts
from globenc_lightning.report.fonts import Fonts
from globenc_lightning.report.ink import INK, PAPER, Picture, stamp, stamp_all

MUTED = (96, 103, 112)
MISSING = 236
MISSING_HATCH = 176
OTHER = (226, 236, 244)
OTHER_HATCH = (150, 180, 205)
MARK = (0, 122, 204)
"""The frame around what was decided: it stands out from all of the colour table, from cream to black."""

MARGIN = 24
MIN_WIDTH = 560
TITLE_SIZE = 18
TEXT_SIZE = 13
SMALL_SIZE = 12
LABEL_LIMIT = 20

_SUPERSAMPLING = 3
_SLANT = math.radians(45)


@lru_cache(maxsize=64)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, from the copy that comes with matplotlib, at `size` pixels."""
    return ImageFont.truetype(str(system_fonts.dejavu(bold)), size)


def _drawable() -> Fonts:
    """The code points that can be drawn."""
    return system_fonts.installed()


@lru_cache(maxsize=16)
def colour_table(name: str) -> Picture:
    """Return matplotlib's colour table `name` as (256, 3) uint8."""
    import matplotlib

    return np.round(matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).astype(np.uint8)


def readable(text: str, limit: int | None = None, fonts: Fonts | None = None) -> str:
    r"""Rewrite `text` so that every part of it can be seen on one line.

    Control characters become their Python escape (`\n`, `\x00`), everything without a visible glyph in any font of this
    machine (zero-width and direction marks, lone surrogates; CJK and most emoji where no font for them is installed)
    becomes its code point (`U+4E2D`, runs as `U+4E2D+6587`, `‹U+4E2D›` beside other text), spaces at either end become
    `␣`, and the empty string becomes `(empty)`.

    Args:
        text: Any string, a token or a title.
        limit: Largest number of characters in the result; the last one is then an ellipsis. None: no limit.
        fonts: The fonts beside DejaVu Sans that it will be drawn with; those of this machine when None.

    Returns:
        The text to draw.
    """
    if not text:
        return "(empty)"
    return _rewritten(text if limit is None else text[: limit + 1], limit, fonts or _drawable())


def visible(text: str, limit: int | None = None) -> str:
    """Rewrite `text` as `readable` does, for those who bring fonts of their own: CJK and emoji stay as they are.

    Args:
        text: Any string, a token or a title.
        limit: Largest number of characters in the result; the last one is then an ellipsis. None: no limit.

    Returns:
        The text to show.
    """
    if not text:
        return "(empty)"
    return _rewritten(text if limit is None else text[: limit + 1], limit, None)


@lru_cache(maxsize=8192)
def _rewritten(text: str, limit: int | None, fonts: Fonts | None) -> str:
    inner = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    runs: list[tuple[bool, str]] = []
    for character in inner:
        category = unicodedata.category(character)
        if category == "Cc":
            piece, coded = character.encode("unicode_escape").decode("ascii"), False
        elif character != " " and (category[0] in "CZ" or (fonts is not None and ord(character) not in fonts)):
            piece, coded = f"+{ord(character):04X}", True
        else:
            piece, coded = character, False
        if coded and runs and runs[-1][0]:
            runs[-1] = (True, runs[-1][1] + piece)
        else:
            runs.append((coded, f"U{piece}" if coded else piece))
    # Beside other text a code point needs an end: U+202Eabc could be anything.
    pieces = [f"‹{piece}›" if coded and len(runs) > 1 else piece for coded, piece in runs]
    end = len(text) - start - len(inner) if inner else 0
    result = "".join(["␣" * start, *pieces, "␣" * end])
    return result if limit is None or len(result) <= limit else result[: limit - 1] + "…"


def line_height(size: int) -> int:
    """Return the height in pixels of one line of text at `size`."""
    return sum(font(size).getmetrics())


def text_width(text: str, size: int, bold: bool = False) -> int:
    """Return the width in pixels that `text` takes on one line."""
    return text_mask(text, size, bold).shape[1]


def text_mask(text: str, size: int, bold: bool = False) -> Picture:
    """Render one line of text as a coverage mask (line height, width) of uint8; treat the result as read-only."""
    return _text_mask(text, size, bold, _drawable())


@lru_cache(maxsize=4096)
def _text_mask(text: str, size: int, bold: bool, fonts: Fonts) -> Picture:
    runs = fonts.runs(text)
    if all(file is None for _, file in runs):
        mask = _own_mask(text, size, bold)
    else:
        mask = np.concatenate(
            [_own_mask(run, size, bold) if file is None else _other_mask(run, size, file) for run, file in runs], axis=1
        )
    mask.flags.writeable = False
    return mask


def _own_mask(text: str, size: int, bold: bool) -> Picture:
    """One line of text in DejaVu Sans."""
    face = font(size, bold)
    ascent, descent = face.getmetrics()
    left, _, right, _ = face.getbbox(text, anchor="ls")
    left, right = min(math.floor(left), 0), max(math.ceil(right), math.ceil(face.getlength(text)), 1)
    image = Image.new("L", (right - left, ascent + descent))
    ImageDraw.Draw(image).text((-left, ascent), text, fill=255, font=face, anchor="ls")
    return np.asarray(image)


def _other_mask(text: str, size: int, file: str) -> Picture:
    """One line of text in a font of the system, made smaller where its letters are higher than a line."""
    ascent, descent = font(size).getmetrics()
    try:
        face, native = system_fonts.face(file, size)
        inked, base = system_fonts.ink(text, face)
    except Exception:
        # A single letter was drawn, the run of them is not: at least its code points are seen.
        return _own_mask("".join(f"‹U+{ord(character):04X}›" for character in text), size, False)
    below = inked.height - base
    ratio = min(size / native, *(room / has for room, has in ((ascent, base), (descent, below)) if has > 0))
    if ratio != 1:
        shape = (max(1, round(inked.width * ratio)), max(1, round(inked.height * ratio)))
        inked = inked.resize(shape, Image.Resampling.BOX if ratio < 0.5 else Image.Resampling.BILINEAR)
    mask = np.zeros((ascent + descent, inked.width), dtype=np.uint8)
    top = min(max(0, ascent - round(base * ratio)), ascent + descent - inked.height)
    mask[top : top + inked.height] = np.asarray(inked)
    return mask


@lru_cache(maxsize=4096)
def _length(text: str, size: int, bold: bool, fonts: Fonts) -> float:
    """The width of a text in pixels, in fractions where one font draws it."""
    if all(file is None for _, file in fonts.runs(text)):
        return font(size, bold).getlength(text)
    return _text_mask(text, size, bold, fonts).shape[1]


@lru_cache(maxsize=4096)
def _slanted_mask(text: str, size: int, fonts: Fonts) -> tuple[Picture, int, int]:
    """Render text rising to the right at 45 degrees: the mask and where in it (x, y) the text ends."""
    wide = Image.fromarray(_text_mask(text, size * _SUPERSAMPLING, False, fonts))
    turned = wide.rotate(math.degrees(_SLANT), resample=Image.Resampling.BILINEAR, expand=True)
    end_x = (turned.width + wide.width * math.cos(_SLANT)) / 2 / _SUPERSAMPLING
    end_y = (turned.height - wide.width * math.sin(_SLANT)) / 2 / _SUPERSAMPLING
    small = turned.reduce(_SUPERSAMPLING)
    mask = np.asarray(small)
    mask.flags.writeable = False
    return mask, round(end_x), round(end_y)


def wrap(text: str, size: int, width: int, bold: bool = False, fonts: Fonts | None = None) -> list[str]:
    """Break `text` into lines of at most `width` pixels, at spaces and line ends, inside a word where it must be.

    Args:
        text: The text; each of its own line ends starts a new line.
        size: Font size in pixels.
        width: Room in pixels.
        bold: Whether the bold face is used.
        fonts: The fonts beside DejaVu Sans that it will be drawn with; those of this machine when None.

    Returns:
        The lines, readable, in order; none for an empty text.
    """
    fonts = fonts or _drawable()
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in readable(paragraph, fonts=fonts).split(" ") if paragraph else [""]:
            longer = f"{line} {word}" if line else word
            if _length(longer, size, bold, fonts) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while _length(word, size, bold, fonts) > width and len(word) > 1:
                fitting = len(word) - 1
                while fitting > 1 and _length(word[:fitting], size, bold, fonts) > width:
                    fitting -= 1
                lines.append(word[:fitting])
                word = word[fitting:]
            line = word
        lines.append(line)
    return lines


def blank(height: int, width: int) -> Picture:
    """Return an empty picture (height, width, 3)."""
    return np.full((height, width, 3), PAPER, dtype=np.uint8)


def paragraph(text: str, width: int, *, size: int, ink: tuple[int, int, int], bold: bool = False) -> Picture:
    """Set `text` in as many lines as it needs: (height, width, 3), with the page margin at the left and the right."""
    lines = wrap(text, size, width - 2 * MARGIN, bold)
    pitch = round(size * 1.35)
    picture = blank(len(lines) * pitch, width)
    for number, line in enumerate(lines):
        if line:
            mask = text_mask(line, size, bold)
            stamp(picture, mask, MARGIN, number * pitch + (pitch - mask.shape[0]) // 2, ink)
    return picture


def header(title: str, subtitle: str, width: int) -> Picture:
    """Set title and subtitle, wrapped, over a picture of `width` pixels: (height, width, 3)."""
    parts = [
        blank(MARGIN - 6, width),
        paragraph(title, width, size=TITLE_SIZE, ink=INK, bold=True),
        blank(4, width),
        paragraph(subtitle, width, size=TEXT_SIZE, ink=MUTED),
        blank(12, width),
    ]
    return np.concatenate(parts)


def thinned(count: int, pitch: float, room: int) -> list[int]:
    """Choose which of `count` labels, `pitch` pixels apart, are shown so that `room` pixels stay between any two.

    The first and the last are always shown.

    Args:
        count: Number of labels, at least one.
        pitch: Distance of neighbours in pixels.
        room: Smallest allowed distance of shown labels in pixels.

    Returns:
        The positions of the shown labels, ascending.
    """
    stride = max(1, math.ceil(room / pitch))
    shown = list(range(0, count, stride))
    if shown[-1] != count - 1:
        if len(shown) > 1 and (count - 1 - shown[-1]) < stride:
            shown.pop()
        shown.append(count - 1)
    return shown


class Label(NamedTuple):
    """A rendered text, the pixel of the picture where its upper left corner goes, and the row or column it names."""

    mask: Picture
    x: int
    y: int
    row: int | None = None
    column: int | None = None


class ColumnStyle(NamedTuple):
    """How the labels under columns are set.

    Attributes:
        size: Font size in pixels.
        slope: Angle in degrees: 0 lies flat, 45 slants, 90 stands upright.
        texts: The label of every column.
        shown: The columns whose label is shown.
    """

    size: int
    slope: int
    texts: list[str]
    shown: list[int]


def column_style(texts: Sequence[str], cell: int) -> ColumnStyle:
    """Choose how `texts`, ready to draw, are set under columns of `cell` pixels.

    Labels lie flat where each fits into its column, slant where there is room for slanted lines, and else stand
    upright. Columns narrower than a line of text show every m-th label.
    """
    size = TEXT_SIZE if cell >= 24 else SMALL_SIZE if cell >= 17 else SMALL_SIZE - 1
    shown = thinned(len(texts), cell, line_height(size) - 1)
    if cell >= max(text_width(texts[column], size) for column in shown) + 6:
        slope = 0
    else:
        slope = 45 if round(cell * math.sin(_SLANT)) >= line_height(size) else 90
    return ColumnStyle(size, slope, list(texts), shown)


def column_labels(tokens: Sequence[str], cell: int, left: int, top: int) -> list[Label]:
    """Place the tokens' labels under columns of `cell` pixels that start at x = `left`; `top` is the labels' upper end.

    Args:
        tokens: Texts of the columns, (k,).
        cell: Width of a column in pixels.
        left: x of the first column's left edge.
        top: y under which the labels hang.

    Returns:
        One placed label per shown column. x is negative where `left` gives too little room to a slanted label.
    """
    size, slope, texts, shown = column_style([readable(token, LABEL_LIMIT) for token in tokens], cell)
    masks = [text_mask(texts[column], size) for column in shown]
    centres = [left + column * cell + (cell - 1) // 2 for column in shown]
    if slope == 0:
        return [
            Label(mask, x - mask.shape[1] // 2, top, column=column)
            for mask, x, column in zip(masks, centres, shown, strict=True)
        ]
    if slope == 45:
        slanted = [_slanted_mask(texts[column], size, _drawable()) for column in shown]
        lowest = min(end_y for _, _, end_y in slanted)
        return [
            Label(mask, x - end_x + 3, top + lowest - end_y, column=column)
            for (mask, end_x, end_y), x, column in zip(slanted, centres, shown, strict=True)
        ]
    return [
        Label(np.rot90(mask), x - mask.shape[0] // 2, top, column=column)
        for mask, x, column in zip(masks, centres, shown, strict=True)
    ]


def row_labels(texts: Sequence[str], cell: int, right: int, top: int) -> list[Label]:
    """Place labels, ending at x = `right`, beside rows of `cell` pixels from y = `top` on, thinned where needed."""
    size = SMALL_SIZE
    # Where not every row can have a label, a few well apart read better than as many as possible.
    room = line_height(size) - 1
    labels = []
    for row in thinned(len(texts), cell, room if cell >= room else 2 * room):
        mask = text_mask(texts[row], size)
        labels.append(Label(mask, right - mask.shape[1], top + row * cell + (cell - 1 - mask.shape[0]) // 2, row=row))
    return labels


def shares(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Divide every row of `values` (rows, k) by its own largest finite value.

    Args:
        values: Non-negative magnitudes; infinite ones count as missing.

    Returns:
        (rows, k) in 0..1, NaN where there is no value. Negative values and rows without a positive value give 0.
    """
    finite = np.isfinite(values)
    filled = np.where(finite, values, 0.0).astype(np.float64)
    largest = filled.max(axis=1, keepdims=True)
    # Two steps, since the reciprocal of a subnormal largest value overflows.
    part = np.divide(filled, largest, out=np.zeros_like(filled), where=largest > 0)
    return np.where(finite, np.clip(part, 0.0, 1.0), np.nan)


def other_hatch(height: int, width: int, top: int = 0) -> Picture:
    """Return the blue hatch (height, width, 3), the other way round, for a row that is of another text."""
    picture = np.full((height, width, 3), OTHER, dtype=np.uint8)
    picture[np.subtract.outer(np.arange(top, top + height), np.arange(width)) % 6 < 2] = OTHER_HATCH
    return picture


def frame(picture: Picture, marks: NDArray[np.bool_], cell_height: int, cell_width: int, left: int, top: int) -> None:
    """Draw a frame around the marked cells, in place: one around all that touch.

    Args:
        picture: (height, width, 3).
        marks: (rows, k) true for the marked cells.
        cell_height: height of a row in pixels.
        cell_width: width of a column in pixels.
        left: x of the first column's left edge.
        top: y of the first row's upper edge.
    """
    padded = np.pad(marks, 1)
    inner = padded[1:-1, 1:-1]
    thick = 2 if min(cell_height, cell_width) >= 6 else 1
    for row, column in zip(*np.nonzero(inner), strict=True):
        y, x = top + int(row) * cell_height, left + int(column) * cell_width
        # From the line between two cells to the next.
        y0, y1, x0, x1 = y - 1, y + cell_height, x - 1, x + cell_width
        if not padded[row, column + 1]:
            picture[y0 : y0 + thick, x0:x1] = MARK
        if not padded[row + 2, column + 1]:
            picture[y1 - thick : y1, x0:x1] = MARK
        if not padded[row + 1, column]:
            picture[y0:y1, x0 : x0 + thick] = MARK
        if not padded[row + 1, column + 2]:
            picture[y0:y1, x1 - thick : x1] = MARK


def runs(marks: Sequence[bool] | NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The stretches of true values: the first of each, and the one after its last."""
    edges = np.flatnonzero(np.diff(np.pad(np.asarray(marks, dtype=np.int8), 1)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def hatch(height: int, width: int, top: int = 0) -> Picture:
    """Return the grey hatch (height, width, 3) for missing values; `top` continues the pattern of a piece above it."""
    picture = np.full((height, width, 3), MISSING, dtype=np.uint8)
    picture[np.add.outer(np.arange(top, top + height), np.arange(width)) % 6 < 2] = MISSING_HATCH
    return picture


def cells(part: NDArray[np.float64], cell_height: int, cell_width: int, table: str) -> Picture:
    """Paint `part` (rows, k), in 0..1 or NaN, as cells: (rows * cell_height, k * cell_width, 3).

    Cells of eight pixels and more are parted by a thin line; missing values are hatched.
    """
    missing = np.isnan(part)
    index = np.round(np.where(missing, 0.0, part) * 255).astype(np.intp)
    # Columns first: repeating whole rows of pixels afterwards is a plain copy.
    picture = colour_table(table)[index].repeat(cell_width, axis=1).repeat(cell_height, axis=0)
    for row in np.flatnonzero(missing.any(axis=1)):
        top = int(row) * cell_height
        covered = missing[row].repeat(cell_width)
        picture[top : top + cell_height, covered] = hatch(cell_height, len(covered), top)[:, covered]
    if cell_height >= 8:
        picture[cell_height - 1 : -1 : cell_height] = PAPER
    if cell_width >= 8:
        picture[:, cell_width - 1 : -1 : cell_width] = PAPER
    return picture


class GridLayout(NamedTuple):
    """Where the parts of a labelled grid lie, in pixels from the picture's upper left corner."""

    width: int
    height: int
    left: int
    top: int
    labels: list[Label]
    row_axis_y: int
    column_axis_y: int


def grid_layout(
    row_texts: Sequence[str], tokens: Sequence[str], *, cell_height: int, cell_width: int, top: int
) -> GridLayout:
    """Lay out a grid of cells with its labels; `top` is where the name of the rows' axis starts.

    Args:
        row_texts: Labels of the rows, (rows,), ready to draw.
        tokens: Tokens of the columns, (k,), as they come from the tokenizer.
        cell_height: Height of a row in pixels.
        cell_width: Width of a column in pixels.
        top: Height of all that stands above.

    Returns:
        The layout of everything from `top` to the picture's lower edge.
    """
    overhang = max(0, (line_height(SMALL_SIZE) - cell_height) // 2)
    grid_top = top + line_height(SMALL_SIZE) + 6 + overhang
    under = grid_top + len(row_texts) * cell_height + 6
    at_zero = column_labels(tokens, cell_width, 0, under) + row_labels(row_texts, cell_height, -8, grid_top)
    left = MARGIN - min(0, *(label.x for label in at_zero))
    labels = [label._replace(x=label.x + left) for label in at_zero]
    bottom = max(label.y + label.mask.shape[0] for label in labels)
    right = max(left + len(tokens) * cell_width, *(label.x + label.mask.shape[1] for label in labels))
    return GridLayout(
        width=max(MIN_WIDTH, right + MARGIN),
        height=bottom + 6 + line_height(SMALL_SIZE) + MARGIN - 8,
        left=left,
        top=grid_top,
        labels=labels,
        row_axis_y=top,
        column_axis_y=bottom + 6,
    )


def scale_bar(
    table: str, label: str, width: int, *, missing: bool, mark_label: str = "", other_label: str = ""
) -> Picture:
    """Draw the colour scale from 0 to 1 with ticks and its name, and the keys of hatches and the frame.

    Args:
        table: Name of matplotlib's colour table.
        label: Name of the scale.
        width: Width in pixels.
        missing: Whether the hatch of missing values is explained.
        mark_label: What a framed cell is; no key when empty.
        other_label: What the other hatch is; no key when empty.

    Returns:
        The picture (height, width, 3).
    """
    bar_width, bar_height, gap = 180, 12, 14
    name_left = MARGIN + bar_width + gap
    name = wrap(label, SMALL_SIZE, width - name_left - MARGIN)
    pitch = line_height(SMALL_SIZE) + 2
    keys = [("missing", "no value")] if missing else []
    keys += [("other", other_label)] if other_label else []
    keys += [("mark", mark_label)] if mark_label else []
    lines = len(name) + len(keys)
    picture = blank(max(bar_height + 4 + line_height(SMALL_SIZE - 1), lines * pitch) + 12, width)
    # Every third colour: no eye tells it from all of them, and a picture has so many colours less.
    ramp = colour_table(table)[np.round(np.linspace(0, 85, bar_width)).astype(np.intp) * 3]
    picture[2 : 2 + bar_height, MARGIN : MARGIN + bar_width] = ramp
    for share, text in ((0.0, "0"), (0.5, "0.5"), (1.0, "1")):
        x = MARGIN + round(share * (bar_width - 1))
        picture[2 + bar_height : 5 + bar_height, x] = MUTED
        mask = text_mask(text, SMALL_SIZE - 1)
        x = min(max(x - mask.shape[1] // 2, MARGIN), MARGIN + bar_width - mask.shape[1])
        stamp(picture, mask, x, bar_height + 5, MUTED)
    for number, line in enumerate(name):
        if line:
            stamp(picture, text_mask(line, SMALL_SIZE), name_left, number * pitch, MUTED)
    for number, (kind, text) in enumerate(keys, len(name)):
        y = number * pitch
        box = picture[y + 2 : y + 2 + bar_height, name_left : name_left + 24]
        if kind == "mark":
            box[:] = MARK
            box[2:-2, 2:-2] = PAPER
        else:
            box[:] = hatch(bar_height, 24) if kind == "missing" else other_hatch(bar_height, 24)
        stamp(picture, text_mask(text, SMALL_SIZE), name_left + 32, y, MUTED)
    return picture


def labelled_grid(
    values: NDArray[np.floating],
    row_texts: Sequence[str],
    tokens: Sequence[str],
    *,
    cell_height: int,
    cell_width: int,
    title: str,
    subtitle: str,
    scale_label: str,
    row_axis: str,
    column_axis: str,
    table: str,
    marks: NDArray[np.bool_] | None = None,
    mark_label: str = "",
    others: Collection[int] = (),
    other_label: str = "another text",
) -> Picture:
    """Draw `values` (rows, k), first row on top, each row as a share of its largest value, with labels all around.

    Args:
        values: Non-negative magnitudes (rows, k); NaN is shown as missing.
        row_texts: Labels of the rows, (rows,), ready to draw.
        tokens: Tokens of the columns, (k,).
        cell_height: Height of a row in pixels.
        cell_width: Width of a column in pixels.
        title: The picture's title, wrapped where needed.
        subtitle: A second, quieter text; may be empty.
        scale_label: Name of the colour scale.
        row_axis: Name of the rows' axis.
        column_axis: Name of the columns' axis.
        table: Name of matplotlib's colour table.
        marks: (rows, k) true for cells that are framed; none when None.
        mark_label: What a framed cell is.
        others: Rows that are of another text than the one whose tokens are written: they are hatched, and told so.
        other_label: What is written on them, where a row has room for it.

    Returns:
        The picture (height, width, 3).
    """
    marks = np.zeros(values.shape, dtype=bool) if marks is None else marks
    values = np.where(np.isin(np.arange(len(values)), list(others))[:, None], 0.0, values)
    width = grid_layout(row_texts, tokens, cell_height=cell_height, cell_width=cell_width, top=0).width
    part = shares(values)
    above = np.concatenate(
        [
            header(title, subtitle, width),
            scale_bar(
                table,
                scale_label,
                width,
                missing=bool(np.isnan(part).any()),
                mark_label=mark_label if marks.any() else "",
                other_label=other_label if others else "",
            ),
        ]
    )
    layout = grid_layout(row_texts, tokens, cell_height=cell_height, cell_width=cell_width, top=len(above))
    picture = blank(layout.height, width)
    picture[: len(above)] = above
    painted = cells(part, cell_height, cell_width, table)
    for row in others:
        _paint_other(painted, row * cell_height, cell_height, other_label)
    picture[layout.top : layout.top + painted.shape[0], layout.left : layout.left + painted.shape[1]] = painted
    frame(picture, marks, cell_height, cell_width, layout.left, layout.top)
    # Whole rows are framed where each row is a token's own.
    whole_rows: NDArray[np.bool_] = np.asarray(marks.all(axis=1) & (not marks.all()))
    columns: NDArray[np.bool_] = np.asarray(marks.any(axis=0) & (not whole_rows.any()))
    for start, end in runs(columns):
        _point_down(picture, layout.left + (start + end) * cell_width // 2, layout.top - 3)
    plain = [label for label in layout.labels if label.column is not None and not columns[label.column]]
    stamp_all(picture, [(label.mask, label.x, label.y) for label in plain])
    for label in layout.labels:
        decided = columns[label.column] if label.column is not None else whole_rows[label.row]
        if decided or label.column is None:
            stamp(picture, label.mask, label.x, label.y, MARK if decided else INK)
    row_name = text_mask(row_axis, SMALL_SIZE)
    # Beside the grid's corner the name would float; it ends at the grid's edge where the labels leave room for that.
    stamp(picture, row_name, max(MARGIN, layout.left - 8 - row_name.shape[1]), layout.row_axis_y, MUTED)
    stamp(picture, text_mask(column_axis, SMALL_SIZE), layout.left, layout.column_axis_y, MUTED)
    return picture


def _paint_other(painted: Picture, top: int, height: int, text: str) -> None:
    """Hatch a row of cells (all rows' height, width, 3) that is of another text, in place."""
    # The line below the row stays.
    end = top + height - (height >= 8)
    painted[top:end] = other_hatch(end - top, painted.shape[1], top)
    mask = text_mask(text, SMALL_SIZE - 1)
    if height >= mask.shape[0] and painted.shape[1] >= mask.shape[1] + 12:
        y = top + (end - top - mask.shape[0]) // 2
        painted[top:end, 2 : mask.shape[1] + 10] = OTHER
        stamp(painted, mask, 6, y, INK)


def _point_down(picture: Picture, x: int, y: int) -> None:
    """Draw a small triangle whose lower tip is at x, y: above a column that is too narrow for a frame to be seen."""
    for line in range(5):
        picture[max(y - line, 0), max(x - line, 0) : x + line + 1] = MARK


def checked_grid(values: object, tokens: Sequence[str], name: str) -> NDArray[np.floating]:
    """Return `values` as a float array (rows, k).

    Args:
        values: Anything numpy can read.
        tokens: Tokens of the columns, (k,).
        name: What the caller calls `values`.

    Raises:
        ValueError: If it has not two axes, is empty, or its second axis is not as long as `tokens`.
    """
    grid = np.asarray(values, dtype=np.float64)
    if grid.ndim != 2 or grid.size == 0:
        raise ValueError(f"`{name}` must be a two-dimensional array with at least one value, got shape {grid.shape}.")
    if grid.shape[1] != len(tokens):
        raise ValueError(f"`{name}` has {grid.shape[1]} columns for {len(tokens)} tokens; give one token per column.")
    return grid


def cell_width_for(count: int) -> int:
    """Return the width in pixels of one of `count` columns: 56 for a few, 18 at 128, less beyond that."""
    if count > 128:
        return max(1, 2304 // count)
    return max(18, min(56, 900 // count))
