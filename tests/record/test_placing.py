"""Both files of an analysis are put in place together, and what was killed on the way is cleared."""

import errno
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from globenc_lightning.record import schema, writing
from globenc_lightning.record.reading import Record
from globenc_lightning.record.writing import RunRecord
from tests.record.analyses import equal, made, run_with


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder, those that are no whole ones included."""
    return {one: one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_analysis_that_fails_half_way_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    run = run_with(tmp_path, "a", [1])
    before, calls = contents(tmp_path), []
    write_table = parquet.write_table

    def failing(table: Any, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == fails_at:
            Path(path).write_bytes(b"PAR1 half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_table(table, path, **options)

    monkeypatch.setattr(parquet, "write_table", failing)
    other = made(2)
    with pytest.raises(OSError, match="No space"):
        # The same step again, with other figures.
        run.write(other.measurement, other.probe, made(1).entry, other.about)
    assert len(calls) == fails_at
    assert contents(tmp_path) == before


def test_no_file_is_begun_where_both_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path, "a", [1])
    before = contents(tmp_path)
    tables = {
        schema.step_file(tmp_path, kind, "a", 2): parquet.read_table(
            schema.step_file(tmp_path, kind, "a", 1), partitioning=None
        )
        for kind in (schema.TOKENS, schema.EXAMPLES)
    }
    smaller, both = (pick(one.nbytes for one in tables.values()) for pick in (max, sum))
    asked: list[int] = []

    def asks(folder: Path, size: int) -> None:
        asked.append(size)
        if size > smaller:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "require_free", asks)
    with pytest.raises(OSError, match="No space"):
        run._write_tables(tables)
    assert asked == [both]
    assert contents(tmp_path) == before


def test_what_was_killed_is_cleared_and_other_runs_keep_theirs(tmp_path: Path) -> None:
    run_with(tmp_path, "a", [1])
    run_with(tmp_path, "a.json", [1])
    own = [
        schema.step_file(tmp_path, schema.TOKENS, "a", 9),
        schema.step_file(tmp_path, schema.EXAMPLES, "a", 9),
        schema.probe_file(tmp_path, "a"),
        schema.about_file(tmp_path, "a"),
    ]
    others = [
        schema.step_file(tmp_path, schema.TOKENS, "a.json", 9),
        schema.probe_file(tmp_path, "a.json"),
        schema.about_file(tmp_path, "a.json"),
    ]
    parts = [one.with_name(f".{one.name}.4711.part") for one in (*own, *others)]
    for part in parts:
        part.write_bytes(b"half")
    run_with(tmp_path, "a", [2])
    assert [part.exists() for part in parts] == [False] * 4 + [True] * 3
    run_with(tmp_path, "a.json", [2])
    assert not any(part.exists() for part in parts)
    assert Record.open(tmp_path).steps("a.json") == [1, 2]


@pytest.mark.parametrize("missing", [schema.TOKENS, schema.EXAMPLES])
def test_an_analysis_with_one_file_is_none(tmp_path: Path, missing: str) -> None:
    run = run_with(tmp_path, "a", [1, 2])
    schema.step_file(tmp_path, missing, "a", 2).unlink()
    assert run.steps() == Record.open(tmp_path).steps("a") == [1]
    assert [entry.step for entry in run.entries()] == [1]


def test_the_history_is_read_without_the_lower_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read = run_with(tmp_path, "a", [3], layers=4), []
    read_table = parquet.read_table

    def noted(file: Path, columns: list[str] | None = None, **options: Any) -> Any:
        read.append(columns)
        return read_table(file, columns=columns, **options)

    monkeypatch.setattr(parquet, "read_table", noted)
    entry = run.entries()[0]
    assert ["example", "saliency", "N-Enc/04", "N-Res/04"] in read
    assert equal(dict(vars(entry)), dict(vars(made(3, layers=4).entry)))


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    names = [schema.run_name("model-" * 60 + end) for end in ("a", "b")]
    assert len(set(names)) == 2
    assert all(len(one) == schema.LONGEST_NAME and one == schema.run_name(one) for one in names)
    assert schema.run_name("x" * 160) == "x" * 160
    for name in names:
        made(1).write(RunRecord(tmp_path, name))
    assert Record.open(tmp_path).runs == tuple(sorted(names))
