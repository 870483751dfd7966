"""Stills of a history, for papers and notebooks: one sentence over the training, and the curves of the correlation.

The layout is that of the pictures for the loggers. Matplotlib's object interface draws it, so that lines and text stay
lines and text in an SVG. The same history gives the same bytes: no dates, no random names.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.measurement import About, History
from globenc_lightning.report import canvas, curves, fonts, further_curves, further_stills, images
from globenc_lightning.report import signed as signed_pictures
from globenc_lightning.report.further_stills import Strip
from globenc_lightning.report.verdicts import MARKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
KINDS = ("layer", "training")

_FAMILIES = ["DejaVu Sans", "sans-serif"]
_GREY = "#ececec"
_HATCH = "#b0b0b0"
_OTHER = "#{:02x}{:02x}{:02x}".format(*canvas.OTHER)
_OTHER_HATCH = "#{:02x}{:02x}{:02x}".format(*canvas.OTHER_HATCH)
_MARK = "#{:02x}{:02x}{:02x}".format(*canvas.MARK)


class Scene(NamedTuple):
    """A figure with everything in it but its texts.

    Attributes:
        figure: The matplotlib figure, at ``curves.DPI`` dots per inch.
        words: Its texts, in pixels from the figure's upper left corner.
        slanted: Texts at an angle: degrees, and the word, whose `x` and `y` are the end of its middle line.
        title: What the figure is called.
    """

    figure: Figure
    words: list[curves.Word]
    slanted: list[tuple[int, curves.Word]]
    title: str


def save_sentence(
    history: History,
    path: str | os.PathLike[str],
    example: int,
    method: str | None,
    title: str | None,
    dpi: int,
    *,
    signed: bool = False,
    masked: bool = False,
) -> Path:
    """Save one example over the training; see `History.save_sentence`."""
    target = checked_path(path, dpi)
    about = _about(history)
    if signed and (masked or method is not None):
        raise ValueError(
            "signed=True shows contributions to the score, which no method gives: leave method= and masked= out."
        )
    if isinstance(example, bool) or not isinstance(example, int) or not 0 <= example < len(about.tokens):
        raise ValueError(f"there is no example {example!r}: the probe has {len(about.tokens)}, numbered from 0.")
    chosen = images.drawn_method(about) if method is None else _known_methods(about, [method])[0]
    tokens = about.tokens[example]
    label = about.labels[example]
    truth = about.truths[example] if about.truths else "" if label is None else str(label)
    named = {"regression": "target", "span": "true answer"}.get(about.task, "label")
    text = f", {about.text}" if about.text else ""
    ending = f"{text}{f'; {named} {truth}' if truth else ''}"
    rewrite = canvas.visible if target.suffix.lower() == ".svg" else _readable
    others, marked = images.told_apart(history.latest, history.missing_steps, about.task, example)
    validations = images.moments(history.latest, history.missing_steps)
    if signed:
        contributions = further_stills.signed_strip(validations, example, tokens, others)
        heading = signed_pictures.TITLE.format(example=example) if title is None else title
        score = images.target_words(about.target, about.score)
        below = f"{images.SIGNED_OF.format(score=score)}{ending}; {signed_pictures.NOTE}"
        return _save(target, dpi, lambda: _strip(contributions, heading, below, rewrite))
    rows, steps = images.timeline(history.latest, history.missing_steps, chosen, example)
    if not len(tokens) or rows.shape[1] != len(tokens):
        raise ValueError(f"example {example} has no figures: its rows are empty.")
    rho = [math.nan if entry is None else float(entry.by_example[chosen][example, -1]) for _, entry in validations]
    values = ["undefined" if math.isnan(one) else f"{one:.2f}".replace("-", "−") for one in rho]
    mark_label = MARKS.get(about.task, "")
    if masked:
        marked = further_stills.masked_tokens(validations, chosen, example, others)
        mark_label = "token that was masked"
    heading = f"Example {example}: the last layer's readout over training" if title is None else title
    below = (
        f"{chosen}{images.EXTENSION[about.rule]}, {images.rollout_name(about)}, {images.READOUT_NAMES[about.readout]}"
        f"{ending}"
    )
    strip = Strip(canvas.shares(rows), tokens, steps, {"ρ": values}, others, marked, mark_label)
    return _save(target, dpi, lambda: _strip(strip, heading, below, rewrite))


def save_correlation(
    history: History,
    path: str | os.PathLike[str],
    by: str,
    step: int | None,
    methods: Sequence[str] | None,
    title: str | None,
    dpi: int,
    reference: str = "saliency",
) -> Path:
    """Save the curves of the correlation; see `History.save_correlation`."""
    target = checked_path(path, dpi)
    about = _about(history)
    if reference not in about.references:
        raise ValueError(
            f"there is no correlation with {reference!r}; choose from {', '.join(map(repr, about.references))}, or "
            f"train with GlobEncCallback(references=[{reference!r}])."
        )
    chosen = list(about.methods) if methods is None else _known_methods(about, methods)
    compared = images.what_is_compared(about, images.target_words(about.target, about.score), about, reference)
    compared += f"; {about.text}" if about.text else ""
    if by == "layer":
        entry = next((one for one in reversed(history.latest) if step is None or one.step == step), None)
        if entry is None:
            raise ValueError(f"nothing was analysed at step {step!r}; the steps are {_listed(history)}.")
        if reference == "saliency":
            shown = curves.by_layer({method: entry.by_example[method].numpy() for method in chosen})
        elif reference in entry.reference_rho:
            shown = further_curves.correlation_by_layer(entry, reference, chosen)
        else:
            raise ValueError(f"nothing was compared with {reference} at step {entry.step}.")
        heading = f"Correlation of {images.aggregate_name(about)} and {reference} by layer, step {entry.step}"
    elif by == "training":
        if step is not None:
            raise ValueError("step chooses one for by='layer'; by='training' shows all of them.")
        if reference == "saliency":
            steps, means, spread = images.over_training(history.latest, history.missing_steps)
            shown = curves.over_training(steps, {m: means[m] for m in chosen}, {m: spread[m] for m in chosen})
        else:
            validations = images.moments(history.latest, history.missing_steps)
            shown = further_curves.correlation_over_training(validations, reference, chosen)
        heading = f"Correlation of {images.aggregate_name(about)} and {reference} over training"
    else:
        raise ValueError(f"by must be one of {', '.join(map(repr, KINDS))}; got {by!r}.")
    return save_curves(target, dpi, shown, heading if title is None else title, compared)


def save_faithfulness(
    history: History,
    path: str | os.PathLike[str],
    figure: str,
    methods: Sequence[str] | None,
    title: str | None,
    dpi: int,
) -> Path:
    """Save the curves of faithfulness over the training; see `History.save_faithfulness`."""
    target = checked_path(path, dpi)
    about = _about(history)
    shown, newest = further_stills.faithfulness_curves(
        images.moments(history.latest, history.missing_steps), figure, methods
    )
    told = images.what_is_masked(newest, f"; {about.text}" if about.text else "")
    return save_curves(target, dpi, shown, further_curves.HEADINGS[figure] if title is None else title, told)


def checked_path(path: str | os.PathLike[str], dpi: int) -> Path:
    """Returns where a figure is written.

    Raises:
        ValueError: another format than SVG or PNG, or no number of dots per inch.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ValueError(f"the path must end in {' or '.join(FORMATS)}; got {str(target)!r}.")
    if isinstance(dpi, bool) or not isinstance(dpi, int) or not 1 <= dpi <= 1200:
        raise ValueError(f"dpi must be a whole number from 1 to 1200; got {dpi!r}.")
    return target


