"""References, signed scores and faithfulness in a record: what stands where, and how they come back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from globenc_lightning.measurement import history_entry
from globenc_lightning.record import schema
from globenc_lightning.record.keeping import RecordKeeper, recorded
from globenc_lightning.record.reading import Record
from globenc_lightning.record.writing import RecordOptions, RunRecord
from tests.further import with_further
from tests.neutrality import equal
from tests.record.analyses import LENGTHS, METHODS, Made, made

FURTHER = (
    "reference/",
    "rho_with/",
    "masked/",
    "gain/",
    "sufficiency_gain/",
    "log_odds/",
    "span",
    "signed",
    "left_out",
)


def further(step: int = 1, **options: Any) -> Made:
    """An analysis with all further figures, or with those of ``options``."""
    plain = made(step)
    measurement = with_further(plain.measurement, seed=step, **options)
    faithfulness = () if measurement.faithfulness is None else tuple(measurement.faithfulness.gain)
    references = ("saliency", *measurement.reference_correlation)
    about = replace(plain.about, references=references, faithfulness=faithfulness)
    return replace(plain, measurement=measurement, entry=history_entry(measurement, step, 0), about=about)


def columns(folder: Path, step: int = 1, run: str = "run") -> dict[str, list[str]]:
    files = {kind: schema.step_file(folder, kind, run, step) for kind in (schema.TOKENS, schema.EXAMPLES)}
    return {kind: parquet.read_schema(file).names for kind, file in files.items()}


def assert_same(found: Any, wanted: Any) -> None:
    assert {name for name, value in vars(wanted).items() if not equal(value, getattr(found, name))} == set()


def test_every_further_figure_stands_in_its_column(tmp_path: Path) -> None:
    one = further(masked=METHODS)
    one.write(RunRecord(tmp_path, "run"))
    found, figures = one.measurement, one.measurement.faithfulness
    assert figures is not None
    record = Record.open(tmp_path)
    tokens, examples = record.tokens("run"), record.examples("run")
    for slug, reference in (("integrated-gradients", "integrated gradients"), ("HTA", "HTA")):
        wanted = torch.cat([row[reference] for row in found.references])
        assert tokens[f"reference/{slug}"].to_numpy().tolist() == wanted.tolist()
        for method in METHODS:
            for layer in (1, 2):
                wanted = found.reference_correlation[reference][method][:, layer - 1]
                assert examples[f"rho_with/{slug}/{method}/{layer:02d}"].to_numpy().tolist() == wanted.tolist()
    assert tokens["signed"].to_numpy().tolist() == torch.cat(found.signed).tolist()
    assert examples["left_out"].to_numpy().tolist() == found.left_out.tolist()
    assert examples["span"].to_numpy().tolist() == figures.span.tolist()
    for method in METHODS:
        assert tokens[f"masked/{method}"].to_pylist() == torch.cat(figures.masked[method]).tolist()
        for name in ("gain", "sufficiency_gain", "log_odds"):
            values = getattr(figures, name)[method].tolist()
            # Null, since an average in SQL leaves null out and makes NaN of NaN.
            assert examples[f"{name}/{method}"].to_pylist() == [None if one != one else one for one in values]
    assert examples["gain/N-Enc"].null_count == 1
    assert len(tokens) == sum(LENGTHS)


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"references": (), "signed": False, "masked": ()}, FURTHER),
        ({"references": ("HTA",), "signed": False, "masked": ()}, ("reference/integrated", "signed", "span", "gain/")),
        ({"references": (), "signed": True, "masked": ()}, ("reference/", "rho_with/", "masked/", "span", "gain/")),
        ({"references": (), "signed": False, "masked": ("N-Res",)}, ("signed", "left_out", "gain/N-Enc", "rho_with/")),
    ],
    ids=["nothing", "HTA", "signed", "faithfulness"],
)
def test_what_nobody_asked_for_has_no_column(options: dict[str, Any], absent: tuple[str, ...], tmp_path: Path) -> None:
    made(1).write(RunRecord(tmp_path, "plain"))
    one = further(**options)
    one.write(RunRecord(tmp_path, "run"))
    there = {f"{kind}:{name}": name for kind, names in columns(tmp_path).items() for name in names}
    assert [name for name in there.values() if name.startswith(absent)] == []
    plain = {f"{kind}:{name}" for kind, names in columns(tmp_path, run="plain").items() for name in names}
    assert plain <= set(there)
    asked_for = any(options.values())
    assert (plain == set(there)) is not asked_for
    about = Record.open(tmp_path).about("run")
    described = {f"{kind}:{name}" for kind in (schema.TOKENS, schema.EXAMPLES) for name in about["columns"][kind]}
    assert set(there) == described
    [entry] = RunRecord(tmp_path, "run").entries()
    assert_same(entry, one.entry)


@pytest.mark.parametrize("unit", ["probability", "value"])
def test_a_history_comes_back_with_all_of_it(unit: str, tmp_path: Path) -> None:
    written = [further(step, unit=unit, masked=METHODS) for step in (1, 2)]
    run = RunRecord(tmp_path, "run")
    for one in written:
        one.write(run)
    found = RunRecord(tmp_path, "run").entries()
    for entry, one in zip(found, written, strict=True):
        assert entry.faithfulness is not None
        assert_same(entry.faithfulness, one.entry.faithfulness)
        assert_same(entry, one.entry)
        assert entry.reference_correlation["HTA"]["N-Enc"].n.tolist() == [4, 4]
    assert found[0].faithfulness is not None
    assert (found[0].faithfulness.unit, found[0].faithfulness.passes) == (unit, 5)


def test_analyses_with_and_without_faithfulness_share_a_run(tmp_path: Path) -> None:
    # faithfulness_every_n=2
    run = RunRecord(tmp_path, "run")
    with_it, without = further(1), further(2, masked=())
    without = replace(without, about=with_it.about)
    for one in (with_it, without):
        one.write(run)
    record = Record.open(tmp_path)
    gains = record.examples("run", ["gain/N-Enc"])
    assert gains.filter(np.array([step == 1 for step in gains["step"].to_pylist()]))["gain/N-Enc"].null_count == 1
    assert gains.filter(np.array([step == 2 for step in gains["step"].to_pylist()]))["gain/N-Enc"].null_count == 4
    assert [entry.faithfulness is None for entry in run.entries()] == [False, True]
    # The file that says what each column is knows them though the newest analysis has none.
    about = record.about("run")
    assert about["recorded"]["faithfulness"] == ["N-Enc"]
    assert "no better than random" in about["columns"][schema.EXAMPLES]["gain/N-Enc"]


def test_attributions_in_float16_leave_figures_of_examples_whole(tmp_path: Path) -> None:
    one = further()
    run = RunRecord(tmp_path, "run", RecordOptions(dtype="float16"))
    one.write(run)
    [entry] = run.entries()
    for name in ("left_out", "faithfulness", "reference_rho"):
        assert equal(getattr(entry, name), getattr(one.entry, name)), name
    for kept, exact in zip(entry.signed, one.entry.signed, strict=True):
        assert equal(kept, exact.half().float())
        assert not equal(kept, exact)


def test_an_example_that_could_not_be_analysed_is_left_out(tmp_path: Path) -> None:
    plain = further()
    figures = plain.measurement.faithfulness
    assert figures is not None
    masked = {method: [torch.empty(0, dtype=torch.bool), *flags[1:]] for method, flags in figures.masked.items()}
    measurement = replace(plain.measurement, faithfulness=replace(figures, masked=masked))
    replace(plain, measurement=measurement).write(RunRecord(tmp_path, "run"))
    flags = Record.open(tmp_path).tokens("run", ["masked/N-Enc"])["masked/N-Enc"].to_pylist()
    assert flags[: LENGTHS[0]] == [False] * LENGTHS[0]
    assert flags[LENGTHS[0] :] == torch.cat(figures.masked["N-Enc"][1:]).tolist()


def test_a_checkpoint_s_pointer_brings_it_back(tmp_path: Path) -> None:
    keeper = RecordKeeper(RecordOptions(folder=tmp_path))
    keeper.place(str(tmp_path), "run", {})
    written = [further(step) for step in (1, 2)]
    for one in written:
        keeper.write(one.measurement, one.probe, one.entry, one.about, validation=True)
    pointer, kept = keeper.pointer([one.entry for one in written])
    assert pointer is not None
    assert kept == []
    # The same training, another one that has the callback, and one that has no record.
    others = RecordKeeper(RecordOptions(folder=tmp_path))
    others.place(str(tmp_path), "run", {})
    for found in (keeper.restored(pointer, []), others.restored(pointer, []), recorded(pointer, [])):
        for entry, one in zip(found, written, strict=True):
            assert_same(entry, one.entry)


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    one = made(1)
    one.write(RunRecord(tmp_path, "run"))
    file = schema.about_file(tmp_path, "run")
    about = json.loads(file.read_text("utf-8"))
    for name in ("aggregation", "references", "faithfulness"):
        del about["about"][name]
    file.write_text(json.dumps(about), "utf-8")
    [entry] = RunRecord(tmp_path, "run").entries()
    assert (entry.faithfulness, entry.signed, entry.references, entry.reference_rho) == (None, [], {}, {})
    assert_same(entry, one.entry)


def test_an_example_whose_contributions_did_not_add_up_has_none(tmp_path: Path) -> None:
    plain = further()
    signed = [torch.empty(0) if index == 2 else one for index, one in enumerate(plain.measurement.signed)]
    references = [{} if index == 0 else one for index, one in enumerate(plain.measurement.references)]
    left_out = plain.measurement.left_out.clone()
    left_out[2] = float("nan")
    measurement = replace(plain.measurement, signed=signed, left_out=left_out, references=references)
    without = {name: [torch.empty(0), *rows[1:]] for name, rows in plain.entry.references.items()}
    entry = replace(plain.entry, signed=signed, left_out=left_out, references=without)
    run = RunRecord(tmp_path, "run")
    replace(plain, measurement=measurement, entry=entry).write(run)
    [found] = run.entries()
    assert_same(found, entry)
    column = Record.open(tmp_path).tokens("run", ["signed"])["signed"].to_numpy()
    start = sum(LENGTHS[:2])
    assert np.isnan(column).tolist() == [start <= place < start + LENGTHS[2] for place in range(sum(LENGTHS))]


@pytest.mark.parametrize("again", [False, True], ids=["same-process", "resumed"])
def test_what_was_refused_at_one_analysis_stays_described(again: bool, tmp_path: Path) -> None:
    run = RunRecord(tmp_path, "run")
    further(1).write(run)
    run = RunRecord(tmp_path, "run") if again else run
    further(2, references=(), signed=False, masked=()).write(run)
    about = Record.open(tmp_path).about("run")
    assert about["recorded"]["references"] == ["integrated gradients", "HTA"]
    assert (about["recorded"]["faithfulness"], about["recorded"]["signed"]) == (["N-Enc"], True)
    assert {"rho_with/HTA/N-Res/02", "span", "gain/N-Enc", "left_out"} <= set(about["columns"][schema.EXAMPLES])


def test_what_was_asked_for_and_never_found_is_none_of_a_record(tmp_path: Path) -> None:
    # Masking was refused: images have no tokens to mask.
    one = further(1, references=(), signed=False, masked=())
    replace(one, about=replace(one.about, faithfulness=("N-Enc",))).write(RunRecord(tmp_path, "run"))
    about = Record.open(tmp_path).about("run")
    assert "faithfulness" not in about["recorded"]
    assert "gain/N-Enc" not in about["columns"][schema.EXAMPLES]
