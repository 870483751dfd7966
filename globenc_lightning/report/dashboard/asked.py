"""What a validation's records hold where it was asked for: further references, masked copies, signed scores.

Records without them are as they were, and readers of earlier versions of the package pass over what they do not know.

This module is read by TensorBoard's process: the standard library and numpy alone.

Axes: ``m`` method, ``b`` sentence, ``l`` layer, ``k`` token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.report.dashboard import encoding
from globenc_lightning.report.dashboard.encoding import RecordError

MEASURES = ("gain", "sufficiency_gain", "log_odds")
"""What masked copies tell, see :class:`globenc_lightning.faithfulness.Faithfulness`."""
STATISTICS = ("mean", "low", "high", "n")

_Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Correlation:
    """The methods' correlation with one reference; as those of ``Summary``, which are with the saliency.

    Attributes:
        rho: (m, b, l) Spearman's rho, NaN where undefined.
        mean: (m, l) over all examples that have one; NaN where there is none.
        low: (m, l) lower end of the mean's 95 % interval; NaN where there is none.
        high: (m, l) upper end.
        n: (m, l) the number of examples with a defined rho.
    """

    rho: _Floats
    mean: _Floats
    low: _Floats
    high: _Floats
    n: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Measure:
    """One figure of the masked copies.

    Attributes:
        each: (m, b) per sentence; NaN where it is left out.
        mean: (m,) over all examples that have one; NaN where there is none.
        low: (m,) lower end of the mean's 95 % interval; NaN where there is none.
        high: (m,) upper end.
        n: (m,) the number of examples that have one.
    """

    each: _Floats
    mean: _Floats
    low: _Floats
    high: _Floats
    n: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Masking:
    """What the sentences' masked copies tell.

    Attributes:
        methods: (m) those whose first tokens were masked.
        measures: any of ``MEASURES``.
        examples: of how many examples copies were made; of these, some are left out of a mean.
        unit: ``"probability"`` or ``"value"``: what the copies are compared by.
        share: which share of the tokens was masked.
        score: what the copies are compared by, in words.
        masking: how tokens were masked, in words.
    """

    methods: tuple[str, ...]
    measures: Mapping[str, Measure]
    examples: int
    unit: str = "probability"
    share: float = 0.2
    score: str = ""
    masking: str = ""


@dataclass(frozen=True, eq=False)
class Parts:
    """What there is of single tokens, by sentence.

    Attributes:
        sentences: those that have parts: all that was asked for, or nothing.
        references: reference -> sentence -> (k,) what the rows are compared with, in steps of the largest.
        masked: method -> sentence -> (k,) whether a token was masked.
        signed: sentence -> (k,) contributions to the score.
        left_out: sentence -> the score less their sum.
    """

    sentences: tuple[int, ...] = ()
    references: Mapping[str, Mapping[int, NDArray[np.uint16]]] = field(default_factory=dict)
    masked: Mapping[str, Mapping[int, NDArray[np.bool_]]] = field(default_factory=dict)
    signed: Mapping[int, _Floats] = field(default_factory=dict)
    left_out: Mapping[int, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """How much memory they take."""
        of_each = [*self.references.values(), *self.masked.values(), self.signed]
        return sum(one.nbytes for of in of_each for one in of.values())


def size_of(length: int, layers: int, methods: int, *, references: int, masked: int, signed: bool) -> int:
    """Returns how many bytes the parts of one sentence take, its share of the summary included.

    Args:
        length: how many tokens it has.
        layers: of the encoder.
        methods: how many are correlated.
        references: how many there are besides the saliency.
        masked: of how many methods the first tokens were masked.
        signed: whether it has signed scores.
    """
    correlated = references * (2 * length + 4 * layers * methods)
    return correlated + masked * (4 * len(MEASURES) + -(-length // 8)) + signed * (4 * length + 4)


def cut(
    references: Mapping[str, Correlation], masking: Masking | None, count: int
) -> tuple[Mapping[str, Correlation], Masking | None]:
    """Returns the same of so many of the first sentences; means stay those of the whole probe."""
    fewer = {name: replace(one, rho=one.rho[:, :count]) for name, one in references.items()}
    if masking is None:
        return fewer, None
    measures = {name: replace(one, each=one.each[:, :count]) for name, one in masking.measures.items()}
    return fewer, replace(masking, measures=measures)


def write_summary(
    header: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    references: Mapping[str, Correlation],
    masking: Masking | None,
) -> None:
    """Add what was asked for to a summary's header and arrays."""
    if references:
        header["references"] = [*references]
    for name, of in references.items():
        arrays |= {f"{name} {one}": getattr(of, one).astype("<f4") for one in ("rho", *STATISTICS[:3])}
        arrays[f"{name} n"] = of.n.astype("<i4")
    if masking is not None:
        header["masking"] = {
            **{name: getattr(masking, name) for name in ("methods", "examples", "unit", "share", "score", "masking")},
            "measures": [*masking.measures],
        }
        for name, figure in masking.measures.items():
            arrays |= {f"{name} {one}": getattr(figure, one).astype("<f4") for one in ("each", *STATISTICS[:3])}
            arrays[f"{name} n"] = figure.n.astype("<i4")


