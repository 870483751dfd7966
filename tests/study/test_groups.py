"""Groups of examples: label, right or wrong, and the data map, against sums one example at a time."""

import math
from pathlib import Path

import numpy as np
import pytest

from globenc_lightning import study
from globenc_lightning.study.groups import _probability
from tests.study.records import write_run

LENGTHS = tuple(4 + index % 5 for index in range(31))


def test_groups_are_those_of_one_example_at_a_time(tmp_path: Path) -> None:
    runs = {
        f"seed-{seed}": write_run(tmp_path, f"seed-{seed}", seed=seed, lengths=LENGTHS, steps=(1, 2, 3, 4))
        for seed in (1, 2)
    }
    found = study.load(tmp_path).groups()
    assert len(found) == 2 * len(LENGTHS)
    for name, run in runs.items():
        mine = found[found["run"] == name].set_index("example")
        sure = []
        for example, label in enumerate(run.labels):
            over = []
            for logits in run.logits.values():
                powers = [math.exp(one) for one in logits[example]]
                over.append(powers[label] / sum(powers))
            mean = sum(over) / len(over)
            spread = math.sqrt(sum((one - mean) ** 2 for one in over) / len(over))
            sure.append((mean, spread))
            row = mine.loc[example]
            assert (row["confidence"], row["variability"]) == pytest.approx((mean, spread), abs=1e-6)
            assert row["label"] == label
            assert bool(row["right"]) == (run.predicted[4][example] == label)
        most = sorted(range(len(LENGTHS)), key=lambda example: -sure[example][1])[: round(len(LENGTHS) / 3)]
        for example, (mean, _) in enumerate(sure):
            region = "ambiguous" if example in most else "easy" if mean >= 0.5 else "hard"
            assert mine.loc[example]["region"] == region
        assert set(mine["region"]) == {"ambiguous", "easy", "hard"}


@pytest.mark.parametrize(
    ("logits", "label", "task", "expected"),
    [
        ([0.0, 0.0], 1.0, "classification", 0.5),
        ([800.0, -800.0], 0.0, "classification", 1.0),
        ([math.log(3)], 1.0, "binary", 0.75),
        ([math.log(3)], 0.0, "binary", 0.25),
        ([], 1.0, "classification", math.nan),
        ([0.0, 1.0], math.nan, "classification", math.nan),
        ([0.0, 1.0], 2.0, "classification", math.nan),
        ([0.0, 1.0], -100.0, "classification", math.nan),
        ([0.0, 1.0], 1.0, "multi-label", math.nan),
        ([0.7], 0.7, "regression", math.nan),
    ],
)
def test_probability_of_the_label(logits: list[float], label: float, task: str, expected: float) -> None:
    assert _probability(logits, label, task) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_summary_can_be_told_by_group(tmp_path: Path) -> None:
    write_run(tmp_path, "one", lengths=LENGTHS)
    loaded = study.load(tmp_path)
    rho = loaded.correlations("N-Enc", 2)
    by = loaded.groups().set_index("example")
    for group in ("label", "right", "region"):
        table = loaded.summary(rho, "rho", ["step"], group=group)
        assert {*table[group]} == {*by[group]}
        for row in table.itertuples():
            members = by.index[by[group] == getattr(row, group)]
            part = rho[(rho["step"] == row.step) & rho["example"].isin(members)]["rho"]
            assert row.mean == pytest.approx(part.mean(), abs=1e-12)
            assert row.examples == part.notna().sum()
    assert np.isclose(table["examples"].sum(), 3 * len(LENGTHS))
