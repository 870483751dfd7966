import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.loggers import TensorBoardLogger
from scipy.stats import spearmanr
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from benchmarks.dashboard import CLASS_NAMES, application, large_run, reader, synthetic_measurement, write
from globenc_lightning import METHODS
from globenc_lightning.report import publish
from globenc_lightning.report.curves import mean_and_interval
from globenc_lightning.report.dashboard import answering, moving, packing, plugin, store
from tests.report.dashboard.serving import PLUGIN, ROOT, Answer, ask, fetch, tensorboard, until_runs
from tests.training import events

SIZES: dict[str, Any] = {"sentences": 3, "layers": 2, "tokens": 7}
VALIDATIONS = 5
ODD = "a run & <b>#%?é"
WHERE = {"run": ODD, "tag": "globenc"}
LADDER = packing.by_importance(METHODS, "N-Enc")
ROOM = packing.ROWS_ROOM + packing.MAPS_ROOM
BLOCKED = ("torch", "lightning", "pytorch_lightning", "transformers", "scipy", "PIL", "matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    large_run(folder, ODD, validations=VALIDATIONS, **SIZES)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Client:
    return application(reader(folder))


def logger_of(folder: Path, name: str = "run") -> TensorBoardLogger:
    return TensorBoardLogger(str(folder), name=None, version=name)


def write_run(folder: Path, ordinals: Sequence[int], name: str = "run", session: float = 1.0, **changes: Any) -> None:
    logger = logger_of(folder, name)
    for ordinal in ordinals:
        moment = store.Moment(ordinal, 10 * ordinal, ordinal, session)
        write(logger, synthetic_measurement(ordinal, 10, **{**SIZES, **changes}), moment)
    logger.experiment.close()


def write_raw(folder: Path, records: dict[str, bytes], name: str = "run", step: int = 0) -> None:
    logger = logger_of(folder, name)
    publish.log_records([logger], records, step)
    logger.experiment.close()


def missing(ordinal: int, reason: str | None = None) -> bytes:
    return store.to_bytes(store.Missing(store.Moment(ordinal, 10 * ordinal, ordinal, 1.0), reason))


def refused(answer: Answer, code: int, words: str) -> None:
    assert answer.code == code, answer
    assert answer.kind == "application/json"
    assert words in answer.content["error"]


def test_runs_and_their_callbacks(tmp_path: Path) -> None:
    write_run(tmp_path, range(2), ODD)
    write_run(tmp_path, range(3), "second")
    write_raw(
        tmp_path, {"globenc_2/dashboard/summary/000000": store.to_bytes(store.Missing(store.Moment(0, 0, 0, 0.0)))}
    )
    with SummaryWriter(str(tmp_path / "scalars only")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    answer = ask(application(reader(tmp_path)), "runs")
    written = [callback.pop("written") for run in answer.content["runs"] for callback in run["callbacks"]]
    assert written == [max(newest(tmp_path / name).values()) for name in (ODD, "run", "second")]
    assert answer == Answer(
        200,
        "application/json",
        {
            "runs": [
                {"run": ODD, "callbacks": [{"tag": "globenc", "validations": 2}]},
                {"run": "run", "callbacks": [{"tag": "globenc_2", "validations": 1}]},
                {"run": "second", "callbacks": [{"tag": "globenc", "validations": 3}]},
            ]
        },
    )


def newest(run: Path) -> dict[str, float]:
    """Tag of a summary -> when it was last written."""
    log = events(run)
    tags = [tag for tag in log.Tags()["tensors"] if "/dashboard/summary/" in tag]
    return {tag: max(point.wall_time for point in log.Tensors(tag)) for tag in tags}


def test_a_validation_that_is_written_again_makes_its_run_newer(tmp_path: Path) -> None:
    write_run(tmp_path, range(4), session=1.0)
    multiplexer = reader(tmp_path)
    client = application(multiplexer)
    ((before,),) = [run["callbacks"] for run in ask(client, "runs").content["runs"]]
    write_run(tmp_path, [1], session=2.0)
    multiplexer.Reload()
    ((after,),) = [run["callbacks"] for run in ask(client, "runs").content["runs"]]
    assert after["validations"] == before["validations"] == 4
    assert after["written"] > before["written"]


def test_index_holds_what_was_measured(client: Client) -> None:
    answer = ask(client, "index", **WHERE).content
    assert answer["run"] == ODD
    assert answer["methods"] == list(METHODS)
    assert (answer["drawn_method"], answer["layers"], answer["messages"]) == ("N-Enc", 2, [])
    assert answer["class_names"] == list(CLASS_NAMES)
    assert answer["settings"].items() >= {"readout": "cls", "rule": "post-LN", "normalize": False}.items()
    assert [one["index"] for one in answer["validations"]] == [one["ordinal"] for one in answer["validations"]]
    assert [one["step"] for one in answer["validations"]] == [0, 25, 50, 75, 100]
    assert not any(one["missing"] or one["damaged"] for one in answer["validations"])
    for index, validation in enumerate(answer["validations"]):
        measured = synthetic_measurement(index, VALIDATIONS, **SIZES)
        assert validation["predicted"] == measured.predicted.tolist()
        np.testing.assert_allclose(validation["probability"], measured.probability.numpy(), atol=1e-5)
        for sentence, tokens in zip(answer["sentences"], measured.names, strict=True):
            assert sentence["tokens"] == list(tokens)
            assert sentence["special"] == [True, *[False] * (len(tokens) - 2), True]
        for method in METHODS:
            mean, half, n, _ = mean_and_interval(measured.correlation[method].numpy())
            found = {name: answer["correlation"][method][name][index] for name in ("mean", "low", "high", "n")}
            np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
            np.testing.assert_allclose(found["low"], np.maximum(mean - half, -1), atol=1e-5)
            np.testing.assert_allclose(found["high"], np.minimum(mean + half, 1), atol=1e-5)
            assert found["n"] == n.tolist()
    assert [one["label"] for one in answer["sentences"]] == [0, 1, 2]


def test_one_sentence_s_curve(client: Client) -> None:
    answer = ask(client, "sentence", sentence=1, **WHERE).content["rho"]
    for method in METHODS:
        measured = [synthetic_measurement(i, VALIDATIONS, **SIZES).correlation[method][1] for i in range(VALIDATIONS)]
        np.testing.assert_allclose(answer[method], torch.stack(measured).numpy(), atol=1e-5)


def test_detail_holds_what_was_measured(client: Client) -> None:
    for index in range(VALIDATIONS):
        measured = synthetic_measurement(index, VALIDATIONS, **SIZES)
        for sentence in range(3):
            answer = ask(client, "detail", index=index, sentence=sentence, **WHERE).content
            assert (answer["index"], answer["sentence"], answer["step"]) == (index, sentence, 25 * index)
            assert (answer["rows_note"], answer["rollout_note"]) == (None, None)
            saliency = measured.saliency[sentence]
            np.testing.assert_allclose(answer["saliency"], saliency / saliency.max(), atol=2e-5)
            assert list(answer["rows"]) == list(answer["rollout"]) == LADDER
            for method in METHODS:
                rows, whole = measured.rows[sentence][method], measured.last[sentence][method]
                np.testing.assert_allclose(answer["rows"][method], rows / rows.amax(1, keepdim=True), atol=2e-5)
                np.testing.assert_allclose(answer["rollout"][method], whole / whole.amax(1, keepdim=True), atol=2.5e-3)
                rho = measured.correlation[method][sentence]
                np.testing.assert_allclose(answer["rho"][method], rho, atol=1e-5)


def test_tokens_of_all_sentences_are_those_of_each(client: Client) -> None:
    for index in range(VALIDATIONS):
        answer = ask(client, "tokens", index=index, method="N", layer=1, **WHERE).content
        each = [ask(client, "detail", index=index, sentence=i, **WHERE).content for i in range(3)]
        assert answer == {
            "index": index,
            "step": 25 * index,
            "rows": [one["rows"]["N"][1] for one in each],
            "saliency": [one["saliency"] for one in each],
            "rho": [one["rho"]["N"][1] for one in each],
            "stored": dict.fromkeys(METHODS, 3),
            "instead": {},
            "room": ROOM,
        }


def test_rows_that_had_no_room_are_null_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "ROWS_ROOM", 2 * 2 * (7 + 6 + 5) + 2 * 2 * 7)
    monkeypatch.setattr(packing, "MAPS_ROOM", 7 * 7 + 5 * 5)
    write_run(tmp_path, [0])
    client, where = application(reader(tmp_path)), {"run": "run", "tag": "globenc", "index": 0}
    first, second, third = (ask(client, "detail", sentence=i, **where).content for i in range(3))
    assert [list(one["rows"]) for one in (first, second, third)] == [["N-Enc", "N-ResLN"], ["N-Enc"], ["N-Enc"]]
    assert [list(one["rollout"]) for one in (first, second, third)] == [["N-Enc"], [], ["N-Enc"]]
    assert first["rows_note"].startswith("The rows of W, W-FixedRes, W-Res, N, N-FixedRes, N-Res are not stored")
    assert second["rollout_note"].startswith("The maps of all methods are not stored for this sentence")
    tokens = ask(client, "tokens", method="N-ResLN", layer=0, **where).content
    assert [row is None for row in tokens["rows"]] == [False, True, True]
    assert tokens["stored"] == {**dict.fromkeys(METHODS, 0), "N-ResLN": 1, "N-Enc": 3}
    assert tokens["instead"] == {"1": ["N-Enc"], "2": ["N-Enc"]}
    choice = {"run": "run", "tag": "globenc", "layer": 0}
    moved = ask(client, "movement", from_=0, to=0, method="N-ResLN", **choice).content
    assert [one["sentence"] for one in moved["sentences"]] == [0]
    assert moved["lacking"] == [1, 2]
    assert ask(client, "movement", from_=0, to=0, method="N-Enc", **choice).content["lacking"] == []
    choices = {**CHOICES, **choice, "methods": '["N-Enc", "N-ResLN", "W"]'}
    assert ask(client, "dynamics", **choices).content["sentences"] == {"N-Enc": 3, "N-ResLN": 1, "W": 0}


def earlier(kind: str, ordinal: int) -> bytes:
    """A record of 70 examples as an earlier version of the package wrote it: 64 are shown, of some methods."""
    return (Path(__file__).parent / "earlier" / f"{kind}_{ordinal:06d}").read_bytes()


def write_earlier(folder: Path, ordinals: Sequence[int]) -> None:
    for ordinal in ordinals:
        tagged = {store.tag("globenc", kind, ordinal): earlier(kind, ordinal) for kind in ("detail", "summary")}
        write_raw(folder, tagged, step=10 * ordinal)


def test_an_earlier_version_s_records_of_a_large_probe_are_shown(tmp_path: Path) -> None:
    write_earlier(tmp_path, [0, 1])
    client, where = application(reader(tmp_path)), {"run": "run", "tag": "globenc"}
    index = ask(client, "index", **where).content
    assert (len(index["sentences"]), index["examples"], index["messages"]) == (64, 70, [])
    for place in (0, 1):
        measured = synthetic_measurement(place, 2, sentences=70, layers=2, tokens=6)
        tokens = ask(client, "tokens", index=place, method="N-FixedRes", layer=1, **where).content
        assert tokens["stored"] == dict.fromkeys(METHODS, 64) | {"N-FixedRes": 11, "N-Res": 0, "N-ResLN": 0}
        assert tokens["instead"]["63"] == ["W", "W-FixedRes", "W-Res", "N", "N-Enc"]
        row = measured.rows[10]["N-FixedRes"][1]
        np.testing.assert_allclose(tokens["rows"][10], row / row.max(), atol=2e-5)
        assert tokens["rows"][11] is None
        np.testing.assert_allclose(
            index["correlation"]["N"]["mean"][place], measured.correlation["N"].mean(0), atol=1e-5
        )
    moved = ask(client, "movement", from_=0, to=1, method="N-FixedRes", layer=1, **where).content
    assert (len(moved["sentences"]), moved["lacking"]) == (11, [*range(11, 64)])
    table = ask(client, "table", **where).content
    assert (table["examples"], table["shown"]) == (70, 64)


def test_a_training_that_went_on_with_another_version_shows_what_both_hold(tmp_path: Path) -> None:
    write_earlier(tmp_path, [0])
    logger = logger_of(tmp_path)
    measured = [synthetic_measurement(place, 2, sentences=70, layers=2, tokens=6) for place in (0, 1)]
    write(logger, measured[1], store.Moment(1, 10, 0, 1.0))
    logger.experiment.close()
    client, where = application(reader(tmp_path)), {"run": "run", "tag": "globenc"}
    index = ask(client, "index", **where).content
    assert (len(index["sentences"]), index["examples"], index["messages"]) == (64, 70, [])
    assert not any(one["damaged"] or one["other_texts"] for one in index["validations"])
    for place in (0, 1):
        tokens = ask(client, "tokens", index=place, method="N-Enc", layer=1, **where).content
        row = measured[place].rows[63]["N-Enc"][1]
        np.testing.assert_allclose(tokens["rows"][63], row / row.max(), atol=2e-5)
        assert [len(tokens[name]) for name in ("rows", "saliency", "rho")] == [64] * 3
    moved = ask(client, "movement", from_=0, to=1, method="N-Enc", layer=1, **where).content
    assert len(moved["sentences"]) == 64
    drift = ask(client, "dynamics", **{**CHOICES, **where}).content
    assert drift["drift"]["N-Enc"][1] is not None
    assert drift["sentences"] == {"N-Enc": 64, "W": 64}
    assert ask(client, "detail", index=1, sentence=64, **where).code == 404


def test_runs_that_show_different_parts_of_one_probe_are_averaged(tmp_path: Path) -> None:
    write_earlier(tmp_path, [0, 1])
    logger = logger_of(tmp_path, "later")
    write(logger, synthetic_measurement(1, 2, sentences=70, layers=2, tokens=6), store.Moment(0, 10, 0, 1.0))
    logger.experiment.close()
    write_run(tmp_path, [0], "smaller", sentences=66, layers=2, tokens=6)
    client = application(reader(tmp_path))
    tables = [ask(client, "table", run=run, tag="globenc").content for run in ("run", "later", "smaller")]
    assert [one["shown"] for one in tables] == [64, 70, 66]
    assert [one["examples"] for one in tables] == [70, 70, 66]
    assert tables[0]["probe"] == tables[1]["probe"] != tables[2]["probe"]


def test_movement_against_scipy(client: Client) -> None:
    answer = ask(client, "movement", from_=0, to=4, method="N-Res", layer=0, k=3, **WHERE).content["sentences"]
    assert sorted(one["sentence"] for one in answer) == [0, 1, 2]
    distances = [one["distance"] for one in answer]
    assert distances == sorted(distances, reverse=True)
    for one in answer:
        before, after = (
            ask(client, "detail", index=i, sentence=one["sentence"], **WHERE).content["rows"]["N-Res"][0]
            for i in (0, 4)
        )
        assert one["distance"] == pytest.approx(1 - spearmanr(before, after).statistic, abs=1e-4)
        tops = [set(np.argsort(row)[-3:].tolist()) for row in (before, after)]
        assert one["overlap"] == pytest.approx(len(tops[0] & tops[1]) / 3, abs=1e-4)
        gain = np.array(after) / sum(after) - np.array(before) / sum(before)
        assert one["gained"] == [place for place in np.argsort(-gain).tolist() if gain[place] > 0][:3]
        assert one["lost"] == [place for place in np.argsort(gain).tolist() if gain[place] < 0][:3]
    same = ask(client, "movement", from_=2, to=2, method="N-Res", layer=0, **WHERE).content["sentences"]
    assert {(one["distance"], one["overlap"], *one["gained"], *one["lost"]) for one in same} == {(0.0, 1.0)}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_ties_share_their_rank_as_in_scipy(pairs: list[tuple[int, int]]) -> None:
    before, after = zip(*pairs, strict=True)
    distance = moving.movement(before, after, 3)["distance"]
    if len(set(before)) == 1 or len(set(after)) == 1:
        assert distance is None
    else:
        assert distance == pytest.approx(1 - spearmanr(before, after).statistic, abs=1e-4)


def test_many_movements_at_once_are_those_of_each() -> None:
    draw = np.random.default_rng(0)
    pairs = [(draw.integers(0, 6, size), draw.integers(0, 6, size)) for size in (7, 1, 4, 7, 2, 30, 4, 7)]
    pairs.append((np.zeros(4), draw.random(4)))
    assert moving.movements(pairs, 3) == [moving.movement(*pair, 3) for pair in pairs]
    assert moving.movements([], 3) == []


def test_movement_of_nothing() -> None:
    assert moving.movement([], [], 5) == {"distance": None, "overlap": 1.0, "gained": [], "lost": []}
    assert moving.movement([0, 0], [0, 0], 1) == {"distance": None, "overlap": 1.0, "gained": [], "lost": []}


@pytest.mark.parametrize(
    ("route", "arguments", "code", "words"),
    [
        ("index", {}, 400, "run= is missing"),
        ("index", {"run": ODD}, 400, "tag= is missing"),
        ("index", {"run": "other", "tag": "globenc"}, 404, "no GlobEnc data"),
        ("index", {"run": ODD, "tag": "globenc/dashboard/summary"}, 404, "no GlobEnc data"),
        ("sentence", {**WHERE, "sentence": 3}, 404, "there are 3 sentences"),
        ("sentence", {**WHERE, "sentence": "-1"}, 400, "must be a whole number"),
        ("sentence", {**WHERE, "sentence": "1e3"}, 400, "must be a whole number"),
        ("sentence", {**WHERE, "sentence": "²"}, 400, "must be a whole number"),
        ("sentence", {**WHERE, "sentence": "9" * 5000}, 400, "must be a whole number"),
        ("detail", {**WHERE, "sentence": 0}, 400, "index= is missing"),
        ("detail", {**WHERE, "sentence": 0, "index": 5}, 404, "there are 5 validations"),
        ("tokens", {**WHERE, "index": 0, "method": "X", "layer": 0}, 404, "method 'X'"),
        ("tokens", {**WHERE, "index": 0, "method": "N", "layer": 2}, 404, "there are 2 layers"),
        ("tokens", {**WHERE, "index": 5, "method": "N", "layer": 0}, 404, "there are 5 validations"),
        ("movement", {**WHERE, "from": 0, "to": 9, "method": "N", "layer": 0}, 404, "out of range"),
        ("movement", {**WHERE, "from": 0, "to": 1, "method": "N", "layer": 0, "k": 0}, 400, "at least 1"),
    ],
)
def test_questions_without_an_answer_get_a_message(
    client: Client, route: str, arguments: dict[str, Any], code: int, words: str
) -> None:
    refused(ask(client, route, **arguments), code, words)


def test_other_methods_than_get_are_refused(client: Client) -> None:
    response = client.post(f"{PLUGIN}/runs")
    assert (response.status_code, response.headers["Content-Type"]) == (405, "application/json")


def test_tokens_travel_as_json_strings_alone(tmp_path: Path) -> None:
    odd = ("</script><script>alert(1)</script>", "\u2028", "\x00", '"', "\ud83d", "\U0001f600", "##ing")
    measurement = synthetic_measurement(0, 1, **{**SIZES, "sentences": 1, "tokens": len(odd)})
    measurement.names[0] = odd
    logger = logger_of(tmp_path)
    write(logger, measurement, store.Moment(0, 0, 0, 1.0))
    logger.experiment.close()
    response = application(reader(tmp_path)).get(f"{PLUGIN}/index", query_string={"run": "run", "tag": "globenc"})
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.data.isascii()
    assert json.loads(response.data)["sentences"][0]["tokens"] == list(odd)


def test_what_is_undefined_is_null(tmp_path: Path) -> None:
    measurement = synthetic_measurement(0, 1, **SIZES)
    measurement.correlation["N"][:, 0] = float("nan")
    measurement.correlation["N"][:-1, 1] = float("nan")
    measurement.probability[2] = float("nan")
    logger = logger_of(tmp_path)
    write(logger, measurement, store.Moment(0, 0, 0, 1.0))
    logger.experiment.close()
    client, where = application(reader(tmp_path)), {"run": "run", "tag": "globenc"}
    answer = ask(client, "index", **where).content
    curve = {name: answer["correlation"]["N"][name][0] for name in ("mean", "low", "high", "n")}
    alone = pytest.approx(float(measurement.correlation["N"][2, 1]), abs=1e-5)
    assert curve == {"mean": [None, alone], "low": [None, None], "high": [None, None], "n": [0, 1]}
    assert answer["validations"][0]["probability"][2] is None
    assert ask(client, "sentence", sentence=0, **where).content["rho"]["N"] == [[None, None]]
    assert ask(client, "detail", index=0, sentence=0, **where).content["rho"]["N"] == [None, None]
    assert ask(client, "tokens", index=0, method="N", layer=1, **where).content["rho"] == [None, None, alone]


def test_a_missing_validation_is_a_gap(tmp_path: Path) -> None:
    write_run(tmp_path, [0, 2])
    write_raw(tmp_path, {store.tag("globenc", "summary", 1): missing(1)})
    client = application(reader(tmp_path))
    where = {"run": "run", "tag": "globenc"}
    answer = ask(client, "index", **where).content
    assert [one["missing"] for one in answer["validations"]] == [False, True, False]
    assert (answer["validations"][1]["step"], answer["validations"][1]["predicted"]) == (10, None)
    assert [mean is None for mean in answer["correlation"]["N"]["mean"]] == [False, True, False]
    assert ask(client, "sentence", sentence=0, **where).content["rho"]["W"][1] is None
    refused(ask(client, "tokens", index=1, method="N", layer=0, **where), 404, "its analysis failed")
    refused(ask(client, "detail", index=1, sentence=0, **where), 404, "its analysis failed")
    refused(ask(client, "movement", from_=0, to=1, method="N", layer=0, **where), 404, "its analysis failed")


def test_a_missing_validation_tells_its_reason(tmp_path: Path) -> None:
    write_run(tmp_path, [0, 2])
    write_raw(tmp_path, {store.tag("globenc", "summary", 1): missing(1, "GlobEncCallback: <b>why</b>\nand so.")})
    client = application(reader(tmp_path))
    where = {"run": "run", "tag": "globenc"}
    answer = ask(client, "index", **where).content
    assert [one["reason"] for one in answer["validations"]] == [None, "<b>why</b>\nand so.", None]
    assert answer["messages"] == []
    refused(ask(client, "tokens", index=1, method="N", layer=0, **where), 404, "no figures: <b>why</b>\nand so.")


def test_a_run_without_figures_tells_each_reason_once(tmp_path: Path) -> None:
    reasons = ["one", "two", "one", None]
    write_raw(tmp_path, {store.tag("globenc", "summary", i): missing(i, one) for i, one in enumerate(reasons)})
    client = application(reader(tmp_path))
    where = {"run": "run", "tag": "globenc"}
    assert ask(client, "index", **where).content["messages"] == ["one", "two"]
    refused(ask(client, "sentence", sentence=0, **where), 404, "one two")
    many = {store.tag("globenc", "summary", i): missing(i, f"reason {i}") for i in range(30)}
    write_raw(tmp_path, many, "many")
    messages = ask(application(reader(tmp_path)), "index", run="many", tag="globenc").content["messages"]
    assert messages == [*(f"reason {i}" for i in range(20)), "There are 10 reasons more."]


def test_figures_take_the_place_of_a_reason(tmp_path: Path) -> None:
    write_raw(tmp_path, {store.tag("globenc", "summary", 0): missing(0, "no figures so far")})
    write_run(tmp_path, [0])
    answer = ask(application(reader(tmp_path)), "index", run="run", tag="globenc").content
    assert [one["missing"] for one in answer["validations"]] == [False]
    assert answer["messages"] == []


def test_nothing_but_missing_validations_is_a_message(tmp_path: Path) -> None:
    write_raw(tmp_path, {store.tag("globenc", "summary", 0): missing(0)})
    client = application(reader(tmp_path))
    answer = ask(client, "index", run="run", tag="globenc").content
    assert (answer["methods"], answer["sentences"], answer["layers"]) == ([], [], 0)
    assert answer["messages"] == ["No validation has figures yet: the analysis of each of them failed."]
    refused(ask(client, "detail", index=0, sentence=0, run="run", tag="globenc"), 404, "No validation has figures")


def damaged(kind: str) -> bytes:
    """A record that is wrong in some way."""
    whole = missing(1)
    return {
        "empty": b"",
        "another format": b"\x89PNG\r\n\x1a\n" * 9,
        "a later version": whole[:8] + b"\x02\x00\x00\x00" + whole[12:],
        "cut off": whole[:-3],
        "of another validation": missing(4),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "does not begin"),
        ("another format", "does not begin"),
        ("a later version", "format 2"),
        ("cut off", "cut off"),
        ("of another validation", "another validation"),
    ],
)
def test_a_damaged_summary_is_told_and_the_others_are_shown(tmp_path: Path, kind: str, words: str) -> None:
    write_run(tmp_path, [0, 2])
    write_raw(tmp_path, {store.tag("globenc", "summary", 1): damaged(kind)})
    client = application(reader(tmp_path))
    answer = ask(client, "index", run="run", tag="globenc").content
    assert [one["damaged"] is None for one in answer["validations"]] == [True, False, True]
    assert words in answer["validations"][1]["damaged"]
    (message,) = answer["messages"]
    assert message.startswith("1 of 3 validations cannot be shown: ")
    assert words in message
    refused(ask(client, "detail", index=1, sentence=0, run="run", tag="globenc"), 404, words)
    assert ask(client, "detail", index=2, sentence=0, run="run", tag="globenc").code == 200


