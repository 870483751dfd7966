"""Drift, stabilization and agreement, each against loops over examples with scipy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from globenc_lightning import study
from globenc_lightning.errors import RecordError
from tests.study.records import LENGTHS, Written, write_run

STEPS = (10, 20, 30)
WAYS = [(against, by) for against in ("previous", "first", "last") for by in ("spearman", "jaccard")]


def similarity(left: Any, right: Any, by: str) -> float:
    """How alike two rows are, with scipy and Python's sets."""
    if len(left) < 2 or np.isnan(left).any() or np.isnan(right).any():
        return float("nan")
    if by == "spearman":
        if len(set(left)) < 2 or len(set(right)) < 2:
            return float("nan")
        return float(spearmanr(left, right).statistic)
    most = max(1, int(np.ceil(0.25 * len(left))))
    tops = [
        set(sorted(range(len(row)), key=lambda place, row=row: (-row[place], place))[:most]) for row in (left, right)
    ]  # type: ignore[misc]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


def counted(run: Written, key: tuple[int, str, int], example: int, special_tokens: bool) -> Any:
    row, marks = run.rows[key][example], run.special[example]
    return np.array([one for one, mark in zip(row, marks, strict=True) if special_tokens or not mark])


def other_step(step: int, against: str, steps: tuple[int, ...] = STEPS) -> int | None:
    place = steps.index(step)
    if against == "previous":
        return steps[place - 1] if place else None
    fixed = steps[0] if against == "first" else steps[-1]
    return None if step == fixed else fixed


@pytest.mark.parametrize(("against", "by"), WAYS)
@pytest.mark.parametrize("special_tokens", [False, True])
def test_drift_is_that_of_one_example_at_a_time(tmp_path: Path, against: str, by: str, special_tokens: bool) -> None:
    runs = {f"seed-{seed}": write_run(tmp_path, f"seed-{seed}", seed=seed) for seed in (1, 2)}
    # Ties, a constant row, and a row that is not a number.
    for run in runs.values():
        key = (20, "N-Enc", 1)
        run.rows[key][0] = np.round(run.rows[key][0], 1)
        run.rows[key][1] = np.full(LENGTHS[1], 1 / LENGTHS[1])
        run.rows[key][2] = np.full(LENGTHS[2], np.nan)
        write_run(tmp_path, run.name, seed=int(run.name[-1]), rows=run.rows)
    found = study.load(tmp_path).drift(against, by, special_tokens=special_tokens)
    assert len(found) == 2 * 2 * len(LENGTHS) * 2 * 2
    assert not found.duplicated(["run", "step", "example", "method", "layer"]).any()
    undefined = 0
    for row in found.itertuples():
        run, key = runs[row.run], (row.step, row.method, row.layer)
        assert row.against_step == other_step(row.step, against)
        assert row.seed == int(row.run[-1])
        new, old = (
            counted(run, (step, row.method, row.layer), row.example, special_tokens)
            for step in (key[0], row.against_step)
        )
        expected = 1 - similarity(new, old, by)
        assert row.drift == pytest.approx(expected, abs=1e-12, nan_ok=True)
        undefined += np.isnan(expected)
    assert 0 < undefined < len(found) / 2


def test_drift_reads_only_the_methods_and_layers_that_are_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    found = study.load(tmp_path).drift(methods="W-Res", layers=2)
    assert set(found["method"]) == {"W-Res"}
    assert set(found["layer"]) == {2}
    whole = study.load(tmp_path).drift()
    same = whole[(whole["method"] == "W-Res") & (whole["layer"] == 2)].reset_index(drop=True)
    assert found.equals(same)


@pytest.mark.parametrize("by", ["spearman", "jaccard"])
def test_shuffled_rows_drift_and_agree_as_much_as_chance_says(tmp_path: Path, by: str) -> None:
    lengths = [8, 9, 14, 22] * 40
    for seed in (1, 2):
        draw = np.random.default_rng(seed)
        base = [np.random.default_rng(0).dirichlet(np.ones(length)) for length in lengths]
        rows = {(step, "N-Enc", 1): [draw.permutation(row) for row in base] for step in STEPS}
        same = {step: [0] * len(lengths) for step in STEPS}
        write_run(
            tmp_path, f"seed-{seed}", seed=seed, rows=rows, predicted=same, lengths=lengths, methods=["N-Enc"], layers=1
        )
    loaded = study.load(tmp_path)
    moved = loaded.drift(by=by, special_tokens=True)
    assert moved["drift"].mean() == pytest.approx(moved["chance"].mean(), abs=0.03)
    alike = loaded.agreement(by=by, special_tokens=True)
    assert alike["agreement"].mean() == pytest.approx(alike["chance"].mean(), abs=0.03)
    if by == "spearman":
        assert alike["chance"].mean() == 0
    else:
        # The quarter of 8 tokens: 0, 1 or 2 of them in common, of 28 choices.
        of_eight = (15 * 0 + 12 * (1 / 3) + 1) / 28
        short = alike[alike["example"] == 0]["chance"]
        assert short.to_numpy() == pytest.approx(of_eight, abs=1e-12)
        assert 0.1 < alike["chance"].mean() < 0.25


