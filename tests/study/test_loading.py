"""Which runs a study takes, what it refuses to mix, and what it says of it."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from globenc_lightning import study
from globenc_lightning.errors import GlobEncWarning, RecordError
from globenc_lightning.record import schema
from tests.study.records import write_run


def names(loaded: Any) -> list[str]:
    return [*loaded.runs["run"]]


def test_one_folder_many_folders_and_patterns_give_the_same_runs(tmp_path: Path) -> None:
    for version in range(3):
        write_run(tmp_path / "logs" / f"version_{version}" / "globenc", f"run-{version}", seed=version)
    expected = ["run-0", "run-1", "run-2"]
    logs = tmp_path / "logs"
    folders = [logs / f"version_{version}" for version in range(3)]
    for given in (
        logs,
        str(logs),
        folders,
        [folder / "globenc" for folder in folders],
        logs / "version_*" / "globenc",
        str(logs / "*"),
        str(tmp_path / "**" / "globenc"),
        [logs, logs / "version_1"],
    ):
        assert names(study.load(given)) == expected, given
    assert names(study.load([logs / "version_[12]"])) == ["run-1", "run-2"]


def test_runs_of_one_folder_are_told_apart_by_their_names(tmp_path: Path) -> None:
    for seed in (3, 1, 2):
        write_run(tmp_path, f"seed-{seed}", seed=seed)
    loaded = study.load(tmp_path)
    assert names(loaded) == ["seed-1", "seed-2", "seed-3"]
    assert [*loaded.runs["seed"]] == [1, 2, 3]
    assert names(study.load(tmp_path, runs=["seed-3", "seed-1"])) == ["seed-1", "seed-3"]
    assert len(loaded) == 3


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for version in (0, 1):
        write_run(tmp_path / f"version_{version}" / "globenc", "run", seed=version)
    found = names(study.load(tmp_path))
    assert found == ["version_0/globenc/run", "version_1/globenc/run"]
    assert len(set(study.load(tmp_path).correlations()["run"])) == 2


def test_a_link_to_a_record_is_no_second_run(tmp_path: Path) -> None:
    write_run(tmp_path / "one", "run")
    os.symlink(tmp_path / "one", tmp_path / "other")
    assert names(study.load([tmp_path / "one", tmp_path / "other"])) == ["run"]


def test_runs_have_their_hyperparameters_steps_and_folder(tmp_path: Path) -> None:
    settings = {"lr": 0.1, "optimizer": {"name": "adam", "betas": [0.9, 0.99]}, "empty": None}
    write_run(tmp_path, "one", seed=7, hyperparameters=settings, steps=(5, 25))
    write_run(tmp_path, "two", seed=None, draws=1, steps=(5,))
    table = study.load(tmp_path).runs.set_index("run")
    one = table.loc["one"]
    assert (one["seed"], one["lr"], one["optimizer.name"]) == (7, 0.1, "adam")
    assert one["optimizer.betas"] == (0.9, 0.99)
    assert (one["analyses"], one["first_step"], one["last_step"]) == (2, 5, 25)
    assert one["folder"] == str(tmp_path)
    assert table.loc["two"]["seed"] != table.loc["two"]["seed"] or table.loc["two"]["seed"] is None


def test_a_run_that_is_still_written_is_read_anew(tmp_path: Path) -> None:
    write_run(tmp_path, "one", steps=(10,))
    loaded = study.load(tmp_path)
    assert set(loaded.correlations()["step"]) == {10}
    write_run(tmp_path, "one", steps=(10, 20))
    assert set(loaded.correlations()["step"]) == {10, 20}
    assert loaded.runs["last_step"].tolist() == [20]


def test_runs_without_an_analysis_are_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path, "begun", steps=())
    with pytest.raises(RecordError, match="has an analysis yet"):
        study.load(tmp_path)
    write_run(tmp_path, "one")
    assert names(study.load(tmp_path)) == ["one"]


def test_different_probes_are_refused_and_one_can_be_chosen(tmp_path: Path) -> None:
    write_run(tmp_path, "a", probe="first")
    write_run(tmp_path, "b", probe="second")
    write_run(tmp_path, "c", probe="second")
    with pytest.raises(RecordError, match=r"different probes.*first \(a\).*second \(b, c\).*probe='first'"):
        study.load(tmp_path)
    assert names(study.load(tmp_path, probe="second")) == ["b", "c"]
    assert names(study.load(tmp_path, runs=["a"])) == ["a"]
    with pytest.raises(RecordError, match="no run has the probe 'third'"):
        study.load(tmp_path, probe="third")


def test_encoders_of_different_depth_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "a", layers=2)
    write_run(tmp_path, "b", layers=3)
    for probe in (None, "one probe"):
        with pytest.raises(RecordError, match=r"different depth.*a has 2, b has 3"):
            study.load(tmp_path, probe=probe)


@pytest.mark.parametrize(("choice", "value"), [("readout", "mean"), ("task", "regression"), ("normalize", True)])
def test_runs_whose_figures_are_of_other_things_are_named(tmp_path: Path, choice: str, value: object) -> None:
    for name, chosen in (("a", "cls"), ("b", "cls"), ("c", value)):
        write_run(tmp_path, name)
        file = schema.about_file(tmp_path, name)
        told = json.loads(file.read_text())
        told["about"][choice] = chosen
        file.write_text(json.dumps(told))
    with pytest.warns(GlobEncWarning, match=rf"these runs differ in {choice}: cls \(a, b\); {value} \(c\)"):
        study.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study.load(tmp_path, runs=["a", "b"])


def test_unknown_special_tokens_are_not_left_out_in_silence(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, f"run-{seed}", seed=seed, special=False)
    loaded = study.load(tmp_path)
    for call in (loaded.drift, loaded.agreement):
        with pytest.warns(GlobEncWarning, match="run-0, run-1 does not tell which tokens are special"):
            told = call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert told.equals(call(special_tokens=True))


def test_methods_and_layers_are_those_that_all_runs_have(tmp_path: Path) -> None:
    write_run(tmp_path, "a", methods=("N-Enc", "W-Res", "W"), recorded_layers=(1, 2))
    write_run(tmp_path, "b", methods=("W", "N-Enc"), recorded_layers=(2,), seed=1)
    with pytest.warns(GlobEncWarning) as told:
        loaded = study.load(tmp_path)
    assert [str(one.message) for one in told] == [
        "not all runs have the correlations of method W-Res: left out.",
        "not all runs have the attributions of method W-Res: left out.",
        "not all runs have the attributions of layer 1: left out.",
    ]
    assert loaded.methods == ["N-Enc", "W"]
    assert set(loaded.correlations()["method"]) == {"N-Enc", "W"}
    assert loaded.recorded_layers == [2]
    assert set(loaded.tokens()["layer"]) == {2}
    with pytest.raises(RecordError, match=r"not every run has the method 'W-Res'.*N-Enc, W"):
        loaded.correlations("W-Res")
    write_run(tmp_path, "c", methods=("N-Res",))
    with pytest.raises(RecordError, match="no method in common"):
        study.load(tmp_path)


def test_no_folder_no_match_and_no_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no folder was given"):
        study.load([])
    with pytest.raises(RecordError, match=r"no folder .*nowhere"):
        study.load(tmp_path / "nowhere")
    with pytest.raises(RecordError, match="none that matches"):
        study.load(tmp_path / "version_*")
    with pytest.raises(RecordError, match="no record in"):
        study.load(tmp_path)
    write_run(tmp_path, "one")
    with pytest.raises(RecordError, match="there is no run 'two'; there are one"):
        study.load(tmp_path, runs=["two"])


def test_a_later_version_s_record_is_refused_by_name(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    write_run(tmp_path, "two", seed=1)
    file = schema.about_file(tmp_path, "two")
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(RecordError, match=r"two\.json has the schema number 2"):
        study.load(tmp_path)
    assert names(study.load(tmp_path, runs=["one"])) == ["one"]
