"""What a record holds, and that its files are whole whatever happens while they are written."""

import errno
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pyarrow import parquet

from globenc_lightning import GlobEncCallback
from globenc_lightning.errors import GlobEncWarning, RecordError
from globenc_lightning.measurement import HistoryEntry, history_entry
from globenc_lightning.packed import Packed
from globenc_lightning.record import schema, writing
from globenc_lightning.record.writing import RecordOptions, RunRecord
from tests.neutrality import equal
from tests.record.made import made
from tests.task.zoo import CASES, TRAINING, VALIDATION, Case
from tests.training import Sentences, Steps, build_trainer, final_state, fit, loader, tokenizer

ROOT = Path(__file__).parents[2]
UNCOUNTED = ("regression", "loss")
"""Kinds that decide for a value and for nothing that can be counted."""


def tables(folder: Path, run: str = "run", step: int = 0) -> dict[str, Any]:
    """The record's tables as columns of Python values."""
    files = {kind: schema.step_file(folder, kind, run, step) for kind in (schema.TOKENS, schema.EXAMPLES)}
    files[schema.PROBE] = schema.probe_file(folder, run)
    return {kind: parquet.read_table(file, partitioning=None).to_pydict() for kind, file in files.items()}


def assert_same_entries(found: list[HistoryEntry], wanted: list[HistoryEntry]) -> None:
    assert [one.step for one in found] == [one.step for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert {name: equal(value, getattr(other, name)) for name, value in vars(one).items()} == dict.fromkeys(
            vars(one), True
        ), one.step


def test_every_row_is_where_the_measurement_has_it(tmp_path: Path) -> None:
    measurement, probe, entry, about = made(step=49)
    RunRecord(tmp_path, "run").write(measurement, probe, entry, about)
    found = tables(tmp_path, step=49)
    tokens, place = found[schema.TOKENS], 0
    for example, rows in enumerate(measurement.rows):
        for position in range(len(measurement.names[example])):
            assert (tokens["step"][place], tokens["example"][place], tokens["position"][place]) == (
                49,
                example,
                position,
            )
            assert tokens["saliency"][place] == measurement.saliency[example][position].item()
            for method, row in rows.items():
                for layer in (1, 2):
                    column = schema.attribution_column(method, layer)
                    assert tokens[column][place] == row[layer - 1, position].item()
            place += 1
    assert place == len(tokens["step"])
    examples = found[schema.EXAMPLES]
    for example in range(3):
        assert examples["logits"][example] == measurement.logits[example].tolist()
        assert examples["loss"][example] == pytest.approx(measurement.losses[example].item())
        for method, rho in measurement.correlation.items():
            assert examples[schema.rho_column(method, 2)][example] == rho[example, 1].item()
    assert set(examples) - {name for name in examples if name.startswith("rho/")} == set(schema.EXAMPLE_COLUMNS)
    assert set(found[schema.PROBE]) == set(schema.PROBE_COLUMNS)
    assert found[schema.PROBE]["token"] == [token for names in measurement.names for token in names]


def test_about_tells_the_choices_and_every_column(tmp_path: Path) -> None:
    measurement, probe, entry, about = made()
    RunRecord(tmp_path, "run").write(measurement, probe, entry, about, extra={"seed": 3, "hyperparameters": {"lr": 1}})
    told = json.loads(schema.about_file(tmp_path, "run").read_text())
    assert (told["schema"], told["run"], told["seed"], told["hyperparameters"]) == (schema.SCHEMA, "run", 3, {"lr": 1})
    assert told["about"]["task"] == "classification"
    assert told["probe"] == about.probe
    assert told["versions"]["torch"] == importlib.metadata.version("torch")
    for kind, columns in tables(tmp_path).items():
        assert list(told["columns"][kind]) == list(columns)
        assert all(told["columns"][kind].values())


def test_about_is_written_again_when_it_changes_and_keeps_when_it_began(tmp_path: Path) -> None:
    measurement, probe, entry, about = made()
    record, file = RunRecord(tmp_path, "run"), schema.about_file(tmp_path, "run")
    record.write(measurement, probe, entry, about)
    before = file.stat().st_mtime_ns
    record.write(measurement, probe, replace(entry, step=1), about)
    assert file.stat().st_mtime_ns == before
    created = json.loads(file.read_text())["created"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "created": "then"}))
    record.write(measurement, probe, entry, replace(about, readout="mean"))
    assert json.loads(file.read_text())["about"]["readout"] == "mean"
    assert (created != "then", json.loads(file.read_text())["created"]) == (True, "then")


