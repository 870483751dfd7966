"""A probe set's figures at one moment of a training.

Axes: ``b`` example, ``l`` layer, ``q`` token that receives, ``k`` token that is attended to.
"""

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.attributions import Attributions
from globenc_lightning.encoder.checks import brought_home
from globenc_lightning.errors import OutOfMemoryError, is_out_of_memory
from globenc_lightning.explained import Explained
from globenc_lightning.faithfulness import Faithfulness, Gathering
from globenc_lightning.faithfulness import put_together as put_faithfulness_together
from globenc_lightning.functional import CorrelationSummary, summarize
from globenc_lightning.history import About, History, HistoryEntry
from globenc_lightning.planning import plan
from globenc_lightning.probe import ProbeSet
from globenc_lightning.settings import Settings
from globenc_lightning.task.batches import leaves
from globenc_lightning.task.calling import LABELS
from globenc_lightning.task.kinds import SCORES, VALUES
from globenc_lightning.task.replaying import Chunk

__all__ = ["About", "History", "HistoryEntry", "Measurement", "about", "history_entry", "measure", "put_together"]

HEAD_READS = ("elsewhere", "other tokens", "readout")
"""What a head can be found to read, the strangest first."""
Tell = Callable[[int, int], None]
"""Is told how many examples are analysed, and of how many."""
BY_EXAMPLE = (
    *("rows", "saliency", "predicted", "probability", "names", "score", "position", "answers", "truths", "ids"),
    *("values", "chances", "logits", "losses", "references", "signed", "left_out"),
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
        references: one mapping per example: reference -> (k,), what the rows are compared with besides the saliency.
        reference_correlation: reference -> method -> (b, l) float64, NaN where undefined.
        signed: one (k,) per example: signed contributions to the score; empty where not asked for.
        left_out: (b,) the score less their sum; empty where not asked for.
        faithfulness: how much the decisions depend on the tokens that the methods rank first, or None.
        unmasked: why there is no faithfulness though it was asked for, or none of some examples; empty elsewhere.
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
    references: list[dict[str, Tensor]] = field(default_factory=list)
    reference_correlation: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    signed: list[Tensor] = field(default_factory=list)
    left_out: Tensor = field(default_factory=lambda: torch.empty(0))
    faithfulness: Faithfulness | None = None
    unmasked: str = ""

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
            faithfulness=None if self.faithfulness is None else self.faithfulness.first(most),
            **parts,
        )

    def summary(self) -> dict[str, CorrelationSummary]:
        """Mean, spread and counts over the probe set: method -> one number per layer."""
        return {method: summarize(rho) for method, rho in self.correlation.items()}


