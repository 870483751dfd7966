"""Runs for the dashboard: small real trainings, and a long synthetic one, in TensorBoard's event files.

``python -m tests.report.dashboard.runs FOLDER`` writes them into a folder that TensorBoard can be started on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.dashboard import CLASS_NAMES, large_run
from globenc_lightning import GlobEncCallback
from tests.training import Sentences, SpoilsOne, Steps, classifier, fit, loader, tokenizer

ODD_NAME = "bert with one failure & <odd> name"


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


REASON = "<script>window.stolen = 1</script> & an `odd` word\n    forward=lambda module, batch: module(batch['ids'])"


def refused_run(folder: Path, name: str) -> GlobEncCallback:
    """A training whose analysis fails at every validation, for an odd reason."""

    def fails(module: Any, batch: Any) -> Any:
        raise ArithmeticError(REASON)

    return real_run(folder, name, forward=fails)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--validations", type=int, default=200, help="of the long run; 0 leaves it out")
    options = parser.parse_args(arguments)
    real_run(options.folder, "bert")
    real_run(options.folder, ODD_NAME, spoiled=3, seed=5)
    if options.validations:
        large_run(options.folder, validations=options.validations)


if __name__ == "__main__":
    main()
