"""Studies of further references, signed scores and faithfulness."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from globenc_lightning import study
from globenc_lightning.errors import GlobEncWarning, RecordError
from globenc_lightning.record.show import print_study, save_figures
from globenc_lightning.record.writing import RunRecord
from globenc_lightning.study.bootstrap import interval
from tests.record.analyses import LENGTHS, METHODS, Made
from tests.record.test_further import further, made

SVG = "{http://www.w3.org/2000/svg}"
STEPS = (1, 2, 3)


def written(folder: Path, runs: int = 2, **options: object) -> list[list[Made]]:
    """Runs with all further figures, each of other analyses; of one probe."""
    found = []
    for number in range(runs):
        run = RunRecord(folder, f"seed-{number}")
        analyses = [further(step + 10 * number, **options) for step in STEPS]
        for step, one in zip(STEPS, analyses, strict=True):
            replace(one, entry=replace(one.entry, step=step)).write(run, extra={"seed": number})
        found.append(analyses)
    return found


def test_correlations_with_a_reference_are_those_that_were_measured(tmp_path: Path) -> None:
    runs = written(tmp_path)
    loaded = study.load(tmp_path)
    assert loaded.references == ["saliency", "integrated gradients", "HTA"]
    for reference in loaded.references[1:]:
        table = loaded.correlations(reference=reference)
        assert len(table) == 2 * len(STEPS) * len(LENGTHS) * len(METHODS) * 2
        for row in table.itertuples():
            one = runs[int(row.run[-1])][row.step - 1].measurement
            wanted = one.reference_correlation[reference][row.method][row.example, row.layer - 1]
            assert row.rho == float(wanted)
    plain = loaded.correlations()
    assert plain.equals(loaded.correlations(reference="saliency"))
    assert not plain["rho"].equals(loaded.correlations(reference="HTA")["rho"])


def test_faithfulness_is_what_was_measured_and_has_intervals_over_runs_and_examples(tmp_path: Path) -> None:
    runs = written(tmp_path, masked=METHODS)
    loaded = study.load(tmp_path)
    table = loaded.faithfulness()
    assert len(table) == 2 * len(STEPS) * len(LENGTHS) * len(METHODS)
    for row in table.itertuples():
        figures = runs[int(row.run[-1])][row.step - 1].measurement.faithfulness
        assert figures is not None
        for name in ("gain", "sufficiency_gain", "log_odds"):
            assert getattr(row, name) == pytest.approx(
                float(getattr(figures, name)[row.method][row.example]), nan_ok=True
            )
        assert row.span == pytest.approx(float(figures.span[row.example]))
    found = loaded.summary(table, "gain")
    assert [*found.columns][:2] == ["method", "step"]
    for row in found.itertuples():
        values = np.array(
            [one[row.step - 1].measurement.faithfulness.gain[row.method].double().numpy() for one in runs]  # type: ignore[union-attr]
        )
        expected = interval(values)
        assert (row.mean, row.low, row.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-9)
        # One example is left out.
        assert (row.runs, row.examples, row.over) == (2, len(LENGTHS) - 1, "runs and examples")
    assert loaded.masked_share == 0.2


def test_analyses_that_masked_nothing_have_no_rows(tmp_path: Path) -> None:
    run = RunRecord(tmp_path, "run")
    with_it, without = further(1), further(2, masked=())
    for one in (with_it, replace(without, about=with_it.about)):
        one.write(run)
    table = study.load(tmp_path).faithfulness()
    assert set(table["step"]) == {1}
    assert table["gain"].notna().sum() == len(LENGTHS) - 1


def test_a_value_has_no_log_odds(tmp_path: Path) -> None:
    written(tmp_path, runs=1, unit="value")
    table = study.load(tmp_path).faithfulness()
    assert table["log_odds"].isna().all()
    assert table["gain"].notna().any()


def test_signed_scores_add_up_to_the_score_with_what_they_leave_out(tmp_path: Path) -> None:
    runs = written(tmp_path, runs=1)
    loaded = study.load(tmp_path)
    table = loaded.signed()
    assert len(table) == len(STEPS) * sum(LENGTHS)
    for (step, example), part in table.groupby(["step", "example"]):
        assert part["signed"].tolist() == runs[0][step - 1].measurement.signed[example].tolist()
    left_out = loaded.examples().set_index(["step", "example"])["left_out"]
    assert left_out[2, 1] == pytest.approx(float(runs[0][1].measurement.left_out[1]))
    inner = loaded.signed(special_tokens=False)
    assert len(inner) == len(STEPS) * sum(max(0, length - 2) for length in LENGTHS)


def test_xarray_has_all_of_it(tmp_path: Path) -> None:
    pytest.importorskip("xarray")
    runs = written(tmp_path)
    found = study.load(tmp_path).to_xarray()
    at = {"run": "seed-1", "step": 2, "example": 2}
    one = runs[1][1].measurement
    wanted = float(one.reference_correlation["HTA"]["N-Res"][2, 0])
    assert float(found["rho_with"].sel({"reference": "HTA", "method": "N-Res", "layer": 1, **at})) == wanted
    assert one.faithfulness is not None
    assert float(found["gain"].sel({"method": "N-Enc", **at})) == pytest.approx(
        float(one.faithfulness.gain["N-Enc"][2])
    )
    assert np.isnan(float(found["gain"].sel({"method": "N-Res", **at})))
    assert float(found["span"].sel(at)) == pytest.approx(float(one.faithfulness.span[2]))
    assert float(found["left_out"].sel(at)) == pytest.approx(float(one.left_out[2]))
    assert found["rho"].sel({"method": "N-Res", "layer": 2, **at}) == float(one.correlation["N-Res"][2, 1])


def test_without_anything_else_a_study_is_what_it_was(tmp_path: Path) -> None:
    pytest.importorskip("xarray")
    made(1).write(RunRecord(tmp_path, "run"))
    loaded = study.load(tmp_path)
    assert (loaded.references, loaded.masked_methods) == (["saliency"], [])
    assert set(loaded.to_xarray().data_vars) == {"rho", "score", "predicted", "label", "loss"}
    assert "left_out" not in loaded.examples()
    for act, words in (
        (lambda: loaded.correlations(reference="HTA"), "reference 'HTA'"),
        (loaded.faithfulness, "faithfulness=True"),
        (loaded.signed, "signed=True"),
        (lambda: loaded.save_faithfulness(tmp_path / "a.svg"), "faithfulness=True"),
    ):
        with pytest.raises(RecordError, match=words):
            act()
    with pytest.raises(ValueError, match="figure must be one of"):
        loaded.save_faithfulness(tmp_path / "a.svg", "rho")


def test_what_one_run_lacks_is_told_and_left_out(tmp_path: Path) -> None:
    further(1, masked=METHODS).write(RunRecord(tmp_path, "everything"))
    further(1, references=("HTA",), masked=("N-Res",)).write(RunRecord(tmp_path, "some"))
    with pytest.warns(GlobEncWarning, match="integrated gradients: left out"):
        loaded = study.load(tmp_path)
    assert loaded.references == ["saliency", "HTA"]
    assert loaded.masked_methods == ["N-Res"]
    with pytest.raises(RecordError, match="faithfulness of 'N-Enc'"):
        loaded.faithfulness("N-Enc")
    assert set(loaded.faithfulness()["run"]) == {"everything", "some"}


def test_runs_of_another_aggregation_are_not_of_the_same_thing(tmp_path: Path) -> None:
    one, other = made(1), made(1)
    one.write(RunRecord(tmp_path, "rollout"))
    replace(other, about=replace(other.about, aggregation="maxflow")).write(RunRecord(tmp_path, "flow"))
    with pytest.warns(GlobEncWarning, match="differ in aggregation"):
        study.load(tmp_path)
    for name, words in (("flow", "attention flow"), ("rollout", "rollout")):
        path = study.load(tmp_path, runs=[name]).save_ladder(tmp_path / "a.svg")
        assert f"Correlation of {words} and saliency by layer" in path.read_text("utf-8")


def test_figures_and_tables_of_a_study(tmp_path: Path) -> None:
    written(tmp_path / "record", masked=METHODS)
    loaded = study.load(tmp_path / "record")
    path = loaded.save_faithfulness(tmp_path / "a.svg")
    said = " ".join("".join(one.itertext()) for one in ElementTree.parse(path).iter(f"{SVG}text"))
    for words in (
        "gain over masking random tokens",
        "random",
        "Bands: 95 %",
        "2 runs",
        "Left out: 6 of 24",
        "top 20 %",
    ):
        assert words in said
    names = {one.name for one in save_figures(loaded, tmp_path / "figures")}
    assert {
        "faithfulness.svg",
        "ladder_with_HTA_by_layer.svg",
        "ladder_with_integrated-gradients_over_training.svg",
    } <= (names)
    ladder = (tmp_path / "figures" / "ladder_with_HTA_by_layer.svg").read_text("utf-8")
    assert "Correlation of rollout and HTA by layer" in ladder
    printed = StringIO()
    print_study(loaded, console=Console(file=printed, width=200))
    assert "Rho with HTA, layer 2" in printed.getvalue()
    gain = loaded.summary(loaded.faithfulness(), "gain").set_index(["method", "step"])["mean"]["N-Enc", 3]
    assert "Faithfulness: gain of masking a method's top 20 % over random tokens" in printed.getvalue()
    assert f"{gain:.3f}" in printed.getvalue()


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ([(), (0, 1)], f"mean over {len(LENGTHS) - 2} to {len(LENGTHS)} examples and 1 run"),
        ([(1,), (1,)], f"mean over {len(LENGTHS) - 1} examples and 1 run"),
        ([range(len(LENGTHS))] * 2, "no example has such a figure"),
    ],
    ids=["other at each step", "the same", "every one"],
)
def test_of_how_many_examples_a_table_of_faithfulness_speaks(
    left_out: list[tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    run = RunRecord(tmp_path, "run")
    for step, examples in enumerate(left_out, 1):
        further(step, left_out=examples).write(run)
    printed = StringIO()
    print_study(study.load(tmp_path), console=Console(file=printed, width=300))
    [said] = [line for line in printed.getvalue().splitlines() if line.startswith("Faithfulness")]
    assert words in said
    assert "left out: examples of whose score masking every token costs too little" in said
