"""The tab's view of many runs: which runs are averaged, what stands there while attributions are read, single runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from selenium.webdriver.common.keys import Keys

from benchmarks.dashboard import CLASS_NAMES, synthetic_measurement, synthetic_probe
from globenc_lightning import METHODS
from globenc_lightning.report import publish
from globenc_lightning.report.dashboard import records as dashboard_records
from globenc_lightning.report.dashboard import store
from globenc_lightning.settings import Settings
from tests.report.dashboard.browser import Tab, wait_until
from tests.report.dashboard.serving import PLUGIN, fetch, tensorboard, until_runs
from tests.report.dashboard.test_runs_view import DRIFT, LAYERS, MASS, TRAINING, points, toggle

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {"sentences": 4, "layers": 2, "tokens": 8, "words": 0}
APART = {
    "few methods": "no figures of N-Enc",
    "other layers": "another number of layers, 3",
    "other score": "another score, label",
    "other tag": "no figures under this run’s tag that can be read",
}
"""Run -> why its figures are no part of the mean."""
RUNS = 2 + len(APART)
HINTS = ".runs-view .cards .hint"
MEAN = "N-Enc, mean over runs"

HELD = """
    const fetched = window.fetch;
    window.held = [];
    window.fetch = (url, ...more) => String(url).includes("/dynamics")
      ? new Promise((resolve) => window.held.push(() => resolve(fetched(url, ...more))))
      : fetched(url, ...more);
"""
"""From now on attributions come when they are let go."""


def add(folder: Path, name: str, validation: int, *, seed: int, tag: str = "globenc", **changes: Any) -> None:
    """One validation of a run, with its callback's tag and settings."""
    settings = changes.pop("settings", {})
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    measurement = synthetic_measurement(validation, 4, seed=seed, **{**SIZES, **changes})
    moment = store.Moment(validation, 25 * validation, 0, 1.0)
    probe = synthetic_probe(measurement.names)
    chosen = Settings(tuple(measurement.correlation))
    summary, detail = dashboard_records.records(measurement, probe, chosen, moment, CLASS_NAMES)
    summary = replace(summary, settings={**summary.settings, **settings})
    written = {"detail": store.to_bytes(detail), "summary": store.to_bytes(summary)}
    publish.log_records([logger], {store.tag(tag, kind, validation): data for kind, data in written.items()}, 25)
    logger.experiment.close()


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart") / "logs"
    for validation in range(3):
        add(folder, "first", validation, seed=1)
        add(folder, "second", validation, seed=2)
        add(folder, "other tag", validation, seed=3, tag="globenc_2")
        add(folder, "other score", validation, seed=4, settings={"target": "label"})
        add(folder, "other layers", validation, seed=5, layers=3)
        add(folder, "few methods", validation, seed=6, methods=METHODS[:3])
    return folder


@pytest.fixture(scope="module")
def address(logdir: Path) -> Iterator[str]:
    with tensorboard(logdir, logdir.parent) as address:
        until_runs(address, RUNS)
        yield address


def correlation(address: str, run: str) -> Any:
    """A run's mean over sentences and its interval, of N-Enc, (validation, layer) each."""
    index = fetch(address, f"{PLUGIN}/index", run=run, tag="globenc").content
    return index["correlation"]["N-Enc"]


def test_runs_whose_figures_are_another_thing_stay_apart_and_each_says_why(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="first")
    assert tab.texts(".notice strong") == [f"{len(APART)} of {RUNS} runs are not averaged with first"]
    assert sorted(tab.texts(".notice p")) == [f"{run}: {reason}." for run, reason in sorted(APART.items())]
    assert tab.texts(HINTS)[TRAINING].startswith("Mean over 2 runs")
    means = [[row[-1] for row in correlation(address, run)["mean"]] for run in ("first", "second")]
    assert points(tab, TRAINING, MEAN) == pytest.approx(np.mean(means, 0), abs=5e-3)


def test_a_run_whose_methods_are_all_drawn_is_averaged(tab: Tab) -> None:
    tab.open(view="runs", run="first", methods='["W", "W-Res"]')
    assert tab.texts(HINTS)[TRAINING].startswith("Mean over 3 runs")
    assert sorted(tab.texts(".notice p")) == [
        f"{run}: {reason}." for run, reason in sorted(APART.items()) if run != "few methods"
    ]


def test_one_run_has_the_interval_over_its_sentences_and_says_so(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="first", runs='["second"]')
    assert "the band is the 95 % interval of the mean over its 4 sentences" in tab.texts(HINTS)[TRAINING]
    found = correlation(address, "second")
    low, high = ([row[-1] for row in found[end]] for end in ("low", "high"))
    band = points(tab, TRAINING, "N-Enc", ".band")
    assert band == pytest.approx([*high, *low[::-1]], abs=5e-3)
    band = points(tab, LAYERS, "N-Enc", ".band")
    assert band == pytest.approx([*found["high"][-1], *found["low"][-1][::-1]], abs=5e-3)
    assert "One run, so no band." in tab.texts(HINTS)[DRIFT]
    assert not tab.all(".runs-view .chart")[DRIFT].find_elements("css selector", ".band")


