"""What was found over a training: the figures of each analysed validation, and what they are of.

Axes: ``b`` example, ``l`` layer, ``k`` token.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.functional import CorrelationSummary, summarize
from globenc_lightning.packed import Packed
from globenc_lightning.unfinished import Before

SHARED = ("position", "answers", "texts")
"""Attributes of an entry that seldom change from one validation to the next."""


@dataclass(frozen=True, eq=False)
class HistoryEntry:
    """One analysed validation.

    Rows, saliency and rho are kept in few tensors, and expanded when they are asked for: changes of those are lost.

    Attributes:
        step: the step at which its figures are logged, that of the validation's own metrics.
        epoch: the training's epoch.
        correlation: method -> (l,) float64, mean over the probe set of Spearman's rho; NaN where undefined.
        sd: method -> (l,) its standard deviation over the probe set.
        n: method -> (l,) how many examples have a defined rho.
        undefined: method -> (l,) how many have none.
        by_example: method -> (b, l) float64 every example's rho, which is kept in float32.
        rows: method -> one (k,) float32 per example, the readout row of the last layer's rollout. Values are kept as
            16-bit shares of the largest one of their row: to 1 / 131,070 of it. Empty in all processes but the first.
        saliency: one (k,) float32 per example, kept as rows are; empty in all processes but the first.
        predicted: (b,) index of the predicted class.
        score: (b,) the score whose gradient the saliency is; empty in checkpoints of earlier versions.
        position: one per example: the token that the decision is read at, or None where it is read at several.
        answers: one per example: what is decided, see :class:`.Measurement`; empty in checkpoints of earlier versions.
        probability: (b,) of what is predicted, NaN where it has none; empty in checkpoints of earlier versions.
        texts: one number per example that tells its tokens from others: another choice has another text. Empty in
            checkpoints of earlier versions.
        validation: whether a validation asked for it, and not a training step.
        reference_rho: reference -> method -> (b, l) float32 every example's rho with a further reference.
        references: reference -> one (k,) float32 per example; empty in all processes but the first.
        signed: one (k,) float32 per example: signed contributions to the score; empty where there are none.
        left_out: (b,) the score less the sum of these; empty where there are none.
        faithfulness: how much the decisions depend on the tokens that the methods rank first, or None.
    """

    step: int
    epoch: int
    correlation: dict[str, Tensor]
    sd: dict[str, Tensor]
    n: dict[str, Tensor]
    undefined: dict[str, Tensor]
    rho: Tensor
    packed: Packed | None
    predicted: Tensor
    score: Tensor = field(default_factory=lambda: torch.empty(0))
    position: list[int | None] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)
    probability: Tensor = field(default_factory=lambda: torch.empty(0))
    texts: list[int] = field(default_factory=list)
    validation: bool = True
    reference_rho: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    references: dict[str, list[Tensor]] = field(default_factory=dict)
    signed: list[Tensor] = field(default_factory=list)
    left_out: Tensor = field(default_factory=lambda: torch.empty(0))
    faithfulness: Faithfulness | None = None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "HistoryEntry":
        """The entry that :meth:`state_dict` was called on, of this version or an earlier one."""
        methods = state["methods"]
        if "by_example" in state:
            # Earlier versions kept rho in float64, and rows and saliency in float32.
            lengths: list[int] = state["lengths"]
            rho = state["by_example"]
            rows = [one.split(lengths) for one in [*state["rows"], state["saliency"]]]
            packed: Packed | None = Packed.from_rows(rows)
        else:
            rho = state["rho"]
            packed = None if state["packed"] is None else Packed.from_state_dict(state["packed"])
        return cls.from_rho(
            dict(zip(methods, rho.unbind(0), strict=True)),
            packed,
            step=state["step"],
            epoch=state["epoch"],
            predicted=state["predicted"],
            score=state.get("score", torch.empty(0)),
            position=list(state.get("position", ())),
            answers=[tuple(one) for one in state.get("answers", ())],
            probability=state.get("probability", torch.empty(0)),
            texts=list(state.get("texts", ())),
            validation=state.get("validation", True),
            # Earlier versions had none of these, and they are not written where nobody asked for them.
            reference_rho=dict(state.get("reference_rho", {})),
            references={name: _rows_of(rows, packed) for name, rows in state.get("references", {}).items()},
            signed=_rows_of(state.get("signed"), packed),
            left_out=state.get("left_out", torch.empty(0)),
            faithfulness=Faithfulness.from_state_dict(state["faithfulness"]) if "faithfulness" in state else None,
        )

    @classmethod
    def from_parts(
        cls,
        by_example: Mapping[str, Tensor],
        rows: Mapping[str, Sequence[Tensor]],
        saliency: list[Tensor],
        **parts: Any,
    ) -> "HistoryEntry":
        """An entry, with the means over its examples computed anew.

        Args:
            by_example: method -> (b, l) every example's rho.
            rows: method -> one (k,) per example.
            saliency: one (k,) per example.
            **parts: the other attributes.
        """
        return cls.from_rho(by_example, Packed.from_rows([*(rows[method] for method in by_example), saliency]), **parts)

    @classmethod
    def from_rho(cls, by_example: Mapping[str, Tensor], packed: Packed | None, **parts: Any) -> "HistoryEntry":
        """An entry of every example's rho, method -> (b, l), and of rows that are packed."""
        rho = torch.stack([one.float() for one in by_example.values()])
        summary: dict[str, Any] = _summary(dict(zip(by_example, rho.double().unbind(0), strict=True)))
        return cls(rho=rho, packed=packed, **summary, **parts)

    @property
    def by_example(self) -> dict[str, Tensor]:
        """Returns method -> (b, l) every example's rho."""
        return dict(zip(self.correlation, self.rho.double().unbind(0), strict=True))

    @property
    def rows(self) -> dict[str, list[Tensor]]:
        """Returns method -> one (k,) per example, the readout row of the last layer's rollout."""
        packed = self.packed
        return {} if packed is None else {method: packed.rows(place) for place, method in enumerate(self.correlation)}

    @property
    def saliency(self) -> list[Tensor]:
        """Returns one (k,) per example."""
        return [] if self.packed is None else self.packed.rows(len(self.correlation))

    def row(self, method: str, example: int) -> Tensor:
        """Returns (k,), the readout row of one method and example; an empty one where this process keeps none."""
        if self.packed is None:
            return torch.empty(0)
        return self.packed.row(list(self.correlation).index(method), example)

    def length(self, example: int) -> int:
        """Returns how many tokens an example has; 0 where this process keeps no rows."""
        return 0 if self.packed is None else self.packed.lengths[example]

    @property
    def reference_correlation(self) -> dict[str, dict[str, CorrelationSummary]]:
        """Returns reference -> method -> mean, spread and counts over the probe set, one number per layer each."""
        return {
            reference: {method: summarize(rho.double()) for method, rho in by_method.items()}
            for reference, by_method in self.reference_rho.items()
        }

    def without_rows(self) -> "HistoryEntry":
        """Returns what the processes keep that write nothing: every rho, and no rows."""
        faithfulness = None if self.faithfulness is None else replace(self.faithfulness, masked={})
        return replace(self, packed=None, references={}, signed=[], faithfulness=faithfulness)

    def sharing(self, other: "HistoryEntry") -> "HistoryEntry":
        """Returns the same entry with those lists that are equal to another entry's being the same lists."""
        packed = self.packed
        if packed is not None and other.packed is not None and packed.lengths == other.packed.lengths:
            packed = replace(packed, lengths=other.packed.lengths)
        shared = {name: getattr(other, name) for name in SHARED if getattr(self, name) == getattr(other, name)}
        return replace(self, packed=packed, **shared)

    def state_dict(self) -> dict[str, Any]:
        """Everything in a few tensors and primitives: a checkpoint pays for every tensor, however small.

        Lists that entries share are written once.
        """
        references = {name: _in_one(rows, self.packed) for name, rows in self.references.items()}
        return {
            "step": self.step,
            "epoch": self.epoch,
            "methods": list(self.correlation),
            "rho": self.rho,
            "packed": None if self.packed is None else self.packed.state_dict(),
            "predicted": self.predicted,
            "score": self.score,
            "position": self.position,
            "answers": self.answers,
            "probability": self.probability,
            "texts": self.texts,
            "validation": self.validation,
            **({"reference_rho": self.reference_rho} if self.reference_rho else {}),
            **({"references": references} if references else {}),
            **({"signed": _in_one(self.signed, self.packed)} if self.signed else {}),
            **({"left_out": self.left_out} if len(self.left_out) else {}),
            **({} if self.faithfulness is None else {"faithfulness": self.faithfulness.state_dict()}),
        }

    def __getitem__(self, name: str) -> Any:
        """An attribute by its name, for those who treat an entry as a mapping."""
        return getattr(self, name)


