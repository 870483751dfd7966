"""What a record on disk costs: time, disk and memory of writing and reading it, and what it saves in checkpoints.

    python -m benchmarks.record

A large probe first: 4,000 examples of 36 tokens, 12 layers, N-Enc and N-Res, 5 validations, written and read in a
process of its own; the figures are drawn at random, so that no compression is flattered. Then a small probe for long:
16 examples, all methods, and what a checkpoint holds after every so many validations, with a record and without.
"""

import argparse
import contextlib
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Spread, arguments_parser, begin, finish, parse, positive, print_table, run_fresh
from globenc_lightning import METHODS, ProbeSet
from globenc_lightning.measurement import About, History, Measurement, about, history_entry
from globenc_lightning.record.keeping import RecordKeeper
from globenc_lightning.record.reading import Record
from globenc_lightning.record.writing import RecordOptions, RunRecord
from globenc_lightning.settings import Settings

QUICK = {"pairs": 1, "examples": 20, "validations": 2, "layers": 2, "long": 4}
MEGABYTE = 2**20
CLASSES = 3


def random_measurement(examples: int, tokens: int, layers: int, methods: Sequence[str], seed: int) -> Measurement:
    """Figures of the right shapes, as an analysis of the probe would give them."""
    draw = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    logits = rand(examples, CLASSES) * 4 - 2
    predicted = logits.argmax(1)
    return Measurement(
        correlation={method: rand(examples, layers).double() * 2 - 1 for method in methods},
        rows=[{method: rand(layers, tokens) for method in methods} for _ in range(examples)],
        last={},
        saliency=[rand(tokens) for _ in range(examples)],
        predicted=predicted,
        probability=logits.softmax(1).amax(1),
        reconstruction_error=torch.zeros(layers, dtype=torch.float64),
        readout="cls",
        rule="post-LN",
        calls=1,
        encoder="model.bert",
        head_reads="readout",
        names=[tuple(f"word{(7 * one + place) % 5000}" for place in range(tokens)) for one in range(examples)],
        score=logits.amax(1),
        position=[0] * examples,
        answers=[(int(one),) for one in predicted],
        truths=[(one % CLASSES,) for one in range(examples)],
        ids=[(torch.arange(tokens) + 7 * one) % 5000 for one in range(examples)],
        values=torch.full((examples,), float("nan")),
        chances=[()] * examples,
        logits=[*logits],
        losses=-logits.log_softmax(1)[:, 0],
    )


def probe_of(measurement: Measurement) -> ProbeSet:
    """The probe that a measurement is of."""
    ids = torch.stack([one for one in measurement.ids if one is not None])
    probe = ProbeSet.from_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    vars(probe)["tokens"] = tuple(measurement.names)
    return probe


def about_of(measurement: Measurement, probe: ProbeSet, methods: Sequence[str]) -> About:
    """What a measurement is of."""
    return about(measurement, probe, Settings(tuple(methods)), "drawn at random")


def written_and_read(options: argparse.Namespace, dtype: str, folder: Path) -> dict[str, Any]:
    """Write a large probe's validations and read them back, in this process.

    Args:
        options: the command line's.
        dtype: how attributions are stored.
        folder: where to.

    Returns:
        Seconds of each writing and reading, bytes on the disk, and the growth of the most memory that was in use.
    """
    methods = ("N-Enc", "N-Res")
    run, writes, entry, probe = RunRecord(folder, "run", RecordOptions(dtype=dtype)), [], None, None
    grown = 0
    for number in range(options.validations):
        measurement = random_measurement(options.examples, options.tokens, options.layers, methods, number)
        probe = probe or probe_of(measurement)
        told = about_of(measurement, probe, methods)
        entry = history_entry(measurement, number, 0)
        before, start = _peak(), time.perf_counter()
        run.write(measurement, probe, entry, told)
        writes.append(time.perf_counter() - start)
        grown = max(grown, _peak() - before)
    del measurement, entry
    reads: dict[str, list[float]] = {}
    before = _peak()
    for _ in range(options.pairs):
        for name, read in (
            ("all", lambda record: record.tokens("run")),
            ("one column", lambda record: record.tokens("run", [f"N-Enc/{options.layers:02d}"])),
            ("decisions", lambda record: record.examples("run")),
        ):
            start = time.perf_counter()
            read(Record.open(folder))
            reads.setdefault(name, []).append(time.perf_counter() - start)
        start = time.perf_counter()
        run.entries()
        reads.setdefault("history", []).append(time.perf_counter() - start)
    files = [one for one in folder.rglob("*") if one.is_file()]
    steps = [one for one in files if one.name.startswith("step-")]
    return {
        "first write": writes[0],
        "writes": writes[1:],
        "reads": reads,
        "validation bytes": sum(one.stat().st_size for one in steps) / options.validations,
        "probe bytes": sum(one.stat().st_size for one in files if one not in steps),
        "write memory": grown,
        "read memory": _peak() - before,
    }


