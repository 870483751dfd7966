import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl

from globenc_lightning import GlobEncCallback
from globenc_lightning.record.writing import RunRecord
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.trainings import put_together, read_summary
from tests.averaging import averages
from tests.interrupted_training import CASES, Case, train
from tests.neutrality import equal
from tests.test_callback import MONITORED
from tests.test_checkpoints import assert_same_history
from tests.training import events, said

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is interrupted in the middle of its work")


@pytest.fixture(autouse=True)
def _no_cluster_afterwards() -> Iterator[None]:
    """Takes back what a training within this process says of a cluster."""
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per case, with what its training left behind when it was interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.interrupted_training", str(folder), *CASES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[pl.Trainer, GlobEncCallback]]:
    """Trains to the end what a case interrupts; each kind of training once."""
    known: dict[str, tuple[pl.Trainer, GlobEncCallback]] = {}

    def trained(case: Case) -> tuple[pl.Trainer, GlobEncCallback]:
        kind = repr((case.settings, case.options, case.module, case.others))
        if kind not in known:
            known[kind] = train(tmp_path_factory.mktemp("undisturbed"), case)
        return known[kind]

    return trained


def resumed(folder: Path, case: Case) -> tuple[pl.Trainer, GlobEncCallback, list[str]]:
    with said() as messages:
        trainer, callback = train(folder, case, resume=True)
    return trainer, callback, messages


def in_the_tab(folder: Path) -> list[tuple[int, str | None]]:
    """The step of each validation that the tab shows, and why it has no figures; those with figures have colours."""
    log = events(folder / "run")
    read = {tag: [event.tensor_proto.string_val[0] for event in log.Tensors(tag)] for tag in log.Tags()["tensors"]}
    found = {}
    for tag in sorted(tag for tag in read if "/dashboard/summary/" in tag):
        record = store.summary_from_bytes(read[tag][-1])
        ordinal = store.parsed_tag(tag)[2]  # type: ignore[index]
        found[ordinal] = read_summary(ordinal, log.Tensors(tag)[-1].wall_time, np.array(read[tag][-1], dtype=object))
        if isinstance(record, store.Summary):
            detail = store.detail_from_bytes(read[tag.replace("summary", "detail")][-1])
            assert detail.moment == record.moment
    shown = put_together(dict.fromkeys(found), found)
    return [(one.record.moment.step, one.reason) for one in shown.validations if one.record is not None]


def assert_whole(folder: Path, callback: GlobEncCallback, whole: GlobEncCallback) -> None:
    """History, tab, pictures and scalars are those of the undisturbed training."""
    assert_same_history(callback, whole)
    assert callback.history.missing_steps == []
    steps = [entry.step for entry in whole.history]
    assert in_the_tab(folder) == [(step, None) for step in steps]
    log = events(folder / "run")
    for tag in (MONITORED, "globenc/spearman_by_layer/W/layer_01"):
        assert sorted({point.step for point in log.Scalars(tag)}) == sorted(set(steps))
    (filmstrip,) = (tag for tag in log.Tags()["images"] if "filmstrip" in tag)
    assert sorted({image.step for image in log.Images(filmstrip)}) == sorted(set(steps))


LOST = ("acts on", "averaged weights", "no probe yet, left out", "the clock", "another run folder")


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(LOST)])
def test_what_was_interrupted_is_made_up_for(
    name: str, interrupted: Path, undisturbed: Callable[[Case], tuple[pl.Trainer, GlobEncCallback]]
) -> None:
    case, folder = CASES[name], interrupted / name
    whole_trainer, whole = undisturbed(case)
    trainer, callback, messages = resumed(folder, case)
    assert messages == []
    assert_whole(folder, callback, whole)
    assert callback._schedule.validations == whole._schedule.validations
    assert equal(trainer.lightning_module.state_dict(), whole_trainer.lightning_module.state_dict())
    if "record" in case.settings:
        assert RunRecord(folder / "run" / "globenc", "run").steps() == [entry.step for entry in whole.history]


@pytest.mark.parametrize("name", ["acts on validation", "acts on validation, written"])
def test_what_cannot_be_made_up_for_is_missing_everywhere_with_a_reason(name: str, interrupted: Path) -> None:
    _, callback, messages = resumed(interrupted / name, CASES[name])
    assert [entry.step for entry in callback.history] == [0, 1, 5]
    assert callback.history.missing_steps == [3]
    ((step, reason),) = callback.history.reasons
    assert step == 3
    assert "ActsOnValidation" in reason
    assert [message.partition("\n")[0] for message in messages] == [reason]
    shown = in_the_tab(interrupted / name)
    assert [step for step, _ in shown] == [0, 1, 3, 5]
    assert [reason for _, reason in shown if reason] == [
        callback.history.reasons[0][1].removeprefix("GlobEncCallback: ")
    ]


def test_a_first_validation_that_is_left_out_before_it_has_shown_the_probe_is_missing(interrupted: Path) -> None:
    name = "no probe yet, left out"
    _, callback, messages = resumed(interrupted / name, CASES[name])
    assert [entry.step for entry in callback.history] == [3, 5]
    assert callback.history.missing_steps == [1]
    assert ["enough examples" in message for message in messages] == [True]
    assert [(step, bool(reason)) for step, reason in in_the_tab(interrupted / name)] == [
        (1, True),
        (3, False),
        (5, False),
    ]


def test_what_is_made_up_for_in_another_run_folder_is_whole_there(interrupted: Path) -> None:
    name = "another run folder"
    _, callback, messages = resumed(interrupted / name, CASES[name])
    assert messages == []
    assert [entry.step for entry in callback.history] == [0, 1, 3, 5]
    log = events(interrupted / name / "version_1")
    assert sorted({point.step for point in log.Scalars("globenc/spearman_by_layer/W/layer_01")}) == [3, 5]
    (filmstrip,) = (tag for tag in log.Tags()["images"] if "filmstrip" in tag)
    assert sorted({image.step for image in log.Images(filmstrip)}) == [3, 5]
    tags = [tag for tag in log.Tags()["tensors"] if "/dashboard/summary/" in tag]
    assert sorted({event.step for tag in tags for event in log.Tensors(tag)}) == [3, 5]


@averages
def test_weights_that_a_validation_had_put_in_are_not_exchanged_again(
    interrupted: Path, undisturbed: Callable[[Case], tuple[pl.Trainer, GlobEncCallback]]
) -> None:
    """Lightning itself goes on with the averaged weights, so what comes after is another training."""
    name = "averaged weights"
    _, whole = undisturbed(CASES[name])
    _, callback, messages = resumed(interrupted / name, CASES[name])
    assert messages == []
    assert [entry.step for entry in callback.history] == [0, 1, 3, 5]
    for one, other in zip(callback.history[:3], whole.history[:3], strict=True):
        assert equal(vars(one), vars(other))


def test_a_clock_that_is_behind_the_first_start_loses_nothing(
    interrupted: Path,
    undisturbed: Callable[[Case], tuple[pl.Trainer, GlobEncCallback]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "the clock is behind"
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    _, callback, messages = resumed(interrupted / name, CASES[name])
    assert messages == []
    assert_whole(interrupted / name, callback, undisturbed(CASES[name])[1])
    log = events(interrupted / name / "run")
    tags = sorted(tag for tag in log.Tags()["tensors"] if "/dashboard/summary/" in tag)
    written = [log.Tensors(tag)[-1].wall_time for tag in tags]
    assert written == sorted(written)
