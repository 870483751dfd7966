"""Integrated gradients and hidden token attribution over a whole training, resumed, and in several processes."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from globenc_lightning import GlobEncCallback, attribute, references
from globenc_lightning.history import HistoryEntry
from globenc_lightning.references import INCOMPLETE, told_of
from tests.task.test_zoo import BY_NAME, INFORMATIVE, train
from tests.test_callback import assert_same
from tests.test_distributed import run
from tests.training import Sentences, Snapshots, Steps, build_trainer, final_state, fit, loader, said

INTEGRATED, HTA = "integrated gradients", "HTA"
ASKED: dict[str, Any] = {"methods": ["N-Enc", "W"], "heatmap_examples": 0, "references": (INTEGRATED, HTA)}


def assert_holds(entry: HistoryEntry, references: dict[str, list[Tensor]], rho: dict[str, dict[str, Tensor]]) -> None:
    assert list(entry.references) == list(entry.reference_rho) == [INTEGRATED, HTA]
    for name, rows in references.items():
        for mine, theirs in zip(entry.references[name], rows, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        for method, values in rho[name].items():
            torch.testing.assert_close(
                entry.reference_rho[name][method], values.float(), rtol=0.0, atol=1e-5, equal_nan=True
            )


def test_a_training_is_told_once_that_integrated_gradients_are_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    # They miss too much, and another share at each validation.
    shares, error = itertools.count(50), references.completeness_error
    monkeypatch.setattr(
        references, "completeness_error", lambda *args: torch.full_like(error(*args), next(shares) / 100)
    )
    callback = GlobEncCallback(num_examples=4, **ASKED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Steps(), callback, max_epochs=3)
    assert len(callback.history) >= 3
    assert len([one for one in caught if "integrated gradients miss" in str(one.message)]) == 1


def test_every_validation_has_the_figures_of_its_weights() -> None:
    torch.manual_seed(0)
    probe, module, snapshots = Sentences(5, seed=3).first(5), Steps(), Snapshots()
    callback = GlobEncCallback(probe, **ASKED)
    fit(module, snapshots, callback, max_epochs=2)
    assert callback.history.about.references == ("saliency", INTEGRATED, HTA)
    entries = [entry for entry in callback.history if entry.validation][-2:]
    assert len(snapshots.weights) == 2
    module.trainer = None  # type: ignore[assignment]
    for entry, weights in zip(entries, snapshots.weights, strict=True):
        module.load_state_dict(weights)
        found = attribute(module, probe, methods=["N-Enc", "W"], references=(INTEGRATED, HTA))
        rows = {
            name: [row[real] for row, real in zip(one, found.attention_mask, strict=True)]
            for name, one in found.references.items()
        }
        assert_holds(entry, rows, found.reference_correlation)
    first, last = (entry.references[INTEGRATED][0] for entry in entries)
    assert not torch.equal(first, last)


def test_a_resumed_training_goes_on_with_what_it_had(tmp_path: Path) -> None:
    def training(callback: GlobEncCallback, path: Path | None = None) -> None:
        torch.manual_seed(0)
        keeps = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = build_trainer([callback, keeps], max_epochs=3, enable_checkpointing=True)
        trainer.fit(Steps(), loader(Sentences(16, seed=1)), loader(Sentences()), ckpt_path=path)

    whole, resumed = GlobEncCallback(**ASKED), GlobEncCallback(**ASKED)
    training(whole)
    training(resumed, tmp_path / "epoch=1.ckpt")
    assert [entry.step for entry in resumed.history] == [entry.step for entry in whole.history]
    for mine, theirs in list(zip(resumed.history, whole.history, strict=True))[:-1]:
        assert_holds(mine, theirs.references, theirs.reference_rho)
    # Dropout draws other numbers from the checkpoint on.
    last = resumed.history[-1]
    for reference in (INTEGRATED, HTA):
        assert [len(row) for row in last.references[reference]] == [len(row) for row in last.saliency]
        assert last.reference_rho[reference]["W"].shape == (16, 3)
        assert last.reference_rho[reference]["W"].isfinite().any()


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of a whole training holds for any number of points of the path."""
    monkeypatch.setattr(references, "POINTS", 16)


KINDS = (
    *("sorted_by_length", "binary", "multi_label", "regression_mse", "tagging", "question_answering"),
    *("llama_left", "in_batch_negatives", "probabilities", "linear_probe", "own_loss", "random_field"),
)
"""Modules of the zoo: decisions of every kind that a step is run again for."""


@pytest.mark.parametrize("name", KINDS)
def test_integrated_gradients_of_a_step_that_is_run_again_are_complete(name: str) -> None:
    """Nothing is said of what they miss; and the training is what it is without."""
    case = BY_NAME[name]
    callback = GlobEncCallback(**{**ASKED, "methods": ["N-Enc"], **case.arguments})
    with said() as messages:
        _, trainer = train(case, callback)
    assert [text for text in messages if not INFORMATIVE.search(text)] == []
    state = final_state(trainer)
    entry = callback.history[-1]
    for reference in (INTEGRATED, HTA):
        assert len(entry.references[reference]) == len(entry.saliency) > 0
        assert all(bool((row > 0).any()) for row in entry.references[reference] if len(row) > 1)
        assert entry.reference_rho[reference]["N-Enc"].isfinite().any()
    _, bare = train(case)
    assert_same(state, final_state(bare))


def test_what_is_missed_is_told_from_a_bound_on() -> None:
    assert told_of(torch.tensor([0.99 * INCOMPLETE, 0.0, float("nan")])) == ("", 0.0)
    assert told_of(torch.tensor([float("nan")])) == ("", 0.0)
    word, most = told_of(torch.tensor([0.25, 0.05, float("nan")]))
    assert "miss 25% of what they sum up in an example, 15.0% on average" in word
    assert most == 0.25
    # A training hears of it once, until it is twice as much.
    assert told_of(torch.tensor([0.49]), most) == ("", 0.25)
    assert told_of(torch.tensor([0.51]), most)[0]


def test_a_training_hears_once_of_what_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("globenc_lightning.references.POINTS", 1)
    callback = GlobEncCallback(references=[INTEGRATED], num_examples=4)
    with said() as messages:
        fit(Steps(), callback, max_epochs=4)
    assert len(callback.history) == 5
    told = [text for text in messages if "integrated gradients miss" in text]
    assert 1 <= len(told) <= 2


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float64", "examples": 5}
    (alone,) = run("compared", tmp_path / "1", 1, **options)
    ranks = run("compared", tmp_path / "2", 2, **options)
    assert len(alone["history"]) == 3
    for entry, *others in zip(alone["history"], *(one["history"] for one in ranks), strict=True):
        for reference in (INTEGRATED, HTA):
            for other in others:
                assert other["reference_rho"][reference] == entry["reference_rho"][reference]
            mine, theirs = entry["references"][reference], others[0]["references"][reference]
            assert len(mine) == len(theirs) == 5
            for row, wanted in zip(theirs, mine, strict=True):
                torch.testing.assert_close(torch.tensor(row), torch.tensor(wanted), rtol=1e-5, atol=1e-7)
            assert others[1]["references"] == {}
