"""Runs with further references, masked copies and signed scores in their records, of figures made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.dashboard import synthetic_measurement, write
from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.measurement import Measurement
from globenc_lightning.report.dashboard import store

REFERENCES = ("integrated gradients", "HTA")
MASKED = ("N-Enc", "W")
SIZES: dict[str, Any] = {"sentences": 6, "layers": 3, "tokens": 14, "methods": ("W", "N-Res", "N-Enc")}


def asked_measurement(
    validation: int,
    validations: int = 5,
    *,
    references: Sequence[str] = REFERENCES,
    masked: Sequence[str] = MASKED,
    signed: bool = True,
    unit: str = "probability",
    **sizes: Any,
) -> Measurement:
    """A synthetic measurement with what was asked for besides; figures of the masked copies grow over the training.

    The second sentence is left out of the gains.

    Args:
        validation: which one, from 0.
        validations: how many there are.
        references: what the rows are compared with besides the saliency.
        masked: the methods whose first tokens are masked.
        signed: whether there are signed scores.
        unit: of the masked copies' scores.
        **sizes: those of ``synthetic_measurement``.
    """
    measurement = synthetic_measurement(validation, validations, **{**SIZES, **sizes})
    lengths = [len(one) for one in measurement.names]
    draw = torch.Generator().manual_seed(validation)
    faithfulness = None
    if masked:
        gain = {}
        for place, method in enumerate(masked):
            values = 0.15 * validation - 0.4 * place + 0.3 * torch.randn(len(lengths), generator=draw).double()
            values[1] = float("nan")
            gain[method] = values
        flags = {method: [first(row[method][-1], 3) for row in measurement.rows] for method in masked}
        odds = {method: 3 * one.nan_to_num(0.1) for method, one in gain.items()}
        faithfulness = Faithfulness(
            gain=gain,
            sufficiency_gain={method: one - 0.2 for method, one in gain.items()},
            log_odds=odds if unit == "probability" else {},
            span=torch.full((len(lengths),), 0.5).double(),
            masked=flags,
            unit=unit,
        )
    return replace(
        measurement,
        references=[
            {one: torch.rand(length, generator=draw) for one in references} if references else {} for length in lengths
        ],
        reference_correlation={
            one: {method: (rho - 0.1 * (place + 1)).clamp(-1, 1) for method, rho in measurement.correlation.items()}
            for place, one in enumerate(references)
        },
        signed=[torch.randn(length, generator=draw) for length in lengths] if signed else [],
        left_out=torch.randn(len(lengths), generator=draw) if signed else torch.empty(0),
        faithfulness=faithfulness,
    )


def first(row: torch.Tensor, count: int) -> torch.Tensor:
    """Which tokens (k,) are the first by a row (k,), the special ones at both ends never."""
    inner = row.clone()
    inner[0] = inner[-1] = -1.0
    return torch.zeros(len(row), dtype=torch.bool).scatter_(0, inner.topk(min(count, len(row) - 2)).indices, True)


def asked_run(folder: Path, name: str, changes: Sequence[dict[str, Any]]) -> list[Measurement]:
    """Write a run of one validation per mapping of changes.

    Args:
        folder: TensorBoard's.
        name: the run's, below it.
        changes: per validation the arguments of :func:`asked_measurement`; ``names`` replaces tokens.

    Returns:
        What was written.
    """
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    written = []
    for validation, change in enumerate(changes):
        others = {key: value for key, value in change.items() if key != "names"}
        measurement = asked_measurement(validation, len(changes), **others)
        for index, tokens in change.get("names", {}).items():
            names = list(measurement.names[index])
            names[1 : 1 + len(tokens)] = tokens
            measurement.names[index] = tuple(names)
        write(logger, measurement, store.Moment(validation, 25 * validation, validation // 2, 1.0))
        written.append(measurement)
    logger.experiment.close()
    return written
