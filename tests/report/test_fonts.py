from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from globenc_lightning.report import canvas, filmstrip, fonts, heatmap

RARE = "𐤀"
"""PHOENICIAN LETTER ALF, which DejaVu Sans does not have."""
TALL, BLANK, ABSENT = "𐤁", "𐤂", "𐤃"


def box(x0: int, y0: int, x1: int, y1: int) -> object:
    pen = TTGlyphPen(None)
    for place, corner in enumerate(((x0, y0), (x0, y1), (x1, y1), (x1, y0))):
        (pen.lineTo if place else pen.moveTo)(corner)
    pen.closePath()
    return pen.glyph()


def write_font(path: Path, name: str, letters: str) -> str:
    """A font of boxes: one for each letter, as wide as high; one far too high; one blank."""
    drawn = {RARE: box(100, 0, 900, 700), TALL: box(100, -900, 900, 2000), BLANK: TTGlyphPen(None).glyph()}
    names = {letter: f"letter{place}" for place, letter in enumerate(letters)}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(letter): glyph for letter, glyph in names.items()})
    builder.setupGlyf({".notdef": box(0, 0, 500, 500), **{names[letter]: drawn[letter] for letter in letters}})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write_font(tmp_path / "Rare.ttf", "Rare", RARE + TALL + BLANK)


@pytest.fixture
def rare(file: str, monkeypatch: pytest.MonkeyPatch) -> fonts.Fonts:
    """A machine with that one font."""
    found = fonts.Fonts([file])
    monkeypatch.setattr(fonts, "installed", lambda outlines=False: found)
    return found


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> fonts.Fonts:
    found = fonts.Fonts([])
    monkeypatch.setattr(fonts, "installed", lambda outlines=False: found)
    return found


def test_a_font_of_the_machine_draws_what_dejavu_lacks(file: str, rare: fonts.Fonts) -> None:
    assert rare.find(ord(RARE)) == file
    assert rare.find(ord("é")) is None
    assert all(ord(letter) in rare for letter in f"é▁⋯↵⇥{RARE}{TALL}")
    assert ord(ABSENT) not in rare
    assert canvas.readable(f"a{RARE}{ABSENT}") == f"a{RARE}‹U+10903›"
    assert rare.runs(f"ab{RARE}{TALL}c") == [("ab", None), (RARE + TALL, file), ("c", None)]
    plain, mixed = canvas.text_mask("ab", 13), canvas.text_mask(f"ab{RARE}", 13)
    assert np.array_equal(mixed[:, : plain.shape[1]], plain)
    added = mixed[:, plain.shape[1] :]
    # A box of 0.8 by 0.7 of the size, standing on the base line.
    assert added.shape == (canvas.line_height(13), 13)
    assert int(added.sum()) == pytest.approx(255 * 0.8 * 13 * 0.7 * 13, rel=0.05)
    below = canvas.font(13).getmetrics()[0]
    assert added[below - 1].any()
    assert not added[below:].any()


def test_a_glyph_that_is_higher_than_a_line_is_made_smaller(rare: fonts.Fonts) -> None:
    mask = canvas.text_mask(TALL, 13)
    assert mask.shape[0] == canvas.line_height(13)
    rows, columns = np.nonzero(mask > 100)
    assert rows.max() - rows.min() > 8
    # The shape stays.
    assert (rows.max() - rows.min() + 1) / (columns.max() - columns.min() + 1) == pytest.approx(2900 / 800, rel=0.35)


def test_a_blank_glyph_is_none(rare: fonts.Fonts) -> None:
    assert canvas.readable(BLANK) == "U+10902"


def test_without_any_font_code_points_are_shown(no_fonts: fonts.Fonts) -> None:
    assert canvas.readable(RARE) == "U+10900"
    assert canvas.readable("日本 é") == "‹U+65E5+672C› é"
    assert no_fonts.runs("é") == [("é", None)]
    picture = heatmap.layers_by_tokens(np.ones((2, 2)), ["日本", "▁é"], title="日本")
    assert (picture != canvas.PAPER).any()


