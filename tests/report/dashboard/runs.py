"""Runs for the dashboard: small real trainings, and a long synthetic one, in TensorBoard's event files.

``python -m tests.report.dashboard.runs FOLDER`` writes them into a folder that TensorBoard can be started on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from globenc_lightning import METHODS, GlobEncCallback, ProbeSet
from globenc_lightning.analysis import Settings
from globenc_lightning.functional import spearman
from globenc_lightning.measurement import Measurement
from globenc_lightning.report import publish
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.records import kept_maps, records
from tests.training import Sentences, SpoilsOne, Steps, classifier, fit, loader, tokenizer

CLASS_NAMES = ("negative", "neutral", "positive")
WORDS = (
    "the film was a quiet joy and nobody in our row wanted it to end because every scene had something small to love "
    "##ing ##ly plot actors music ending dialogue script slow bright warm long dull clever"
).split()
LARGE = {"sentences": 16, "layers": 12, "tokens": 24}


def real_run(folder: Path, name: str = "bert", *, spoiled: int = 0, seed: int = 0, **options: Any) -> GlobEncCallback:
    """A training of a tiny BERT with its callback: a baseline and eight validations, odd words among the tokens.

    Args:
        folder: TensorBoard's.
        name: the run's, below it.
        spoiled: the validation, from 1, whose analysis fails; none when 0.
        seed: of the sentences that are trained on.
        **options: the callback's.
    """
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    callback = GlobEncCallback(**{"num_examples": 6, "tokenizer": tokenizer(), **options})
    names = {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {one: i for i, one in enumerate(CLASS_NAMES)}}
    others = [SpoilsOne(spoiled)] if spoiled else []
    fit(
        Steps(classifier(**names)),
        callback,
        *others,
        train=loader(Sentences(16, seed=seed + 1)),
        val=loader(Sentences()),
        max_epochs=4,
        val_check_interval=1,
        logger=logger,
        log_every_n_steps=1,
    )
    return callback


def synthetic_measurement(
    validation: int,
    validations: int = 200,
    *,
    sentences: int = LARGE["sentences"],
    layers: int = LARGE["layers"],
    tokens: int = LARGE["tokens"],
    methods: Sequence[str] = METHODS,
    seed: int = 0,
) -> Measurement:
    """Figures that drift from one set of random ones to another over a training, as smoothly as real ones do."""
    progress = validation / max(1, validations - 1)
    names = [_words(index, tokens, seed) for index in range(sentences)]
    settings = Settings(methods)
    kept = kept_maps([len(one) for one in names], settings, 4)
    rows: list[dict[str, Tensor]] = []
    saliency, last = [], {}
    for index, words in enumerate(names):
        draw = torch.Generator().manual_seed(1000 * seed + index)
        size = len(words)

        def drift(*shape: int, draw: torch.Generator = draw, moment: int = validation) -> Tensor:
            start, end, noise = (torch.randn(shape, generator=draw) for _ in range(3))
            phase = torch.rand(shape, generator=draw)
            wave = torch.sin(6.0 * progress + 6.3 * phase) * noise * 0.3
            return ((1 - progress) * start + progress * end + wave + 0.02 * torch.sin(moment * 40.0 * phase)).exp()

        goal = drift(size)
        mixed = {method: drift(layers, size) * goal ** (place / 8) for place, method in enumerate(methods)}
        rows.append({method: values / values.amax(1, keepdim=True) for method, values in mixed.items()})
        maps = {method: drift(size, size) for method in methods}
        for method, full in maps.items():
            full[0] = mixed[method][-1]
        last[index] = {method: maps[method] for method in kept.get(index, ())}
        saliency.append(goal)
    correlation = {
        method: torch.stack(
            [spearman(row[method], goal, torch.ones(len(goal))) for row, goal in zip(rows, saliency, strict=True)]
        )
        for method in methods
    }
    draw = torch.Generator().manual_seed(validation)
    certain = torch.sigmoid(4 * progress + torch.randn(sentences, generator=draw))
    right = torch.rand(sentences, generator=torch.Generator().manual_seed(seed)) < 0.4 + 0.6 * progress
    predicted = torch.where(right, torch.arange(sentences) % 3, (torch.arange(sentences) + 1) % 3)
    zero = torch.zeros(layers, dtype=torch.float64)
    facts = ("cls", "post-LN", 1, "model.bert", "readout")
    return Measurement(correlation, rows, last, saliency, predicted, certain, zero, *facts, names)


def synthetic_probe(names: Sequence[Sequence[str]]) -> ProbeSet:
    """The probe that belongs to a synthetic measurement's tokens."""
    rows = tuple(
        {"input_ids": torch.arange(len(one)), "labels": torch.tensor(index % 3)} for index, one in enumerate(names)
    )
    special = tuple(torch.tensor([place in (0, len(one) - 1) for place in range(len(one))]) for one in names)
    return ProbeSet(rows, frozenset({"input_ids"}), tokens=tuple(map(tuple, names)), special=special)


def large_run(folder: Path, name: str = "large", *, validations: int = 200, **sizes: Any) -> None:
    """A run of many validations, by the same way as the callback's own records.

    Args:
        folder: TensorBoard's.
        name: the run's, below it.
        validations: how many.
        **sizes: those of :func:`synthetic_measurement`.
    """
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    for validation in range(validations):
        measurement = synthetic_measurement(validation, validations, **sizes)
        write(logger, measurement, store.Moment(validation, 25 * validation, validation // 10, 1.0))
    logger.experiment.close()


def write(logger: TensorBoardLogger, measurement: Measurement, moment: store.Moment) -> None:
    """One validation's records, as the callback writes them."""
    probe = synthetic_probe(measurement.names)
    summary, detail = records(measurement, probe, Settings(tuple(measurement.correlation)), moment, CLASS_NAMES)
    written = {
        store.tag("globenc", kind, moment.ordinal): store.to_bytes(record)
        for kind, record in (("summary", summary), ("detail", detail))
    }
    publish.log_records([logger], written, moment.step)


def _words(index: int, tokens: int, seed: int) -> tuple[str, ...]:
    draw = torch.Generator().manual_seed(77 * seed + index)
    count = max(1, tokens - 2 - index % 3)
    chosen = torch.randint(len(WORDS), (count,), generator=draw).tolist()
    return ("[CLS]", *(WORDS[one] for one in chosen), "[SEP]")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--validations", type=int, default=200, help="of the long run; 0 leaves it out")
    options = parser.parse_args(arguments)
    real_run(options.folder, "bert")
    real_run(options.folder, "bert with one failure & <odd> name", spoiled=3, seed=5)
    if options.validations:
        large_run(options.folder, validations=options.validations)


if __name__ == "__main__":
    main()
