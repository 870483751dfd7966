from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.dashboard import CLASS_NAMES, large_run, synthetic_measurement, synthetic_probe
from globenc_lightning import METHODS
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.packing import MAPS_ROOM, ROWS_ROOM, by_importance, rows_that_fit
from globenc_lightning.report.dashboard.records import kept_maps, records
from globenc_lightning.report.dashboard.shown import examples_of
from globenc_lightning.settings import Settings

MOMENT = store.Moment(ordinal=0, step=0, epoch=0, session=1.0)
MEGABYTE = 1_000_000
LADDER = tuple(by_importance(METHODS, "N-Enc"))


def made(**sizes: Any) -> tuple[store.Summary, store.Detail]:
    measurement = synthetic_measurement(0, 1, **sizes)
    settings = Settings(tuple(measurement.correlation))
    return records(measurement, synthetic_probe(measurement.names), settings, MOMENT, CLASS_NAMES)


def stored(parts: Any) -> set[tuple[str, int]]:
    return {(method, sentence) for method, of in parts.items() for sentence in of}


def test_short_sentences_are_stored_whole() -> None:
    summary, detail = made(sentences=16, layers=12, tokens=24)
    everything = {(method, sentence) for method in METHODS for sentence in range(16)}
    assert stored(detail.rows) == stored(detail.maps) == everything
    assert len(store.to_bytes(summary)) + len(store.to_bytes(detail)) < 160_000


def test_sentences_of_128_tokens_keep_all_rows_and_the_drawn_method_s_maps() -> None:
    summary, detail = made(sentences=16, layers=12, tokens=128)
    assert stored(detail.rows) == {(method, sentence) for method in METHODS for sentence in range(16)}
    assert stored(detail.maps) == {("N-Enc", sentence) for sentence in range(16)}
    assert len(store.to_bytes(summary)) + len(store.to_bytes(detail)) < 600_000


def test_nothing_makes_a_validation_larger_than_its_room() -> None:
    summary, detail = made(sentences=40, layers=24, tokens=200)
    assert sum(codes.nbytes for of in detail.rows.values() for codes in of.values()) <= ROWS_ROOM
    assert sum(codes.nbytes for of in detail.maps.values() for codes in of.values()) <= MAPS_ROOM
    # All sentences of the methods that matter most come before any of another.
    assert [len(of) for of in detail.rows.values()] == [40, 40, 40, 40, 40, 19]
    assert list(detail.rows) == list(LADDER[:6])
    assert stored(detail.maps) == {("N-Enc", sentence) for sentence in detail.maps["N-Enc"]}
    # What a validation takes is its room and what little is not attribution.
    assert len(store.to_bytes(summary)) + len(store.to_bytes(detail)) < ROWS_ROOM + MAPS_ROOM + 200_000


def test_a_sentence_longer_than_the_room_does_not_keep_others_out() -> None:
    kept = kept_maps([600, 20, 512, 30], Settings(METHODS), drawn=1)
    # The first is drawn, so it is measured whether or not there is room; the third fits to the byte, and takes it all.
    assert kept == {0: ("N-Enc",), 1: LADDER, 3: LADDER}
    assert kept_maps([512], Settings(METHODS), drawn=0) == {0: ("N-Enc",)}
    assert kept_maps([513], Settings(METHODS), drawn=0) == {}
    assert kept_maps([5, 5], Settings(("W", "N")), drawn=0) == {0: ("N", "W"), 1: ("N", "W")}


def test_maps_that_were_not_measured_are_left_out() -> None:
    measurement = synthetic_measurement(0, 1, sentences=3, layers=2, tokens=6)
    measurement = replace(measurement, last={1: {"W": measurement.last[1]["W"]}})
    _, detail = records(measurement, synthetic_probe(measurement.names), Settings(METHODS), MOMENT)
    assert stored(detail.maps) == {("W", 1)}


def test_unknown_special_tokens_labels_and_class_names() -> None:
    measurement = synthetic_measurement(0, 1, sentences=2, layers=2, tokens=6)
    probe = synthetic_probe(measurement.names)
    vars(probe)["special"] = (None, None)
    for row in probe.rows:
        row["labels"] = torch.tensor(0.5)
    summary, _ = records(measurement, probe, Settings(METHODS), MOMENT)
    assert [one.special for one in summary.sentences] == [(False,) * len(one.tokens) for one in summary.sentences]
    assert [one.label for one in summary.sentences] == [None, None]
    assert summary.class_names is None


def test_an_encoder_that_saw_more_positions_than_the_tokenizer_marked() -> None:
    measurement = synthetic_measurement(0, 1, sentences=1, layers=2, tokens=6)
    probe = synthetic_probe(measurement.names)
    vars(probe)["special"] = (torch.tensor([True]),)
    summary, _ = records(measurement, probe, Settings(METHODS), MOMENT)
    assert summary.sentences[0].special == (True, False, False, False, False, False)


def test_undefined_rho_and_probability_stay_undefined() -> None:
    measurement = synthetic_measurement(0, 1, sentences=2, layers=2, tokens=6)
    measurement.correlation["N"][:] = float("nan")
    measurement.probability[1] = float("nan")
    summary, _ = records(measurement, synthetic_probe(measurement.names), Settings(METHODS), MOMENT)
    place = summary.methods.index("N")
    found = store.summary_from_bytes(store.to_bytes(summary))
    assert isinstance(found, store.Summary)
    for name in ("rho", "mean", "low", "high"):
        assert np.isnan(getattr(found, name)[place]).all()
    assert found.n[place].tolist() == [0, 0]
    assert np.isnan(found.probability).tolist() == [False, True]


