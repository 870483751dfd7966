"""How long the GlobEnc tab takes in a browser: its view of many runs, and a run with many sentences or long ones.

    python -m benchmarks.browser

Runs of one probe are written by the callback's own way, TensorBoard's own command serves them, and chromium shows the
tab without a window. A time is from a person's action until the page has come to rest; requests and kB are what the
action made the browser fetch. At the defaults: 30 runs of 50 validations, 16 sentences of 24 tokens, 12 layers, eight
methods. Of each run with many sentences, the page's nodes are counted, too, and a step of the slider is timed inside
the page. chromium, chromedriver and selenium have to be there.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.common import arguments_parser, begin, finish, parse, positive, print_table
from benchmarks.dashboard import large_run, synthetic_measurement, write
from globenc_lightning import METHODS
from globenc_lightning.report.dashboard import store
from tests.report.dashboard.browser import Tab, chromium, wait_until
from tests.report.dashboard.serving import tensorboard, until_runs

QUICK = {"runs": 2, "of_each": 3, "sentences": 3, "layers": 3, "tokens": 8, "pairs": 2, "probe": 16, "steps": 3}
TWO = ("W", "N-Enc")
LARGE: dict[str, dict[str, Any]] = {
    "{sentences:,} sentences of 24 tokens, 12 layers": {"tokens": 24, "layers": 12},
    "{sentences:,} sentences of 24 tokens, 12 layers, 2 methods": {"tokens": 24, "layers": 12, "methods": TWO},
    "{sentences} sentences of 128 tokens, 24 layers": {"sentences": 64, "tokens": 128, "layers": 24},
    "{sentences} sentences of 200 tokens, 12 layers": {"sentences": 16, "tokens": 200, "layers": 12},
}
"""The runs with many sentences or long ones; ``probe`` of them where no number is written, and never more."""
WORDS = ("film", "not", "plot", "music", "clever", "warm", "long", "dull", "actors", "ending")

FETCHED = """
    const entries = performance.getEntriesByType("resource").filter(
        ({ name }) => name.includes("/plugin/globenc/") && !name.endsWith("/runs"),
    );
    performance.clearResourceTimings();
    performance.setResourceTimingBufferSize(10000);
    return [entries.length, entries.reduce((sum, { transferSize }) => sum + transferSize, 0)];
