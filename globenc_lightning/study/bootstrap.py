"""Intervals of a mean over runs and examples, by a bootstrap that draws both anew.

The multibootstrap of Sellam et al. (The MultiBERTs, arXiv 2106.16163, section 3): runs and examples are drawn with
replacement, independently of each other, and the mean is taken over all pairs of those that were drawn. One fewer than
there are is drawn of each, which makes the variance unbiased in small samples. The interval is the mean plus and minus
the bootstrap's standard error times a quantile of Student's t, whose degrees of freedom follow Satterthwaite (1946)
from the two parts of the variance: percentiles of so few runs are too narrow.

Coverage of a 95 % interval in 1,000 simulated studies of 40 examples, with standard deviation .05 between runs, .15
between examples and .10 of single pairs (in brackets: .15 between runs, .05 between examples): 10 runs .955 (.951), 5
runs .954 (.941), 3 runs .964 (.939), 2 runs .931 (.903). Where single pairs vary more than runs and examples do, the
interval is too wide (.996 to 1.000 with .02, .02 and .20): a draw of both counts three times what belongs to neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]

DRAWS = 1000
LEVEL = 0.95
BOTH = "runs and examples"
EXAMPLES = "examples alone"
RUNS = "runs alone"
NOTHING = "one value"


@dataclass(frozen=True)
class Interval:
    """A mean and its interval.

    Attributes:
        mean: over all pairs of run and example that have a value; NaN where none has.
        low: lower end of the interval; NaN where there is none.
        high: upper end.
        runs: how many runs have a value.
        examples: how many examples have one.
        over: what the interval speaks of: ``"runs and examples"``, or ``"examples alone"`` for a single run, which says
            nothing about other seeds.
    """

    mean: float
    low: float
    high: float
    runs: int
    examples: int
    over: str


def interval(
    values: Values,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Interval:
    """Returns the mean of a table and its interval.

    Args:
        values: (r, b) one value per run and example; NaN where there is none.
        level: how often the interval holds the true mean.
        draws: how often runs and examples are drawn.
        seed: of the draws: the same gives the same interval.
        pairs: (r) where a row of the table is of two runs, their numbers: it is the runs that are drawn, and a pair
            counts as often as both of them were drawn. Three runs have three pairs, and are three runs still.

    Raises:
        ValueError: ``values`` has another shape, or ``level`` is no share.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"values must be a table (runs, examples); got the shape {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level!r}")
    known = ~np.isnan(values)
    there = np.ix_(known.any(1), known.any(0))
    values, known, rows = values[there], known[there], np.flatnonzero(known.any(1)).tolist()
    if not values.size:
        return Interval(np.nan, np.nan, np.nan, 0, 0, NOTHING)
    members = [(row, row) for row in rows] if pairs is None else [pairs[row] for row in rows]
    names = sorted({one for pair in members for one in pair})
    owners = np.array([[names.index(one) for one in pair] for pair in members])
    runs, examples = len(names), values.shape[1]
    mean = float(values[known].mean())
    # Of two runs, there is one pair: it says nothing of others.
    varied = runs > (1 if pairs is None else 2)
    if not varied and examples < 2:
        return Interval(mean, np.nan, np.nan, runs, examples, NOTHING)
    over = BOTH if varied and examples > 1 else EXAMPLES if examples > 1 else RUNS
    generator = np.random.default_rng(seed)
    drawn = _counts(generator, runs, draws) if varied else np.ones((draws, runs))
    weights = drawn[:, owners[:, 0]] * (1.0 if pairs is None else drawn[:, owners[:, 1]])
    error = _standard_error(values, known, weights, _counts(generator, examples, draws))
    freedom = _degrees_of_freedom(values, known, runs - 1 if varied else 0)
    reach = float(stats.t.ppf(0.5 + level / 2, freedom)) * error
    return Interval(mean, mean - reach, mean + reach, runs, examples, over)


def _standard_error(values: Values, known: NDArray[np.bool_], runs: Values, examples: Values) -> float:
    """The standard deviation of the means of tables whose rows (d, r) and examples (d, b) were drawn so often."""
    filled = np.where(known, values, 0.0)
    sums = ((runs @ filled) * examples).sum(1)
    sizes = ((runs @ known.astype(np.float64)) * examples).sum(1)
    # A draw may hit nothing but gaps.
    means = sums[sizes > 0] / sizes[sizes > 0]
    return float(means.std(ddof=1)) if len(means) > 1 else float("nan")


def _counts(generator: np.random.Generator, size: int, draws: int) -> Values:
    """(d, n) how often each of ``n`` was drawn, one fewer than there are; a single one is always taken."""
    if size == 1:
        return np.ones((draws, 1))
    return generator.multinomial(size - 1, np.full(size, 1 / size), size=draws).astype(np.float64)


def _degrees_of_freedom(values: Values, known: NDArray[np.bool_], of_runs: int) -> float:
    """Satterthwaite's, of a variance that is the sum of one over runs and one over examples."""
    freedoms = (of_runs, values.shape[1] - 1)
    parts = []
    for axis, freedom in enumerate(freedoms):
        if freedom > 0:
            means = np.nanmean(np.where(known, values, np.nan), axis=1 - axis)
            parts.append((float(np.var(means, ddof=1)) / len(means) if len(means) > 1 else 0.0, freedom))
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return float(min(freedom for _, freedom in parts))
    return total**2 / sum(variance**2 / freedom for variance, freedom in parts)
