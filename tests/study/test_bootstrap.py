"""Intervals over runs and examples: against loops, and how often they hold the true mean."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from globenc_lightning.study.bootstrap import BOTH, EXAMPLES, NOTHING, RUNS, interval, pseudo_values


def table(runs: int, examples: int, seed: int = 0) -> Any:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(runs, 1)) + 2 * draw.normal(size=(1, examples)) + draw.normal(size=(runs, examples))


def by_loops(values: Any, level: float, draws: int, seed: int) -> tuple[float, float]:
    """The interval, one draw and one cell at a time."""
    runs, examples = values.shape
    generator = np.random.default_rng(seed)
    run_draws = generator.multinomial(runs - 1, [1 / runs] * runs, size=draws)
    example_draws = generator.multinomial(examples - 1, [1 / examples] * examples, size=draws)
    known = [(r, e) for r in range(runs) for e in range(examples) if not np.isnan(values[r, e])]

    def mean(run_counts: Any, example_counts: Any) -> float:
        total = sum(run_counts[r] * example_counts[e] * values[r, e] for r, e in known)
        size = sum(run_counts[r] * example_counts[e] for r, e in known)
        return total / size if size else float("nan")

    centre = mean([1] * runs, [1] * examples)
    parts: list[list[float]] = [[], [], []]
    for run_counts, example_counts in zip(run_draws, example_draws, strict=True):
        of_runs = mean(run_counts, [1] * examples) - centre
        of_examples = mean([1] * runs, example_counts) - centre
        single = mean(run_counts, example_counts) - centre - of_runs - of_examples
        for part, one in zip(parts, (of_runs, of_examples, single), strict=True):
            if not np.isnan(one):
                part.append(one)
    variances = [float(np.var(part, ddof=1)) for part in parts]
    quantile = [stats.t.ppf(0.5 + level / 2, size - 1) for size in (runs, examples)]
    fewer = 0 if runs <= examples else 1
    squares = [quantile[one] ** 2 * variances[one] for one in (0, 1)]
    squares[fewer] -= quantile[fewer] * stats.norm.ppf(0.5 + level / 2) * variances[2]
    reach = np.sqrt(max(squares[fewer], 0) + squares[1 - fewer])
    return centre - reach, centre + reach


@pytest.mark.parametrize(("runs", "examples"), [(3, 8), (2, 5), (6, 3), (4, 4)])
@pytest.mark.parametrize("missing", [0, 0.2])
def test_interval_is_that_of_draws_one_at_a_time(runs: int, examples: int, missing: float) -> None:
    values = table(runs, examples)
    gaps = np.random.default_rng(1).random(values.shape) < missing
    gaps[0], gaps[:, 0] = False, False
    values[gaps] = np.nan
    found = interval(values, level=0.9, draws=60, seed=5)
    low, high = by_loops(values, 0.9, 60, 5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.mean == pytest.approx(np.nanmean(values), abs=1e-12)
    assert (found.runs, found.examples, found.over) == (runs, examples, BOTH)


def test_draws_have_the_variances_of_an_analysis_of_variance() -> None:
    values = table(6, 30)
    runs, examples = values.shape
    centre = values.mean()
    by_run, by_example = values.mean(1), values.mean(0)
    rest = values - by_run[:, None] - by_example[None] + centre
    # Mean squares of runs, examples and single pairs, each divided by the number of values.
    of_runs, of_examples = by_run.var(ddof=1) / runs, by_example.var(ddof=1) / examples
    single = (rest**2).sum() / ((runs - 1) * (examples - 1)) / values.size
    t_runs, t_examples, z = stats.t.ppf(0.975, runs - 1), stats.t.ppf(0.975, examples - 1), stats.norm.ppf(0.975)
    reach = np.sqrt(t_runs**2 * of_runs - t_runs * z * single + t_examples**2 * of_examples)
    found = interval(values, draws=40_000)
    assert found.high - found.mean == pytest.approx(reach, rel=0.02)


REALISTIC = [
    (3, 120, 0.05, 0.15, 0.10),
    (3, 40, 0.15, 0.05, 0.10),
    (5, 60, 0.15, 0.05, 0.10),
    (10, 40, 0.02, 0.02, 0.20),
]
"""Runs, examples, and standard deviations between runs, between examples, of single pairs of both."""


@pytest.mark.parametrize(("runs", "examples", "of_runs", "of_examples", "single"), REALISTIC)
def test_interval_holds_the_mean_as_often_as_it_says(
    runs: int, examples: int, of_runs: float, of_examples: float, single: float
) -> None:
    draw = np.random.default_rng(11)
    hits = 0
    for study in range(1000):
        values = 0.4 + of_runs * draw.normal(size=(runs, 1)) + of_examples * draw.normal(size=(1, examples))
        found = interval(values + single * draw.normal(size=(runs, examples)), draws=200, seed=study)
        hits += found.low <= 0.4 <= found.high
    assert 930 <= hits <= 970


def test_two_runs_still_cover() -> None:
    draw = np.random.default_rng(12)
    hits = 0
    for study in range(1000):
        values = 0.4 + 0.15 * draw.normal(size=(2, 1)) + 0.05 * draw.normal(size=(1, 40))
        found = interval(values + 0.1 * draw.normal(size=(2, 40)), draws=200, seed=study)
        hits += found.low <= 0.4 <= found.high
    assert 930 <= hits <= 970


def test_interval_over_examples_alone_misses_the_mean_of_other_runs() -> None:
    draw = np.random.default_rng(13)
    hits = 0
    for study in range(400):
        values = 0.4 + 0.15 * draw.normal() + 0.05 * draw.normal(size=(1, 40))
        found = interval(values, draws=100, seed=study)
        assert found.over == EXAMPLES
        hits += found.low <= 0.4 <= found.high
    assert hits < 100


@pytest.mark.parametrize(("runs", "missing"), [(3, 0.3), (4, 0.0), (5, 0.3)])
def test_interval_of_pairs_of_runs_holds_the_mean(runs: int, missing: float) -> None:
    draw = np.random.default_rng(14)
    pairs = [*combinations(range(runs), 2)]
    first, second = (np.array([pair[one] for pair in pairs]) for one in (0, 1))
    hits = 0
    for study in range(1000):
        each = 0.05 * draw.normal(size=(runs, 1)) + 0.05 * draw.normal(size=(runs, 40))
        values = 0.4 + each[first] + each[second] + 0.15 * draw.normal(size=(1, 40))
        wrong = draw.random((runs, 40)) < missing
        values[wrong[first] != wrong[second]] = np.nan
        found = interval(values, draws=200, seed=study, pairs=pairs)
        assert found.runs == runs
        hits += found.low <= 0.4 <= found.high
    assert 930 <= hits <= 975


def test_pairs_of_runs_are_no_more_than_their_runs() -> None:
    each = table(5, 12, seed=3)
    pairs = [*combinations(range(5), 2)]
    sums = np.array([each[left] + each[right] for left, right in pairs])
    # A mean of sums of two runs is twice the mean of the runs: 10 pairs tell no more than 5 runs.
    assert pseudo_values(sums, pairs) == pytest.approx(2 * each, abs=1e-12)
    alone, paired = interval(2 * each), interval(sums, pairs=pairs)
    assert (paired.mean, paired.low, paired.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=1e-12)


@pytest.mark.parametrize("missing", [0.0, 0.35])
def test_pseudo_values_are_those_of_leaving_out_one_run_at_a_time(missing: float) -> None:
    runs = (2, 3, 5, 9)
    pairs = [*combinations(runs, 2)]
    values = table(len(pairs), 7, seed=4)
    values[np.random.default_rng(2).random(values.shape) < missing] = np.nan
    found = pseudo_values(values, pairs)
    assert found is not None
    columns = [slice(None), *(slice(example, example + 1) for example in range(7))]
    for row, run in enumerate(runs):
        without = [place for place, pair in enumerate(pairs) if run not in pair]
        # Of the mean of all; and, where nothing is missing, of each example by itself.
        for column in columns if not missing else columns[:1]:
            whole, others = np.nanmean(values[:, column]), np.nanmean(values[without, column])
            assert found[row, column].mean() == pytest.approx(4 * whole - 3 * others, abs=1e-12)


def test_pairs_that_all_have_one_run_have_no_pseudo_values() -> None:
    values = table(3, 6)
    assert pseudo_values(values, [(0, 1), (0, 2), (0, 3)]) is None
    values[2] = np.nan
    found = interval(values, pairs=[(0, 1), (0, 2), (1, 2)])
    assert found.over == EXAMPLES


def test_one_pair_of_runs_is_over_examples_alone() -> None:
    values = table(1, 20)
    found = interval(values, pairs=[(0, 1)])
    assert (found.runs, found.over) == (2, EXAMPLES)
    reach = stats.t.ppf(0.975, 19) * values.std(ddof=1) / np.sqrt(20)
    assert found.high - found.mean == pytest.approx(reach, rel=0.1)


def test_one_example_is_over_runs_alone_and_one_value_has_no_interval() -> None:
    runs = interval(table(8, 1))
    assert runs.over == RUNS
    assert runs.low < runs.mean < runs.high
    single = interval(np.array([[0.3]]))
    assert (single.mean, single.over, single.runs, single.examples) == (0.3, NOTHING, 1, 1)
    assert np.isnan(single.low)
    assert np.isnan(single.high)


def test_nothing_that_is_defined_has_no_mean() -> None:
    for values in (np.full((3, 4), np.nan), np.zeros((0, 4)), np.zeros((3, 0))):
        found = interval(values)
        assert np.isnan(found.mean)
        assert (found.runs, found.examples, found.over) == (0, 0, NOTHING)


def test_rows_and_columns_without_a_value_do_not_count() -> None:
    values = table(4, 9)
    held = np.full((6, 11), np.nan)
    held[np.ix_([0, 2, 3, 5], [1, 2, 3, 4, 5, 6, 7, 9, 10])] = values
    assert interval(held) == interval(values)


def test_same_seed_gives_the_same_interval_and_another_seed_nearly_so() -> None:
    values = table(5, 20)
    assert interval(values, seed=1) == interval(values, seed=1)
    first, second = interval(values, seed=1), interval(values, seed=2)
    assert first != second
    assert second.high == pytest.approx(first.high, rel=0.1)


def test_identical_values_have_an_interval_of_no_width() -> None:
    found = interval(np.full((4, 6), 0.25))
    assert (found.low, found.mean, found.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-12)


@pytest.mark.parametrize(
    ("values", "options", "told"),
    [
        (np.zeros(3), {}, "table"),
        (np.zeros((2, 2)), {"level": 1.0}, "between 0 and 1"),
        (np.zeros((2, 2)), {"level": 95}, "between 0 and 1"),
        (np.zeros((2, 2)), {"draws": 1}, "2 or more"),
    ],
)
def test_bad_arguments_are_refused(values: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        interval(values, **options)
