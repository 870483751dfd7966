"""Reads a record: the tables of its runs, as far as their files are whole."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from globenc_lightning.errors import GlobEncWarning, RecordError
from globenc_lightning.record import schema
from globenc_lightning.record.libraries import load_pyarrow


class Record:
    """A folder that holds the record of one run or many.

    Open one with :meth:`open`. A run that is still written can be read at any time: its files are there as a whole or
    not at all.

    Attributes:
        folder: the folder.
        runs: the names of its runs, in order.
    """

    def __init__(self, folder: Path, runs: Sequence[str]) -> None:
        self.folder = folder
        self.runs = tuple(runs)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Record":
        """Returns the record in a folder.

        Raises:
            RecordError: there is no such folder, or no record in it.
        """
        path = Path(folder)
        if not path.is_dir():
            raise RecordError(f"there is no folder {path}: give the folder that GlobEncCallback(record=...) wrote.")
        runs = sorted(file.stem for file in (path / schema.ABOUT).glob("*.json"))
        if not runs:
            raise RecordError(
                f"there is no record in {path}: a record has a folder {schema.ABOUT}/ with one file per run. Give the "
                "folder that GlobEncCallback(record=...) wrote; record=True writes globenc/ in the logger's run folder."
            )
        return cls(path, runs)

    def about(self, run: str) -> dict[str, Any]:
        """Returns the choices of a run, its seed, its versions, and what each of its columns is.

        Raises:
            RecordError: there is no such run, its file cannot be read, or a later version of this package wrote it.
        """
        file = schema.about_file(self.folder, run)
        try:
            told = json.loads(file.read_text("utf-8"))
        except FileNotFoundError as error:
            raise RecordError(f"there is no run {run!r} in {self.folder}; it has {', '.join(self.runs)}.") from error
        except (OSError, ValueError) as error:
            raise RecordError(f"{file} cannot be read as JSON: {error}") from error
        number = told.get("schema") if isinstance(told, dict) else None
        if not isinstance(number, int) or isinstance(number, bool):
            raise RecordError(f"{file} is no file of a record: it tells no schema number.")
        if number > schema.SCHEMA:
            raise RecordError(
                f"{file} has the schema number {number}, and this version of globenc-lightning reads up to "
                f"{schema.SCHEMA}: install a later version to read it."
            )
        return dict(told)

    def steps(self, run: str) -> list[int]:
        """Returns the steps of the analyses of a run, in ascending order."""
        kinds = [self._steps_of(kind, run) for kind in (schema.TOKENS, schema.EXAMPLES)]
        return sorted(kinds[0] & kinds[1])

    def tokens(self, run: str, columns: Sequence[str] | None = None, steps: Iterable[int] | None = None) -> Any:
        """Returns the attributions of a run as a pyarrow table, a row per step, example and token.

        Args:
            run: the run.
            columns: those that are read, or None for all; ``step``, ``example`` and ``position`` are always read.
            steps: those that are read, or None for all.

        Raises:
            RecordError: not one file can be read; a file that cannot is named in a warning and left out.
        """
        keys = ("step", "example", "position")
        return self._table(run, schema.TOKENS, None if columns is None else [*keys, *columns], steps)

    def examples(self, run: str, columns: Sequence[str] | None = None, steps: Iterable[int] | None = None) -> Any:
        """Returns the decisions and correlations of a run as a pyarrow table, a row per step and example; see above."""
        return self._table(run, schema.EXAMPLES, None if columns is None else ["step", "example", *columns], steps)

    def columns(self, run: str, kind: str) -> list[str]:
        """Returns the columns that any analysis of a run has, in the files of tokens or of examples.

        Args:
            run: the run.
            kind: ``"tokens"`` or ``"examples"``.
        """
        load_pyarrow()
        return _columns([schema.step_file(self.folder, kind, run, step) for step in self.steps(run)])

    def masking(self, run: str) -> dict[str, Any]:
        """Returns how a run's masked copies were made, as its newest analysis with faithfulness says; else nothing."""
        load_pyarrow()
        from pyarrow import ArrowException, parquet

        for step in reversed(self.steps(run)):
            with contextlib.suppress(ArrowException, OSError, ValueError):
                metadata = parquet.read_schema(schema.step_file(self.folder, schema.EXAMPLES, run, step)).metadata or {}
                if schema.MASKING in metadata:
                    return dict(json.loads(metadata[schema.MASKING]))
        return {}

    def probe(self, run: str) -> Any:
        """Returns the text of a run's probe as a pyarrow table, a row per example and token.

        Raises:
            RecordError: it cannot be read.
        """
        load_pyarrow()
        file = schema.probe_file(self.folder, run)
        table = _read(file, None)
        if isinstance(table, str):
            raise RecordError(f"{file} cannot be read as Parquet: {table}")
        return table

    def _table(self, run: str, kind: str, columns: list[str] | None, steps: Iterable[int] | None) -> Any:
        pyarrow = load_pyarrow()
        wanted = self.steps(run) if steps is None else [step for step in steps if step in self._steps_of(kind, run)]
        tables, damaged = [], []
        for step in wanted:
            file = schema.step_file(self.folder, kind, run, step)
            table = _read(file, columns)
            if isinstance(table, str):
                damaged.append(f"{file} ({table})")
            else:
                tables.append(table)
        if damaged:
            warnings.warn(f"left out, since they cannot be read: {'; '.join(damaged)}", GlobEncWarning, stacklevel=3)
        if not tables:
            raise RecordError(f"the run {run!r} in {self.folder} has no analysis that can be read, or none yet.")
        found = pyarrow.concat_tables(tables, promote_options="permissive")
        missing = [one for one in columns or () if one not in found.column_names]
        if missing:
            raise RecordError(
                f"no file of {kind} of the run {run!r} in {self.folder} has the column {missing[0]!r}; they have "
                f"{', '.join(_columns([schema.step_file(self.folder, kind, run, step) for step in wanted]))}."
            )
        return found

    def _steps_of(self, kind: str, run: str) -> set[int]:
        folder = schema.step_file(self.folder, kind, run, 0).parent
        found = [schema.step_of(file) for file in folder.iterdir()] if folder.is_dir() else []
        return {step for step in found if step is not None}


def _columns(files: Sequence[Path]) -> list[str]:
    """The columns of those files that can be read."""
    from pyarrow import ArrowException, parquet

    names: dict[str, None] = {}
    for file in files:
        with contextlib.suppress(ArrowException, OSError):
            names |= dict.fromkeys(parquet.read_schema(file).names)
    return [*names]


def _read(file: Path, columns: list[str] | None) -> Any:
    """The table in a file, or what is wrong with it."""
    from pyarrow import ArrowException, parquet

    try:
        if columns is not None:
            # A run that went on with other options has not the same columns in all of its files.
            held = parquet.read_schema(file).names
            columns = [one for one in dict.fromkeys(columns) if one in held]
        return parquet.read_table(file, columns=columns, partitioning=None)
    except (ArrowException, OSError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