@pytest.mark.parametrize("kind", ["empty", "another format", "a later version", "cut off", "of another validation"])
def test_a_damaged_detail_is_told_and_the_others_are_shown(tmp_path: Path, kind: str) -> None:
    write_run(tmp_path, range(3))
    write_raw(tmp_path, {store.tag("globenc", "detail", 1): damaged(kind)})
    client = application(reader(tmp_path))
    where = {"run": "run", "tag": "globenc"}
    assert ask(client, "index", **where).content["messages"] == []
    refused(ask(client, "detail", index=1, sentence=0, **where), 404, "cannot be read")
    assert ask(client, "detail", index=0, sentence=0, **where).code == 200
    refused(ask(client, "tokens", index=1, method="N", layer=0, **where), 404, "cannot be read")
    assert ask(client, "tokens", index=2, method="N", layer=0, **where).code == 200


@pytest.mark.parametrize(
    ("change", "words"),
    [({"tokens": 5}, "belong to another"), ({"session": 2.0}, "belong to another"), ({"layers": 3}, "another model")],
    ids=str,
)
def test_attributions_that_do_not_belong_to_the_summary_are_not_shown(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    write_run(tmp_path / "source", [0], **change)
    write_run(tmp_path / "target", [0])
    name = store.tag("globenc", "detail", 0)
    write_raw(tmp_path / "target", {name: raw_records(tmp_path / "source")[name]})
    client = application(reader(tmp_path / "target"))
    assert ask(client, "index", run="run", tag="globenc").content["messages"] == []
    refused(ask(client, "detail", index=0, sentence=0, run="run", tag="globenc"), 404, words)


def test_a_detail_that_is_not_written_yet_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "source", [0])
    name = store.tag("globenc", "summary", 0)
    write_raw(tmp_path / "target", {name: raw_records(tmp_path / "source")[name]})
    client = application(reader(tmp_path / "target"))
    assert ask(client, "index", run="run", tag="globenc").content["validations"][0]["damaged"] is None
    refused(ask(client, "detail", index=0, sentence=0, run="run", tag="globenc"), 404, "not yet")