"""
"""How much the tab has asked for since the last time, but for what is new, which it asks every ten seconds."""


class Action(NamedTuple):
    """One action: how long it took in seconds, what was asked for, and how many bytes came."""

    seconds: float
    requests: int
    size: int


def write_runs(folder: Path, options: argparse.Namespace) -> None:
    """Write runs of one probe, each another training.

    Args:
        folder: TensorBoard's.
        options: the command line.
    """
    sizes = {"sentences": options.sentences, "layers": options.layers, "tokens": options.tokens}
    for seed in range(options.runs):
        logger = TensorBoardLogger(str(folder), name=None, version=f"seed-{seed:02d}")
        for place in range(options.of_each):
            measurement = synthetic_measurement(place, options.of_each, seed=seed, words=0, **sizes)
            write(logger, measurement, store.Moment(place, 25 * place, place // 10, 1.0))
        logger.experiment.close()


def measure(tab: Tab, options: argparse.Namespace) -> dict[str, list[Action]]:
    """Every action's times, in the order in which a person might take them.

    Args:
        tab: a tab that shows no view of many runs yet.
        options: the command line.
    """
    found: dict[str, list[Action]] = {}
    begun = time.perf_counter()

    def timed(name: str, act: Callable[[int], None], times: int = 1) -> None:
        for number in range(times):
            if number and time.perf_counter() - begun > options.seconds:
                return
            tab.script(FETCHED)
            start = time.perf_counter()
            act(number)
            tab.settled()
            taken = time.perf_counter() - start
            found.setdefault(name, []).append(Action(taken, *tab.script(FETCHED)))

    def open_view(_: int) -> None:
        tab.all(".view-button[data-view=runs]")[0].click()
        start = time.perf_counter()
        wait_until(lambda: tab.all(".runs-view .line polyline"), "the first curves")
        found["first opened: the correlations"] = [Action(time.perf_counter() - start, 0, 0)]

    def type_words(number: int) -> None:
        tab.script(
            "const e = document.querySelector('.typed'); e.value = arguments[0]; e.dispatchEvent(new Event('change'));",
            WORDS[number % len(WORDS)],
        )

    def switch(number: int) -> None:
        # Each is switched off and on again, so that all are there for what follows.
        tab.all("[aria-label='Runs that are averaged'] .toggle")[number // 2].click()

    def switch_method(number: int) -> None:
        tab.all("[aria-label='Methods that are drawn'] .toggle")[number].click()

    layers = options.layers - 1
    timed("first opened: all", open_view)
    timed("another view", lambda _: tab.all(".view-button[data-view=correlation]")[0].click())
    timed("the view again", lambda _: tab.all(".view-button[data-view=runs]")[0].click())
    timed("a step of the slider", lambda number: tab.slide(number % options.of_each), options.pairs)
    timed("another layer", lambda number: tab.choose("Layer", str(number % layers + 1)), min(options.pairs, layers))
    timed(
        "a layer seen before", lambda number: tab.choose("Layer", str(number % layers + 1)), min(options.pairs, layers)
    )
    timed("other tokens", type_words, min(options.pairs, len(WORDS)))
    timed("a run off or on", switch, 2 * min(options.pairs // 2, options.runs))
    timed("drift from the first validation", lambda _: tab.choose("Compared with", "the first validation"))
    timed("drift by Jaccard", lambda _: tab.choose("Measured by", "1 − Jaccard of the top 25 %"))
    timed("one more method", switch_method, len(METHODS) - 1)
    timed("a step of the slider, all methods", lambda number: tab.slide(number % options.of_each), options.pairs)
    timed("single runs", lambda _: tab.all(".runs-view .check input")[0].click())
    timed("a step of the slider, single runs", lambda number: tab.slide(number % options.of_each), options.pairs)
    return found


class Opened(NamedTuple):
    """A view of one run: the page's nodes, the sentences on it, seconds to open it and of every step of the slider."""

    nodes: int
    sentences: int
    opening: float
    first: list[float]
    again: list[float]


NODES = "let n = 0; const all = document.createTreeWalker(document); while (all.nextNode()) n += 1; return n;"
STEPS = """
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
        times.push((performance.now() - start) / 1000);
      }
      done(times);
    })();
"""


def measure_views(tab: Tab, run: str, steps: int, pairs: int) -> dict[str, Opened]:
    """How a run with many sentences is opened and stepped through, in the views that list them.

    Args:
        tab: any.
        run: its name.
        steps: so many validations it has.
        pairs: so many steps are taken where everything has been read.
    """
    found = {}
    for view in ("tokens", "movement"):
        tab.open(run=run, view="correlation")
        start = time.perf_counter()
        tab.view(view)
        opening = time.perf_counter() - start
        nodes, sentences = tab.script(NODES), len(tab.all("main .sentence"))
        # Movement has nothing to compare at the first validation, where it starts.
        way = list(range(steps - 1, 0, -1))
        first = tab.driver.execute_async_script(STEPS, way)
        again = tab.driver.execute_async_script(STEPS, [way[number % len(way)] for number in range(pairs)])
        found[view] = Opened(nodes, sentences, opening, first, again)
    return found


