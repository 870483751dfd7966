"""Every way into a Trainer, each test about the flag or method in its name; see also ``test_callback.py``."""

import gc
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from benchmarks.dashboard import application, reader
from globenc_lightning import METHODS, GlobEncCallback
from globenc_lightning.analysis import Reader
from globenc_lightning.measurement import measure
from globenc_lightning.probe import ProbeSet
from globenc_lightning.settings import Settings
from tests.report.dashboard.serving import ask
from tests.test_callback import MONITORED, assert_figures, given_batch
from tests.training import (
    Album,
    Memory,
    Sentences,
    Snapshots,
    Steps,
    build_trainer,
    by_hand,
    events,
    fit,
    loader,
    said,
)

QUIET: dict[str, Any] = {"heatmap_examples": 0}


class Tests(Steps):
    """Has a test step, too."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss_of(batch), batch_size=8)


def steps_of(callback: GlobEncCallback) -> list[int]:
    return [entry.step for entry in callback.history]


def test_fast_dev_run_of_several_batches() -> None:
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        trainer = fit(Steps(), callback, fast_dev_run=3, val=loader(Sentences(24), 8))
    assert messages == []
    assert trainer.global_step == 2
    assert steps_of(callback) == [1]


@pytest.mark.parametrize("amount", [1, 2, 0.5])
def test_overfit_batches(amount: float) -> None:
    callback, snapshots = GlobEncCallback(**QUIET), Snapshots()
    with said() as messages:
        fit(Steps(), callback, snapshots, overfit_batches=amount, max_epochs=2, val=loader(Sentences(32)))
    assert messages == []
    assert callback.probe is not None
    shown = {1: 8, 2: 16, 0.5: 16}[amount]
    assert len(callback.probe) == shown
    for entry, weights in zip(callback.history[-2:], snapshots.weights, strict=True):
        assert_figures(entry, by_hand(Steps(), weights, Sentences().first(shown)))


def test_barebones() -> None:
    callback = GlobEncCallback(**QUIET)
    trainer = pl.Trainer(barebones=True, max_epochs=2, accelerator="cpu", callbacks=[callback])
    with said() as messages:
        trainer.fit(Steps(), loader(Sentences(16, seed=1)), loader(Sentences()))
    assert messages == []
    assert steps_of(callback) == [1, 3]
    assert trainer.callback_metrics == {}


class LogsForALogger(Steps):
    def on_validation_epoch_end(self) -> None:
        self.log("own", 1.0, logger=True)


def test_logger_false_is_no_reason_for_a_remark_on_every_figure() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_trainer([GlobEncCallback(**QUIET)]).fit(LogsForALogger(), loader(Sentences(16)), loader(Sentences()))
    assert [one for one in caught if "self.log('own'" in str(one.message)]
    assert [one for one in caught if "globenc/" in str(one.message)] == []


def test_max_steps_inside_an_epoch() -> None:
    callback, logger = GlobEncCallback(**QUIET), Memory()
    trainer = fit(
        Steps(),
        callback,
        train=loader(Sentences(32, seed=1)),
        max_epochs=-1,
        max_steps=7,
        val_check_interval=0.5,
        logger=logger,
    )
    assert trainer.global_step == 7
    assert steps_of(callback) == [0, *logger.steps("val_loss")] == [0, 1, 3, 5]


def test_check_val_every_n_epoch_none() -> None:
    callback, logger = GlobEncCallback(**QUIET), Memory()
    options: dict[str, Any] = {"check_val_every_n_epoch": None, "val_check_interval": 3}
    fit(Steps(), callback, train=loader(Sentences(32, seed=1)), max_epochs=3, logger=logger, **options)
    assert steps_of(callback) == [0, *logger.steps("val_loss")] == [0, 2, 5, 8, 11]
    assert [entry.epoch for entry in callback.history] == [0, 0, 1, 2, 2]


def test_check_val_every_second_epoch() -> None:
    callback, logger = GlobEncCallback(**QUIET), Memory()
    fit(Steps(), callback, max_epochs=5, logger=logger, check_val_every_n_epoch=2)
    assert steps_of(callback) == [0, *logger.steps("val_loss")] == [0, 3, 7]


def test_validate_of_another_trainer_logs_no_smaller_step() -> None:
    module, callback, logger = Steps(), GlobEncCallback(heatmap_examples=1), Album()
    fit(module, callback, logger=logger, max_epochs=2)
    other = build_trainer([callback], logger=logger)
    other.validate(module, loader(Sentences()), verbose=False)
    found = {tag: float(value) for tag, value in other.callback_metrics.items()}
    assert steps_of(callback) == logger.steps(MONITORED) == [0, 1, 3, 3]
    assert found[MONITORED] == pytest.approx(float(callback.history[-1].correlation["N-Enc"][-1]), abs=1e-6)
    assert [step for tag, step, _ in logger.images if "over_training" in tag] == [0, 1, 3, 3]


def test_validate_alone_and_again_and_again() -> None:
    module, callback, logger = Steps(), GlobEncCallback(**QUIET), Memory()
    trainer = build_trainer([callback], logger=logger)
    for _ in range(3):
        trainer.validate(module, loader(Sentences()), verbose=False)
    assert steps_of(callback) == [0, 0, 0]
    assert torch.equal(callback.history[0].by_example["N-Enc"], callback.history[2].by_example["N-Enc"])


def test_validate_from_a_checkpoint_keeps_its_probe_and_its_history(tmp_path: Path) -> None:
    callback = GlobEncCallback(**QUIET, num_examples=6)
    trainer = fit(Steps(), callback, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, logger = GlobEncCallback(**QUIET, num_examples=6), Memory()
    other = build_trainer([again], logger=logger)
    val = loader(Sentences(seed=7))
    other.validate(Steps(), val, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert steps_of(again) == [0, 1, 3, 3]
    assert again.probe is not None
    assert again.probe.rows[0]["input_ids"].tolist() == Sentences().ids(0)
    assert torch.equal(again.history[-1].by_example["N-Enc"], again.history[-2].by_example["N-Enc"])


@pytest.mark.parametrize("look", ["validate", "test"])
def test_an_older_checkpoint_takes_nothing_away_from_the_history(look: str, tmp_path: Path) -> None:
    module, callback = Tests(), GlobEncCallback(**QUIET)
    trainer = build_trainer(
        [callback, ModelCheckpoint(tmp_path, save_top_k=-1)],
        logger=TensorBoardLogger(str(tmp_path), name=None, version="run"),
        max_epochs=3,
        enable_checkpointing=True,
    )
    trainer.fit(module, loader(Sentences(16, seed=1)), loader(Sentences()))
    assert steps_of(callback) == [0, 1, 3, 5]
    oldest = next(tmp_path.glob("*step=2.ckpt"))
    getattr(trainer, look)(module, loader(Sentences()), ckpt_path=oldest, verbose=False)
    seen = [0, 1, 3, 5] + [6] * (look == "validate")
    assert steps_of(callback) == seen
    shown = ask(application(reader(tmp_path)), "index", run="run", tag="globenc").content
    assert [one["step"] for one in shown["validations"]] == seen
    assert shown["messages"] == []


def test_test_alone_and_after_a_training_leaves_everything_alone() -> None:
    module, callback, logger = Tests(), GlobEncCallback(**QUIET), Memory()
    trainer = build_trainer([callback], logger=logger)
    with said() as messages:
        trainer.test(module, loader(Sentences()), verbose=False)
        trainer.fit(module, loader(Sentences(16, seed=1)), loader(Sentences()))
        trainer.test(module, loader(Sentences()), verbose=False)
    assert len(messages) == 1
    assert "can show no images" in messages[0]
    assert steps_of(callback) == logger.steps(MONITORED) == [0, 1]


def test_several_loggers_of_all_kinds_at_once(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(str(tmp_path / "board")), CSVLogger(str(tmp_path)), Memory(), Album()]
    callback = GlobEncCallback(heatmap_examples=1)
    with said() as messages:
        fit(Steps(), callback, logger=loggers)
    (message,) = messages
    assert "CSVLogger, Memory can show no images" in message
    board = events(loggers[0].log_dir)
    assert [point.step for point in board.Scalars(MONITORED)] == [0, 1]
    assert loggers[2].steps(MONITORED) == loggers[3].steps(MONITORED) == [0, 1]
    assert loggers[3].tags() == set(board.Tags()["images"])


def test_inference_mode_off() -> None:
    callback = GlobEncCallback(**QUIET)
    build_trainer([callback], inference_mode=False).validate(Steps(), loader(Sentences()), verbose=False)
    assert steps_of(callback) == [0]


def test_reload_dataloaders_every_n_epochs() -> None:
    callback = GlobEncCallback(**QUIET)
    trainer = build_trainer([callback], reload_dataloaders_every_n_epochs=1, max_epochs=3)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(Sentences(16, seed=1))

        def val_dataloader(self) -> Any:
            return loader(Sentences(seed=int(trainer.current_epoch)))

    trainer.fit(Steps(), datamodule=Data())
    assert steps_of(callback) == [0, 1, 3, 5]
    assert callback.probe is not None
    assert [row["input_ids"].tolist() for row in callback.probe.rows] == [Sentences().ids(i) for i in range(16)]


@pytest.mark.parametrize(
    "options", [{"detect_anomaly": True}, {"deterministic": True}, {"profiler": "simple"}], ids=str
)
def test_flags_that_watch_the_training(options: dict[str, Any], tmp_path: Path) -> None:
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        fit(Steps(), callback, default_root_dir=tmp_path, **options)
    torch.use_deterministic_algorithms(False)
    assert messages == []
    assert steps_of(callback) == [0, 1]


# --- LightningCLI and the other package ------------------------------------------------------------------------------

CONFIGURATION = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: globenc_lightning.GlobEncCallback
      init_args:
        probe: null
        num_examples: 6
        methods: [W, N-Enc]
        target: label
        readout: mean
        normalize: true
        exclude_special_tokens: false
        every_n_validations: 1
        heatmap_examples: 0
        tokenizer: null
        forward: tests.test_trainer_flags.plain_forward
        on_error: raise
"""

