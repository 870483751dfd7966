"""``globenc show``: the tables of one run and of many, and their figures."""

import io
import re
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from rich.console import Console

from globenc_lightning import METHODS, record_checkpoint, study
from globenc_lightning.record.command import FAILED, main
from globenc_lightning.record.show import MOST_STEPS, print_study
from tests.training import Sentences, classifier

SIZE = 4


def recorded(folder: Path, run: str, seed: int, steps: list[int], size: int = SIZE, layers: int = 2) -> None:
    """A run whose weights move a little at each step, from others for each seed."""
    model = classifier(num_hidden_layers=layers).eval()
    draw = torch.Generator().manual_seed(seed)
    for step in steps:
        with torch.no_grad():
            for one in model.parameters():
                one.add_(torch.randn(one.shape, generator=draw), alpha=0.05)
        record_checkpoint(model, Sentences().first(size), step=step, folder=folder, run=run, extra={"seed": seed})


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "record"
    for seed in (1, 2):
        recorded(folder, f"seed-{seed}", seed, [2, 4, 6])
    return folder


def printed(*arguments: Any, width: int = 200) -> str:
    to = io.StringIO()
    print_study(*arguments, console=Console(file=to, width=width))
    return to.getvalue()


def cells(text: str, title: str) -> dict[str, list[str]]:
    """The rows of a table below its title, by their first cell."""
    lines = text[text.index(title) :].splitlines()[1:]
    end = next(place for place, line in enumerate(lines) if line.startswith("└"))
    rows = [[one.strip() for one in re.split("[│┃]", line)[1:-1]] for line in lines[:end] if line[0] in "│┃"]
    return {row[0]: row[1:] for row in rows}


def test_the_tables_hold_the_figures_of_the_study(record: Path) -> None:
    found = study.load(record)
    text = printed(found)
    for title, frame, value in (
        ("Rho with", found.correlations(layers=2), "rho"),
        ("Drift", found.drift(layers=2), "drift"),
        ("Agreement", found.agreement(layers=2), "agreement"),
    ):
        rows = cells(text, title)
        assert rows["step"] == list(METHODS)
        means = frame.groupby(["step", "method"])[value].mean()
        assert [*rows] == ["step", *(str(step) for step in sorted(frame["step"].unique()))]
        for step in frame["step"].unique():
            shown = [float(one.split(" ± ")[0]) for one in rows[str(step)]]
            assert shown == pytest.approx([means[step, method] for method in METHODS], abs=2e-3)
    assert "4 examples and 2 runs" in text
    stable = cells(text, "First step after which")
    expected = found.stabilization(0.1, layers=2).set_index(["run", "method"])["step"]
    for run in ("seed-1", "seed-2"):
        steps = [expected[run, method] for method in METHODS]
        assert stable[run] == ["never" if pandas.isna(one) else str(one) for one in steps]


def test_one_run_has_bands_of_examples_alone_and_no_agreement(record: Path) -> None:
    text = printed(study.load(record, runs=["seed-1"]), ["N-Enc", "W"])
    assert "95 % interval over examples alone" in text
    assert cells(text, "Rho with")["step"] == ["N-Enc", "W"]
    assert "Agreement" not in text


def test_one_analysis_has_no_drift(tmp_path: Path) -> None:
    recorded(tmp_path, "a", 1, [3])
    text = printed(study.load(tmp_path))
    assert "No drift yet: it needs two analyses." in text
    assert [*cells(text, "Rho with")] == ["step", "3"]


def test_a_long_training_is_thinned_and_keeps_both_ends(tmp_path: Path) -> None:
    recorded(tmp_path, "a", 1, [*range(20)], size=2, layers=1)
    steps = [*cells(printed(study.load(tmp_path), ["W"]), "Rho with")][1:]
    assert len(steps) == MOST_STEPS
    assert (steps[0], steps[-1]) == ("0", "19")


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_command_prints_and_saves_figures(record: Path, kind: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["show", str(record), "--save", str(tmp_path / "f"), "--format", kind, "--methods", "N-Enc"]) == 0
    names = ["agreement", "drift", "ladder_by_layer", "ladder_over_training"]
    assert sorted(one.name for one in (tmp_path / "f").iterdir()) == [f"{name}.{kind}" for name in names]
    assert all(one.stat().st_size > 1000 for one in (tmp_path / "f").iterdir())
    text = capsys.readouterr().out
    assert text.count(f".{kind}") == 4
    assert "N-Enc" in text
    assert "N-ResLN" not in text


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no folder", "there is no folder"),
        ("no record", "no record"),
        ("no such run", "there is no run 'x'"),
        ("mixed probes", "different probes"),
        ("mixed depth", "different depth"),
        ("threshold", "threshold must lie between 0 and 2"),
        ("schema", "has the schema number 99"),
        ("torn", "cannot be read"),
    ],
)
def test_bad_records_get_a_message(case: str, message: str, record: Path, tmp_path: Path, capsys: Any) -> None:
    options: list[str] = []
    folder = tmp_path / "record"
    if case in ("no such run", "threshold"):
        folder = record
        options = ["--runs", "x"] if case == "no such run" else ["--threshold", "3"]
    elif case == "no record":
        folder.mkdir()
    elif case in ("mixed probes", "mixed depth"):
        recorded(folder, "a", 1, [2], size=2)
        mixed = {"size": 3} if case == "mixed probes" else {"size": 2, "layers": 3}
        recorded(folder, "b", 1, [2], **mixed)
    elif case in ("schema", "torn"):
        recorded(folder, "a", 1, [2], size=2, layers=1)
        if case == "schema":
            about = folder / "about" / "a.json"
            about.write_text(about.read_text("utf-8").replace('"schema": 1', '"schema": 99'), "utf-8")
        else:
            for file in folder.glob("*/run=a/step-*.parquet"):
                file.write_bytes(file.read_bytes()[:100])
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert main(["show", str(folder), *options]) == FAILED
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("globenc show: ")
    assert message in said
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
