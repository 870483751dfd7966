"""Writes one run of a record: two Parquet files per analysis, the probe's text, and what the figures are of.

A file is written beside its place, flushed to the disk and renamed, so that a reader sees a whole file or none.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from globenc_lightning.errors import RecordError
from globenc_lightning.measurement import About, HistoryEntry, Measurement
from globenc_lightning.probe import ProbeSet
from globenc_lightning.record import further, schema
from globenc_lightning.record.libraries import load_pyarrow
from globenc_lightning.record.words import word_numbers
from globenc_lightning.report.room import require_free

DTYPES = ("float32", "float16")
LAST = "last"
UNFINISHED = ".part"
"""How the name of a file ends that is still being written; it begins with a dot, so that readers pass it over."""
PACKAGES = ("globenc-lightning", "torch", "transformers", "pytorch-lightning", "lightning", "numpy", "scipy")
PARQUET = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
"""Attributions are all different numbers: dictionaries and statistics of them cost time and space. Of 14 MB, zstd saves
2 MB in 73 ms, snappy 0.5 MB in 52 ms."""
UNCOUNTED = ("regression", "loss")
"""Kinds that decide for a value, and for no class, token or partner."""
BY_TOKEN = ("tokens", "labels", "truths")
"""What ``About`` holds of each example: it stands in the probe's file."""


@dataclass(frozen=True)
class RecordOptions:
    """What is recorded, and where: what ``GlobEncCallback(record=...)`` takes.

    Attributes:
        folder: a folder that several runs may share; None for ``globenc/`` in the logger's run folder.
        run: the run's name; None for the logger's name and version.
        dtype: how attributions and saliency are stored, ``"float32"`` or ``"float16"`` (three digits, and infinity
            above 65,504).
        methods: whose attributions are stored; None for all that are computed. Correlations are stored of all.
        layers: whose attributions are stored, as numbers from 1; ``"last"``; or None for all.

    Raises:
        ValueError: an option that cannot be used.
    """

    folder: str | os.PathLike[str] | None = None
    run: str | None = None
    dtype: str = "float32"
    methods: Sequence[str] | None = None
    layers: Sequence[int] | str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be 'float32' or 'float16'; got {self.dtype!r}")
        if isinstance(self.methods, str):
            raise ValueError(f"methods must be a list of names, such as ['N-Enc']; got {self.methods!r}")
        wanted = "layers must be None, 'last' or numbers from 1, such as [1, 6, 12]"
        if isinstance(self.layers, str):
            if self.layers != LAST:
                raise ValueError(f"{wanted}; got {self.layers!r}")
        elif self.layers is not None:
            for one in self.layers:
                if isinstance(one, bool) or not isinstance(one, int) or one < 1:
                    raise ValueError(f"{wanted}; got {one!r} among them")

    def chosen_methods(self, methods: Sequence[str]) -> list[str]:
        """Returns those of the computed methods whose attributions are stored."""
        return [one for one in methods if self.methods is None or one in self.methods]

    def chosen_layers(self, layers: int) -> list[int]:
        """Returns the numbers, from 1, of those of so many layers whose attributions are stored."""
        if self.layers is None:
            return [*range(1, layers + 1)]
        return [layers] if isinstance(self.layers, str) else [one for one in sorted(set(self.layers)) if one <= layers]


