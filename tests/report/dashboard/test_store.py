import json
import struct
import zlib
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from globenc_lightning.report.dashboard import encoding, store

METHODS = ("W", "N-Enc")
TOKENS = (("[CLS]", "<script>alert(1)</script>", "\x00\x07\u202e", "\U0001f600", "日本", "##ing"), ("\ud800", '"'))
MOMENT = store.Moment(ordinal=7, step=125, epoch=3, session=1.5)


def summary(**changes: Any) -> store.Summary:
    draw = np.random.default_rng(0)
    rho = draw.uniform(-1, 1, (2, 2, 3)).astype(np.float32)
    rho[1, 0, 2] = np.nan
    mean, low, high = (draw.uniform(-1, 1, (2, 3)).astype(np.float32) for _ in range(3))
    sentences = tuple(
        store.Sentence(tokens, tuple(place == 0 for place in range(len(tokens))), label)
        for tokens, label in zip(TOKENS, (1, None), strict=True)
    )
    parts: dict[str, Any] = {
        "moment": MOMENT,
        "methods": METHODS,
        "drawn_method": "N-Enc",
        "settings": {"readout": "cls", "normalize": False, "probe": None},
        "class_names": ("bad", "good"),
        "sentences": sentences,
        "predicted": (1, 0),
        "probability": np.array([0.75, np.nan], np.float32),
        "rho": rho,
        "mean": mean,
        "low": low,
        "high": high,
        "n": np.array([[2, 2, 2], [2, 2, 1]], np.int32),
    }
    return store.Summary(**{**parts, **changes})


def detail(**changes: Any) -> store.Detail:
    draw = np.random.default_rng(1)
    lengths = (6, 2)
    parts: dict[str, Any] = {
        "moment": MOMENT,
        "lengths": lengths,
        "saliency": tuple(store.shares(draw.random(length), store.ROW_LEVELS) for length in lengths),
        "rows": {
            method: {i: store.shares(draw.random((3, length)), store.ROW_LEVELS) for i, length in enumerate(lengths)}
            for method in METHODS
        },
        "maps": {"N-Enc": {1: store.shares(draw.random((2, 2)), store.MAP_LEVELS)}},
        "budget": 1000,
    }
    return store.Detail(**{**parts, **changes})


