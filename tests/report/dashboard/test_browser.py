"""The GlobEnc tab in a real browser, on a real TensorBoard.

Axes: ``l`` layer, ``q`` token that receives, ``k`` token that is attended to.
"""

import importlib.util
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_lightning.loggers import TensorBoardLogger
from scipy.stats import spearmanr
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from benchmarks.dashboard import CLASS_NAMES, large_run, synthetic_measurement, synthetic_probe, write
from globenc_lightning import METHODS, GlobEncCallback
from globenc_lightning.report import publish
from globenc_lightning.report.dashboard import records as dashboard_records
from globenc_lightning.report.dashboard import store
from globenc_lightning.settings import FURTHER_METHODS, Settings
from tests.report.dashboard.browser import (
    ARTIFACTS,
    Tab,
    contrast,
    prefer_dark,
    scale,
    wait_until,
)
from tests.report.dashboard.runs import REASON, real_run, refused_run
from tests.report.dashboard.serving import tensorboard, until_runs
from tests.report.kinds import train

pytestmark = pytest.mark.slow

EXAMPLE = "sentiment/version_0"
OF_KINDS = ("binary", "token classification", "span", "regression", "choice", "cosine")
VIEWS = ("tokens", "maps", "correlation", "movement", "runs")
HEBREW = ("הסרט", "היה", "יפה", "מאוד", "ואהבתי", "את", "הסוף")
SHOWN = {
    "<script>window.stolen = 1</script>": "<script>window.stolen = 1</script>",
    '<img src=x onerror="window.stolen=1">': '<img src=x onerror="window.stolen=1">',
    "\"'`&amp;\\": "\"'`&amp;\\",
    "##ing": "##ing",
    "a\x00b": "a\\x00b",
    "\n": "\\n",
    "\x1b[31m": "\\x1b[31m",
    "\u202egnp": "U+202Egnp",
    "\u200b": "U+200B",
    " ": "␣",
    "": "(empty)",
    "Ġthe": "Ġthe",
    "👩‍👩‍👧": "👩‍👩‍👧",
    "می‌خواهم": "می‌خواهم",
    "x" * 300: "x" * 300,
}
"""Odd tokens, and what is to be read on the page."""

BYTEWISE = ("Das", "▁Caf", "é", "⋯", "▁日", "⋯", "⋯", "本", "▁難しいテストの結果はとても良い", "▁🦄", "⋯", "▁안녕")
"""Names of tokens of a byte-level vocabulary, one of letters as wide as they are high."""


def odd_run(folder: Path, name: str) -> None:
    """128-token sentences: one from right to left, one of odd tokens; one method has no rho in the first layer."""
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    for validation in range(3):
        measurement = synthetic_measurement(validation, 3, sentences=3, layers=3, tokens=128)
        names = [list(one) for one in measurement.names]
        names[0][1:-1] = [HEBREW[k % len(HEBREW)] for k in range(len(names[0]) - 2)]
        names[1][1 : 1 + len(SHOWN)] = SHOWN
        names[2][1 : 1 + len(BYTEWISE)] = BYTEWISE
        measurement.correlation["W"][:, 0] = float("nan")
        moment = store.Moment(validation, 10 * validation, 0, 1.0)
        write(logger, replace(measurement, names=[tuple(one) for one in names]), moment)
    logger.experiment.close()


def earlier_run(folder: Path, name: str) -> None:
    """Two validations as an earlier version of the package wrote them: without words."""
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    for validation in range(2):
        measurement = synthetic_measurement(validation, 2, sentences=3, layers=2, tokens=8)
        moment = store.Moment(validation, 10 * validation, 0, 1.0)
        probe, settings = synthetic_probe(measurement.names), Settings(METHODS)
        made, _ = dashboard_records.records(measurement, probe, settings, moment, CLASS_NAMES)
        assert made.decided
        data = store.to_bytes(replace(made, decided=(), words={}))
        write(logger, measurement, moment)
        publish.log_records([logger], {store.tag("globenc", "summary", validation): data}, moment.step)
    logger.experiment.close()


def damaged_run(folder: Path, name: str) -> None:
    """Three validations, the second of which cannot be read."""
    large_run(folder, name, validations=3, sentences=3, layers=2, tokens=8)
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    publish.log_records([logger], {store.tag("globenc", "summary", 1): b"no record at all"}, 25)
    logger.experiment.close()


