"""What was asked for besides the methods and the saliency, of a measurement, as the records hold it.

Axes: ``m`` method, ``b`` sentence, ``l`` layer, ``k`` token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.measurement import Measurement
from globenc_lightning.report.averages import mean_and_interval
from globenc_lightning.report.dashboard import asked
from globenc_lightning.report.dashboard.store import ROW_LEVELS, shares


def bytes_besides(measurement: Measurement) -> Callable[[int], int]:
    """Returns a function of a sentence's length: how many bytes it takes for what was asked for besides."""
    methods, layers = len(measurement.correlation), next(iter(measurement.correlation.values())).shape[1]
    found = measurement.faithfulness
    references, masked = len(measurement.reference_correlation), 0 if found is None else len(found.gain)
    signed = bool(measurement.signed)
    return lambda length: asked.size_of(length, layers, methods, references=references, masked=masked, signed=signed)


def correlations(measurement: Measurement, shown: int) -> dict[str, asked.Correlation]:
    """Returns the correlation with each reference besides the saliency: means of all, rho of those that are shown."""
    return {
        reference: asked.Correlation(
            rho=torch.stack([rho[:shown] for rho in by_method.values()]).float().numpy(),
            **_statistics(list(by_method.values()), -1.0, 1.0),
        )
        for reference, by_method in measurement.reference_correlation.items()
    }


def masking(measurement: Measurement, shown: int) -> asked.Masking | None:
    """Returns what the masked copies tell; None where there are none."""
    found = measurement.faithfulness
    if found is None or not found.gain:
        return None
    methods = tuple(found.gain)
    measures = {}
    for name in asked.MEASURES:
        by_method: Mapping[str, Tensor] = getattr(found, name)
        if set(by_method) == set(methods):
            each = [by_method[method].double() for method in methods]
            finite = torch.stack([one[:shown].masked_fill(~one[:shown].isfinite(), float("nan")) for one in each])
            measures[name] = asked.Measure(each=finite.float().numpy(), **_statistics(each))
    return asked.Masking(
        methods=methods,
        measures=measures,
        examples=len(measurement.names),
        unit=found.unit,
        share=float(found.share),
        score=str(getattr(found, "score", "")),
        masking=str(getattr(found, "masking", "")),
    )


def parts(measurement: Measurement, sentences: Sequence[int]) -> asked.Parts:
    """Returns what there is of the tokens of these sentences; what is no number is left out.

    Args:
        measurement: the figures, of the shown sentences or of all.
        sentences: those that there is room for.
    """
    lengths = [len(one) for one in measurement.saliency]
    found = measurement.faithfulness
    if not (measurement.reference_correlation or found or measurement.signed):
        return asked.Parts()
    references = {
        reference: {
            one: shares(measurement.references[one][reference].numpy(), ROW_LEVELS)
            for one in sentences
            if _are_magnitudes(measurement.references[one].get(reference), lengths[one])
        }
        for reference in measurement.reference_correlation
    }
    signed = {
        one: measurement.signed[one].float().numpy()
        for one in sentences
        if measurement.signed
        and _are_finite(measurement.signed[one], lengths[one])
        and bool(torch.isfinite(measurement.left_out[one]))
    }
    return asked.Parts(
        sentences=tuple(sentences),
        references=references,
        masked={} if found is None else _masked(found, sentences, lengths),
        signed=signed,
        left_out={one: float(measurement.left_out[one]) for one in signed},
    )


def _masked(found: Faithfulness, sentences: Sequence[int], lengths: Sequence[int]) -> dict[str, dict[int, np.ndarray]]:
    """Which tokens were masked, of the sentences that have masked copies."""
    return {
        method: {
            one: of[one].bool().numpy()
            for one in sentences
            if one < len(of) and len(of[one]) == lengths[one] and bool(of[one].any())
        }
        for method, of in found.masked.items()
    }


def _are_finite(values: Tensor | None, length: int) -> bool:
    return values is not None and len(values) == length and bool(torch.isfinite(values).all())


def _are_magnitudes(values: Tensor | None, length: int) -> bool:
    return values is not None and _are_finite(values, length) and bool((values >= 0).all())


def _statistics(values: Sequence[Tensor], least: float = -np.inf, most: float = np.inf) -> dict[str, Any]:
    """Mean, ends of its interval and number of the values of each method (b, ...), as the records hold them."""
    intervals = [mean_and_interval(one.numpy()) for one in values]
    mean, half, n, _ = (np.stack(of) for of in zip(*intervals, strict=True))
    return {
        "mean": mean.astype(np.float32),
        "low": np.maximum(mean - half, least).astype(np.float32),
        "high": np.minimum(mean + half, most).astype(np.float32),
        "n": n.astype(np.int32),
    }
