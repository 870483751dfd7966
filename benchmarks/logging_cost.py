"""What it costs to write one validation to TensorBoard, by kind of figure.

    python -m benchmarks.logging_cost

The callback's own way from a measurement to the files: a history entry, scalars, pictures, a real ``SummaryWriter`` in
a temporary folder. At the defaults: 16 examples probed, 4 of them drawn, eight methods; 30 tokens, 12 layers. Pictures
of a whole training (filmstrip, curves) are measured after 1, 10 and 100 validations. The very first writing, with
everything that it imports, stands apart.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.common import Spread, arguments_parser, begin, finish, parse, positive, print_table
from globenc_lightning import METHODS, ProbeSet
from globenc_lightning.analysis import Settings
from globenc_lightning.measurement import HistoryEntry, Measurement, history_entry
from globenc_lightning.report import images, publish
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.records import kept_maps, records

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
) -> Parts:
    """Write one validation the way the callback does.

    Args:
        logger: where to.
        measurement: the validation's figures.
        probe: the examples.
        history: what was found before.
        step: of the validation.
        drawn: how many examples get pictures.

    Returns:
        Seconds by part; ``total`` among them.
    """
    parts: Parts = defaultdict(float)
    start = last = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
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


def measure(validations: int, options: argparse.Namespace, logger: TensorBoardLogger, probe: ProbeSet) -> list[Parts]:
    """Write the last of so many validations, several times.

    Args:
        validations: how many there are, the one that is written included.
        options: the command line.
        logger: where to.
        probe: the examples.
    """
    history = [history_entry(random_measurement(options, seed), 10 * seed, 0) for seed in range(validations - 1)]
    found: list[Parts] = []
    begun = time.perf_counter()
    while len(found) < options.pairs and (len(found) < 2 or time.perf_counter() - begun < options.seconds):
        found.append(
            write(
                logger, random_measurement(options, 1000 + len(found)), probe, history, 10 * validations, options.drawn
            )
        )
    return found


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
    options = parse(parser, arguments, QUICK)
    found = begin(options)
    probe = random_probe(options)
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder, name="benchmark")
        first = write(logger, random_measurement(options, 0), probe, [], 0, options.drawn)
        results = {count: measure(count, options, logger, probe) for count in options.validations}
        logger.experiment.close()
    print_table(
        f"One validation: {options.examples} examples, {options.drawn} drawn, {options.tokens} tokens, "
        f"{options.layers} layers, {len(METHODS)} methods: milliseconds, median [quartiles]",
        ["part", *(f"after {count} validation{'s' * (count > 1)}" for count in options.validations)],
        table(results),
    )
    print(f"\nThe first writing in a process (imports, fonts, the files): {first['total'] * 1000:.0f} ms")
    finish(options, found, {"first": first, "validations": results})


if __name__ == "__main__":
    main()
