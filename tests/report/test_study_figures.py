"""Figures of a study: their lines and bands are its summaries, and they say what the bands speak of."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from globenc_lightning import study
from globenc_lightning.errors import RecordError
from globenc_lightning.report import canvas, curves
from globenc_lightning.report.study_figures import _scale
from tests.study.records import LENGTHS, write_run

SVG = "{http://www.w3.org/2000/svg}"
METHODS = ("N-Enc", "W-Res")
SAME = {step: [0] * len(LENGTHS) for step in (10, 20, 30)}
ALL: dict[str, Callable[..., Path]] = {
    "ladder": lambda loaded, path, **options: loaded.save_ladder(path, **options),
    "training": lambda loaded, path, **options: loaded.save_ladder(path, by="training", **options),
    "drift": lambda loaded, path, **options: loaded.save_drift(path, **options),
    "agreement": lambda loaded, path, **options: loaded.save_agreement(path, **options),
    "mass": lambda loaded, path, **options: loaded.save_mass(path, "special", **options),
}


@pytest.fixture
def three(tmp_path: Path) -> Any:
    """A study of three seeds."""
    for seed in (1, 2, 3):
        write_run(tmp_path / "record", f"seed-{seed}", seed=seed, predicted=SAME)
    return study.load(tmp_path / "record")


def texts(path: Path) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.parse(path).iter(f"{SVG}text")]


def said(path: Path) -> str:
    return " ".join(texts(path))


def drawn(
    path: Path, scale: curves.Scale = curves.CORRELATION, head: int | None = None
) -> dict[str, list[list[float]]]:
    """The outlines of the bands of each method, as values on the y-axis."""
    head = len(canvas.header("A title", "x", curves.WIDTH)) if head is None else head
    found: dict[str, list[list[float]]] = {}
    colours = {"#" + bytes(curves.method_colour(method)).hex(): method for method in METHODS}
    for one in ElementTree.parse(path).iter(f"{SVG}path"):
        style = dict(part.split(": ") for part in one.get("style", "").split("; ") if ": " in part)
        if style.get("fill-opacity", "").startswith("0.13") and style.get("fill") in colours:
            numbers = [float(part) for part in one.get("d", "").replace("\n", " ").split() if part not in "MLz"]
            pixels = np.array(numbers[1::2]) * curves.DPI / 72 - head - curves.ABOVE
            values = scale.high - pixels / 400 * (scale.high - scale.low)
            found.setdefault(colours[style["fill"]], []).append(values.tolist())
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("suffix", ["svg", "png", "SVG"])
def test_both_formats_are_written_and_the_path_comes_back(three: Any, tmp_path: Path, name: str, suffix: str) -> None:
    path = ALL[name](three, str(tmp_path / f"a.{suffix}"))
    assert path == tmp_path / f"a.{suffix}"
    assert path.read_bytes()[:8] == (b"\x89PNG\r\n\x1a\n" if suffix == "png" else b"<?xml ve")
    first = path.read_bytes()
    # The same study gives the same picture, whatever style the user has chosen.
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "black", "font.size": 40}):
        assert ALL[name](three, path).read_bytes() == first


@pytest.mark.parametrize("by", ["layer", "training"])
def test_the_ladder_has_the_means_and_intervals_of_the_summary(three: Any, tmp_path: Path, by: str) -> None:
    path = three.save_ladder(tmp_path / "a.svg", by=by, title="A title")
    rho = three.correlations() if by == "layer" else three.correlations(layers=2)
    if by == "layer":
        rho = rho[rho["step"] == 30]
    table = three.summary(rho, "rho", ["method", "layer" if by == "layer" else "step"])
    bands, shown = drawn(path), texts(path)
    for method in METHODS:
        part = table[table["method"] == method]
        assert f"{part['mean'].iloc[-1]:.2f}".replace("-", "−") in shown
        (outline,) = bands[method]
        expected = [*part["low"].clip(-1, 1), *part["high"].clip(-1, 1)]
        assert {round(one, 3) for one in outline} == {round(one, 3) for one in expected}
    together = said(path)
    assert f"over 3 runs and {len(LENGTHS) - 1} examples" in together
    assert "95 % interval of the mean over runs and examples" in together
    assert "seed-1 (seed 1), seed-2 (seed 2), seed-3 (seed 3)" in together
    assert f"a probe of {len(LENGTHS)} examples" in together


@pytest.mark.parametrize("by", ["spearman", "jaccard"])
def test_drift_stands_beside_its_chance_level(three: Any, tmp_path: Path, by: str) -> None:
    path = three.save_drift(tmp_path / "a.svg", by=by, against="first", layer=1)
    found = three.drift("first", by, layers=1)
    table = three.summary(found, "drift", ["method", "step"])
    shown = texts(path)
    for method in METHODS:
        assert f"{table[table['method'] == method]['mean'].iloc[-1]:.2f}" in shown
    chance = found[found["drift"].notna()]["chance"].mean()
    assert shown[shown.index("chance") + 1] == f"{chance:.2f}"
    together = said(path)
    assert "layer 1" in together
    assert "with the row at the first analysis" in together
    assert "Special tokens are left out." in together
    assert "rows whose tokens were shuffled" in together
    assert "Special tokens count." in said(three.save_drift(tmp_path / "b.svg", special_tokens=True))


def test_agreement_says_how_many_examples_were_left(tmp_path: Path) -> None:
    left = {10: 8, 20: 5, 30: 3}
    for seed in (1, 2, 3):
        # The other runs decide the same of the first examples alone.
        predicted = {step: [0] * size + [seed % 2] * (8 - size) for step, size in left.items()}
        write_run(tmp_path / "record", f"seed-{seed}", seed=seed, predicted=predicted)
    loaded = study.load(tmp_path / "record")
    path = loaded.save_agreement(tmp_path / "a.svg")
    together = said(path)
    assert "3 pairs of runs that differ in seed" in together
    assert "3–8 of 8 examples" in together
    assert "over the pairs of 3 runs" in together
    table = loaded.summary(loaded.agreement(layers=2), "agreement", ["method", "step"])
    for method in METHODS:
        value = table[table["method"] == method]["mean"].iloc[-1]
        assert f"{value:.2f}".replace("-", "−") in texts(path)
    assert "chance" in texts(path)


def test_mass_stands_beside_a_row_without_preferences(three: Any, tmp_path: Path) -> None:
    path = three.save_mass(tmp_path / "a.svg", ["not", "never"])
    found = three.mass(["not", "never"], layers=2)
    found = found[found["tokens"] > 0]
    shown = texts(path)
    held = found.drop_duplicates("example")
    uniform = np.mean([one.tokens / LENGTHS[one.example] for one in held.itertuples()])
    assert shown[shown.index("uniform row") + 1] == f"{uniform:.2f}"
    for method in METHODS:
        last = found[(found["method"] == method) & (found["step"] == 30)]["mass"].mean()
        assert f"{last:.2f}" in shown
    assert f"Tokens: not, never; {len(held)} examples of {len(LENGTHS)} that have one." in said(path)
    assert "Attribution on negations" in said(three.save_mass(tmp_path / "b.svg", "negations"))


def test_one_run_says_nothing_about_other_seeds(three: Any, tmp_path: Path) -> None:
    one = study.load(tmp_path / "record", runs=["seed-1"])
    for name in ("ladder", "training", "drift", "mass"):
        together = said(ALL[name](one, tmp_path / "a.svg"))
        assert "over examples alone" in together, name
        assert "One run says nothing about other seeds." in together, name
    two = study.load(tmp_path / "record", runs=["seed-1", "seed-2"])
    together = said(two.save_agreement(tmp_path / "a.svg"))
    assert "over examples alone" in together
    assert "One pair of runs says nothing about other seeds." in together
    assert "nothing about other seeds" not in said(two.save_drift(tmp_path / "b.svg"))


def test_one_run_with_one_example_has_no_bands(tmp_path: Path) -> None:
    write_run(tmp_path / "record", "one", lengths=[6])
    path = study.load(tmp_path / "record").save_ladder(tmp_path / "a.svg", title="A title")
    assert "No bands" in said(path)
    assert drawn(path) == {}


def test_runs_of_different_lengths_are_drawn_together(tmp_path: Path) -> None:
    write_run(tmp_path / "record", "long", seed=1, steps=(10, 20, 30))
    write_run(tmp_path / "record", "short", seed=2, steps=(10, 20))
    loaded = study.load(tmp_path / "record")
    assert "step 20" in said(loaded.save_ladder(tmp_path / "a.svg"))
    together = said(loaded.save_ladder(tmp_path / "b.svg", by="training"))
    assert "over 1–2 runs" in together
    assert "over runs and examples, or over examples alone" in together


def test_runs_without_a_common_step_are_drawn_over_training_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "record", "a", seed=1, steps=(10,))
    write_run(tmp_path / "record", "b", seed=2, steps=(15,))
    loaded = study.load(tmp_path / "record")
    with pytest.raises(RecordError, match=r"no step in common.*by='training'"):
        loaded.save_ladder(tmp_path / "a.svg")
    loaded.save_ladder(tmp_path / "a.svg", by="training")
    with pytest.raises(RecordError, match="no run has two of them yet"):
        loaded.save_drift(tmp_path / "b.svg")
    assert not (tmp_path / "b.svg").exists()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("path", "options", "error", "told"),
    [
        ("a.pdf", {}, ValueError, r"\.svg or \.png"),
        ("a.png", {"dpi": 0}, ValueError, "1 to 1200"),
        ("a.png", {"methods": "Q"}, RecordError, "N-Enc, W-Res"),
    ],
)
def test_a_bad_choice_is_refused_and_nothing_is_written(
    three: Any, tmp_path: Path, name: str, path: str, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        ALL[name](three, tmp_path / path, **options)
    assert not (tmp_path / path).exists()


def test_other_bad_choices(three: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'layer', 'training'"):
        three.save_ladder(tmp_path / "a.svg", by="step")
    with pytest.raises(RecordError, match="no example of the probe has a token of xyz"):
        three.save_mass(tmp_path / "a.svg", "xyz")
    with pytest.raises(RecordError, match="1, 2"):
        three.save_drift(tmp_path / "a.svg", layer=7)
    assert not (tmp_path / "a.svg").exists()


def test_figures_of_one_value_that_is_never_defined_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "record", "one", lengths=[1, 1])
    loaded = study.load(tmp_path / "record")
    with pytest.raises(RecordError, match="nothing to draw: not one ρ is defined"):
        loaded.save_ladder(tmp_path / "a.svg")
    with pytest.raises(RecordError, match="nothing to draw: not one drift is defined"):
        loaded.save_drift(tmp_path / "a.svg")


def test_names_of_runs_are_shown_as_text(tmp_path: Path) -> None:
    for number in range(6):
        write_run(tmp_path / "record", f"a+b_{number}.$x$", seed=None, draws=number)
    path = study.load(tmp_path / "record").save_ladder(tmp_path / "a.svg", title="<&> $y$")
    assert texts(path)[0] == "<&> $y$"
    assert "6 runs: a+b_0.$x$, a+b_1.$x$, a+b_2.$x$, a+b_3.$x$ and 2 more" in said(path)


def test_a_png_has_the_dots_that_were_asked_for(three: Any, tmp_path: Path) -> None:
    sizes = [Image.open(three.save_drift(tmp_path / f"{dpi}.png", dpi=dpi)).size for dpi in (100, 200)]
    assert sizes[1] == pytest.approx(tuple(2 * side for side in sizes[0]), abs=2)
    assert sizes[0][0] == curves.WIDTH


@pytest.mark.parametrize(
    ("lines", "references", "least", "most"),
    [
        ([0.01, 0.02, 0.03], {"uniform row": 0.05}, 0, 1),
        ([0.2, 0.9, 1.7], {"chance": 1.0}, 0, 2),
        ([-0.3, 0.1, 0.99], {"chance": 0.0}, -1, 1),
        ([0.98, 0.99, 1.0], {}, 0, 1),
        ([0.0, 0.0, 0.0], {"chance": 0.84}, 0, 1),
        ([-5.0, 0.3, 7.0], {}, -1, 1),
    ],
)
def test_the_scale_holds_everything_that_is_drawn(
    lines: list[float], references: dict[str, float], least: float, most: float
) -> None:
    import pandas

    table = pandas.DataFrame({"low": [lines[0]], "mean": [lines[1]], "high": [lines[2]]})
    scale = _scale("x", table, references, least, most)
    for value in (*np.clip(lines, least, most), *references.values(), 0.0):
        assert scale.low <= value <= scale.high
    assert list(scale.ticks) == sorted(set(scale.ticks))
    assert 3 <= len(scale.ticks) <= 8
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)
    assert all(round(tick, scale.digits) == pytest.approx(tick, abs=1e-9) for tick in scale.ticks)


def test_pyplot_is_never_imported(three: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from globenc_lightning import study; found = study.load(sys.argv[1]); "
        "found.save_drift(sys.argv[2] + '/a.png'); found.save_ladder(sys.argv[2] + '/a.svg'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "record"), str(tmp_path)], check=True, timeout=300)


def test_numbers_and_labels_stand_at_the_heights_of_their_values() -> None:
    scale = curves.Scale("share", -0.01, 0.51, (0.0, 0.25, 0.5), least=0, most=1, digits=2)
    shown = curves.Curves(
        np.array([1.0, 2.0]),
        {"N-Enc": np.array([0.1, 0.4])},
        {},
        ticks=[1, 2],
        x_name="layer",
        caption=[],
        scale=scale,
        references={"chance": 0.15},
    )
    plot = curves.arranged(shown)
    places = {word.text: word.y for word in plot.words}
    # The axis is 400 pixels high, from .51 at the top to -.01.
    for text, value in (("0.00", 0.0), ("0.25", 0.25), ("0.50", 0.5), ("N-Enc", 0.4), ("chance", 0.15)):
        assert places[text] == pytest.approx(curves.ABOVE + (0.51 - value) / 0.52 * 400, abs=1), text
    assert places["0.40"] == places["N-Enc"]
    assert places["0.15"] == places["chance"]
