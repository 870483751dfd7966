"""The y-axes of curves: what they are called, and axes that fit what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.report.curves import CORRELATION, Scale

Floats = NDArray[np.float64]

RANDOM = "random"
"""The name of the line at zero, where a figure is a gain over tokens drawn at random."""
PLAIN_REFERENCES = {
    "saliency": "gradient × input",
    "HTA": "HTA (hidden token attribution)",
    "exact HTA": "exact HTA (hidden token attribution)",
}
NAMES = {
    "gain": (
        "loss with the top {share} masked − with random tokens masked, as share of that with all masked; 0: no better "
        "than random"
    ),
    "sufficiency_gain": (
        "kept by the top {share} alone − by random tokens alone, as share of the loss with all masked; 0: no better "
        "than random"
    ),
    "log_odds": "log-odds of the decision that are lost with the top {share} masked; 0: nothing is lost",
}
"""Figure of faithfulness -> the name of its axis, in plain words."""
WIDEST = 1.0
"""An axis of gains reaches no further than this for the sake of bands: intervals of two or three examples do."""


def correlation(reference: str) -> Scale:
    """Returns the y-axis of a correlation with a reference."""
    return CORRELATION._replace(name=f"Spearman’s ρ with {PLAIN_REFERENCES.get(reference, reference)}")


def faithfulness(figure: str, share: float, means: Sequence[Floats], halves: Sequence[Floats]) -> Scale:
    """Returns the y-axis of a figure of faithfulness, which holds all means, and bands as far as they make sense.

    Args:
        figure: one of ``NAMES``.
        share: which share of the tokens was masked.
        means: of each method (n,), NaN where there is none.
        halves: of each method half the interval (n,), NaN where there is none.
    """
    ends = [mean + side * half for mean, half in zip(means, halves, strict=True) for side in (-1, 1)]
    if figure != "log_odds":
        ends = [np.clip(one, -WIDEST, WIDEST) for one in ends]
    return fitting(NAMES[figure].format(share=f"{share * 100:.0f} %"), np.concatenate([*means, *ends]), -np.inf, np.inf)


def fitting(name: str, values: Iterable[float], least: float, most: float) -> Scale:
    """Returns a y-axis that holds zero and all values that are finite.

    Args:
        name: what is measured.
        values: all that is drawn: lines, the ends of bands, levels to compare with.
        least: the least value there can be.
        most: the greatest one.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = np.asarray([*values], dtype=np.float64)
    drawn = np.clip([*drawn[np.isfinite(drawn)], 0.0], least, most)
    low, high = float(drawn.min()), float(drawn.max())
    high = low + 0.1 if high - low < 0.1 else high
    ticks = [float(one) for one in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    ticks = [min(max(one, least), most) for one in ticks]
    ticks = [one for one in dict.fromkeys(ticks) if one <= high or one - high < 0.5 * (ticks[-1] - ticks[-2])]
    ticks = [one for one in ticks if one >= low or low - one < 0.5 * (ticks[-1] - ticks[-2])]
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    pad = 0.02 * (high - low)
    digits = 1 if all(abs(one * 10 - round(one * 10)) < 1e-6 for one in ticks) else 2
    digits = digits if all(abs(one * 100 - round(one * 100)) < 1e-6 for one in ticks) else 3
    return Scale(name, low - pad, high + pad, ticks, least, most, digits)
