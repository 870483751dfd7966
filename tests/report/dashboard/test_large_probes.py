"""The tab with many sentences and long ones in a real browser: what is drawn of them, and what is said of the rest."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from benchmarks.dashboard import large_run, synthetic_measurement, write
from globenc_lightning.report import publish
from globenc_lightning.report.dashboard import store
from tests.report.dashboard.browser import Tab, contrast, prefer_dark, wait_until
from tests.report.dashboard.serving import PLUGIN, fetch, tensorboard, until_runs
from tests.report.dashboard.test_browser import assert_colours, records, shares

pytestmark = pytest.mark.slow

MANY, PART, DEEP, EARLIER = "many", "part", "deep", "earlier"
RARE, AT = "zebra", 777
"""A word that one sentence has, and which."""
NODES = "let n = 0; const all = document.createTreeWalker(document); while (all.nextNode()) n += 1; return n;"
INTO_VIEW = """
    const [top, bottom] = [document.querySelector("header").offsetHeight, innerHeight];
    const seen = [...document.querySelectorAll("main .sentence")].filter((e) => {
      const box = e.getBoundingClientRect();
      return box.bottom > top && box.top < bottom;
    });
    return seen.map((e) => [Number(e.dataset.sentence), e.querySelectorAll(".chip").length]);