def raw_records(folder: Path) -> dict[str, bytes]:
    (file,) = folder.rglob("*tfevents*")
    accumulator = events(file)
    return {tag: accumulator.Tensors(tag)[-1].tensor_proto.string_val[0] for tag in accumulator.Tags()["tensors"]}


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"tokens": 5}, {"sentences": 2}, {"layers": 3}, {"methods": ("N", "N-Enc")}], ids=str
)
def test_validations_of_another_probe_or_model_are_not_mixed_in(tmp_path: Path, change: dict[str, Any]) -> None:
    write_run(tmp_path, [0, 1], **change)
    write_run(tmp_path, [2, 3])
    client = application(reader(tmp_path))
    answer = ask(client, "index", run="run", tag="globenc").content
    assert [one["damaged"] is not None for one in answer["validations"]] == [True, True, False, False]
    (message,) = answer["messages"]
    assert message.startswith("2 of 4 validations cannot be shown: another probe")
    refused(ask(client, "detail", index=0, sentence=0, run="run", tag="globenc"), 404, "another probe")


def test_what_a_resumed_training_did_again_replaces_what_was_there(tmp_path: Path) -> None:
    write_run(tmp_path, range(6), session=1.0)
    write_run(tmp_path, [3, 4], session=2.0, seed=0)
    client = application(reader(tmp_path))
    answer = ask(client, "index", run="run", tag="globenc").content
    assert [one["ordinal"] for one in answer["validations"]] == [0, 1, 2, 3, 4]
    assert answer["messages"] == [
        "1 validations are left out: the training was resumed from a checkpoint older than they are."
    ]
    assert all(ask(client, "detail", index=i, sentence=0, run="run", tag="globenc").code == 200 for i in range(5))


