"""Averages over the examples of a probe, with their confidence intervals."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Floats = NDArray[np.float64]


def mean_and_interval(values: ArrayLike) -> tuple[_Floats, _Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Average over the examples that have a value, with a 95 % confidence interval of the mean (Student's t).

    Args:
        values: (b, ...), NaN where undefined.

    Returns:
        Four arrays of shape (...): the mean, NaN where no value is defined; half the interval's width, NaN where fewer
        than two are; the number of defined values; the number of undefined ones.

    Raises:
        ValueError: If there is no axis b.
    """
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0:
        raise ValueError("`values` must have the examples as its first axis, got a single number.")
    defined = np.isfinite(array)
    count = defined.sum(axis=0, dtype=np.int64)
    mean = np.where(defined, array, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(defined, array - mean, 0.0) ** 2
    freedom = np.maximum(count - 1, 1)
    half = stdtrit(freedom, 0.975) * np.sqrt(squares.sum(axis=0) / freedom / np.maximum(count, 1))
    return (
        np.where(count > 0, mean, np.nan),
        np.where(count > 1, half, np.nan),
        np.asarray(count, dtype=np.int64),
        np.asarray(len(array) - count, dtype=np.int64),
    )
