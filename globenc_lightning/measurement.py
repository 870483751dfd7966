"""A probe set's figures at one moment of a training, and the history of those moments.

Axes: ``b`` example, ``l`` layer, ``q`` token that receives, ``k`` token that is attended to.
"""

import os
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.analysis import Attributions, Reader, Settings, analyze
from globenc_lightning.errors import OutOfMemoryError, is_out_of_memory
from globenc_lightning.functional import CorrelationSummary, summarize
from globenc_lightning.planning import plan
from globenc_lightning.probe import ProbeSet
from globenc_lightning.task.batches import leaves
from globenc_lightning.task.calling import LABELS
from globenc_lightning.task.kinds import SCORES, VALUES
from globenc_lightning.task.replaying import Chunk

HEAD_READS = ("elsewhere", "other tokens", "readout")
"""What a head can be found to read, the strangest first."""
BY_EXAMPLE = (
    *("rows", "saliency", "predicted", "probability", "names", "score", "position", "answers", "truths", "ids"),
    *("values", "chances", "logits", "losses"),
)
"""What a measurement holds one of per example, in a list or along the first axis of a tensor."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one analysis of a probe set gave, on the CPU.

    Attributes:
        correlation: method -> (b, l) float64, NaN where undefined.
        rows: one mapping per example: method -> (l, k) readout row of every layer's rollout.
        last: example -> method -> (q, k) rollout of the last layer, where it was asked for.
        saliency: one (k,) per example.
        predicted: (b,) index of the class with the largest logit.
        probability: (b,) its softmax probability; NaN for a single logit.
        reconstruction_error: (l,) the largest of any batch.
        readout: which row was read.
        rule: ``"post-LN"``, the paper's, or ``"pre-LN"``, ``"sublayer-norm"`` or ``"parallel"``, extensions of it.
        calls: how many calls of an encoder one forward pass makes; the figures are those of the first.
        encoder: the path of the encoder in the model.
        head_reads: what the head makes its decision of, see ``Attributions.head_reads``; of any batch.
        names: what to write below each example's positions, (k,) each: its tokens, or positions.
        task: the kind of decision, see :data:`globenc_lightning.task.kinds.SCORES`.
        score: (b,) the score whose gradient the saliency is.
        position: one per example: the token that the decision is read at, or None where it is read at several.
        answers: one per example: what is decided: a class, several labels, a span's start and end.
        truths: one per example: what its label says, in the same form; a value's target; empty where there is none.
        ids: one (k,) per example: the token ids that the encoder was called with, or None.
        values: (b,) the value of a decision that gives one: a regression, a similarity, a loss.
        chances: one per example: the probability of each of several labels that hold; else empty.
        distance: whether a similarity is a distance.
        call: which of several calls of an encoder the figures are of, from 0.
        logits: one (c,) per example: of its decision, see ``Attributions.decided``.
        losses: (b,) of the decisions, NaN where an example has none.
    """

    correlation: dict[str, Tensor]
    rows: list[dict[str, Tensor]]
    last: dict[int, dict[str, Tensor]]
    saliency: list[Tensor]
    predicted: Tensor
    probability: Tensor
    reconstruction_error: Tensor
    readout: str
    rule: str
    calls: int
    encoder: str
    head_reads: str
    names: list[tuple[str, ...]]
    task: str = "classification"
    score: Tensor = field(default_factory=lambda: torch.empty(0))
    position: list[int | None] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)
    truths: list[tuple[float, ...]] = field(default_factory=list)
    ids: list[Tensor | None] = field(default_factory=list)
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    chances: list[tuple[float, ...]] = field(default_factory=list)
    distance: bool = False
    call: int = 0
    logits: list[Tensor] = field(default_factory=list)
    losses: Tensor = field(default_factory=lambda: torch.empty(0))

    def answer(self, index: int) -> tuple[int, ...]:
        """What an example is decided to be."""
        return self.answers[index] if self.answers else (int(self.predicted[index]),)

    def truth(self, index: int, row: Mapping[str, Any]) -> tuple[float, ...]:
        """What the data say of an example; its class where the decision itself does not tell a label."""
        if self.truths and self.truths[index]:
            return self.truths[index]
        label = class_of(row) if self.task in ("classification", "binary") else None
        return () if label is None else (label,)

    def chance(self, index: int) -> tuple[float, ...]:
        """The probability of what an example is decided to be: one, or that of each of several labels."""
        if self.task == "multi-label":
            return self.chances[index] if self.chances else ()
        return (float(self.probability[index]),)

    def value(self, index: int) -> float:
        """The value of an example's decision; NaN where it gives none."""
        return float(self.values[index]) if len(self.values) else float("nan")

    def first(self, most: int) -> "Measurement":
        """Returns the figures of so many of the first examples: what is shown one by one of a large probe."""
        if len(self.names) <= most:
            return self
        parts = {name: value[:most] for name, value in vars(self).items() if name in BY_EXAMPLE}
        return replace(
            self,
            correlation={method: rho[:most] for method, rho in self.correlation.items()},
            last={index: maps for index, maps in self.last.items() if index < most},
            **parts,
        )

    def summary(self) -> dict[str, CorrelationSummary]:
        """Mean, spread and counts over the probe set: method -> one number per layer."""
        return {method: summarize(rho) for method, rho in self.correlation.items()}


