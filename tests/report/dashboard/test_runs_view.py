"""The tab's view of many runs in a real browser: means and bands over runs, drift, and the share of typed tokens."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from benchmarks.dashboard import large_run
from tests.report.dashboard.browser import Tab, prefer_dark, wait_until
from tests.report.dashboard.serving import PLUGIN, fetch, tensorboard, until_runs

pytestmark = pytest.mark.slow

SEEDS = ("seed_0", "seed_1", "seed_2")
SHORT = "seed_2"
"""The run that has fewer validations than the others."""
OTHER = "another probe"
TRAINING, DRIFT, LAYERS, MASS = range(4)
CHOICES = {"layer": 2, "methods": '["N-Enc"]', "tokens": "[]"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(SEEDS):
        validations = 3 if name == SHORT else 5
        large_run(folder / "logs", name, validations=validations, sentences=4, layers=3, tokens=9, seed=seed, words=0)
    large_run(folder / "logs", OTHER, validations=2, sentences=3, layers=3, tokens=9, seed=9)
    with tensorboard(folder / "logs", folder) as address:
        until_runs(address, len(SEEDS) + 1)
        yield address


def ask(address: str, route: str, run: str, **arguments: Any) -> Any:
    return fetch(address, f"{PLUGIN}/{route}", run=run, tag="globenc", **arguments).content


def table(address: str, run: str, layer: int = 2) -> dict[int, float]:
    """Step -> a run's mean correlation of N-Enc."""
    found = ask(address, "table", run)
    return {step: row[layer] for step, row in zip(found["steps"], found["mean"]["N-Enc"], strict=True)}


def points(tab: Tab, chart: int, name: str, part: str = "polyline") -> NDArray[np.float64]:
    """The values at a line's points, read off the picture by the rules' own numbers."""
    card = tab.all(".runs-view .cards .chart")[chart]
    drawn = card.find_element(By.CSS_SELECTOR, f"[data-name='{name}'] {part}").get_attribute("points") or ""
    heights = np.array([float(pair.split(",")[1]) for pair in drawn.split()])
    rules = [float(rule.get_attribute("y1") or 0) for rule in card.find_elements(By.CSS_SELECTOR, ".rule")]
    ticks = card.find_elements(By.CSS_SELECTOR, ".tick[text-anchor='end']")
    values = [float(tick.text.replace("−", "-")) for tick in ticks]
    slope = (values[-1] - values[0]) / (rules[-1] - rules[0])
    return np.asarray(values[0] + (heights - rules[0]) * slope)


def chips(tab: Tab, group: str) -> dict[str, bool]:
    found = tab.all(f"[aria-label='{group}'] .toggle")
    return {(one.get_attribute("textContent") or ""): one.get_attribute("aria-pressed") == "true" for one in found}


def toggle(tab: Tab, name: str) -> None:
    tab.driver.find_element(By.XPATH, f"//button[contains(@class, 'toggle')][text()='{name}']").click()
    tab.settled()


def test_a_curve_is_the_mean_over_the_runs_and_its_band_their_deviation(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="seed_0")
    found = [table(address, run) for run in SEEDS]
    steps = sorted({step for one in found for step in one})
    values = [[one[step] for one in found if step in one] for step in steps]
    mean = np.array([np.mean(one) for one in values])
    sd = np.array([np.std(one, ddof=1) for one in values])
    assert [len(one) for one in values] == [3, 3, 3, 2, 2]
    assert points(tab, TRAINING, "N-Enc, mean over runs") == pytest.approx(mean, abs=5e-3)
    band = points(tab, TRAINING, "N-Enc, mean over runs", ".band")
    assert band[: len(steps)] == pytest.approx(mean + sd, abs=5e-3)
    assert band[len(steps) :][::-1] == pytest.approx(mean - sd, abs=5e-3)
    assert "± 1 standard deviation over runs" in tab.texts(".runs-view .cards .hint")[TRAINING]


def test_runs_of_another_probe_are_told_and_left_out(tab: Tab) -> None:
    tab.open(view="runs", run="seed_0")
    assert tab.texts(".notice strong") == ["1 of 4 runs are not averaged with seed_0"]
    assert OTHER in tab.text(".notice p")
    tab.open(view="runs", run=OTHER)
    assert tab.texts(".notice strong") == [f"3 of 4 runs are not averaged with {OTHER}"]
    assert "no band over runs" in tab.texts(".runs-view .cards .hint")[TRAINING]


def test_a_run_that_is_switched_off_leaves_the_mean(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="seed_0")
    toggle(tab, "seed_1")
    toggle(tab, OTHER)
    assert chips(tab, "Runs that are averaged") == {OTHER: False, "seed_0": True, "seed_1": False, "seed_2": True}
    assert not tab.all(".notice")
    found = [table(address, run) for run in ("seed_0", "seed_2")]
    assert points(tab, TRAINING, "N-Enc, mean over runs")[0] == pytest.approx(
        np.mean([one[0] for one in found]), abs=5e-3
    )
    assert json.loads(tab.state()["runs"]) == ["seed_0", "seed_2"]
    tab.driver.find_element(By.XPATH, "//button[text()='All']").click()
    tab.settled()
    assert "runs" not in tab.state()


def test_by_layer_counts_the_runs_that_have_the_step(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="seed_0")
    assert "1 of them have no validation at this step" in tab.texts(".runs-view .cards .hint")[LAYERS]
    found = [ask(address, "table", run)["mean"]["N-Enc"][-1] for run in ("seed_0", "seed_1")]
    assert points(tab, LAYERS, "N-Enc, mean over runs") == pytest.approx(np.mean(found, 0), abs=5e-3)
    tab.slide(0)
    found = [ask(address, "table", run)["mean"]["N-Enc"][0] for run in SEEDS]
    assert points(tab, LAYERS, "N-Enc, mean over runs") == pytest.approx(np.mean(found, 0), abs=5e-3)


