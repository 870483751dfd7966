from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from globenc_lightning.report import canvas, heatmap

WORDS = [
    "[CLS]",
    "the",
    "film",
    "'",
    "s",
    "overwhelming",
    "charm",
    "is",
    "under",
    "##cut",
    "by",
    "an",
    "un",
    "##for",
    "##gi",
    "##vably",
    "long",
    "act",
    ".",
    "[SEP]",
]
NASTY = ["<script>", "\"'", "\x00", "😀", "🦄", "中文", "مرحبا", "", "x" * 60, "a\nb", "\ud800", "\u202eabc"]


def tokens_of(count: int) -> list[str]:
    return [WORDS[i % len(WORDS)] for i in range(count)]


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[canvas.GridLayout, int, int]]:
    """Record where the grid of each picture lies, and its cells' height and width."""
    seen: list[tuple[canvas.GridLayout, int, int]] = []
    lay_out = canvas.grid_layout

    def record(*args: Any, **kwargs: Any) -> canvas.GridLayout:
        layout = lay_out(*args, **kwargs)
        seen.append((layout, kwargs["cell_height"], kwargs["cell_width"]))
        return layout

    monkeypatch.setattr(canvas, "grid_layout", record)
    return seen


def assert_cells(picture: np.ndarray, where: tuple[canvas.GridLayout, int, int], part: np.ndarray) -> None:
    layout, height, width = where
    table = canvas.colour_table(heatmap.TABLE)
    y = layout.top + np.arange(part.shape[0]) * height + (height - 1) // 2
    x = layout.left + np.arange(part.shape[1]) * width + (width - 1) // 2
    np.testing.assert_array_equal(picture[np.ix_(y, x)], table[np.round(part * 255).astype(int)])


def assert_nothing_is_cut(picture: np.ndarray) -> None:
    border = np.concatenate(
        [picture[:4].ravel(), picture[-4:].ravel(), picture[:, :4].ravel(), picture[:, -4:].ravel()]
    )
    assert (border == canvas.PAPER).all()


@pytest.mark.parametrize("layers", [1, 6, 12, 24, 48])
@pytest.mark.parametrize("count", [1, 8, 30, 128, 300])
def test_layers_by_tokens_paints_each_value_in_its_place(
    layers: int, count: int, layouts: list[tuple[canvas.GridLayout, int, int]]
) -> None:
    rows = np.random.default_rng(0).gamma(0.6, 1.0, (layers, count)) * 10.0 ** np.arange(layers)[:, None]
    picture = heatmap.layers_by_tokens(rows, tokens_of(count), title="A title", subtitle="and more")
    assert picture.dtype == np.uint8
    assert picture.shape == (layouts[-1][0].height, layouts[-1][0].width, 3)
    # Layer 1 is the lowest row.
    assert_cells(picture, layouts[-1], (rows / rows.max(axis=1, keepdims=True))[::-1])
    assert_nothing_is_cut(picture)
    assert 560 <= picture.shape[1] <= 2450
    assert picture.shape[0] <= 1100


@pytest.mark.parametrize("count", [1, 8, 30, 128, 300])
def test_tokens_by_tokens_paints_receiving_rows_and_attended_columns(
    count: int, layouts: list[tuple[canvas.GridLayout, int, int]]
) -> None:
    matrix = np.random.default_rng(0).gamma(0.6, 1.0, (count, count))
    picture = heatmap.tokens_by_tokens(matrix, tokens_of(count), title="A title")
    assert_cells(picture, layouts[-1], matrix / matrix.max(axis=1, keepdims=True))
    assert_nothing_is_cut(picture)
    assert picture.shape[1] <= 2450


def test_all_tokens_and_layers_are_labelled_up_to_128_tokens(
    layouts: list[tuple[canvas.GridLayout, int, int]],
) -> None:
    heatmap.layers_by_tokens(np.ones((48, 128)), tokens_of(128), title="t")
    assert len(layouts[-1][0].labels) == 128 + 48
    heatmap.tokens_by_tokens(np.ones((128, 128)), tokens_of(128), title="t")
    assert len(layouts[-1][0].labels) == 128 + 128


@pytest.mark.parametrize("draw", [heatmap.layers_by_tokens, heatmap.tokens_by_tokens])
@pytest.mark.parametrize("count", [1, 12, 60])
def test_nasty_tokens_are_all_shown_and_nothing_touches_the_border(draw: Any, count: int) -> None:
    tokens = [NASTY[i % len(NASTY)] for i in range(count)]
    picture = draw(
        np.ones((count, count)), tokens, title="\x00 中 $x$ " + "W" * 200, subtitle="<b>\n\u202e" + "y" * 300
    )
    assert_nothing_is_cut(picture)


def test_labels_of_different_tokens_look_different() -> None:
    pictures = [heatmap.layers_by_tokens([[1.0]], [token], title="t").tobytes() for token in NASTY]
    assert len(set(pictures)) == len(pictures)


def test_labels_stay_off_the_cells(layouts: list[tuple[canvas.GridLayout, int, int]]) -> None:
    for count in (1, 8, 30, 128):
        heatmap.tokens_by_tokens(np.ones((count, count)), tokens_of(count), title="t")
        layout, height, _ = layouts[-1]
        for mask, x, y, *_ in layout.labels:
            assert x + mask.shape[1] <= layout.left or y >= layout.top + count * height


def test_a_missing_value_is_hatched_and_explained(layouts: list[tuple[canvas.GridLayout, int, int]]) -> None:
    rows = np.ones((2, 8))
    full = heatmap.layers_by_tokens(rows, tokens_of(8), title="t")
    rows[0, 3] = np.nan
    picture = heatmap.layers_by_tokens(rows, tokens_of(8), title="t")
    layout, height, width = layouts[-1]
    cell = picture[
        layout.top + height : layout.top + 2 * height - 1, layout.left + 3 * width : layout.left + 4 * width - 1
    ]
    assert set(np.unique(cell)) == {canvas.MISSING, canvas.MISSING_HATCH}
    assert (full[: layouts[0][0].top] == canvas.MISSING_HATCH).all(axis=2).sum() == 0
    assert (picture[: layout.top] == canvas.MISSING_HATCH).all(axis=2).sum() > 20


def test_a_long_title_makes_the_picture_higher_but_not_wider() -> None:
    short = heatmap.layers_by_tokens(np.ones((2, 8)), tokens_of(8), title="short")
    long = heatmap.layers_by_tokens(np.ones((2, 8)), tokens_of(8), title="a title of very many words " * 8)
    assert long.shape[0] > short.shape[0]
    assert long.shape[1] == short.shape[1]
    assert_nothing_is_cut(long)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one token per column"):
        heatmap.layers_by_tokens(np.ones((2, 3)), ["a"], title="t")
    with pytest.raises(ValueError, match="as many receiving as attended"):
        heatmap.tokens_by_tokens(np.ones((2, 3)), ["a", "b", "c"], title="t")
