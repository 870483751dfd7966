"""Puts references, signed scores and faithfulness into measurements that are made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.measurement import Measurement

REFERENCES = ("integrated gradients", "HTA")
NAN = float("nan")


def with_further(
    measurement: Measurement,
    references: Sequence[str] = REFERENCES,
    signed: bool = True,
    masked: Sequence[str] | None = None,
    seed: int = 0,
    unit: str = "probability",
    left_out: Sequence[int] = (1,),
) -> Measurement:
    """Returns a measurement with more figures, at random but the same every time.

    Args:
        measurement: the figures so far.
        references: what the rows are compared with besides the saliency.
        signed: whether there are signed scores.
        masked: the methods whose first tokens are masked; the first one when None, none when empty.
        seed: of what is drawn.
        unit: of the score that falls.
        left_out: the examples that have no gain, since masking everything hardly changes their score.
    """
    draw = torch.Generator().manual_seed(1000 + seed)
    lengths = [len(one) for one in measurement.saliency]
    size, methods = len(lengths), [*measurement.correlation]
    masked = methods[:1] if masked is None else masked
    layers = measurement.correlation[methods[0]].shape[1]

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    parts: dict[str, Any] = {
        "references": [{name: rand(length) for name in references} for length in lengths],
        "reference_correlation": {
            name: {method: rand(size, layers).double() * 2 - 1 for method in methods} for name in references
        },
    }
    if signed:
        parts["signed"] = [rand(length) * 2 - 1 for length in lengths]
        parts["left_out"] = rand(size) - 0.5
    if masked:
        parts["faithfulness"] = faithfulness(lengths, masked, draw, unit, left_out)
    return replace(measurement, **parts)


def faithfulness(
    lengths: Sequence[int], methods: Sequence[str], draw: torch.Generator, unit: str, left_out: Sequence[int]
) -> Faithfulness:
    """Returns figures of masked copies of examples of these lengths."""
    size = len(lengths)

    def drawn(low: float, high: float) -> dict[str, Tensor]:
        return {one: torch.rand(size, generator=draw) * (high - low) + low for one in methods}

    found = Faithfulness(
        gain=drawn(-0.2, 0.6),
        sufficiency_gain=drawn(-0.3, 0.3),
        log_odds={} if unit == "value" else drawn(0, 3),
        span=torch.rand(size, generator=draw),
        masked={one: [torch.rand(length, generator=draw) < 0.4 for length in lengths] for one in methods},
        unit=unit,
        share=0.2,
        passes=5,
    )
    for example in left_out:
        found.span[example] = 0.01
        for values in (*found.gain.values(), *found.sufficiency_gain.values()):
            values[example] = NAN
    return found
