"""How one validation is kept in an event file: two records of numbers and JSON, compressed; nothing is unpickled.

Each record is one string tensor, see ``encoding``. ``Summary`` is small and enough for everything but the tokens'
colours; ``Detail`` holds those. What was asked for besides the methods and the saliency is in ``asked``. A reader
trusts nothing: what does not add up is a ``RecordError``.

This module is read by TensorBoard's process: the standard library and numpy alone.

Axes: ``m`` method, ``b`` sentence, ``l`` layer, ``q`` token that receives, ``k`` token that is attended to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from globenc_lightning.report.dashboard import asked, encoding
from globenc_lightning.report.dashboard.encoding import RecordError

__all__ = [
    *("MAP_LEVELS", "PLUGIN", "ROW_LEVELS", "Decided", "Detail", "Missing", "Moment", "RecordError", "Sentence"),
    *("Summary", "detail_from_bytes", "parsed_tag", "shares", "summary_from_bytes", "tag", "to_bytes"),
]

PLUGIN = "globenc"
ROW_LEVELS = 65535
MAP_LEVELS = 255

_TAG = re.compile(r"(?P<callback>.+)/dashboard/(?P<kind>summary|detail)/(?P<ordinal>[0-9]{6,9})", re.DOTALL)

_Floats = NDArray[np.float32]
_Codes = NDArray[np.uint16]
_Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Moment:
    """When a validation was.

    Attributes:
        ordinal: its place among the analysed validations of this training, from 0.
        step: the step of its figures; several validations may share one.
        epoch: the training's epoch.
        session: when this training, or its resumption, was started, in seconds. Where a training was resumed from an
            older checkpoint, it tells the validations that count from those that were then done again.
    """

    ordinal: int
    step: int
    epoch: int
    session: float


@dataclass(frozen=True)
class Sentence:
    """One example of the probe.

    Attributes:
        tokens: (k) what to write at each position.
        special: (k) true for special tokens.
        label: the class that the data gives, or None.
    """

    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    label: int | None


@dataclass(frozen=True)
class Decided:
    """What one sentence was decided to be, in words; see ``report.verdicts.Verdict``.

    Attributes:
        name: what the answer is: ``"predicted"``, ``"value"``, ``"answer"``, ...
        answer: the answer.
        truth_name: what the truth is; empty where the data say nothing.
        truth: what the data say.
        right: whether both agree; None where there is no verdict.
        chance: the probability of the answer, or None.
        chance_name: what it was computed by.
        where: which token was decided, or empty.
        marked: the tokens, counted from 0, that are marked.
        others: the name and the text of each other text of this example.
    """

    name: str
    answer: str
    truth_name: str = ""
    truth: str = ""
    right: bool | None = None
    chance: float | None = None
    chance_name: str = ""
    where: str = ""
    marked: tuple[int, ...] = ()
    others: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Missing:
    """A validation whose analysis failed, or a training that has no figures.

    Attributes:
        moment: when it was.
        reason: why there are none; None where an earlier version of the package wrote it.
    """

    moment: Moment
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Summary:
    """What one validation found, without the attributions.

    Attributes:
        moment: when it was.
        methods: (m) their names.
        drawn_method: the one that is shown first.
        settings: the run's choices by name: texts, whole numbers and truth values.
        class_names: the model's names of its classes, or None.
        sentences: (b) the probe; the first examples of a large one. Means and their intervals are of all of them.
        predicted: (b) index of the predicted class.
        probability: (b) its probability, NaN where there is a single logit.
        rho: (m, b, l) Spearman's rho, NaN where undefined.
        mean: (m, l) over the sentences that have one; NaN where there is none.
        low: (m, l) lower end of the mean's 95 % interval; NaN where there is none.
        high: (m, l) upper end.
        n: (m, l) the number of sentences with a defined rho.
        decided: (b) what each sentence was decided to be; empty where an earlier version of the package wrote it.
        words: what is explained, by name: ``task``, ``score``, ``readout``, ``text``, ``marked`` and ``shown``, which
            examples of a large probe the sentences are; empty as above.
        references: the correlation with what the rows are compared with besides the saliency.
        masking: what the sentences' masked copies tell; None where none were made.
    """

    moment: Moment
    methods: tuple[str, ...]
    drawn_method: str
    settings: Mapping[str, str | int | bool | None]
    class_names: tuple[str, ...] | None
    sentences: tuple[Sentence, ...]
    predicted: tuple[int, ...]
    probability: _Floats
    rho: _Floats
    mean: _Floats
    low: _Floats
    high: _Floats
    n: NDArray[np.int32]
    decided: tuple[Decided, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, asked.Correlation] = field(default_factory=dict)
    masking: asked.Masking | None = None

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self.rho.shape[2])


@dataclass(frozen=True, eq=False)
class Detail:
    """One validation's attributions, as shares of the largest value in each row.

    Attributes:
        moment: when it was.
        lengths: (b) how many tokens each sentence has.
        saliency: (k) per sentence, in steps of 1 / ``ROW_LEVELS``.
        rows: method -> sentence -> (l, k) the readout row of every layer, in steps of 1 / ``ROW_LEVELS``.
        maps: method -> sentence -> (q, k) the last layer's rollout, in steps of 1 / ``MAP_LEVELS``.
        budget: how many bytes the attributions were allowed to take, before compression. What did not fit is absent.
        parts: what was asked for besides, of the sentences that there is room for.
    """

    moment: Moment
    lengths: tuple[int, ...]
    saliency: tuple[_Codes, ...]
    rows: Mapping[str, Mapping[int, _Codes]]
    maps: Mapping[str, Mapping[int, _Bytes]] = field(default_factory=dict)
    budget: int = 0
    parts: asked.Parts = field(default_factory=asked.Parts)


def tag(callback: str, kind: str, ordinal: int) -> str:
    """Where a record is written: each has a tag of its own, since TensorBoard keeps a sample of a tag's points."""
    return f"{callback}/dashboard/{kind}/{ordinal:06d}"


