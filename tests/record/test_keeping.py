"""The record that a callback keeps: resumed, copied, shared by several runs, and pointed to by checkpoints."""

import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pyarrow import parquet
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from globenc_lightning import GlobEncCallback
from globenc_lightning.errors import GlobEncWarning
from globenc_lightning.record import keeping, schema
from globenc_lightning.record.writing import UNFINISHED, RecordOptions, RunRecord
from tests.record.test_writing import assert_same_entries
from tests.test_checkpoints import assert_same_history
from tests.training import Memory, Sentences, Steps, build_trainer, classifier, fit, loader, said

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"heatmap_examples": 0, "methods": ["W", "N-Enc"], "num_examples": 6}
EPOCHS = 4


def train(callback: GlobEncCallback, *others: pl.Callback, ckpt_path: Path | None = None, **options: Any) -> Any:
    pl.seed_everything(5, verbose=False)
    saves = any(isinstance(one, ModelCheckpoint) for one in others)
    trainer = build_trainer([callback, *others], **{"max_epochs": EPOCHS, "enable_checkpointing": saves, **options})
    # Without dropout: a resumed training draws anew.
    module = Steps(classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, loader(Sentences(16, seed=1)), loader(Sentences()), ckpt_path=ckpt_path)
    return module


def keeps(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


def contents(folder: Path, run: str = "run") -> dict[str, Any]:
    """Every table of a run, by its file's place in the record."""
    files = sorted(folder.glob(f"*/run={run}/*.parquet"))
    return {str(file.relative_to(folder)): parquet.read_table(file, partitioning=None) for file in files}


def assert_same_record(left: Path, right: Path, run: str = "run", other: str | None = None) -> None:
    other = run if other is None else other
    one = {name.replace(f"run={run}", "run"): table for name, table in contents(left, run).items()}
    two = {name.replace(f"run={other}", "run"): table for name, table in contents(right, other).items()}
    assert list(one) == list(two)
    assert one
    for name, table in one.items():
        assert table.schema == two[name].schema
        for column in table.column_names:
            # NaN is equal to NaN here.
            assert repr(table[column].to_pylist()) == repr(two[name][column].to_pylist()), (name, column)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GlobEncCallback]:
    """A training that nothing has interrupted: its record, with checkpoints beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    callback = GlobEncCallback(**SETTINGS, record=folder / "record")
    # After the validations, and between a training step and the validation that is due then.
    train(callback, keeps(folder / "checkpoints"), keeps(folder / "due", every_n_train_steps=2))
    return folder, callback


def test_a_record_holds_every_analysis_of_the_history(undisturbed: tuple[Path, GlobEncCallback]) -> None:
    folder, callback = undisturbed
    record = RunRecord(folder / "record", "run")
    assert record.steps() == [0, 1, 3, 5, 7]
    assert_same_entries(record.entries(), [*callback.history])


def test_true_puts_it_into_the_logger_s_run_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="logs")
    train(GlobEncCallback(**SETTINGS, record=True), logger=logger, max_epochs=1)
    assert RunRecord(tmp_path / "logs" / "version_0" / "globenc", "logs-version_0").steps() == [0, 1]


def test_without_a_logger_it_is_in_the_trainer_s_root(tmp_path: Path) -> None:
    train(GlobEncCallback(**SETTINGS, record=True), default_root_dir=tmp_path, max_epochs=1)
    assert RunRecord(tmp_path / "globenc", "run").steps() == [0, 1]


def test_runs_share_a_folder_under_names_of_their_own(tmp_path: Path) -> None:
    for _ in range(2):
        logger = CSVLogger(str(tmp_path / "logs"))
        train(GlobEncCallback(**SETTINGS, record=tmp_path / "all"), logger=logger, max_epochs=1)
    named = GlobEncCallback(**SETTINGS, record=RecordOptions(tmp_path / "all", run="mine"))
    train(named, logger=False, max_epochs=1)
    assert sorted(file.stem for file in (tmp_path / "all" / "about").iterdir()) == [
        "lightning_logs-version_0",
        "lightning_logs-version_1",
        "mine",
    ]


def test_another_training_of_the_same_name_replaces_nothing(tmp_path: Path) -> None:
    callback = GlobEncCallback(**SETTINGS, record=tmp_path)
    for _ in range(2):
        train(callback, max_epochs=1)
    train(GlobEncCallback(**SETTINGS, record=tmp_path), max_epochs=2)
    assert [RunRecord(tmp_path, run).steps() for run in ("run", "run-2", "run-3")] == [[0, 1], [0, 1], [0, 1, 3]]


def test_trainings_that_begin_at_the_same_moment_get_names_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        names = [*pool.map(lambda _: keeping._claimed(tmp_path, "run"), range(64))]
    assert sorted(names, key=lambda name: (len(name), name)) == ["run", *(f"run-{number}" for number in range(2, 65))]


def test_two_callbacks_of_one_trainer_keep_two_runs(tmp_path: Path) -> None:
    one, two = (GlobEncCallback(**SETTINGS, record=tmp_path, readout=readout) for readout in ("cls", "mean"))
    train(one, two, max_epochs=1)
    assert_same_entries(RunRecord(tmp_path, "run").entries(), [*one.history])
    assert_same_entries(RunRecord(tmp_path, "run-globenc_2").entries(), [*two.history])


def test_a_training_that_is_cut_short_to_try_it_writes_nothing(tmp_path: Path) -> None:
    train(GlobEncCallback(**SETTINGS, record=tmp_path / "record"), fast_dev_run=2)
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize("finder", ["learning rate", "batch size"])
def test_the_trials_of_a_finder_leave_nothing_behind(finder: str, tmp_path: Path) -> None:
    class Sized(Steps):
        batch_size, learning_rate = 2, 1e-3

        def train_dataloader(self) -> Any:
            return loader(Sentences(48, seed=1), self.batch_size)

        def val_dataloader(self) -> Any:
            return loader(Sentences())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    other = (
        LearningRateFinder(num_training_steps=6, update_attr=True)
        if finder == "learning rate"
        else BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=2)
    )
    callback = GlobEncCallback(**SETTINGS, record=tmp_path / "record")
    trainer = build_trainer([other, callback], max_epochs=2, default_root_dir=tmp_path, val_check_interval=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Sized())
    record = RunRecord(tmp_path / "record", "run")
    assert record.steps() == sorted({entry.step for entry in callback.history.latest})
    assert_same_entries(record.entries(), [*callback.history.latest])


def test_validate_alone_is_recorded(tmp_path: Path) -> None:
    callback = GlobEncCallback(**SETTINGS, record=tmp_path)
    build_trainer([callback]).validate(Steps(), loader(Sentences()), verbose=False)
    assert_same_entries(RunRecord(tmp_path, "run").entries(), [*callback.history])


# Checkpoints


def state_of(path: Path) -> dict[str, Any]:
    states = torch.load(path, weights_only=True)["callbacks"]
    (found,) = (state for key, state in states.items() if key.startswith("GlobEncCallback"))
    return dict(found)


def test_checkpoints_point_to_the_record_and_do_not_grow(undisturbed: tuple[Path, GlobEncCallback]) -> None:
    folder, _ = undisturbed
    states = {step: state_of(folder / "checkpoints" / f"step={step}.ckpt") for step in (2, 4, 6, 8)}
    assert [state["history"] for state in states.values()] == [[]] * 4
    assert [state["record"]["until"] for state in states.values()] == [1, 3, 5, 7]
    sizes = []
    for state in states.values():
        file = folder / "state.pt"
        torch.save(state, file)
        sizes.append(file.stat().st_size)
    assert max(sizes) - min(sizes) <= 64
    grown = []
    for step in (1, 2):
        other = GlobEncCallback(**SETTINGS)
        train(other, max_epochs=2 * step)
        torch.save(other.state_dict(), folder / "state.pt")
        grown.append((folder / "state.pt").stat().st_size)
    assert grown[1] - grown[0] > 1000


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"layers": [1]}, {"methods": ["W"]}])
def test_a_record_that_is_less_than_a_history_stands_for_none(options: dict[str, Any], tmp_path: Path) -> None:
    callback = GlobEncCallback(**SETTINGS, record=RecordOptions(tmp_path / "record", **options))
    train(callback, keeps(tmp_path), max_epochs=2)
    kept = [entry["step"] for entry in state_of(tmp_path / "step=4.ckpt")["history"]]
    assert kept == ([] if "dtype" in options else [0, 1, 3])


@pytest.mark.parametrize(
    ("kind", "step"), [("checkpoints", 2), ("checkpoints", 4), ("checkpoints", 6), ("due", 4), ("due", 8)]
)
def test_a_resumed_training_s_record_is_that_of_an_undisturbed_one(
    kind: str, step: int, undisturbed: tuple[Path, GlobEncCallback], tmp_path: Path
) -> None:
    folder, whole = undisturbed
    shutil.copytree(folder / "record", tmp_path / "record")
    checkpoint = torch.load(folder / kind / f"step={step}.ckpt", weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "record" in state:
            state["record"]["folder"] = str(tmp_path / "record")
    torch.save(checkpoint, tmp_path / "here.ckpt")
    resumed = GlobEncCallback(**SETTINGS, record=tmp_path / "record")
    with said() as messages:
        train(resumed, ckpt_path=tmp_path / "here.ckpt")
    assert messages == []
    assert_same_record(tmp_path / "record", folder / "record")
    assert_same_history(resumed, whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from globenc_lightning import GlobEncCallback
from tests.record.made import made
from tests.record.test_keeping import SETTINGS, keeps, train
from globenc_lightning.record.writing import RunRecord

folder = Path(sys.argv[1])
# What the first writing in a process takes besides is not spent in every child.
RunRecord(folder / "first", "run").write(*made())
replace = Path.replace
for last in sys.argv[2:]:
    child = os.fork()
    if not child:
        placed = []

        def counted(path, target):
            placed.append(target)
            if len(placed) == int(last):
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)

        Path.replace = counted
        train(GlobEncCallback(**SETTINGS, record=folder / last / "record"), keeps(folder / last))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, last
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed in the middle of its work")
def test_a_killed_training_s_record_is_that_of_an_undisturbed_one_after_a_resume(
    undisturbed: tuple[Path, GlobEncCallback], tmp_path: Path
) -> None:
    folder, whole = undisturbed
    # The first analysis puts 4 files in place and each later one 2: of step 5, the tokens are the 9th file.
    killed = {"9": [0, 1, 3], "10": [0, 1, 3], "11": [0, 1, 3, 5]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), *killed]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=180)
    for name, steps in killed.items():
        record = RunRecord(tmp_path / name / "record", "run")
        assert record.steps() == steps
        left = [*(tmp_path / name / "record").rglob(f"*{UNFINISHED}")]
        assert left, "it was killed beside its writing"
        newest = max((tmp_path / name).glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
        resumed = GlobEncCallback(**SETTINGS, record=tmp_path / name / "record")
        train(resumed, ckpt_path=newest)
        assert_same_record(tmp_path / name / "record", folder / "record")
        assert_same_history(resumed, whole)
        assert not [*(tmp_path / name / "record").rglob(f"*{UNFINISHED}")]


def test_steps_of_a_training_that_never_was_are_removed(
    undisturbed: tuple[Path, GlobEncCallback], tmp_path: Path
) -> None:
    folder, _ = undisturbed
    shutil.copytree(folder / "record", tmp_path / "record")
    checkpoint = torch.load(folder / "checkpoints" / "step=4.ckpt", weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "record" in state:
            state["record"]["folder"] = str(tmp_path / "record")
    torch.save(checkpoint, tmp_path / "here.ckpt")
    train(GlobEncCallback(**SETTINGS, record=tmp_path / "record"), ckpt_path=tmp_path / "here.ckpt", max_epochs=3)
    assert RunRecord(tmp_path / "record", "run").steps() == [0, 1, 3, 5]


def test_another_version_of_the_logger_gets_a_copy(tmp_path: Path) -> None:
    def logger() -> TensorBoardLogger:
        return TensorBoardLogger(str(tmp_path), name="logs")

    whole = GlobEncCallback(**SETTINGS, record=True)
    train(whole, keeps(tmp_path / "checkpoints"), logger=logger())
    resumed = GlobEncCallback(**SETTINGS, record=True)
    train(resumed, logger=logger(), ckpt_path=tmp_path / "checkpoints" / "step=4.ckpt")
    folders = [tmp_path / "logs" / f"version_{number}" / "globenc" for number in (0, 1)]
    assert_same_record(folders[0], folders[1], "logs-version_0", "logs-version_1")
    assert_same_history(resumed, whole)


def test_a_record_that_is_gone_is_told_and_the_training_goes_on(
    undisturbed: tuple[Path, GlobEncCallback], tmp_path: Path
) -> None:
    folder, _ = undisturbed
    checkpoint = torch.load(folder / "checkpoints" / "step=4.ckpt", weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "record" in state:
            state["record"]["folder"] = str(tmp_path / "gone")
    torch.save(checkpoint, tmp_path / "here.ckpt")
    resumed = GlobEncCallback(**SETTINGS, record=tmp_path / "new")
    with pytest.warns(GlobEncWarning, match=r"points to the record of run run in .*gone, which is not there"):
        train(resumed, ckpt_path=tmp_path / "here.ckpt")
    assert [entry.step for entry in resumed.history] == [5, 7]
    assert RunRecord(tmp_path / "new", "run").steps() == [5, 7]


def test_a_folder_that_was_moved_is_found_again(undisturbed: tuple[Path, GlobEncCallback], tmp_path: Path) -> None:
    folder, whole = undisturbed
    shutil.copytree(folder / "record", tmp_path / "moved")
    checkpoint = torch.load(folder / "checkpoints" / "step=4.ckpt", weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "record" in state:
            state["record"]["folder"] = str(tmp_path / "gone")
    torch.save(checkpoint, tmp_path / "here.ckpt")
    resumed = GlobEncCallback(**SETTINGS, record=tmp_path / "moved")
    train(resumed, ckpt_path=tmp_path / "here.ckpt")
    assert_same_history(resumed, whole)
    assert_same_record(tmp_path / "moved", folder / "record")


def test_resumed_without_a_record_the_history_is_read_back(undisturbed: tuple[Path, GlobEncCallback]) -> None:
    folder, whole = undisturbed
    resumed = GlobEncCallback(**SETTINGS)
    train(resumed, ckpt_path=folder / "checkpoints" / "step=4.ckpt")
    assert_same_history(resumed, whole)
    assert RunRecord(folder / "record", "run").steps() == [0, 1, 3, 5, 7]


def test_a_record_begun_on_resume_holds_what_comes(tmp_path: Path) -> None:
    train(GlobEncCallback(**SETTINGS), keeps(tmp_path), max_epochs=2)
    resumed = GlobEncCallback(**SETTINGS, record=tmp_path / "record")
    train(resumed, ckpt_path=tmp_path / "step=4.ckpt")
    assert [entry.step for entry in resumed.history] == [0, 1, 3, 5, 7]
    assert RunRecord(tmp_path / "record", "run").steps() == [5, 7]
    assert [entry["step"] for entry in resumed.state_dict()["history"]] == [0, 1, 3]


def test_every_logger_s_run_has_a_name(tmp_path: Path) -> None:
    logger = Memory()
    with pytest.warns(GlobEncWarning, match="no images"):
        fit(Steps(), GlobEncCallback(**SETTINGS, record=tmp_path), logger=logger)
    assert [file.stem for file in (tmp_path / "about").iterdir()] == ["memory-version_0"]


@pytest.mark.parametrize("record", [3, 1.5, [], ""])
def test_what_cannot_be_used_says_what_to_write(record: Any) -> None:
    with pytest.raises(ValueError, match=r"record must be None, True .*, a folder, or RecordOptions"):
        GlobEncCallback(record=record)


def test_hyperparameters_and_the_seed_are_told(tmp_path: Path) -> None:
    import json

    class Saved(Steps):
        def __init__(self, width: int = 3, names: tuple[str, ...] = ("a",), model: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()

    pl.seed_everything(17, verbose=False)
    fit(Saved(names=("x", "y"), model=torch.nn.Linear(2, 2)), GlobEncCallback(**SETTINGS, record=tmp_path))
    told = json.loads(schema.about_file(tmp_path, "run").read_text())
    assert told["seed"] == 17
    assert told["hyperparameters"] == {"width": 3, "names": ["x", "y"], "model": "Linear"}
