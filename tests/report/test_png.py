from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from globenc_lightning.report import canvas, curves, heatmap, png
from globenc_lightning.report.filmstrip import filmstrip

NASTY = ["[CLS]", "<b>", "😀", "🦄", "中文", "مرحبا", "", "\ud800", "ing", "x" * 60, "a\nb", "\u202eabc"]


def decoded(file: bytes) -> tuple[str, np.ndarray]:
    """The file's own mode, P for a table of colours, and its pixels."""
    image = Image.open(io.BytesIO(file))
    return image.mode, np.asarray(image.convert("RGB"))


def off_by(file: bytes, picture: np.ndarray) -> np.ndarray:
    """How far each pixel's red, green or blue is off at most, (height, width)."""
    return np.asarray(np.abs(decoded(file)[1].astype(int) - picture).max(axis=2))


def colours_of(picture: np.ndarray) -> int:
    return len(np.unique(picture.reshape(-1, 3), axis=0))


def words(count: int) -> list[str]:
    return [f"##word{place * 37 % 100}"[: 3 + place % 7] for place in range(count)]


def skewed(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).gamma(0.6, 1.0, shape)


def correlations(examples: int = 16, layers: int = 12) -> dict[str, np.ndarray]:
    """Rho as wide apart as it can be, whose bands lie over each other everywhere: the most colours."""
    draw = np.random.default_rng(1)
    return {method: draw.uniform(-1, 1, (examples, layers)) for method in curves.STYLES}


def over_training(validations: int = 40) -> np.ndarray:
    draw, steps = np.random.default_rng(2), range(0, 25 * validations, 25)
    means = {method: draw.uniform(-0.2, 0.2, validations).cumsum() / 4 for method in curves.STYLES}
    spread = {method: draw.uniform(0.05, 0.3, validations) for method in curves.STYLES}
    return curves.correlation_over_training(list(steps), means, spread=spread, title="Over training")


def with_everything() -> np.ndarray:
    """A filmstrip with both hatches, a frame, and tokens that need fonts of the system."""
    rows = skewed(9, len(NASTY))
    rows[2] = np.nan
    marked = [(3,)] * 9
    return filmstrip(rows, NASTY, range(9), title="中 title", subtitle="🦄 and more", marked=marked, others=[4])


@pytest.mark.parametrize(
    "picture",
    [
        lambda: heatmap.layers_by_tokens(skewed(12, 24), words(24), title="A title", subtitle="more", marked=[3]),
        lambda: heatmap.tokens_by_tokens(skewed(12, 12), NASTY, title="A title", subtitle="more", marked=[3]),
        lambda: filmstrip(skewed(40, 24), words(24), range(0, 4000, 100), title="A title"),
        with_everything,
    ],
    ids=["layers", "last_layer", "filmstrip", "everything"],
)
def test_a_picture_of_few_colours_is_encoded_exactly(picture: Any) -> None:
    expected = picture()
    assert 40 < colours_of(expected) <= 256
    mode, pixels = decoded(png.encoded(expected))
    assert mode == "P"
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 300])
def test_any_number_of_colours(count: int) -> None:
    """Neighbouring colours: where they are too many for the table, some become the one beside them."""
    expected = np.full((20, 60, 3), 7, dtype=np.uint8)
    place = np.arange(20 * 60).reshape(20, 60) % count
    expected[..., 0], expected[..., 1] = place % 200, place // 200
    assert colours_of(expected) == count
    mode, pixels = decoded(png.encoded(expected))
    assert mode == "P"
    assert colours_of(pixels) == min(count, 256)
    assert np.abs(pixels.astype(int) - expected).max() == (count > 256)
    assert (pixels != expected).any(axis=2).mean() == pytest.approx(max(0, count - 256) / count, abs=0.02)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_pictures_of_few_pixels(shape: tuple[int, int]) -> None:
    expected = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(png.encoded(expected))[1], expected)
    # What is not laid out row by row comes out the same.
    view = np.repeat(np.repeat(expected, 2, axis=0), 2, axis=1)[::2, ::-2]
    np.testing.assert_array_equal(decoded(png.encoded(view))[1], view)