def test_entries_come_back_to_the_last_bit(tmp_path: Path) -> None:
    record, entries = RunRecord(tmp_path, "run"), []
    for step in (0, 9, 19):
        measurement, probe, entry, about = made(step // 9, step)
        measurement.correlation["W"][0] = float("nan")
        entry = history_entry(measurement, step, entry.epoch, validation=step != 9)
        entry = HistoryEntry.from_state_dict(entry.state_dict())
        record.write(measurement, probe, entry, about, validation=entry.validation)
        entries.append(entry)
    assert record.steps() == [0, 9, 19]
    assert_same_entries(record.entries(), entries)
    assert_same_entries(RunRecord(tmp_path, "run").entries(until=9), entries[:2])
    assert record.holds_history(["W", "N-Enc"], 2)


def test_float16_rounds_what_comes_back(tmp_path: Path) -> None:
    measurement, probe, entry, about = made()
    record = RunRecord(tmp_path, "run", RecordOptions(dtype="float16"))
    record.write(measurement, probe, entry, about)
    (found,) = record.entries()
    for method in entry.rows:
        rounded = [rows[method][-1].half().float() for rows in measurement.rows]
        for one, other in zip(found.rows[method], Packed.from_rows([rounded]).rows(0), strict=True):
            assert torch.equal(one, other)
    assert equal(found.by_example, entry.by_example)
    column = parquet.read_schema(schema.step_file(tmp_path, schema.TOKENS, "run", 0)).field("N-Enc/01")
    assert str(column.type) == "halffloat"


@pytest.mark.parametrize(
    ("options", "columns", "holds"),
    [
        ({"methods": ["N-Enc", "W"]}, ["W/01", "W/02", "N-Enc/01", "N-Enc/02"], False),
        ({"layers": "last", "methods": ["W"]}, ["W/02"], False),
        ({"layers": "last"}, None, True),
        ({"layers": [1, 7], "methods": ["W"]}, ["W/01"], False),
    ],
)
def test_options_choose_methods_and_layers(
    options: dict[str, Any], columns: list[str] | None, holds: bool, tmp_path: Path
) -> None:
    measurement, probe, entry, about = made()
    record = RunRecord(tmp_path, "run", RecordOptions(**options))
    record.write(measurement, probe, entry, about)
    found = tables(tmp_path)
    if columns is not None:
        assert [name for name in found[schema.TOKENS] if "/" in name] == columns
    assert len([name for name in found[schema.EXAMPLES] if "/" in name]) == 2 * len(measurement.correlation)
    assert record.holds_history([*measurement.correlation], 2) is holds


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float64"}, "dtype must be 'float32' or 'float16'; got 'float64'"),
        ({"methods": "N-Enc"}, "methods must be a list of names"),
        ({"layers": "first"}, "layers must be None, 'last' or numbers from 1"),
        ({"layers": [0]}, "layers must be None, 'last' or numbers from 1, such as .*; got 0 among them"),
        ({"layers": [True]}, "got True among them"),
    ],
)
def test_options_that_cannot_be_used_say_what_to_write(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RecordOptions(**options)


def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    for name in ("../up", "a/b", "", "a b"):
        with pytest.raises(ValueError, match="a run's name holds letters, digits"):
            RunRecord(tmp_path, name)


def test_odd_figures_and_texts_are_written_and_read(tmp_path: Path) -> None:
    measurement, probe, entry, about = made()
    odd = ["<script>", "a\x00b", "\u202egnp", "\ud800", "", "日本"]
    names = [tuple(odd[: len(one)]) for one in measurement.names]
    measurement.saliency[0][0] = float("inf")
    measurement.rows[0]["W"][0, 0] = float("nan")
    measurement = replace(
        measurement,
        names=names,
        logits=[torch.empty(0)] * 3,
        losses=torch.full((3,), float("nan")),
        position=[None, 1, None],
        truths=[(), (1.0, 2.0), ()],
        ids=[None, None, None],
    )
    unlabelled = replace(probe, rows=tuple({"input_ids": row["input_ids"]} for row in probe.rows))
    RunRecord(tmp_path, "run").write(measurement, unlabelled, entry, about)
    found = tables(tmp_path)
    assert found[schema.TOKENS]["saliency"][0] == float("inf")
    assert np.isnan(found[schema.TOKENS]["W/01"][0])
    assert found[schema.EXAMPLES]["logits"] == [[], [], []]
    assert found[schema.EXAMPLES]["loss"] == [None] * 3
    assert found[schema.EXAMPLES]["label"] == [None, 1.0, None]
    assert found[schema.EXAMPLES]["truths"] == [[], [1.0, 2.0], []]
    assert len(set(found[schema.EXAMPLES]["text_hash"])) == 3
    assert found[schema.PROBE]["token"][:4] == ["<script>", "a\x00b", "\u202egnp", "\\ud800"]
    assert set(found[schema.PROBE]["token_id"]) == {None}
    assert found[schema.EXAMPLES]["decided_position"] == [None, 1, None]


def test_an_earlier_analysis_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "run")
    for validation in (0, 5):
        measurement, probe, entry, about = made(validation, step=7)
        record.write(measurement, probe, entry, about)
    assert record.steps() == [7]
    assert_same_entries(record.entries(), [entry])