class RunRecord:
    """One run of a record, written by one process.

    Args:
        folder: the record's folder; it is made when something is written.
        run: the run's name, as :func:`~globenc_lightning.record.schema.run_name` gives it.
        options: what is recorded.

    Raises:
        ValueError: a name that cannot stand in a path.
    """

    def __init__(self, folder: str | os.PathLike[str], run: str, options: RecordOptions | None = None) -> None:
        if run != schema.run_name(run):
            raise ValueError(f"a run's name holds letters, digits and ._+- alone, such as {schema.run_name(run)!r}")
        self.folder, self.run = Path(folder), run
        self._options = options or RecordOptions()
        self._probe_written = ""
        self._about_written = ""
        self._besides: dict[str, Any] = {}
        self._begun = False

    def write(
        self,
        measurement: Measurement,
        probe: ProbeSet,
        entry: HistoryEntry,
        about: About,
        *,
        extra: Mapping[str, Any] | None = None,
        validation: bool = True,
    ) -> None:
        """Write an analysis; the files of an earlier one at the same step are replaced.

        Args:
            measurement: the figures.
            probe: the examples.
            entry: the history's entry of the measurement, which says the step and the epoch.
            about: what the figures are of.
            extra: what is told of the run besides, in JSON's primitives: seed, hyperparameters.
            validation: whether a validation asked for it.

        Raises:
            RecordError: pyarrow is not installed.
            OSError: there is no room on the disk, or the folder cannot be written.
        """
        pyarrow = load_pyarrow()
        if not self._begun:
            self._clear_unfinished()
            self._begun = True
        self._write_about(measurement, about, extra or {})
        self._write_probe(pyarrow, measurement, probe, about)
        tokens = _tokens(pyarrow, measurement, entry.step, self._options)
        examples = _examples(pyarrow, measurement, probe, entry, about, validation)
        # Whoever finds the examples finds the tokens: an analysis is there when its examples are.
        self._write_tables(
            {
                schema.step_file(self.folder, schema.TOKENS, self.run, entry.step): tokens,
                schema.step_file(self.folder, schema.EXAMPLES, self.run, entry.step): examples,
            }
        )

    def steps(self) -> list[int]:
        """Returns the steps of the analyses that are there, in ascending order."""
        return sorted(self._steps_of(schema.TOKENS) & self._steps_of(schema.EXAMPLES))

    def holds_history(self, methods: Sequence[str], layers: int) -> bool:
        """Returns whether :meth:`entries` gives all that a history needs: the last layer's rows of every method."""
        options = self._options
        return options.chosen_methods(methods) == [*methods] and layers in options.chosen_layers(layers)

    def entries(self, until: int | None = None) -> list[HistoryEntry]:
        """Returns the history's entries that the record holds, up to a step, as they were when they were written.

        Attributions that are stored in float16 come back rounded.

        Raises:
            RecordError: a file that cannot be read.
        """
        pyarrow = load_pyarrow()
        return [self._entry(pyarrow, step) for step in self.steps() if until is None or step <= until]

    def take_over(self, other: "RunRecord", until: int) -> None:
        """Copy another run's probe, choices and analyses up to a step: this run goes on from there."""
        for step in other.steps():
            if step <= until:
                self._copy(
                    {
                        schema.step_file(self.folder, kind, self.run, step): schema.step_file(
                            other.folder, kind, other.run, step
                        )
                        for kind in (schema.TOKENS, schema.EXAMPLES)
                    }
                )
        for place in (schema.probe_file, schema.about_file):
            file = place(other.folder, other.run)
            if file.exists():
                self._copy({place(self.folder, self.run): file})

    def forget_after(self, step: int) -> None:
        """Remove the files of later steps: they are of a training that never was, since this one goes on earlier."""
        for kind in (schema.EXAMPLES, schema.TOKENS):
            for later in self._steps_of(kind):
                if later > step:
                    schema.step_file(self.folder, kind, self.run, later).unlink(missing_ok=True)

    def _steps_of(self, kind: str) -> set[int]:
        folder = schema.step_file(self.folder, kind, self.run, 0).parent
        found = [schema.step_of(file) for file in folder.iterdir()] if folder.is_dir() else []
        return {step for step in found if step is not None}

    def _clear_unfinished(self) -> None:
        """Remove what a killed process was writing of this run; another run's files in the same folder stay."""
        about = schema.about_file(self.folder, self.run)
        own = {
            schema.step_file(self.folder, schema.TOKENS, self.run, 0).parent: r"\..+",
            schema.step_file(self.folder, schema.EXAMPLES, self.run, 0).parent: r"\..+",
            schema.probe_file(self.folder, self.run).parent: r"\..+",
            about.parent: rf"\.{re.escape(about.name)}\.\d+",
        }
        for folder, name in own.items():
            for file in [*folder.glob(f".*{UNFINISHED}")]:
                if re.fullmatch(name + re.escape(UNFINISHED), file.name):
                    file.unlink(missing_ok=True)

    def _write_about(self, measurement: Measurement, about: About, extra: Mapping[str, Any]) -> None:
        methods, layers = [*measurement.correlation], _layers_of(measurement)
        # Its state_dict() copies every token.
        chosen = {one: value for one, value in vars(about).items() if one not in BY_TOKEN}
        if not self._about_written:
            self._besides = _recorded(schema.about_file(self.folder, self.run))
        self._besides = further.said(measurement, self._besides)
        said = {
            "schema": schema.SCHEMA,
            "run": self.run,
            "about": chosen,
            **extra,
            "versions": _versions(),
            "probe": about.probe,
            "examples": len(measurement.names),
            "methods": methods,
            "layers": layers,
            "recorded": {
                "dtype": self._options.dtype,
                "methods": self._options.chosen_methods(methods),
                "layers": self._options.chosen_layers(layers),
                **self._besides,
            },
            "columns": _described(about, methods, layers, self._options, self._besides),
        }
        text = _json(said)
        if text != self._about_written:
            file = schema.about_file(self.folder, self.run)
            created = _created(file)
            data = _json({**said, "created": created}, indent=1).encode("utf-8", "backslashreplace")
            _replace({file: len(data)}, lambda path, _: path.write_bytes(data))
            self._about_written = text

    def _write_probe(self, pyarrow: Any, measurement: Measurement, probe: ProbeSet, about: About) -> None:
        told = hashlib.sha256(repr((about.probe, about.text, measurement.names)).encode("utf-8", "backslashreplace"))
        if told.hexdigest() != self._probe_written:
            self._write_tables({schema.probe_file(self.folder, self.run): _probe(pyarrow, measurement, probe)})
            self._probe_written = told.hexdigest()

    def _write_tables(self, tables: Mapping[Path, Any]) -> None:
        from pyarrow import parquet

        sizes = {file: table.nbytes for file, table in tables.items()}
        _replace(sizes, lambda path, file: parquet.write_table(tables[file], path, **PARQUET))

    def _copy(self, sources: Mapping[Path, Path]) -> None:
        sizes = {file: source.stat().st_size for file, source in sources.items()}
        _replace(sizes, lambda path, file: shutil.copyfile(sources[file], path))

    def _entry(self, pyarrow: Any, step: int) -> HistoryEntry:
        examples = _read(schema.step_file(self.folder, schema.EXAMPLES, self.run, step))
        rhos = [(schema.parsed_column(name), name) for name in examples.column_names if name.startswith("rho/")]
        by_layer: dict[str, list[NDArray[np.float64]]] = {}
        for parsed, name in rhos:
            if parsed is not None:
                by_layer.setdefault(parsed[0], []).append(examples[name].to_numpy())
        layers = len(next(iter(by_layer.values()), []))
        last = [schema.attribution_column(method, layers) for method in by_layer]
        # The history keeps the last layer's rows: of 12 layers, the other 11 are not read.
        file = schema.step_file(self.folder, schema.TOKENS, self.run, step)
        tokens = _read(file, ["example", "saliency", *last, *further.wanted(_names(file))])
        owner = tokens["example"].to_numpy()
        lengths = np.bincount(owner, minlength=len(examples)).tolist()

        def per_example(name: str) -> list[Tensor]:
            return [*torch.from_numpy(tokens[name].to_numpy().astype(np.float32)).split(lengths)]

        return HistoryEntry.from_parts(
            step=step,
            epoch=examples["epoch"][0].as_py(),
            by_example={method: torch.from_numpy(np.stack(one, 1)) for method, one in by_layer.items()},
            rows={method: per_example(schema.attribution_column(method, layers)) for method in by_layer},
            saliency=per_example("saliency"),
            predicted=torch.tensor([one or 0 for one in examples["predicted"].to_pylist()]),
            score=_floats(examples["score"]),
            position=examples["decided_position"].to_pylist(),
            answers=[tuple(one) for one in examples["answers"].to_pylist()],
            probability=_floats(examples["probability"]),
            texts=[int(one.partition("-")[0], 16) for one in examples["text_hash"].to_pylist()],
            validation=examples["validation"][0].as_py(),
            **further.restored(examples, tokens, per_example),
        )


