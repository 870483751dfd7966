import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from globenc_lightning.errors import GlobEncWarning, RecordError
from globenc_lightning.record import schema
from globenc_lightning.record.reading import Record
from globenc_lightning.record.writing import RecordOptions
from tests.record.analyses import LENGTHS, made, run_with


def file_of(folder: Path, kind: str, step: int, run: str = "a") -> Path:
    return schema.step_file(folder, kind, run, step)


def cut(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def scribble(file: Path) -> None:
    file.write_bytes(b"PAR1 this is no table PAR1")


def test_runs_and_their_steps_are_found(tmp_path: Path) -> None:
    run_with(tmp_path, "b", [7, 3])
    run_with(tmp_path, "a", [10_000_000_000])
    record = Record.open(str(tmp_path))
    assert record.runs == ("a", "b")
    assert record.steps("b") == [3, 7]
    assert record.steps("a") == [10_000_000_000]


def test_tables_hold_every_step_in_order(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [9, 2, 30])
    record, total = Record.open(tmp_path), sum(LENGTHS)
    assert record.tokens("a")["step"].to_pylist() == [2] * total + [9] * total + [30] * total
    assert record.examples("a")["step"].to_pylist() == [2] * 4 + [9] * 4 + [30] * 4
    saliency = np.concatenate([one.numpy() for one in made(9).measurement.saliency])
    assert np.array_equal(record.tokens("a", steps=[9])["saliency"].to_numpy(), saliency)
    assert record.probe("a")["token"].to_pylist() == [token for one in made().measurement.names for token in one]


def test_columns_and_steps_can_be_chosen(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [1, 2, 3])
    record = Record.open(tmp_path)
    tokens = record.tokens("a", ["N-Enc/02", "position"], steps=[3, 1, 8])
    assert tokens.column_names == ["step", "example", "position", "N-Enc/02"]
    assert sorted(set(tokens["step"].to_pylist())) == [1, 3]
    assert record.examples("a", ["rho/N-Res/01"]).column_names == ["step", "example", "rho/N-Res/01"]


@pytest.mark.parametrize("column", ["N-Enc/09", "Q/01", "salience"])
def test_a_column_that_is_nowhere_is_refused_with_those_that_are(tmp_path: Path, column: str) -> None:
    run_with(tmp_path, "a", [1])
    with pytest.raises(RecordError, match=f"has the column '{column}'; they have step, example, position, saliency"):
        Record.open(tmp_path).tokens("a", [column])


def test_a_run_that_went_on_with_other_options_is_read_as_one(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [1], RecordOptions(dtype="float16", layers="last"))
    run_with(tmp_path, "a", [2], RecordOptions(methods=["N-Enc"]))
    tokens = Record.open(tmp_path).tokens("a")
    total = sum(LENGTHS)
    last, first, other = (tokens[name].to_pylist() for name in ("N-Enc/02", "N-Enc/01", "N-Res/02"))
    assert None not in last
    assert first[:total] == other[total:] == [None] * total
    assert None not in first[total:] + other[:total]
    both = Record.open(tmp_path).tokens("a", ["N-Enc/01"])["N-Enc/01"].to_pylist()
    assert both == first


@pytest.mark.parametrize("place", ["nowhere", "a/b/nowhere", "file"])
def test_no_such_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"there is no folder .*: give the folder that"):
        Record.open(tmp_path / place)


