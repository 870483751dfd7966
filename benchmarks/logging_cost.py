"""What it costs to write one validation to TensorBoard, by kind of figure.

    python -m benchmarks.logging_cost
    python -m benchmarks.logging_cost --against ../older --validations 10

The callback's own way from a measurement to the files: a history entry, scalars, pictures, a real ``SummaryWriter`` in
a temporary folder. At the defaults: 16 examples probed, 4 of them drawn, eight methods; 30 tokens, 12 layers. Pictures
of a whole training (filmstrip, curves) are measured after 1, 10 and 100 validations. The very first writing, with
everything that it imports, stands apart. Bytes are those that the event file grows by.

With ``--against``, the package of another checkout writes the same figures in a process of its own, in alternation with
this one's. Its processor time, all threads together, says what a machine that is busy with other work cannot.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch
from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.common import ROOT, Pairs, Spread, arguments_parser, begin, finish, parse, positive, print_table
from globenc_lightning import METHODS, ProbeSet
from globenc_lightning.measurement import HistoryEntry, Measurement, history_entry
from globenc_lightning.report import images, publish
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.records import kept_maps, records
from globenc_lightning.settings import Settings

QUICK = {"pairs": 2, "validations": [1, 3]}

KINDS = {
    "heatmap/layers": "layers_by_tokens",
    "heatmap/last_layer": "tokens_by_tokens",
    "filmstrip": "filmstrip",
    "correlation/by_layer": "correlation_by_layer",
    "correlation/over_training": "correlation_over_training",
}
"""Tag of each kind of picture -> the function that draws it."""

Parts = dict[str, float]
"""Part of the writing -> seconds."""

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import globenc_lightning
sys.path[0] = sys.argv[2]
from benchmarks import logging_cost
logging_cost.serve(sys.stdin, sys.stdout)
"""
"""Runs this module with the package of the checkout in its first argument; this one's root is the second."""


def random_measurement(options: argparse.Namespace, seed: int) -> Measurement:
    """Figures of the right shapes, as an analysis of the probe set would give them."""
    generator = torch.Generator().manual_seed(seed)
    examples, layers, tokens = options.examples, options.layers, options.tokens

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    return Measurement(
        correlation={method: rand(examples, layers).double() * 2 - 1 for method in METHODS},
        rows=[{method: rand(layers, tokens) for method in METHODS} for _ in range(examples)],
        last={
            index: {method: rand(tokens, tokens) for method in methods}
            for index, methods in kept_maps([tokens] * examples, Settings(METHODS), options.drawn).items()
        },
        saliency=[rand(tokens) for _ in range(examples)],
        predicted=torch.zeros(examples, dtype=torch.long),
        probability=rand(examples),
        reconstruction_error=rand(layers).double() * 1e-6,
        readout="cls",
        rule="post-LN",
        calls=1,
        encoder="model.bert",
        head_reads="readout",
        names=[tuple(f"word{place}" for place in range(tokens))] * examples,
    )


