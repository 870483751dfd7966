from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps

from globenc_lightning.report import canvas, fonts

NASTY = [
    "<script>", "\"'`", "\x00", "😀", "🦄", "中文", "مرحبا", "שלום", "", " ", "x" * 60, "a\nb\t", "\u202eabc", "\ud800",
    "e" + "\u0301" * 40, "\u0301", "$x^2$", "▁the", "Ġnot", "\u200b", "\ufffd", "W" * 20,
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[CLS]", "[CLS]"),
        ("##ing", "##ing"),
        ("<script>", "<script>"),
        ("", "(empty)"),
        (" ", "␣"),
        (" two words ", "␣two words␣"),
        ("\x00", "\\x00"),
        ("a\nb\t", "a\\nb\\t"),
        ("中", "U+4E2D"),
        ("中文", "U+4E2D+6587"),
        ("a中b", "a‹U+4E2D›b"),
        ("中 文", "‹U+4E2D› ‹U+6587›"),
        ("🦄", "U+1F984"),
        ("\u202eabc", "‹U+202E›abc"),
        ("\ud800", "U+D800"),
        ("\u200b", "U+200B"),
        ("مرحبا", "مرحبا"),
        ("▁the", "▁the"),
    ],
)
def test_readable_shows_every_part_of_a_text(text: str, shown: str) -> None:
    assert canvas.readable(text, fonts=fonts.Fonts([])) == shown


def test_readable_shortens_with_an_ellipsis_and_only_what_is_too_long() -> None:
    assert canvas.readable("x" * 60, 20) == "x" * 19 + "…"
    assert canvas.readable("x" * 20, 20) == "x" * 20
    assert len(canvas.readable("中" * 9, 20, fonts.Fonts([]))) == 20
    assert len(canvas.readable("x" * 100_000, 20)) == 20