def test_new_validations_are_seen_and_known_ones_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, range(3))
    read: list[int] = []
    real = store.summary_from_bytes

    def counted(data: bytes) -> store.Summary | store.Missing:
        found = real(data)
        read.append(found.moment.ordinal)
        return found

    monkeypatch.setattr(store, "summary_from_bytes", counted)
    multiplexer = reader(tmp_path)
    client = application(multiplexer)
    for _ in range(2):
        assert len(ask(client, "index", run="run", tag="globenc").content["validations"]) == 3
    assert read == [0, 1, 2]
    write_run(tmp_path, [3, 4])
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    # A slider that stands on what it knows does not wait for new data.
    refused(ask(client, "detail", index=3, sentence=0, run="run", tag="globenc"), 404, "there are 3 validations")
    assert len(ask(client, "index", run="run", tag="globenc").content["validations"]) == 5
    assert read == [0, 1, 2, 3, 4]
    assert ask(client, "detail", index=3, sentence=0, run="run", tag="globenc").code == 200


def test_an_unexpected_error_is_a_message_and_not_a_broken_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = application(reader(folder))

    def fails(*args: Any) -> None:
        raise ZeroDivisionError("secret of the house")

    monkeypatch.setattr(plugin, "put_together", fails)
    answer = ask(client, "index", **WHERE)
    refused(answer, 500, "ZeroDivisionError")
    assert "secret" not in answer.content["error"]