def test_jaccard_of_two_tokens_is_chance_and_of_one_token_is_undefined(tmp_path: Path) -> None:
    lengths = [2] * 60 + [1] * 5
    draw = np.random.default_rng(0)
    rows = {(step, "N-Enc", 1): [draw.permutation([0.7, 0.3][:length]) for length in lengths] for step in STEPS}
    write_run(tmp_path, "one", rows=rows, lengths=lengths, methods=["N-Enc"], layers=1)
    found = study.load(tmp_path).drift(by="jaccard", special_tokens=True)
    two, one = found[found["example"] < 60], found[found["example"] >= 60]
    assert two["chance"].to_numpy() == pytest.approx(0.5)
    assert set(two["drift"]) == {0.0, 1.0}
    assert one["drift"].isna().all()
    assert one["chance"].isna().all()


def test_rows_that_stay_do_not_drift(tmp_path: Path) -> None:
    base = [np.random.default_rng(3).dirichlet(np.ones(length)) for length in LENGTHS]
    rows = {(step, method, layer): base for step in STEPS for method in ("N-Enc", "W-Res") for layer in (1, 2)}
    write_run(tmp_path, "one", rows=rows)
    for by in ("spearman", "jaccard"):
        found = study.load(tmp_path).drift(by=by)["drift"].dropna()
        assert len(found) > 0
        assert found.to_numpy() == pytest.approx(0, abs=1e-12)


def test_one_analysis_has_no_drift(tmp_path: Path) -> None:
    write_run(tmp_path, "one", steps=[5])
    found = study.load(tmp_path).drift()
    assert found.empty
    assert [*found.columns] == ["run", "seed", "step", "against_step", "example", "method", "layer", "drift", "chance"]
    assert study.load(tmp_path).stabilization(0.1).empty


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.8, 2.0])
def test_stabilization_is_the_first_step_from_which_drift_stays_low(tmp_path: Path, threshold: float) -> None:
    steps = tuple(range(10, 100, 10))
    for seed in (1, 2):
        draw = np.random.default_rng(seed)
        rows: dict[tuple[int, str, int], Any] = {}
        base = [np.random.default_rng(7).normal(size=length) for length in LENGTHS]
        for place, step in enumerate(steps):
            # Less and less noise, with one relapse.
            noise = 0.6 / (place + 1) + (1.0 if place == 3 * seed else 0)
            for method in ("N-Enc", "W-Res"):
                for layer in (1, 2):
                    rows[step, method, layer] = [np.exp(one + noise * draw.normal(size=len(one))) for one in base]
        write_run(tmp_path, f"seed-{seed}", seed=seed, steps=steps, rows=rows)
    loaded = study.load(tmp_path)
    drift = loaded.drift()
    found = loaded.stabilization(threshold)
    assert len(found) == 2 * 2 * 2
    for row in found.itertuples():
        part = drift[(drift["run"] == row.run) & (drift["method"] == row.method) & (drift["layer"] == row.layer)]
        means = {step: part[part["step"] == step]["drift"].mean() for step in steps[1:]}
        expected = None
        for step in steps[1:]:
            if all(means[later] <= threshold for later in steps[1:] if later >= step):
                expected = step
                break
        if expected is None:
            assert row.step is not row.step or str(row.step) == "<NA>"
            assert row.remaining == 0
        else:
            assert row.step == expected
            assert row.remaining == len([one for one in steps if one >= expected])
        assert row.analyses == len(steps) - 1
        assert row.seed == int(row.run[-1])


@pytest.mark.parametrize("threshold", [-0.1, 2.5, float("nan")])
def test_stabilization_refuses_a_threshold_that_drift_cannot_have(tmp_path: Path, threshold: float) -> None:
    write_run(tmp_path, "one")
    with pytest.raises(RecordError, match="between 0 and 2"):
        study.load(tmp_path).stabilization(threshold)