def write_large(folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """Write the runs with many sentences or long ones.

    Args:
        folder: TensorBoard's.
        options: the command line.

    Returns:
        Run -> what it is.
    """
    names = {}
    for number, (title, sizes) in enumerate(LARGE.items()):
        given = {**sizes, "sentences": min(sizes.get("sentences", options.probe), options.probe)}
        names[f"large-{number}"] = title.format(sentences=given["sentences"])
        large_run(folder, f"large-{number}", validations=options.steps, **given)
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what was found.

    Args:
        arguments: the command line; that of the process if not given.
    """
    parser = arguments_parser(__doc__, pairs=20, seconds=600.0)
    parser.add_argument("--runs", type=positive, default=30, help="of one probe")
    parser.add_argument("--of-each", type=positive, default=50, help="validations of each run")
    parser.add_argument("--sentences", type=positive, default=16)
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--tokens", type=positive, default=24, help="of the longest sentences")
    parser.add_argument("--probe", type=positive, default=1000, help="sentences of the large run; it has all methods")
    parser.add_argument("--steps", type=positive, default=6, help="validations of the runs with many sentences, from 2")
    parser.add_argument("--large-only", action="store_true", help="leave the many runs out")
    options = parse(parser, arguments, QUICK)
    found = begin(options)
    large = measure_large(options)
    print_table("runs with many sentences or long ones", LARGE_HEAD, large_table(large))
    figures: dict[str, object] = {
        title: {view: one._asdict() for view, one in of.items()} for title, of in large.items()
    }
    if options.large_only:
        finish(options, found, figures)
        return
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch) / "logs"
        write_runs(logs, options)
        with tensorboard(logs, Path(scratch)) as address, chromium() as driver:
            wanted = options.runs * options.of_each
            wait_until(
                lambda: _validations(address, options.runs) == wanted, "TensorBoard to have read everything", 600
            )
            actions = measure(Tab(driver, address).open(run="seed-00"), options)
    title = f"{options.runs} runs of {options.of_each} validations, {options.sentences} sentences of "
    title += f"{options.tokens} tokens, {options.layers} layers, {len(METHODS)} methods"
    print_table(title, ["action", "median, ms", "largest, ms", "requests", "kB"], table(actions))
    figures |= {name: [one._asdict() for one in several] for name, several in actions.items()}
    finish(options, found, figures)


LARGE_HEAD = [
    "run",
    "view",
    "sentences",
    "nodes",
    "opened, ms",
    "a step, ms",
    "largest, ms",
    "seen before, ms",
    "largest, ms",
]


def measure_large(options: argparse.Namespace) -> dict[str, dict[str, Opened]]:
    """What a run is -> view -> how it is opened and stepped through."""
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch) / "logs"
        names = write_large(logs, options)
        with tensorboard(logs, Path(scratch)) as address, chromium() as driver:
            wanted = len(names) * options.steps
            wait_until(lambda: _validations(address, len(names)) == wanted, "TensorBoard to have read everything", 600)
            tab = Tab(driver, address)
            return {title: measure_views(tab, run, options.steps, options.pairs) for run, title in names.items()}


def large_table(large: dict[str, dict[str, Opened]]) -> list[list[object]]:
    """One row per run and view."""
    rows: list[list[object]] = []
    for title, views in large.items():
        for view, one in views.items():
            times = [f"{1000 * of(part):.0f}" for part in (one.first, one.again) for of in (np.median, max)]
            rows.append([title, view, one.sentences, f"{one.nodes:,}", f"{1000 * one.opening:.0f}", *times])
    return rows


def _validations(address: str, runs: int) -> int:
    return sum(callback["validations"] for run in until_runs(address, runs) for callback in run["callbacks"])


def table(actions: dict[str, list[Action]]) -> list[list[object]]:
    """One row per action."""
    rows: list[list[object]] = []
    for name, several in actions.items():
        times = [1000 * one.seconds for one in several]
        requests, size = max(one.requests for one in several), max(one.size for one in several)
        rows.append([name, f"{np.median(times):.0f}", f"{max(times):.0f}", requests, f"{size / 1000:.0f}"])
    return rows


if __name__ == "__main__":
    main()