def test_without_a_data_provider_there_is_a_message() -> None:
    one = plugin.GlobEncPlugin(TBContext())
    answer = Client(one.get_plugin_apps()["/runs"]).get("/")
    assert answer.status_code == 404
    assert "no data" in answer.get_json()["error"]


def test_answers_to_many_at_once_are_the_same(client: Client, folder: Path) -> None:
    fresh = application(reader(folder))
    found: list[Answer] = []

    def work(place: int) -> None:
        found.append(ask(fresh, "detail", index=place % VALIDATIONS, sentence=0, **WHERE))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [ask(client, "detail", index=i, sentence=0, **WHERE) for i in range(VALIDATIONS)]
    assert len(found) == 20
    assert all(one in expected for one in found)


def test_tokens_that_stay_the_same_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, range(4))
    kept: list[Any] = []
    real = plugin.put_together

    def seen(written: Any, read: Any) -> Any:
        kept.extend(one.summary.sentences for one in read.values())
        return real(written, read)

    monkeypatch.setattr(plugin, "put_together", seen)
    assert len(ask(application(reader(tmp_path)), "index", run="run", tag="globenc").content["validations"]) == 4
    assert len(kept) == 4
    assert len({id(one) for one in kept}) == 1


def test_what_is_remembered_has_a_bound() -> None:
    recent: answering.Recent[str] = answering.Recent(10)
    for key in range(5):
        recent.put(key, str(key), 4)
    assert [recent.get(key) for key in range(5)] == [None, None, None, "3", "4"]
    assert recent.get(3) == "3"
    recent.put(5, "5", 4)
    assert [recent.get(key) for key in (3, 4, 5)] == ["3", None, "5"]
    recent.put(6, "6", 99)
    assert [recent.get(key) for key in (3, 5, 6)] == [None, None, "6"]


