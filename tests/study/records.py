"""Small records that are written by hand: every figure in them is known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from globenc_lightning.record import schema

LENGTHS = (9, 7, 5, 12, 2, 1, 8, 6)
"""Tokens per example: two of them, and one alone, are among them."""
WORDS = ("not", "good", "no", "##body", "film", "!", "bad", "never", ".", "plot")


@dataclass
class Written:
    """A run in a record, with what was written.

    Attributes:
        rows: (step, method, layer) -> a row per example.
        rho: (step, method, layer) -> one value per example.
        predicted: step -> the class of each example.
        logits: step -> (b, c).
        labels: of each example.
        tokens: of each example.
        special: of each example, which tokens are special.
    """

    folder: Path
    name: str
    rows: dict[tuple[int, str, int], list[NDArray[np.float64]]] = field(default_factory=dict)
    rho: dict[tuple[int, str, int], NDArray[np.float64]] = field(default_factory=dict)
    predicted: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    logits: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    special: list[list[bool]] = field(default_factory=list)


def texts(lengths: Sequence[int]) -> list[list[str]]:
    """Tokens of each example: [CLS] and [SEP] around words that go round."""
    found = []
    for index, length in enumerate(lengths):
        inner = [WORDS[(index + place) % len(WORDS)] for place in range(max(0, length - 2))]
        found.append(["[CLS]", *inner, "[SEP]"][:length])
    return found


def write_run(
    folder: Path,
    name: str,
    *,
    seed: int | None = 0,
    steps: Sequence[int] = (10, 20, 30),
    methods: Sequence[str] = ("N-Enc", "W-Res"),
    layers: int = 2,
    recorded_methods: Sequence[str] | None = None,
    recorded_layers: Sequence[int] | None = None,
    lengths: Sequence[int] = LENGTHS,
    draws: int | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    probe: str = "one probe",
    labels: Sequence[int] | None = None,
    rows: Mapping[tuple[int, str, int], Sequence[NDArray[np.float64]]] | None = None,
    predicted: Mapping[int, Sequence[int]] | None = None,
    special: bool = True,
    tokens: Sequence[Sequence[str]] | None = None,
) -> Written:
    """Write a run whose figures are drawn at random, or given.

    Args:
        draws: what the figures are drawn with; the seed when None.
        rows: figures that are given: (step, method, layer) -> a row per example.
        predicted: step -> the class of each example.
        special: whether the probe tells which tokens are special.
    """
    draw = np.random.default_rng((seed or 0) if draws is None else draws)
    size = len(lengths)
    words = texts(lengths) if tokens is None else [[*one] for one in tokens]
    made = Written(folder, name, tokens=words)
    made.labels = [index % 2 for index in range(size)] if labels is None else [*labels]
    made.special = [[token.startswith("[") for token in one] for one in words]
    kept_methods = [*methods] if recorded_methods is None else [*recorded_methods]
    kept_layers = [*range(1, layers + 1)] if recorded_layers is None else [*recorded_layers]
    for step in steps:
        for method in methods:
            for layer in range(1, layers + 1):
                key = (step, method, layer)
                drawn = [draw.dirichlet(np.ones(length)) for length in lengths]
                made.rows[key] = [*(rows or {}).get(key, drawn)]
                made.rho[key] = draw.uniform(-1, 1, size)
                # An example with one token has no rank correlation.
                made.rho[key][np.array(lengths) < 2] = np.nan
        made.logits[step] = draw.normal(size=(size, 2))
        made.predicted[step] = made.logits[step].argmax(1)
        if predicted is not None:
            made.predicted[step] = np.array(predicted[step])
        _write(schema.step_file(folder, schema.TOKENS, name, step), _tokens(made, step, kept_methods, kept_layers))
        _write(schema.step_file(folder, schema.EXAMPLES, name, step), _examples(made, step, methods, layers))
    _write(schema.probe_file(folder, name), _probe(made, special))
    about = {
        "schema": schema.SCHEMA,
        "run": name,
        "about": {"task": "classification"},
        "seed": seed,
        "hyperparameters": dict(hyperparameters or {}),
        "versions": {},
        "probe": probe,
        "examples": size,
        "methods": [*methods],
        "layers": layers,
        "recorded": {"dtype": "float32", "methods": kept_methods, "layers": kept_layers},
        "columns": {},
        "created": "2024-01-01T00:00:00+0000",
    }
    file = schema.about_file(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about), "utf-8")
    return made


def _tokens(made: Written, step: int, methods: Sequence[str], layers: Sequence[int]) -> Any:
    rows = next(one for (at, _, _), one in made.rows.items() if at == step)
    lengths = [len(one) for one in rows]
    columns: dict[str, Any] = {
        "step": np.full(sum(lengths), step, dtype=np.int64),
        "example": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        "position": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        "saliency": np.ones(sum(lengths), dtype=np.float32),
    }
    for method in methods:
        for layer in layers:
            # Doubles, so that a reference has the very figures.
            columns[schema.attribution_column(method, layer)] = np.concatenate(made.rows[step, method, layer])
    return pa.table(columns)


def _examples(made: Written, step: int, methods: Sequence[str], layers: int) -> Any:
    size = len(made.labels)
    predicted = made.predicted[step].tolist()
    columns: dict[str, Any] = {
        "step": [step] * size,
        "epoch": [0] * size,
        "example": [*range(size)],
        "task": ["classification"] * size,
        "score": made.logits[step].max(1).tolist(),
        "predicted": predicted,
        "label": [float(one) for one in made.labels],
        "loss": [0.5] * size,
        "logits": made.logits[step].tolist(),
        "text_hash": [f"{index:08x}" for index in range(size)],
        "probability": [0.5] * size,
        "value": [None] * size,
        "answers": [[one] for one in predicted],
        "truths": [[float(one)] for one in made.labels],
        "decided_position": [0] * size,
        "validation": [True] * size,
    }
    types = {"float": pa.float32(), "double": pa.float64(), "bool": pa.bool_(), "string": pa.string()}
    types |= {"list<float>": pa.list_(pa.float32()), "list<int64>": pa.list_(pa.int64())}
    types |= {"list<double>": pa.list_(pa.float64()), "int32": pa.int32(), "int64": pa.int64()}
    arrays = {name: pa.array(columns[name], types[kind]) for name, (kind, _) in schema.EXAMPLE_COLUMNS.items()}
    for method in methods:
        for layer in range(1, layers + 1):
            arrays[schema.rho_column(method, layer)] = pa.array(made.rho[step, method, layer])
    return pa.table(arrays)


def _probe(made: Written, special: bool) -> Any:
    columns: dict[str, list[Any]] = {name: [] for name in schema.PROBE_COLUMNS}
    for index, (tokens, marks) in enumerate(zip(made.tokens, made.special, strict=True)):
        word = -1
        for position, (token, mark) in enumerate(zip(tokens, marks, strict=True)):
            word += not mark and not token.startswith("##")
            columns["example"].append(index)
            columns["position"].append(position)
            columns["token_id"].append(position)
            columns["token"].append(token)
            columns["word"].append(None if mark or not special else word)
            columns["special"].append(mark if special else None)
            columns["label"].append(float(made.labels[index]))
            columns["text"].append(" ".join(tokens))
    types = {"int32": pa.int32(), "int64": pa.int64(), "string": pa.string(), "bool": pa.bool_(), "double": pa.float64()}
    return pa.table({name: pa.array(columns[name], types[kind]) for name, (kind, _) in schema.PROBE_COLUMNS.items()})


def _write(file: Path, table: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file)