def _replace(sizes: Mapping[Path, int], write: Callable[[Path, Path], Any]) -> None:
    """Write files beside their places, flush them to the disk, and put all of them there once all are whole.

    Args:
        sizes: file -> about how many bytes it takes.
        write: called with the place beside and the file.

    Raises:
        OSError: there is no room for all of them, or they cannot be written; then none of them is changed.
    """
    for file in sizes:
        file.parent.mkdir(parents=True, exist_ok=True)
        require_free(file.parent, sum(sizes.values()))
    with ExitStack() as stack:
        beside = {file: file.with_name(f".{file.name}.{os.getpid()}{UNFINISHED}") for file in sizes}
        for file, path in beside.items():
            stack.callback(path.unlink, missing_ok=True)
            write(path, file)
            with path.open("rb+") as written:
                os.fsync(written.fileno())
        for file, path in beside.items():
            path.replace(file)
    for folder in {file.parent for file in sizes}:
        _flush_folder(folder)


def _read(file: Path, columns: list[str] | None = None) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(file, columns=columns, partitioning=None)
    except (ArrowException, OSError) as error:
        raise RecordError(f"{file} cannot be read as Parquet: {error}") from error


def _names(file: Path) -> list[str]:
    """The columns of a file."""
    from pyarrow import ArrowException, parquet

    try:
        return [*parquet.read_schema(file).names]
    except (ArrowException, OSError) as error:
        raise RecordError(f"{file} cannot be read as Parquet: {error}") from error


