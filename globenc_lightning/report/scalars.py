"""Scalars by their tags: what can be monitored, and what is written beside it.

Figures that nobody asked for have no tag: where there is no faithfulness, nothing is written of it, and no zero.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from globenc_lightning.functional import CorrelationSummary, summarize
from globenc_lightning.measurement import Measurement
from globenc_lightning.spelling import hyphenated


def monitored(measurement: Measurement, tag: str) -> dict[str, float]:
    """Returns the figures that can be monitored: tag -> mean over the probe, of correlations at the last layer.

    Examples without a figure are left out of its mean, which is NaN where no example has one.
    """
    found = {f"{tag}/spearman/{method}": float(one.mean[-1]) for method, one in measurement.summary().items()}
    for reference, by_method in _with_references(measurement).items():
        for method, one in by_method.items():
            found[f"{tag}/spearman_with/{hyphenated(reference)}/{method}"] = float(one.mean[-1])
    faithfulness = measurement.faithfulness
    if faithfulness is not None:
        kinds = {
            "faithfulness": faithfulness.gain,
            "sufficiency_gain": faithfulness.sufficiency_gain,
            "log_odds": faithfulness.log_odds,
        }
        for name, by_example in kinds.items():
            found |= {f"{tag}/{name}/{method}": mean_of(values) for method, values in by_example.items()}
    return found


def by_layer(measurement: Measurement, tag: str) -> dict[str, float]:
    """Returns tag -> rho, mean over the probe, for every method and layer, from 01."""
    found = _layers(measurement.summary(), f"{tag}/spearman_by_layer")
    for reference, by_method in _with_references(measurement).items():
        found |= _layers(by_method, f"{tag}/spearman_with_by_layer/{hyphenated(reference)}")
    return found


def mean_of(values: Tensor) -> float:
    """Returns the mean of the finite values (b,); NaN where there are none."""
    finite = values[values.isfinite()].double()
    return float(finite.mean()) if len(finite) else math.nan


def _layers(summary: Mapping[str, CorrelationSummary], tag: str) -> dict[str, float]:
    return {
        f"{tag}/{method}/layer_{layer + 1:02d}": float(rho)
        for method, one in summary.items()
        for layer, rho in enumerate(one.mean)
    }


def _with_references(measurement: Measurement) -> dict[str, dict[str, CorrelationSummary]]:
    """Reference -> method -> the mean over the probe, one number per layer each."""
    return {
        reference: {method: summarize(rho) for method, rho in by_method.items()}
        for reference, by_method in measurement.reference_correlation.items()
    }
