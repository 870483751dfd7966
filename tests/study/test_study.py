"""Means with intervals over runs and examples, and what they speak of."""

from pathlib import Path

import numpy as np
import pytest

from globenc_lightning import study
from globenc_lightning.errors import RecordError
from globenc_lightning.study.bootstrap import interval
from tests.study.records import LENGTHS, write_run


def test_a_summary_is_the_interval_of_the_table_of_runs_and_examples(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"seed-{seed}", seed=seed) for seed in (1, 2, 3)]
    loaded = study.load(tmp_path)
    found = loaded.summary(loaded.correlations(), "rho", draws=200, level=0.9, seed=4)
    assert len(found) == 2 * 2 * 3
    for row in found.itertuples():
        table = np.array([run.rho[row.step, row.method, row.layer] for run in runs])
        expected = interval(table, level=0.9, draws=200, seed=4)
        assert (row.mean, row.low, row.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-12)
        # One example has a single token, and no rank correlation.
        assert (row.runs, row.examples, row.over) == (3, len(LENGTHS) - 1, "runs and examples")


def test_a_single_run_has_an_interval_over_examples_that_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    loaded = study.load(tmp_path)
    found = loaded.summary(loaded.correlations(), "rho")
    assert set(found["over"]) == {"examples alone"}
    assert set(found["runs"]) == {1}


def test_pairs_of_runs_count_as_their_runs(tmp_path: Path) -> None:
    same = {step: [0] * len(LENGTHS) for step in (10, 20, 30)}
    for seed in (1, 2, 3):
        write_run(tmp_path, f"seed-{seed}", seed=seed, predicted=same)
    loaded = study.load(tmp_path)
    alike = loaded.agreement(methods="N-Enc", layers=2)
    found = loaded.summary(alike, "agreement", ["step"])
    assert set(found["runs"]) == {3}
    assert set(found["over"]) == {"runs and examples"}
    order = [(0, 1), (0, 2), (1, 2)]
    for row in found.itertuples():
        part = alike[alike["step"] == row.step]
        table = part.pivot_table(index=["run", "other_run"], columns="example", values="agreement", dropna=False)
        table = table.dropna(how="all")
        assert [*table.index] == [("seed-1", "seed-2"), ("seed-1", "seed-3"), ("seed-2", "seed-3")]
        expected = interval(table.to_numpy(), pairs=order)
        assert (row.mean, row.low, row.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-12)
    two = study.load(tmp_path, runs=["seed-1", "seed-2"])
    assert set(two.summary(two.agreement(), "agreement")["over"]) == {"examples alone"}


def test_runs_that_end_earlier_are_counted_where_they_are(tmp_path: Path) -> None:
    write_run(tmp_path, "long", steps=(10, 20), seed=1)
    write_run(tmp_path, "short", steps=(10,), seed=2)
    loaded = study.load(tmp_path)
    found = loaded.summary(loaded.correlations("N-Enc", 1), "rho", ["step"]).set_index("step")
    assert found["runs"].to_dict() == {10: 2, 20: 1}
    assert found["over"].to_dict() == {10: "runs and examples", 20: "examples alone"}


def test_a_summary_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    loaded = study.load(tmp_path)
    rho = loaded.correlations()
    with pytest.raises(RecordError, match="no column 'drift'; it has run, seed"):
        loaded.summary(rho, "drift")
    with pytest.raises(RecordError, match="no column 'head'"):
        loaded.summary(rho, "rho", ["head"])
    with pytest.raises(RecordError, match="'label', 'right', 'region'"):
        loaded.summary(rho, "rho", group="length")


def test_a_study_says_what_it_is_of(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    write_run(tmp_path, "two", seed=1)
    loaded = study.load(tmp_path)
    assert repr(loaded) == "Study(2 runs, N-Enc, W-Res, 2 layers)"
    assert loaded.layers == 2
    assert [*loaded.probe["token"]][:2] == ["[CLS]", "not"]
