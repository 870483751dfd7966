"""The tab's files, read as text."""

import re
from pathlib import Path

import pytest

import globenc_lightning.report.dashboard

STATIC = Path(globenc_lightning.report.dashboard.__file__).parent / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))
HTML_FROM_TEXT = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
    r"|\beval\b|new Function|javascript:|setTimeout\(\s*[\"'`]|setInterval\(\s*[\"'`]"
)


def test_there_are_scripts() -> None:
    assert {"index.js", "tokens_view.js", "maps_view.js", "correlation_view.js", "movement_view.js"} <= {
        path.name for path in SCRIPTS
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_text_becomes_html_or_code(path: Path) -> None:
    found = HTML_FROM_TEXT.findall(path.read_text(encoding="utf-8"))
    assert not found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_load_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    imported = re.findall(r"from \"([^\"]+)\";", text)
    assert all(one.startswith("./") and (STATIC / one).is_file() for one in imported)
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_the_style_sheet_loads_nothing() -> None:
    assert not re.search(r"url\(|@import", (STATIC / "style.css").read_text(encoding="utf-8"))