def _peak() -> int:
    """The most bytes of memory that this process has had in use."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def checkpoint_sizes(validations: int, layers: int, tokens: int, examples: int = 16) -> dict[int, tuple[int, int]]:
    """How many bytes of a checkpoint the history takes.

    Args:
        validations: of the training.
        layers: of the encoder.
        tokens: of each example.
        examples: of the probe.

    Returns:
        After so many validations: without a record, and with one.
    """
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        history, keeper = History(), RecordKeeper(RecordOptions(folder=folder))
        keeper.place(folder, "run", {})
        for number in range(validations):
            measurement = random_measurement(examples, tokens, layers, METHODS, number)
            probe = probe_of(measurement)
            entry = history_entry(measurement, number, 0)
            history.append(entry)
            history.about = about_of(measurement, probe, METHODS)
            keeper.write(measurement, probe, entry, history.about, True)
            if number + 1 in _moments(validations):
                pointer, kept = keeper.pointer(history.latest)
                pointed = {**history.with_latest(kept).state_dict(), "record": pointer}
                sizes[number + 1] = (_saved(history.state_dict()), _saved(pointed))
    return sizes


def _moments(validations: int) -> list[int]:
    return sorted({max(1, validations * part // 4) for part in (0, 1, 2, 4)})


def _saved(state: Any) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of this benchmark."""
    sizes = ["--examples", "--tokens", "--layers", "--validations", "--pairs"]
    given = [part for name in sizes for part in (name, str(getattr(options, name.removeprefix("--"))))]
    large = {
        dtype: run_fresh("benchmarks.record", ["--threads", str(options.threads), *given, "--alone", dtype])
        for dtype in ("float32", "float16")
    }
    return {"large": large, "checkpoints": checkpoint_sizes(options.long, options.layers, options.tokens)}


def print_figures(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print both tables."""
    what = f"{options.examples:,} examples x {options.tokens} tokens x {options.layers} layers x N-Enc and N-Res"
    rows: list[list[str]] = []
    for label, value in (
        ("write one validation, s", lambda one: Spread.of(one["writes"]).text(2) if one["writes"] else "-"),
        ("write the first, with probe and imports, s", lambda one: f"{one['first write']:.2f}"),
        ("read all attributions, s", lambda one: Spread.of(one["reads"]["all"]).text(2)),
        ("read one method and layer, s", lambda one: Spread.of(one["reads"]["one column"]).text(3)),
        ("read decisions and correlations, s", lambda one: Spread.of(one["reads"]["decisions"]).text(3)),
        ("read back the history of a checkpoint, s", lambda one: Spread.of(one["reads"]["history"]).text(2)),
        ("disk, MB per validation", lambda one: f"{one['validation bytes'] / MEGABYTE:.1f}"),
        ("disk, MB for the probe, once", lambda one: f"{one['probe bytes'] / MEGABYTE:.2f}"),
        ("memory of writing, MB more at most", lambda one: f"{one['write memory'] / MEGABYTE:.0f}"),
        ("memory of reading it all, MB more at most", lambda one: f"{one['read memory'] / MEGABYTE:.0f}"),
    ):
        rows.append([label, *(value(one) for one in results["large"].values())])
    print_table(f"{what}, {options.validations} validations", ["", *results["large"]], rows)
    print_table(
        f"A checkpoint's history: 16 examples x {options.tokens} tokens, {options.layers} layers, all methods",
        ["after validations", "without a record, KB", "with a record, KB"],
        [[str(n), *(f"{size / 1024:.0f}" for size in both)] for n, both in results["checkpoints"].items()],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = arguments_parser(__doc__, pairs=5, seconds=60)
    parser.add_argument("--examples", type=positive, default=4000, help="of the large probe")
    parser.add_argument("--tokens", type=positive, default=36, help="of each example")
    parser.add_argument("--layers", type=positive, default=12, help="of the encoder")
    parser.add_argument("--validations", type=positive, default=5, help="with the large probe")
    parser.add_argument("--long", type=positive, default=200, help="validations with the small probe")
    parser.add_argument("--alone", choices=("float32", "float16"), help=argparse.SUPPRESS)
    options = parse(parser, arguments, QUICK)
    if options.alone:
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            found = written_and_read(options, options.alone, Path(folder))
        print(json.dumps(found))
        return
    machine = begin(options)
    results = run(options)
    print_figures(options, results)
    finish(options, machine, results)


if __name__ == "__main__":
    main()