def test_a_heatmap_in_all_colours_is_off_by_less_than_can_be_seen() -> None:
    """Every step of the colour table, ink and two greys: more than 256, of which the table's are nearly alike."""
    values = np.random.default_rng(0).uniform(0, 1, (60, 60))
    expected = heatmap.tokens_by_tokens(values, words(60), title="A title", subtitle="more", marked=[5])
    table = {tuple(colour) for colour in canvas.colour_table(heatmap.TABLE).tolist()}
    assert len(table & {tuple(pixel) for pixel in expected.reshape(-1, 3).tolist()}) > 250
    assert colours_of(expected) > 280
    file = png.encoded(expected)
    assert decoded(file)[0] == "P"
    off = off_by(file, expected)
    assert off.max() <= 2
    assert (off > 0).mean() < 0.1
    # Text, the frame and paper are exact.
    text = (expected.max(axis=2) - expected.min(axis=2)) <= 16
    assert text.mean() > 0.2
    assert (off[text & (expected.max(axis=2) > 40)] == 0).all()


@pytest.mark.parametrize(
    "picture",
    [lambda: curves.correlation_by_layer(correlations(), title="By layer", subtitle="more"), over_training],
    ids=["by_layer", "over_training"],
)
def test_curves_look_the_same(picture: Any) -> None:
    expected = picture()
    assert colours_of(expected) > 2000
    file = png.encoded(expected)
    assert decoded(file)[0] == "P"
    off = off_by(file, expected)
    assert off.max() <= png.TOLERANCE
    assert off.mean() < 1
    assert (off > 8).mean() < 0.03
    # What carries the meaning is exact: paper, and each method's own colour.
    for colour in [(255, 255, 255), *map(curves.method_colour, curves.STYLES)]:
        own = (expected == colour).all(axis=2)
        assert own.any()
        assert off[own].max() == 0, colour


def test_a_picture_that_a_table_would_spoil_keeps_all_its_colours() -> None:
    expected = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    mode, pixels = decoded(png.encoded(expected))
    assert mode == "RGB"
    np.testing.assert_array_equal(pixels, expected)


def test_fewer_colours_are_the_commonest_and_none_is_far_from_one_of_them() -> None:
    draw = np.random.default_rng(0)
    colours = np.unique(draw.integers(0, 256, (6000, 3), dtype=np.uint8), axis=0)
    weights = draw.integers(1, 1000, len(colours)).astype(np.float64)
    table, nearest = png.fewer(colours, weights)
    assert table.shape == (256, 3)
    distances = ((colours[:, None].astype(int) - table[None].astype(int)) ** 2).sum(axis=2)
    np.testing.assert_array_equal(distances[np.arange(len(colours)), nearest], distances.min(axis=1))
    commonest = np.argsort(-weights, kind="stable")[: png.COMMONEST]
    assert (distances.min(axis=1)[commonest] == 0).all()
    # Colours picked at random leave a part of the cube without any.
    picked = draw.choice(len(colours), 256, replace=False)
    at_random = ((colours[:, None].astype(int) - colours[picked][None].astype(int)) ** 2).sum(axis=2).min(axis=1)
    assert distances.min(axis=1).max() < 0.7 * at_random.max()


def test_the_same_picture_becomes_the_same_file() -> None:
    picture = over_training(12)
    assert png.encoded(picture) == png.encoded(picture.copy())


@pytest.mark.parametrize(
    ("picture", "most"),
    [
        (
            lambda: heatmap.layers_by_tokens(np.random.default_rng(0).random((12, 30)), words(30), title="t" * 40),
            11_000,
        ),
        (
            lambda: heatmap.tokens_by_tokens(np.random.default_rng(0).random((30, 30)), words(30), title="t" * 40),
            15_500,
        ),
        (lambda: filmstrip(np.random.default_rng(0).random((40, 30)), words(30), range(40), title="t" * 40), 17_000),
        (lambda: heatmap.tokens_by_tokens(np.random.default_rng(0).random((128, 128)), words(128), title="t"), 105_000),
        (lambda: curves.correlation_by_layer(correlations(), title="By layer"), 43_000),
        (over_training, 43_000),
    ],
    ids=["layers", "last_layer", "filmstrip", "last_layer of 128", "by_layer", "over_training"],
)
def test_files_are_small(picture: Any, most: int) -> None:
    """Of random figures, which nothing can compress: the cells alone are told by 8 bits each."""
    expected = picture()
    full = io.BytesIO()
    Image.fromarray(expected).save(full, "PNG")
    size = len(png.encoded(expected))
    assert size <= most
    assert size < 0.7 * len(full.getvalue())