def test_static_files_are_served_with_their_type(client: Client) -> None:
    for file in answering.STATIC.rglob("*"):
        if file.is_file():
            response = client.get(f"{PLUGIN}/static/{file.relative_to(answering.STATIC).as_posix()}")
            assert response.status_code == 200, file
            assert response.data == file.read_bytes()
            assert response.headers["Content-Type"].partition(";")[0] == answering.CONTENT_TYPES[file.suffix]
            assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert (answering.STATIC / "index.js").is_file()
    listing = json.loads(client.get("/data/plugins_listing").data)["globenc"]
    assert (listing["tab_name"], listing["enabled"]) == ("GlobEnc", True)
    entry = listing["loading_mechanism"]
    assert entry == {"type": "IFRAME", "module_path": f"{PLUGIN}/static/index.js"}
    assert client.get(entry["module_path"]).headers["Content-Type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "name",
    [
        "../plugin.py",
        "..%2fplugin.py",
        "%2e%2e/plugin.py",
        "..%5cplugin.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "../../../../../../../../etc/passwd",
        "x/../../store.py",
        "index.js%00.css",
        "",
        ".",
        "..",
        "no-such-file.js",
        "static/../../plugin.py",
        "a" * 5000,
    ],
)
def test_nothing_but_static_files_is_served(client: Client, name: str) -> None:
    response = client.get(f"{PLUGIN}/static/{name}")
    assert response.status_code == 404
    assert response.data == b"Not found"


