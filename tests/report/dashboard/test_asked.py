"""What was asked for besides the methods and the saliency, in the records and in the server's answers.

Axes: ``m`` method, ``b`` sentence, ``l`` layer, ``k`` token.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from werkzeug.test import Client

from benchmarks.dashboard import application, reader, synthetic_measurement, synthetic_probe, write
from globenc_lightning.measurement import Measurement
from globenc_lightning.report.averages import mean_and_interval
from globenc_lightning.report.dashboard import asked, encoding, packing, store
from globenc_lightning.report.dashboard.records import records
from globenc_lightning.settings import Settings
from tests.report.dashboard.asked import MASKED, REFERENCES, SIZES, asked_measurement, asked_run
from tests.report.dashboard.serving import ask

MOMENT = store.Moment(ordinal=0, step=0, epoch=0, session=1.0)
WHERE = {"run": "asked", "tag": "globenc"}
RUN: list[dict[str, Any]] = [{}, {"masked": ()}, {"references": ("HTA",)}, {"signed": False}, {}]
"""A run whose validations differ in what was computed."""


def made(measurement: Measurement, **choices: Any) -> tuple[store.Summary, store.Detail]:
    """The records as they are read again."""
    settings = Settings(tuple(measurement.correlation), **choices)
    summary, detail = records(measurement, synthetic_probe(measurement.names), settings, MOMENT)
    read = store.summary_from_bytes(store.to_bytes(summary))
    assert isinstance(read, store.Summary)
    return read, store.detail_from_bytes(store.to_bytes(detail))


def test_records_without_it_are_as_they_were() -> None:
    measurement = synthetic_measurement(0, 1, sentences=3, layers=2, tokens=6)
    summary, detail = made(measurement)
    assert (summary.references, summary.masking, detail.parts.sentences) == ({}, None, ())
    for record in (summary, detail):
        header, arrays = encoding.decode(store.to_bytes(record))
        assert not {"references", "masking", "parts"} & set(header)
        assert all(name.split()[0] in {"probability", "rho", "mean", "low", "high", "n", "saliency", "rows", "maps"}
                   for name in arrays)  # fmt: skip
    assert "signed" not in summary.words
    assert "aggregation" not in summary.settings


def test_correlations_come_back_with_their_intervals() -> None:
    measurement = asked_measurement(3)
    measurement.reference_correlation["HTA"]["W"][:, 0] = float("nan")
    summary, _ = made(measurement)
    assert [*summary.references] == list(REFERENCES)
    for name, found in summary.references.items():
        for place, method in enumerate(summary.methods):
            rho = measurement.reference_correlation[name][method].numpy()
            mean, half, n, _ = mean_and_interval(rho)
            np.testing.assert_allclose(found.rho[place], rho, atol=1e-6)
            np.testing.assert_allclose(found.mean[place], mean, atol=1e-6)
            np.testing.assert_allclose(found.low[place], np.maximum(mean - half, -1), atol=1e-6)
            np.testing.assert_allclose(found.high[place], np.minimum(mean + half, 1), atol=1e-6)
            assert found.n[place].tolist() == n.tolist()
    assert summary.references["HTA"].n[0].tolist() == [0, 6, 6]
    assert not np.allclose(summary.references["HTA"].mean[2], summary.mean[2])


@pytest.mark.parametrize("unit", ["probability", "value"])
def test_masked_copies_come_back(unit: str) -> None:
    measurement = asked_measurement(3, unit=unit)
    faithfulness = measurement.faithfulness
    assert faithfulness is not None
    summary, detail = made(measurement)
    found = summary.masking
    assert found is not None
    assert (found.methods, found.examples, found.unit, found.share) == (MASKED, 6, unit, 0.2)
    assert [*found.measures] == (["gain", "sufficiency_gain"] + (["log_odds"] if unit == "probability" else []))
    for place, method in enumerate(MASKED):
        gain = faithfulness.gain[method].numpy()
        mean, half, n, _ = mean_and_interval(gain)
        one = found.measures["gain"]
        np.testing.assert_allclose(one.each[place], gain, atol=1e-6)
        np.testing.assert_allclose([one.mean[place], one.low[place], one.high[place]], [mean, mean - half, mean + half],
                                   atol=1e-6)  # fmt: skip
        assert (one.n[place], n) == (5, 5)
        for sentence in range(6):
            assert detail.parts.masked[method][sentence].tolist() == faithfulness.masked[method][sentence].tolist()


def test_what_is_infinite_is_left_out() -> None:
    measurement = asked_measurement(0)
    assert measurement.faithfulness is not None
    measurement.faithfulness.log_odds["W"][0] = float("inf")
    measurement.signed[2][1] = float("nan")
    measurement.left_out[3] = float("inf")
    measurement.references[4]["HTA"][0] = float("nan")
    measurement.references[5]["HTA"][0] = -1.0
    measurement.faithfulness.masked["N-Enc"][1][:] = False
    measurement.faithfulness.masked["W"][1] = torch.zeros(0, dtype=torch.bool)
    summary, detail = made(measurement)
    assert summary.masking is not None
    odds = summary.masking.measures["log_odds"]
    assert (np.isnan(odds.each[1]).tolist(), odds.n.tolist()) == ([True] + [False] * 5, [6, 5])
    assert np.isfinite(odds.mean).all()
    assert [*detail.parts.signed] == [0, 1, 4, 5]
    assert [*detail.parts.references["HTA"]] == [0, 1, 2, 3]
    assert [*detail.parts.references["integrated gradients"]] == list(range(6))
    assert [*detail.parts.masked["N-Enc"]] == [*detail.parts.masked["W"]] == [0, 2, 3, 4, 5]


def test_signed_scores_come_back_with_what_they_leave_out() -> None:
    measurement = asked_measurement(0)
    summary, detail = made(measurement)
    for sentence in range(6):
        assert detail.parts.signed[sentence].tolist() == measurement.signed[sentence].tolist()
        assert detail.parts.left_out[sentence] == measurement.left_out[sentence]
    assert summary.words["signed"]


def test_of_a_large_probe_parts_are_of_the_sentences_that_are_shown_and_means_of_all() -> None:
    measurement = asked_measurement(0, sentences=1000, layers=12, tokens=48, methods=("W", "N-Enc"))
    summary, detail = made(measurement)
    shown = len(summary.sentences)
    assert 600 < shown < 1000
    assert summary.masking is not None
    assert (summary.masking.examples, summary.masking.measures["gain"].n.tolist()) == (1000, [999, 999])
    assert summary.masking.measures["gain"].each.shape == (2, shown)
    assert summary.references["HTA"].rho.shape == (2, shown, 12)
    assert (summary.references["HTA"].n == 1000).all()
    assert detail.parts.sentences == tuple(range(shown))
    assert (
        {*detail.parts.signed} == {*detail.parts.masked["W"]} == {*detail.parts.references["HTA"]} == set(range(shown))
    )
    plain, _ = made(synthetic_measurement(0, 5, sentences=1000, layers=12, tokens=48, methods=("W", "N-Enc")))
    assert shown < len(plain.sentences)


@pytest.mark.parametrize(("sentences", "layers", "tokens"), [(64, 24, 128), (64, 24, 512), (300, 12, 200), (16, 2, 40)])
def test_parts_take_room_before_further_methods_and_after_the_drawn_one(
    sentences: int, layers: int, tokens: int
) -> None:
    methods = ("W", "N", "N-Res", "N-Enc")
    measurement = asked_measurement(0, sentences=sentences, layers=layers, tokens=tokens, methods=methods)
    summary, detail = made(measurement)
    rows = sum(codes.nbytes for of in detail.rows.values() for codes in of.values())
    # In the file a masked token takes one bit.
    flags = sum(one.nbytes for of in detail.parts.masked.values() for one in of.values())
    assert rows + detail.parts.nbytes - flags <= packing.ROWS_ROOM
    assert len(store.to_bytes(summary)) + len(store.to_bytes(detail)) < packing.ROWS_ROOM + packing.MAPS_ROOM + 200_000
    parts = set(detail.parts.sentences)
    assert parts
    assert parts == {*detail.parts.signed} == {*detail.parts.masked["W"]} == {*detail.parts.references["HTA"]}
    drawn = set(detail.rows["N-Enc"])
    for method in ("N-Res", "N", "W"):
        assert set(detail.rows.get(method, {})) <= drawn
    if len(drawn) < len(summary.sentences) or len(parts) < min(64, len(summary.sentences)):
        # The room did not suffice for them: there was none left for another method.
        assert set(detail.rows) == {"N-Enc"}


def test_another_aggregation_is_another_setting() -> None:
    measurement = synthetic_measurement(0, 1, sentences=3, layers=2, tokens=6)
    assert made(measurement, aggregation="maxflow")[0].settings["aggregation"] == "maxflow"


def test_the_order_of_importance_knows_further_methods() -> None:
    assert packing.by_importance(("ALTI", "W", "Value-Zeroing", "N-Enc"), "N-Enc") == [
        *("N-Enc", "ALTI", "Value-Zeroing", "W")
    ]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("summary", lambda header, arrays: arrays.update({"HTA rho": arrays["HTA rho"][:, :-1]})),
        ("summary", lambda header, arrays: arrays.update({"gain each": arrays["gain each"][:1]})),
        ("summary", lambda header, arrays: arrays.pop("log_odds n")),
        ("summary", lambda header, arrays: header["references"].append(3)),
        ("summary", lambda header, arrays: header["masking"].update(measures=["other"])),
        ("summary", lambda header, arrays: header["masking"].update(methods=["W", "W"])),
        ("summary", lambda header, arrays: header["masking"].update(share=True)),
        ("summary", lambda header, arrays: header["masking"].update(share=7)),
        ("summary", lambda header, arrays: header["masking"].update(examples=-1)),
        ("detail", lambda header, arrays: arrays.update({"masked W": arrays["masked W"][:-1]})),
        ("detail", lambda header, arrays: arrays.update({"signed": arrays["signed"][:-1]})),
        ("detail", lambda header, arrays: arrays.update({"signed": arrays["signed"] * np.float32("nan")})),
        ("detail", lambda header, arrays: arrays.update({"left out": arrays["left out"][:-1]})),
        ("detail", lambda header, arrays: header["parts"].update(sentences=[99])),
        ("detail", lambda header, arrays: header["parts"]["references"][0].__setitem__(1, [0, 77])),
        ("detail", lambda header, arrays: header.update(parts=[1])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_add_up_is_refused(kind: str, change: Any) -> None:
    pair = dict(zip(("summary", "detail"), made(asked_measurement(0)), strict=True))
    header, arrays = encoding.decode(store.to_bytes(pair[kind]))
    arrays = dict(arrays)
    header.pop("arrays")
    read = store.summary_from_bytes if kind == "summary" else store.detail_from_bytes
    read(encoding.encode(header, arrays))
    change(header, arrays)
    with pytest.raises(store.RecordError):
        read(encoding.encode(header, arrays))


# Answers


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Client, list[Measurement]]:
    folder = tmp_path_factory.mktemp("asked") / "logs"
    measurements = asked_run(folder, "asked", RUN)
    return application(reader(folder)), measurements


def test_the_index_holds_the_curves(written: tuple[Client, list[Measurement]]) -> None:
    client, measurements = written
    answer = ask(client, "index", **WHERE).content
    assert answer["references"] == list(REFERENCES)
    assert not answer["messages"]
    for reference in REFERENCES:
        curve = answer["reference_correlation"][reference]["N-Res"]
        for place, one in enumerate(measurements):
            there = reference in one.reference_correlation
            assert (curve["mean"][place] is not None) == (curve["n"][place] is not None) == there
            if there:
                mean = one.reference_correlation[reference]["N-Res"].nanmean(0).tolist()
                assert curve["mean"][place] == pytest.approx(mean, abs=1e-5)
    masking = answer["masking"]
    assert (masking["methods"], masking["examples"]) == (list(MASKED), [6, None, 6, 6, 6])
    for name in ("gain", "sufficiency_gain", "log_odds"):
        for method in MASKED:
            course = masking["measures"][name][method]
            assert (course["n"][1], course["mean"][1], course["low"][1]) == (None, None, None)
            for place in (0, 2, 3, 4):
                faithfulness = measurements[place].faithfulness
                assert faithfulness is not None
                values = getattr(faithfulness, name)[method]
                mean, half, n, _ = mean_and_interval(values.numpy())
                found = [course[one][place] for one in ("mean", "low", "high", "n")]
                assert found == pytest.approx([*map(float, (mean, mean - half, mean + half, n))], abs=1e-5)


def test_nothing_asked_for_is_said(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name=None, version="asked")
    write(logger, synthetic_measurement(0, 1, **SIZES), MOMENT)
    logger.experiment.close()
    client = application(reader(tmp_path))
    answer = ask(client, "index", **WHERE).content
    assert (answer["references"], answer["reference_correlation"], answer["masking"]) == ([], {}, None)
    assert "signed" not in answer["words"]
    tokens = ask(client, "tokens", index=0, method="W", layer=0, **WHERE).content
    assert not {"masked", "signed"} & set(tokens)
    found = ask(client, "tokens", index=0, method="W", layer=0, asked="signed", **WHERE).content["signed"]
    assert found == {"rows": [None] * 6, "left_out": [None] * 6}


def test_tokens_tell_what_was_masked_and_what_it_changed(written: tuple[Client, list[Measurement]]) -> None:
    client, measurements = written
    for method in MASKED:
        faithfulness = measurements[4].faithfulness
        assert faithfulness is not None
        found = ask(client, "tokens", index=4, method=method, layer=0, asked="masked", **WHERE).content["masked"]
        assert found["tokens"] == [one.nonzero()[:, 0].tolist() for one in faithfulness.masked[method]]
        assert found["gain"][1] is None
        assert found["gain"][2] == pytest.approx(float(faithfulness.gain[method][2]), abs=1e-4)
        for sentence, (whole, without) in enumerate(found["probability"]):
            assert whole == pytest.approx(float(measurements[4].probability[sentence]), abs=1e-4)
            lost = torch.logit(torch.tensor(whole).double()) - torch.logit(torch.tensor(without).double())
            assert float(lost) == pytest.approx(float(faithfulness.log_odds[method][sentence]), abs=0.05)
    other = ask(client, "tokens", index=4, method="N-Res", layer=0, asked="masked", **WHERE).content["masked"]
    assert other == {"methods": list(MASKED), "tokens": [None] * 6}
    none = ask(client, "tokens", index=1, method="W", layer=0, asked="masked", **WHERE).content["masked"]
    assert none == {"methods": [], "tokens": [None] * 6}


def test_tokens_and_curves_with_another_reference(written: tuple[Client, list[Measurement]]) -> None:
    client, measurements = written
    name = "integrated gradients"
    found = ask(client, "tokens", index=4, method="W", layer=1, reference=name, **WHERE).content
    rho = measurements[4].reference_correlation[name]["W"][:, 1].tolist()
    assert found["rho"] == pytest.approx(rho, abs=1e-4)
    for sentence, row in enumerate(found["saliency"]):
        values = measurements[4].references[sentence][name]
        assert row == pytest.approx((values / values.max()).tolist(), abs=1e-4)
    absent = ask(client, "tokens", index=2, method="W", layer=1, reference=name, **WHERE).content
    assert (absent["rho"], absent["saliency"]) == ([None] * 6, [None] * 6)
    curve = ask(client, "sentence", sentence=3, reference=name, **WHERE).content["rho"]["W"]
    assert [one is None for one in curve] == [False, False, True, False, False]
    assert curve[4] == pytest.approx(measurements[4].reference_correlation[name]["W"][3].tolist(), abs=1e-4)


def test_signed_scores_keep_their_sign(written: tuple[Client, list[Measurement]]) -> None:
    client, measurements = written
    found = ask(client, "tokens", index=4, method="W", layer=1, asked="signed", **WHERE).content["signed"]
    for sentence, row in enumerate(found["rows"]):
        assert row == pytest.approx(measurements[4].signed[sentence].tolist(), rel=1e-5)
    assert found["left_out"] == pytest.approx(measurements[4].left_out.tolist(), rel=1e-5)
    none = ask(client, "tokens", index=3, method="W", layer=1, asked="signed", **WHERE).content["signed"]
    assert none["rows"] == [None] * 6


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({"reference": "other"}, 404, "no figures of the reference 'other'"),
        ({"asked": "other"}, 400, "must be one of masked, signed"),
    ],
)
def test_what_was_not_asked_for_is_refused(
    written: tuple[Client, list[Measurement]], arguments: dict[str, str], code: int, words: str
) -> None:
    answer = ask(written[0], "tokens", index=0, method="W", layer=0, **arguments, **WHERE)
    assert answer.code == code
    assert words in answer.content["error"]


def test_a_training_that_is_cut_to_fewer_sentences_keeps_its_means(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name=None, version="asked")
    whole = asked_measurement(0)
    write(logger, whole, MOMENT)
    probe, settings = synthetic_probe(whole.names), Settings(tuple(whole.correlation))
    summary, detail = records(whole, probe, settings, replace(MOMENT, ordinal=1, step=10))
    references, masking = asked.cut(summary.references, summary.masking, 4)
    assert masking is not None
    assert (masking.measures["gain"].each.shape, references["HTA"].rho.shape) == ((2, 4), (3, 4, 3))
    assert masking.measures["gain"].mean is summary.masking.measures["gain"].mean  # type: ignore[union-attr]
    assert detail.parts.nbytes > 0
    logger.experiment.close()
