"""Intervals of a mean over runs and examples, by a bootstrap that draws both anew.

The multibootstrap of Sellam et al. (The MultiBERTs, arXiv 2106.16163, section 3): runs and examples are drawn with
replacement, independently of each other, and the mean is taken over all pairs of those that were drawn. One fewer than
there are is drawn of each, which makes the variances unbiased in small samples. What a draw moves the mean by is the
sum of three parts (as in Owen, The pigeonhole bootstrap, 2007): that of the runs, with variance ``V_r`` over the draws;
that of the examples, ``V_b``; and that of single pairs, ``V_rb``. ``V_r`` and ``V_b`` both hold what single pairs add,
so it is taken off once, from that of the fewer (mostly the runs). With quantiles of Student's t, for each part with its
own degrees of freedom (Howe 1974, Approximate confidence limits on the mean of X + Y), and ``z`` of the normal
distribution, the interval is::

    mean +- sqrt(max(t(r - 1)^2 V_r - t(r - 1) z V_rb, 0) + t(b - 1)^2 V_b)

``V_rb`` has degrees of freedom between those of the runs and infinity, and so its quantile. Percentiles of so few runs
are too narrow; and so is one quantile for the whole, whose degrees of freedom are estimated (Satterthwaite 1946): it
covers the mean in 92 % of studies of 3 runs and 200 examples, where 95 % are promised.

How often a 95 % interval held the mean, in 4,000 simulated studies of 40 examples each; the columns are the standard
deviations between runs, between examples, and of single pairs::

    runs    .05 .15 .10    .15 .05 .10    .05 0 .10    .02 .02 .20
    2              .972           .951         .940           .975
    3              .973           .952         .951           .973
    5              .963           .951         .946           .961
    10             .954           .950         .952           .957

Two runs give an interval, but one that is about as wide as all that the figure can be: t(1) is 12.7, t(2) 4.3.

A row that belongs to a pair of runs, as those of agreement do, is no draw of its own: three runs have three pairs, ten
have 45. Such rows are made into one row per run first, by jackknife pseudo-values (Arvesen 1969, Jackknifing
U-statistics), and it is the runs that are drawn: 3 runs cover .94 to .98 in such studies, 5 and 10 runs .95 to .97.
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
        pairs: (r) where a row of the table is of two runs, their numbers. Two runs have one pair, which says nothing of
            others: the interval is over examples alone.

    Raises:
        ValueError: ``values`` has another shape, ``level`` is no share, or there are fewer than two draws.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"values must be a table (runs, examples); got the shape {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level!r}")
    if draws < 2:
        raise ValueError(f"draws must be 2 or more; got {draws!r}")
    values, rows = _with_values(values)
    if not values.size:
        return Interval(np.nan, np.nan, np.nan, 0, 0, NOTHING)
    mean, examples = float(values[~np.isnan(values)].mean()), values.shape[1]
    runs = len(rows) if pairs is None else len({one for row in rows for one in pairs[row]})
    if pairs is not None:
        of_runs = pseudo_values(values, [pairs[row] for row in rows])
        # Without a third run, a pair's figures vary over examples alone.
        values = np.nanmean(values, axis=0, keepdims=True) if of_runs is None else of_runs
    freedoms = [size - 1 for size in values.shape]
    if not any(freedoms):
        return Interval(mean, np.nan, np.nan, runs, examples, NOTHING)
    *variances, single = _variances(values, draws, seed)
    quantiles = [float(stats.t.ppf(0.5 + level / 2, one)) if one else 0.0 for one in freedoms]
    squares = [t**2 * variance for t, variance in zip(quantiles, variances, strict=True)]
    if all(freedoms):
        fewer = freedoms.index(min(freedoms))
        twice = quantiles[fewer] * float(stats.norm.ppf(0.5 + level / 2)) * single
        squares[fewer] = max(squares[fewer] - twice, 0.0)
    reach = float(np.sqrt(sum(squares)))
    over = BOTH if all(freedoms) else RUNS if freedoms[0] else EXAMPLES
    return Interval(mean, mean - reach, mean + reach, runs, examples, over)


def pseudo_values(values: Values, pairs: Sequence[tuple[int, int]]) -> Values | None:
    """Returns a table of runs out of a table of pairs of runs, by leaving each run out once.

    Where no value is missing, it is ``r m - (r - 1) m_k`` for each example, with ``m`` the mean over its pairs and
    ``m_k`` that over its pairs without the run ``k``, of ``r`` runs: the mean over the runs is ``m`` again, and the
    variance between them is that of a mean over pairs. Where values are missing, sums of what differs from the mean of
    all, divided by the number of values that an example has on average, stand for ``m`` and ``m_k``: an example counts
    as often as it has values, and the mean of a run's row is its pseudo-value of the mean of all.

    Args:
        values: (p, b) one value per pair and example; NaN where there is none.
        pairs: (p) the numbers of the two runs.

    Returns:
        (r, b) the runs in the order of their numbers; None where all values are of pairs with one and the same run, as
        those of two runs are.
    """
    names = sorted({one for pair in pairs for one in pair})
    member = np.array([[float(name in pair) for pair in pairs] for name in names])
    known = ~np.isnan(values)
    centre = values[known].mean()
    differs = np.where(known, values - centre, 0.0)
    runs, examples = len(names), values.shape[1]
    others = known.sum() - (member @ known).sum(1, keepdims=True)
    if not others.all():
        return None
    whole, held = differs.sum(0), member @ differs
    found: Values = centre + runs * examples / known.sum() * whole - (runs - 1) * examples / others * (whole - held)
    return found


def _with_values(values: Values) -> tuple[Values, NDArray[np.intp]]:
    """The rows and columns of a table that have a value, and the numbers of the rows."""
    known = ~np.isnan(values)
    rows = np.flatnonzero(known.any(1))
    return values[np.ix_(rows, np.flatnonzero(known.any(0)))], rows


def _variances(values: Values, draws: int, seed: int) -> list[float]:
    """The variance of the mean over draws, in three parts: of runs, of examples, and of single pairs of them."""
    generator = np.random.default_rng(seed)
    of_runs, of_examples = (_counts(generator, size, draws) for size in values.shape)
    known = ~np.isnan(values)
    filled = np.where(known, values - values[known].mean(), 0.0)
    tables = filled, known.astype(np.float64)
    # Of each table: what a draw of runs holds, of examples, and of both.
    by_example, by_run = ([table.sum(axis) for table in tables] for axis in (0, 1))
    run_part = _ratio(*(of_runs @ one for one in by_run))
    example_part = _ratio(*(of_examples @ one for one in by_example))
    both = _ratio(*(((of_runs @ table) * of_examples).sum(1) for table in tables))
    return [_variance(one) for one in (run_part, example_part, both - run_part - example_part)]


def _ratio(sums: Values, sizes: Values) -> Values:
    return np.divide(sums, sizes, out=np.full(len(sums), np.nan), where=sizes > 0)


def _variance(parts: Values) -> float:
    # A draw may hit nothing but gaps.
    parts = parts[~np.isnan(parts)]
    return float(parts.var(ddof=1)) if len(parts) > 1 else 0.0


def _counts(generator: np.random.Generator, size: int, draws: int) -> Values:
    """(d, n) how often each of ``n`` was drawn, one fewer than there are; a single one is always taken."""
    if size == 1:
        return np.ones((draws, 1))
    return generator.multinomial(size - 1, np.full(size, 1 / size), size=draws).astype(np.float64)
