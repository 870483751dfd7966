"""Synthetic measurements of a probe, with everything that goes into a record."""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.dashboard import synthetic_measurement, synthetic_probe
from globenc_lightning import METHODS, ProbeSet
from globenc_lightning.measurement import About, HistoryEntry, Measurement, about, history_entry
from globenc_lightning.settings import Settings

SIZES: dict[str, Any] = {"sentences": 3, "layers": 2, "tokens": 6}


def made(validation: int = 0, step: int = 0, **changes: Any) -> tuple[Measurement, ProbeSet, HistoryEntry, About]:
    """A measurement, its probe, its entry in a history, and what it is of; ``changes`` are of the measurement."""
    sizes = {name: changes.pop(name) for name in ("sentences", "layers", "tokens", "seed") if name in changes}
    methods = changes.pop("methods", METHODS)
    measurement = synthetic_measurement(validation, 10, methods=methods, **{**SIZES, **sizes})
    size = len(measurement.names)
    parts = {
        "score": torch.linspace(-1, 1, size),
        "position": [0] * size,
        "answers": [(int(one),) for one in measurement.predicted],
        "truths": [(float(index % 3),) for index in range(size)],
        "ids": [torch.arange(len(one)) for one in measurement.names],
        "values": torch.full((size,), float("nan")),
        "logits": [torch.tensor([0.1 * index, -1.0, 2.0]) for index in range(size)],
        "losses": torch.linspace(0.1, 0.9, size),
    }
    measurement = replace(measurement, **{**parts, **changes})
    probe = synthetic_probe(measurement.names)
    entry = history_entry(measurement, step, validation)
    return measurement, probe, entry, about(measurement, probe, Settings(methods), "synthetic")