def _about(history: History) -> About:
    if not history.latest or history.about is None:
        raise ValueError("the history is empty: nothing has been analysed yet.")
    return history.about


def _known_methods(about: About, methods: Sequence[str]) -> list[str]:
    methods = [methods] if isinstance(methods, str) else list(methods)
    for method in methods:
        if method not in about.methods:
            raise ValueError(f"{method!r} was not computed; choose from {', '.join(about.methods)}.")
    if not methods:
        raise ValueError(f"methods must name at least one of {', '.join(about.methods)}.")
    return methods


def _listed(history: History, most: int = 12) -> str:
    steps = [str(step) for step in dict.fromkeys(entry.step for entry in history.latest)]
    return ", ".join(steps if len(steps) <= most else [*steps[: most - 1], "…", steps[-1]])


def save_curves(target: Path, dpi: int, shown: curves.Curves, title: str, subtitle: str) -> Path:
    """Saves curves as a figure.

    Args:
        target: what :func:`checked_path` gave.
        dpi: of a PNG.
        shown: the curves.
        title: wrapped where needed; may be empty.
        subtitle: a second, quieter text.

    Returns:
        The path.
    """
    return _save(target, dpi, lambda: _curves(shown, title, subtitle))


def _curves(shown: curves.Curves, title: str, subtitle: str) -> Scene:
    plot = curves.arranged(shown)
    head = _head(title, subtitle, curves.WIDTH)
    above = head.height
    foot = _paragraph(plot.caption, above + curves.HEIGHT, curves.WIDTH, canvas.SMALL_SIZE, canvas.MUTED)
    words = [word._replace(y=word.y + above) for word in plot.words]
    figure = curves.plotted(plot, above, foot.height - above - curves.HEIGHT + canvas.MARGIN - 6)
    return Scene(figure, [*head.words, *words, *foot.words], [], title)