PROGRAM = """
import sys
from {package}.cli import LightningCLI
from {package} import LightningModule, LightningDataModule
import torch
from tests.training import Sentences, classifier, loader

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = classifier()
    def training_step(self, batch, index):
        return self.model(**batch).loss
    def validation_step(self, batch, index):
        self.log("val_loss", self.model(**batch).loss)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(Sentences(16, seed=1))
    def val_dataloader(self):
        return loader(Sentences())

cli = LightningCLI(Module, Data, args=["fit", "--config", sys.argv[1]], save_config_callback=None)
(callback,) = [one for one in cli.trainer.callbacks if type(one).__name__ == "GlobEncCallback"]
assert [entry.step for entry in callback.history] == [0, 1], callback.history
assert list(callback.history[0].correlation) == ["W", "N-Enc"]
assert len(callback.probe) == 6
assert callback._choices.forward is not None and callback._choices.settings.target == "label"
assert "globenc/spearman/N-Enc" in cli.trainer.callback_metrics
print("done")
"""


def plain_forward(module: Any, batch: Any) -> Tensor:
    logits: Tensor = module.model(batch["input_ids"], batch["attention_mask"]).logits
    return logits


@pytest.mark.skipif(importlib.util.find_spec("jsonargparse") is None, reason="LightningCLI needs jsonargparse")
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_cli_from_a_file_with_all_parameters(package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package.split(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    (tmp_path / "config.yaml").write_text(CONFIGURATION)
    (tmp_path / "program.py").write_text(PROGRAM.format(package=package))
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "config.yaml")],
        cwd=root,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert "done" in done.stdout, done.stderr[-3000:]


