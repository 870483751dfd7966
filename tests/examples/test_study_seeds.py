"""The study of several seeds end to end, on a tiny encoder with random weights."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from globenc_lightning import study
from tests.examples.test_finetune_sentiment import encoder, write_sentences

__all__ = ["encoder"]
SCRIPT = Path(__file__).parents[2] / "examples" / "study_seeds.py"
FIGURES = ["agreement.png", "drift.png", "ladder_by_layer.png", "ladder_over_training.png"]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("study_seeds", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_records_each_seed_prints_the_tables_and_saves_the_figures(
    example: ModuleType, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_sentences(tmp_path / "sentences.tsv"), tmp_path / "my study"
    arguments = ["--model", str(encoder), "--data", str(data), "--output", str(output), "--batch-size", "6"]
    sizes = ["--num-examples", "5", "--validations", "2", "--seeds", "3", "4", "--learning-rate", "0.01"]
    assert example.main([*arguments, *sizes]) == 0

    found = study.load(output / "record")
    assert found.runs["run"].tolist() == ["seed-3", "seed-4"]
    assert found.runs["seed"].tolist() == [3, 4]
    steps = found.correlations().groupby("run")["step"].unique()
    assert steps["seed-3"].tolist() == steps["seed-4"].tolist() == [0, 1, 2, 3, 7]
    texts = found.probe.groupby("example")["text"].first()
    assert len(texts) == 5
    rho = found.correlations("N-Enc", found.layers).pivot(index=["step", "example"], columns="run", values="rho")
    assert (rho["seed-3"] != rho["seed-4"]).any()

    printed = capsys.readouterr().out
    assert sorted(one.name for one in (output / "figures").iterdir()) == FIGURES
    assert "n = 2 runs, 5 sentences; interval over runs and examples" in printed
    at_end = found.correlations("N-Enc", found.layers)
    summary = found.summary(at_end[at_end["step"] == 7], "rho", ["method"]).iloc[0]
    line = f"  N-Enc      {summary['mean']:6.3f}  [{summary['low']:6.3f}, {summary['high']:6.3f}]"
    assert line in printed
    assert len([*(output / "runs").glob("seed-*/events.out.tfevents.*")]) == 2

    with pytest.raises(SystemExit) as raised:
        example.main([*arguments, *sizes])
    assert raised.value.code == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-examples", "0"], "--num-examples has to be at least 1, not 0"),
        (["--validations", "0"], "--validations has to be at least 1, not 0"),
        (["--seeds", "1", "1"], "--seeds have to be different numbers from 0"),
        (["--seeds", "-1"], "--seeds have to be different numbers from 0"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    example: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        example.main(options)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_runs_as_a_script_with_the_packaged_model(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--seeds", "0", "1", "--output", "study"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(one.name for one in (tmp_path / "study" / "figures").iterdir()) == FIGURES
