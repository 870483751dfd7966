"""What the GlobEnc tab costs: bytes per validation in the event file, and the time of an answer to the browser.

    python -m benchmarks.dashboard

A long synthetic run is written by the callback's own way, with a real ``SummaryWriter`` in a temporary folder, and read
through TensorBoard's own application in this process: the plugin, its data provider, JSON and compression, without the
network. At the defaults: 200 validations, 16 sentences of 24 tokens, 12 layers, eight methods. The figures drift from
one set of random ones to another, so they compress no better than real ones.

Then many runs of one probe, as the view Runs asks for them: 30 runs of 50 validations at the defaults.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.backend.event_processing import data_provider, event_accumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from torch import Tensor
from werkzeug.test import Client

from benchmarks.common import arguments_parser, begin, finish, parse, positive, print_table
from globenc_lightning import METHODS, ProbeSet
from globenc_lightning.functional import spearman
from globenc_lightning.measurement import Measurement, history_entry
from globenc_lightning.report import images, publish
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.plugin import GlobEncPlugin
from globenc_lightning.report.dashboard.records import kept_maps, records
from globenc_lightning.settings import Settings

QUICK = {"validations": 5, "pairs": 3, "runs": 2, "of_each": 3}
DRAWN = 4
CLASS_NAMES = ("negative", "neutral", "positive")
TEXT = (
    "the film was a quiet joy and nobody in our row wanted it to end because every scene had something small to love "
    "##ing ##ly plot actors music ending dialogue script slow bright warm long dull clever"
)


def synthetic_measurement(
    validation: int,
    validations: int = 200,
    *,
    sentences: int = 16,
    layers: int = 12,
    tokens: int = 24,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    words: int | None = None,
) -> Measurement:
    """Figures that drift from one set of random ones to another over a training.

    Args:
        validation: which one, from 0.
        validations: how many there are.
        sentences: in the probe.
        layers: of the encoder.
        tokens: of the longest sentences.
        methods: any of ``METHODS``.
        seed: another one is another training.
        words: another one is another probe; the same as ``seed`` when None.
    """
    progress = validation / max(1, validations - 1)
    names = [_words(index, tokens, seed if words is None else words) for index in range(sentences)]
    kept = kept_maps([len(one) for one in names], Settings(methods), DRAWN)
    rows: list[dict[str, Tensor]] = []
    last: dict[int, dict[str, Tensor]] = {}
    saliency: list[Tensor] = []
    for index, text in enumerate(names):
        draw = torch.Generator().manual_seed(1000 * seed + index)
        size = len(text)
        goal = _drift(draw, progress, size)
        mixed = {method: _drift(draw, progress, layers, size) * goal ** (i / 8) for i, method in enumerate(methods)}
        maps = {method: _drift(draw, progress, size, size) for method in methods}
        for method, full in maps.items():
            full[0] = mixed[method][-1]
        rows.append(mixed)
        last[index] = {method: maps[method] for method in kept.get(index, ())}
        saliency.append(goal)
    draw = torch.Generator().manual_seed(seed)
    right = torch.rand(sentences, generator=draw) < 0.4 + 0.6 * progress
    certain = torch.sigmoid(4 * progress + torch.randn(sentences, generator=draw))
    labels = torch.arange(sentences) % len(CLASS_NAMES)
    return Measurement(
        correlation={
            method: torch.stack(
                [spearman(row[method], goal, torch.ones(len(goal))) for row, goal in zip(rows, saliency, strict=True)]
            )
            for method in methods
        },
        rows=rows,
        last=last,
        saliency=saliency,
        predicted=torch.where(right, labels, (labels + 1) % len(CLASS_NAMES)),
        probability=certain,
        reconstruction_error=torch.zeros(layers, dtype=torch.float64),
        readout="cls",
        rule="post-LN",
        calls=1,
        encoder="model.bert",
        head_reads="readout",
        names=names,
    )


def _drift(draw: torch.Generator, progress: float, *shape: int) -> Tensor:
    start, end, noise = (torch.randn(shape, generator=draw) for _ in range(3))
    wave = 0.3 * noise * torch.sin(6.0 * progress + 6.3 * torch.rand(shape, generator=draw))
    return ((1 - progress) * start + progress * end + wave).exp()


def _words(index: int, tokens: int, seed: int) -> tuple[str, ...]:
    draw = torch.Generator().manual_seed(77 * seed + index)
    words = TEXT.split()
    chosen = torch.randint(len(words), (max(1, tokens - 2 - index % 3),), generator=draw).tolist()
    return ("[CLS]", *(words[one] for one in chosen), "[SEP]")


def synthetic_probe(names: Sequence[Sequence[str]]) -> ProbeSet:
    """The probe that belongs to a synthetic measurement's tokens."""
    rows = tuple(
        {"input_ids": torch.arange(len(one)), "labels": torch.tensor(index % len(CLASS_NAMES))}
        for index, one in enumerate(names)
    )
    special = tuple(torch.tensor([place in (0, len(one) - 1) for place in range(len(one))]) for one in names)
    return ProbeSet(rows, frozenset({"input_ids"}), tokens=tuple(map(tuple, names)), special=special)