"""
"""The sentences in the window, and how many tokens are drawn of each."""
SCROLL = (
    "window.scrollTo(0, arguments[0]); return new Promise((next) => requestAnimationFrame(() => setTimeout(next)));"
)


def many_run(folder: Path) -> None:
    """1,000 short sentences of two methods: everything fits. One sentence has a word that no other has."""
    logger = TensorBoardLogger(str(folder), name=None, version=MANY)
    for validation in range(3):
        measurement = synthetic_measurement(validation, 3, sentences=1000, layers=12, tokens=24, methods=("W", "N-Enc"))
        names = [list(one) for one in measurement.names]
        names[AT][5] = RARE
        moment = store.Moment(validation, 10 * validation, 0, 1.0)
        write(logger, replace(measurement, names=[tuple(one) for one in names]), moment)
    logger.experiment.close()


def earlier_run(folder: Path) -> None:
    """Two validations of 70 sentences as an earlier version of the package wrote them."""
    logger = TensorBoardLogger(str(folder), name=None, version=EARLIER)
    for ordinal in range(2):
        for kind in ("detail", "summary"):
            data = (Path(__file__).parent / "earlier" / f"{kind}_{ordinal:06d}").read_bytes()
            publish.log_records([logger], {store.tag("globenc", kind, ordinal): data}, 10 * ordinal)
    logger.experiment.close()


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "logs"
    many_run(folder)
    large_run(folder, PART, validations=2, sentences=1000, layers=12, tokens=72, methods=("N-Enc",))
    large_run(folder, DEEP, validations=2, sentences=64, layers=24, tokens=128)
    earlier_run(folder)
    return folder


@pytest.fixture(scope="module")
def address(logdir: Path) -> Iterator[str]:
    with tensorboard(logdir, logdir.parent) as address:
        until_runs(address, 4)
        yield address


def ask(address: str, route: str, run: str, **arguments: Any) -> Any:
    return fetch(address, f"{PLUGIN}/{route}", run=run, tag="globenc", **arguments).content


def shown(address: str, run: str) -> int:
    return len(ask(address, "index", run)["sentences"])


def into_view(tab: Tab) -> dict[int, int]:
    return dict(tab.script(INTO_VIEW))


def colours(tab: Tab, column: int, sentence: int) -> Any:
    return np.array(
        tab.script(
            """
            const row = document.querySelector(`.tokens-view [data-sentence="${arguments[1]}"]`);
            return [...row.querySelectorAll(".chips")[arguments[0]].querySelectorAll(".chip")].map(
                (chip) => getComputedStyle(chip).backgroundColor.match(/[\\d.]+/g).map(Number));
            """,
            column,
            sentence,
        )
    )


# What is drawn


@pytest.mark.parametrize(("view", "most"), [("tokens", 12_000), ("movement", 12_000)])
@pytest.mark.parametrize("run", [MANY, PART, DEEP])
def test_only_what_is_near_the_window_is_drawn(tab: Tab, address: str, run: str, view: str, most: int) -> None:
    tab.open(run=run, view=view)
    assert len(tab.all("main .sentence")) == shown(address, run)
    assert tab.script(NODES) < most
    seen = into_view(tab)
    assert seen
    assert all(seen.values())
    height = "return document.scrollingElement.scrollHeight"
    whole = tab.script(height)
    for share in (0.3, 0.9, 1.0, 0.5, 0.0):
        tab.script(SCROLL, share * whole)
        wait_until(lambda: all(into_view(tab).values()), "tokens in the window")
        assert tab.script(NODES) < most
        # The page neither grows nor shrinks while it is scrolled.
        assert abs(tab.script(height) - whole) < 0.01 * whole
    assert into_view(tab) == seen


def test_a_whole_way_down_meets_every_sentence_in_its_order(tab: Tab) -> None:
    tab.open(run=DEEP)
    met: list[int] = []
    for _ in range(200):
        seen = into_view(tab)
        assert all(seen.values())
        met += [one for one in seen if one not in met]
        before = tab.script("return scrollY")
        tab.script("window.scrollBy(0, 500); return new Promise((n) => requestAnimationFrame(() => setTimeout(n)))")
        if tab.script("return scrollY") == before:
            break
    assert met == list(range(64))


def test_what_is_drawn_late_shows_its_own_numbers(tab: Tab, logdir: Path) -> None:
    summaries = records(logdir, MANY)
    tab.open(run=MANY, sentence=AT + 1)
    assert AT in into_view(tab)
    for position in (2, 0, 1):
        tab.slide(position)
        summary, detail = summaries[position]
        for sentence in into_view(tab):
            assert_colours(colours(tab, 0, sentence), shares(detail.rows["N-Enc"][sentence][-1]))
            assert_colours(colours(tab, 1, sentence), shares(detail.saliency[sentence]))
    rho = summary.rho[summary.methods.index("N-Enc"), AT, -1]
    told = tab.all(f"[data-sentence='{AT}'] .rho")[0].text
    assert told == f"{rho:.2f}".replace("-", "−")
    # What was scrolled to after the slider had moved is of the same step.
    tab.script(SCROLL, 0)
    wait_until(lambda: 0 in into_view(tab) and all(into_view(tab).values()), "the first sentences")
    assert_colours(colours(tab, 0, 3), shares(detail.rows["N-Enc"][3][-1]))


def test_a_step_of_the_slider_draws_nothing_anew(tab: Tab) -> None:
    tab.open(run=MANY)
    changed = """
        window.added = 0;
        new MutationObserver((all) => { for (const one of all) window.added += one.addedNodes.length; })
            .observe(document.querySelector(".tokens-view"), { childList: true, subtree: true });
    """
    tab.script(changed)
    tab.slide(0)
    tab.slide(1)
    # Texts of figures change: a few of each row that is drawn, and no token.
    assert tab.script("return window.added") < 10 * len(tab.all(".sentence:not(.undrawn)"))
    nodes = tab.script(NODES)
    tab.slide(2)
    assert tab.script(NODES) == nodes


def test_few_sentences_are_drawn_at_once(tab: Tab) -> None:
    tab.open(run=EARLIER)
    assert len(tab.all(".sentence")) == 64
    assert not tab.all(".undrawn")


# Keys, searching, reading aloud


def test_keys_reach_what_is_not_drawn(tab: Tab) -> None:
    tab.open(run=MANY, sentence=AT + 1)
    tab.press(*[Keys.ARROW_DOWN] * 12)
    assert tab.texts(".sentence.chosen .number") == [str(AT + 13)]
    assert into_view(tab)[AT + 12]
    # The tab key goes from sentence to sentence, also where none was drawn so far.
    far = AT - 400
    tab.script("document.querySelector(`[data-sentence='${arguments[0]}'] .number`).focus()", far)
    reached = []
    for _ in range(25):
        reached.append(tab.script("return Number(document.activeElement.closest('.sentence').dataset.sentence)"))
        wait_until(lambda at=reached[-1]: into_view(tab).get(at), f"sentence {reached[-1]} drawn in the window")
        tab.press(Keys.TAB)
    assert reached == list(range(far, far + 25))
    tab.press(Keys.ENTER)
    assert tab.texts(".sentence.chosen .number") == [str(far + 26)]
    # Its tokens can be reached now.
    tab.press(Keys.TAB)
    assert tab.script("return document.activeElement.getAttribute('aria-label')").endswith("show where it comes from")


def test_the_browser_s_search_finds_what_is_not_drawn(tab: Tab) -> None:
    tab.open(run=MANY, view="movement")
    assert tab.all(f"[data-sentence='{AT}'].undrawn")
    assert tab.script("return window.find(arguments[0])", RARE)
    wait_until(lambda: into_view(tab).get(AT), "the sentence that was found, drawn")
    tab.open(run=MANY)
    assert AT not in into_view(tab)
    assert tab.script("return window.find(arguments[0])", RARE)
    wait_until(lambda: into_view(tab).get(AT), "the sentence that was found, drawn")
    wait_until(lambda: tab.script("return String(getSelection())") == RARE, "the word, selected among the tokens")
    assert tab.script("return getSelection().anchorNode.parentElement.className").startswith("chip")
    # A text over several tokens is found as it is read.
    tab.open(run=MANY)
    words = " ".join(ask(tab.address, "index", MANY)["sentences"][AT]["tokens"][4:7])
    assert tab.script("return window.find(arguments[0])", words)
    wait_until(lambda: into_view(tab).get(AT), "the sentence that was found, drawn")
    wait_until(lambda: tab.script("return String(getSelection())") == words, "the words, selected among the tokens")


@pytest.mark.parametrize("view", ["tokens", "movement"])
def test_what_is_not_drawn_can_be_read_aloud(tab: Tab, view: str) -> None:
    tab.open(run=MANY, view=view)
    # In Movement, it is where it has moved to.
    place, name = tab.script(
        """
        const all = [...document.querySelectorAll("main .sentence")];
        const far = all.findIndex((e) => Number(e.dataset.sentence) === arguments[0]);
        all[far].id = "far";
        return [far, all[far].getAttribute("aria-label")];
        """,
        AT,
    )
    assert tab.all("#far.undrawn"), "the sentence is drawn: the test shows nothing"
    assert name.startswith(f"Sentence {AT + 1}")
    said = tab.all("#far")[0]
    assert (said.aria_role, said.accessible_name) == ("article", name)
    assert (said.get_attribute("aria-posinset"), said.get_attribute("aria-setsize")) == (str(place + 1), "1000")
    (frame,) = tab.driver.execute_cdp_cmd("Page.getFrameTree", {})["frameTree"]["childFrames"]
    tree = tab.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {"frameId": frame["frame"]["id"]})["nodes"]
    texts = [node["name"]["value"] for node in tree if not node["ignored"] and "name" in node]
    assert any(RARE in text for text in texts)


def test_a_sentence_opened_from_movement_is_in_the_window(tab: Tab) -> None:
    tab.open(run=MANY, view="movement")
    number = tab.all(".moved .sentence .number")[600]
    sentence = int(number.text) - 1
    for _ in range(2):
        tab.script("arguments[0].click()", tab.all(".moved .sentence .number")[600])
        tab.settled()
        assert tab.state()["view"] == "tokens"
        assert into_view(tab)[sentence]
        tab.view("movement")


def test_another_width_keeps_the_place(tab: Tab) -> None:
    tab.open(run=MANY, sentence=AT + 1)
    size = {"width": 800, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    try:
        tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wait_until(lambda: all(into_view(tab).values()), "tokens in the narrower window")
        whole = tab.script("return document.scrollingElement.scrollHeight")
        tab.script(SCROLL, 0.5 * whole)
        wait_until(lambda: all(into_view(tab).values()), "tokens in the narrower window")
        assert abs(tab.script("return document.scrollingElement.scrollHeight") - whole) < 0.02 * whole
    finally:
        tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "width": 1280})


# What is said


def test_every_view_says_which_sentences_are_shown(tab: Tab, address: str) -> None:
    count = shown(address, PART)
    assert 500 < count < 1000
    part = f"{count} of 1,000 sentences"
    for view in ("tokens", "maps", "correlation", "movement"):
        tab.open(run=PART, view=view)
        assert part in tab.text(".share")
        assert tab.all(".share")[0].is_displayed()
    tab.view("correlation")
    assert "Mean over 1,000 sentences" in tab.text(".correlation-view .card:first-child .hint")
    assert "no ρ is undefined" in tab.text(".correlation-view .card:first-child .hint")
    tab.open(run=PART, view="runs", tokens="film")
    hints = tab.texts(".runs-view .cards .hint")
    assert "the mean over its 1,000 sentences" in hints[0]
    assert f"mean over the first {part}" in hints[1]
    assert f"of the first {part}" in hints[3]
    assert "mean over these sentences" in hints[3]
    tab.open(run=MANY)
    assert not tab.all(".share")[0].is_displayed()


def test_every_view_says_which_methods_are_missing_of_which_sentences(tab: Tab, address: str) -> None:
    stored = ask(address, "tokens", DEEP, index=0, method="N-Enc", layer=0)["stored"]
    assert {stored[method] for method in ("N-Enc", "N-ResLN", "N-Res", "N")} == {64}
    (method,) = (one for one, count in stored.items() if 0 < count < 64)
    none = next(one for one, count in stored.items() if not count)
    count = stored[method]
    tab.open(run=DEEP)
    assert not tab.all(".share")[0].is_displayed()
    tab.choose("Method", method)
    said = tab.text(".share")
    assert said.startswith(f"{method}: the rows of {count} of 64 sentences are stored, not of {count + 1}–64.")
    assert "Stored for all: N, N-Res, N-ResLN, N-Enc" in said.replace("W-FixedRes, ", "")
    tab.press(*[Keys.ARROW_DOWN] * 63)
    row = tab.all(".sentence.chosen")[0]
    assert row.find_element(By.CSS_SELECTOR, ".absent").text.startswith(f"{method} is not stored for this sentence; ")
    assert "N-Enc" in row.find_element(By.CSS_SELECTOR, ".absent").text
    tab.view("maps")
    assert method in tab.texts(".maps-view .notice p")[0]
    assert "are not stored for this sentence" in tab.texts(".maps-view .notice p")[0]
    tab.view("movement")
    assert f"{count} of 64 sentences are compared." in tab.text(".share")
    assert len(tab.all(".moved .sentence")) == count
    tab.view("runs")
    wait_until(lambda: "stored" in tab.texts(".runs-view .cards .hint")[1], "the drift")
    assert f"{method} is stored for {count} of 64 of them" in tab.texts(".runs-view .cards .hint")[1]
    tab.open(run=DEEP, method=none)
    assert f"{none}: no rows are stored." in tab.text(".share")
    assert not [one for one in tab.all(".sentence .absent") if none not in one.text]


def test_an_earlier_version_s_large_probe_says_what_it_shows(tab: Tab) -> None:
    for view in ("tokens", "maps", "correlation", "movement"):
        tab.open(run=EARLIER, view=view)
        assert "64 of 70 sentences" in tab.text(".share")
    tab.open(run=EARLIER, view="movement", method="N-FixedRes")
    assert tab.text(".share").startswith("11 of 70 sentences are compared.")
    assert "the rows of 11 of 64 sentences are stored, not of 12–64" in tab.text(".share")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("run", "view", "method"),
    [
        (PART, "tokens", "N-Enc"),
        (PART, "maps", "N-Enc"),
        (PART, "correlation", "N-Enc"),
        (PART, "movement", "N-Enc"),
        (PART, "runs", "N-Enc"),
        (DEEP, "tokens", "W"),
        (DEEP, "movement", "W"),
        (DEEP, "maps", "W"),
        (DEEP, "runs", "W"),
    ],
)
def test_what_is_said_can_be_read(tab: Tab, run: str, view: str, method: str, dark: bool) -> None:
    prefer_dark(tab.driver, dark)
    tab.open("?darkMode=true" if dark else "", run=run, view=view, method=method, tokens="film")
    found = tab.script(
        """
        const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
        const behind = (e) => {
          for (let at = e; at; at = at.parentElement) {
            const colour = rgb(getComputedStyle(at).backgroundColor);
            if (colour.length === 3) return colour;
          }
          return [255, 255, 255];
        };
        const all = [...document.querySelectorAll(".share, .absent, .hint")].filter((e) => e.checkVisibility());
        return all.map((e) => [rgb(getComputedStyle(e).color).slice(0, 3), behind(e), e.textContent,
            e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight + 1]);
        """
    )
    assert found
    for ink, ground, text, whole in found:
        assert contrast(ink, ground) >= 4.5, text
        assert whole, text
    wide = "const e = document.scrollingElement; return e.scrollWidth <= e.clientWidth"
    assert tab.script(wide)
    tab.shot(f"large-{run}-{view}-{'dark' if dark else 'light'}")


# A step in Movement

SNAPSHOT = """
    return [...document.querySelectorAll(".moved .sentence")].map((row) => [
      row.dataset.sentence, row.getAttribute("aria-posinset"), row.classList.contains("chosen"),
      row.querySelector(".number").textContent, row.querySelector(".number").getAttribute("aria-label"),
      row.classList.contains("undrawn") ? row.textContent : "",
      row.classList.contains("undrawn") ? row.getAttribute("aria-label") : "",
    ]);