@dataclass(frozen=True)
class About:
    """What the figures of a training are of: all that a reader of them has to know, in primitives.

    Attributes:
        encoder: the path of the encoder in the model.
        rule: ``"post-LN"``, the paper's, or ``"pre-LN"``, ``"sublayer-norm"`` or ``"parallel"``, extensions of it.
        methods: the methods in the order they were asked for.
        normalize: whether rows were divided by their sum before the rollout.
        target: which score the saliency is taken of, in words.
        readout: which row was read.
        exclude_special_tokens: whether special tokens are left out of the correlation.
        probe: the fingerprint of the probe set.
        origin: where the probe came from, in words.
        tokens: one (k,) per example: what stands at its positions.
        labels: one per example: its class, or None.
        truths: one per example: what the data say of it, in words; empty in checkpoints of earlier versions.
        text: which of several texts of an example the figures are of, in words; empty where there is one.
        task: the kind of decision, see :data:`globenc_lightning.task.kinds.SCORES`.
        score: the score that is explained, in words.
        call: what gives the decision, in words.
        aggregation: how the layers' maps were put together.
        references: what the rows are compared with, the saliency first.
        faithfulness: the methods whose first tokens are masked.
        signed: whether there are signed contributions to the score.
    """

    encoder: str
    rule: str
    methods: tuple[str, ...]
    normalize: bool
    target: str
    readout: str
    exclude_special_tokens: bool
    probe: str
    origin: str
    tokens: tuple[tuple[str, ...], ...]
    labels: tuple[int | None, ...]
    task: str = "classification"
    score: str = ""
    call: str = ""
    truths: tuple[str, ...] = ()
    text: str = ""
    aggregation: str = "rollout"
    references: tuple[str, ...] = ("saliency",)
    faithfulness: tuple[str, ...] = ()
    signed: bool = False

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "About":
        """What :meth:`state_dict` was called on."""
        tokens = tuple(tuple(one) for one in state["tokens"])
        parts = {"methods": tuple(state["methods"]), "tokens": tokens, "labels": tuple(state["labels"])}
        later = {"truths": (), "references": ("saliency",), "faithfulness": ()}
        lists = {name: tuple(state.get(name, default)) for name, default in later.items()}
        return cls(**{**state, **parts, **lists})

    def state_dict(self) -> dict[str, Any]:
        """Everything in primitives."""
        return {**asdict(self), "tokens": [list(one) for one in self.tokens]}


