"""Small trainings that are interrupted by a signal or an error at a chosen place, and resumed.

``python -m tests.interrupted_training FOLDER NAME...`` interrupts those of ``CASES``, each in a process of its own that
is forked after the imports, in ``FOLDER/NAME``. ``train(folder, case, resume=True)`` goes on from what it left behind.
"""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

import globenc_lightning.measuring
from globenc_lightning import GlobEncCallback
from globenc_lightning.encoder.reading import _Reading
from globenc_lightning.monitoring import Monitor
from globenc_lightning.record.keeping import RecordKeeper
from globenc_lightning.report import publish
from globenc_lightning.report.output import Output
from tests.averaging import NO_AVERAGING, EMAWeightAveraging
from tests.test_checkpoints import same_batches
from tests.training import Sentences, Steps, build_trainer, classifier, loader

SETTINGS: dict[str, Any] = {"num_examples": 6, "methods": ["W", "N-Enc"], "heatmap_examples": 1}
SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "x",
    "SLURM_NODELIST": "localhost",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


class Module(Steps):
    """Trains without dropout, by plain gradient descent."""

    def __init__(self) -> None:
        super().__init__(classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ActsOnValidation(Module):
    """Does something of its own as a validation starts."""

    def on_validation_start(self) -> None:
        self.eval()


@dataclass(frozen=True)
class Case:
    """Where and how a training is interrupted.

    Attributes:
        at: the place: a hook of Lightning's, or a part of an analysis or of writing it, see :func:`interrupting`.
        count: 1 for the first time that the training gets there, 2 for the second, and so on.
        how: ``"usr1"`` (SLURM's signal to write a checkpoint, then the end), ``"int"`` (Ctrl-C), ``"error"`` or
            ``"kill"``.
        settings: of the callback, besides ``SETTINGS``.
        options: of the Trainer.
        module: what is trained.
        others: makes the callbacks before ours.
        version: the logger's; None for a run folder of its own each time, as Lightning makes them by default.
    """

    at: str
    count: int
    how: str = "usr1"
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    module: Callable[[], Module] = Module
    others: Callable[[], list[pl.Callback]] = list
    version: str | None = "run"


def ema() -> list[pl.Callback]:
    return [EMAWeightAveraging(decay=0.5)]


# Most are at the second of three validations of five batches; each analysis reads the three layers twice, and the first
# one is that before the first step.
CASES = {
    "usr1 after a training batch": Case("train_batch_end", 4),
    "usr1 as a validation starts": Case("validation_start", 2),
    "usr1 in a validation step": Case("validation_step", 7),
    "usr1 between validation batches": Case("validation_batch_end", 7),
    "usr1 inside the analysis": Case("layer", 14),
    "usr1 before the pictures": Case("pictures", 3),
    "usr1 between the records": Case("between records", 3),
    "usr1 before the text": Case("text", 3),
    "usr1 in the last hook": Case("validation_end", 2),
    "usr1 inside the first analysis": Case("layer", 2),
    "usr1 between the first records": Case("between records", 1),
    "ctrl-c inside the analysis": Case("layer", 14, "int"),
    "ctrl-c between the records": Case("between records", 3, "int"),
    "error between validation batches": Case("validation_batch_end", 7, "error"),
    "kill inside the analysis": Case("layer", 14, "kill"),
    "kill between the records": Case("between records", 3, "kill"),
    "every second validation": Case("layer", 14, settings={"every_n_validations": 2}),
    "not its turn": Case("validation_batch_end", 7, settings={"every_n_validations": 2}),
    "within an epoch": Case("layer", 8, options={"val_check_interval": 1}),
    "a training step": Case("layer", 8, settings={"at_steps": [1, 3]}),
    "a training step, Ctrl-C between the records": Case("between records", 2, "int", settings={"at_steps": [1, 3]}),
    "a training step before it is looked at": Case("train_batch_end", 1, settings={"at_steps": [1, 3]}),
    "a training step with averaged weights": Case("layer", 8, settings={"at_steps": [1, 3]}, others=ema),
    "no probe yet": Case("validation_step", 2, options={"num_sanity_val_steps": 0}),
    "no probe yet, left out": Case("validation_batch_end", 1, options={"num_sanity_val_steps": 0}),
    "acts on validation": Case("layer", 14, module=ActsOnValidation),
    "acts on validation, written": Case("text", 3, module=ActsOnValidation),
    "averaged weights": Case("layer", 14, others=ema),
    "the clock is behind": Case("layer", 14),
    "the record": Case("record", 3, settings={"record": True}),
    "after the record": Case("recorded", 3, "int", settings={"record": True}),
    "all is written, the record too": Case("written", 2, "int", settings={"record": True}),
    "all is written for the last time, the record too": Case("written", 3, "int", settings={"record": True}),
    "another run folder": Case("pictures", 3, "int", version=None),
}
if NO_AVERAGING:
    CASES = {name: case for name, case in CASES.items() if case.others is not ema}


class Hooks(pl.Callback):
    """Reaches the places that are hooks; it stands before our callback."""

    def __init__(self, reach: Callable[[str], None]) -> None:
        self.reach = reach

    def on_train_batch_end(self, *_: Any) -> None:
        self.reach("train_batch_end")

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.reach("validation_start")

    # Nobody else's, as far as those can tell who look where it comes from.
    on_validation_start.__module__ = "globenc_lightning.tests"

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.reach("validation_batch_start")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.reach("validation_batch_end")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.reach("validation_end")


def interrupting(case: Case) -> Callable[[str], None]:
    """Make the places of an analysis tell when they are reached, and return what the other places call."""
    counts: dict[str, int] = {}

    def reach(place: str) -> None:
        counts[place] = counts.get(place, 0) + 1
        if (place, counts[place]) != (case.at, case.count):
            return
        if case.how == "usr1":
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
            # SLURM ends what it will start again.
            os.kill(os.getpid(), signal.SIGKILL)
        elif case.how == "int":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        elif case.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("something else went wrong")

    def before(owner: Any, name: str, place: str, after: str = "") -> None:
        real = getattr(owner, name)

        def told(*arguments: Any, **options: Any) -> Any:
            reach(place)
            result = real(*arguments, **options)
            if after:
                reach(after)
            return result

        setattr(owner, name, told)

    before(globenc_lightning.measuring, "measure", "analysis", "analysed")
    before(_Reading, "_finish", "layer")
    before(publish, "log_images", "pictures")
    before(Output, "describe", "text")
    before(RecordKeeper, "write", "record", "recorded")
    before(Monitor, "end_validation", "written")
    log_records = publish.log_records

    def between(loggers: Any, records: dict[str, bytes], *arguments: Any) -> None:
        reach("records")
        (first, *rest) = records.items()
        log_records(loggers, dict([first]), *arguments)
        reach("between records")
        log_records(loggers, dict(rest), *arguments)

    publish.log_records = between
    validation_step = Module.validation_step

    def step(self: Module, *arguments: Any) -> None:
        # The analysis runs the step again, and no batch starts for that.
        if counts.get("validation_step", 0) < counts.get("validation_batch_start", 0):
            reach("validation_step")
        validation_step(self, *arguments)

    Module.validation_step = step  # type: ignore[method-assign]
    return reach


def train(
    folder: Path, case: Case, resume: bool = False, reach: Callable[[str], None] = lambda place: None
) -> tuple[pl.Trainer, GlobEncCallback]:
    """Three epochs of two batches; resumed from the newest checkpoint that an interruption left behind."""
    if not resume:
        os.environ.update(SLURM)
    callback = GlobEncCallback(**{**SETTINGS, **case.settings})
    keeps = ModelCheckpoint(folder / "kept", save_last=True, save_on_train_epoch_end=False)
    callbacks = [*case.others(), Hooks(reach), callback, keeps, OnExceptionCheckpoint(folder / "kept")]
    trainer = build_trainer(
        callbacks,
        max_epochs=3,
        limit_train_batches=2,
        enable_checkpointing=True,
        log_every_n_steps=1,
        logger=TensorBoardLogger(str(folder), name=None, version=case.version),
        default_root_dir=folder,
        plugins=[] if resume else [SLURMEnvironment(auto_requeue=True)],
        **case.options,
    )
    pl.seed_everything(3, verbose=False)
    left = sorted([*folder.glob("*.ckpt"), *folder.glob("kept/*.ckpt")], key=lambda path: path.stat().st_mtime_ns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        module = case.module()
        path = left[-1] if resume else None
        trainer.fit(module, same_batches(), loader(Sentences(), 4), ckpt_path=path)
    return trainer, callback


def main(folder: Path, names: list[str]) -> None:
    """Interrupt trainings, each in a process of its own."""
    torch.set_num_threads(1)
    for name in names:
        (folder / name).mkdir()
        child = os.fork()
        if not child:
            # What runs in the background of a shell ignores it otherwise.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            case = CASES[name]
            train(folder / name, case, reach=interrupting(case))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not status:
            raise RuntimeError(f"the training {name!r} was not interrupted")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