def write_parts(header: dict[str, Any], arrays: dict[str, NDArray[Any]], parts: Parts) -> None:
    """Add what was asked for to a detail's header and arrays."""
    if not parts.sentences:
        return
    header["parts"] = {
        "sentences": parts.sentences,
        "references": [[name, [*of]] for name, of in parts.references.items()],
        "masked": [[method, [*of]] for method, of in parts.masked.items()],
        "signed": [*parts.signed],
    }
    arrays |= {f"reference {name}": encoding.joined(of.values(), "<u2") for name, of in parts.references.items()}
    for method, of in parts.masked.items():
        # One bit per token.
        arrays[f"masked {method}"] = np.packbits(encoding.joined(of.values(), "|u1"))
    if parts.signed:
        arrays["signed"] = encoding.joined(parts.signed.values(), "<f4")
        arrays["left out"] = np.array([parts.left_out[one] for one in parts.signed], "<f4")


def read_references(
    header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], sizes: tuple[int, int, int]
) -> dict[str, Correlation]:
    """Returns the correlation with each further reference; none of records without them.

    Args:
        header: the summary's.
        arrays: the summary's.
        sizes: (m, b, l) of rho.
    """
    methods, _, layers = sizes
    return {
        encoding.text(name): Correlation(
            rho=encoding.array(arrays, f"{name} rho", "<f4", sizes), **_statistics(arrays, name, (methods, layers))
        )
        for name in header.get("references", ())
    }


def read_masking(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], sentences: int) -> Masking | None:
    """Returns what the masked copies tell; None of records without them."""
    found = header.get("masking")
    if found is None:
        return None
    methods = tuple(encoding.text(one) for one in found["methods"])
    share = found["share"]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise RecordError("its header is damaged")
    size, names = len(methods), [encoding.text(one) for one in found["measures"]]
    if len(set(methods)) < size or not set(names) <= set(MEASURES):
        raise RecordError("its parts do not belong together")
    return Masking(
        methods=methods,
        measures={
            name: Measure(
                each=encoding.array(arrays, f"{name} each", "<f4", (size, sentences)),
                **_statistics(arrays, name, (size,)),
            )
            for name in names
        },
        examples=encoding.whole(found["examples"]),
        unit=encoding.text(found["unit"]),
        share=float(share),
        score=encoding.text(found["score"]),
        masking=encoding.text(found["masking"]),
    )


def read_parts(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], lengths: Sequence[int]) -> Parts:
    """Returns what there is of single tokens; nothing of records without it.

    Args:
        header: the detail's.
        arrays: the detail's.
        lengths: (b) how many tokens each sentence has.
    """
    found = header.get("parts")
    if found is None:
        return Parts()

    def shapes(of: Sequence[Any]) -> dict[int, tuple[int, ...]]:
        return {encoding.place(one, lengths): (lengths[one],) for one in of}

    references = {
        encoding.text(name): encoding.divided(encoding.array(arrays, f"reference {name}", "<u2"), shapes(of))
        for name, of in found["references"]
    }
    masked = {}
    for method, of in found["masked"]:
        bits, total = encoding.array(arrays, f"masked {method}", "|u1"), sum(lengths[one] for one in shapes(of))
        if bits.ndim != 1 or bits.size != -(-total // 8):
            raise RecordError("its masked tokens do not fit its sentences")
        masked[encoding.text(method)] = encoding.divided(np.unpackbits(bits, count=total).astype(bool), shapes(of))
    signed: dict[int, Any] = {}
    left_out: dict[int, float] = {}
    if found["signed"]:
        signed = encoding.divided(encoding.array(arrays, "signed", "<f4"), shapes(found["signed"]))
        rest = encoding.array(arrays, "left out", "<f4", (len(signed),))
        if not all(np.isfinite(one).all() for one in (*signed.values(), rest)):
            raise RecordError("a signed score is infinite or NaN")
        left_out = dict(zip(signed, rest.tolist(), strict=True))
    sentences = tuple(encoding.place(one, lengths) for one in found["sentences"])
    return Parts(sentences, references, masked, signed, left_out)


def _statistics(arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """The mean, the ends of its interval and the number of values of a figure."""
    found = {one: encoding.array(arrays, f"{name} {one}", "<f4", shape) for one in STATISTICS[:3]}
    return {**found, "n": encoding.array(arrays, f"{name} n", "<i4", shape)}
