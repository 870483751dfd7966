"""The fonts of this machine, for characters that the font of the pictures does not have.

Pictures are set in DejaVu Sans, which comes with matplotlib. Matplotlib also knows the fonts of the system; they are
looked for once per process, when the first character asks for one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MOST_FILES = 512
"""So many files are read at most to find a character."""

_STRIKES = (109, 136, 128, 160, 96, 64, 48, 40, 32, 20, 16)
# Fonts that have a glyph for every character, all alike or all blank.
_PLACEHOLDERS = ("lastresort", "adobeblank", "notdef")
_LESS_PLAIN = (
    "bold", "italic", "oblique", "light", "thin", "black", "heavy", "medium", "cond", "mono", "serif", "color", "emoji",
)  # fmt: skip


class Fonts:
    """Fonts in the order in which they are asked for a character; a file is read when none before it has it."""

    def __init__(self, files: Iterable[str] | Callable[[], Iterable[str]], outlines: bool = False) -> None:
        """Take font files.

        Args:
            files: The paths, or what lists them when they are needed.
            outlines: Whether fonts that are made of pixels, as some of emoji are, are left out.
        """
        self._listed, self._outlines = files, outlines
        self._files: list[str] | None = None
        self._read = 0
        self._owner = np.zeros(0x110000, dtype=np.uint16)
        self._found: dict[int, str | None] = {}

    def __contains__(self, code: int) -> bool:
        """Whether DejaVu Sans or one of the fonts has a visible glyph, or a space, for a code point."""
        return code in dejavu_characters() or self.find(code) is not None

    def find(self, code: int) -> str | None:
        """Return the file that draws a code point which DejaVu Sans does not have, or None."""
        if code not in self._found:
            file = self._owner_of(code)
            self._found[code] = file if file is not None and _draws(file, chr(code)) else None
        return self._found[code]

    def runs(self, text: str) -> list[tuple[str, str | None]]:
        """Part a text into pieces that one font draws.

        Args:
            text: The text.

        Returns:
            Each piece and its font's file, None for DejaVu Sans. Marks stay with the letter that they stand on where
            its font has them.
        """
        parts: list[tuple[str, str | None]] = []
        for character in text:
            code = ord(character)
            file = None if code in dejavu_characters() else self.find(code)
            if parts and file != parts[-1][1] and unicodedata.category(character)[0] == "M":
                before = parts[-1][1]
                file = before if before is not None and self._has(before, code) else file
            if parts and parts[-1][1] == file:
                parts[-1] = (parts[-1][0] + character, file)
            else:
                parts.append((character, file))
        return parts

    def _has(self, file: str, code: int) -> bool:
        return code in _characters_of(file)

    def _owner_of(self, code: int) -> str | None:
        if self._files is None:
            self._files = list(self._listed() if callable(self._listed) else self._listed)[:MOST_FILES]
        while not self._owner[code] and self._read < len(self._files):
            file = self._files[self._read]
            self._read += 1
            codes = np.fromiter(_characters_of(file, self._outlines), dtype=np.int64)
            codes = codes[(codes >= 0) & (codes < len(self._owner))]
            self._owner[codes[self._owner[codes] == 0]] = self._read
        place = int(self._owner[code])
        return self._files[place - 1] if place else None


@lru_cache(maxsize=2)
def installed(outlines: bool = False) -> Fonts:
    """Return the fonts of this machine, found when the first character needs one."""
    return Fonts(_system_files, outlines)


def dejavu(bold: bool = False) -> Path:
    """Return the file of DejaVu Sans that comes with matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")


@lru_cache(maxsize=1)
def dejavu_characters() -> frozenset[int]:
    """Return the code points that DejaVu Sans has, bold and regular."""
    from matplotlib.ft2font import FT2Font

    regular, bold = (frozenset(FT2Font(str(dejavu(bold))).get_charmap()) for bold in (False, True))
    return regular & bold