def write(logger: TensorBoardLogger, measurement: Measurement, moment: store.Moment) -> dict[str, int]:
    """Write one validation's records as the callback does.

    Args:
        logger: where to.
        measurement: the validation's figures.
        moment: when it was.

    Returns:
        Bytes by kind of record.
    """
    probe, settings = synthetic_probe(measurement.names), Settings(tuple(measurement.correlation))
    summary, detail = records(measurement, probe, settings, moment, CLASS_NAMES)
    written = {"detail": store.to_bytes(detail), "summary": store.to_bytes(summary)}
    tagged = {store.tag("globenc", kind, moment.ordinal): data for kind, data in written.items()}
    publish.log_records([logger], tagged, moment.step)
    return {kind: len(data) for kind, data in written.items()}


def large_run(folder: Path, name: str = "large", *, validations: int = 200, **sizes: Any) -> dict[str, list[int]]:
    """Write a long run.

    Args:
        folder: TensorBoard's.
        name: the run's, below it.
        validations: how many.
        **sizes: those of :func:`synthetic_measurement`.

    Returns:
        Bytes by kind: of every record, and of the last validation's pictures.
    """
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    written: dict[str, list[int]] = {"summary": [], "detail": []}
    history = []
    for validation in range(validations):
        measurement = synthetic_measurement(validation, validations, **sizes)
        moment = store.Moment(validation, 25 * validation, validation // 10, 1.0)
        for kind, size in write(logger, measurement, moment).items():
            written[kind].append(size)
        history.append(history_entry(measurement, moment.step, moment.epoch))
    before = _size(logger)
    drawn = {index: maps for index, maps in measurement.last.items() if index < DRAWN}
    vars(measurement)["last"] = drawn
    settings = Settings(tuple(measurement.correlation))
    pictures = images.pictures(measurement, synthetic_probe(measurement.names), history, [], settings)
    publish.log_images([logger], pictures, moment.step)
    written["pictures"] = [_size(logger) - before]
    logger.experiment.close()
    return written


def _size(logger: TensorBoardLogger) -> int:
    logger.experiment.flush()
    return sum(file.stat().st_size for file in Path(logger.log_dir).glob("*tfevents*"))


def reader(folder: Path) -> EventMultiplexer:
    """TensorBoard's own reader of a folder, as its command sets it up; ``Reload`` reads what is new."""
    found = EventMultiplexer(size_guidance={event_accumulator.TENSORS: 10}, purge_orphaned_data=True)
    found.AddRunsFromDirectory(str(folder))
    found.Reload()
    return found


def application(multiplexer: EventMultiplexer) -> Client:
    """TensorBoard's own application with the plugin alone."""
    provider = data_provider.MultiplexerDataProvider(multiplexer, "")
    plugin = GlobEncPlugin(TBContext(data_provider=provider))
    return Client(TensorBoardWSGI([plugin], data_provider=provider))


def answered(client: Client, route: str, **arguments: Any) -> tuple[float, int]:
    """Seconds and bytes of one answer, compressed as for a browser."""
    named = {name.rstrip("_"): value for name, value in arguments.items()}
    start = time.perf_counter()
    response = client.get(f"/data/plugin/globenc/{route}", query_string=named, headers={"Accept-Encoding": "gzip"})
    taken = time.perf_counter() - start
    if response.status_code != 200:
        raise RuntimeError(f"{route}: {response.status}")
    return taken, len(response.data)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[tuple[float, int]]]:
    """Seconds and bytes of every answer, by question.

    Args:
        folder: TensorBoard's.
        options: the command line.
    """
    client = application(reader(folder))
    where: dict[str, Any] = {"run": "large", "tag": "globenc"}
    last = options.validations - 1
    steps = [(validation, validation % options.sentences) for validation in range(options.validations)]
    picked = {"method": "N-Enc", "layer": options.layers - 1}
    repeats = range(options.pairs)
    return {
        "index, the first time": [answered(client, "index", **where)],
        "index, nothing new": [answered(client, "index", **where) for _ in repeats],
        "tokens, another validation": [answered(client, "tokens", index=i, **picked, **where) for i, _ in steps],
        "detail, another validation": [answered(client, "detail", index=i, sentence=j, **where) for i, j in steps],
        "detail, another sentence": [
            answered(client, "detail", index=last, sentence=i % options.sentences, **where) for i in repeats
        ],
        "sentence": [answered(client, "sentence", sentence=i % options.sentences, **where) for i in repeats],
        "movement": [
            answered(client, "movement", from_=i % options.validations, to=last, **picked, **where) for i in repeats
        ],
    }