def test_correlations_are_drawn_while_attributions_are_read(tab: Tab) -> None:
    tab.open(run="first", tokens="[special]")
    tab.script(HELD)
    tab.all(".view-button[data-view=runs]")[0].click()
    wait_until(lambda: tab.all(f".runs-view [data-name='{MEAN}'] polyline"), "the correlations")
    waiting = tab.script("return [...document.querySelectorAll('.card')].map((e) => e.classList.contains('waiting'))")
    assert [waiting[-4:][chart] for chart in (TRAINING, DRIFT, LAYERS, MASS)] == [False, True, False, True]
    assert "are being read" in tab.texts(HINTS)[DRIFT]
    assert "are being read" in tab.texts(HINTS)[MASS]
    assert tab.script("return document.querySelector('main').getAttribute('aria-busy')") == "true"
    tab.script("for (const go of window.held) go();")
    tab.settled()
    assert not tab.all(".waiting")
    assert len(points(tab, DRIFT, MEAN)) == 2
    assert len(points(tab, MASS, MEAN)) == 3


def test_a_run_whose_attributions_cannot_be_read_keeps_its_correlations(tab: Tab, address: str) -> None:
    tab.open(run="first", tokens="[special]")
    refused = """
        const fetched = window.fetch;
        window.fetch = (url, ...more) => String(url).includes("/dynamics?run=second")
          ? Promise.reject(new Error("no answer")) : fetched(url, ...more);
    """
    tab.script(refused)
    tab.view("runs")
    means = [[row[-1] for row in correlation(address, run)["mean"]] for run in ("first", "second")]
    assert points(tab, TRAINING, MEAN) == pytest.approx(np.mean(means, 0), abs=5e-3)
    assert "The attributions of 1 of 2 runs cannot be read." in tab.texts(HINTS)[DRIFT]
    assert "The attributions of 1 of 2 runs cannot be read." in tab.texts(HINTS)[MASS]
    alone = fetch(
        address,
        f"{PLUGIN}/dynamics",
        run="first",
        tag="globenc",
        layer=1,
        methods='["N-Enc"]',
        tokens='["[special]"]',
        against="previous",
        by="spearman",
    ).content
    assert points(tab, MASS, "N-Enc") == pytest.approx(alone["mass"]["N-Enc"], abs=5e-3)


def test_close_up_tells_small_drifts_apart_and_names_the_chance_level(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="first", methods='["N-Enc"]')
    assert tab.all("[data-name='chance: shuffled tokens']")
    tab.driver.find_element("xpath", "//label[contains(., 'Close up')]").click()
    tab.settled()
    assert tab.state()["near"] == "1"
    assert not tab.all("[data-name='chance: shuffled tokens']")
    assert "Chance, shuffled tokens: 1.00, not drawn here." in tab.texts(HINTS)[DRIFT]
    asked = {"layer": 1, "methods": '["N-Enc"]', "tokens": "[]", "against": "previous", "by": "spearman"}
    answers = [
        fetch(address, f"{PLUGIN}/dynamics", run=run, tag="globenc", **asked).content["drift"]["N-Enc"][1:]
        for run in ("first", "second")
    ]
    mean, sd = np.mean(answers, 0), np.std(answers, 0, ddof=1)
    ticks = tab.all(".runs-view .chart")[DRIFT].find_elements("css selector", ".tick[text-anchor='end']")
    assert max(float(tick.text) for tick in ticks) < 1.6 * max(mean + sd)
    assert points(tab, DRIFT, MEAN) == pytest.approx(mean, abs=0.01 * max(mean))


@pytest.mark.parametrize(
    ("view", "group", "name"),
    [
        ("runs", "Runs that are averaged", "second"),
        ("runs", "Methods that are drawn", "N-Res"),
        ("correlation", "Runs that are drawn", "second"),
        ("correlation", "Methods that are drawn", "N-Res"),
    ],
)
def test_a_switch_keeps_the_keyboard_s_focus(tab: Tab, view: str, group: str, name: str) -> None:
    tab.open(view=view, run="first")
    switch = f"//div[@aria-label='{group}']/button[text()='{name}']"
    tab.driver.execute_script("arguments[0].focus()", tab.driver.find_element("xpath", switch))
    pressed = []
    for _ in range(3):
        pressed.append(tab.driver.find_element("xpath", switch).get_attribute("aria-pressed"))
        assert tab.script("return document.activeElement.textContent") == name
        tab.press(Keys.SPACE)
    assert pressed in (["true", "false", "true"], ["false", "true", "false"])


def test_a_running_training_moves_the_mean(tab: Tab, logdir: Path, address: str) -> None:
    tab.open(view="runs", run="first", runs='["first", "second"]')
    assert len(points(tab, TRAINING, MEAN)) == 3
    for seed, name in ((1, "first"), (2, "second")):
        add(logdir, name, 3, seed=seed)
    wait_until(lambda: len(points(tab.settled(), TRAINING, MEAN)) == 4, "the fourth validation")
    wait_until(lambda: len(points(tab.settled(), DRIFT, MEAN)) == 3, "the third drift")
    means = [correlation(address, run)["mean"][-1][-1] for run in ("first", "second")]
    wait_until(
        lambda: points(tab.settled(), TRAINING, MEAN)[-1] == pytest.approx(np.mean(means), abs=5e-3), "both runs' mean"
    )
    # by hand: a run of one of the two more makes no third
    toggle(tab, "second")
    assert points(tab, TRAINING, "N-Enc")[-1] == pytest.approx(means[0], abs=5e-3)
