"""Tests of the groups of examples: by label, right or wrong, and region of the data map."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from globenc_lightning import study
from globenc_lightning.study.groups import _probability, _regions
from tests.study.records import write_run


def test_groups_are_those_of_a_loop(tmp_path: Path) -> None:
    lengths = (5,) * 12
    made = {f"run-{seed}": write_run(tmp_path, f"run-{seed}", seed=seed, lengths=lengths) for seed in range(2)}

    found = study.load(tmp_path).groups()

    assert len(found) == 24
    for one in found.to_dict("records"):
        run, example = made[one["run"]], one["example"]
        label = run.labels[example]
        sure = [float(softmax(np.float32(run.logits[step][example]).astype(float))[label]) for step in (10, 20, 30)]
        mean = sum(sure) / 3
        assert one["label"] == label
        assert one["confidence"] == pytest.approx(mean, abs=1e-9)
        assert one["variability"] == pytest.approx(math.sqrt(sum((each - mean) ** 2 for each in sure) / 3), abs=1e-9)
        assert one["right"] == (run.predicted[30][example] == label)
    assert {*found["right"]} == {True, False}
    for _, part in found.groupby("run"):
        ambiguous = part.nlargest(4, "variability")["example"]
        assert {*part[part["region"] == "ambiguous"]["example"]} == {*ambiguous}
        rest = part[~part["example"].isin(ambiguous)]
        assert (rest["region"] == np.where(rest["confidence"] >= 0.5, "easy", "hard")).all()


@pytest.mark.parametrize(
    ("logits", "label", "task", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 3.0, "classification", 0.25),
        ([1000.0, 0.0], 0.0, "classification", 1.0),
        ([0.0], 1.0, "binary", 0.5),
        ([2.0], 0.0, "binary", 1 / (1 + math.exp(2.0))),
        ([0.0, 0.0], None, "classification", math.nan),
        ([0.0, 0.0], math.nan, "classification", math.nan),
        ([0.0, 0.0], 5.0, "classification", math.nan),
        ([0.0, 0.0], -100.0, "classification", math.nan),
        ([], 1.0, "classification", math.nan),
        ([0.3], 0.7, "regression", math.nan),
        ([0.3, 0.1], 1.0, "multi-label", math.nan),
    ],
)
def test_the_probability_of_the_label_is_known_for_classes(
    logits: list[float], label: Any, task: str, expected: float
) -> None:
    assert _probability(logits, label, task) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("logits", [[-1000.0], [1000.0]])
def test_a_certain_logit_overflows_nowhere(logits: list[float]) -> None:
    with np.errstate(all="raise", under="ignore"):
        assert _probability(logits, 1.0, "binary") in (0.0, 1.0)


def test_examples_without_a_probability_have_no_region() -> None:
    found = _regions(np.array([0.9, np.nan, 0.2, 0.6]), np.array([0.0, np.nan, 0.0, 0.3]))

    assert found == ["easy", None, "hard", "ambiguous"]
    assert _regions(np.array([np.nan]), np.array([np.nan])) == [None]


def test_means_are_kept_apart_by_group(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, f"run-{seed}", seed=seed, lengths=(5,) * 12)
    loaded = study.load(tmp_path)
    rho, groups = loaded.correlations("N-Enc", 2), loaded.groups()

    for group in ("label", "right", "region"):
        found = loaded.summary(rho, "rho", group=group, draws=10)
        for one in found.to_dict("records"):
            chosen = groups[groups[group] == one[group]][["run", "example"]]
            mine = rho[rho["step"] == one["step"]].merge(chosen)
            assert one["mean"] == pytest.approx(mine["rho"].mean())
            assert one["examples"] == mine["example"].nunique()
        assert len(found) == 3 * groups[group].nunique()
