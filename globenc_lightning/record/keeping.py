"""Keeps the record of a training for a callback: which folder and run, what is written, what a checkpoint points to."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from globenc_lightning.errors import GlobEncError
from globenc_lightning.measurement import About, HistoryEntry, Measurement
from globenc_lightning.probe import ProbeSet
from globenc_lightning.record import schema
from globenc_lightning.record.schema import run_name
from globenc_lightning.record.writing import RecordOptions, RunRecord

FOLDER = "globenc"
"""The folder of a record below the logger's run folder."""

Record = bool | str | os.PathLike[str] | RecordOptions | None
"""What ``GlobEncCallback(record=...)`` takes."""


def options_of(record: Record) -> RecordOptions | None:
    """Returns the options that the argument ``record`` stands for, or None where nothing is recorded.

    Raises:
        ValueError: the argument is something else.
    """
    if record is None or record is False:
        return None
    if record is True:
        return RecordOptions()
    if isinstance(record, RecordOptions):
        return record
    if isinstance(record, str | os.PathLike) and os.fspath(record):
        return RecordOptions(folder=record)
    raise ValueError(
        "record must be None, True (a folder globenc/ in the logger's run folder), a folder, or RecordOptions(...); "
        f"got {record!r}"
    )


class RecordKeeper:
    """The record of a callback's training.

    Args:
        options: what is recorded, and where.

    Attributes:
        run: the run that is written; None before a training has begun.
    """

    def __init__(self, options: RecordOptions) -> None:
        self.run: RunRecord | None = None
        self._options = options
        self._folder = Path(FOLDER)
        self._name = "run"
        self._extra: dict[str, Any] = {}
        self._written: dict[int, HistoryEntry] = {}
        self._pointed: Mapping[str, Any] | None = None

    def place(self, log_dir: str, name: str, extra: Mapping[str, Any]) -> None:
        """A Trainer begins something.

        Args:
            log_dir: the logger's run folder.
            name: a name for the run.
            extra: what is told of the run besides its choices: seed, hyperparameters.
        """
        given = self._options.folder
        self._folder = Path(log_dir) / FOLDER if given is None else Path(given)
        self._name = run_name(self._options.run or name)
        self._extra = dict(extra)

    def begin(self) -> None:
        """A training begins from its start: it gets a run of its own."""
        self.run, self._written, self._pointed = None, {}, None

    def write(
        self, measurement: Measurement, probe: ProbeSet, entry: HistoryEntry, about: About, validation: bool
    ) -> None:
        """Write a measurement; the earlier one of the same step, if there is one, is replaced."""
        if self.run is None or self.run.folder != self._folder:
            self.run = self._opened()
        self._written.pop(entry.step, None)
        self.run.write(measurement, probe, entry, about, extra=self._extra, validation=validation)
        self._written[entry.step] = entry

    def _opened(self) -> RunRecord:
        """The run to write: a training that goes on has that of its checkpoint, or a copy in another folder."""
        pointed, self._pointed = self._pointed, None
        earlier = None if pointed is None else _found(pointed, self._folder)
        if pointed is None or earlier is None:
            self._written = {}
            return RunRecord(self._folder, _claimed(self._folder, self._name), self._options)
        if earlier.folder.resolve() == self._folder.resolve():
            run = RunRecord(self._folder, earlier.run, self._options)
            # A training that never was: it goes on from an earlier step.
            run.forget_after(pointed["until"])
            return run
        run = RunRecord(self._folder, _claimed(self._folder, self._name), self._options)
        run.take_over(earlier, pointed["until"])
        return run

    def forget_after(self, step: int) -> None:
        """Remove what was written of later steps: a trial run leaves nothing behind."""
        if self.run is not None:
            self.run.forget_after(step)
            self._written = {one: entry for one, entry in self._written.items() if one <= step}

    def _has_written(self, entry: HistoryEntry) -> bool:
        written = self._written.get(entry.step)
        # A history keeps a copy of an entry that shares lists with the one before; its figures are the same object.
        return written is not None and written.rho is entry.rho

    def pointer(self, entries: Sequence[HistoryEntry]) -> tuple[dict[str, Any] | None, list[HistoryEntry]]:
        """Returns what a checkpoint says of the record, and the entries that the record does not give back.

        Args:
            entries: the history's entries of this training.
        """
        if self.run is None or not entries or not self._written:
            return None, list(entries)
        layers = len(next(iter(entries[-1].correlation.values())))
        if not self.run.holds_history(list(entries[-1].correlation), layers):
            return None, list(entries)
        kept = [entry for entry in entries if not self._has_written(entry)]
        told = {"folder": str(self.run.folder.resolve()), "run": self.run.run, "until": entries[-1].step}
        return told, kept

    def restored(self, pointer: Mapping[str, Any], kept: Sequence[HistoryEntry]) -> list[HistoryEntry]:
        """Returns the entries that a checkpoint's pointer stands for, and those that it holds itself, by their steps.

        Args:
            pointer: what :meth:`pointer` gave.
            kept: the entries in the checkpoint.

        Raises:
            GlobEncError: the record is not there any more.
        """
        if self.run is not None and (str(self.run.folder.resolve()), self.run.run) == (
            pointer["folder"],
            pointer["run"],
        ):
            # A trial run within this session has ended.
            entries = [entry for step, entry in self._written.items() if step <= pointer["until"]]
            return sorted([*kept, *entries], key=lambda entry: entry.step)
        self._pointed = pointer
        entries = recorded(pointer, kept, self._folder)
        held = {id(entry) for entry in kept}
        self._written = {entry.step: entry for entry in entries if id(entry) not in held}
        return entries


def recorded(
    pointer: Mapping[str, Any], kept: Sequence[HistoryEntry], folder: Path | None = None
) -> list[HistoryEntry]:
    """Returns the entries that a checkpoint's pointer stands for, and those that it holds itself, by their steps.

    Args:
        pointer: what :meth:`RecordKeeper.pointer` gave.
        kept: the entries in the checkpoint.
        folder: where the record may be now, if it is not where it was.

    Raises:
        GlobEncError: the record is not there any more.
    """
    earlier = _found(pointer, folder)
    if earlier is None:
        raise GlobEncError(
            f"the checkpoint points to the record of run {pointer['run']} in {pointer['folder']}, which is not there: "
            "the earlier validations are missing in pictures and curves. Put the folder back there to have them."
        )
    return sorted([*kept, *earlier.entries(pointer["until"])], key=lambda entry: entry.step)


def _found(pointer: Mapping[str, Any], folder: Path | None) -> RunRecord | None:
    """The run that a checkpoint points to: where it was, or else in the folder of today."""
    for one in (Path(pointer["folder"]), folder):
        if one is not None:
            run = RunRecord(one, run_name(str(pointer["run"])))
            if run.steps():
                return run
    return None


def _claimed(folder: Path, name: str) -> str:
    """A name that no run of the folder has, claimed at once: trainings that begin side by side replace nothing."""
    runs = schema.step_file(folder, schema.EXAMPLES, name, 0).parent.parent
    runs.mkdir(parents=True, exist_ok=True)
    candidate, number = name, 1
    while True:
        try:
            # Of several that ask for one folder at the same moment, one alone makes it.
            schema.step_file(folder, schema.EXAMPLES, candidate, 0).parent.mkdir()
        except FileExistsError:
            number += 1
            candidate = f"{name}-{number}"
        else:
            return candidate