class History(list[HistoryEntry]):
    """The analysed validations, oldest first, and what it takes to draw them.

    A list like any other. A callback that is used in several trainings keeps them all here; the pictures show the
    latest one.

    Attributes:
        about: what the figures are of; None before the first of them.
        missing_steps: steps of the latest training's validations whose analysis failed.
        start: the place of the latest training's first entry.
        reasons: why the latest training has no figures, or some of its validations have none: a step and a text each.
    """

    def __init__(
        self,
        entries: Iterable[HistoryEntry] = (),
        about: About | None = None,
        missing_steps: Iterable[int] = (),
        start: int = 0,
        reasons: Iterable[tuple[int, str]] = (),
    ) -> None:
        super().__init__(entries)
        self.about = about
        self.missing_steps = list(missing_steps)
        self.start = start
        self.reasons = list(reasons)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "History":
        """The history that :meth:`state_dict` was called on."""
        made = cls(
            (),
            None if state["about"] is None else About.from_state_dict(state["about"]),
            state["missing_steps"],
            state["drawn_from"],
            # Earlier versions wrote none.
            [(step, text) for step, text in state.get("reasons", ())],
        )
        for entry in state["history"]:
            made.append(HistoryEntry.from_state_dict(entry))
        return made

    def state_dict(self) -> dict[str, Any]:
        """Everything in tensors and primitives, for a checkpoint."""
        return {
            "history": [entry.state_dict() for entry in self],
            "about": None if self.about is None else self.about.state_dict(),
            "missing_steps": list(self.missing_steps),
            "drawn_from": self.start,
            "reasons": [[step, text] for step, text in self.reasons],
        }

    def append(self, entry: HistoryEntry) -> None:
        """Add the newest entry; what its examples have in common with the one before is kept once."""
        super().append(entry.sharing(self[-1]) if self else entry)

    def drop_rows(self) -> None:
        """Keep no rows: another process writes them."""
        self[:] = [entry.without_rows() for entry in self]

    def begin(self) -> None:
        """Another training: its pictures start anew, while the list keeps everything."""
        self.start, self.missing_steps, self.reasons = len(self), [], []

    @property
    def latest(self) -> list[HistoryEntry]:
        """The entries of the latest training."""
        return self[self.start :]

    def with_latest(self, entries: Iterable[HistoryEntry]) -> "History":
        """Returns a copy whose latest training has other entries."""
        return History([*self[: self.start], *entries], self.about, self.missing_steps, self.start, self.reasons)

    def until(self, before: Before) -> "History":
        """Returns a copy without what was found since a moment began."""
        return History(
            self[: before.entries],
            self.about,
            self.missing_steps[: before.missing],
            self.start,
            self.reasons[: before.reasons],
        )

    @property
    def analyses(self) -> int:
        """How many analyses of the latest training were to be made, the failed ones included."""
        return len(self.latest) + len(self.missing_steps)

    def clear(self) -> None:
        """Forget all entries, and where the latest training began among them."""
        super().clear()
        self.missing_steps.clear()
        self.reasons.clear()
        self.start = 0

    def save_sentence(
        self,
        path: str | os.PathLike[str],
        example: int = 0,
        *,
        method: str | None = None,
        signed: bool = False,
        masked: bool = False,
        title: str | None = None,
        dpi: int = 200,
    ) -> Path:
        """Save a picture of one example over the training: a row of attributions per validation, tokens across.

        Args:
            path: where to, ending in ``.svg`` (lines and text stay lines and text) or ``.png``.
            example: the number of the example in the probe set, from 0.
            method: one of the methods that were computed; N-Enc, or the last of them, when None.
            signed: show the signed contributions to the score in place of a method's attributions, in two-sided
                colours, beside the score and what they leave out (``signed=True`` of the callback).
            masked: frame the tokens that were masked to measure how faithful the method is (``faithfulness=`` of the
                callback), in place of those that were decided about.
            title: what stands above; ``""`` leaves the whole head out, for a figure with a caption of its own.
            dpi: dots per inch of a PNG.

        Returns:
            The path.

        Raises:
            ValueError: nothing was analysed yet, or there is no such example, method or format.

        Example:
            >>> callback.history.save_sentence("sentence.svg", example=3)  # doctest: +SKIP
        """
        from globenc_lightning.report import stills

        return stills.save_sentence(self, path, example, method, title, dpi, signed=signed, masked=masked)

    def save_correlation(
        self,
        path: str | os.PathLike[str],
        by: str = "layer",
        *,
        step: int | None = None,
        methods: Sequence[str] | None = None,
        reference: str = "saliency",
        title: str | None = None,
        dpi: int = 200,
    ) -> Path:
        """Save the curves of the correlation with the saliency: mean over the probe set, 95 % confidence bands.

        Args:
            path: where to, ending in ``.svg`` (lines and text stay lines and text) or ``.png``.
            by: ``"layer"``, every layer at one step; or ``"training"``, the last layer at every step.
            step: which step, for ``by="layer"``; the last one when None.
            methods: some of the methods that were computed; all of them when None.
            reference: what the methods are compared with: the ``"saliency"``, or another of the callback's
                ``references=``.
            title: what stands above; ``""`` leaves the whole head out, for a figure with a caption of its own.
            dpi: dots per inch of a PNG.

        Returns:
            The path.

        Raises:
            ValueError: nothing was analysed yet, or there is no such kind, step, method, reference or format.

        Example:
            >>> callback.history.save_correlation("curves.png", by="training")  # doctest: +SKIP
        """
        from globenc_lightning.report import stills

        return stills.save_correlation(self, path, by, step, methods, title, dpi, reference)

    def save_faithfulness(
        self,
        path: str | os.PathLike[str],
        figure: str = "gain",
        *,
        methods: Sequence[str] | None = None,
        title: str | None = None,
        dpi: int = 200,
    ) -> Path:
        """Save the curves of faithfulness over the training: mean over the probe set, 95 % confidence bands.

        Args:
            path: where to, ending in ``.svg`` (lines and text stay lines and text) or ``.png``.
            figure: ``"gain"``, what masking a method's first tokens costs beside random ones;
                ``"sufficiency_gain"``, what they alone keep; or ``"log_odds"``, see
                :class:`~globenc_lightning.faithfulness.Faithfulness`.
            methods: some of the methods whose first tokens were masked; all of them when None.
            title: what stands above; ``""`` leaves the whole head out, for a figure with a caption of its own.
            dpi: dots per inch of a PNG.

        Returns:
            The path.

        Raises:
            ValueError: nothing was analysed yet, faithfulness was not measured, or there is no such figure, method or
                format.

        Example:
            >>> callback.history.save_faithfulness("faithfulness.svg")  # doctest: +SKIP
        """
        from globenc_lightning.report import stills

        return stills.save_faithfulness(self, path, figure, methods, title, dpi)


def _in_one(rows: Sequence[Tensor], packed: Packed | None) -> dict[str, Any]:
    """Rows (k,) of either sign in one tensor, for a checkpoint; exact, and lengths that are known are written once."""
    lengths = [len(one) for one in rows]
    known = packed is not None and packed.lengths == lengths
    return {"values": torch.cat(list(rows)), "lengths": packed.lengths if packed is not None and known else lengths}


def _rows_of(state: Any, packed: Packed | None) -> list[Tensor]:
    """The rows that :func:`_in_one` was called on; none where nobody asked for them."""
    return [] if state is None else list(state["values"].split(state["lengths"]))


def _summary(by_example: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    summary = {method: summarize(rho) for method, rho in by_example.items()}
    return {
        "correlation": {method: one.mean for method, one in summary.items()},
        "sd": {method: one.sd for method, one in summary.items()},
        "n": {method: one.n for method, one in summary.items()},
        "undefined": {method: one.undefined for method, one in summary.items()},
    }
