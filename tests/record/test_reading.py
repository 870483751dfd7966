"""Reading a record: whole tables, parts of them, and files that are not what they should be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from globenc_lightning import GlobEncCallback
from globenc_lightning.errors import GlobEncWarning, RecordError
from globenc_lightning.record import schema
from globenc_lightning.record.reading import Record
from tests.study.records import LENGTHS, write_run
from tests.training import Sentences, Steps, fit


def test_a_record_has_the_runs_and_steps_that_were_written(tmp_path: Path) -> None:
    write_run(tmp_path, "b", steps=(30, 10, 20))
    write_run(tmp_path, "a", steps=(5,), seed=1)
    record = Record.open(str(tmp_path))
    assert record.folder == tmp_path
    assert record.runs == ("a", "b")
    assert record.steps("a") == [5]
    assert record.steps("b") == [10, 20, 30]
    assert record.about("a")["seed"] == 1


def test_tables_hold_what_was_written(tmp_path: Path) -> None:
    made = write_run(tmp_path, "one")
    record = Record.open(tmp_path)
    tokens = record.tokens("one")
    assert len(tokens) == 3 * sum(LENGTHS)
    for method in ("N-Enc", "W-Res"):
        for layer in (1, 2):
            expected = np.concatenate([row for step in (10, 20, 30) for row in made.rows[step, method, layer]])
            assert tokens[f"{method}/0{layer}"].to_numpy() == pytest.approx(expected, abs=1e-12)
    examples = record.examples("one")
    assert len(examples) == 3 * len(LENGTHS)
    assert examples["predicted"].to_pylist() == [one for step in (10, 20, 30) for one in made.predicted[step]]
    probe = record.probe("one")
    assert probe["token"].to_pylist() == [token for tokens in made.tokens for token in tokens]


def test_only_the_columns_and_steps_that_are_asked_for_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    record = Record.open(tmp_path)
    tokens = record.tokens("one", columns=["N-Enc/02"], steps=[30, 10, 99])
    assert tokens.column_names == ["step", "example", "position", "N-Enc/02"]
    assert sorted(set(tokens["step"].to_pylist())) == [10, 30]
    examples = record.examples("one", columns=["label"], steps=[20])
    assert examples.column_names == ["step", "example", "label"]
    assert set(examples["step"].to_pylist()) == {20}


@pytest.mark.parametrize("kind", [schema.TOKENS, schema.EXAMPLES])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path: Path, kind: str, damage: str) -> None:
    write_run(tmp_path, "one")
    file = schema.step_file(tmp_path, kind, "one", 20)
    data = file.read_bytes()
    file.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"step,example\n20,0\n"}[damage])
    record = Record.open(tmp_path)
    read: Any = record.tokens if kind == schema.TOKENS else record.examples
    with pytest.warns(GlobEncWarning, match=file.name):
        table = read("one")
    assert set(table["step"].to_pylist()) == {10, 30}


def test_a_run_whose_files_are_all_damaged_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, "one", steps=(10, 20))
    for step in (10, 20):
        schema.step_file(tmp_path, schema.TOKENS, "one", step).write_bytes(b"PAR1")
    with pytest.warns(GlobEncWarning, match="step-00000010"), pytest.raises(RecordError, match="no analysis"):
        Record.open(tmp_path).tokens("one")


def test_a_damaged_probe_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    schema.probe_file(tmp_path, "one").write_bytes(b"")
    with pytest.raises(RecordError, match=r"probe\.parquet"):
        Record.open(tmp_path).probe("one")


def test_a_step_that_lacks_one_of_its_files_is_not_there_yet(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    schema.step_file(tmp_path, schema.EXAMPLES, "one", 30).unlink()
    # What a writer leaves that was killed.
    half = schema.step_file(tmp_path, schema.TOKENS, "one", 40)
    half.with_name(f".{half.name}.123.part").write_bytes(b"PAR1")
    record = Record.open(tmp_path)
    assert record.steps("one") == [10, 20]
    assert set(record.tokens("one")["step"].to_pylist()) == {10, 20}


def test_folders_without_a_record_are_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"there is no folder .*missing.*record="):
        Record.open(tmp_path / "missing")
    with pytest.raises(RecordError, match=r"no record in .*record=True writes globenc/"):
        Record.open(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RecordError, match="there is no folder"):
        Record.open(file)


def test_an_unknown_run_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    record = Record.open(tmp_path)
    for read in (record.about, record.tokens, record.examples, record.probe):
        with pytest.raises(RecordError, match="two"):
            read("two")
    with pytest.raises(RecordError, match="it has one"):
        record.about("two")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[]", "no schema number"),
        ('{"schema": "1"}', "no schema number"),
        ('{"schema": true}', "no schema number"),
        ('{"schema": 99}', r"schema number 99.*reads up to 1.*install a later version"),
    ],
)
def test_an_about_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, told: str) -> None:
    write_run(tmp_path, "one")
    schema.about_file(tmp_path, "one").write_text(text)
    with pytest.raises(RecordError, match=told) as caught:
        Record.open(tmp_path).about("one")
    assert "one.json" in str(caught.value)


def test_about_that_is_no_text_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    schema.about_file(tmp_path, "one").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match=r"one\.json cannot be read"):
        Record.open(tmp_path).about("one")


def test_the_record_of_a_training_has_what_its_history_has(tmp_path: Path) -> None:
    callback = GlobEncCallback(Sentences().first(4), record=tmp_path / "shared")
    fit(Steps(), callback, max_epochs=2)
    record = Record.open(tmp_path / "shared")
    (run,) = record.runs
    entries = callback.history.latest
    assert record.steps(run) == [entry.step for entry in entries]
    about = record.about(run)
    examples, tokens = record.examples(run), record.tokens(run)
    for entry in entries:
        mine = [place for place, step in enumerate(examples["step"].to_pylist()) if step == entry.step]
        rows = [place for place, step in enumerate(tokens["step"].to_pylist()) if step == entry.step]
        for method in about["methods"]:
            for layer in range(1, about["layers"] + 1):
                rho = examples[schema.rho_column(method, layer)].to_numpy()[mine]
                assert rho == pytest.approx(entry.by_example[method][:, layer - 1].numpy(), abs=1e-6, nan_ok=True)
            last = tokens[schema.attribution_column(method, about["layers"])].to_numpy()[rows]
            expected = np.concatenate([row.numpy() for row in entry.rows[method]])
            assert last == pytest.approx(expected, abs=1e-6)
    assert json.loads(schema.about_file(tmp_path / "shared", run).read_text())["schema"] == schema.SCHEMA