def _strip(strip: Strip, title: str, subtitle: str, rewrite: Callable[[str, int], str]) -> Scene:
    """Rows of tokens as a strip, one per step, with what belongs to each step at the right."""
    from matplotlib.patches import Rectangle

    rows, tokens, steps, beside_rows, others, marked, mark_label, look = strip
    part = rows.copy()
    part[list(others)] = np.nan
    missing: NDArray[np.bool_] = np.asarray(np.isnan(part).all(axis=1))
    columns = sorted({place for places in marked for place in places})
    cell_width = canvas.cell_width_for(len(tokens))
    cell_height = max(1.0, min(22.0, 640 / len(rows)))
    small, line = canvas.SMALL_SIZE, canvas.line_height(canvas.SMALL_SIZE)
    style = canvas.column_style([rewrite(token, canvas.LABEL_LIMIT) for token in tokens], cell_width)
    widths = {column: _width(style.texts[column], style.size) for column in style.shown}
    angle = math.radians(style.slope)

    beside = max(_width(str(step), small) for step in steps) + 8
    # A slanted label ends below its own column, so the first ones may reach further to the left than the steps.
    reach = max((width * math.cos(angle) - column * cell_width for column, width in widths.items()), default=0)
    left = round(canvas.MARGIN + max(beside, reach - cell_width / 2 if style.slope == 45 else 0))
    right = left + len(tokens) * cell_width
    places, end = {}, right + 10
    for name, values in beside_rows.items():
        places[name] = end
        end += max(_width(text, small) for text in (name, *values)) + 14
    width = max(canvas.MIN_WIDTH, end - 14 + canvas.MARGIN)
    head = _head(title, subtitle, width)
    scale_top = head.height
    failed = [row for row in np.flatnonzero(missing) if row not in others]
    keys = (["no value"] if failed else []) + (["another text"] if others else []) + ([mark_label] if columns else [])
    # The scale's own numbers leave room for one key beside them.
    key_pitch = 18
    top = scale_top + 40 + key_pitch * max(0, len(keys) - 1) + line + 6
    bottom = top + cell_height * len(rows)
    drop = max(span * math.sin(angle) for span in widths.values()) + style.size * math.cos(angle)
    height = round(bottom + 10 + drop + line + canvas.MARGIN - 8)

    sheet = _Sheet(width, height)
    colours = canvas.colour_table(look.table)
    gap_x, gap_y = (float(size >= 8) for size in (cell_width, cell_height))
    boxes: dict[int, list[tuple[float, float, float, float]]] = {}
    for row, column in zip(*np.nonzero(~np.isnan(part)), strict=True):
        box = (left + column * cell_width, top + row * cell_height, cell_width - gap_x, cell_height - gap_y)
        boxes.setdefault(round(float(part[row, column]) * 255), []).append(box)
    for entry in sorted(boxes):
        sheet.boxes(boxes[entry], colours[entry])
    for share in range(90):
        # Each reaches to the end and the next covers it, so that no seam shows.
        sheet.boxes([(canvas.MARGIN + 2 * share, scale_top + 2, 180 - 2 * share, 12)], colours[round(share / 89 * 255)])
    scale_words = [
        curves.Word(text, canvas.MARGIN + round(place * 180), scale_top + 24, anchor, small - 1, canvas.MUTED)
        for text, place, anchor in zip(look.ends, (0, 0.5, 1), ("left", "middle", "right"), strict=True)
    ]
    scale_words.append(curves.Word(look.key, canvas.MARGIN + 194, scale_top + 8, "left", small, canvas.MUTED))
    across_all = right - left - gap_x
    styles = {"no value": (_GREY, _HATCH, "/////"), "another text": (_OTHER, _OTHER_HATCH, "\\\\\\\\\\")}
    hatched = [("no value", left, top + row * cell_height, across_all, cell_height - gap_y) for row in failed]
    hatched += [("another text", left, top + row * cell_height, across_all, cell_height - gap_y) for row in others]
    framed = [
        (
            left + start * cell_width - gap_x,
            top + first * cell_height - gap_y,
            left + end * cell_width - gap_x,
            top + last * cell_height - gap_y,
        )
        for (first, last), (start, end) in _stretches(marked)
    ]
    for number, key_name in enumerate(keys):
        y = scale_top + 20 + key_pitch * number
        if key_name in styles:
            hatched.append((key_name, canvas.MARGIN + 194, y, 24, 12))
        else:
            framed.append((canvas.MARGIN + 195, y + 1, canvas.MARGIN + 217, y + 11))
        scale_words.append(curves.Word(key_name, canvas.MARGIN + 226, y + 6, "left", small, canvas.MUTED))
    for kind, x, y, across, down in hatched:
        face, edge, pattern = styles[kind]
        patch = Rectangle(
            sheet.at(x, y + down),
            across / width,
            down / height,
            facecolor=face,
            edgecolor=edge,
            hatch=pattern,
            linewidth=0,
        )
        sheet.add(patch)
    for x0, y0, x1, y1 in framed:
        outline = Rectangle(sheet.at(x0, y1), (x1 - x0) / width, (y1 - y0) / height, facecolor="none", edgecolor=_MARK)
        outline.set_linewidth(1.2)
        sheet.add(outline)

    words = [*head.words, *scale_words]
    axis_y = round(top - 6 - line / 2)
    words.append(
        curves.Word(
            "step ↓", max(left - 8, canvas.MARGIN + _width("step ↓", small)), axis_y, "right", small, canvas.MUTED
        )
    )
    words += [curves.Word(name, x, axis_y, "left", small, canvas.MUTED) for name, x in places.items()]
    room = line - 1 if cell_height >= line - 1 else 2 * (line - 1)
    for row in canvas.thinned(len(rows), cell_height, room):
        middle = round(top + (row + 0.5) * cell_height - gap_y / 2)
        words.append(curves.Word(str(steps[row]), left - 8, middle, "right", small, canvas.INK))
        if not missing[row]:
            words += [
                curves.Word(values[row], places[name], middle, "left", small, canvas.MUTED)
                for name, values in beside_rows.items()
            ]
    slanted = []
    for column in style.shown:
        centre = left + (column + 0.5) * cell_width - gap_x / 2
        ink = canvas.MARK if column in columns else canvas.INK
        word = curves.Word(style.texts[column], centre, round(bottom + 8), "right", style.size, ink)
        if style.slope == 0:
            words.append(word._replace(anchor="middle", y=round(bottom + 6 + canvas.line_height(style.size) / 2)))
        else:
            slanted.append((style.slope, word))
    words.append(curves.Word("token", left, height - canvas.MARGIN + 8 - line // 2, "left", small, canvas.MUTED))
    return Scene(sheet.figure, words, slanted, title)


def _stretches(marked: Sequence[Sequence[int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The marked places as rectangles, each of neighbouring rows with the same stretch of neighbouring columns.

    Returns:
        The first row and the one after the last, and the first column and the one after the last.
    """
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    open_since: dict[tuple[int, int], int] = {}
    for row, places in enumerate([*marked, ()]):
        flags = np.zeros(max(places, default=-1) + 1, dtype=bool)
        flags[list(places)] = True
        here = canvas.runs(flags)
        for columns in [one for one in open_since if one not in here]:
            found.append(((open_since.pop(columns), row), columns))
        for columns in here:
            open_since.setdefault(columns, row)
    return found


class _Sheet:
    """A matplotlib figure on which one draws in pixels from its upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure((width / curves.DPI, height / curves.DPI), curves.DPI, facecolor="white")

    def at(self, x: float, y: float) -> tuple[float, float]:
        return x / self.width, 1 - y / self.height

    def add(self, artist: Any) -> None:
        artist.set_transform(self.figure.transFigure)
        self.figure.add_artist(artist)

    def boxes(self, boxes: Sequence[tuple[float, float, float, float]], colour: NDArray[np.uint8]) -> None:
        """Fill boxes (x, y, width, height) with one colour, as one path."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Outline

        corners = [
            self.at(*corner)
            for x, y, width, height in boxes
            for corner in ((x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y))
        ]
        codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY] * len(boxes)
        # Without smoothing, cells that touch leave no hairline between them.
        face = tuple(float(channel) / 255 for channel in colour)
        self.add(PathPatch(Outline(corners, codes), facecolor=face, linewidth=0, antialiased=False, snap=False))


class _Block(NamedTuple):
    """Lines of text, and the y at which they end."""

    words: list[curves.Word]
    height: int


def _head(title: str, subtitle: str, width: int) -> _Block:
    """Title and subtitle from the upper edge on; a margin alone where there is no title."""
    if not title:
        return _Block([], canvas.MARGIN)
    first = _paragraph(title, canvas.MARGIN - 6, width, canvas.TITLE_SIZE, canvas.INK, bold=True)
    second = _paragraph(subtitle, first.height + 4, width, canvas.TEXT_SIZE, canvas.MUTED)
    return _Block([*first.words, *second.words], second.height + 12)


def _paragraph(text: str, top: int, width: int, size: int, ink: tuple[int, int, int], bold: bool = False) -> _Block:
    pitch = round(size * 1.35)
    lines = canvas.wrap(text, size, width - 2 * canvas.MARGIN, bold, fonts.installed(outlines=True))
    words = [
        curves.Word(line, canvas.MARGIN, top + number * pitch + pitch // 2, "left", size, ink, bold)
        for number, line in enumerate(lines)
        if line
    ]
    return _Block(words, top + len(lines) * pitch)


def _readable(text: str, limit: int | None = None) -> str:
    """Rewrite a text for matplotlib, which draws outlines alone."""
    return canvas.readable(text, limit, fonts.installed(outlines=True))


def _width(text: str, size: int) -> int:
    """The width of a text in pixels; letters that the font does not have count as wide as they are high."""
    drawn = "".join(letter for letter in text if _readable(letter) == letter or letter == " ")
    return (canvas.text_width(drawn, size) if drawn else 0) + (len(text) - len(drawn)) * size


def _save(path: Path, dpi: int, draw: Callable[[], Scene]) -> Path:
    """Draw and write a figure; the file is written when all went well."""
    buffer = io.BytesIO()
    vector = path.suffix.lower() == ".svg"
    with _defaults(), ExitStack() as block:
        scene = draw()
        families = _FAMILIES
        if not vector:
            # Those who look at an SVG bring fonts of their own.
            texts = [word.text for word in (*scene.words, *(word for _, word in scene.slanted))]
            others = block.enter_context(fonts.registered(texts, fonts.installed(outlines=True)))
            families = [_FAMILIES[0], *others, *_FAMILIES[1:]]
        _set_texts(scene, families)
        metadata: dict[str, str | None] = {"Date": None, "Creator": None} if vector else {"Software": None}
        if scene.title:
            metadata["Title"] = canvas.visible(scene.title)
        scene.figure.savefig(buffer, format="svg" if vector else "png", dpi=dpi, metadata=metadata)
    path.write_bytes(buffer.getvalue())
    return path


@contextmanager
def _defaults() -> Iterator[None]:
    """Matplotlib's own settings, whatever style the user has chosen; the user's are put back."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that the font does not have is the reader's font's to draw.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "globenc", "hatch.linewidth": 0.7})
        yield


def _set_texts(scene: Scene, families: Sequence[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(scene.figure)
    width, height = scene.figure.get_size_inches() * curves.DPI
    upright = [(0, word) for word in scene.words]
    for angle, word in upright + scene.slanted:
        ascent, descent = canvas.font(word.size, word.bold).getmetrics()
        # The middle of a line lies above its baseline; at an angle, so much across and so much down.
        shift = (ascent - descent) / 2
        x = word.x + shift * math.sin(math.radians(angle))
        y = word.y + shift * math.cos(math.radians(angle))
        scene.figure.text(
            x / width,
            1 - y / height,
            word.text,
            color=tuple(channel / 255 for channel in word.ink),
            fontfamily=list(families),
            fontsize=word.size * 72 / curves.DPI,
            fontweight="bold" if word.bold else "normal",
            ha={"left": "left", "middle": "center", "right": "right"}[word.anchor],
            va="baseline",
            rotation=angle,
            rotation_mode="anchor",
            parse_math=False,
            usetex=False,
        )
