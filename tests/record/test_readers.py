"""A record as other packages read it: pandas anywhere, polars and DuckDB where ``make readers`` has installed them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from globenc_lightning.record.writing import RecordOptions
from tests.record.analyses import LENGTHS, made, run_with

ADVICE = "is not installed: `make readers` has an environment with it"
RUNS = {"seed-1": [0, 10, 20], "seed-2": [0, 10], "2024": [10]}
"""The steps of each run; one has a name that looks like a number."""


def _installed(name: str) -> Any:
    """The package; under ``GLOBENC_READERS=required`` it may not be missing."""
    if os.environ.get("GLOBENC_READERS") == "required":
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} {ADVICE}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of several runs; of one of them something was still being written when it was killed."""
    folder = tmp_path_factory.mktemp("record")
    for name, steps in RUNS.items():
        run_with(folder, name, steps)
    for kind in ("tokens", "examples"):
        (folder / kind / "run=seed-1" / ".step-00000030.parquet.17.part").write_bytes(b"PAR1")
    return folder


def expected(kind: str) -> dict[tuple[str, int], Any]:
    """(run, step) -> the last layer's rows of N-Enc, all examples in a row; or rho."""
    found = {}
    for name, steps in RUNS.items():
        for step in steps:
            measurement = made(step).measurement
            if kind == "tokens":
                found[name, step] = np.concatenate([one["N-Enc"][-1].numpy() for one in measurement.rows])
            else:
                found[name, step] = measurement.correlation["N-Enc"][:, -1].numpy()
    return found


def check(frame: Any, kind: str, column: str) -> None:
    """See that a pandas frame holds every run and step, with the very figures that were written."""
    wanted = expected(kind)
    keys = ["example", "position"] if kind == "tokens" else ["example"]
    assert len(frame) == len(wanted) * (sum(LENGTHS) if kind == "tokens" else len(LENGTHS))
    for (run, step), values in wanted.items():
        part = frame[(frame["run"].astype(str) == run) & (frame["step"] == step)].sort_values(keys)
        assert np.array_equal(part[column].to_numpy(), values), (run, step)


@pytest.mark.parametrize(("kind", "column"), [("tokens", "N-Enc/02"), ("examples", "rho/N-Enc/02")])
def test_pandas_reads_several_runs_in_one_line(folder: Path, kind: str, column: str) -> None:
    import pandas

    check(pandas.read_parquet(folder / kind), kind, column)


@pytest.mark.parametrize(("kind", "column"), [("tokens", "N-Enc/02"), ("examples", "rho/N-Enc/02")])
def test_polars_reads_several_runs_in_one_line(folder: Path, kind: str, column: str) -> None:
    polars = _installed("polars")
    check(polars.read_parquet(folder / kind / "**/*.parquet", hive_partitioning=True).to_pandas(), kind, column)


@pytest.mark.parametrize(("kind", "column"), [("tokens", "N-Enc/02"), ("examples", "rho/N-Enc/02")])
def test_duckdb_reads_several_runs_in_one_line(folder: Path, kind: str, column: str) -> None:
    duckdb = _installed("duckdb")
    check(duckdb.sql(f"from read_parquet('{folder}/{kind}/*/*.parquet', hive_partitioning=true)").df(), kind, column)


def test_the_text_is_read_beside_the_figures(folder: Path) -> None:
    import pandas

    probe = pandas.read_parquet(folder / "probe")
    tokens = pandas.read_parquet(folder / "tokens").merge(probe, on=["run", "example", "position"])
    assert len(tokens) == sum(map(len, RUNS.values())) * sum(LENGTHS)
    assert not tokens["token"].isna().any()


@pytest.mark.parametrize("package", ["pandas", "polars", "duckdb"])
def test_runs_with_other_methods_and_layers_are_read_together(tmp_path: Path, package: str) -> None:
    run_with(tmp_path, "whole", [1])
    run_with(tmp_path, "part", [1], RecordOptions(methods=["N-Res"], layers="last"))
    files = sorted((tmp_path / "tokens").glob("*/*.parquet"))
    if package == "pandas":
        import pandas

        runs = (tmp_path / "tokens").iterdir()
        frame = pandas.concat([pandas.read_parquet(one).assign(run=one.name.removeprefix("run=")) for one in runs])
    elif package == "polars":
        polars = _installed("polars")
        frame = polars.concat([polars.read_parquet(one, hive_partitioning=True) for one in files], how="diagonal")
        frame = frame.to_pandas()
    else:
        duckdb = _installed("duckdb")
        every = f"'{tmp_path}/tokens/*/*.parquet', hive_partitioning=true, union_by_name=true"
        frame = duckdb.sql(f"from read_parquet({every})").df()
    rows = np.concatenate([one["N-Res"][-1].numpy() for one in made(1).measurement.rows])
    for run in ("whole", "part"):
        assert np.array_equal(frame[frame["run"] == run]["N-Res/02"].to_numpy(), rows)
    assert frame[frame["run"] == "part"]["N-Enc/02"].isna().all()
    assert not frame[frame["run"] == "whole"]["N-Enc/02"].isna().any()


def test_json_of_every_run_is_read_by_duckdb(folder: Path) -> None:
    duckdb = _installed("duckdb")
    found = duckdb.sql(f"select run, layers from read_json('{folder}/about/*.json') order by run").fetchall()
    assert found == [(one, 2) for one in sorted(RUNS)]