def test_pictures_show_the_letter_and_not_its_code_point(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {}
    for name, files in (("none", []), ("rare", [file])):
        found = fonts.Fonts(files)
        monkeypatch.setattr(fonts, "installed", lambda outlines=False, found=found: found)
        rows, tokens = np.ones((2, 12)), [f"▁{RARE}"] * 12
        pictures[name] = [
            heatmap.layers_by_tokens(rows, tokens, title="t"),
            heatmap.tokens_by_tokens(np.ones((12, 12)), tokens, title="t"),
            filmstrip.filmstrip(rows, tokens, [1, 2], title="t"),
        ]
    # A letter takes less room below the columns than a slanted code point.
    for none, rare in zip(pictures["none"], pictures["rare"], strict=True):
        assert rare.shape[0] < none.shape[0] - 20


def test_titles_are_wrapped_by_the_width_that_they_take(rare: fonts.Fonts) -> None:
    lines = canvas.wrap(f"{RARE * 30} and {RARE}", 18, 200)
    assert all(canvas.text_width(line, 18) <= 201 for line in lines)
    assert "".join(lines).replace(" ", "") == f"{RARE * 30}and{RARE}"


def test_marks_stay_with_their_letter_where_its_font_has_them(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fonts.Fonts([file])
    # DejaVu Sans has the accent, the other font does not: nothing is lost.
    assert found.runs(f"{RARE}\u0301e\u0301") == [(RARE, file), ("\u0301e\u0301", None)]
    monkeypatch.setattr(fonts, "_characters_of", lambda file, outlines=False: frozenset({ord(RARE), 0x301}))
    assert fonts.Fonts([file]).runs(f"{RARE}\u0301e\u0301") == [(f"{RARE}\u0301", file), ("e\u0301", None)]


def test_files_are_read_when_they_are_needed_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_font(tmp_path / f"{name}.ttf", name, letters) for name, letters in (("A", RARE), ("B", RARE + TALL))]
    read, listed = [], []
    reading = fonts._characters_of
    monkeypatch.setattr(fonts, "_characters_of", lambda file, outlines=False: read.append(file) or reading(file))

    def listing() -> list[str]:
        listed.append(1)
        return files

    found = fonts.Fonts(listing)
    assert ord("é") in found
    assert (read, listed) == ([], [])
    assert found.find(ord(RARE)) == files[0]
    assert read == files[:1]
    assert found.find(ord(TALL)) == files[1]
    for _ in range(3):
        assert found.find(ord(ABSENT)) is None
    assert (read, listed) == (files, [1])


@pytest.mark.parametrize("content", [b"", b"no font", b"\x00\x01\x00\x00" + b"\xff" * 60])
def test_a_file_that_is_no_font_is_passed_over(content: bytes, file: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(content)
    assert fonts.Fonts([str(broken), str(tmp_path / "nowhere.ttf"), file]).find(ord(RARE)) == file
    assert fonts.Fonts([str(broken)]).find(ord(RARE)) is None


def test_a_font_that_disappears_leaves_the_code_points(file: str, rare: fonts.Fonts) -> None:
    assert canvas.readable(RARE) == RARE
    Path(file).unlink()
    fonts.face.cache_clear()
    assert canvas.text_mask(RARE * 2, 21).shape[1] > 100


def test_the_machines_fonts_come_in_the_same_order_plain_ones_first() -> None:
    files = ["/f/Serif-Bold.ttf", "/f/NotoSansCJK-Bold.ttc", "/f/NotoSansCJK-Regular.ttc", "/f/NotoColorEmoji.ttf"]
    assert sorted(files, key=fonts._order)[0] == "/f/NotoSansCJK-Regular.ttc"
    assert min(reversed(files), key=fonts._order) == files[2]
    assert fonts._is_placeholder("/System/Library/Fonts/LastResort.otf")
    assert not any(map(fonts._is_placeholder, files))


def test_fonts_that_matplotlib_was_given_and_those_of_the_system(
    file: str, tmp_path: Path, known_fonts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(shutil.copy(file, tmp_path / "Other.ttf"))
    font_manager.fontManager.addfont(file)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: [other])
    assert {file, other} <= set(fonts._system_files())
    assert not any("mpl-data" in one for one in fonts._system_files())


@pytest.fixture
def known_fonts() -> Iterator[None]:
    before = list(font_manager.fontManager.ttflist)
    yield
    font_manager.fontManager.ttflist[:] = before


def test_matplotlib_knows_a_font_as_long_as_it_is_needed(file: str) -> None:
    before = list(font_manager.fontManager.ttflist)
    with fonts.registered([f"a{RARE}", "b"], fonts.Fonts([file])) as names:
        assert names == ["Rare"]
        assert font_manager.findfont("Rare") == file
    assert font_manager.fontManager.ttflist == before
    with fonts.registered(["ab"], fonts.Fonts([file])) as names:
        assert names == []


def test_fonts_of_this_machine_never_raise() -> None:
    for letter in "日안नสЖ🦄👩\u200d\ufe0fﷺ꧅":
        shown = canvas.readable(letter)
        assert shown
        assert canvas.text_mask(shown, 13).shape[0] == canvas.line_height(13)


def pixel_font() -> str | None:
    """A font of this machine that is made of pixels, as coloured emoji are."""
    from matplotlib.ft2font import FT2Font

    for file in fonts._system_files():
        try:
            if not FT2Font(file).scalable:
                return file
        except Exception:
            continue
    return None


@pytest.mark.skipif(pixel_font() is None, reason="no font made of pixels on this machine")
def test_coloured_emoji_are_drawn_in_shades_and_not_by_matplotlib() -> None:
    file = str(pixel_font())
    assert fonts.Fonts([file]).find(ord("🦄")) == file
    assert fonts.Fonts([file], outlines=True).find(ord("🦄")) is None
    mask = canvas._text_mask("🦄", 13, False, fonts.Fonts([file]))
    assert mask.shape[0] == canvas.line_height(13)
    assert len(np.unique(mask)) > 20
