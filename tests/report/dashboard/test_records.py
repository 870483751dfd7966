from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.dashboard import CLASS_NAMES, large_run, synthetic_measurement, synthetic_probe
from globenc_lightning import METHODS
from globenc_lightning.analysis import Settings
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.records import MAPS_ROOM, ROWS_ROOM, kept_maps, records

MOMENT = store.Moment(ordinal=0, step=0, epoch=0, session=1.0)
MEGABYTE = 1_000_000


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
    # All sentences of the method that is drawn come before any of another.
    assert set(detail.rows["N-Enc"]) == set(range(40))
    assert stored(detail.maps) == {("N-Enc", sentence) for sentence in detail.maps["N-Enc"]}
    assert len(store.to_bytes(summary)) + len(store.to_bytes(detail)) < MEGABYTE


def test_a_sentence_longer_than_the_room_does_not_keep_others_out() -> None:
    kept = kept_maps([600, 20, 512, 30], Settings(METHODS), drawn=1)
    # The first is drawn, so it is measured whether or not there is room; the third fits to the byte, and takes it all.
    assert kept == {0: ("N-Enc",), 1: METHODS[-1:] + METHODS[:-1], 3: METHODS[-1:] + METHODS[:-1]}
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
def test_of_a_large_probe_the_first_sentences_are_shown_and_means_are_of_all(size: int) -> None:
    measurement = synthetic_measurement(0, 1, sentences=size, layers=2, tokens=6, methods=("N-Enc",))
    probe = synthetic_probe(measurement.names)
    summary, detail = records(measurement, probe, Settings(("N-Enc",)), MOMENT, CLASS_NAMES)
    assert len(summary.sentences) == len(summary.decided) == len(summary.predicted) == len(detail.lengths) == 64
    assert summary.words["shown"] == ("" if size == 64 else f"the first 64 of {size} examples")
    assert [one.tokens for one in summary.sentences] == list(measurement.names[:64])
    whole = measurement.correlation["N-Enc"].nanmean(0).numpy()
    assert np.allclose(summary.mean[0], whole, atol=1e-6)
    assert not np.allclose(summary.rho[0].mean(0), whole, atol=1e-6) or size == 64
    assert summary.n.tolist() == [[size, size]]
    assert store.summary_from_bytes(store.to_bytes(summary)).words == summary.words


def test_records_of_a_probe_of_any_size_take_the_same_room() -> None:
    sizes = []
    for size in (64, 1000):
        measurement = synthetic_measurement(0, 1, sentences=size, layers=2, tokens=6, methods=("N-Enc",))
        probe = synthetic_probe(measurement.names)
        made_of = records(measurement, probe, Settings(("N-Enc",)), MOMENT, CLASS_NAMES)
        sizes.append(sum(len(store.to_bytes(one)) for one in made_of))
    assert abs(sizes[1] - sizes[0]) < 0.02 * sizes[0]
    assert set(kept_maps([6] * 1000, Settings(("N-Enc",)), drawn=2)) == set(range(64))
    # Whoever asks for pictures of more examples gets them.
    assert set(kept_maps([6] * 1000, Settings(("N-Enc",)), drawn=70)) == set(range(70))