def train_example(folder: Path) -> None:
    """The example's own fine-tuning, cut short."""
    path = Path(__file__).parents[3] / "examples" / "finetune_sentiment.py"
    spec = importlib.util.spec_from_file_location("finetune_sentiment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main(["--quick", "--validations", "4", "--output", str(folder)])


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dashboard") / "logs"
    # The oldest run is last by name and no run of ours: colours go by TensorBoard's own order.
    with SummaryWriter(str(folder / "zero")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    train_example(folder)
    real_run(folder, "fails", spoiled=3)
    refused_run(folder, "refused")
    odd_run(folder, "odd")
    large_run(folder, "once", validations=1, sentences=3, layers=2, tokens=8)
    damaged_run(folder, "damaged")
    large_run(folder, "live", validations=2, sentences=3, layers=2, tokens=8)
    large_run(folder, "large", validations=200)
    for kind in OF_KINDS:
        train(kind, TensorBoardLogger(str(folder), name=None, version=kind), epochs=4, rate=2e-2)
    earlier_run(folder, "earlier")
    return folder


@pytest.fixture(scope="module")
def trained(logdir: Path) -> GlobEncCallback:
    return real_run(logdir, "bert")


@pytest.fixture(scope="module")
def address(logdir: Path, trained: GlobEncCallback) -> Iterator[str]:
    with tensorboard(logdir, logdir.parent) as address:
        until_runs(address, 9 + len(OF_KINDS))
        yield address


def records(logdir: Path, run: str) -> list[tuple[store.Summary, store.Detail]]:
    """What the event files of a run hold."""
    events = EventAccumulator(str(logdir / run), size_guidance={"tensors": 0})
    events.Reload()
    read: dict[str, dict[int, bytes]] = {"summary": {}, "detail": {}}
    for name in events.Tags()["tensors"]:
        parsed = store.parsed_tag(name)
        if parsed is not None:
            read[parsed[1]][parsed[2]] = events.Tensors(name)[-1].tensor_proto.string_val[0]
    found = []
    for ordinal in sorted(read["summary"]):
        summary = store.summary_from_bytes(read["summary"][ordinal])
        assert isinstance(summary, store.Summary)
        found.append((summary, store.detail_from_bytes(read["detail"][ordinal])))
    return found


def shares(codes: Any) -> NDArray[np.float64]:
    """Shares of the row's largest."""
    values = np.asarray(codes, dtype=np.float64)
    return np.asarray(values / values.max(axis=-1, keepdims=True))


def assert_colours(found: NDArray[np.int64], values: NDArray[np.float64], dark: bool = False, steps: int = 0) -> None:
    """Each colour is that of its value, or of a value so many steps of the scale away; a channel may be rounded."""
    assert len(found) == len(values)
    near = [scale(values + step / 255, dark) for step in range(-steps, steps + 1)]
    error = np.abs(np.stack(near) - found).max(-1).min(0)
    assert error.max() <= 1, f"colours {found[error.argmax()]} for {values[error.argmax()]}"


# Views


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("run", [EXAMPLE, "large", "odd"])
def test_every_view_fits_the_window(tab: Tab, run: str, view: str, dark: bool) -> None:
    prefer_dark(tab.driver, dark)
    tab.open(run=run, view=view)
    # Runs of other probes are told there.
    assert view == "runs" or not tab.all(".notice")
    assert tab.all(f".{view}-view")
    wide = "const e = document.scrollingElement; return [e.scrollWidth, e.clientWidth, innerWidth];"
    for scrolled, room, window in (tab.script(wide), tab.outer(wide)):
        assert scrolled <= room
        assert window == 1280
    folder = EXAMPLE.split("/")[0] if run == EXAMPLE else run
    tab.shot(f"{folder}-{view}-{'dark' if dark else 'light'}")


@pytest.mark.parametrize(("method", "layer", "position"), [("N-Enc", 6, 0), ("W", 3, 1), ("N-Res", 1, 3)])
def test_colours_are_the_numbers_of_the_event_file(
    tab: Tab, logdir: Path, method: str, layer: int, position: int
) -> None:
    tab.open(run=EXAMPLE)
    tab.slide(position)
    tab.choose("Method", method if method != "N-Enc" else "N-Enc (GlobEnc)")
    tab.choose("Layer", f"{layer}" if layer < 6 else "6 (last)")
    summary, detail = records(logdir, EXAMPLE)[position]
    for sentence in range(len(summary.sentences)):
        assert_colours(tab.colours(0, sentence), shares(detail.rows[method][sentence][layer - 1]))
        assert_colours(tab.colours(1, sentence), shares(detail.saliency[sentence]))
    rho = summary.rho[summary.methods.index(method), :, layer - 1]
    assert tab.texts(".rho") == [f"{one:.2f}".replace("-", "−") for one in rho]


def test_colours_are_those_of_the_training(tab: Tab, trained: GlobEncCallback) -> None:
    tab.open(run="bert")
    for position, entry in enumerate(trained.history):
        tab.slide(position)
        for method in ("N-Enc", "W"):
            tab.choose("Method", method if method != "N-Enc" else "N-Enc (GlobEnc)")
            for sentence in range(6):
                row = entry.rows[method][sentence].numpy()
                assert_colours(tab.colours(0, sentence), shares(row), steps=1)
                assert_colours(tab.colours(1, sentence), shares(entry.saliency[sentence].numpy()), steps=1)


def test_another_run_shows_its_own_numbers(tab: Tab, logdir: Path) -> None:
    tab.open(run=EXAMPLE)
    tab.choose("Run", "large")
    assert tab.position == 199
    detail = records(logdir, "large")[199][1]
    for sentence in (0, 15):
        assert_colours(tab.colours(0, sentence), shares(detail.rows["N-Enc"][sentence][11]))


def test_facts_are_those_of_the_step(tab: Tab, logdir: Path) -> None:
    tab.open(run=EXAMPLE)
    for position in (0, 3):
        tab.slide(position)
        summary = records(logdir, EXAMPLE)[position][0]
        assert summary.class_names is not None
        assert tab.texts(".predicted") == [summary.class_names[one] for one in summary.predicted]
        assert tab.texts(".label") == [summary.class_names[one.label or 0] for one in summary.sentences]
        assert tab.texts(".probability") == [f"{100 * one:.1f} % softmax" for one in summary.probability]
        right = [one.label == guess for one, guess in zip(summary.sentences, summary.predicted, strict=True)]
        assert tab.texts(".verdict") == ["✓" if one else "✗" for one in right]
        assert tab.text(".step") == f"Step {summary.moment.step}"


def test_hovering_tells_value_and_rank(tab: Tab, logdir: Path) -> None:
    tab.open(run=EXAMPLE)
    summary, detail = records(logdir, EXAMPLE)[-1]
    row, saliency = shares(detail.rows["N-Enc"][0][-1]), shares(detail.saliency[0])
    chip = tab.all(".sentence .chip")[2]
    ActionChains(tab.driver).move_to_element(chip).perform()
    told = wait_until(lambda: tab.text(".tooltip"), "the box at the pointer")
    assert summary.sentences[0].tokens[2] in told
    for values in (row, saliency):
        assert f"{values[2]:.2f} · rank {1 + int((values > values[2]).sum())} of {len(values)}" in told


def test_a_token_shows_its_own_row_and_the_way_back(tab: Tab, logdir: Path) -> None:
    tab.open(run=EXAMPLE)
    summary, detail = records(logdir, EXAMPLE)[-1]
    readout = tab.colours(0, 0)
    tab.all(".sentence .chip")[3].click()
    tab.settled()
    name = summary.sentences[0].tokens[3]
    assert f"“{name}”" in tab.texts(".origin")[0]
    assert_colours(tab.colours(0, 0), shares(detail.maps["N-Enc"][0][3]), steps=1)
    assert (tab.colours(0, 0) != readout).any()
    tab.click(".sentence .origin button")
    assert (tab.colours(0, 0) == readout).all()
    assert not tab.script("return document.querySelector('.origin').checkVisibility()")


def test_maps_are_the_stored_ones(tab: Tab, logdir: Path) -> None:
    tab.open(run=EXAMPLE, view="maps", sentence=2)
    detail = records(logdir, EXAMPLE)[-1][1]
    cells = """
        const [grid, rows, columns] = arguments;
        const canvas = document.querySelectorAll(".grid canvas")[grid];
        const drawing = canvas.getContext("2d");
        const at = (c, r) => drawing.getImageData(
            (c + 0.5) * canvas.width / columns, (r + 0.5) * canvas.height / rows, 1, 1).data.slice(0, 3);
        return Array.from({ length: rows }, (_, r) => Array.from({ length: columns }, (_, c) => [...at(c, r)]));
    """
    rows = shares(detail.rows["N-Enc"][1])[::-1]
    found = np.array(tab.script(cells, 0, *rows.shape))
    assert_colours(found.reshape(-1, 3), rows.reshape(-1))
    rollout = shares(detail.maps["N-Enc"][1])
    found = np.array(tab.script(cells, 1, *rollout.shape))
    assert_colours(found.reshape(-1, 3), rollout.reshape(-1), steps=1)
    # the topmost row of the upper map is the last layer; a click on the one below it chooses the last but one
    grid = tab.all(".grid")[0]
    height = tab.all(".grid canvas")[0].size["height"]
    middle = grid.size["height"] / 2
    ActionChains(tab.driver).move_to_element_with_offset(grid, 0, round(1.5 * height / 6 - middle)).click().perform()
    tab.settled()
    assert tab.chosen("Layer") == "5"


def test_curves_are_the_means(tab: Tab, logdir: Path) -> None:
    tab.open(run=EXAMPLE, view="correlation")
    found = [one[0] for one in records(logdir, EXAMPLE)]
    lines = tab.script(
        """
        return [...document.querySelectorAll(".chart svg")].map((chart) => {
          const names = [...chart.querySelectorAll(".line-name")];
          return Object.fromEntries(names.map((e) => [...e.querySelectorAll("text")].map((text) => text.textContent)));
        });
        """
    )
    last = found[-1].mean[:, -1]
    wanted = {method: f"{one:.2f}".replace("-", "−") for method, one in zip(found[-1].methods, last, strict=True)}
    assert lines == [wanted, wanted]
    # the heights of one line's points are linear in the means
    for chart, values in ((0, found[-1].mean[-1]), (1, np.array([one.mean[-1, -1] for one in found]))):
        line = tab.all(".chart")[chart].find_element(By.CSS_SELECTOR, "[data-name='N-Enc'] polyline")
        points = np.array([[float(n) for n in one.split(",")] for one in (line.get_attribute("points") or "").split()])
        ticks = tab.script(
            "const t = [...document.querySelectorAll('.chart')[arguments[0]].querySelectorAll('.rule')];"
            "return [t[0].getAttribute('y1'), t[t.length - 1].getAttribute('y1')].map(Number);",
            chart,
        )
        floor = float(tab.all(".chart")[chart].find_element(By.CSS_SELECTOR, ".tick").text.replace("−", "-"))
        assert points[:, 1] == pytest.approx(np.interp(values, [floor, 1.0], ticks), abs=0.01)


def test_a_sentence_against_the_mean(tab: Tab, logdir: Path) -> None:
    tab.open(run=EXAMPLE, view="correlation", sentence=3)
    tab.click(".check input")
    label = "const e = document.querySelector(\".chart [data-name='sentence 3, N-Enc']\"); return Boolean(e);"
    assert tab.script(label)
    summary = records(logdir, EXAMPLE)[-1][0]
    rho = summary.rho[summary.methods.index("N-Enc"), 2, -1]
    names = dict(zip(tab.texts(".line-name text:first-of-type"), tab.texts(".line-value"), strict=True))
    assert names["sentence 3"] == f"{rho:.2f}".replace("-", "−")


def test_runs_are_overlaid_in_tensorboards_colours(tab: Tab, address: str) -> None:
    tab.driver.switch_to.default_content()
    tab.driver.get("about:blank")
    tab.driver.get(f"{address}/#timeseries")
    rows = """
        const colour = (row) => getComputedStyle(row.querySelector(".run-color-swatch")).backgroundColor;
        const rows = document.querySelectorAll("runs-data-table tb-data-table-content-row");
        return [...rows].map((row) => [row.textContent.trim(), colour(row)]);
    """
    theirs = dict(wait_until(lambda: tab.driver.execute_script(rows), "TensorBoard's own list of runs"))
    tab.open(run=EXAMPLE, view="correlation")
    chips = """
        return [...document.querySelectorAll("[aria-label='Runs that are drawn'] .toggle")].map(
            (e) => [e.textContent, getComputedStyle(e.querySelector(".dot")).backgroundColor]);
    """
    ours = dict(tab.script(chips))
    assert set(ours) == set(theirs) - {"zero"}
    assert ours == {run: theirs[run] for run in ours}
    tab.driver.find_element(By.XPATH, "//button[contains(@class, 'toggle')][text()='large']").click()
    tab.settled()
    stroke = "return [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e).stroke);"
    assert tab.script(stroke, ".chart [data-name='large, N-Enc'] polyline") == [theirs["large"]] * 2
    assert tab.script(stroke, f".chart [data-name='{EXAMPLE}, N-Enc'] polyline") == [theirs[EXAMPLE]] * 2
    assert json.loads(tab.state()["overlay"]) == ["large"]


def test_runs_that_tensorboard_hides_are_hidden(tab: Tab) -> None:
    tab.open("?runFilter=%5E(large%7Codd)", view="correlation")
    assert sorted(tab.texts("[aria-label='Runs that are drawn'] .toggle")) == ["large", "odd"]


def test_movement_is_sorted_by_rank_correlation(tab: Tab, logdir: Path) -> None:
    tab.open(run="large", view="movement")
    details = [one[1] for one in records(logdir, "large")]
    moved = {
        sentence: 1 - float(spearmanr(details[0].rows["N-Enc"][sentence][-1], rows[-1]).statistic)
        for sentence, rows in details[-1].rows["N-Enc"].items()
    }
    order = sorted(moved, key=lambda one: -moved[one])
    assert tab.texts(".moved .number") == [str(one + 1) for one in order]
    assert tab.texts(".moved .distance") == [f"{moved[one]:.3f}" for one in order]
    before, after = (shares(details[at].rows["N-Enc"][order[0]][-1]) for at in (0, -1))
    first, second = tab.all(".moved .sentence")[0].find_elements(By.CSS_SELECTOR, ".chips")
    for line, values in ((first, before), (second, after)):
        chips = "return [...arguments[0].querySelectorAll('.chip')].map((e) => getComputedStyle(e).backgroundColor)"
        found = [[int(n) for n in re.findall(r"\d+", one)] for one in tab.script(chips, line)]
        assert_colours(np.array(found), values)
    gained = second.find_elements(By.CSS_SELECTOR, ".gained")
    most = np.argsort(-(after / after.sum() - before / before.sum()), kind="stable")[:3]
    assert sorted(int(chip.get_attribute("data-k") or -1) for chip in gained) == sorted(most.tolist())
    tab.click(".moved .number")
    assert tab.state()["view"] == "tokens"
    assert tab.texts(".sentence.chosen .number") == [str(order[0] + 1)]


# Moving about


def test_keys_move_sentence_and_step(tab: Tab) -> None:
    tab.open(run="bert")
    assert (tab.position, tab.text(".step")) == (8, "Step 7")
    tab.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert tab.position == 6
    tab.press(Keys.ARROW_RIGHT)
    assert tab.position == 7
    tab.press(Keys.HOME)
    assert (tab.position, tab.text(".step")) == (0, "Step 0")
    tab.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert tab.texts(".sentence.chosen .number") == ["3"]
    tab.press(Keys.ARROW_UP)
    assert tab.texts(".sentence.chosen .number") == ["2"]
    tab.press(Keys.END)
    assert tab.position == 8
    # on the slider itself a key moves one step, not two
    tab.script("document.querySelector('input[type=range]').focus()")
    tab.press(Keys.ARROW_LEFT)
    assert tab.position == 7
    tab.press(Keys.ARROW_DOWN)
    assert (tab.position, tab.texts(".sentence.chosen .number")) == (7, ["3"])


def test_every_control_can_be_reached_and_seen_by_keyboard(tab: Tab) -> None:
    tab.open(run="bert")
    reached = []
    for _ in range(15):
        tab.press(Keys.TAB)
        name, outline = tab.script(
            """
            const e = document.activeElement;
            const label = e.getAttribute("aria-label") ?? e.closest("label")?.textContent ?? e.textContent;
            return [label, getComputedStyle(e).outlineStyle];
            """
        )
        reached.append(name)
        assert outline == "solid", name
    assert reached[:5] == ["Tokens", "Maps", "Correlation", "Movement", "Runs"]
    assert reached[5].startswith("Run")
    assert reached[6] == "Copy link"
    assert {"Play", "Validation"} <= set(reached)
    assert any(name.endswith("show where it comes from") for name in reached)
    tab.press(Keys.ENTER)
    assert tab.script("return document.querySelector('.origin').checkVisibility()")
    tab.press(Keys.ESCAPE)
    assert not tab.script("return document.querySelector('.origin').checkVisibility()")


def test_play_runs_to_the_end(tab: Tab) -> None:
    tab.open(run=EXAMPLE)
    tab.click(".icon-button")
    assert tab.position == 0
    assert tab.script("return document.querySelector('.icon-button').getAttribute('aria-label')") == "Pause"
    wait_until(lambda: tab.position == 4, "the end of the run", 20)
    wait_until(lambda: tab.script("return document.querySelector('.icon-button').textContent") == "▶", "the stop", 20)


def test_the_link_restores_the_whole_view(tab: Tab) -> None:
    tab.open(run=EXAMPLE)
    tab.choose("Method", "N-Res")
    tab.choose("Layer", "4")
    tab.slide(1)
    tab.all(".sentence")[2].find_elements(By.CSS_SELECTOR, ".chips .chip")[1].click()
    tab.settled()

    def seen() -> tuple[Any, ...]:
        fields = [tab.chosen(name) for name in ("Run", "Method", "Layer")]
        chosen = tab.texts(".sentence.chosen .number")
        return *fields, tab.position, chosen, tab.texts(".origin"), tab.colours(0, 2).tolist()

    before, link = seen(), tab.link()
    assert before[:5] == (EXAMPLE, "N-Res", "4", 1, ["3"])
    tab.visit(link)
    assert seen() == before
    tab.view("correlation")
    tab.click(".check input")
    tab.click(".toggles .toggle")
    pressed = "return [...document.querySelectorAll('.toggle')].map((e) => e.getAttribute('aria-pressed'))"
    before = (tab.script(pressed), tab.texts(".chart text"))
    tab.visit(tab.link())
    assert (tab.script(pressed), tab.texts(".chart text")) == before


def test_a_link_opened_in_the_same_page(tab: Tab) -> None:
    tab.open(run="bert", view="tokens", validation=2)
    tab.outer("location.hash = '#globenc&p.globenc.run=bert&p.globenc.view=maps&p.globenc.validation=5'")
    wait_until(lambda: tab.all(".maps-view"), "the view of the new address")
    tab.settled()
    assert tab.position == 5


def test_addresses_without_sense_show_the_usual_view(tab: Tab) -> None:
    tab.open(
        run="no such run", view="%%", method="<b>", layer="-7", sentence="1e9", token="x", overlay="{", methods="3"
    )
    assert tab.all(".tokens-view")
    tab.open(run="bert", method="nothing", layer=99, sentence=99, token=99, validation=99999)
    assert (tab.position, tab.chosen("Layer"), tab.chosen("Method")) == (8, "3 (last)", "N-Enc (GlobEnc)")
    assert tab.texts(".sentence.chosen .number") == ["6"]


def test_the_copied_link_names_the_validation(tab: Tab) -> None:
    tab.open(run="bert")
    tab.script("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    tab.click("header .bar > .link")
    copied = str(tab.script("return window.copied"))
    assert "p.globenc.validation=8" in copied
    tab.script("navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed'))")
    tab.click("header .bar > .link")
    wait_until(
        lambda: tab.script("return document.querySelector('.copied').value") == copied, "the link to copy by hand"
    )


def test_a_running_training_is_followed(tab: Tab, logdir: Path) -> None:
    tab.open(run="live")
    tab.press(Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    logger = TensorBoardLogger(str(logdir), name=None, version="live")

    def add(validation: int) -> None:
        measurement = synthetic_measurement(validation, 4, sentences=3, layers=2, tokens=8)
        write(logger, measurement, store.Moment(validation, 25 * validation, 0, 1.0))
        logger.experiment.flush()

    def last() -> int:
        return int(tab.script("return document.querySelector('input[type=range]').max"))

    assert (tab.position, last()) == (1, 1)
    add(2)
    wait_until(lambda: last() == 2, "the third validation")
    tab.settled()
    assert (tab.position, tab.text(".step"), tab.texts(".sentence.chosen .number")) == (2, "Step 50", ["2"])
    detail = records(logdir, "live")[2][1]
    assert_colours(tab.colours(0, 1), shares(detail.rows["N-Enc"][1][-1]))
    tab.press(Keys.ARROW_LEFT)
    add(3)
    logger.experiment.close()
    wait_until(lambda: last() == 3, "the fourth validation")
    assert tab.position == 1
    tab.settled()
    # Resumed from a checkpoint after the first validation: the second is written again, and there are no more tags.
    logger = TensorBoardLogger(str(logdir), name=None, version="live")
    again = synthetic_measurement(9, 4, sentences=3, layers=2, tokens=8)
    write(logger, again, store.Moment(1, 25, 0, 2.0))
    logger.experiment.close()
    wait_until(lambda: last() == 1, "the list of the resumed training")
    tab.settled()
    assert tab.position == 1
    assert_colours(tab.colours(0, 1), shares(store.shares(again.rows[1]["N-Enc"].numpy(), store.ROW_LEVELS)[-1]))


# Data that are odd


def test_tokens_are_text_and_nothing_else(tab: Tab) -> None:
    tab.open(run="odd", sentence=2)
    for view in VIEWS:
        tab.view(view)
    tab.view("tokens")
    chips = tab.script(
        "const row = document.querySelectorAll('.tokens-view .sentence')[1];"
        "return [...row.querySelector('.chips').querySelectorAll('.chip')].map((e) => e.textContent);"
    )
    assert chips[1 : 1 + len(SHOWN)] == list(SHOWN.values())
    assert tab.script("return [typeof window.stolen, typeof window.parent.stolen]") == ["undefined"] * 2
    assert not tab.all("main script, main img, main iframe, main b")
    for k, shown in enumerate(SHOWN.values(), 1):
        chip = tab.all(".tokens-view .sentence:nth-of-type(2) .chips .chip")[k]
        tab.script("arguments[0].focus()", chip)
        assert tab.text(".tooltip strong") == shown


def test_marks_of_spaces_and_split_characters_are_read_as_a_sentence(tab: Tab) -> None:
    tab.open(run="odd", sentence=3)
    chips = tab.all(".tokens-view .sentence:nth-of-type(3) .chips .chip")[1 : 1 + len(BYTEWISE)]
    assert tuple(chip.text for chip in chips) == BYTEWISE
    # A mark does not part from its word at the end of a line.
    assert {tab.script("return arguments[0].getClientRects().length", chip) for chip in chips} == {1}
    tab.view("maps")
    options = tab.script("return [...document.querySelectorAll('option')].map((e) => e.textContent)")
    assert any(text.startswith("3  Das Café 日本 難しいテストの結果はとても良い 🦄 안녕"[:30]) for text in options)


def test_names_of_wide_letters_are_not_cut(tab: Tab) -> None:
    tab.open(run="odd", view="maps", sentence=3)
    outside = tab.script(
        "return [...document.querySelectorAll('.grid svg')].map((e) => [...e.querySelectorAll('text')].filter("
        "(text) => text.getBoundingClientRect().left < e.getBoundingClientRect().left - 1).map((e) => e.textContent))"
    )
    assert outside == [[], []]


def test_right_to_left_sentences_run_so(tab: Tab) -> None:
    tab.open(run="odd")
    direction = "return [...document.querySelectorAll('.tokens-view .chips')].map((e) => getComputedStyle(e).direction)"
    assert tab.script(direction) == ["rtl", "rtl", "ltr", "ltr", "ltr", "ltr"]
    first, second = (chip.rect["x"] for chip in tab.all(".sentence .chip")[1:3])
    assert second < first


def test_long_sentences_are_whole(tab: Tab, logdir: Path) -> None:
    tab.open(run="odd")
    detail = records(logdir, "odd")[-1][1]
    for sentence in range(3):
        assert_colours(tab.colours(0, sentence), shares(detail.rows["N-Enc"][sentence][-1]))
    assert len(tab.colours(0, 0)) == 128


def test_a_rho_that_is_undefined_is_called_so(tab: Tab) -> None:
    tab.open(run="odd", method="W", layer=1)
    assert tab.texts(".rho") == ["undefined"] * 3
    tab.view("correlation")
    assert "3 undefined" in tab.text(".correlation-view .card:first-child .hint")
    assert "NaN" not in tab.script("return document.body.outerHTML")


def test_a_failed_validation_is_said_and_passed(tab: Tab) -> None:
    tab.open(run="fails", view="tokens", validation=3)
    for view in ("tokens", "maps"):
        tab.view(view)
        assert "failed" in tab.text(".notice")
        assert "NonFiniteError" in tab.text(".notice")
    tab.view("correlation")
    assert "failed" in tab.text(".correlation-view .card:first-child .hint")
    tab.view("movement")
    assert "failed" in tab.text(".notice")
    assert len(tab.all(".slider-marks span")) == 1
    tab.view("tokens")
    tab.press(Keys.ARROW_RIGHT)
    assert not tab.all(".notice")
    assert len(tab.colours(0, 0)) > 2


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_run_without_figures_shows_why(tab: Tab, dark: bool) -> None:
    prefer_dark(tab.driver, dark)
    tab.open(run="refused")
    assert tab.text(".notice strong") == "Why this run has no figures"
    assert "ArithmeticError" in tab.text(".notice p")
    # A text that is shown as it stands, its lines apart.
    assert REASON in tab.text(".notice p")
    assert tab.script("return window.stolen") is None
    height, line = tab.script(
        "const p = document.querySelector('.notice p'); const style = getComputedStyle(p);"
        "return [p.offsetHeight, parseFloat(style.lineHeight)]"
    )
    assert height >= 2.5 * line
    assert not tab.all(".notes")[0].is_displayed()
    assert tab.all("label.field")[0].is_displayed()
    wide = "const e = document.scrollingElement; return e.scrollWidth <= e.clientWidth"
    assert tab.script(wide)
    colours = tab.script(
        "const p = document.querySelector('.notice p');"
        "return [p, p.parentElement].map((e, i) => getComputedStyle(e)[i ? 'backgroundColor' : 'color']"
        ".match(/[\\d.]+/g).map(Number))"
    )
    assert contrast(*(one[:3] for one in colours)) >= 4.5
    tab.shot(f"reason-{'dark' if dark else 'light'}")
    tab.open(run="fails", validation=3)
    tab.shot(f"failed-validation-{'dark' if dark else 'light'}")


def test_one_validation_is_enough(tab: Tab) -> None:
    tab.open(run="once")
    assert len(tab.colours(0, 0)) > 2
    assert not tab.all("input[type=range]")[0].is_enabled()
    for view in ("maps", "correlation"):
        tab.view(view)
        assert not tab.all(".notice")
    tab.view("movement")
    assert "one validation" in tab.text(".notice")


def test_damaged_records_are_said_and_the_rest_is_shown(tab: Tab) -> None:
    tab.open(run="damaged")
    assert "remark" in tab.text(".notes summary")
    assert len(tab.colours(0, 0)) > 2
    tab.press(Keys.ARROW_LEFT)
    assert "cannot be read" in tab.text(".notice")
    tab.press(Keys.ARROW_LEFT)
    assert not tab.all(".notice")


def test_no_data_is_no_broken_page(driver: webdriver.Chrome, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    with SummaryWriter(str(folder / "plain")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    driver.get_log("browser")
    with tensorboard(folder, tmp_path) as address:
        tab = Tab(driver, address).open()
        assert "No GlobEnc data" in tab.text(".notice")
        tab.shot("no-data-light")
        driver.switch_to.default_content()
        driver.get("about:blank")
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


# Colours


def test_the_theme_is_tensorboards_and_changes_with_it(tab: Tab, logdir: Path) -> None:
    tab.open(run=EXAMPLE)
    detail = records(logdir, EXAMPLE)[-1][1]
    values = shares(detail.rows["N-Enc"][0][-1])
    assert_colours(tab.colours(0, 0), values)
    page = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert min(tab.script(page)) > 200
    tab.outer("document.body.classList.add('dark-mode')")
    wait_until(lambda: max(tab.script(page)) < 80, "the dark theme")
    tab.settled()
    assert_colours(tab.colours(0, 0), values, dark=True)
    tab.outer("document.body.classList.remove('dark-mode')")
    wait_until(lambda: min(tab.script(page)) > 200, "the light theme")
    tab.settled()
    assert_colours(tab.colours(0, 0), values)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read_on_every_colour(tab: Tab, dark: bool) -> None:
    prefer_dark(tab.driver, dark)
    tab.open(run="large")
    pairs = tab.script(
        """
        const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
        const behind = (e) => {
          for (let at = e; at; at = at.parentElement) {
            const colour = rgb(getComputedStyle(at).backgroundColor);
            if (colour.length === 3) return colour;
          }
          return [255, 255, 255];
        };
        const texts = [...document.querySelectorAll("body *")].filter(
          (e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
        const enabled = texts.filter((e) => !e.closest(":disabled"));
        return enabled.map((e) => [rgb(getComputedStyle(e).color), behind(e), e.textContent]);
        """
    )
    assert len(pairs) > 700
    ratios = contrast([one[0][:3] for one in pairs], [one[1] for one in pairs])
    assert ratios.min() >= 4.5, pairs[int(ratios.argmin())]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_scale_is_even_and_told_by_lightness_alone(dark: bool) -> None:
    colours = scale(np.arange(256) / 255, dark)
    linear = np.where(colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    coarse = luminance[::8]
    assert (np.diff(coarse) > 0).all() if dark else (np.diff(coarse) < 0).all()
    assert contrast(colours[0], colours[-1]) > 7


# Time


@pytest.mark.parametrize("view", VIEWS)
def test_a_step_of_the_slider_takes_less_than_200_ms(tab: Tab, view: str) -> None:
    tab.open(run="large", view=view)
    draw = torch.Generator().manual_seed(0)
    anywhere = torch.randperm(200, generator=draw)[:25].tolist()
    one_by_one = list(range(60, 85))
    measure = """
        const [positions, done] = arguments;
        const slider = document.querySelector("input[type=range]");
        const main = document.querySelector("main");
        const times = [];
        (async () => {
          for (const position of positions) {
            const start = performance.now();
            slider.value = String(position);
            slider.dispatchEvent(new Event("input", { bubbles: true }));
            while (main.getAttribute("aria-busy") !== "false") await new Promise((next) => setTimeout(next));
            await new Promise((next) => requestAnimationFrame(() => setTimeout(next)));
            times.push(performance.now() - start);
          }
          done(times);
        })();
    """
    for name, positions in (("anywhere", anywhere), ("one by one", one_by_one)):
        times = tab.driver.execute_async_script(measure, positions)
        line = f"{view}, {name}: median {statistics.median(times):.0f} ms, largest {max(times):.0f} ms\n"
        with (ARTIFACTS / "slider-steps.txt").open("a") as file:
            file.write(line)
        assert statistics.median(times) < 200


def test_the_tokens_are_not_built_anew_at_every_step(tab: Tab) -> None:
    tab.open(run="large")
    tab.script("document.querySelector('.chip').dataset.mine = 'yes'")
    tab.slide(3)
    tab.choose("Method", "W")
    assert tab.script("return document.querySelector('.chip').dataset.mine") == "yes"


def test_all_methods_differ_by_more_than_colour() -> None:
    text = (Path(store.__file__).parent / "static" / "colours.js").read_text(encoding="utf-8")
    styles = re.findall(r'"([\w-]+)": \{ light: .*?marker: "(\w+)", dash: "([^"]*)", hollow: (\w+)', text)
    methods = (*METHODS, *FURTHER_METHODS)
    assert {name for name, *_ in styles} == set(methods)
    assert len({tuple(style) for _, *style in styles}) == len(methods)


def test_an_earlier_version_s_data_are_shown_as_before(tab: Tab, logdir: Path) -> None:
    tab.open(run="earlier", view="tokens")
    (_, _), (summary, _) = records(logdir, "earlier")
    assert not summary.decided
    assert tab.texts(".predicted") == [CLASS_NAMES[one] for one in summary.predicted]
    assert tab.texts(".label") == [CLASS_NAMES[one.label or 0] for one in summary.sentences]
    assert set(tab.texts(".verdict")) <= {"✓", "✗"}
    assert tab.all(".mark-key") == [] or not any(one.is_displayed() for one in tab.all(".mark-key"))
    for view in VIEWS:
        tab.view(view)
        # Runs of other probes are told there.
        assert view == "runs" or tab.all(".notice") == []


@pytest.mark.parametrize("kind", OF_KINDS)
def test_every_kind_is_shown_as_what_it_is(tab: Tab, logdir: Path, kind: str) -> None:
    tab.open(run=kind, view="tokens")
    found = [summary for summary, _ in records(logdir, kind)]
    for place in (0, len(found) - 1):
        tab.slide(place)
        newest = found[place]
        assert tab.texts(".predicted") == [one.answer for one in newest.decided]
        assert tab.texts(".verdict") == [{True: "✓", False: "✗", None: ""}[one.right] for one in newest.decided]
        said = [one.text for one in tab.all(".sentence .facts")]
        for one, text in zip(newest.decided, said, strict=True):
            assert one.name in text
            assert (one.truth_name in text) or not one.truth
            assert ("%" in text) is (one.chance is not None)
        marked = tab.script(
            """
            return [...document.querySelectorAll(".sentence")].map((row) =>
                [...row.querySelectorAll(".chips")].map((chips) =>
                    [...chips.querySelectorAll(".chip")].flatMap((chip, k) =>
                        chip.classList.contains("decided") ? [k] : [])));
            """
        )
        assert marked == [[list(one.marked)] * 2 for one in newest.decided]
        shown = [[*map(len, newest.sentences[i].tokens)] for i in range(6)]
        chips = tab.script(
            "return [...document.querySelectorAll('.sentence')].map((row) => row.querySelectorAll('.chips')[0])"
            ".map((chips) => chips.querySelectorAll('.chip').length)"
        )
        assert chips == [len(one) for one in shown]
    keys = [one for one in tab.all(".tokens-view .mark-key") if one.is_displayed()]
    assert [one.text for one in keys] == ([found[-1].words["marked"]] if found[-1].words["marked"] else [])
    assert found[-1].words["score"] in tab.text(".tokens-view .token-heads > div:last-of-type .hint:not(.masked-key)")
    others = [text for one in found[-1].decided for _, text in one.others]
    assert len(tab.all(".tokens-view .other-text")) == len(others)
    tab.shot(f"kind-{kind.replace(' ', '-')}")
    for view in ("maps", "correlation", "movement"):
        tab.view(view)
        assert tab.all(".notice") == []
    tab.view("maps")
    assert len(tab.all(".grid-decided")) == (2 if found[-1].decided[0].marked else 0)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_decided_token_s_frame_stands_out(tab: Tab, dark: bool) -> None:
    prefer_dark(tab.driver, dark)
    tab.open("?darkMode=true" if dark else "", run="token classification", view="tokens")
    colours = tab.script(
        """
        const chip = document.querySelector(".sentence.chosen .chip.decided");
        const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const card = getComputedStyle(chip.closest(".sentence")).backgroundColor;
        return [rgb(getComputedStyle(chip).outlineColor), rgb(card), getComputedStyle(chip).outlineStyle];
        """
    )
    assert colours[2] == "solid"
    assert contrast(colours[0], colours[1]) >= 3


def test_a_choice_s_other_text_is_said_in_movement(tab: Tab, logdir: Path) -> None:
    first, last = (records(logdir, "choice")[place][0] for place in (0, -1))
    changed = {i for i in range(6) if first.sentences[i].tokens != last.sentences[i].tokens}
    assert changed, "no example's choice changed: the test shows nothing"
    tab.open(run="choice", view="movement")
    rows = {int(row.get_attribute("data-sentence") or -1): row for row in tab.all(".moved .sentence")}
    assert set(rows) == set(range(6))
    for i, row in rows.items():
        assert ("another text was shown" in row.text) is (i in changed)
        lines = row.find_elements(By.CSS_SELECTOR, ".chips")
        counts = [len(line.find_elements(By.CSS_SELECTOR, ".chip")) for line in lines]
        assert counts == [len(one.sentences[i].tokens) for one in (first, last)]