def _floats(column: Any) -> Tensor:
    return torch.tensor([float("nan") if one is None else one for one in column.to_pylist()], dtype=torch.float32)


def _flush_folder(folder: Path) -> None:
    """See to it that a renamed file is found under its new name after a power failure, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders.
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _created(file: Path) -> str:
    """When a run was begun: as its file says, else now."""
    try:
        return str(json.loads(file.read_text("utf-8"))["created"])
    except (OSError, ValueError, KeyError, TypeError):
        return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _recorded(file: Path) -> dict[str, Any]:
    """What a run's file says that the run holds; nothing where there is no such file yet."""
    try:
        return dict(json.loads(file.read_text("utf-8"))["recorded"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _json(said: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_plain(said), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """A value in what JSON holds: NaN and infinity, which it has not, and whatever else is strange as text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _layers_of(measurement: Measurement) -> int:
    return next((rho.shape[1] for rho in measurement.correlation.values()), 0)


def _described(
    about: About, methods: Sequence[str], layers: int, options: RecordOptions, besides: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """What each column of each file holds."""
    kinds = ((schema.TOKENS, schema.TOKEN_COLUMNS), (schema.EXAMPLES, schema.EXAMPLE_COLUMNS))
    told = {
        kind: {name: text for name, (_, text) in columns.items()}
        for kind, columns in (*kinds, (schema.PROBE, schema.PROBE_COLUMNS))
    }
    for method in methods:
        for layer in range(1, layers + 1):
            told[schema.EXAMPLES][schema.rho_column(method, layer)] = (
                f"Spearman's rho of the {method} row at layer {layer} with the saliency; NaN where undefined"
            )
    for method in options.chosen_methods(methods):
        for layer in options.chosen_layers(layers):
            told[schema.TOKENS][schema.attribution_column(method, layer)] = (
                f"the readout row of the {method} {about.aggregation} up to layer {layer}"
            )
    for kind, columns in further.described(besides, methods, layers).items():
        told[kind] |= columns
    return told


def _tokens(pyarrow: Any, measurement: Measurement, step: int, options: RecordOptions) -> Any:
    """The table of attributions: a row per token of each example."""
    dtype = np.float16 if options.dtype == "float16" else np.float32
    lengths = np.array([len(one) for one in measurement.saliency], dtype=np.int64)
    total = int(lengths.sum())
    starts = np.repeat(lengths.cumsum() - lengths, lengths)
    saliency = torch.cat(measurement.saliency).float().numpy().astype(dtype)
    columns: dict[str, NDArray[Any]] = {
        "step": np.full(total, step, dtype=np.int64),
        "example": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        "position": (np.arange(total) - starts).astype(np.int32),
        "saliency": saliency,
    }
    layers = options.chosen_layers(_layers_of(measurement))
    for method in options.chosen_methods([*measurement.correlation]):
        # An example without a real token has no rows.
        rows = torch.cat([one[method] for one in measurement.rows if one], 1).float().numpy().astype(dtype)
        columns |= {schema.attribution_column(method, layer): rows[layer - 1] for layer in layers}
    return pyarrow.table(columns | further.token_columns(measurement, dtype))


def _examples(
    pyarrow: Any, measurement: Measurement, probe: ProbeSet, entry: HistoryEntry, about: About, validation: bool
) -> Any:
    """The table of decisions and correlations: a row per example."""
    size, task = len(measurement.names), measurement.task
    truths = [measurement.truth(index, row) for index, row in enumerate(probe.rows)]
    ids = measurement.ids or [None] * size
    has_losses = len(measurement.losses) == size
    columns = {
        "step": [entry.step] * size,
        "epoch": [entry.epoch] * size,
        "example": [*range(size)],
        "task": [task] * size,
        "score": _numbers(measurement.score, size),
        "predicted": [None if task in UNCOUNTED else int(one) for one in measurement.predicted],
        "label": [one[0] if one else None for one in truths],
        "loss": _numbers(measurement.losses, size) if has_losses else [None] * size,
        "logits": [one.tolist() for one in measurement.logits] or [[]] * size,
        "text_hash": [_text_hash(text, ids[one] is not None, about.probe, one) for one, text in enumerate(entry.texts)],
        "probability": _numbers(measurement.probability, size),
        "value": _numbers(measurement.values, size),
        "answers": [[*measurement.answer(index)] for index in range(size)],
        "truths": [[*one] for one in truths],
        "decided_position": list(measurement.position) or [None] * size,
        "validation": [validation] * size,
    }
    arrays = {
        name: pyarrow.array(columns[name], type=_type(pyarrow, kind))
        for name, (kind, _) in schema.EXAMPLE_COLUMNS.items()
    }
    for method, rho in measurement.correlation.items():
        arrays |= {
            schema.rho_column(method, layer + 1): one.double().numpy() for layer, one in enumerate(rho.unbind(1))
        }
    return further.with_metadata(pyarrow.table(arrays | further.example_columns(pyarrow, measurement)), measurement)


def _probe(pyarrow: Any, measurement: Measurement, probe: ProbeSet) -> Any:
    """The table of the probe's text: a row per token of each example."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.PROBE_COLUMNS}
    for index, names in enumerate(measurement.names):
        size = len(names)
        ids = measurement.ids[index] if measurement.ids else None
        marks = _marks(probe, index, ids, size)
        truth = measurement.truth(index, probe.rows[index])
        columns["example"] += [index] * size
        columns["position"] += [*range(size)]
        columns["token_id"] += [None] * size if ids is None else ids.tolist()
        columns["token"] += [str(name).encode("utf-8", "backslashreplace").decode("utf-8") for name in names]
        columns["word"] += word_numbers(names, marks)
        columns["special"] += marks
        columns["label"] += [truth[0] if truth else None] * size
        columns["text"] += [_text(probe, index, ids)] * size
    return pyarrow.table(
        {
            name: pyarrow.array(columns[name], type=_type(pyarrow, kind))
            for name, (kind, _) in schema.PROBE_COLUMNS.items()
        }
    )


def _marks(probe: ProbeSet, index: int, ids: Tensor | None, size: int) -> list[bool | None]:
    """Which tokens of an example are special; None where no tokenizer tells it."""
    if ids is not None and probe.tokenizer is not None:
        return [bool(one) for one in probe.marks_special(ids)]
    known = probe.special[index] if index < len(probe.special) else None
    return [None] * size if known is None or len(known) < size else [bool(one) for one in known[:size]]


def _text(probe: ProbeSet, index: int, ids: Tensor | None) -> str | None:
    if index < len(probe.texts):
        text = probe.texts[index]
    elif ids is not None and probe.tokenizer is not None and hasattr(probe.tokenizer, "decode"):
        text = probe.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    else:
        return None
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _text_hash(number: int, has_ids: bool, probe: str, index: int) -> str:
    """What tells a text from others: a number of its token ids; else, beside that of its positions, of its probe."""
    told = "" if has_ids else f"-{hashlib.sha256(f'{probe} {index}'.encode()).hexdigest()[:8]}"
    return f"{number:08x}{told}"


def _numbers(values: Tensor, size: int) -> list[float | None]:
    """One number per example, None where there is none."""
    if len(values) != size:
        return [None] * size
    return [None if one != one else one for one in values.tolist()]


def _type(pyarrow: Any, name: str) -> Any:
    """The type of a column that the schema names."""
    if name.startswith("list<"):
        return pyarrow.list_(_type(pyarrow, name[5:-1]))
    return {"float": pyarrow.float32(), "double": pyarrow.float64(), "bool": pyarrow.bool_()}.get(
        name
    ) or pyarrow.type_for_alias(name)