@pytest.mark.parametrize("by", ["spearman", "jaccard"])
@pytest.mark.parametrize("special_tokens", [False, True])
def test_agreement_is_that_of_one_example_at_a_time(tmp_path: Path, by: str, special_tokens: bool) -> None:
    runs = {
        f"seed-{seed}": write_run(tmp_path, f"seed-{seed}", seed=seed, steps=steps)
        for seed, steps in ((1, (10, 20, 30)), (2, (10, 30)), (3, (20, 30, 40)))
    }
    found = study.load(tmp_path).agreement(by=by, special_tokens=special_tokens)
    expected = {}
    for left, right in (("seed-1", "seed-2"), ("seed-1", "seed-3"), ("seed-2", "seed-3")):
        mine, theirs = runs[left], runs[right]
        for step in sorted(set(mine.predicted) & set(theirs.predicted)):
            for example in range(len(LENGTHS)):
                if mine.predicted[step][example] == theirs.predicted[step][example]:
                    for method in ("N-Enc", "W-Res"):
                        for layer in (1, 2):
                            rows = [
                                counted(run, (step, method, layer), example, special_tokens) for run in (mine, theirs)
                            ]
                            expected[left, right, step, example, method, layer] = similarity(*rows, by)
    keys = ["run", "other_run", "step", "example", "method", "layer"]
    assert set(found[keys].itertuples(index=False, name=None)) == set(expected)
    assert len(found) == len(expected)
    for row in found.itertuples():
        key = tuple(getattr(row, name) for name in keys)
        assert row.agreement == pytest.approx(expected[key], abs=1e-12, nan_ok=True)


def test_two_identical_runs_agree_to_one(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path, f"seed-{seed}", seed=seed, draws=5)
    for by in ("spearman", "jaccard"):
        found = study.load(tmp_path).agreement(by=by)
        values = found["agreement"].dropna()
        assert len(values) > len(found) / 2
        assert values.to_numpy() == pytest.approx(1, abs=1e-12)


def test_agreement_compares_runs_that_differ_in_one_thing_alone(tmp_path: Path) -> None:
    for seed in (1, 2):
        for rate in (0.1, 0.2):
            write_run(tmp_path, f"s{seed}-r{rate}", seed=seed, hyperparameters={"optimizer": {"lr": rate}, "size": 3})
    loaded = study.load(tmp_path)

    def pairs(between: str) -> set[tuple[str, str]]:
        found = loaded.agreement(between, layers=1)[["run", "other_run"]].drop_duplicates()
        return {tuple(sorted(one)) for one in found.itertuples(index=False, name=None)}

    assert pairs("seed") == {("s1-r0.1", "s2-r0.1"), ("s1-r0.2", "s2-r0.2")}
    assert pairs("optimizer.lr") == {("s1-r0.1", "s1-r0.2"), ("s2-r0.1", "s2-r0.2")}
    assert len(pairs("run")) == 6
    with pytest.raises(RecordError, match="no two runs differ in 'size'"):
        loaded.agreement("size")
    with pytest.raises(RecordError, match=r"optimizer\.lr, run, seed, size"):
        loaded.agreement("learning_rate")


def test_agreement_needs_two_runs_and_known_seeds(tmp_path: Path) -> None:
    write_run(tmp_path, "one", seed=None, draws=1)
    with pytest.raises(RecordError, match="this study has one"):
        study.load(tmp_path).agreement()
    write_run(tmp_path, "two", seed=None, draws=2)
    with pytest.raises(RecordError, match="seed_everything"):
        study.load(tmp_path).agreement()
    assert len(study.load(tmp_path).agreement("run")) > 0


def test_agreement_of_runs_that_never_predict_the_same_is_empty(tmp_path: Path) -> None:
    size = len(LENGTHS)
    write_run(tmp_path, "one", seed=1, predicted=dict.fromkeys(STEPS, [0] * size))
    write_run(tmp_path, "two", seed=2, predicted=dict.fromkeys(STEPS, [1] * size))
    assert study.load(tmp_path).agreement().empty


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda found: found.drift(against="next"), "'previous', 'first', 'last'"),
        (lambda found: found.drift(by="pearson"), "'spearman', 'jaccard'"),
        (lambda found: found.agreement(by="kendall"), "'spearman', 'jaccard'"),
        (lambda found: found.drift(methods="W-Enc"), "N-Enc, W-Res"),
        (lambda found: found.drift(layers=3), "1, 2"),
        (lambda found: found.drift(layers=[1, 0]), "1, 2"),
    ],
)
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, call: Any, told: str) -> None:
    write_run(tmp_path, "one", seed=1)
    write_run(tmp_path, "two", seed=2)
    with pytest.raises(RecordError, match=told):
        call(study.load(tmp_path))