def test_later_steps_can_be_forgotten_and_earlier_ones_taken_over(tmp_path: Path) -> None:
    record, entries = RunRecord(tmp_path / "old", "run"), []
    for step in (0, 4, 8):
        measurement, probe, entry, about = made(step, step)
        record.write(measurement, probe, entry, about)
        entries.append(entry)
    copy = RunRecord(tmp_path / "new", "other")
    copy.take_over(record, 4)
    assert_same_entries(copy.entries(), entries[:2])
    assert (
        schema.probe_file(tmp_path / "new", "other").read_bytes()
        == schema.probe_file(tmp_path / "old", "run").read_bytes()
    )
    record.forget_after(0)
    assert record.steps() == [0]
    assert copy.steps() == [0, 4]


KINDS = {case.name: case for case in CASES}


def one_of_each_task() -> list[Case]:
    """The first module of each kind of decision that the zoo's page tells."""
    from tests.task.zoo_table import PAGE, told

    tasks: dict[str, str] = {}
    for what, _, task in told(PAGE.read_text(encoding="utf-8")):
        tasks.setdefault(task, what)
    return [next(case for case in CASES if case.what.replace("|", "/") == what) for what in tasks.values()]


@pytest.mark.parametrize("case", one_of_each_task(), ids=lambda case: case.name)
def test_every_kind_of_decision_is_recorded(case: Case, tmp_path: Path) -> None:
    callback = GlobEncCallback(**case.arguments, record=tmp_path, heatmap_examples=0)
    loaders = [case.loader(VALIDATION) for _ in range(case.loaders)]
    build_trainer([callback]).fit(case.module(), case.loader(TRAINING), loaders if case.loaders > 1 else loaders[0])
    assert len(callback.history) > 0
    about = callback.history.about
    assert about is not None
    assert_same_entries(RunRecord(tmp_path, "run").entries(), [*callback.history])
    last = callback.history[-1]
    found = tables(tmp_path, step=last.step)[schema.EXAMPLES]
    assert set(found["task"]) == {about.task}
    assert found["score"] == pytest.approx(last.score.tolist(), nan_ok=True)
    assert [tuple(one) for one in found["answers"]] == last.answers
    if about.task in UNCOUNTED:
        assert found["predicted"] == [None] * len(last.score)
    else:
        assert found["predicted"] == last.predicted.tolist()
    if about.task == "classification":
        for logits, label, loss in zip(found["logits"], found["label"], found["loss"], strict=True):
            if label is not None:
                wanted = torch.nn.functional.cross_entropy(torch.tensor([logits]), torch.tensor([int(label)]))
                assert loss == pytest.approx(wanted.item(), abs=1e-5)
    if about.task in ("classification", "binary", "multi-label", "choice"):
        assert all(logits for logits in found["logits"])
        assert not any(loss is None for loss, truth in zip(found["loss"], found["truths"], strict=True) if truth)


def test_the_one_process_s_own_words_are_recorded(tmp_path: Path) -> None:
    callback = GlobEncCallback(record=tmp_path, tokenizer=tokenizer(), num_examples=4)
    fit(Steps(), callback)
    found = tables(tmp_path)[schema.PROBE]
    assert callback.probe is not None
    assert found["token"] == [token for tokens in callback.probe.tokens for token in tokens]
    assert found["special"][0] is True
    assert found["special"][1] is False
    assert found["token_id"][: len(callback.probe.rows[0]["input_ids"])] == callback.probe.rows[0]["input_ids"].tolist()
    assert [one for one in found["word"] if one is None] == [None] * sum(found["special"])


# What may go wrong


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    measurement, probe, entry, about = made()
    with pytest.raises(RecordError, match=r"needs pyarrow, which is not installed: pip install 'globenc-lightning\[re"):
        RunRecord(tmp_path, "run").write(measurement, probe, entry, about)
    with pytest.warns(GlobEncWarning, match=r"needs pyarrow, which is not installed"):
        trainer = fit(Steps(), GlobEncCallback(record=tmp_path))
    assert trainer.global_step == 2


def test_a_failed_write_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    measurement, probe, entry, about = made()
    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        RunRecord(tmp_path, "run").write(measurement, probe, entry, about)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".json"]