@lru_cache(maxsize=64)
def face(file: str, size: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """Open a font.

    Args:
        file: Its path.
        size: The size in pixels that is wanted.

    Returns:
        The font, and the size that it has: a font made of pixels comes in sizes of its own.

    Raises:
        OSError: The file is no font that can be drawn with.
    """
    try:
        return ImageFont.truetype(file, size), size
    except OSError as error:
        for strike in _STRIKES:
            try:
                return ImageFont.truetype(file, strike), strike
            except OSError:
                continue
        raise error


def ink(text: str, face: ImageFont.FreeTypeFont) -> tuple[Image.Image, int]:
    """Draw one line of text with one font.

    Args:
        text: The text.
        face: The font.

    Returns:
        How much ink lies where, of the text's own height and width, and the row of the base line in it. Colours become
        shades, so that a face in an emoji can be told from its background.
    """
    left, top, right, bottom = face.getbbox(text, anchor="ls")
    x0, y0 = min(int(np.floor(left)), 0), int(np.floor(top))
    x1, y1 = max(int(np.ceil(max(right, face.getlength(text)))), x0 + 1), max(int(np.ceil(bottom)), y0 + 1)
    image = Image.new("RGBA", (x1 - x0, y1 - y0))
    ImageDraw.Draw(image).text((-x0, -y0), text, fill="black", font=face, anchor="ls", embedded_color=True)
    pixels = np.asarray(image).astype(np.float64)
    shade = 1 - 0.75 * (pixels[..., :3] @ (0.299, 0.587, 0.114)) / 255
    return Image.fromarray(np.round(pixels[..., 3] * shade).astype(np.uint8)), -y0


@contextmanager
def registered(texts: Iterable[str], fonts: Fonts) -> Iterator[list[str]]:
    """Let matplotlib know the fonts that some texts need, as long as the block runs.

    Args:
        texts: The texts.
        fonts: Where their fonts come from.

    Yields:
        The names of the fonts' families.
    """
    from matplotlib.font_manager import fontManager

    files = sorted({file for text in texts for _, file in fonts.runs(text) if file is not None})
    before = list(fontManager.ttflist)
    names = []
    try:
        for file in files:
            try:
                if all(entry.fname != file for entry in fontManager.ttflist):
                    fontManager.addfont(file)
                names.append(next(entry.name for entry in fontManager.ttflist if entry.fname == file))
            except Exception:
                # A font that matplotlib cannot use; its letters are drawn as boxes.
                continue
        yield names
    finally:
        fontManager.ttflist[:] = before


def _system_files() -> list[str]:
    """The font files of this machine, plain upright ones first, always in the same order."""
    try:
        import matplotlib
        from matplotlib import font_manager

        own = str(Path(matplotlib.get_data_path()))
        # Matplotlib's list may be older than a font; the system's leaves out what matplotlib was given.
        known = {str(entry.fname) for entry in font_manager.fontManager.ttflist} | set(font_manager.findSystemFonts())
    except Exception:
        return []
    return sorted((file for file in known if not file.startswith(own) and not _is_placeholder(file)), key=_order)


def _is_placeholder(file: str) -> bool:
    return any(word in _plain_name(file) for word in _PLACEHOLDERS)


def _order(file: str) -> tuple[int, bool, str, str]:
    name = _plain_name(file)
    return sum(word in name for word in _LESS_PLAIN), "noto" not in name, name, file


def _plain_name(file: str) -> str:
    return "".join(letter for letter in Path(file).stem.lower() if letter.isalnum())


@lru_cache(maxsize=8)
def _characters_of(file: str, outlines: bool = False) -> frozenset[int]:
    """The code points that a font has; none where it cannot be read, or is made of pixels and outlines are wanted."""
    try:
        from matplotlib.ft2font import FT2Font

        font = FT2Font(file)
        return frozenset() if outlines and not font.scalable else frozenset(font.get_charmap())
    except Exception:
        return frozenset() if outlines else _table_of(file)


def _table_of(file: str) -> frozenset[int]:
    """The same from the file's own table, for fonts that matplotlib does not open."""
    try:
        from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

        with TTFont(file, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    except Exception:
        return frozenset()


def _draws(file: str, character: str) -> bool:
    """Whether a font draws something for a character: some have blank glyphs, or none that Pillow can draw."""
    try:
        return ink(character, face(file, 16)[0])[0].getbbox() is not None
    except Exception:
        return False