def test_an_attribution_that_is_no_magnitude_is_refused() -> None:
    measurement = synthetic_measurement(0, 1, sentences=2, layers=2, tokens=6)
    measurement.rows[1]["N-Enc"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="cannot be shown as a share"):
        records(measurement, synthetic_probe(measurement.names), Settings(METHODS), MOMENT)


@pytest.mark.slow
def test_a_validation_takes_less_than_a_megabyte_with_its_pictures(tmp_path: Any) -> None:
    """The two hundredth: filmstrips and curves are at their largest."""
    written = large_run(tmp_path, validations=200, sentences=16, layers=12, tokens=24)
    assert len(written["detail"]) == 200
    assert max(written["summary"]) + max(written["detail"]) + written["pictures"][0] < MEGABYTE
    (file,) = tmp_path.rglob("*tfevents*")
    # What the file takes is what was counted, and a little around it.
    total = sum(sum(sizes) for sizes in written.values())
    assert total < file.stat().st_size < 1.02 * total + 100_000


@pytest.mark.parametrize("size", [64, 65, 400])
def test_a_large_probe_is_shown_whole_where_it_fits(size: int) -> None:
    measurement = synthetic_measurement(0, 1, sentences=size, layers=2, tokens=6, methods=("N-Enc",))
    summary, detail = records(measurement, synthetic_probe(measurement.names), Settings(("N-Enc",)), MOMENT)
    assert len(summary.sentences) == len(summary.decided) == len(summary.predicted) == len(detail.lengths) == size
    assert stored(detail.rows) == {("N-Enc", sentence) for sentence in range(size)}
    assert (summary.words["shown"], examples_of(summary)) == ("", size)


def test_of_a_probe_that_is_too_large_the_first_sentences_are_shown_and_means_are_of_all() -> None:
    measurement = synthetic_measurement(0, 1, sentences=1000, layers=12, tokens=48, methods=("W", "N-Enc"))
    probe = synthetic_probe(measurement.names)
    summary, detail = records(measurement, probe, Settings(("W", "N-Enc")), MOMENT, CLASS_NAMES)
    shown = len(summary.sentences)
    assert 700 < shown < 1000
    assert shown == len(summary.decided) == len(summary.predicted) == len(detail.lengths) == summary.rho.shape[1]
    # A sentence that is shown is whole.
    assert stored(detail.rows) == {(method, sentence) for method in ("W", "N-Enc") for sentence in range(shown)}
    assert [one.tokens for one in summary.sentences] == list(measurement.names[:shown])
    assert summary.words["shown"] == f"the first {shown} of 1,000 examples"
    assert examples_of(summary) == 1000
    whole = measurement.correlation["N-Enc"].nanmean(0).numpy()
    assert np.allclose(summary.mean[1], whole, atol=1e-6)
    assert not np.allclose(summary.rho[1].mean(0), whole, atol=1e-6)
    assert (summary.n == 1000).all()
    assert store.summary_from_bytes(store.to_bytes(summary)).words == summary.words


@pytest.mark.parametrize(
    ("sentences", "layers", "tokens"), [(16, 12, 200), (16, 12, 700), (64, 24, 128), (200, 24, 40)]
)
def test_every_sentence_has_the_first_rungs_of_the_ladder(sentences: int, layers: int, tokens: int) -> None:
    """The methods of a sentence are the first of the ladder, none left out between."""
    summary, detail = made(sentences=sentences, layers=layers, tokens=tokens)
    assert sum(codes.nbytes for of in detail.rows.values() for codes in of.values()) <= ROWS_ROOM
    assert len(summary.sentences) >= min(sentences, 64)
    for sentence in range(len(summary.sentences)):
        there = [method for method in LADDER if sentence in detail.rows.get(method, {})]
        assert there == list(LADDER[: len(there)])
        assert there, f"sentence {sentence} has no rows"
        assert all(detail.rows[method][sentence].shape[0] == layers for method in there)
    # The others are as complete as each other but for the last method that fits.
    counts = [len(detail.rows.get(method, {})) for method in LADDER]
    assert counts == sorted(counts, reverse=True)
    assert sum(0 < count < len(summary.sentences) for count in counts) <= 1


def test_records_of_a_probe_of_any_size_take_a_limited_room() -> None:
    made_of = made(sentences=300, layers=12, tokens=40)
    assert 64 < len(made_of[0].sentences) < 300
    assert sum(len(store.to_bytes(one)) for one in made_of) < ROWS_ROOM + MAPS_ROOM + 200_000
    assert rows_that_fit([40] * 10**6, 12, LADDER) == rows_that_fit([40] * 300, 12, LADDER)
    assert rows_that_fit([2] * 10**6, 1, LADDER[:1]).sentences == 1000
    assert set(kept_maps([6] * 1000, Settings(("N-Enc",)), drawn=2)) == set(range(256))
    # Whoever asks for pictures of more examples gets them.
    assert set(kept_maps([6] * 1000, Settings(("N-Enc",)), drawn=270)) == set(range(270))


def test_maps_are_of_sentences_that_are_shown() -> None:
    summary, detail = made(sentences=280, layers=12, tokens=24)
    shown = len(summary.sentences)
    assert set(detail.maps["N-Enc"]) == set(range(min(shown, 256)))
    assert all(max(of) < 64 for method, of in detail.maps.items() if method != "N-Enc")
    assert list(detail.maps) == list(LADDER[: len(detail.maps)])


def test_the_ladder_s_order_knows_every_method() -> None:
    assert set(LADDER) == set(METHODS)
    assert LADDER[:4] == ("N-Enc", "N-ResLN", "N-Res", "N")
    assert by_importance(("W", "N", "N-Res"), "W") == ["W", "N-Res", "N"]