def measure(
    reader: Reader,
    probe: ProbeSet,
    settings: Settings,
    shown: Mapping[int, Collection[str]] | None = None,
    chosen: Sequence[int] | None = None,
    tell: Tell | None = None,
    masked: Sequence[str] = (),
) -> Measurement:
    """Analyse a probe set; in smaller batches, from now on, if the memory does not suffice.

    Args:
        reader: the model.
        probe: the examples.
        settings: what is computed.
        shown: the examples whose whole last map is kept, and for which methods.
        chosen: the examples that are analysed, at least one; all of them when None.
        tell: is told how many of how many examples are analysed, before the first batch and after each.
        masked: the methods whose first tokens are masked, see :class:`Faithfulness`; nothing is when empty.

    Returns:
        The figures; nothing (NaN, empty tensors) where an example was not chosen.

    Raises:
        OutOfMemoryError: the memory does not suffice for one example at a time.
        GlobEncError: the analysis cannot be done, see :func:`globenc_lightning.attribute`.
    """
    chosen = range(len(probe)) if chosen is None else chosen
    while True:
        try:
            return _measure(reader, probe, settings, shown or {}, chosen, tell or _tell_nobody, masked)
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
        if not _may_be_smaller(reader, probe, chosen):
            raise OutOfMemoryError(
                "the memory does not suffice to analyse even one example at a time: take shorter examples, or fewer "
                "methods."
            ) from cause
        reader.max_tokens = max(1, reader.max_tokens // 2)
        del cause
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _may_be_smaller(reader: Reader, probe: ProbeSet, chosen: Sequence[int]) -> bool:
    """Whether a probe may be analysed in smaller batches."""
    return reader.max_tokens > 1 and any(len(indices) > 1 for indices, _ in _batches(reader, probe, chosen))


def _measure(
    reader: Reader,
    probe: ProbeSet,
    settings: Settings,
    shown: Mapping[int, Collection[str]],
    chosen: Sequence[int],
    tell: Tell,
    masked: Sequence[str],
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
    references: list[dict[str, Tensor]] = [{} for _ in range(size)]
    with_references: dict[str, dict[str, Tensor]] = {}
    signed = [torch.empty(0)] * size if settings.signed else []
    left_out = torch.full((size,), float("nan")) if settings.signed else torch.empty(0)
    gathering = Gathering(masked, size) if masked else None
    batches = _batches(reader, probe, chosen)
    reader.kernels.keep = len(batches) > 1
    done = 0
    tell(done, len(chosen))
    for indices, batch in batches:
        special = _special_tokens(probe, indices, batch)
        drawn = [place for place, index in enumerate(indices) if index in shown]
        explained: list[Explained] | None = None if gathering is None else []
        tell_more = partial(_tell_more, tell, done, len(chosen))
        options: dict[str, Any] = {"special_tokens": special, "explained": explained, "tell": tell_more}
        found = analyze(reader, batch, settings, keep_maps=False, **options)
        found = at_home(replace(found, last={method: kept[drawn] for method, kept in found.last.items()}))
        for method, rho in found.correlation.items():
            correlation.setdefault(method, rho.new_full((size, rho.shape[1]), float("nan")))
            correlation[method][indices] = rho
        for reference, by_method in found.reference_correlation.items():
            for method, rho in by_method.items():
                of_all = with_references.setdefault(reference, {})
                of_all.setdefault(method, rho.new_full((size, rho.shape[1]), float("nan")))[indices] = rho
        if found.left_out is not None:
            left_out[indices] = found.left_out.float()
        predicted[indices] = found.predicted
        if found.probability is not None:
            probability[indices] = found.probability.float()
        if found.score is not None:
            score[indices] = found.score.float()
        if found.loss is not None:
            losses[indices] = found.loss.float()
        reads.append(found.head_reads)
        readouts.append(found.readout)
        task = found.task
        error = torch.maximum(error, found.reconstruction_error) if len(error) else found.reconstruction_error
        for place, index in enumerate(indices):
            real = found.attention_mask[place]
            # A view would keep, and send to other processes, what belongs to the whole batch.
            rows[index] = {method: row[place][:, real].clone() for method, row in found.rows.items()}
            saliency[index] = found.saliency[place][real].clone()
            references[index] = {name: one[place][real].clone() for name, one in found.references.items()}
            if found.signed is not None:
                signed[index] = found.signed[place][real].clone()
            ids = None if found.input_ids is None else found.input_ids[place][real].clone()
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
                kept = found.decided[place].float()
                logits[index] = kept[real] if task == "span" and len(kept) == len(real) else kept.clone()
            at = -1 if found.position is None else int(found.position[place])
            position[index] = int(real[:at].sum()) if at >= 0 else None
            if index in shown:
                # Flows have no whole map.
                maps = {method: found.last[method][drawn.index(place)] for method in shown[index] if found.last}
                last[index] = {method: kept[real][:, real].clone() for method, kept in maps.items()}
        if gathering is not None and explained:
            last_rows = {method: rows[:, -1] for method, rows in found.rows.items()}
            known = [_special_of(probe, index, batch, found, place) for place, index in enumerate(indices)]
            mask_id = getattr(probe.tokenizer, "mask_token_id", None)
            smaller = partial(_may_be_smaller, reader, probe, chosen)
            gathering.add(indices, explained[0], last_rows, found.attention_mask, known, mask_id, smaller)
        done += len(indices)
        tell(done, len(chosen))
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
        references,
        with_references,
        signed,
        left_out,
        None if gathering is None else gathering.result(),
        "" if gathering is None else gathering.reason,
    )


def at_home(found: Attributions) -> Attributions:
    """Returns attributions with what a measurement keeps of them on the CPU, in one copy."""
    named = {one.name: getattr(found, one.name) for one in fields(found)}
    whole = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.device.type != "cpu"}
    parts = {name: named[name] for name in ("rows", "correlation", "last", "references")}
    compared = found.reference_correlation
    parts |= {f"with {reference}": by_method for reference, by_method in compared.items()}
    home = iter(brought_home([*whole.values(), *(one for part in parts.values() for one in part.values())]))
    at_home: dict[str, Any] = {name: next(home) for name in whole}
    at_home |= {name: {key: next(home) for key in part} for name, part in parts.items()}
    by_reference = {reference: at_home.pop(f"with {reference}") for reference in compared}
    return replace(found, **at_home, reference_correlation=by_reference)


