"""Scalars: which tags there are, and what their figures are means of."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from globenc_lightning.lightning_facts import log_monitored
from globenc_lightning.report.scalars import by_layer, mean_of, monitored
from tests.further import with_further
from tests.record.analyses import METHODS, made

PLAIN = ["globenc/spearman/N-Enc", "globenc/spearman/N-Res"]


def test_without_anything_else_the_tags_are_those_of_the_saliency() -> None:
    measurement = made(1).measurement
    assert list(monitored(measurement, "globenc")) == PLAIN
    assert list(by_layer(measurement, "globenc")) == [
        f"globenc/spearman_by_layer/{method}/layer_{layer:02d}" for method in METHODS for layer in (1, 2)
    ]


def test_references_have_tags_of_their_own_with_their_own_means() -> None:
    plain = made(1).measurement
    found = with_further(plain, signed=False, masked=())
    scalars, layers = monitored(found, "globenc_2"), by_layer(found, "globenc_2")
    assert {tag.replace("globenc_2", "globenc"): value for tag, value in scalars.items() if "_with" not in tag} == (
        monitored(plain, "globenc")
    )
    for slug, reference in (("integrated-gradients", "integrated gradients"), ("HTA", "HTA")):
        for method in METHODS:
            rho = found.reference_correlation[reference][method]
            assert scalars[f"globenc_2/spearman_with/{slug}/{method}"] == pytest.approx(float(rho[:, -1].mean()))
            for layer in (1, 2):
                tag = f"globenc_2/spearman_with_by_layer/{slug}/{method}/layer_{layer:02d}"
                assert layers[tag] == pytest.approx(float(rho[:, layer - 1].mean()))
    assert len(scalars) == 2 + 4
    assert len(layers) == 4 + 8


@pytest.mark.parametrize("left_out", [(), (1,), (0, 2)], ids=str)
def test_means_of_faithfulness_leave_out_what_has_no_gain(left_out: tuple[int, ...]) -> None:
    found = with_further(made(1).measurement, references=(), signed=False, masked=("N-Res",), left_out=left_out)
    scalars = {tag: value for tag, value in monitored(found, "globenc").items() if tag not in PLAIN}
    figures = found.faithfulness
    assert figures is not None
    kept = [index for index in range(4) if index not in left_out]
    wanted = {
        "globenc/faithfulness/N-Res": figures.gain["N-Res"][kept].double().mean(),
        "globenc/sufficiency_gain/N-Res": figures.sufficiency_gain["N-Res"][kept].double().mean(),
        "globenc/log_odds/N-Res": figures.log_odds["N-Res"].double().mean(),
    }
    assert scalars == pytest.approx({tag: float(value) for tag, value in wanted.items()})


def test_a_value_has_no_log_odds() -> None:
    found = with_further(made(1).measurement, references=(), masked=("N-Enc",), unit="value")
    assert [tag for tag in monitored(found, "globenc") if "log_odds" in tag] == []


@pytest.mark.parametrize(
    ("values", "mean"),
    [([math.nan, math.nan], math.nan), ([math.inf, 1.0], 1.0), ([math.nan, 0.5, 1.5], 1.0), ([], math.nan)],
    ids=str,
)
def test_a_mean_is_of_finite_values(values: list[float], mean: float) -> None:
    assert mean_of(torch.tensor(values)) == pytest.approx(mean, nan_ok=True)


def test_what_is_absent_is_not_passed_to_those_who_monitor() -> None:
    found = with_further(made(1).measurement, references=(), masked=("N-Enc",), left_out=(0, 1, 2, 3))
    scalars = monitored(found, "globenc")
    assert math.isnan(scalars["globenc/faithfulness/N-Enc"])
    logged: dict[str, Any] = {}

    class Module:
        def log_dict(self, values: dict[str, float], **options: Any) -> None:
            logged.update(values)

    log_monitored(object(), Module(), scalars, False)  # type: ignore[arg-type]
    assert sorted(logged) == sorted([*PLAIN, "globenc/log_odds/N-Enc"])


def test_an_analysis_that_masks_nothing_has_no_tags_of_it() -> None:
    found = with_further(made(1).measurement)
    assert monitored(replace(found, faithfulness=None), "globenc").keys() == {
        tag
        for tag in monitored(found, "globenc")
        if not tag.startswith(("globenc/faith", "globenc/suff", "globenc/log"))
    }