# --- leaks -----------------------------------------------------------------------------------------------------------


def alive() -> int:
    gc.collect()
    return sum(1 for one in gc.get_objects() if issubclass(type(one), Tensor))


def test_fifty_analyses_in_a_row_leave_neither_tensors_nor_memory_behind() -> None:
    probe = ProbeSet.from_batch(given_batch())
    reader, settings = Reader(Steps()), Settings(METHODS)
    counts, memory = [], []
    for number in range(50):
        measure(reader, probe, settings, dict.fromkeys(range(2), METHODS))
        if number in (3, 20, 49):
            counts.append(alive())
            memory.append(psutil.Process().memory_info().rss)
    assert len(set(counts)) == 1
    # The allocator keeps a few pages; what one analysis computes comes to more over all of them.
    assert memory[-1] - memory[0] < 4 * 2**20


class Forgets(pl.Callback):
    """Lets go of the history at every validation, and counts what else is left."""

    def __init__(self, ours: GlobEncCallback) -> None:
        self.ours = ours
        self.counts: list[int] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            del self.ours.history[1:]
            if trainer.global_step % 10 == 5:
                self.counts.append(alive())


def test_fifty_validations_leave_nothing_but_their_history() -> None:
    callback = GlobEncCallback(given_batch(), heatmap_examples=1)
    forgets = Forgets(callback)
    data = {"train": loader(Sentences(50, seed=1), 1), "val": loader(Sentences(8))}
    fit(Steps(), callback, forgets, **data, val_check_interval=1, logger=Memory())
    assert len(forgets.counts) == 5
    # Python lets go of one or the other at its own time; what is kept would come back fifty times.
    assert max(forgets.counts) - min(forgets.counts) <= 2