def _tell_more(tell: Tell, done: int, total: int, more: int) -> None:
    """Tell that some examples of a batch are done as well."""
    tell(done + more, total)


def _tell_nobody(done: int, total: int) -> None:
    """Where nobody asks how far an analysis is."""


def _special_tokens(probe: ProbeSet, indices: Sequence[int], batch: Any) -> Any:
    """What tells the special tokens of a batch: a function of ids, or (b, s) true for them; None where nothing does."""
    if not isinstance(batch, Chunk):
        return probe.special_tokens(indices)
    if probe.tokenizer is not None:
        return probe.marks_special
    named = (leaf for path, leaf in leaves(batch.batch) if path and path[-1] == "special_tokens_mask")
    marks = next(named, None)
    return marks[list(batch.kept)] if isinstance(marks, Tensor) and marks.dim() == 2 else None


def _special_of(probe: ProbeSet, index: int, batch: Any, found: Attributions, place: int) -> Tensor | None:
    """Which real tokens (k,) of an example are special; None where nothing tells it."""
    real = found.attention_mask[place]
    if probe.tokenizer is not None and found.input_ids is not None:
        return probe.marks_special(found.input_ids[place][real])
    if isinstance(batch, Chunk):
        marks = _special_tokens(probe, (index,), batch)
        return marks[place][real].bool() if isinstance(marks, Tensor) and marks[place].shape == real.shape else None
    marks = probe.special[index] if probe.special else None
    mask = next((value for name, value in probe.rows[index].items() if name.endswith("attention_mask")), None)
    if marks is None or marks.dim() != 1:
        return None
    return marks[mask.bool()] if isinstance(mask, Tensor) and mask.shape == marks.shape else marks


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
    references, signed, left_out = list(first.references), list(first.signed), first.left_out.clone()
    with_references = {
        reference: {method: torch.full_like(rho, float("nan")) for method, rho in by_method.items()}
        for reference, by_method in first.reference_correlation.items()
    }
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
            references[index] = share.references[index]
            if signed:
                signed[index] = share.signed[index]
        for reference, by_method in share.reference_correlation.items():
            for method, rho in by_method.items():
                with_references[reference][method][indices] = rho[indices]
        if len(left_out):
            left_out[indices] = share.left_out[indices]
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
        references=references,
        reference_correlation=with_references,
        signed=signed,
        left_out=left_out,
        faithfulness=put_faithfulness_together([(chosen, share.faithfulness) for chosen, share in shares]),
        unmasked=next((share.unmasked for _, share in shares if share.unmasked), ""),
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
        rows={method: [row[method][-1] for row in measurement.rows] for method in measurement.correlation},
        saliency=measurement.saliency,
        predicted=measurement.predicted,
        score=measurement.score,
        position=list(measurement.position),
        answers=list(measurement.answers),
        probability=measurement.probability,
        texts=[_text_number(measurement, index) for index in range(len(measurement.names))],
        validation=validation,
        reference_rho={
            reference: {method: rho.float() for method, rho in by_method.items()}
            for reference, by_method in measurement.reference_correlation.items()
        },
        references={
            reference: [one[reference] for one in measurement.references]
            for reference in measurement.reference_correlation
        },
        signed=list(measurement.signed),
        left_out=measurement.left_out,
        faithfulness=measurement.faithfulness,
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
    masked: Sequence[str] = (),
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
        masked: the methods whose first tokens are masked.

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
        aggregation=settings.aggregation,
        references=tuple(settings.references),
        faithfulness=tuple(masked),
        signed=settings.signed and len(measurement.left_out) > 0,
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
