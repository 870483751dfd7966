"""The comparison of methods end to end, on a tiny encoder with random weights."""

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from globenc_lightning import METHODS, GlobEncCallback
from tests.examples.test_finetune_sentiment import encoder, write_sentences

__all__ = ["encoder"]
SCRIPT = Path(__file__).parents[2] / "examples" / "compare_methods.py"
ROWS = (*METHODS, "ALTI", "Value-Zeroing", "Attention flow")


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("compare_methods", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_writes_a_table_of_all_methods_and_a_figure(
    example: ModuleType, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    data, output = write_sentences(tmp_path / "sentences.tsv"), tmp_path / "my comparison"
    original, callbacks = example.compared, []

    def compared(callback: GlobEncCallback, names: dict[str, str]) -> Any:
        callbacks.append(callback)
        return original(callback, names)

    monkeypatch.setattr(example, "compared", compared)
    sizes = ["--batch-size", "6", "--num-examples", "7", "--learning-rate", "0.01", "--epochs", "3"]
    example.main(["--model", str(encoder), "--data", str(data), "--output", str(output), *sizes])

    printed = capsys.readouterr().out
    with (output / "table.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert sorted({line["method"] for line in lines}) == sorted(ROWS)
    assert [line["column"] for line in lines[: len(example.HEADINGS)]] == list(example.HEADINGS)
    assert [len(callback.history[-1].score) for callback in callbacks] == [7, 7]
    for line in lines:
        flow = line["method"] == "Attention flow"
        entry, method = callbacks[flow].history[-1], "W-FixedRes" if flow else line["method"]
        values = {
            "saliency": entry.by_example[method][:, -1],
            **{reference: rho[method][:, -1] for reference, rho in entry.reference_rho.items()},
            example.GAIN: entry.faithfulness.gain[method],
            example.KEPT: entry.faithfulness.sufficiency_gain[method],
            example.ODDS: entry.faithfulness.log_odds[method],
        }[line["column"]]
        known = values[~values.isnan()].double()
        assert int(line["n"]) == len(known)
        assert float(line["mean"]) == pytest.approx(float(known.mean()), abs=2e-6, nan_ok=True)
    assert "7 held-out sentences" in printed
    assert (output / "table.md").read_text(encoding="utf-8").split("\n\n", 1)[1].strip() in printed
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_is_students_and_nothing_is_none(example: ModuleType) -> None:
    cell = example.cell_of(torch.tensor([0.1, float("nan"), 0.4, 0.5]))
    known = np.array([0.1, 0.4, 0.5])
    low, high = stats.t.interval(0.95, 2, known.mean(), stats.sem(known))
    assert cell.n == 3
    assert (cell.mean - cell.half, cell.mean + cell.half) == pytest.approx((low, high), abs=1e-6)
    assert str(example.cell_of(torch.full((2,), float("nan")))) == "-"


def test_the_figure_shows_every_cell_the_best_method_on_top(example: ModuleType) -> None:
    cells = {name: example.Cell(mean, 0.1, 9) for name, mean in {"low": 0.1, "high": 0.7, "none": float("nan")}.items()}
    rows = {name: dict.fromkeys(example.HEADINGS, cell) for name, cell in cells.items()}
    assert example.ordered(rows) == ["high", "low", "none"]
    figure = example.draw(rows, "a title")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["none", "low", "high"]
    for panel in figure.axes:
        shown = panel.lines[0].get_xdata()
        assert np.isnan(shown[0])
        assert list(shown[1:]) == [0.1, 0.7]


def test_without_installing_a_wrong_option_is_told(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), "--num-examples", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "--num-examples has to be at least 1, not 0" in done.stderr