@pytest.mark.parametrize("against", ["previous", "first", "last"])
@pytest.mark.parametrize("by", ["spearman", "jaccard"])
def test_drift_is_what_the_server_says_beside_its_chance_level(tab: Tab, address: str, against: str, by: str) -> None:
    tab.open(view="runs", run="seed_0", against=against, by=by, runs='["seed_0", "seed_1"]')
    answers = [ask(address, "dynamics", run, against=against, by=by, **CHOICES) for run in ("seed_0", "seed_1")]
    moved = [[one for one in answer["drift"]["N-Enc"] if one is not None] for answer in answers]
    assert len(moved[0]) == 4
    assert points(tab, DRIFT, "N-Enc, mean over runs") == pytest.approx(np.mean(moved, 0), abs=5e-3)
    assert points(tab, DRIFT, "chance: shuffled tokens") == pytest.approx([answers[0]["chance"]] * 2, abs=5e-3)


def test_the_measure_of_drift_is_chosen_and_stands_in_the_link(tab: Tab) -> None:
    tab.open(view="runs", run="seed_0")
    tab.choose("Compared with", "the first validation")
    tab.choose("Measured by", "1 − Jaccard of the top 25 %")
    assert {"against": "first", "by": "jaccard"}.items() <= tab.state().items()
    assert "the first validation" in tab.texts(".runs-view .cards .hint")[DRIFT]


def test_typed_tokens_show_their_share(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="seed_0", runs='["seed_0", "seed_1"]')
    assert not tab.all(".runs-view .chart:not([hidden])")[MASS:]
    field = tab.all(".typed")[0]
    field.send_keys("film, plot <script>alert(1)</script> .*")
    field.send_keys(Keys.ENTER)
    wait_until(lambda: tab.all(".runs-view .chart:not([hidden])")[MASS:], "the chart of the share")
    tab.settled()
    words = json.dumps(["film", "plot", "<script>alert(1)</script>", ".*"])
    choices = {**CHOICES, "against": "previous", "by": "spearman", "tokens": words}
    answers = [ask(address, "dynamics", run, **choices) for run in ("seed_0", "seed_1")]
    shares = [answer["mass"]["N-Enc"] for answer in answers]
    assert sum(answers[0]["chosen"]) > 0
    assert points(tab, MASS, "N-Enc, mean over runs") == pytest.approx(np.mean(shares, 0), abs=5e-3)
    counted = answers[0]["chosen"]
    told = f"{sum(counted)} tokens in {sum(map(bool, counted))} of 4 sentences"
    assert tab.texts(".runs-view .cards .hint")[MASS].startswith(told)
    assert tab.state()["tokens"] == "film, plot <script>alert(1)</script> .*"
    # keys in the field move no slider
    position = tab.position
    field.send_keys(Keys.ARROW_LEFT, Keys.HOME)
    assert tab.position == position


def test_a_set_of_tokens_is_one_click(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="seed_0")
    toggle(tab, "Special tokens")
    assert tab.all(".typed")[0].get_attribute("value") == "[special]"
    choices = {**CHOICES, "against": "previous", "by": "spearman", "tokens": '["[special]"]'}
    shares = [ask(address, "dynamics", run, **choices)["mass"]["N-Enc"][0] for run in SEEDS]
    assert points(tab, MASS, "N-Enc, mean over runs")[0] == pytest.approx(np.mean(shares), abs=5e-3)
    assert chips(tab, "Methods that are drawn")["N-Enc"]


def test_single_runs_are_drawn_beside_the_mean(tab: Tab, address: str) -> None:
    tab.open(view="runs", run="seed_0")
    tab.click(".check input")
    for run in SEEDS:
        values = [*table(address, run).values()]
        assert points(tab, TRAINING, f"{run}, N-Enc") == pytest.approx(values, abs=5e-3)
    assert tab.state()["single"] == "1"


def test_the_box_at_the_pointer_says_of_how_many_runs(tab: Tab) -> None:
    tab.open(view="runs", run="seed_0")
    chart = tab.all(".runs-view .chart svg")[TRAINING]
    for offset, count in ((-160, 3), (60, 2)):
        ActionChains(tab.driver).move_to_element_with_offset(chart, offset, 0).perform()
        wait_until(lambda count=count: f"n = {count}" in tab.text(".tooltip"), f"n = {count}")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_many_runs_fit_the_window(tab: Tab, dark: bool) -> None:
    prefer_dark(tab.driver, dark)
    tab.open(view="runs", run="seed_0", tokens="film plot", single="1", methods='["N-Enc", "N-Res", "W"]')
    wide = "const e = document.scrollingElement; return [e.scrollWidth, e.clientWidth];"
    scrolled, room = tab.script(wide)
    assert scrolled <= room
    tab.shot(f"many-runs-{'dark' if dark else 'light'}")
    tab.script("document.querySelector('.runs-view .cards').scrollIntoView()")
    tab.shot(f"many-runs-below-{'dark' if dark else 'light'}")


def test_a_link_that_makes_no_sense_shows_the_usual(tab: Tab) -> None:
    tab.open(view="runs", run="seed_0", runs="{}", against="best", by="1", single="x", methods='["none"]')
    assert chips(tab, "Runs that are averaged")["seed_1"]
    assert tab.chosen("Compared with") == "the validation before"
    assert not tab.all(".runs-view .line")