def test_the_last_megabytes_of_a_disk_are_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30 - 1000, 1000))
    measurement, probe, entry, about = made()
    with pytest.raises(OSError, match="left to other logs"):
        RunRecord(tmp_path, "run").write(measurement, probe, entry, about)
    with pytest.warns(GlobEncWarning, match="left to other logs"):
        trainer = fit(Steps(), GlobEncCallback(record=tmp_path / "other"))
    assert trainer.global_step == 2


def test_a_folder_that_cannot_be_made_stops_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(GlobEncWarning, match="NotADirectoryError|FileExistsError"):
        trainer = fit(Steps(), GlobEncCallback(record=tmp_path / "file"))
    assert trainer.global_step == 2
    with pytest.raises(OSError, match="file"):
        fit(Steps(), GlobEncCallback(record=tmp_path / "file", on_error="raise"))


@pytest.mark.parametrize("fault", ["a full disk", "no room", "a file in its place"])
def test_a_training_whose_record_fails_is_the_one_without_a_record(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def trained(*callbacks: GlobEncCallback) -> dict[str, Any]:
        # Dropout draws from the generators.
        pl.seed_everything(3, verbose=False)
        return final_state(fit(Steps(), *callbacks))

    without = trained()
    if fault == "a full disk":
        monkeypatch.setattr(parquet, "write_table", full)
    elif fault == "no room":
        monkeypatch.setattr(writing, "require_free", full)
    else:
        (tmp_path / "record").write_text("")
    with pytest.warns(GlobEncWarning, match="No space left|NotADirectoryError|FileExistsError"):
        found = trained(GlobEncCallback(record=tmp_path / "record"))
    assert {name: equal(found[name], one) for name, one in without.items()} == dict.fromkeys(without, True)
    assert not [*tmp_path.rglob("*.parquet"), *tmp_path.rglob(f"*{writing.UNFINISHED}")]


def test_what_a_killed_process_was_writing_is_cleared(tmp_path: Path) -> None:
    measurement, probe, entry, about = made()
    RunRecord(tmp_path, "run").write(measurement, probe, entry, about)
    beside = schema.step_file(tmp_path, schema.TOKENS, "run", 1)
    part = beside.with_name(f".{beside.name}.99{writing.UNFINISHED}")
    part.write_bytes(b"PAR1")
    record = RunRecord(tmp_path, "run")
    assert record.steps() == [0]
    record.write(measurement, probe, replace(entry, step=2), about)
    assert not part.exists()


KILLED = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
from pyarrow import parquet  # here, and not in every child
from globenc_lightning.record.writing import RunRecord
from tests.record.made import made

folder, draw = Path(sys.argv[1]), random.Random(0)
# Large enough that much of the time goes into writing: a file that is written in its place is found cut off.
written = made(sentences=300, layers=12, tokens=20)
# What the first writing in a process takes besides is not spent in every child.
RunRecord(folder / "first", "run").write(*written)
for moment in range(20):
    child = os.fork()
    if not child:
        record = RunRecord(folder, "run")
        measurement, probe, entry, about = written
        for step in range(100 * moment, 100 * moment + 100):
            record.write(measurement, probe, replace(entry, step=step), about)
        os._exit(0)
    # On a busy machine a moment may come before anything is written: every second child writes something first.
    latest, until = RunRecord(folder, "run").steps, time.monotonic() + 20
    while moment % 2 and not any(step >= 100 * moment for step in latest()) and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed in the middle of its work")
def test_every_file_is_whole_after_kill_9_at_twenty_moments(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=120)
    record = RunRecord(tmp_path, "run")
    wanted = made(sentences=300, layers=12, tokens=20)[2]
    assert len(record.steps()) >= 10
    assert_same_entries(record.entries(), [replace(wanted, step=step) for step in record.steps()])
    for file in tmp_path.rglob("*.parquet"):
        assert parquet.read_table(file, partitioning=None).num_rows > 0
    assert all(json.loads(file.read_text()) for file in tmp_path.rglob("*.json"))
    # What the last of them was writing goes when the next one begins, and its analysis is made anew.
    measurement, probe, entry, about = made(sentences=300, layers=12, tokens=20)
    record.write(measurement, probe, replace(entry, step=5000), about)
    assert not [*tmp_path.rglob(f"*{writing.UNFINISHED}")]


def test_a_large_probe_is_recorded_whole(tmp_path: Path) -> None:
    callback = GlobEncCallback(record=tmp_path, num_examples=300, methods=["N-Enc"], heatmap_examples=0)
    fit(Steps(), callback, val=loader(Sentences(300), 50))
    assert len(tables(tmp_path, step=1)[schema.EXAMPLES]["step"]) == 300