@given(st.text(alphabet=st.characters(codec=None), max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_string_can_be_drawn_with_glyphs_of_the_fonts(text: str) -> None:
    shown = canvas.readable(text, canvas.LABEL_LIMIT)
    assert shown
    assert all(ord(character) in canvas._drawable() for character in shown)
    assert canvas.text_mask(shown, 12).shape[0] == canvas.line_height(12)


def test_colour_table_is_that_of_matplotlib() -> None:
    expected = np.round(np.array(colormaps["magma_r"].colors) * 255)
    assert np.array_equal(canvas.colour_table("magma_r"), expected)


def test_text_mask_holds_all_of_the_ink() -> None:
    for text in ("[CLS]", "jÿ", "overwhelming", "مرحبا"):
        mask = canvas.text_mask(text, 13)
        roomy = canvas.Image.new("L", (400, 100))
        canvas.ImageDraw.Draw(roomy).text((100, 50), text, fill=255, font=canvas.font(13), anchor="ls")
        assert int(mask.sum(dtype=np.int64)) == int(np.asarray(roomy).sum(dtype=np.int64))


def test_stamp_blends_ink_and_survives_every_edge() -> None:
    picture = canvas.blank(10, 10)
    canvas.stamp(picture, np.array([[255, 0, 128]], dtype=np.uint8), 2, 3, (10, 20, 30))
    assert picture[3, 2].tolist() == [10, 20, 30]
    assert picture[3, 3].tolist() == [255, 255, 255]
    assert picture[3, 4].tolist() == [132, 137, 142]
    before = picture.copy()
    full = np.full((4, 4), 255, dtype=np.uint8)
    canvas.stamp(picture, full, 20, 20)
    canvas.stamp(picture, full, -4, 0)
    assert np.array_equal(picture, before)
    canvas.stamp(picture, full, -2, 8, (0, 0, 0))
    assert (picture[8:, :2] == 0).all()
    assert (picture[8:, 2:] == 255).all()


def test_wrap_keeps_all_text_within_the_width() -> None:
    text = "a title with " + "averylongwordwithoutanybreak" * 4 + " in it\nand a second line"
    lines = canvas.wrap(text, 18, 200, bold=True)
    assert all(canvas.text_width(line, 18, bold=True) <= 201 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert canvas.wrap("", 18, 200) == []
    assert canvas.wrap("one\n\ntwo", 18, 200) == ["one", "", "two"]


@given(st.integers(1, 1200), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_thinned_labels_keep_their_distance_and_both_ends(count: int, pitch: int, room: int) -> None:
    shown = canvas.thinned(count, pitch, room)
    assert shown[0] == 0
    assert shown[-1] == count - 1
    assert shown == sorted(set(shown))
    if (count - 1) * pitch >= room:
        assert all((after - before) * pitch >= room for before, after in itertools.pairwise(shown))


def test_shares_divides_each_row_by_its_own_largest_value() -> None:
    rows = np.array([[1.0, 2.0, 4.0], [1e300, 5e299, 0.0], [1e-310, 5e-311, 0.0], [0.0, 0.0, 0.0], [-1.0, 1.0, 0.5]])
    part = canvas.shares(rows)
    np.testing.assert_allclose(part, [[0.25, 0.5, 1], [1, 0.5, 0], [1, 0.5, 0], [0, 0, 0], [0, 1, 0.5]])
    part = canvas.shares(np.array([[np.nan, 2.0, np.inf, 1.0], [np.nan] * 4]))
    np.testing.assert_array_equal(part, [[np.nan, 1, np.nan, 0.5], [np.nan] * 4])


@pytest.mark.parametrize(("height", "width"), [(1, 30), (3, 18), (20, 20), (36, 56)])
def test_cells_show_table_colours_and_hatch_what_is_missing(height: int, width: int) -> None:
    part = np.array([[0.0, 0.5, 1.0], [np.nan, 0.25, 0.75], [np.nan] * 3])
    picture = canvas.cells(part, height, width, "magma_r")
    assert picture.shape == (3 * height, 3 * width, 3)
    table = canvas.colour_table("magma_r")
    for row, column in np.argwhere(~np.isnan(part)):
        centre = picture[row * height + (height - 1) // 2, column * width + (width - 1) // 2]
        assert np.array_equal(centre, table[round(part[row, column] * 255)])
    greys = {(canvas.MISSING,) * 3, (canvas.MISSING_HATCH,) * 3}
    gap = picture[2 * height : 2 * height + max(1, height - 1), : width - 1].reshape(-1, 3)
    assert {tuple(pixel) for pixel in gap.tolist()} == greys
    assert not greys & {tuple(colour) for colour in table.tolist()}


@pytest.mark.parametrize(
    ("cell", "count"),
    [(cell, count) for cell in (56, 48, 30, 24, 20, 18, 16) for count in (1, 2, 17, 128)]
    + [(cell, count) for cell in (7, 4, 1) for count in (129, 300, 2000)],
)
def test_column_labels_neither_overlap_nor_leave_their_column(cell: int, count: int) -> None:
    tokens = [NASTY[i % len(NASTY)] if i % 3 else "##overwhelming" for i in range(count)]
    labels = canvas.column_labels(tokens, cell, 400, 10)
    cover = np.zeros((400, 400 + cell * count + 200), dtype=np.int64)
    for mask, x, y, *_ in labels:
        assert x >= 0
        assert y >= 10
        cover[y : y + mask.shape[0], x : x + mask.shape[1]] += np.asarray(mask) > 100
    assert cover.max() <= 1
    assert cell < 16 or len(labels) == count


def test_column_labels_lie_flat_where_they_fit_and_end_under_their_cell() -> None:
    flat = canvas.column_labels(["a", "[CLS]"], 56, 0, 0)
    assert [label.mask.shape[0] for label in flat] == [canvas.line_height(canvas.TEXT_SIZE)] * 2
    slanted = canvas.column_labels(["overwhelming"] * 5, 30, 300, 0)
    for number, (mask, x, y, *_) in enumerate(slanted):
        ys, xs = np.nonzero(np.asarray(mask) > 100)
        assert abs(x + xs.max() - (300 + 30 * number + 15)) < 10
        assert y + ys.min() < 10


@pytest.mark.parametrize("cell", [1, 3, 8, 14, 16, 22, 36])
def test_row_labels_do_not_overlap_and_end_before_the_grid(cell: int) -> None:
    labels = canvas.row_labels([str(step) for step in range(0, 50_000, 500)], cell, 200, 30)
    for label in labels:
        assert label.x + label.mask.shape[1] == 200
    for above, below in itertools.pairwise(labels):
        assert above.y + above.mask.shape[0] <= below.y + 1


def test_scale_bar_runs_from_the_tables_first_to_its_last_colour() -> None:
    bar = canvas.scale_bar("magma_r", "share of something", 560, missing=False)
    table = canvas.colour_table("magma_r")
    assert np.array_equal(bar[8, canvas.MARGIN], table[0])
    assert np.array_equal(bar[8, canvas.MARGIN + 179], table[255])
    long_name = canvas.scale_bar("magma_r", "a very long name of a scale " * 8, 560, missing=True)
    assert len(long_name) > len(bar)
    assert (long_name[:, -canvas.MARGIN :] == canvas.PAPER).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(3), "two-dimensional"),
        (np.ones((0, 3)), "two-dimensional"),
        (np.ones((2, 4)), "4 columns for 3 tokens"),
    ],
)
def test_checked_grid_says_what_is_wrong(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        canvas.checked_grid(values, ["a", "b", "c"], "rows")


def test_the_drawing_modules_load_no_heavy_library() -> None:
    # A bare package in place of the real one, whose own imports are none of this module's business.
    package = str(Path(canvas.__file__).parent.parent)
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('globenc_lightning'); package.__path__ = [{package!r}]\n"
        "sys.modules['globenc_lightning'] = package\n"
        "import globenc_lightning.report\n"
        "assert not {'matplotlib', 'scipy', 'torch', 'pytorch_lightning'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
