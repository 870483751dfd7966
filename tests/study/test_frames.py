"""Tables in long form: every figure stands where it belongs."""

from pathlib import Path

import numpy as np
import pytest

from globenc_lightning import study
from globenc_lightning.record import schema
from tests.study.records import LENGTHS, write_run


def test_correlations_are_those_of_the_record(tmp_path: Path) -> None:
    runs = {f"seed-{seed}": write_run(tmp_path, f"seed-{seed}", seed=seed) for seed in (1, 2)}
    found = study.load(tmp_path).correlations()
    assert [*found.columns] == ["run", "seed", "step", "epoch", "example", "method", "layer", "rho"]
    assert len(found) == 2 * 3 * len(LENGTHS) * 2 * 2
    for row in found.itertuples():
        expected = runs[row.run].rho[row.step, row.method, row.layer][row.example]
        assert row.rho == pytest.approx(expected, abs=1e-12, nan_ok=True)
        assert row.seed == int(row.run[-1])
    some = study.load(tmp_path).correlations("W-Res", [2])
    assert set(some["method"]) == {"W-Res"}
    assert set(some["layer"]) == {2}
    assert len(some) == len(found) / 4


@pytest.mark.parametrize("special_tokens", [True, False])
def test_tokens_are_those_of_the_record(tmp_path: Path, special_tokens: bool) -> None:
    run = write_run(tmp_path, "one")
    found = study.load(tmp_path).tokens(special_tokens=special_tokens)
    counted = sum(special_tokens or not mark for marks in run.special for mark in marks)
    assert len(found) == 3 * counted * 2 * 2
    for row in found.sample(200, random_state=0).itertuples():
        assert row.value == run.rows[row.step, row.method, row.layer][row.example][row.position]
        assert row.token == run.tokens[row.example][row.position]
        assert bool(row.special) == run.special[row.example][row.position]
    assert special_tokens == bool(found["special"].astype(bool).any())


def test_tokens_read_only_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    found = study.load(tmp_path).tokens("N-Enc", 1)
    assert (set(found["method"]), set(found["layer"])) == ({"N-Enc"}, {1})
    assert not found.duplicated(["run", "step", "example", "position", "method", "layer"]).any()


def test_examples_have_what_was_decided(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one")
    found = study.load(tmp_path).examples()
    assert len(found) == 3 * len(LENGTHS)
    assert not [name for name in found.columns if name.startswith("rho")]
    assert {"run", "seed", *schema.EXAMPLE_COLUMNS} == set(found.columns)
    for row in found.itertuples():
        assert row.predicted == run.predicted[row.step][row.example]
        assert row.label == run.labels[row.example]
        assert [*row.logits] == pytest.approx(run.logits[row.step][row.example].tolist(), abs=1e-6)


def test_xarray_has_the_same_figures_by_name(tmp_path: Path) -> None:
    pytest.importorskip("xarray")
    runs = {f"seed-{seed}": write_run(tmp_path, f"seed-{seed}", seed=seed) for seed in (1, 2)}
    found = study.load(tmp_path).to_xarray()
    assert found["rho"].dims == ("run", "step", "example", "method", "layer")
    assert [*found["method"].values] == ["N-Enc", "W-Res"]
    assert [*found["seed"].values] == [1, 2]
    for name, run in runs.items():
        for (step, method, layer), rho in run.rho.items():
            values = found["rho"].sel({"run": name, "step": step, "method": method, "layer": layer}).values
            assert values == pytest.approx(rho, abs=1e-12, nan_ok=True)
        for step, predicted in run.predicted.items():
            assert np.array_equal(found["predicted"].sel(run=name, step=step).values, predicted)


def test_runs_of_different_lengths_have_gaps_in_xarray(tmp_path: Path) -> None:
    pytest.importorskip("xarray")
    write_run(tmp_path, "long", steps=(10, 20))
    write_run(tmp_path, "short", steps=(10,), seed=1)
    rho = study.load(tmp_path).to_xarray()["rho"]
    assert bool(rho.sel(run="short", step=20).isnull().all())
    assert not bool(rho.sel(run="long", step=20).isnull().all())
