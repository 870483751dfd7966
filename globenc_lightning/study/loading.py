"""Finds the runs of records, and refuses to mix those that cannot be compared."""

import glob
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from globenc_lightning.errors import GlobEncWarning, RecordError
from globenc_lightning.record import schema
from globenc_lightning.record.libraries import load_pandas, load_pyarrow
from globenc_lightning.record.reading import Record

if TYPE_CHECKING:
    from globenc_lightning.study.study import Study

CHOICES = ("task", "score", "target", "readout", "normalize", "exclude_special_tokens", "rule", "text", "aggregation")
"""What makes figures those of another thing, where runs have chosen it differently."""
LATER = {"aggregation": "rollout"}
"""Choices that records of earlier versions do not tell, and what they were."""

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a study.

    Attributes:
        label: its name in the study: that of the run, with its folder where two runs have the same.
        name: its name in the record.
        record: the record.
        about: what the figures are of.
    """

    label: str
    name: str
    record: Record
    about: dict[str, Any]

    @property
    def seed(self) -> int | None:
        """The training's seed, if it is known."""
        seed = self.about.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def probe(self) -> str:
        """The fingerprint of the probe."""
        return str(self.about.get("probe", ""))


def load(folders: Folders, *, runs: Sequence[str] | None = None, probe: str | None = None) -> "Study":
    """Returns a study of the runs in one or several folders, finished or still running.

    Args:
        folders: folders of records, folders that hold such (``lightning_logs`` with ``version_0/globenc``), or patterns
            with ``*``.
        runs: the names of the runs that are taken, or None for all.
        probe: the fingerprint of the probe whose runs are taken; None where all have the same.

    Raises:
        RecordError: there is no record, no such run, runs of different probes or encoders, or pandas and pyarrow are
            not installed.
    """
    from globenc_lightning.study.study import Study

    load_pyarrow()
    load_pandas()
    records = [Record.open(folder) for folder in _record_folders(folders)]
    found = [(record, name) for record in records for name in record.runs if record.steps(name)]
    if not found:
        raise RecordError(f"no run of {_named(records)} has an analysis yet.")
    names = [name for _, name in found]
    if runs is not None:
        unknown = [one for one in runs if one not in names]
        if unknown:
            raise RecordError(f"there is no run {unknown[0]!r}; there are {', '.join(sorted(set(names)))}.")
        found = [(record, name) for record, name in found if name in runs]
    labels = _labels(found)
    loaded = [Run(label, name, record, record.about(name)) for label, (record, name) in zip(labels, found, strict=True)]
    chosen = _of_one_probe(loaded, probe)
    for remark in remarks(chosen):
        warnings.warn(remark, GlobEncWarning, stacklevel=2)
    return Study(chosen)


def remarks(runs: Sequence[Run]) -> list[str]:
    """Returns what does not keep runs from being compared, but changes what a mean over them says."""
    found = []
    for name in CHOICES:
        values: dict[Any, list[str]] = {}
        for run in runs:
            told = {**LATER, **(run.about.get("about") or {})}
            if name in told:
                values.setdefault(told[name], []).append(run.label)
        if len(values) > 1:
            found.append(
                f"these runs differ in {name}: {_told(values)}. Their figures are not of the same thing: choose runs "
                "with study.load(..., runs=[...])."
            )
    recorded = [run.about["recorded"] for run in runs]
    sets = {
        "the correlations of method": [run.about["methods"] for run in runs],
        "the attributions of method": [one["methods"] for one in recorded],
        "the attributions of layer": [one["layers"] for one in recorded],
        "the correlations with": [["saliency", *one.get("references", ())] for one in recorded],
        "the faithfulness of method": [one.get("faithfulness", []) for one in recorded],
    }
    for things, each in sets.items():
        every = {*each[0]}.intersection(*each)
        absent = sorted({one for some in each for one in some if one not in every})
        if absent and every:
            found.append(f"not all runs have {things} {', '.join(map(str, absent))}: left out.")
    return found


def _record_folders(folders: Folders) -> Iterator[Path]:
    given = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    if not given:
        raise RecordError("no folder was given: give the folder that GlobEncCallback(record=...) wrote.")
    seen: set[Path] = set()
    for one in given:
        text = os.fspath(one)
        matching = [Path(text)] if os.path.exists(text) else sorted(map(Path, glob.glob(text, recursive=True)))
        if not matching:
            raise RecordError(f"there is no folder {text}, and none that matches it.")
        for path in matching:
            records = [path] if (path / schema.ABOUT).is_dir() else sorted(_within(path))
            if not records and len(matching) == 1:
                # Says what a record is.
                Record.open(path)
            for record in records:
                if record.resolve() not in seen:
                    seen.add(record.resolve())
                    yield record


def _within(path: Path) -> Iterator[Path]:
    """The folders of records below a folder."""
    for about in path.glob(f"**/{schema.ABOUT}"):
        if about.is_dir() and any(about.glob("*.json")) and (about.parent / schema.EXAMPLES).is_dir():
            yield about.parent


def _named(records: Sequence[Record]) -> str:
    return ", ".join(str(record.folder) for record in records) or "these folders"


def _labels(found: Sequence[tuple[Record, str]]) -> list[str]:
    """A label per run: its name; with as much of its folder as it takes where several have the same."""
    names = [name for _, name in found]
    labels = []
    for record, name in found:
        label, parts = name, [*record.folder.resolve().parts]
        twins = [other for other, same in found if same == name and other is not record]
        if names.count(name) > 1:
            # Folders are the same from the right on, such as .../version_0/globenc.
            depth = 1
            while depth < len(parts) and any(
                [*twin.folder.resolve().parts][-depth:] == parts[-depth:] for twin in twins
            ):
                depth += 1
            label = "/".join([*parts[-depth:], name])
        labels.append(label)
    return labels


def _of_one_probe(runs: Sequence[Run], probe: str | None) -> list[Run]:
    """The runs of one probe and one encoder.

    Raises:
        RecordError: there are several, and none was chosen.
    """
    probes: dict[str, list[str]] = {}
    for run in runs:
        probes.setdefault(run.probe, []).append(run.label)
    if probe is not None:
        if probe not in probes:
            raise RecordError(f"no run has the probe {probe!r}; there are {_told(probes)}.")
        runs = [run for run in runs if run.probe == probe]
    elif len(probes) > 1:
        raise RecordError(
            f"these runs have different probes, whose examples cannot be compared: {_told(probes)}. Choose one with "
            f"study.load(..., probe={next(iter(probes))!r}), or runs=[...]."
        )
    layers = {run.label: run.about.get("layers") for run in runs}
    if len(set(layers.values())) > 1:
        told = ", ".join(f"{label} has {count}" for label, count in layers.items())
        raise RecordError(f"these runs have encoders of different depth, whose layers cannot be compared: {told}.")
    return [*runs]


def _told(values: dict[Any, list[str]]) -> str:
    """Which runs have which value, a few of each."""
    few = {one: ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "") for one, labels in values.items()}
    return "; ".join(f"{one} ({labels})" for one, labels in few.items())