def random_probe(options: argparse.Namespace) -> ProbeSet:
    """A probe set whose tokens look like words."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 9999, (options.examples, options.tokens), generator=generator)
    probe = ProbeSet.from_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    words = tuple(tuple(f"word{int(token)}"[: 3 + int(token) % 7] for token in row) for row in ids)
    vars(probe)["tokens"] = words
    return probe


def scalars_of(measurement: Measurement) -> dict[str, float]:
    """What is logged as numbers: rho of every method in the last layer, and in every layer."""
    summary = measurement.summary()
    by_layer = {
        f"globenc/spearman_by_layer/{method}/layer_{layer + 1:02d}": float(rho)
        for method, one in summary.items()
        for layer, rho in enumerate(one.mean)
    }
    return {f"globenc/spearman/{method}": float(one.mean[-1]) for method, one in summary.items()} | by_layer


@contextmanager
def drawing_timed(parts: Parts) -> Iterator[None]:
    """Add the seconds of every drawing function to ``parts``, under its kind."""
    with ExitStack() as stack:
        for kind, name in KINDS.items():
            stack.enter_context(mock.patch.object(images, name, _timed(getattr(images, name), parts, kind)))
        yield


def _timed(draw: Callable[..., Any], parts: Parts, kind: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        drawn = draw(*args, **kwargs)
        parts[f"{kind}: draw"] += time.perf_counter() - start
        return drawn

    return timed


def write(
    logger: TensorBoardLogger,
    measurement: Measurement,
    probe: ProbeSet,
    history: Sequence[HistoryEntry],
    step: int,
    drawn: int,
    sizes: dict[str, int] | None = None,
) -> Parts:
    """Write one validation the way the callback does.

    Args:
        logger: where to.
        measurement: the validation's figures.
        probe: the examples.
        history: what was found before.
        step: of the validation.
        drawn: how many examples get pictures.
        sizes: takes the bytes of every part; the seconds are then those of writing them at once, and no figures.

    Returns:
        Seconds by part; ``total`` among them.
    """
    parts: Parts = defaultdict(float)
    written = _size(logger) if sizes is not None else 0
    start = last = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last, written
        if sizes is not None:
            before, written = written, _size(logger)
            sizes[part.removesuffix(": write")] = written - before
        now = time.perf_counter()
        parts[part] += now - last
        last = now

    entries = [*history, history_entry(measurement, step, 0)]
    lap("history entry")
    publish.log_scalars([logger], scalars_of(measurement), step)
    lap("scalars")
    with drawing_timed(parts):
        few = {index: maps for index, maps in measurement.last.items() if index < drawn}
        pictures = images.pictures(replace(measurement, last=few), probe, entries, [], Settings(METHODS))
    drawing = sum(parts[f"{kind}: draw"] for kind in KINDS)
    lap("pictures, besides drawing")
    parts["pictures, besides drawing"] -= drawing
    for kind in KINDS:
        some = {tag: picture for tag, picture in pictures.items() if tag.startswith(f"globenc/{kind}")}
        publish.log_images([logger], some, step)
        lap(f"{kind}: write")
    moment = store.Moment(len(history), step, 0, 0.0)
    summary, detail = records(measurement, probe, Settings(METHODS), moment)
    packed = {"detail": store.to_bytes(detail), "summary": store.to_bytes(summary)}
    lap("dashboard: pack")
    publish.log_records([logger], {store.tag("globenc", kind, step): data for kind, data in packed.items()}, step)
    lap("dashboard: write")
    logger.experiment.flush()
    lap("flush")
    parts["total"] = last - start
    return dict(parts)


def _size(logger: TensorBoardLogger) -> int:
    """How long the event file is, with all that was handed to its writer."""
    logger.experiment.flush()
    return sum(file.stat().st_size for file in Path(logger.log_dir).glob("*tfevents*"))


def bytes_of(
    validations: int, options: argparse.Namespace, logger: TensorBoardLogger, probe: ProbeSet
) -> dict[str, int]:
    """The bytes that the last of so many validations takes, by kind; ``pictures`` and ``total`` among them."""
    sizes: dict[str, int] = {}
    history = _history(validations, options)
    write(logger, random_measurement(options, 1000), probe, history, 10 * validations, options.drawn, sizes)
    kept = {part: size for part, size in sizes.items() if size}
    return {**kept, "pictures": sum(sizes[kind] for kind in KINDS), "total": sum(kept.values())}


def _history(validations: int, options: argparse.Namespace) -> list[HistoryEntry]:
    return [history_entry(random_measurement(options, seed), 10 * seed, 0) for seed in range(validations - 1)]


def measure(validations: int, options: argparse.Namespace, logger: TensorBoardLogger, probe: ProbeSet) -> list[Parts]:
    """Write the last of so many validations, several times.

    Args:
        validations: how many there are, the one that is written included.
        options: the command line.
        logger: where to.
        probe: the examples.
    """
    history = _history(validations, options)
    found: list[Parts] = []
    begun = time.perf_counter()
    while len(found) < options.pairs and (len(found) < 2 or time.perf_counter() - begun < options.seconds):
        found.append(
            write(
                logger, random_measurement(options, 1000 + len(found)), probe, history, 10 * validations, options.drawn
            )
        )
    return found


def serve(questions: IO[str], answers: IO[str]) -> None:
    """Write a validation for every line that is asked for, and answer with its seconds and bytes, as JSON.

    Args:
        questions: the sizes in the first line; in each further one how many validations there are, and a seed.
        answers: ``parts``, ``cpu`` (the process's seconds, all threads together), and ``bytes`` where the seed is 0.
    """
    options = argparse.Namespace(**json.loads(questions.readline()))
    torch.set_num_threads(options.threads)
    probe = random_probe(options)
    histories: dict[int, list[HistoryEntry]] = {}
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder, name="benchmark")
        for line in questions:
            validations, seed = json.loads(line)
            history = histories.setdefault(validations, _history(validations, options))
            found = random_measurement(options, 1000 + seed)
            begun = time.process_time()
            parts = write(logger, found, probe, history, 10 * validations, options.drawn)
            answer = {"parts": parts, "cpu": time.process_time() - begun}
            if not seed:
                answer["bytes"] = bytes_of(validations, options, logger, probe)
            print(json.dumps(answer), file=answers, flush=True)
        logger.experiment.close()


def compare(other: Path, options: argparse.Namespace) -> dict[int, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Write the same validations with the package of another checkout and with this one's, in alternation.

    Args:
        other: the root of the other checkout.
        options: the command line.

    Returns:
        Number of validations -> the answers of both, pair by pair. The first imports everything and has the bytes.
    """
    sizes = {name: getattr(options, name) for name in ("examples", "drawn", "tokens", "layers", "threads")}

    def start(root: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, str(root.resolve()), str(ROOT)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        tell(worker, sizes)
        return worker

    def tell(worker: subprocess.Popen[str], message: object) -> None:
        assert worker.stdin is not None
        print(json.dumps(message), file=worker.stdin, flush=True)

    def answer(worker: subprocess.Popen[str], message: object) -> dict[str, Any]:
        assert worker.stdout is not None
        tell(worker, message)
        found: dict[str, Any] = json.loads(worker.stdout.readline())
        return found

    found: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    with start(other) as theirs, start(ROOT) as ours:
        for count in options.validations:
            begun = time.perf_counter()
            pairs = found.setdefault(count, [])
            while len(pairs) <= options.pairs and (len(pairs) < 4 or time.perf_counter() - begun < options.seconds):
                pairs.append((answer(theirs, (count, len(pairs))), answer(ours, (count, len(pairs)))))
    return found


def comparison(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[list[object]]:
    """One row per part: milliseconds before and after, and their ratio; the first pair is left out."""

    def row(name: str, seconds: Callable[[dict[str, Any]], float]) -> list[object]:
        both = Pairs(*(tuple(seconds(one) for one in ones) for ones in zip(*pairs[1:], strict=True)))
        before, after = Spread.of(both.first).text(1, 1000), Spread.of(both.second).text(1, 1000)
        return [name, before, after, Spread.of(both.ratios).text(2)]

    rows = [row(kind, partial(_drawn_and_written, [kind])) for kind in KINDS]
    rows.append(row("all pictures", partial(_drawn_and_written, [*KINDS])))
    rows.append(row("the whole validation", lambda one: one["parts"]["total"]))
    return [*rows, row("its processor time", lambda one: one["cpu"])]


def _drawn_and_written(kinds: Sequence[str], one: dict[str, Any]) -> float:
    return float(sum(one["parts"][f"{kind}: {part}"] for kind in kinds for part in ("draw", "write")))


def size_table(sizes: Mapping[str, Sequence[int]]) -> list[list[object]]:
    """One row per kind, in kB."""
    return [[kind, *(f"{size / 1000:.1f}" for size in several)] for kind, several in sizes.items()]


def table(found: Mapping[int, Sequence[Parts]]) -> list[list[object]]:
    """One row per part, one column per number of validations, in milliseconds."""
    parts = list(next(iter(found.values()))[0])
    order = [part for kind in KINDS for part in (f"{kind}: draw", f"{kind}: write")]
    first = ["history entry", "scalars", *order]
    names = [*first, *(part for part in parts if part not in first and part != "total"), "total"]
    return [
        [name, *(Spread.of([one[name] for one in several]).text(1, 1000) for several in found.values())]
        for name in names
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what was found.

    Args:
        arguments: the command line; that of the process if not given.
    """
    parser = arguments_parser(__doc__, pairs=11, seconds=60.0)
    parser.add_argument("--examples", type=positive, default=16, help="examples probed")
    parser.add_argument("--drawn", type=positive, default=4, help="of them, those that get pictures")
    parser.add_argument("--tokens", type=positive, default=30)
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--validations", nargs="+", type=positive, default=[1, 10, 100])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, measured in alternation")
    options = parse(parser, arguments, QUICK)
    found = begin(options)
    sizes = f"{options.examples} examples, {options.drawn} drawn, {options.tokens} tokens"
    sizes += f", {options.layers} layers, {len(METHODS)} methods"
    counts = [f"after {count} validation{'s' * (count > 1)}" for count in options.validations]
    if options.against is not None:
        compared = compare(options.against, options)
        for count, title in zip(options.validations, counts, strict=True):
            pairs = compared[count]
            head = ["drawn and written", "before", "after", "after / before"]
            print_table(f"{sizes}, {title}: milliseconds, median [quartiles]", head, comparison(pairs))
            both = [one["bytes"] for one in pairs[0]]
            print_table(f"{sizes}, {title}: kB", ["kind", "before", "after"], size_table(_by_kind(both)))
        finish(options, found, {"against": compared})
        return
    probe = random_probe(options)
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder, name="benchmark")
        first = write(logger, random_measurement(options, 0), probe, [], 0, options.drawn)
        results = {count: measure(count, options, logger, probe) for count in options.validations}
        written = [bytes_of(count, options, logger, probe) for count in options.validations]
        logger.experiment.close()
    title = f"One validation: {sizes}: milliseconds, median [quartiles]"
    print_table(title, ["part", *counts], table(results))
    print_table("One validation: kB", ["kind", *counts], size_table(_by_kind(written)))
    print(f"\nThe first writing in a process (imports, fonts, the files): {first['total'] * 1000:.0f} ms")
    by_count = dict(zip(options.validations, written, strict=True))
    finish(options, found, {"first": first, "validations": results, "bytes": by_count})


def _by_kind(written: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    return {kind: [one[kind] for one in written] for kind in written[0]}


if __name__ == "__main__":
    main()
