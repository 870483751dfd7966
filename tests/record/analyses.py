"""Makes measurements, probes and what is said of them without a model, at random but the same every time."""

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.measurement import About, HistoryEntry, Measurement, history_entry
from globenc_lightning.measurement import about as about_of
from globenc_lightning.probe import ProbeSet
from globenc_lightning.record.writing import RecordOptions, RunRecord
from globenc_lightning.settings import Settings
from globenc_lightning.task.kinds import VALUES

METHODS = ("N-Enc", "N-Res")
LENGTHS = (5, 3, 7, 2)
CLASSES = 3
TASKS = (
    "classification",
    "binary",
    "multi-label",
    "regression",
    "token classification",
    "masked token",
    "next token",
    "span",
    "choice",
    "similarity",
    "text to text",
    "loss",
)


@dataclass(frozen=True)
class Made:
    """One analysis, and everything that a record asks for beside it."""

    measurement: Measurement
    probe: ProbeSet
    entry: HistoryEntry
    about: About

    def write(self, run: RunRecord, **options: Any) -> None:
        """Write it into a run."""
        run.write(self.measurement, self.probe, self.entry, self.about, **options)


def made(
    step: int = 1,
    *,
    task: str = "classification",
    lengths: Sequence[int] = LENGTHS,
    layers: int = 2,
    methods: Sequence[str] = METHODS,
    tokens: Sequence[Sequence[str]] | None = None,
    epoch: int = 0,
    validation: bool = True,
    **parts: Any,
) -> Made:
    """Returns an analysis of a probe; other steps have other figures.

    Args:
        step: the step, which seeds the figures.
        task: the kind of decision.
        lengths: how many tokens each example has.
        layers: how many layers there are.
        methods: the methods.
        tokens: what stands at the positions.
        epoch: the epoch.
        validation: whether a validation asked for it.
        **parts: of the measurement, in place of those that are drawn.
    """
    measurement = replace(_drawn(step, task, lengths, layers, methods, tokens), **parts)
    probe = probe_of(measurement)
    settings = Settings(tuple(methods))
    entry = history_entry(measurement, step, epoch, validation)
    return Made(measurement, probe, entry, about_of(measurement, probe, settings, "made for a test"))


def probe_of(measurement: Measurement) -> ProbeSet:
    """Returns a probe with a measurement's tokens, the first and the last of each example special."""
    special = []
    rows = []
    for names, ids in zip(measurement.names, measurement.ids, strict=True):
        marks = torch.zeros(len(names), dtype=torch.bool)
        marks[:1], marks[-1:] = True, True
        special.append(marks)
        rows.append({} if ids is None else {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return ProbeSet(
        tuple(rows),
        frozenset({"input_ids", "attention_mask"}),
        tokens=tuple(tuple(one) for one in measurement.names),
        special=tuple(special),
        texts=tuple(" ".join(one[1:-1]) for one in measurement.names),
    )


def equal(one: Any, other: Any) -> bool:
    """Returns whether two values are the same to the last bit, NaN equal to itself; what tensors are in included."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return same and torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0))
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if is_dataclass(one) and type(one) is type(other):
        return equal(dict(vars(one)), dict(vars(other)))
    return bool(one == other)


def run_with(folder: Any, name: str, steps: Sequence[int], options: RecordOptions | None = None, **made_of: Any) -> Any:
    """Returns a run of a record in which these steps are written."""
    run = RunRecord(folder, name, options)
    for step in steps:
        made(step, **made_of).write(run)
    return run


def _drawn(
    step: int,
    task: str,
    lengths: Sequence[int],
    layers: int,
    methods: Sequence[str],
    tokens: Sequence[Sequence[str]] | None,
) -> Measurement:
    draw = torch.Generator().manual_seed(step)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    size = len(lengths)
    logits = [one * 4 - 2 for one in rand(size, 1 if task in (*VALUES, "binary") else CLASSES)]
    answers: list[tuple[int, ...]] = [(int(one.argmax()),) for one in logits]
    truths: list[tuple[float, ...]] = [(index % CLASSES,) for index in range(size)]
    probability = torch.stack([one.softmax(0).max() for one in logits])
    values = torch.full((size,), float("nan"))
    if task in VALUES:
        answers, values = [()] * size, torch.cat(logits)
        probability = torch.full((size,), float("nan"))
        truths = [(0.5 * index,) if task == "regression" else () for index in range(size)]
    elif task == "binary":
        answers = [(int(one > 0),) for one in logits]
        truths = [(index % 2,) for index in range(size)]
    elif task == "multi-label":
        answers = [tuple((one > 0).nonzero().flatten().tolist()) for one in logits]
        truths = [tuple(range(index % CLASSES)) for index in range(size)]
    elif task == "span":
        answers = [(0, length - 1) for length in lengths]
        truths = [(0, 1)] * size
    at_one = task not in ("span", "similarity", "loss")
    names = [tuple(f"word{place}" for place in range(length)) for length in lengths] if tokens is None else tokens
    return Measurement(
        correlation={method: rand(size, layers).double() * 2 - 1 for method in methods},
        rows=[{method: rand(layers, length) for method in methods} for length in lengths],
        last={},
        saliency=[rand(length) for length in lengths],
        predicted=torch.tensor([one[0] if one else 0 for one in answers]),
        probability=probability,
        reconstruction_error=torch.zeros(layers, dtype=torch.float64),
        readout="cls",
        rule="post-LN",
        calls=1,
        encoder="model.bert",
        head_reads="readout",
        names=[tuple(one) for one in names],
        task=task,
        score=torch.stack([one.max() for one in logits]),
        position=[0 if at_one else None] * size,
        answers=answers,
        truths=truths,
        # Lengths and the examples' numbers make the ids, so that another step has the same texts.
        ids=[torch.arange(length) + 10 * index for index, length in enumerate(lengths)],
        values=values,
        chances=[tuple(one.sigmoid().tolist()) if task == "multi-label" else () for one in logits],
        logits=logits,
        losses=rand(size),
    )