@pytest.mark.parametrize("inside", ["", "about", "tokens/run=a"])
def test_no_record_in_a_folder(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    with pytest.raises(RecordError, match=r"there is no record in .*: a record has a folder about/"):
        Record.open(tmp_path)


@pytest.mark.parametrize("damage", [cut, empty, scribble])
@pytest.mark.parametrize("kind", [schema.TOKENS, schema.EXAMPLES])
def test_a_damaged_file_is_named_and_the_others_are_read(
    tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    run_with(tmp_path, "a", [1, 2, 3])
    damaged = file_of(tmp_path, kind, 2)
    damage(damaged)
    record = Record.open(tmp_path)
    read = record.tokens if kind == schema.TOKENS else record.examples
    with pytest.warns(GlobEncWarning, match="left out, since they cannot be read") as caught:
        table = read("a")
    assert sorted(set(table["step"].to_pylist())) == [1, 3]
    assert [str(damaged) in str(one.message) for one in caught] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(read("a", steps=[1, 3])["step"].to_pylist()) == {1, 3}


def test_without_one_file_that_can_be_read_there_is_no_table(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [1])
    cut(file_of(tmp_path, schema.TOKENS, 1))
    with pytest.warns(GlobEncWarning), pytest.raises(RecordError, match="has no analysis that can be read, or none"):
        Record.open(tmp_path).tokens("a")
    shutil.rmtree(tmp_path / schema.TOKENS)
    with pytest.raises(RecordError, match="has no analysis that can be read, or none yet"):
        Record.open(tmp_path).examples("a")


@pytest.mark.parametrize("damage", [cut, empty, scribble, Path.unlink])
def test_a_probe_that_cannot_be_read_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run_with(tmp_path, "a", [1])
    file = schema.probe_file(tmp_path, "a")
    damage(file)
    with pytest.raises(RecordError, match="cannot be read as Parquet") as caught:
        Record.open(tmp_path).probe("a")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as JSON"),
        ('{"schema": 1', "cannot be read as JSON"),
        ("\x00\x01", "cannot be read as JSON"),
        ("[1]", "tells no schema number"),
        ("{}", "tells no schema number"),
        ('{"schema": "1"}', "tells no schema number"),
        ('{"schema": true}', "tells no schema number"),
        ('{"schema": 2}', "schema number 2, and this version .* reads up to 1: install a later version"),
        ('{"schema": 900}', "schema number 900"),
    ],
)
def test_an_about_file_that_tells_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    run_with(tmp_path, "a", [1])
    file = schema.about_file(tmp_path, "a")
    file.write_text(text)
    with pytest.raises(RecordError, match=said) as caught:
        Record.open(tmp_path).about("a")
    assert str(file) in str(caught.value)


def test_an_about_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [1])
    schema.about_file(tmp_path, "a").write_bytes(b"\xff\xfe{}")
    with pytest.raises(RecordError, match="cannot be read as JSON"):
        Record.open(tmp_path).about("a")


def test_a_run_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [1])
    run_with(tmp_path, "b", [1])
    with pytest.raises(RecordError, match=r"there is no run 'c' in .*; it has a, b"):
        Record.open(tmp_path).about("c")


def test_what_is_still_written_is_passed_over(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [1])
    whole = file_of(tmp_path, schema.TOKENS, 1)
    shutil.copy(whole, whole.with_name(f".step-00000002.parquet.{os.getpid()}.part"))
    (tmp_path / schema.ABOUT / ".b.json.17.part").write_text("{")
    shutil.copy(whole, file_of(tmp_path, schema.TOKENS, 3))
    record = Record.open(tmp_path)
    assert record.runs == ("a",)
    # Whoever finds the examples finds the tokens: the third analysis is not there yet.
    assert record.steps("a") == [1]
    assert set(record.tokens("a")["step"].to_pylist()) == {1}


def test_reading_works_at_any_moment_of_writing(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [1])
    done = threading.Event()

    def write() -> None:
        for step in range(2, 60):
            # Every third analysis replaces an earlier one, as a resumed run does.
            run_with(tmp_path, "a", [step if step % 3 else step // 3])
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while not done.is_set():
            record = Record.open(tmp_path)
            assert record.about("a")["run"] == "a"
            tokens, examples = record.tokens("a"), record.examples("a")
            assert len(tokens) % sum(LENGTHS) == len(examples) % len(LENGTHS) == 0
            reads += 1
    thread.join()
    assert reads > 5


def test_numbers_that_json_has_not_stand_as_text(tmp_path: Path) -> None:
    run = run_with(tmp_path, "a", [])
    odd = {"rate": float("nan"), "most": float("inf"), ("a", 1): [1.5, {"deep": float("-inf")}], "path": Path("x")}
    made(1).write(run, extra={"hyperparameters": odd})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    told = json.loads(schema.about_file(tmp_path, "a").read_text(), parse_constant=refuse)
    assert told["hyperparameters"] == {
        "rate": "nan",
        "most": "inf",
        "('a', 1)": [1.5, {"deep": "-inf"}],
        "path": "x",
    }