def parsed_tag(name: str) -> tuple[str, str, int] | None:
    """The callback's tag, the kind of record and the ordinal; None for what is no tag of ours."""
    found = _TAG.fullmatch(name)
    return None if found is None else (found["callback"], found["kind"], int(found["ordinal"]))


def shares(values: ArrayLike, levels: int) -> NDArray[Any]:
    """Magnitudes as shares of the largest of their row, in steps.

    Args:
        values: (..., k), finite and not negative.
        levels: 65535 or 255: the code of the largest.

    Returns:
        (..., k) codes from 0 to ``levels``; a row of zeros stays one.

    Raises:
        ValueError: a value that is negative, infinite or NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("an attribution is negative, infinite or NaN, so it cannot be shown as a share.")
    peak = array.max(axis=-1, keepdims=True, initial=0.0)
    shared = np.divide(array, peak, out=np.zeros_like(array), where=peak > 0)
    return np.rint(shared * levels).astype(np.uint16 if levels > 255 else np.uint8)


def to_bytes(record: Summary | Detail | Missing) -> bytes:
    """The record as it is written.

    Args:
        record: what one validation found.

    Returns:
        The bytes of its tensor.
    """
    header: dict[str, Any] = {"moment": [*vars(record.moment).values()]}
    arrays: dict[str, NDArray[Any]] = {}
    if isinstance(record, Summary):
        header |= {
            "kind": "summary",
            "methods": record.methods,
            "drawn_method": record.drawn_method,
            "settings": dict(record.settings),
            "class_names": record.class_names,
            "sentences": [[one.tokens, [int(mark) for mark in one.special], one.label] for one in record.sentences],
            "predicted": record.predicted,
        }
        if record.decided:
            header["decided"] = [[*vars(one).values()] for one in record.decided]
            header["words"] = dict(record.words)
        arrays |= {name: getattr(record, name).astype("<f4") for name in ("probability", "rho", "mean", "low", "high")}
        arrays["n"] = record.n.astype("<i4")
        asked.write_summary(header, arrays, record.references, record.masking)
    elif isinstance(record, Detail):
        header |= {
            "kind": "detail",
            "lengths": record.lengths,
            "rows": [[method, list(of)] for method, of in record.rows.items()],
            "maps": [[method, list(of)] for method, of in record.maps.items()],
            "budget": record.budget,
        }
        arrays["saliency"] = encoding.joined(record.saliency, "<u2")
        arrays |= {f"rows {name}": encoding.joined(of.values(), "<u2") for name, of in record.rows.items()}
        arrays |= {f"maps {name}": encoding.joined(of.values(), "|u1") for name, of in record.maps.items()}
        asked.write_parts(header, arrays, record.parts)
    else:
        header["kind"] = "missing"
        if record.reason is not None:
            header["reason"] = record.reason
    return encoding.encode(header, arrays)


def summary_from_bytes(data: bytes) -> Summary | Missing:
    """Read what :func:`to_bytes` wrote.

    Args:
        data: the record.

    Returns:
        The summary, or the note that there is none.

    Raises:
        RecordError: it is damaged, or another version's.
    """
    header, arrays = encoding.decode(data)
    return encoding.checked(lambda: _summary(header, arrays))


def detail_from_bytes(data: bytes) -> Detail:
    """Read what :func:`to_bytes` wrote.

    Args:
        data: the record.

    Returns:
        The attributions.

    Raises:
        RecordError: it is damaged, or another version's.
    """
    header, arrays = encoding.decode(data)
    return encoding.checked(lambda: _detail(header, arrays))


def _summary(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Summary | Missing:
    moment = _moment(header)
    if header["kind"] == "missing":
        reason = header.get("reason")
        return Missing(moment, None if reason is None else encoding.text(reason))
    if header["kind"] != "summary":
        raise RecordError("it is another kind of record than its tag says")
    methods = tuple(encoding.text(one) for one in header["methods"])
    sentences = tuple(_sentence(*one) for one in header["sentences"])
    sizes = len(methods), len(sentences), arrays["rho"].shape[-1]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "probability": ("<f4", sizes[1:2]),
        "rho": ("<f4", sizes),
        **dict.fromkeys(("mean", "low", "high"), ("<f4", (sizes[0], sizes[2]))),
        "n": ("<i4", (sizes[0], sizes[2])),
    }
    found = {name: encoding.array(arrays, name, *wanted) for name, wanted in expected.items()}
    predicted = tuple(encoding.whole(one) for one in header["predicted"])
    drawn = encoding.text(header["drawn_method"])
    if len(predicted) != len(sentences) or drawn not in methods or len(set(methods)) < len(methods) or not sizes[2]:
        raise RecordError("its parts do not belong together")
    names = header["class_names"]
    decided = tuple(_decided(*one) for one in header.get("decided", ()))
    lengths = [len(one.tokens) for one in sentences]
    if decided and (
        len(decided) != len(sentences)
        or any(place >= length for one, length in zip(decided, lengths, strict=True) for place in one.marked)
    ):
        raise RecordError("its parts do not belong together")
    return Summary(
        moment=moment,
        methods=methods,
        drawn_method=drawn,
        settings={encoding.text(name): encoding.plain(value) for name, value in header["settings"].items()},
        class_names=None if names is None else tuple(encoding.text(one) for one in names),
        sentences=sentences,
        predicted=predicted,
        decided=decided,
        words={encoding.text(name): encoding.text(value) for name, value in header.get("words", {}).items()},
        references=asked.read_references(header, arrays, sizes),
        masking=asked.read_masking(header, arrays, sizes[1]),
        **found,
    )


def _detail(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Detail:
    if header["kind"] != "detail":
        raise RecordError("it is another kind of record than its tag says")
    lengths = tuple(encoding.whole(one) for one in header["lengths"])
    rows: dict[str, dict[int, _Codes]] = {}
    layers: set[int] = set()
    for method, of in header["rows"]:
        codes = encoding.array(arrays, f"rows {method}", "<u2")
        total = sum(lengths[encoding.place(one, lengths)] for one in of)
        count, rest = divmod(codes.size, total) if total else (0, codes.size)
        if rest:
            raise RecordError("its rows do not fit its sentences")
        layers.add(count)
        rows[encoding.text(method)] = encoding.divided(codes, {one: (count, lengths[one]) for one in of})
    if len(layers - {0}) > 1:
        raise RecordError("its methods differ in their number of layers")
    maps = {
        encoding.text(method): encoding.divided(
            encoding.array(arrays, f"maps {method}", "|u1"),
            {encoding.place(one, lengths): (lengths[one], lengths[one]) for one in of},
        )
        for method, of in header["maps"]
    }
    saliency = encoding.divided(
        encoding.array(arrays, "saliency", "<u2"), {place: (length,) for place, length in enumerate(lengths)}
    ).values()
    parts = asked.read_parts(header, arrays, lengths)
    return Detail(_moment(header), lengths, tuple(saliency), rows, maps, encoding.whole(header["budget"]), parts)


def _moment(header: Mapping[str, Any]) -> Moment:
    ordinal, step, epoch, session = header["moment"]
    if isinstance(session, bool) or not isinstance(session, int | float) or not math.isfinite(session):
        raise RecordError("its header is damaged")
    return Moment(encoding.whole(ordinal), encoding.whole(step), encoding.whole(epoch), float(session))


def _sentence(tokens: Sequence[Any], special: Sequence[Any], label: Any) -> Sentence:
    if len(tokens) != len(special):
        raise RecordError("its tokens and their marks differ in number")
    return Sentence(
        tuple(encoding.text(one) for one in tokens),
        tuple(bool(one) for one in special),
        None if label is None else encoding.whole(label, least=-(2**53)),
    )


def _decided(
    name: Any,
    answer: Any,
    truth_name: Any,
    truth: Any,
    right: Any,
    chance: Any,
    chance_name: Any,
    where: Any,
    marked: Sequence[Any],
    others: Sequence[Any],
) -> Decided:
    if right is not None and not isinstance(right, bool):
        raise RecordError("its header is damaged")
    if chance is not None and (
        isinstance(chance, bool) or not isinstance(chance, int | float) or not math.isfinite(chance)
    ):
        raise RecordError("its header is damaged")
    return Decided(
        encoding.text(name),
        encoding.text(answer),
        encoding.text(truth_name),
        encoding.text(truth),
        right,
        None if chance is None else float(chance),
        encoding.text(chance_name),
        encoding.text(where),
        tuple(encoding.whole(place) for place in marked),
        tuple((encoding.text(title), encoding.text(text)) for title, text in others),
    )