@dataclass(frozen=True, eq=False)
class HistoryEntry:
    """One analysed validation.

    Attributes:
        step: the step at which its figures are logged, that of the validation's own metrics.
        epoch: the training's epoch.
        correlation: method -> (l,) float64, mean over the probe set of Spearman's rho; NaN where undefined.
        sd: method -> (l,) its standard deviation over the probe set.
        n: method -> (l,) how many examples have a defined rho.
        undefined: method -> (l,) how many have none.
        by_example: method -> (b, l) every example's rho.
        rows: method -> one (k,) per example, the readout row of the last layer's rollout.
        saliency: one (k,) per example.
        predicted: (b,) index of the predicted class.
        score: (b,) the score whose gradient the saliency is; empty in checkpoints of earlier versions.
        position: one per example: the token that the decision is read at, or None where it is read at several.
        answers: one per example: what is decided, see :class:`Measurement`; empty in checkpoints of earlier versions.
        probability: (b,) of what is predicted, NaN where it has none; empty in checkpoints of earlier versions.
        texts: one number per example that tells its tokens from others: another choice has another text. Empty in
            checkpoints of earlier versions.
        validation: whether a validation asked for it, and not a training step.
    """

    step: int
    epoch: int
    correlation: dict[str, Tensor]
    sd: dict[str, Tensor]
    n: dict[str, Tensor]
    undefined: dict[str, Tensor]
    by_example: dict[str, Tensor]
    rows: dict[str, list[Tensor]]
    saliency: list[Tensor]
    predicted: Tensor
    score: Tensor = field(default_factory=lambda: torch.empty(0))
    position: list[int | None] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)
    probability: Tensor = field(default_factory=lambda: torch.empty(0))
    texts: list[int] = field(default_factory=list)
    validation: bool = True

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "HistoryEntry":
        """The entry that :meth:`state_dict` was called on."""
        by_example = dict(zip(state["methods"], state["by_example"].unbind(0), strict=True))
        lengths: list[int] = state["lengths"]
        return cls.from_parts(
            step=state["step"],
            epoch=state["epoch"],
            by_example=by_example,
            rows={
                method: list(rows.split(lengths))
                for method, rows in zip(state["methods"], state["rows"].unbind(0), strict=True)
            },
            saliency=list(state["saliency"].split(lengths)),
            predicted=state["predicted"],
            score=state.get("score", torch.empty(0)),
            position=list(state.get("position", ())),
            answers=[tuple(one) for one in state.get("answers", ())],
            probability=state.get("probability", torch.empty(0)),
            texts=list(state.get("texts", ())),
            validation=state.get("validation", True),
        )

    @classmethod
    def from_parts(cls, by_example: dict[str, Tensor], **parts: Any) -> "HistoryEntry":
        """An entry, with the means over its examples computed anew from every example's rho, method -> (b, l)."""
        summary: dict[str, Any] = _summary(by_example)
        return cls(by_example=by_example, **summary, **parts)

    def state_dict(self) -> dict[str, Any]:
        """Everything in a few tensors and primitives: a checkpoint pays for every tensor, however small."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "methods": list(self.by_example),
            "by_example": torch.stack(list(self.by_example.values())),
            "rows": torch.stack([torch.cat(rows) for rows in self.rows.values()]),
            "lengths": [len(one) for one in self.saliency],
            "saliency": torch.cat(self.saliency),
            "predicted": self.predicted,
            "score": self.score,
            "position": list(self.position),
            "answers": [list(one) for one in self.answers],
            "probability": self.probability,
            "texts": list(self.texts),
            "validation": self.validation,
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

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "About":
        """What :meth:`state_dict` was called on."""
        tokens = tuple(tuple(one) for one in state["tokens"])
        parts = {"methods": tuple(state["methods"]), "tokens": tokens, "labels": tuple(state["labels"])}
        return cls(**{**state, **parts, "truths": tuple(state.get("truths", ()))})

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
        return cls(
            [HistoryEntry.from_state_dict(entry) for entry in state["history"]],
            None if state["about"] is None else About.from_state_dict(state["about"]),
            state["missing_steps"],
            state["drawn_from"],
            # Earlier versions wrote none.
            [(step, text) for step, text in state.get("reasons", ())],
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything in tensors and primitives, for a checkpoint."""
        return {
            "history": [entry.state_dict() for entry in self],
            "about": None if self.about is None else self.about.state_dict(),
            "missing_steps": list(self.missing_steps),
            "drawn_from": self.start,
            "reasons": [[step, text] for step, text in self.reasons],
        }

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
        title: str | None = None,
        dpi: int = 200,
    ) -> Path:
        """Save a picture of one example over the training: a row of attributions per validation, tokens across.

        Args:
            path: where to, ending in ``.svg`` (lines and text stay lines and text) or ``.png``.
            example: the number of the example in the probe set, from 0.
            method: one of the methods that were computed; N-Enc, or the last of them, when None.
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

        return stills.save_sentence(self, path, example, method, title, dpi)

    def save_correlation(
        self,
        path: str | os.PathLike[str],
        by: str = "layer",
        *,
        step: int | None = None,
        methods: Sequence[str] | None = None,
        title: str | None = None,
        dpi: int = 200,
    ) -> Path:
        """Save the curves of the correlation with the saliency: mean over the probe set, 95 % confidence bands.

        Args:
            path: where to, ending in ``.svg`` (lines and text stay lines and text) or ``.png``.
            by: ``"layer"``, every layer at one step; or ``"training"``, the last layer at every step.
            step: which step, for ``by="layer"``; the last one when None.
            methods: some of the methods that were computed; all of them when None.
            title: what stands above; ``""`` leaves the whole head out, for a figure with a caption of its own.
            dpi: dots per inch of a PNG.

        Returns:
            The path.

        Raises:
            ValueError: nothing was analysed yet, or there is no such kind, step, method or format.

        Example:
            >>> callback.history.save_correlation("curves.png", by="training")  # doctest: +SKIP
        """
        from globenc_lightning.report import stills

        return stills.save_correlation(self, path, by, step, methods, title, dpi)


def measure(
    reader: Reader,
    probe: ProbeSet,
    settings: Settings,
    shown: Mapping[int, Collection[str]] | None = None,
    chosen: Sequence[int] | None = None,
) -> Measurement:
    """Analyse a probe set; in smaller batches, from now on, if the memory does not suffice.

    Args:
        reader: the model.
        probe: the examples.
        settings: what is computed.
        shown: the examples whose whole last map is kept, and for which methods.
        chosen: the examples that are analysed, at least one; all of them when None.

    Returns:
        The figures; nothing (NaN, empty tensors) where an example was not chosen.

    Raises:
        OutOfMemoryError: the memory does not suffice for one example at a time.
        GlobEncError: the analysis cannot be done, see :func:`globenc_lightning.attribute`.
    """
    chosen = range(len(probe)) if chosen is None else chosen
    while True:
        try:
            return _measure(reader, probe, settings, shown or {}, chosen)
        except Exception as error:
            if not is_out_of_memory(error):
                # What the step decides by itself was found with these weights, and is not to be compared with others.
                reader.chunks.clear()
                reader.decisions.clear()
                reader.proven.clear()
                raise
            # Without its frames, which hold what did not fit.
            cause = error.with_traceback(None)
        finally:
            # The next training step moves the weights.
            reader.kernels.clear()
        if reader.max_tokens == 1 or all(len(indices) == 1 for indices, _ in _batches(reader, probe, chosen)):
            raise OutOfMemoryError(
                "the memory does not suffice to analyse even one example at a time: take shorter examples, or fewer "
                "methods."
            ) from cause
        reader.max_tokens = max(1, reader.max_tokens // 2)
        del cause
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(
    reader: Reader,
    probe: ProbeSet,
    settings: Settings,
    shown: Mapping[int, Collection[str]],
    chosen: Sequence[int],
) -> Measurement:
    size = len(probe)
    rows: list[dict[str, Tensor]] = [{} for _ in range(size)]
    saliency: list[Tensor] = [torch.empty(0)] * size
    last: dict[int, dict[str, Tensor]] = {}
    correlation: dict[str, Tensor] = {}
    predicted = torch.zeros(size, dtype=torch.long)
    probability = torch.full((size,), float("nan"))
    error = torch.zeros(0, dtype=torch.float64)
    names: list[tuple[str, ...]] = [()] * size
    reads: list[str] = []
    readouts: list[str] = []
    task = "classification"
    score = torch.full((size,), float("nan"))
    position: list[int | None] = [None] * size
    answers: list[tuple[int, ...]] = [()] * size
    truths: list[tuple[float, ...]] = [()] * size
    seen: list[Tensor | None] = [None] * size
    values = torch.full((size,), float("nan"))
    logits: list[Tensor] = [torch.empty(0)] * size
    losses = torch.full((size,), float("nan"))
    chances: list[tuple[float, ...]] = [()] * size
    batches = _batches(reader, probe, chosen)
    reader.kernels.keep = len(batches) > 1
    for indices, batch in batches:
        found = analyze(reader, batch, settings, keep_maps=False, special_tokens=_special_tokens(probe, indices, batch))
        for method, rho in found.correlation.items():
            correlation.setdefault(method, rho.new_full((size, rho.shape[1]), float("nan"), device="cpu"))
            correlation[method][indices] = rho.cpu()
        predicted[indices] = found.predicted.cpu()
        if found.probability is not None:
            probability[indices] = found.probability.cpu().float()
        if found.score is not None:
            score[indices] = found.score.cpu().float()
        if found.loss is not None:
            losses[indices] = found.loss.detach().cpu().float()
        reads.append(found.head_reads)
        readouts.append(found.readout)
        task = found.task
        error = torch.maximum(error, found.reconstruction_error) if len(error) else found.reconstruction_error
        for place, index in enumerate(indices):
            real = found.attention_mask[place]
            # A view would keep, and send to other processes, what belongs to the whole batch.
            rows[index] = {method: row[place][:, real].clone().cpu() for method, row in found.rows.items()}
            saliency[index] = found.saliency[place][real].clone().cpu()
            ids = None if found.input_ids is None else found.input_ids[place][real].clone().cpu()
            names[index] = probe.names(index, len(saliency[index]), ids)
            seen[index] = ids
            answers[index] = found.answers[place] if found.answers else (int(found.predicted[place]),)
            truths[index] = found.truths[place] if found.truths else ()
            if task == "span":
                answers[index], truths[index] = (among_real(one, real) for one in (answers[index], truths[index]))
            chances[index] = chances_of(found, place)
            values[index] = value_of(found, place)
            if found.decided is not None:
                # A span's logits are one per token, padding included.
                kept = found.decided[place].cpu().float()
                logits[index] = kept[real.cpu()] if task == "span" and len(kept) == len(real) else kept.clone()
            at = -1 if found.position is None else int(found.position[place])
            position[index] = int(real[:at].sum()) if at >= 0 else None
            if index in shown:
                last[index] = {
                    method: found.last[method][place][real][:, real].clone().cpu() for method in shown[index]
                }
    return Measurement(
        correlation,
        rows,
        last,
        saliency,
        predicted,
        probability,
        error,
        _readout_of(readouts),
        found.rule,
        max(1 + len(found.others), found.calls),
        found.encoder,
        min(reads, key=HEAD_READS.index),
        names,
        task,
        score,
        position,
        answers,
        truths,
        seen,
        values,
        chances,
        found.distance,
        reader.replay.encoder_call if reader.replay is not None else 0,
        logits,
        losses,
    )


def _special_tokens(probe: ProbeSet, indices: Sequence[int], batch: Any) -> Any:
    """What tells the special tokens of a batch: a function of ids, or (b, s) true for them; None where nothing does."""
    if not isinstance(batch, Chunk):
        return probe.special_tokens(indices)
    if probe.tokenizer is not None:
        return probe.marks_special
    named = (leaf for path, leaf in leaves(batch.batch) if path and path[-1] == "special_tokens_mask")
    marks = next(named, None)
    return marks[list(batch.kept)] if isinstance(marks, Tensor) and marks.dim() == 2 else None


def chances_of(found: Attributions, place: int) -> tuple[float, ...]:
    """The probability of each of several labels that an example is decided to have; empty for another decision."""
    if found.task != "multi-label" or found.logits.dim() != 2 or not found.answers:
        return ()
    sure = torch.sigmoid(found.logits[place].float())
    return tuple(float(sure[label]) for label in found.answers[place])


def value_of(found: Attributions, place: int) -> float:
    """The value of an example's decision, where it gives one: a single output, or else the score; else NaN."""
    if found.task not in VALUES:
        return float("nan")
    if found.logits.dim() == 2 and found.logits.shape[1] == 1:
        return float(found.logits[place, 0])
    return float("nan") if found.score is None else float(found.score[place])


