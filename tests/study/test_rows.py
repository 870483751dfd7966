"""Tests of drift and agreement on odd rows: ties, constant rows, one or two tokens, runs whose steps differ."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy import stats

from globenc_lightning import study
from globenc_lightning.record import schema
from tests.study.records import LENGTHS, Written, write_run


def spearman(one: Any, other: Any) -> float:
    """Spearman's rho as scipy has it; undefined for a single token and for a constant row."""
    if len(one) < 2 or len(set(one)) == 1 or len(set(other)) == 1:
        return float("nan")
    return float(stats.spearmanr(one, other).statistic)


def jaccard(one: Any, other: Any) -> float:
    """Tokens that are among the largest quarter of both, of those that are of either; undefined for a single token."""
    if len(one) < 2:
        return float("nan")
    most = max(1, math.ceil(len(one) / 4))
    tops = [set(sorted(range(len(row)), key=lambda place: (-row[place], place))[:most]) for row in (one, other)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


SIMILARITIES = {"spearman": spearman, "jaccard": jaccard}


def row(made: Written, step: int, method: str, layer: int, example: int, special_tokens: bool) -> Any:
    """The tokens of a row that count."""
    values = made.rows[step, method, layer][example]
    return [one for one, mark in zip(values, made.special[example], strict=True) if special_tokens or not mark]


def tied_rows(steps: tuple[int, ...], lengths: tuple[int, ...] = LENGTHS) -> dict[tuple[int, str, int], list[Any]]:
    """Rows of few values, so that tokens are equal, and one constant row."""
    draw = np.random.default_rng(5)
    rows = {
        (step, method, layer): [draw.integers(1, 4, length) / 8 for length in lengths]
        for step in steps
        for method in ("N-Enc", "W-Res")
        for layer in (1, 2)
    }
    rows[steps[0], "N-Enc", 2][0] = np.full(lengths[0], 0.125)
    return rows


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("by", ["spearman", "jaccard"])
@pytest.mark.parametrize("against", ["previous", "first", "last"])
def test_drift_is_one_minus_the_similarity_of_two_rows(
    tmp_path: Path, against: str, by: str, special_tokens: bool
) -> None:
    steps = (10, 20, 30, 40)
    made = write_run(tmp_path, "one", steps=steps, rows=tied_rows(steps))

    found = study.load(tmp_path).drift(against, by, special_tokens=special_tokens)

    others = {"previous": dict(itertools.pairwise(steps)), "first": {}, "last": {}}
    others["previous"] = {new: old for old, new in others["previous"].items()}
    others["first"] = dict.fromkeys(steps[1:], steps[0])
    others["last"] = dict.fromkeys(steps[:-1], steps[-1])
    expected = {}
    for step, other in others[against].items():
        for method, layer, example in itertools.product(("N-Enc", "W-Res"), (1, 2), range(len(LENGTHS))):
            rows = [row(made, one, method, layer, example, special_tokens) for one in (step, other)]
            expected[step, other, method, layer, example] = 1 - SIMILARITIES[by](*rows)
    keys = ["step", "against_step", "method", "layer", "example"]
    got = found.set_index(keys)["drift"].to_dict()
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-12, nan_ok=True), key
    assert any(math.isnan(one) for one in expected.values())
    assert found["seed"].eq(0).all()
    assert found["run"].eq("one").all()


def test_drift_of_one_analysis_is_an_empty_table(tmp_path: Path) -> None:
    write_run(tmp_path, "one", steps=(10,))

    found = study.load(tmp_path).drift()

    assert found.empty
    assert [*found.columns][-2:] == ["drift", "chance"]
    assert study.load(tmp_path).stabilization(0.1).empty


@pytest.mark.parametrize("by", ["spearman", "jaccard"])
@pytest.mark.parametrize("length", [2, 3, 4, 9, 14])
def test_the_chance_level_is_the_mean_over_shuffled_rows(tmp_path: Path, by: str, length: int) -> None:
    draw = np.random.default_rng(1)
    steps = tuple(range(40))
    row_of = np.sort(draw.dirichlet(np.ones(length)))
    rows = {(step, "N-Enc", 1): [draw.permutation(row_of) for _ in range(100)] for step in steps}
    write_run(tmp_path, "one", steps=steps, methods=("N-Enc",), layers=1, lengths=[length] * 100, rows=rows)
    loaded = study.load(tmp_path)

    found = loaded.drift(by=by, special_tokens=True)

    # Neighbouring steps share a row; every second pair is independent of the others.
    apart = found[found["step"] % 2 == 1]["drift"]
    error = apart.std() / math.sqrt(len(apart))
    assert error > 0
    assert abs(apart.mean() - found["chance"].iloc[0]) < 4 * error
    assert found["chance"].nunique() == 1


