"""How long the GlobEnc tab's view of many runs takes in a browser: opening it, a step of the slider, other choices.

    python -m benchmarks.browser

Runs of one probe are written by the callback's own way, TensorBoard's own command serves them, and chromium shows the
tab without a window. A time is from a person's action until the page has come to rest; requests and kB are what the
action made the browser fetch. At the defaults: 30 runs of 50 validations, 16 sentences of 24 tokens, 12 layers, eight
methods. chromium, chromedriver and selenium have to be there.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.common import arguments_parser, begin, finish, parse, positive, print_table
from benchmarks.dashboard import synthetic_measurement, write
from globenc_lightning import METHODS
from globenc_lightning.report.dashboard import store
from tests.report.dashboard.browser import Tab, chromium, wait_until
from tests.report.dashboard.serving import tensorboard, until_runs

QUICK = {"runs": 2, "of_each": 3, "sentences": 3, "layers": 3, "tokens": 8, "pairs": 2}
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
    options = parse(parser, arguments, QUICK)
    found = begin(options)
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
    finish(options, found, {name: [one._asdict() for one in several] for name, several in actions.items()})


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
