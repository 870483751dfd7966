"""Curves of the correlation with the saliency: through the layers, and over the training.

Matplotlib's object interface draws the lines alone. All text is set as in the other pictures, so that neither pyplot's
state nor the user's style sheet plays a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from globenc_lightning.report import canvas
from globenc_lightning.report.averages import mean_and_interval

_Floats = NDArray[np.float64]

_PALETTE = "petroff10"
_MARGIN_LEFT = 64
_MARGIN_RIGHT = 218
_AXES_WIDTH = 660
_AXES_HEIGHT = 400
WIDTH = _MARGIN_LEFT + _AXES_WIDTH + _MARGIN_RIGHT
ABOVE = 30
_BELOW = 58
HEIGHT = ABOVE + _AXES_HEIGHT + _BELOW
_Y_LIMIT = 1.04
_REFERENCE = "#6b7075"
_REFERENCE_DASHES = (0, (1.5, 2.5))
DPI = 100
_LABEL_PITCH = 20
_SAMPLE_WIDTH = 26
_LEADER_WIDTH = 26


class Scale(NamedTuple):
    """The y-axis of a plot.

    Attributes:
        name: What is measured.
        low: Lower end of the axis.
        high: Upper end.
        ticks: The values with a line across and a number.
        least: The least value there can be: bands end there.
        most: The greatest one.
        digits: Decimals of the numbers at the ticks.
    """

    name: str
    low: float
    high: float
    ticks: Sequence[float]
    least: float
    most: float
    digits: int = 1


CORRELATION = Scale(
    "Spearman’s ρ with gradient × input", -_Y_LIMIT, _Y_LIMIT, (-1.0, -0.5, 0.0, 0.5, 1.0), least=-1.0, most=1.0
)


class Curves(NamedTuple):
    """What a picture of curves shows.

    Attributes:
        x: (n,) places on the x-axis.
        means: For each method (n,), NaN where there is a gap.
        halves: For each method half the width of the confidence interval (n,), NaN where there is none.
        ticks: The numbers on the x-axis.
        x_name: Name of the x-axis.
        caption: Sentences that stand below.
        scale: The y-axis.
        references: Levels to compare the lines with, such as that of chance, by their names: dotted grey lines.
        unit: What the lines are the mean of, as a sign.
    """

    x: _Floats
    means: Mapping[str, _Floats]
    halves: Mapping[str, _Floats]
    ticks: Sequence[int]
    x_name: str
    caption: list[str]
    scale: Scale = CORRELATION
    references: Mapping[str, float] = MappingProxyType({})
    unit: str = "ρ"


class Word(NamedTuple):
    """A text in a plot: `x` is its left, middle or right (`anchor`), `y` the middle of its line, in pixels."""

    text: str
    x: float
    y: int
    anchor: str
    size: int
    ink: tuple[int, int, int]
    bold: bool = False


class Plot(NamedTuple):
    """Where everything in a plot lies, in pixels from its upper left corner.

    Attributes:
        curves: What is shown.
        caption: Sentences that stand below.
        drawn: The methods with a line, in the order of painting.
        ends: For each of them the place of its last value.
        heights: For each of them, and for each reference, the height of its label at the right.
        x_limits: The x-axis' ends.
        tick_places: The marks on the x-axis.
        words: All texts.
    """

    curves: Curves
    caption: str
    drawn: list[str]
    ends: dict[str, int]
    heights: dict[str, float]
    x_limits: tuple[float, float]
    tick_places: list[float]
    words: list[Word]


class Style(NamedTuple):
    """How one method is drawn in every picture: attention weights (W) dashed and hollow, others solid and filled."""

    entry: int
    marker: str
    weights: bool
    prominent: bool = False
    palette: str = _PALETTE


STYLES: dict[str, Style] = {
    "W": Style(8, "o", True),
    "W-FixedRes": Style(3, "s", True),
    "W-Res": Style(7, "^", True),
    "N": Style(6, "o", False),
    "N-FixedRes": Style(1, "s", False),
    "N-Res": Style(0, "^", False),
    "N-ResLN": Style(4, "v", False),
    "N-Enc": Style(2, "D", False, prominent=True),
    "ALTI": Style(5, "P", False),
    # What the palette has left is too light for a line on white.
    "Value-Zeroing": Style(0, "X", False, palette="Dark2"),
}


def method_colour(method: str) -> tuple[int, int, int]:
    """Return the one colour (red, green, blue), 0 to 255, of a method.

    Args:
        method: One of ``STYLES``.

    Raises:
        ValueError: If there is no such method.
    """
    import matplotlib
    from matplotlib.colors import to_rgb

    style = _style(method)
    red, green, blue = to_rgb(matplotlib.color_sequences[style.palette][style.entry])
    return round(red * 255), round(green * 255), round(blue * 255)


def _style(method: str) -> Style:
    if method not in STYLES:
        raise ValueError(f"There is no method {method!r}; the methods are {', '.join(STYLES)}.")
    return STYLES[method]


def correlation_by_layer(
    correlations: Mapping[str, ArrayLike],
    *,
    title: str,
    subtitle: str = "",
) -> canvas.Picture:
    """Draw every method's correlation with the saliency, layer by layer: mean over the examples and its interval.

    Args:
        correlations: For each method rho (b, l), NaN where an example has none. The same l for all methods.
        title: The picture's title, wrapped where needed.
        subtitle: A second, quieter text; may be empty.

    Returns:
        The picture (height, width, 3). Methods without a single defined rho are named in the caption.

    Raises:
        ValueError: If there is no method, an unknown one, or an array of another shape.
    """
    return picture(by_layer(correlations), title, subtitle)


def by_layer(correlations: Mapping[str, ArrayLike]) -> Curves:
    """Average over the examples, layer by layer; see `correlation_by_layer`."""
    arrays = {method: np.asarray(values, dtype=np.float64) for method, values in correlations.items()}
    _check({method: array.shape[1:] for method, array in arrays.items()}, "correlations", "(b, l)")
    statistics = {method: mean_and_interval(array) for method, array in arrays.items()}
    layers = next(iter(arrays.values())).shape[1]
    counts = np.concatenate([count for _, _, count, _ in statistics.values()])
    undefined = sum(int(missing.sum()) for _, _, _, missing in statistics.values())
    total = sum(array.size for array in arrays.values())
    fewest, most = int(counts.min()), int(counts.max())
    examples = f"{fewest}" if fewest == most else f"{fewest}–{most}"
    caption = [f"Lines: mean over the examples with a defined ρ, n = {examples}; numbers: the line’s last point."]
    if most > 1:
        caption.append("Bands: 95 % confidence interval of the mean (Student’s t).")
    else:
        caption.append("No bands: an interval needs two examples.")
    caption.append(f"Undefined and left out: {undefined} of {total} ρ." if undefined else "No ρ is undefined.")
    stride = math.ceil(layers / 24)
    ticks = [1, *range(2 * stride, layers + 1, stride)]
    return Curves(
        np.arange(1, layers + 1, dtype=np.float64),
        {method: mean for method, (mean, _, _, _) in statistics.items()},
        {method: half for method, (_, half, _, _) in statistics.items()},
        ticks=ticks,
        x_name="layer",
        caption=caption,
    )


def correlation_over_training(
    steps: Sequence[int],
    means: Mapping[str, ArrayLike],
    *,
    spread: Mapping[str, ArrayLike] | None = None,
    title: str,
    subtitle: str = "",
) -> canvas.Picture:
    """Draw every method's correlation with the saliency over the training.

    Args:
        steps: Training step of each validation, (n,).
        means: For each method the mean rho of the last layer (n,); NaN leaves a gap.
        spread: For each method half the width of the 95 % confidence interval (n,), NaN where there is none. Methods
            may be left out.
        title: The picture's title, wrapped where needed.
        subtitle: A second, quieter text; may be empty.

    Returns:
        The picture (height, width, 3). Methods without a single defined mean are named in the caption.

    Raises:
        ValueError: If there is no method, an unknown one, no step, or an array that is not (n,).
    """
    return picture(over_training(steps, means, spread), title, subtitle)


def over_training(
    steps: Sequence[int], means: Mapping[str, ArrayLike], spread: Mapping[str, ArrayLike] | None = None
) -> Curves:
    """Put the means of a training in order; see `correlation_over_training`."""
    x = np.asarray(steps, dtype=np.float64)
    arrays = {method: np.asarray(values, dtype=np.float64) for method, values in means.items()}
    halves = {method: np.asarray(values, dtype=np.float64) for method, values in (spread or {}).items()}
    _check({method: array.shape for method, array in arrays.items()}, "means", "(n,)")
    for method, array in {**arrays, **halves}.items():
        if array.shape != x.shape:
            raise ValueError(f"{method!r} has shape {array.shape} for {len(x)} steps; give one value per step.")
    caption = ["Lines: mean ρ of the last layer over the examples with a defined ρ; numbers: the line’s last point."]
    if any(np.isfinite(half).any() for half in halves.values()):
        caption.append("Bands: 95 % confidence interval of the mean (Student’s t).")
    ticks = spaced(steps)
    return Curves(x, arrays, halves, ticks=ticks, x_name="training step", caption=caption)


def spaced(places: Sequence[int]) -> list[int]:
    """Returns the numbers on the x-axis: all places, or round numbers between them where there are more than eight."""
    from matplotlib.ticker import MaxNLocator

    ticks = sorted({int(place) for place in places})
    if len(ticks) > 8:
        low, high = ticks[0], ticks[-1]
        ticks = [int(tick) for tick in MaxNLocator(8, integer=True).tick_values(low, high) if low <= tick <= high]
    return ticks


def _check(shapes: Mapping[str, tuple[int, ...]], name: str, wanted: str) -> None:
    if not shapes:
        raise ValueError(f"`{name}` must hold at least one method.")
    for method in shapes:
        _style(method)
    if any(len(shape) != 1 or shape[0] == 0 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        raise ValueError(f"All arrays in `{name}` must be {wanted}, not empty and of one length, got {dict(shapes)}.")


def label_heights(wanted: Sequence[float], pitch: float, low: float, high: float) -> list[float]:
    """Move labels apart so that neighbours keep their distance, each as near as can be to where it belongs.

    Args:
        wanted: Heights at which the labels would stand, ascending.
        pitch: Distance that neighbours keep.
        low: Least height allowed.
        high: Greatest height allowed. The labels must fit between the two.

    Returns:
        The heights, ascending.
    """
    # Labels that collide form a block around their common mean; blocks that then collide are merged, until none does.
    blocks: list[tuple[float, int]] = []

    def centre(total: float, size: int) -> float:
        reach = (size - 1) / 2 * pitch
        return min(max(total / size, low + reach), high - reach)

    for height in wanted:
        total, size = float(height), 1
        while blocks and centre(total, size) - centre(*blocks[-1]) < (size + blocks[-1][1]) / 2 * pitch:
            other_total, other_size = blocks.pop()
            total, size = total + other_total, size + other_size
        blocks.append((total, size))
    return [centre(*block) + (place - (block[1] - 1) / 2) * pitch for block in blocks for place in range(block[1])]


def arranged(curves: Curves) -> Plot:
    """Find a place for everything in a plot, and for the texts around it."""
    x, means, scale = curves.x, curves.means, curves.scale
    pad = 0.025 * float(x.max() - x.min()) or 0.5
    x_low, x_high = float(x.min()) - pad, float(x.max()) + pad

    def y_pixel(value: float) -> float:
        return ABOVE + (scale.high - value) / (scale.high - scale.low) * _AXES_HEIGHT

    # Fixed order of methods, whatever order the caller has; the prominent one is painted last.
    drawn = [method for method in STYLES if method in means and np.isfinite(means[method]).any()]
    drawn.sort(key=lambda method: STYLES[method].prominent)
    absent = [method for method in STYLES if method in means and method not in drawn]
    caption = [*curves.caption, *([f"Without any defined {curves.unit}: {', '.join(absent)}."] if absent else [])]
    ends = {method: int(np.flatnonzero(np.isfinite(means[method]))[-1]) for method in drawn}
    last = {**{method: float(means[method][ends[method]]) for method in drawn}, **curves.references}
    by_height = sorted(last, key=lambda name: -last[name])
    heights = dict(
        zip(
            by_height,
            label_heights(
                [y_pixel(last[name]) for name in by_height],
                _LABEL_PITCH,
                ABOVE + _LABEL_PITCH / 2,
                ABOVE + _AXES_HEIGHT - _LABEL_PITCH / 2,
            ),
            strict=True,
        )
    )
    small, size = canvas.SMALL_SIZE, canvas.TEXT_SIZE
    half_line = canvas.line_height(small) // 2
    tick_labels = _tick_labels(curves.ticks, x_low, x_high)
    words = [
        Word(_number(value, scale.digits), _MARGIN_LEFT - 10, round(y_pixel(value)), "right", small, canvas.MUTED)
        for value in scale.ticks
    ]
    under = ABOVE + _AXES_HEIGHT + half_line
    words += [Word(text, round(place), under + 8, "middle", small, canvas.MUTED) for place, text in tick_labels.items()]
    words.append(Word(curves.x_name, _MARGIN_LEFT, under + 30, "left", small, canvas.MUTED))
    words.append(Word(scale.name, canvas.MARGIN, 4 + half_line, "left", small, canvas.MUTED))
    for name, height in heights.items():
        method = name in drawn
        bold = method and STYLES[name].prominent
        left = _MARGIN_LEFT + _AXES_WIDTH + _LEADER_WIDTH + _SAMPLE_WIDTH + 6
        value = _number(last[name], 2)
        words.append(Word(name, left, round(height), "left", size, canvas.INK if method else canvas.MUTED, bold))
        ink = canvas.INK if bold else canvas.MUTED
        words.append(Word(value, WIDTH - canvas.MARGIN, round(height), "right", size, ink, bold))
    return Plot(curves, " ".join(caption), drawn, ends, heights, (x_low, x_high), list(tick_labels), words)


def picture(curves: Curves, title: str, subtitle: str) -> canvas.Picture:
    """Draw curves as a picture (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    plot = arranged(curves)
    agg = FigureCanvasAgg(plotted(plot))
    agg.draw()
    drawn = np.asarray(agg.buffer_rgba())
    picture = canvas.blank(*drawn.shape[:2])
    for channel in range(3):
        picture[..., channel] = drawn[..., channel]
    for word in plot.words:
        mask = canvas.text_mask(word.text, word.size, word.bold)
        height, width = mask.shape
        left = {"left": 0, "middle": width // 2, "right": width}[word.anchor]
        canvas.stamp(picture, mask, round(word.x) - left, word.y - height // 2, word.ink)
    below = canvas.paragraph(plot.caption, WIDTH, size=canvas.SMALL_SIZE, ink=canvas.MUTED)
    parts = [canvas.header(title, subtitle, WIDTH), picture, below, canvas.blank(canvas.MARGIN - 6, WIDTH)]
    return np.concatenate(parts)


def _tick_labels(ticks: Sequence[int], low: float, high: float) -> dict[float, str]:
    """Return the numbers by the x of their centre, without those that would touch the one before."""
    labels: dict[float, str] = {}
    free_from = 0.0
    for tick in ticks:
        width = canvas.text_width(str(tick), canvas.SMALL_SIZE)
        place = (tick - low) / (high - low) * _AXES_WIDTH + _MARGIN_LEFT
        if place - width / 2 >= free_from:
            labels[place] = str(tick)
            free_from = place + width / 2 + 6
    return labels


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def plotted(plot: Plot, head: int = 0, foot: int = 0) -> Any:
    """Draw grid, bands, lines, and the lines' leaders and samples at the right, without text.

    Args:
        plot: Where everything lies.
        head: Pixels that stay empty above the plot.
        foot: Pixels that stay empty below it.

    Returns:
        The matplotlib figure, (head + HEIGHT + foot, WIDTH) pixels at DPI dots per inch.
    """
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Affine2D, Bbox, TransformedBbox

    (x, means, halves, *_), x_limits, ends, heights = plot.curves, plot.x_limits, plot.ends, plot.heights
    scale = plot.curves.scale
    height = head + HEIGHT + foot
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white", layout=cast(Any, "none"))
    # Matplotlib's own axes would take longer to make than all lines in them.
    edge = _MARGIN_LEFT + _AXES_WIDTH
    to_page = Affine2D().scale(1 / WIDTH, -1 / height).translate(0, 1 - head / height) + figure.transFigure
    to_pixels = Affine2D().translate(-x_limits[0], -scale.high)
    to_pixels.scale(_AXES_WIDTH / (x_limits[1] - x_limits[0]), _AXES_HEIGHT / (scale.low - scale.high))
    to_pixels.translate(_MARGIN_LEFT, ABOVE)
    axes = TransformedBbox(Bbox([[_MARGIN_LEFT, ABOVE], [edge, ABOVE + _AXES_HEIGHT]]), to_page)
    dotted_leaders: list[Any] = []
    leaders: list[Any] = []
    leader_colours: list[Any] = []

    def add(artist: Any, inside: bool = True) -> None:
        artist.set_transform(to_pixels + to_page if inside else to_page)
        if inside:
            artist.set_clip_box(axes)
        figure.add_artist(artist)

    def line(xs: Any, ys: Any, inside: bool = True, **properties: Any) -> None:
        add(Line2D(xs, ys, **{"linestyle": "-", "marker": "None", **properties}), inside)

    def leader(at_x: float, at_y: float, name: str, colour: Any, drawing: Mapping[str, Any]) -> None:
        """From the end of a line to its label, and a sample of the line beside that."""
        start = tuple(to_pixels.transform((at_x, at_y)))
        bend, stop = (edge, start[1]), (edge + _LEADER_WIDTH - 2, heights[name])
        dotted_leaders.append((start, bend))
        leaders.append((bend, stop))
        leader_colours.append(colour)
        left, right = edge + _LEADER_WIDTH, edge + _LEADER_WIDTH + _SAMPLE_WIDTH
        places, middle = (left, (left + right) / 2, right), (heights[name],) * 3
        line(places, middle, inside=False, markevery=[1], zorder=102, **drawing)

    for value in scale.ticks:
        shade, width = ("#9aa0a6", 1.2) if value == 0 else ("#e3e6e9", 0.8)
        line(x_limits, (value, value), color=shade, linewidth=width, zorder=1)
    for place in plot.tick_places:
        below = ABOVE + _AXES_HEIGHT
        line((place, place), (below, below + 5), inside=False, color="#9aa0a6", linewidth=0.8)

    for order, method in enumerate(plot.drawn):
        style, mean = STYLES[method], means[method]
        colour = tuple(channel / 255 for channel in method_colour(method))
        zorder = 10 + order
        defined = np.isfinite(mean)
        half = halves.get(method)
        if half is not None:
            for run in _runs(defined & np.isfinite(half)):
                low = np.maximum(mean[run] - half[run], scale.least)
                high = np.minimum(mean[run] + half[run], scale.most)
                if len(run) == 1:
                    both = (float(low[0]), float(high[0]))
                    line((x[run[0]],) * 2, both, color=colour, linewidth=5, alpha=0.25, solid_capstyle="butt", zorder=3)
                    continue
                outline = np.concatenate([np.stack([x[run], low], 1), np.stack([x[run], high], 1)[::-1]])
                band = PolyCollection([outline], facecolors=[(*colour, 0.13)], edgecolors="none", zorder=2)
                add(band)
        dashes: Any = (0, (4.5, 1.8)) if style.weights else "-"
        drawing: dict[str, Any] = {
            "color": colour,
            "linestyle": dashes,
            "linewidth": 3.0 if style.prominent else 1.6,
            "marker": style.marker,
            "markersize": 6.5 if style.prominent else 5.5,
            "markerfacecolor": "white" if style.weights else colour,
            "markeredgecolor": colour if style.weights else "white",
            "markeredgewidth": 1.3 if style.weights else 0.7,
            "dash_capstyle": "butt",
            "solid_joinstyle": "round",
        }
        line(x, np.where(defined, mean, np.nan), markevery=_marked(defined, order), zorder=zorder, **drawing)
        leader(float(x[ends[method]]), float(mean[ends[method]]), method, colour, drawing)
    for name, value in plot.curves.references.items():
        dotted: dict[str, Any] = {"color": _REFERENCE, "linewidth": 1.3, "linestyle": _REFERENCE_DASHES}
        line(x_limits, (value, value), zorder=5, **dotted)
        leader(x_limits[1], value, name, _REFERENCE, dotted)
    thin: dict[str, Any] = {"colors": leader_colours, "linewidths": 0.9, "alpha": 0.6, "zorder": 101}
    # Dotted inside the axes, so that nobody takes a leader for a line of data where the data end early.
    add(LineCollection(dotted_leaders, linestyles=[(0, (1, 3))], **thin), inside=False)
    add(LineCollection(leaders, **thin), inside=False)
    return figure


def _runs(defined: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """Return the positions of every unbroken run of defined values."""
    positions = np.flatnonzero(defined)
    if not len(positions):
        return []
    return np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)


def _marked(defined: NDArray[np.bool_], order: int) -> list[int]:
    """Choose the points that get a marker: about a dozen, shifted from line to line, and all that stand alone."""
    every = max(1, math.ceil(len(defined) / 14))
    spaced = {point for point in range((order * every) // 8, len(defined), every) if defined[point]}
    alone = {int(run[0]) for run in _runs(defined) if len(run) == 1}
    return sorted(spaced | alone)