def packed(header: Any, body: bytes = b"", version: int = encoding.VERSION) -> bytes:
    """A record with a header of any kind."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<8sI", b"GlobEnc\n", version) + zlib.compress(struct.pack("<I", len(text)) + text + body)


def header_of(record: store.Summary | store.Detail | store.Missing) -> tuple[dict[str, Any], bytes]:
    raw = zlib.decompress(store.to_bytes(record)[12:])
    start = 4 + struct.unpack_from("<I", raw)[0]
    return json.loads(raw[4:start]), raw[start:]


def test_a_summary_comes_back_as_it_was() -> None:
    written = summary()
    found = store.summary_from_bytes(store.to_bytes(written))
    assert isinstance(found, store.Summary)
    for name, value in vars(written).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value
    assert found.layers == 3


def test_a_detail_comes_back_as_it_was() -> None:
    written = detail()
    found = store.detail_from_bytes(store.to_bytes(written))
    assert (found.moment, found.lengths, found.budget) == (MOMENT, (6, 2), 1000)
    for one, other in zip(found.saliency, written.saliency, strict=True):
        np.testing.assert_array_equal(one, other)
    for name in ("rows", "maps"):
        parts, expected = getattr(found, name), getattr(written, name)
        assert {method: set(of) for method, of in parts.items()} == {method: set(of) for method, of in expected.items()}
        for method, of in expected.items():
            for sentence, codes in of.items():
                np.testing.assert_array_equal(parts[method][sentence], codes)
                assert parts[method][sentence].dtype == codes.dtype


def test_a_missing_validation_comes_back_as_it_was() -> None:
    found = store.summary_from_bytes(store.to_bytes(store.Missing(MOMENT)))
    assert isinstance(found, store.Missing)
    assert (found.moment, found.reason) == (MOMENT, None)


def test_a_reason_is_text_and_those_who_wrote_none_are_read() -> None:
    reason = "<b>one</b>\ntwo \ud800 \N{GRINNING FACE}"
    found = store.summary_from_bytes(store.to_bytes(store.Missing(MOMENT, reason)))
    assert isinstance(found, store.Missing)
    assert found.reason == reason
    older, _ = encoding.decode(store.to_bytes(store.Missing(MOMENT)))
    assert "reason" not in older
    for damaged in (3, ["a"], {"a": "b"}, True):
        data = encoding.encode({**older, "reason": damaged}, {})
        with pytest.raises(store.RecordError, match="a text is missing"):
            store.summary_from_bytes(data)


def test_sentences_without_tokens_and_nothing_stored() -> None:
    empty = np.zeros(0, np.uint16)
    found = store.detail_from_bytes(store.to_bytes(detail(lengths=(0, 0), saliency=(empty, empty), rows={}, maps={})))
    assert [len(one) for one in found.saliency] == [0, 0]
    assert (found.rows, found.maps) == ({}, {})


def test_shares_are_of_the_largest_in_the_row_and_keep_the_order() -> None:
    values = np.array([[1e-30, 4e-30, 2e-30], [0.0, 0.0, 0.0], [5.0, 1e9, 2.5e8]])
    assert store.shares(values, store.MAP_LEVELS).tolist() == [[64, 255, 128], [0, 0, 0], [0, 255, 64]]
    row = np.random.default_rng(2).random(24)
    codes = store.shares(row, store.ROW_LEVELS)
    assert np.abs(codes / store.ROW_LEVELS - row / row.max()).max() <= 0.5 / store.ROW_LEVELS
    assert np.argsort(codes, kind="stable").tolist() == np.argsort(row, kind="stable").tolist()


DECIDED = (
    store.Decided("predicted", "good", "label", "bad \ud800", False, 0.5, "softmax", "at token 1", (0, 5)),
    store.Decided("value", "0.5", others=(("passage", "<b>a</b>"), ("third", "x"))),
)


def test_what_was_decided_comes_back_as_it_was() -> None:
    words = {"task": "span", "score": "x"}
    found = store.summary_from_bytes(store.to_bytes(summary(decided=DECIDED, words=words)))
    assert isinstance(found, store.Summary)
    assert (found.decided, found.words) == (DECIDED, words)


def test_those_who_wrote_no_words_are_read() -> None:
    header, _ = header_of(summary())
    assert "decided" not in header
    found = store.summary_from_bytes(store.to_bytes(summary()))
    assert isinstance(found, store.Summary)
    assert (found.decided, found.words) == ((), {})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((0, 1), (1, None), (4, 1), (4, "yes"), (5, True), (5, "0.5"), (5, [0.5])),
        *((8, [6]), (8, [-1]), (8, [True]), (8, 3), (9, [["a"]]), (9, [["a", 1]]), (9, 7)),
    ],
)
def test_words_that_lie_are_refused(place: int, value: Any) -> None:
    header, body = header_of(summary(decided=DECIDED))
    header["decided"][0][place] = value
    with pytest.raises(store.RecordError):
        store.summary_from_bytes(packed(header, body))


def test_words_of_another_number_of_sentences_are_refused() -> None:
    header, body = header_of(summary(decided=DECIDED))
    for damaged in (header["decided"][:1], header["decided"] * 2, [[]], 3):
        with pytest.raises(store.RecordError):
            store.summary_from_bytes(packed({**header, "decided": damaged}, body))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-3])
def test_what_is_no_magnitude_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="negative, infinite or NaN"):
        store.shares([0.5, value], store.ROW_LEVELS)


def test_tags_are_told_apart_from_others() -> None:
    assert store.tag("globenc_2", "detail", 12) == "globenc_2/dashboard/detail/000012"
    assert store.parsed_tag("globenc_2/dashboard/detail/000012") == ("globenc_2", "detail", 12)
    assert store.parsed_tag(store.tag("a/b\nc", "summary", 1_234_567)) == ("a/b\nc", "summary", 1234567)
    for other in (
        "globenc/dashboard/detail/12",
        "globenc/heatmap/0",
        "/dashboard/detail/000001",
        "x/dashboard/y/000001",
    ):
        assert store.parsed_tag(other) is None
    assert store.parsed_tag("globenc/dashboard/detail/00000١") is None


def lying(change: str) -> bytes:
    """A record whose header says something else than what follows."""
    header, body = header_of(summary())
    arrays = {name: [kind, shape] for name, kind, shape in header["arrays"]}
    if change == "shape":
        arrays["rho"][1] = [2, 2, 4]
    elif change == "rows for columns":
        arrays["mean"][1] = [3, 2]
    elif change == "huge shape":
        arrays["rho"][1] = [2**52, 2**52, 2**52]
    elif change == "negative shape":
        arrays["rho"][1] = [-2, -2, 3]
    elif change == "object type":
        arrays["rho"][0] = "|O"
    elif change == "integers for floats":
        arrays["rho"][0] = "<i4"
    elif change == "no array":
        del arrays["n"]
    elif change == "one sentence less":
        header["sentences"] = header["sentences"][:1]
    elif change == "one method twice":
        header["methods"] = ["N-Enc", "N-Enc"]
    elif change == "no such drawn method":
        header["drawn_method"] = "N"
    elif change == "tokens that are numbers":
        header["sentences"][0][0][0] = 3
    elif change == "a mark too few":
        header["sentences"][0][1].pop()
    elif change == "a class that is a text":
        header["predicted"][0] = "1"
    elif change == "nested settings":
        header["settings"]["readout"] = {"html": "<b>"}
    elif change == "a step that is NaN":
        header["moment"][1] = float("nan")
    elif change == "a session that is infinite":
        header["moment"][3] = float("inf")
    elif change == "another kind":
        header["kind"] = "detail"
    header["arrays"] = [[name, *rest] for name, rest in arrays.items()]
    return packed(header, body)


LIES = [
    "shape", "rows for columns",
    "huge shape", "negative shape", "object type", "integers for floats", "no array", "one sentence less",
    "one method twice", "no such drawn method", "tokens that are numbers", "a mark too few", "a class that is a text",
    "nested settings", "a step that is NaN", "a session that is infinite", "another kind",
]  # fmt: skip


def test_an_honest_record_made_by_the_same_way_is_read() -> None:
    assert isinstance(store.summary_from_bytes(lying("not at all")), store.Summary)


@pytest.mark.parametrize("change", LIES)
def test_a_header_that_lies_is_refused(change: str) -> None:
    with pytest.raises(store.RecordError):
        store.summary_from_bytes(lying(change))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not begin"),
        (b"GlobEnc", "does not begin"),
        (b"PK\x03\x04" * 9, "does not begin"),
        (packed({}, version=2), "format 2, and this version of the package reads format 1"),
        (store.to_bytes(summary())[:-20], "cut off"),
        (store.to_bytes(summary()) + b"more", "something follows"),
        (store.to_bytes(summary())[:12], "cut off"),
        (store.to_bytes(summary())[:40] + b"\xff" * 40, "compressed part is damaged"),
        (packed(b"{"), "header is damaged"),
        (packed(b"[" * 100_000), "header is damaged"),
        (packed(b"9" * 5000), "header is damaged"),
        (packed([]), "header is damaged"),
        (packed({"arrays": []}), "header is damaged"),
        (packed({"arrays": []}, b"rest"), "larger than its arrays"),
        (struct.pack("<8sI", b"GlobEnc\n", 1) + zlib.compress(b"\xff\xff\xff\xff{}"), "longer than the record"),
        (struct.pack("<8sI", b"GlobEnc\n", 1) + zlib.compress(b""), "header is damaged"),
    ],
)
def test_damaged_records_are_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(store.RecordError, match=words):
        store.summary_from_bytes(data)
    with pytest.raises(store.RecordError, match=words):
        store.detail_from_bytes(data)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    bomb = struct.pack("<8sI", b"GlobEnc\n", 1) + zlib.compress(b"\x00" * (encoding.LARGEST + 1), 9)
    assert len(bomb) < 100_000
    with pytest.raises(store.RecordError, match="more than 16 MB"):
        store.summary_from_bytes(bomb)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lengths", [6, 3]),
        ("lengths", [6]),
        ("lengths", [6, -2]),
        ("rows", [["W", [0, 1]], ["N-Enc", [0, 2]]]),
        ("rows", [["W", [0, 0]], ["N-Enc", [0, 1]]]),
        ("rows", [["W", [0]], ["N-Enc", [0, 1]]]),
        ("rows", [["N", [0, 1]]]),
        ("rows", [[3, [0, 1]]]),
        ("maps", [["N-Enc", [0]]]),
        ("maps", {"N-Enc": 1}),
        ("budget", None),
        ("kind", "summary"),
    ],
)
def test_a_detail_whose_header_lies_is_refused(name: str, value: Any) -> None:
    header, body = header_of(detail())
    assert store.detail_from_bytes(packed(header, body)).lengths == (6, 2)
    with pytest.raises(store.RecordError):
        store.detail_from_bytes(packed({**header, name: value}, body))


def test_methods_of_different_depth_are_refused() -> None:
    rows = dict(detail().rows)
    rows["W"] = {sentence: codes[:2] for sentence, codes in rows["W"].items()}
    with pytest.raises(store.RecordError, match="number of layers"):
        store.detail_from_bytes(store.to_bytes(detail(rows=rows)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_is_anything_but_a_record_error(data: st.DataObject) -> None:
    """Bytes of the header or of the whole record are changed; it is read, or refused as damaged, and nothing else."""
    record = data.draw(st.sampled_from([summary(), summary(decided=DECIDED), detail()]))
    header, body = header_of(record)
    if data.draw(st.booleans()):
        text = bytearray(json.dumps(header).encode())
        for _ in range(data.draw(st.integers(1, 3))):
            text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(32, 126))
        damaged = packed(bytes(text), body)
    else:
        damaged = bytearray(store.to_bytes(record))
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        damaged = bytes(damaged)
    for read in (store.summary_from_bytes, store.detail_from_bytes):
        with suppress(store.RecordError):
            read(damaged)


def test_records_need_no_pickle_and_no_nan_in_json() -> None:
    header, _ = header_of(summary())
    assert "NaN" not in json.dumps(header)
    with pytest.raises(ValueError, match="JSON"):
        store.to_bytes(replace(store.Missing(MOMENT), moment=store.Moment(1, 1, 1, float("nan"))))
