from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from globenc_lightning.report import canvas, curves
from globenc_lightning.settings import FURTHER_METHODS

METHODS = ("W", "W-FixedRes", "W-Res", "N", "N-FixedRes", "N-Res", "N-ResLN", "N-Enc")


def pixels_of(picture: np.ndarray, method: str) -> np.ndarray:
    """Return where (y, x), inside the axes, the picture has exactly the method's colour."""
    inside = picture[:, curves._MARGIN_LEFT : curves._MARGIN_LEFT + curves._AXES_WIDTH]
    return np.argwhere((inside == curves.method_colour(method)).all(axis=2))


def correlations(layers: int = 6, examples: int = 8, methods: tuple[str, ...] = METHODS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    places = np.linspace(-0.7, 0.9, len(METHODS))
    return {
        method: np.clip(places[METHODS.index(method)] + rng.normal(0, 0.05, (examples, layers)), -1, 1)
        for method in methods
    }


def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    set_text = canvas.paragraph

    def record(text: str, *args: Any, **kwargs: Any) -> canvas.Picture:
        if text.startswith("Lines:"):
            seen.append(text)
        return set_text(text, *args, **kwargs)

    monkeypatch.setattr(canvas, "paragraph", record)
    return seen


def test_interval_is_that_of_scipy_and_leaves_nan_out() -> None:
    values = np.random.default_rng(0).normal(size=(9, 4))
    values[2:5, 1] = np.nan
    values[1:, 2] = np.nan
    values[:, 3] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, half, defined, undefined = curves.mean_and_interval(values)
    assert defined.tolist() == [9, 6, 1, 0]
    assert undefined.tolist() == [0, 3, 8, 9]
    for column in (0, 1):
        sample = values[np.isfinite(values[:, column]), column]
        low, high = stats.t.interval(0.95, len(sample) - 1, loc=sample.mean(), scale=stats.sem(sample))
        np.testing.assert_allclose([mean[column] - half[column], mean[column] + half[column]], [low, high], rtol=1e-12)
    assert mean[2] == values[0, 2]
    assert np.isnan(half[2])
    assert np.isnan(mean[3])
    assert np.isnan(half[3])


def test_interval_works_on_any_number_of_axes() -> None:
    mean, half, defined, undefined = curves.mean_and_interval([0.1, 0.3])
    assert mean.shape == half.shape == defined.shape == undefined.shape == ()
    np.testing.assert_allclose(half, stats.t.ppf(0.975, 1) * 0.1)
    assert curves.mean_and_interval(np.ones((3, 2, 4)))[0].shape == (2, 4)
    assert curves.mean_and_interval(np.ones((0, 2)))[2].tolist() == [0, 0]
    with pytest.raises(ValueError, match="single number"):
        curves.mean_and_interval(1.0)


def test_styles_cover_the_methods_and_separate_the_families_without_colour() -> None:
    assert tuple(curves.STYLES) == (*METHODS, *FURTHER_METHODS)
    assert len({curves.method_colour(method) for method in curves.STYLES}) == 10
    assert [style.weights for style in curves.STYLES.values()] == [True] * 3 + [False] * 7
    assert len({(style.marker, style.weights) for style in curves.STYLES.values()}) == 10
    assert [method for method, style in curves.STYLES.items() if style.prominent] == ["N-Enc"]


def test_a_method_keeps_its_colour_in_every_subset_and_order() -> None:
    for subset in (("N-Enc",), ("N-Enc", "W"), ("W", "N-Res"), METHODS, METHODS[::-1]):
        picture = curves.correlation_by_layer(correlations(methods=subset), title="t")
        for method in METHODS:
            assert (len(pixels_of(picture, method)) > 20) == (method in subset), (subset, method)


def test_the_prominent_method_has_the_most_ink() -> None:
    picture = curves.correlation_by_layer(correlations(), title="t")
    ink = {method: len(pixels_of(picture, method)) for method in METHODS}
    assert max(ink, key=lambda method: ink[method]) == "N-Enc"


@pytest.mark.parametrize("value", [-1.0, -0.5, 0.0, 0.25, 1.0])
def test_lines_lie_at_the_height_of_their_value(value: float) -> None:
    picture = curves.correlation_by_layer({"N-Enc": np.full((2, 5), value)}, title="")
    top = len(canvas.header("", "", curves.WIDTH)) + curves.ABOVE
    expected = top + (curves._Y_LIMIT - value) / (2 * curves._Y_LIMIT) * curves._AXES_HEIGHT
    found = pixels_of(picture, "N-Enc")
    assert abs(found[:, 0].mean() - expected) < 1.5
    assert np.ptp(found[:, 1]) > 0.9 * curves._AXES_WIDTH


def test_nan_leaves_a_gap_and_a_lonely_point_is_marked() -> None:
    steps = np.arange(40)
    whole = np.full(40, 0.3)
    with_gap = whole.copy()
    with_gap[10:20] = np.nan
    with_gap[14] = 0.3
    columns = [
        np.unique(pixels_of(curves.correlation_over_training(steps, {"N": values}, title="t"), "N")[:, 1])
        for values in (whole, with_gap)
    ]
    assert np.diff(columns[0]).max() <= 4
    gaps = np.flatnonzero(np.diff(columns[1]) > 30)
    assert len(gaps) == 2
    island = columns[1][gaps[0] + 1 : gaps[1] + 1]
    assert 3 <= len(island) <= 12


@pytest.mark.parametrize("method", METHODS)
def test_a_single_step_and_a_single_layer_are_visible(method: str) -> None:
    picture = curves.correlation_over_training([500], {method: [0.4]}, spread={method: [0.1]}, title="t")
    assert len(pixels_of(picture, method)) >= 4
    picture = curves.correlation_by_layer({method: [[0.4]]}, title="t")
    assert len(pixels_of(picture, method)) >= 4


def test_a_band_is_drawn_for_two_examples_and_not_for_one() -> None:
    def tinted(picture: np.ndarray) -> int:
        red = np.array(curves.method_colour("N-Enc"))
        band = np.round(255 + (red - 255) * 0.13)
        return int((np.abs(picture.astype(int) - band) <= 2).all(axis=2).sum())

    values = np.array([[0.2] * 4, [0.25] * 4, [0.3] * 4])
    assert tinted(curves.correlation_by_layer({"N-Enc": values}, title="t")) > 5000
    assert tinted(curves.correlation_by_layer({"N-Enc": values[:1]}, title="t")) < 50
    means = {"N-Enc": np.full(6, 0.3)}
    assert (
        tinted(curves.correlation_over_training(range(6), means, spread={"N-Enc": np.full(6, 0.1)}, title="t")) > 5000
    )
    assert tinted(curves.correlation_over_training(range(6), means, title="t")) < 50


def test_caption_says_what_the_band_is_how_many_and_what_is_undefined(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = captions(monkeypatch)
    values = correlations(examples=8)
    curves.correlation_by_layer(values, title="t")
    assert "n = 8;" in seen[-1]
    assert "95 % confidence interval" in seen[-1]
    assert "No ρ is undefined." in seen[-1]
    values["N"][:3, 0] = np.nan
    values["W"][:] = np.nan
    curves.correlation_by_layer(values, title="t")
    assert "n = 0–8;" in seen[-1]
    assert "51 of 384 ρ" in seen[-1]
    assert "Without any defined ρ: W." in seen[-1]
    curves.correlation_by_layer({"N": [[0.1, 0.2]]}, title="t")
    assert "No bands" in seen[-1]
    curves.correlation_over_training([1, 2], {"N": [0.1, 0.2]}, title="t")
    assert "confidence" not in seen[-1]


def test_everything_undefined_still_makes_a_picture() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves.correlation_by_layer({"N": np.full((3, 4), np.nan)}, title="t")
        curves.correlation_over_training([1, 2], {"N": [np.nan, np.nan]}, title="t")


def labels_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """Record the box (top, bottom, left, right) of every text stamped beside the lines' ends."""
    boxes: list[tuple[int, int, int, int]] = []
    stamp = canvas.stamp

    def record(picture: np.ndarray, mask: np.ndarray, x: int, y: int, *args: Any) -> None:
        if x > curves._MARGIN_LEFT + curves._AXES_WIDTH:
            boxes.append((y, y + mask.shape[0], x, x + mask.shape[1]))
        stamp(picture, mask, x, y, *args)

    monkeypatch.setattr(canvas, "stamp", record)
    return boxes


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_labels_do_not_overlap_even_if_all_lines_end_together(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    boxes = labels_of(monkeypatch)
    picture = curves.correlation_by_layer({method: np.full((2, 3), value) for method in METHODS}, title="t")
    assert len(boxes) == 16
    for (top, bottom, left, right), (other_top, other_bottom, other_left, other_right) in itertools.combinations(
        boxes, 2
    ):
        assert bottom <= other_top or other_bottom <= top or right <= other_left or other_right <= left
    assert max(right for _, _, _, right in boxes) <= picture.shape[1] - canvas.MARGIN
    for border in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
        assert (border == canvas.PAPER).all()


def test_no_text_lies_on_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = labels_of(monkeypatch)
    curves.correlation_over_training(range(50), {method: np.linspace(0, 0.5, 50) for method in METHODS}, title="t")
    samples_end = curves._MARGIN_LEFT + curves._AXES_WIDTH + curves._LEADER_WIDTH + curves._SAMPLE_WIDTH
    assert min(left for _, _, left, _ in boxes) > samples_end


@given(st.lists(st.floats(0, 400), min_size=1, max_size=8).map(sorted))
@settings(deadline=None)
def test_label_heights_keep_order_distance_and_limits(wanted: list[float]) -> None:
    heights = curves.label_heights(wanted, 20, 10, 390)
    assert all(after - before >= 20 - 1e-6 for before, after in itertools.pairwise(heights))
    assert heights[0] >= 10 - 1e-6
    assert heights[-1] <= 390 + 1e-6
    if all(after - before >= 20 for before, after in itertools.pairwise(wanted)):
        np.testing.assert_allclose(heights, np.clip(heights, 10, 390))


def test_label_heights_leave_labels_alone_that_have_room() -> None:
    assert curves.label_heights([50, 100, 200], 20, 10, 390) == [50, 100, 200]
    assert curves.label_heights([100, 100, 300], 20, 10, 390) == [90, 110, 300]


def test_layer_ticks_are_whole_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    render = canvas.text_mask

    def record(text: str, *args: Any) -> canvas.Picture:
        texts.append(text)
        return render(text, *args)

    monkeypatch.setattr(canvas, "text_mask", record)
    curves.correlation_by_layer({"N": np.zeros((2, 12))}, title="")
    assert [str(layer) for layer in range(1, 13)] == list(dict.fromkeys(text for text in texts if text.isdigit()))
    texts.clear()
    curves.correlation_by_layer({"N": np.zeros((2, 48))}, title="")
    assert list(dict.fromkeys(text for text in texts if text.isdigit())) == [
        "1",
        *(str(layer) for layer in range(4, 49, 2)),
    ]


def test_the_users_matplotlib_plays_no_part_and_is_left_alone() -> None:
    plain = curves.correlation_by_layer(correlations(), title="t")
    style = {
        "text.usetex": True, "font.size": 30, "lines.linewidth": 9, "axes.facecolor": "black", "figure.dpi": 30,
        "figure.facecolor": "black", "axes.grid": True, "figure.autolayout": True,
        "lines.linestyle": ":", "lines.marker": "x", "savefig.dpi": 10, "figure.constrained_layout.use": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        before = dict(matplotlib.rcParams)
        styled = curves.correlation_by_layer(correlations(), title="t")
        assert dict(matplotlib.rcParams) == before
    np.testing.assert_array_equal(plain, styled)


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    # A bare package in place of the real one: libraries imported there may well import pyplot themselves.
    package = str(Path(curves.__file__).parent.parent)
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('globenc_lightning'); package.__path__ = [{package!r}]\n"
        "sys.modules['globenc_lightning'] = package\n"
        "from globenc_lightning.measurement import History\n"
        "from globenc_lightning.report import curves, stills\n"
        "curves.correlation_over_training([1, 2], {'N': [0.1, 0.2]}, title='t')\n"
        "plot = curves.over_training([1, 2], {'N': [0.1, 0.2]})\n"
        "for name in ('a.svg', 'a.png'):\n"
        f"    stills._save(stills.Path({str(tmp_path)!r}, name), 100, lambda: stills._curves(plot, 't', ''))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nasty_titles_are_drawn() -> None:
    picture = curves.correlation_by_layer(
        correlations(), title="$\\frac{ \x00 中 😀 " + "w" * 300, subtitle="\u202e\n<b>"
    )
    assert (picture[:, -4:] == canvas.PAPER).all()
    assert picture.dtype == np.uint8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curves.correlation_by_layer({}, title="t"), "at least one method"),
        (lambda: curves.correlation_by_layer({"N-Foo": np.ones((2, 2))}, title="t"), "no method 'N-Foo'"),
        (lambda: curves.correlation_by_layer({"N": np.ones(2)}, title="t"), r"\(b, l\)"),
        (lambda: curves.correlation_by_layer({"N": np.ones((2, 2)), "W": np.ones((2, 3))}, title="t"), "one length"),
        (lambda: curves.correlation_over_training([], {"N": []}, title="t"), "not empty"),
        (lambda: curves.correlation_over_training([1], {"N": [1, 2]}, title="t"), "one value per step"),
        (
            lambda: curves.correlation_over_training([1], {"N": [1]}, spread={"N": [1, 2]}, title="t"),
            "one value per step",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