def among_real(span: Sequence[float], real: Tensor) -> tuple[Any, ...]:
    """A span's first and last token, counted among the real tokens (k,) alone; -1 where it lies on another."""
    places = real.cumsum(0) - 1
    return tuple(int(places[int(one)]) if 0 <= one < len(real) and real[int(one)] else -1 for one in span)


def _batches(reader: Reader, probe: ProbeSet, chosen: Sequence[int]) -> list[tuple[list[int], Any]]:
    """The examples' numbers and the batch, of each batch that is analysed at once."""
    if probe.parts:
        return [(list(chunk.examples), chunk) for chunk in plan(reader, probe, chosen)]
    return list(probe.batches(reader.max_tokens, chosen))


def put_together(shares: Sequence[tuple[Sequence[int], Measurement]]) -> Measurement:
    """One measurement out of several, each of other examples of the same probe set.

    Args:
        shares: the examples that each measurement has analysed, and the measurement.

    Returns:
        The measurement of all of them.
    """
    first = shares[0][1]
    correlation = {method: torch.full_like(rho, float("nan")) for method, rho in first.correlation.items()}
    predicted, probability = torch.zeros_like(first.predicted), torch.full_like(first.probability, float("nan"))
    rows, saliency, names = list(first.rows), list(first.saliency), list(first.names)
    score, position, ids = first.score.clone(), list(first.position), list(first.ids)
    answers, truths = list(first.answers), list(first.truths)
    values, chances = first.values.clone(), list(first.chances)
    logits, losses = list(first.logits), first.losses.clone()
    last: dict[int, dict[str, Tensor]] = {}
    error = first.reconstruction_error
    for chosen, share in shares:
        indices = list(chosen)
        for method, rho in share.correlation.items():
            correlation[method][indices] = rho[indices]
        predicted[indices], probability[indices] = share.predicted[indices], share.probability[indices]
        for index in indices:
            rows[index], saliency[index] = share.rows[index], share.saliency[index]
            names[index] = share.names[index]
            position[index], ids[index] = share.position[index], share.ids[index]
            answers[index], truths[index] = share.answers[index], share.truths[index]
            chances[index] = share.chances[index]
            logits[index] = share.logits[index]
        losses[indices] = share.losses[indices]
        values[indices] = share.values[indices]
        score[indices] = share.score[indices]
        last |= share.last
        error = torch.maximum(error, share.reconstruction_error)
    return replace(
        first,
        correlation=correlation,
        rows=rows,
        last=dict(sorted(last.items())),
        saliency=saliency,
        predicted=predicted,
        probability=probability,
        reconstruction_error=error,
        readout=_readout_of([share.readout for _, share in shares]),
        head_reads=min((share.head_reads for _, share in shares), key=HEAD_READS.index),
        names=names,
        score=score,
        position=position,
        ids=ids,
        answers=answers,
        truths=truths,
        values=values,
        chances=chances,
        logits=logits,
        losses=losses,
    )