def measure_runs(folder: Path, options: argparse.Namespace) -> dict[str, list[tuple[float, int]]]:
    """Seconds and bytes of the answers that the view of many runs asks for, all runs together.

    Args:
        folder: TensorBoard's.
        options: the command line.
    """
    client = application(reader(folder))
    names = [f"seed-{seed:02d}" for seed in range(options.runs)]
    choices = {"methods": '["N-Enc"]', "against": "previous", "by": "spearman", "tokens": '["film", "not"]'}

    def all_runs(route: str, **arguments: Any) -> tuple[float, int]:
        each = [answered(client, route, run=name, tag="globenc", **arguments) for name in names]
        return sum(taken for taken, _ in each), sum(size for _, size in each)

    layers = [layer % options.layers for layer in range(options.pairs)]
    return {
        "tables, the first time": [all_runs("table")],
        "tables, nothing new": [all_runs("table") for _ in range(min(options.pairs, 5))],
        "drift and share, the first time": [all_runs("dynamics", layer=options.layers - 1, **choices)],
        "drift and share, another layer": [all_runs("dynamics", layer=layer, **choices) for layer in layers[:5]],
        "drift and share, other tokens": [
            all_runs("dynamics", layer=options.layers - 1, **{**choices, "tokens": f'["plot", "{number}"]'})
            for number in range(min(options.pairs, 5))
        ],
        "drift and share, all methods": [
            all_runs("dynamics", layer=options.layers - 1, **{**choices, "methods": json.dumps(METHODS)})
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what was found.

    Args:
        arguments: the command line; that of the process if not given.
    """
    parser = arguments_parser(__doc__, pairs=50, seconds=60.0)
    parser.add_argument("--validations", type=positive, default=200)
    parser.add_argument("--sentences", type=positive, default=16)
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--tokens", type=positive, default=24, help="of the longest sentences")
    parser.add_argument("--runs", type=positive, default=30, help="of one probe, beside the long one")
    parser.add_argument("--of-each", type=positive, default=50, help="validations of each of these runs")
    options = parse(parser, arguments, QUICK)
    found = begin(options)
    sizes = {"sentences": options.sentences, "layers": options.layers, "tokens": options.tokens}
    with tempfile.TemporaryDirectory() as folder:
        written = large_run(Path(folder), validations=options.validations, **sizes)
        answers = measure(Path(folder), options)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.runs):
            validations = options.of_each
            large_run(Path(folder), f"seed-{seed:02d}", validations=validations, seed=seed, words=0, **sizes)
        together = measure_runs(Path(folder), options)
    title = f"{options.validations} validations, {options.sentences} sentences of {options.tokens} tokens"
    title += f", {options.layers} layers, {len(METHODS)} methods"
    print_table(f"{title}: kB per validation", ["kind", "median", "most"], size_table(written))
    head = ["question", "median, ms", "95th percentile, ms", "kB sent"]
    print_table(f"{title}: answers", head, answer_table(answers))
    many = f"{options.runs} runs of {options.of_each} validations: answers, all runs together"
    print_table(many, head, answer_table(together))
    finish(options, found, {"bytes": written, "answers": answers, "runs": together})


def size_table(written: Mapping[str, Sequence[int]]) -> list[list[object]]:
    """One row per kind, and their sum at the last validation."""
    rows: list[list[object]] = [
        [kind, f"{np.median(sizes) / 1000:.1f}", f"{max(sizes) / 1000:.1f}"] for kind, sizes in written.items()
    ]
    together = sum(sizes[-1] for sizes in written.values())
    return [*rows, ["all, at the last validation", f"{together / 1000:.1f}", f"{together / 1000:.1f}"]]


def answer_table(answers: Mapping[str, Sequence[tuple[float, int]]]) -> list[list[object]]:
    """One row per question."""
    rows: list[list[object]] = []
    for question, several in answers.items():
        times, sizes = zip(*several, strict=True)
        middle, late = np.percentile(times, (50, 95)) * 1000
        rows.append([question, f"{middle:.1f}", f"{late:.1f}", f"{max(sizes) / 1000:.1f}"])
    return rows


if __name__ == "__main__":
    main()