def test_a_link_out_of_the_folder_and_other_kinds_of_files_are_not_served(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = tmp_path / "static"
    static.mkdir()
    (tmp_path / "secret.js").write_text("secret")
    (static / "link.js").symlink_to(tmp_path / "secret.js")
    (static / "page.html").write_text("<script>1</script>")
    (static / "fine.js").write_text("1")
    monkeypatch.setattr(answering, "STATIC", static)
    codes = [client.get(f"{PLUGIN}/static/{name}").status_code for name in ("link.js", "page.html", "fine.js")]
    assert codes == [404, 404, 200]


def test_the_module_is_imported_without_torch_and_the_rest() -> None:
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import numpy
from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
theirs = set(sys.modules)
from globenc_lightning.report.dashboard.plugin import GlobEncPlugin
ours = {{name.partition(".")[0] for name in set(sys.modules) - theirs}}
strange = {{name for name in ours if name not in sys.stdlib_module_names}} - {{"globenc_lightning", "numpy"}}
assert not strange, strange
assert not any(name in sys.modules for name in {BLOCKED!r})
import globenc_lightning
assert "attribute" in dir(globenc_lightning)
print(GlobEncPlugin.plugin_name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("globenc", 0), done.stderr


def test_the_package_still_offers_its_names() -> None:
    import globenc_lightning

    assert globenc_lightning.METHODS is METHODS
    for name in set(globenc_lightning.__all__) - {"METHODS"}:
        assert getattr(globenc_lightning, name).__module__ == globenc_lightning._HOMES[name]
    assert set(globenc_lightning.__all__) <= set(dir(globenc_lightning))
    assert set(globenc_lightning._HOMES) == set(globenc_lightning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Attribution'"):
        _ = globenc_lightning.Attribution


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that can be wrong with one."""
    folder = tmp_path_factory.mktemp("messy")
    write_run(folder, range(3), ODD)
    with SummaryWriter(str(folder / "scalars only")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    write_run(folder, range(4), "truncated")
    (file,) = (folder / "truncated").glob("*tfevents*")
    file.write_bytes(file.read_bytes()[:-1000])
    write_run(folder, range(4), "overwritten")
    (file,) = (folder / "overwritten").glob("*tfevents*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = b"\xff" * 200
    file.write_bytes(bytes(content))
    write_run(folder, [0], "damaged record")
    write_raw(folder, {store.tag("globenc", "summary", 1): b"GlobEnc\n rubbish" * 50}, "damaged record")
    (folder / "noise").mkdir()
    (folder / "noise" / "events.out.tfevents.1.x").write_bytes(np.random.default_rng(0).bytes(5000))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", ["true", "false"])
def test_tensorboard_itself_on_a_folder_where_much_is_wrong(messy: Path, tmp_path: Path, load_fast: str) -> None:
    with tensorboard(messy, tmp_path, load_fast=load_fast) as address:
        runs = {one["run"]: one["callbacks"][0]["validations"] for one in until_runs(address, 4)}
        assert set(runs) == {ODD, "truncated", "overwritten", "damaged record"}
        assert runs[ODD] == 3
        listing = fetch(address, "/data/plugins_listing").content
        assert listing["globenc"]["enabled"] is True
        answer = fetch(address, f"{PLUGIN}/index", **WHERE)
        assert (answer.code, answer.kind) == (200, "application/json")
        assert [one["step"] for one in answer.content["validations"]] == [0, 10, 20]
        assert fetch(address, f"{PLUGIN}/detail", index=2, sentence=1, **WHERE).code == 200
        # What comes before the damage is shown.
        for name in ("truncated", "overwritten"):
            seen = fetch(address, f"{PLUGIN}/index", run=name, tag="globenc").content["validations"]
            assert 1 <= len(seen) < 4
            assert fetch(address, f"{PLUGIN}/detail", index=0, sentence=0, run=name, tag="globenc").code == 200
        told = fetch(address, f"{PLUGIN}/index", run="damaged record", tag="globenc").content
        assert "cannot be shown" in told["messages"][0]
        refused(fetch(address, f"{PLUGIN}/index", run="scalars only", tag="globenc"), 404, "no GlobEnc data")
        assert b"import" in fetch(address, "/data/plugin_entry.html", name="globenc").content
        assert fetch(address, f"{PLUGIN}/static/index.js").kind.startswith("text/javascript")
        assert fetch(address, f"{PLUGIN}/static/../plugin.py").code == 404


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", ["true", "false"])
@pytest.mark.parametrize("there", [True, False])
def test_tensorboard_itself_on_an_empty_folder_and_on_none(tmp_path: Path, there: bool, load_fast: str) -> None:
    logdir = tmp_path / "logs"
    if there:
        logdir.mkdir()
    with tensorboard(logdir, tmp_path, load_fast=load_fast) as address:
        assert fetch(address, f"{PLUGIN}/runs") == Answer(200, "application/json", {"runs": []})
        assert fetch(address, "/data/plugins_listing").content["globenc"]["enabled"] is False
        refused(fetch(address, f"{PLUGIN}/index", **WHERE), 404, "no GlobEnc data")
        # Data that come later are seen.
        write_run(tmp_path / "written", [0], ODD)
        shutil.copytree(tmp_path / "written", logdir, dirs_exist_ok=True)
        assert until_runs(address, 1)[0]["run"] == ODD
        assert fetch(address, f"{PLUGIN}/index", **WHERE).code == 200


# Many runs

CHOICES = {"layer": 1, "methods": '["N-Enc", "W"]', "against": "previous", "by": "spearman", "tokens": '["film"]'}


def test_a_table_holds_the_means_of_every_method_and_layer(client: Client) -> None:
    index, table = ask(client, "index", **WHERE).content, ask(client, "table", **WHERE).content
    assert table["steps"] == [one["step"] for one in index["validations"]]
    assert table["places"] == [*range(VALIDATIONS)]
    assert table["mean"] == {method: of["mean"] for method, of in index["correlation"].items()}
    assert (table["layers"], table["examples"]) == (SIZES["layers"], SIZES["sentences"])


def test_runs_of_one_probe_are_told_by_their_tokens(tmp_path: Path) -> None:
    write_run(tmp_path, range(2), "one", seed=1, words=0)
    write_run(tmp_path, range(2), "two", seed=2, words=0)
    write_run(tmp_path, range(2), "other", seed=1, words=5)
    client = application(reader(tmp_path))
    probes = [ask(client, "table", run=run, tag="globenc").content["probe"] for run in ("one", "two", "other")]
    assert probes[0] == probes[1] != probes[2]


@pytest.mark.parametrize("by", ["spearman", "jaccard"])
@pytest.mark.parametrize("against", ["previous", "first", "last"])
def test_dynamics_are_means_over_the_sentences(client: Client, against: str, by: str) -> None:
    index = ask(client, "index", **WHERE).content
    answer = ask(client, "dynamics", **WHERE, **{**CHOICES, "against": against, "by": by}).content
    sentences = index["sentences"]
    rows = [
        ask(client, "tokens", index=place, method="N-Enc", layer=1, **WHERE).content["rows"]
        for place in range(VALIDATIONS)
    ]
    for place in range(VALIDATIONS):
        other = {"previous": place - 1, "first": 0, "last": VALIDATIONS - 1}[against]
        if other == place or other < 0:
            assert answer["drift"]["N-Enc"][place] is None
            continue
        moved = []
        for number, sentence in enumerate(sentences):
            plain = [k for k, special in enumerate(sentence["special"]) if not special]
            old, new = ([rows[at][number][k] for k in plain] for at in (other, place))
            if by == "spearman":
                moved.append(1 - spearmanr(old, new).statistic)
            else:
                most = -(-len(plain) // 4)
                sets = [set(sorted(range(len(plain)), key=lambda k, one=one: -one[k])[:most]) for one in (old, new)]
                moved.append(1 - len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        assert answer["drift"]["N-Enc"][place] == pytest.approx(np.mean(moved), abs=2e-4)
    for place in range(VALIDATIONS):
        shares = [
            sum(value for value, token in zip(row, sentence["tokens"], strict=True) if token == "film") / sum(row)
            for row, sentence in zip(rows[place], sentences, strict=True)
        ]
        assert answer["mass"]["N-Enc"][place] == pytest.approx(np.mean(shares), abs=2e-4)
    assert answer["chosen"] == [sentence["tokens"].count("film") for sentence in sentences]
    assert set(answer["drift"]) == set(answer["mass"]) == {"N-Enc", "W"}


def test_a_validation_without_figures_is_a_gap_in_the_dynamics(tmp_path: Path) -> None:
    write_run(tmp_path, [0, 1, 3])
    write_raw(tmp_path, {store.tag("globenc", "summary", 2): missing(2)}, step=20)
    client = application(reader(tmp_path))
    answer = ask(client, "dynamics", run="run", tag="globenc", **CHOICES).content
    whole = application(reader(tmp_path))
    assert [one is None for one in answer["drift"]["N-Enc"]] == [True, False, True, False]
    assert [one is None for one in answer["mass"]["N-Enc"]] == [False, False, True, False]
    rows = [
        ask(whole, "tokens", run="run", tag="globenc", index=place, method="N-Enc", layer=1).content["rows"]
        for place in (1, 3)
    ]
    moved = [1 - spearmanr(old[1:-1], new[1:-1]).statistic for old, new in zip(*rows, strict=True)]
    assert answer["drift"]["N-Enc"][3] == pytest.approx(np.mean(moved), abs=2e-4)


def test_dynamics_of_a_training_that_goes_on_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, range(3))
    multiplexer = reader(tmp_path)
    client = application(multiplexer)
    where = {"run": "run", "tag": "globenc"}
    before = ask(client, "dynamics", **where, **CHOICES).content
    read: list[int] = []
    decode = store.detail_from_bytes

    def counted(data: bytes) -> store.Detail:
        read.append(1)
        return decode(data)

    monkeypatch.setattr(store, "detail_from_bytes", counted)
    ask(client, "dynamics", **where, **{**CHOICES, "layer": 0})
    assert read == []
    # TensorBoard reads event files in the order of their names, which begin with the second.
    time.sleep(1.1)
    write_run(tmp_path, [3])
    multiplexer.Reload()
    ask(client, "table", **where)
    after = ask(client, "dynamics", **where, **CHOICES).content
    assert len(read) == 1
    assert after["drift"]["N-Enc"][:3] == before["drift"]["N-Enc"]
    assert len(after["drift"]["N-Enc"]) == 4


def test_details_that_are_damaged_or_missing_are_gaps(tmp_path: Path) -> None:
    write_run(tmp_path, range(3))
    write_raw(tmp_path, {store.tag("globenc", "detail", 1): b"no record"}, step=10)
    answer = ask(application(reader(tmp_path)), "dynamics", run="run", tag="globenc", **CHOICES)
    assert answer.code == 200
    assert [one is None for one in answer.content["mass"]["N-Enc"]] == [False, True, False]
    assert answer.content["drift"]["N-Enc"] == [None, None, None]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"against": "best"}, 400, "against= must be one of previous, first, last"),
        ({"by": "cosine"}, 400, "by= must be one of spearman, jaccard"),
        ({"tokens": "film"}, 400, "tokens= must be a list of texts"),
        ({"tokens": "[1]"}, 400, "tokens= must be a list of texts"),
        ({"tokens": "[" * 100_000}, 400, "tokens= must be a list of texts"),
        ({"tokens": json.dumps(["x" * 201])}, 400, "at most 200 characters"),
        ({"tokens": json.dumps(["x"] * 201)}, 400, "tokens= holds 201 texts; at most 200"),
        ({"methods": '["N-Enc", "none"]'}, 404, "no figures of the method 'none'"),
        ({"layer": 9}, 404, "there are 2 layers"),
    ],
)
def test_dynamics_refuse_what_makes_no_sense(client: Client, changes: dict[str, Any], code: int, words: str) -> None:
    refused(ask(client, "dynamics", **WHERE, **{**CHOICES, **changes}), code, words)