def _readout_of(readouts: Collection[str]) -> str:
    """Which row was read in all parts: single tokens, whose first is their last, do not tell that a model is causal."""
    return "last" if "last" in readouts else next(iter(readouts))


def history_entry(measurement: Measurement, step: int, epoch: int, validation: bool = True) -> HistoryEntry:
    """What is remembered of a measurement."""
    return HistoryEntry.from_parts(
        step=step,
        epoch=epoch,
        by_example=measurement.correlation,
        rows={method: [row[method][-1].clone() for row in measurement.rows] for method in measurement.correlation},
        saliency=measurement.saliency,
        predicted=measurement.predicted,
        score=measurement.score,
        position=list(measurement.position),
        answers=list(measurement.answers),
        probability=measurement.probability,
        texts=[_text_number(measurement, index) for index in range(len(measurement.names))],
        validation=validation,
    )


def _text_number(measurement: Measurement, index: int) -> int:
    """A number that tells one text from another: of its token ids, whose names may change with the tokenizer."""
    ids = measurement.ids[index] if measurement.ids else None
    parts = measurement.names[index] if ids is None else [str(one) for one in ids.tolist()]
    return zlib.crc32("\0".join(parts).encode("utf-8", "surrogatepass"))


def about(
    measurement: Measurement,
    probe: ProbeSet,
    settings: Settings,
    origin: str,
    call: str = "",
    truths: Sequence[str] = (),
    text: str = "",
) -> About:
    """What a measurement is of.

    Args:
        measurement: the figures.
        probe: the examples.
        settings: what was computed.
        origin: where the probe came from, in words.
        call: what gives the decision, in words.
        truths: one per example: what the data say of it, in words.
        text: which of several texts of an example the figures are of, in words.

    Returns:
        All of it, in primitives.
    """
    score = score_in_words(measurement.task, settings.target_name, measurement.distance)
    return About(
        encoder=measurement.encoder,
        rule=measurement.rule,
        methods=tuple(settings.methods),
        normalize=settings.normalize,
        target=settings.target_name,
        readout=measurement.readout,
        exclude_special_tokens=settings.exclude_special_tokens,
        probe=probe.fingerprint(),
        origin=origin,
        tokens=tuple(tuple(str(token) for token in names) for names in measurement.names),
        labels=tuple(class_of(row) for row in probe.rows),
        task=measurement.task,
        score=score,
        call=call,
        truths=tuple(truths),
        text=text,
    )


def score_in_words(task: str, target: str, distance: bool = False) -> str:
    """The score that is explained: that of the kind of decision, or of a target that the user has chosen."""
    if target == "predicted":
        return SCORES[task].replace("similarity", "distance") if distance else SCORES[task]
    return "logit of the label" if target == "label" else f"target={target}"


def class_of(row: Mapping[str, Any]) -> int | None:
    """The class index among an example's entries, or None if it has none (a score, several labels)."""
    label = next((row[name] for name in LABELS if name in row), None)
    if not isinstance(label, Tensor) or label.dim() or label.is_floating_point():
        return None
    return int(label)


def _summary(by_example: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    summary = {method: summarize(rho) for method, rho in by_example.items()}
    return {
        "correlation": {method: one.mean for method, one in summary.items()},
        "sd": {method: one.sd for method, one in summary.items()},
        "n": {method: one.n for method, one in summary.items()},
        "undefined": {method: one.undefined for method, one in summary.items()},
    }