def test_the_chance_level_of_jaccard_is_about_sixteen_hundredths(tmp_path: Path) -> None:
    write_run(tmp_path, "one", lengths=(36, 37, 40, 60))

    found = study.load(tmp_path).drift(by="jaccard")

    assert (1 - found["chance"]).between(0.14, 0.18).all()


@pytest.mark.parametrize("by", ["spearman", "jaccard"])
def test_a_row_without_two_tokens_that_count_has_no_chance_level(tmp_path: Path, by: str) -> None:
    write_run(tmp_path, "one", lengths=(1, 2, 3, 9))

    found = study.load(tmp_path).drift(by=by)

    none = found["example"] < 3
    assert found.loc[none, "chance"].isna().all()
    assert found.loc[~none, "chance"].notna().all()


def rows_that_move(drifts: list[bool], length: int = 6) -> dict[tuple[int, str, int], list[Any]]:
    """A row per step that is turned round where it moves (drift 2) and is kept where it does not (drift 0)."""
    values = np.arange(1.0, length + 1)
    rows = {(0, "N-Enc", 1): [values]}
    for step, moves in enumerate(drifts, 1):
        values = values[::-1].copy() if moves else values
        rows[step, "N-Enc", 1] = [values]
    return rows


@pytest.mark.parametrize(
    ("moves", "step", "remaining"),
    [
        ([True, True, False, False], 3, 2),
        ([False, False, False], 1, 3),
        ([True, False, True, False], 4, 1),
        ([False, False, True], None, 0),
        ([True], None, 0),
        ([False], 1, 1),
    ],
)
def test_stabilization_is_the_first_step_after_which_drift_stays_low(
    tmp_path: Path, moves: list[bool], step: int | None, remaining: int
) -> None:
    steps = range(len(moves) + 1)
    rows = rows_that_move(moves)
    write_run(tmp_path, "one", steps=steps, methods=("N-Enc",), layers=1, lengths=(6,), rows=rows)

    found = study.load(tmp_path).stabilization(0.5, special_tokens=True)

    assert len(found) == 1
    one = found.iloc[0]
    assert (one["remaining"], one["analyses"]) == (remaining, len(moves))
    assert found["step"].isna().all() if step is None else one["step"] == step


@pytest.mark.parametrize("by", ["spearman", "jaccard"])
@pytest.mark.parametrize("special_tokens", [False, True])
def test_agreement_is_that_of_each_pair_of_runs_where_both_decide_the_same(
    tmp_path: Path, by: str, special_tokens: bool
) -> None:
    steps = ((10, 20, 30), (10, 20, 30), (20, 30, 40))
    made = {
        f"run-{seed}": write_run(tmp_path, f"run-{seed}", seed=seed, steps=mine, rows=tied_rows(mine))
        for seed, mine in enumerate(steps)
    }

    found = study.load(tmp_path).agreement(by=by, special_tokens=special_tokens)

    expected = {}
    for left, right in itertools.combinations(made, 2):
        for step in sorted({*made[left].predicted} & {*made[right].predicted}):
            for method, layer, example in itertools.product(("N-Enc", "W-Res"), (1, 2), range(len(LENGTHS))):
                if made[left].predicted[step][example] == made[right].predicted[step][example]:
                    rows = [row(made[one], step, method, layer, example, special_tokens) for one in (left, right)]
                    expected[left, right, step, method, layer, example] = SIMILARITIES[by](*rows)
    got = found.set_index(["run", "other_run", "step", "method", "layer", "example"])["agreement"].to_dict()
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-12, nan_ok=True), key
    assert len(expected) < 7 * 2 * 2 * len(LENGTHS)


def test_a_row_of_another_text_is_compared_with_none(tmp_path: Path) -> None:
    write_run(tmp_path, "one", steps=(10, 20, 30))
    file = schema.step_file(tmp_path, schema.EXAMPLES, "one", 10)
    table = parquet.read_table(file, partitioning=None)
    hashes = ["another", *table["text_hash"].to_pylist()[1:]]
    place = table.column_names.index("text_hash")
    parquet.write_table(table.set_column(place, "text_hash", pa.array(hashes)), file)

    found = study.load(tmp_path).drift().set_index(["example", "step"])["drift"]

    assert found[0, 20].isna().all()
    assert found[0, 30].notna().all()
    assert found[3, 20].notna().all()