"""
COUNT = """
    window.rows = [...document.querySelectorAll(".moved .sentence")];
    window.added = 0;
    const size = (node) => {
      let n = 1;
      for (const all = document.createTreeWalker(node); all.nextNode(); ) n += 1;
      return n;
    };
    window.watcher = new MutationObserver((all) => {
      for (const one of all) for (const node of one.addedNodes) window.added += size(node);
    });
    window.watcher.observe(document.querySelector(".moved"), { subtree: true, childList: true });
"""
FRAMES = """
    const done = arguments[0];
    requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)));
"""


def test_a_step_in_movement_changes_what_is_near_and_no_more(tab: Tab) -> None:
    tab.open(run=MANY, view="movement")
    everything = tab.script(NODES)
    tab.script(COUNT)
    tab.slide(1)
    tab.driver.execute_async_script(FRAMES)
    same = "const now = document.querySelectorAll('.moved .sentence'); return rows.every((row, i) => row === now[i]);"
    assert tab.script(same), "rows were built anew"
    # All 1,000 rows are more than 7,000 nodes; what is near the window is a few hundred chips.
    assert 0 < tab.script("return added") < 0.3 * everything
    drawn = tab.script("return rows.filter((row) => !row.classList.contains('undrawn')).length")
    assert drawn < 40


def test_a_step_in_movement_shows_what_a_page_that_is_opened_there_shows(tab: Tab) -> None:
    tab.open(run=MANY, view="movement")
    before = tab.script(SNAPSHOT)
    tab.slide(1)
    tab.driver.execute_async_script(FRAMES)
    stepped, colours = tab.script(SNAPSHOT), tab.script(COLOURED)
    heights = tab.script("return document.scrollingElement.scrollHeight")
    assert [one[0] for one in stepped] != [one[0] for one in before], "the order is the same: the test shows nothing"
    tab.open(run=MANY, view="movement", validation=1)
    tab.driver.execute_async_script(FRAMES)
    opened = tab.script(SNAPSHOT)
    assert [one[:5] for one in stepped] == [one[:5] for one in opened]
    # What is drawn may differ at the edges; what is not is read and searched for as on a page that is opened there.
    both = [(one, other) for one, other in zip(stepped, opened, strict=True) if one[5] and other[5]]
    assert len(both) > 900
    assert all(one == other for one, other in both)
    assert colours == tab.script(COLOURED)
    assert abs(tab.script("return document.scrollingElement.scrollHeight") - heights) < 0.02 * heights


COLOURED = """
    const seen = [...document.querySelectorAll(".moved .sentence")].slice(0, 3);
    return seen.map((row) => [row.querySelector(".facts").textContent, ...[...row.querySelectorAll(".chip")].map((e) =>
        [e.textContent, e.className, getComputedStyle(e).backgroundColor])]);
"""
"""The first sentences' figures and tokens, as they are painted."""


def test_a_step_in_movement_far_down_draws_what_is_in_the_window(tab: Tab) -> None:
    tab.open(run=MANY, view="movement")
    whole = tab.script("return document.scrollingElement.scrollHeight")
    tab.script(SCROLL, 0.6 * whole)
    wait_until(lambda: all(into_view(tab).values()), "tokens in the window")
    place = tab.script("return document.scrollingElement.scrollTop")
    tab.slide(1)
    wait_until(lambda: all(into_view(tab).values()), "tokens in the window")
    assert abs(tab.script("return document.scrollingElement.scrollTop") - place) < 0.03 * whole
