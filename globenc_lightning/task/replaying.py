"""A user's own step, run again on the probe up to its loss, and the proof that it decides what the user's step decided.

Axes: ``b`` example, ``u`` unit (one decision, see :mod:`globenc_lightning.task.kinds`), ``s`` token, ``d`` hidden.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from globenc_lightning.encoder.calling import LABELS, logits_of
from globenc_lightning.encoder.norms import tolerance, working
from globenc_lightning.encoder.reading import Outputs
from globenc_lightning.errors import CutGraphError, ModelCallError
from globenc_lightning.task.batches import size_of
from globenc_lightning.task.kinds import BY_TOKEN, Decision, Seen, decision_of, decision_of_output
from globenc_lightning.task.watching import LossCall, LossSeen, LossWatch


class Part(NamedTuple):
    """A batch of the probe, as the user's loader gave it.

    Attributes:
        batch: the batch, on the CPU.
        place: its number in its data loader.
        loader: the number of its data loader.
        wanted: how many of its examples belong to the probe, from the first on.
    """

    batch: Any
    place: int
    loader: int
    wanted: int


class Step(NamedTuple):
    """A step of the user's module.

    Attributes:
        name: its name, for messages.
        run: ``run(batch, place, loader)`` calls it.
        logits: whether it returns the logits themselves, as ``forward=`` does.
    """

    name: str
    run: Callable[[Any, int, int], Any]
    logits: bool = False


@dataclass(frozen=True)
class Task:
    """Which of the things that a step computes is the decision.

    Attributes:
        source: ``"loss"`` or ``"output"`` (a model's named output, where the step computes no loss).
        function: the name of the loss function, or of the output.
        index: the number of the loss among those that the step computes, from 0.
        stop_at: after how many losses the step has computed all that is needed.
        call: which call of an encoder is shown.
        calls: how many calls of encoders the decision depends on.
        seen: how that encoder was called; its ``rows`` and ``tokens`` are those of one batch.
    """

    source: str
    function: str
    index: int
    stop_at: int | None
    call: int
    calls: int
    seen: Seen


@dataclass(eq=False)
class Layout:
    """Where the examples of a chunk are: found by gradients, never assumed.

    Attributes:
        units: (n,) the unit of each example.
        rows: (n,) the row of the encoder's call that each is decided from; (n, c) by choice.
    """

    units: Tensor
    rows: Tensor


@dataclass(eq=False)
class Chunk:
    """A batch that is analysed at once: a part of the probe, or some of its rows where these give the same.

    Attributes:
        batch: the batch, on the CPU.
        part: the part that it is of.
        examples: the numbers of its examples in the probe.
        kept: the numbers of these among the examples of ``batch``.
        expected: what the user's own step decides on these, in evaluation; None once that was compared.
        layout: where the examples are, once found.
    """

    batch: Any
    part: Part
    examples: tuple[int, ...]
    kept: tuple[int, ...]
    expected: Decision | None = None
    layout: Layout | None = None


class Ran(NamedTuple):
    """What a run of the step computed.

    Attributes:
        losses: the calls of loss functions, in order.
        outputs: the named outputs of models with a head, in order.
        returned: what the step returned; None where it was ended at its loss.
    """

    losses: list[LossCall]
    outputs: list[Any]
    returned: Any


@dataclass(eq=False)
class Replay:
    """A user's step that is run again and again.

    Attributes:
        step: the step.
        decision: which decision is explained: the number of a loss among those that depend on an encoder, from 0, or
            the path of a head.
        encoder_call: which call of an encoder is shown, from 0, among those that the decision depends on.
        task: what was found; None before the first run.
        counts: how often each label stands in the probe.
    """

    step: Step
    decision: int | str = 0
    encoder_call: int = 0
    task: Task | None = None
    counts: Counter[int] = field(default_factory=Counter)

    def search(self, model: nn.Module, outputs: Outputs) -> Callable[[Chunk], Ran]:
        """A way to run the step that ends at the decision, for the pass that finds the encoder's structure.

        Args:
            model: the module.
            outputs: what the encoders have returned so far, in the autograd graph.

        Returns:
            The way.
        """

        def run(chunk: Chunk) -> Ran:
            found: list[Task] = []
            depending: list[int] = []
            head = _HeadOutputs(model, self.decision)

            def wanted(losses: list[LossCall]) -> bool:
                loss = losses[-1]
                if found:
                    # The second loss of a span.
                    return True
                if outputs and not any(one.requires_grad for call in outputs for one in call):
                    raise CutGraphError("the encoders are called where gradients are off.")
                # Two texts are compared by what comes out: each argument depends on its own alone.
                compares = loss.holds in ("similarity", "distance", "triplet", "pair")
                read = loss.result if compares else loss.logits
                calls = _depends_on(read, outputs) if loss.result.requires_grad else []
                if not calls:
                    return False
                depending.append(len(losses) - 1)
                if isinstance(self.decision, str):
                    if not head.leads_to(loss.logits):
                        return False
                elif len(depending) <= self.decision:
                    return False
                found.append(self._task("loss", loss.name, len(losses) - 1, calls, outputs, loss.logits))
                return not _may_be_a_start(loss, found[0].seen)

            self.task = None
            with head:
                ran = _run(self.step, chunk, model, None if self.step.logits else wanted)
            if found:
                self.task = replace(found[0], stop_at=len(ran.losses))
                return ran
            for place, output in enumerate(ran.outputs):
                logits, _, name = _named(output)
                calls = _depends_on(logits, outputs) if logits is not None and logits.requires_grad else []
                if calls and logits is not None:
                    self.task = self._task("output", name, place, calls, outputs, logits)
                    return ran
            if not outputs:
                raise ModelCallError(f"{self.step.name} calls no encoder.")
            what = f"{len(ran.losses)} losses" if ran.losses else "no loss"
            raise CutGraphError(f"{self.step.name} computes {what} that depends on an encoder.")

        return run

    def _task(
        self, source: str, function: str, index: int, calls: Sequence[int], outputs: Outputs, logits: Tensor
    ) -> Task:
        if self.encoder_call >= len(calls):
            raise ModelCallError(
                f"encoder_call={self.encoder_call}: the decision depends on {len(calls)} calls of encoders; choose "
                f"from 0 to {len(calls) - 1}."
            )
        call = calls[self.encoder_call]
        rows, tokens = outputs[call][0].shape[:2]
        seen = Seen(rows, tokens, None, False, False, len(calls), _mixes_texts(logits, outputs))
        return Task(source, function, index, None, call, len(calls), seen)

    def completed(self, model: nn.Module, encoder: nn.Module, causal: bool) -> None:
        """Add what the encoder itself tells to what was found."""
        if self.task is None:
            raise AssertionError("the step was run before")
        seen = replace(
            self.task.seen, vocabulary=_vocabulary(encoder), causal=causal, generates=_generates(model, encoder)
        )
        self.task = replace(self.task, seen=seen)

    def run(self, model: nn.Module, chunk: Chunk) -> Ran:
        """Run the step on a chunk, up to the loss."""
        if self.task is None:
            raise AssertionError("the decision is found before it is run again")
        stop_at = self.task.stop_at
        return _run(self.step, chunk, model, None if stop_at is None else lambda losses: len(losses) >= stop_at)

    def decided(self, ran: Ran, rows: int, tokens: int, batch: Any) -> Decision:
        """The decision in what a run computed.

        Args:
            ran: what the run computed.
            rows: the number of texts that the encoder was called with.
            tokens: the number of tokens of each.
            batch: the batch that it was run on.

        Raises:
            ModelCallError: the run took another way than the one in which the decision was found.
        """
        task = self.task
        if task is None:
            raise AssertionError("the decision is found before it is run again")
        seen, size = replace(task.seen, rows=rows, tokens=tokens), size_of(batch)
        if task.source == "loss":
            losses = ran.losses[task.index : task.stop_at]
            if not losses or losses[0].name != task.function:
                raise ModelCallError(f"{self.step.name} went another way than when its decision was found.")
            return decision_of(losses, seen, size)
        if task.index < len(ran.outputs):
            logits, ends, _ = _named(ran.outputs[task.index])
            decision = None
            if logits is not None:
                decision = decision_of_output(logits, ends, _labels_in(batch, logits), seen, size)
            if decision is not None:
                return decision
        raise ModelCallError(
            f"{self.step.name} computes no loss, and its model's logits alone do not tell which decision is meant."
        )


def find_layout(replay: Replay, decision: Decision, chunk: Chunk, last: Tensor) -> Layout:
    """Find by gradients which row of the encoder's call each example is decided from.

    Args:
        replay: the step.
        decision: what was decided, in the autograd graph.
        chunk: the examples.
        last: (rows, s, d) the encoder's last hidden states, in the same graph.

    Returns:
        The layout.

    Raises:
        ModelCallError: an example is decided from no row, or two from the same.
    """
    units = len(decision.logits)
    if decision.kind == "loss" and units == 1:
        kept = torch.tensor([one for one in chunk.kept if one < len(last)])
        return Layout(torch.zeros_like(kept), kept)
    if decision.kind in BY_TOKEN:
        groups = _groups(decision, last)
        chosen = [_chosen_unit(decision, groups[one], replay.counts) for one in chunk.kept if one < len(groups)]
        if any(one is None for one in chosen):
            raise ModelCallError("an example of the probe has no label that counts, so no token of it is decided.")
        wanted = torch.tensor([one for one in chosen if one is not None])
    else:
        wanted = torch.tensor([one for one in chunk.kept if one < units])
    if decision.kind == "choice":
        classes = decision.logits.shape[1]
        rows = torch.stack([_rows_read(decision.logits[wanted][:, place], last) for place in range(classes)], 1)
        return Layout(wanted, rows)
    rows = _rows_read(decision.scores(wanted), last)
    if bool((rows < 0).any()):
        raise CutGraphError("the decision of an example depends on none of the encoder's last hidden states.")
    if len(set(rows.tolist())) < len(rows):
        raise ModelCallError("two examples are decided from the same text, so their saliency cannot be told apart.")
    return Layout(wanted, rows)


def _mixes_texts(logits: Tensor, outputs: Outputs) -> bool:
    """Whether one logit compares two texts, and the others of its unit compare other texts."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        return False
    return 1 < _texts_read(logits[0, 0], outputs) < _texts_read(logits[0].sum(), outputs)


def _texts_read(score: Tensor, outputs: Outputs) -> int:
    """How many texts a score depends on."""
    count = 0
    for call in outputs:
        read = None
        for one in (one for one in call if one.requires_grad):
            (gradient,) = torch.autograd.grad(score, one, retain_graph=True, allow_unused=True)
            if gradient is not None:
                rows = gradient.abs().flatten(1).amax(1) > 0
                read = rows if read is None or read.shape != rows.shape else read | rows
        count += 0 if read is None else int(read.sum())
    return count


def compare(found: Decision, expected: Decision, units: Tensor | None, name: str) -> None:
    """Prove that a run decided what the user's own step decides.

    Args:
        found: the decision of the run.
        expected: that of the user's step, in evaluation.
        units: (n,) the units that are compared; all when None.
        name: the step's name, for messages.

    Raises:
        ModelCallError: they differ by more than rounding explains.
    """
    if not same(found, expected, units):
        raise ModelCallError(
            f"the replay of {name} does not give the logits that {name} gives by itself, so the figures would be of "
            "another decision."
        )


def same(found: Decision, expected: Decision, units: Tensor | None = None) -> bool:
    """Whether two decisions are the same, up to rounding."""
    if found.kind != expected.kind or found.logits.shape[1:] != expected.logits.shape[1:]:
        return False
    chosen = torch.arange(len(found.logits)) if units is None else units
    if len(expected.logits) != len(found.logits) or not len(chosen):
        return False
    pairs = [(found.logits, expected.logits)]
    if found.ends is not None and expected.ends is not None:
        pairs.append((found.ends, expected.ends))
    for one, other in pairs:
        mine, theirs = working(one.detach()).cpu()[chosen], working(other.detach()).cpu()[chosen]
        finite = torch.isfinite(theirs)
        if not torch.equal(finite, torch.isfinite(mine)):
            return False
        allowed = tolerance(one.dtype, other.dtype) * max(1.0, float(theirs[finite].abs().max()) if finite.any() else 0)
        if finite.any() and float((mine - theirs)[finite].abs().max()) > allowed:
            return False
    return True


class _HeadOutputs:
    """What a head that the user names has returned.

    Args:
        model: the module.
        name: the head's path, or a number: then nothing is watched.
    """

    def __init__(self, model: nn.Module, name: int | str) -> None:
        self._module: nn.Module | None = None
        self._returned: list[Tensor] = []
        if isinstance(name, str):
            modules = dict(model.named_modules())
            if name not in modules:
                raise ModelCallError(
                    f"decision={name!r}: {type(model).__name__} has no module of this name. Its own are "
                    f"{', '.join(child for child, _ in model.named_children())}."
                )
            self._module = modules[name]

    def __enter__(self) -> None:
        if self._module is not None:
            self._handle = self._module.register_forward_hook(self._left)

    def __exit__(self, *exception: Any) -> None:
        if self._module is not None:
            self._handle.remove()

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if isinstance(found, Tensor) and found.requires_grad:
            self._returned.append(found)

    def leads_to(self, logits: Tensor) -> bool:
        """Whether logits depend on what the head returned."""
        return bool(_depends_on(logits, [self._returned]))


def _run(step: Step, chunk: Chunk, model: nn.Module, wanted: Callable[[list[LossCall]], bool] | None) -> Ran:
    outputs: list[Any] = []

    def left(module: nn.Module, args: Any, output: Any) -> None:
        if _named(output)[0] is not None:
            outputs.append(output)

    handles = [
        module.register_forward_hook(left)
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.base_model is not module
    ]
    watch = LossWatch(wanted)
    returned = None
    try:
        with watch:
            returned = step.run(chunk.batch, chunk.part.place, chunk.part.loader)
    except LossSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if step.logits:
        outputs = [{"logits": logits_of(returned, size_of(chunk.batch))}]
    elif not outputs and _named(returned)[0] is not None:
        outputs.append(returned)
    return Ran(watch.losses, outputs, returned)


def _named(output: Any) -> tuple[Tensor | None, Tensor | None, str]:
    """The logits of a model's output, the logits of a span's end beside them, and what the first is called."""
    for name, other in (("start_logits", "end_logits"), ("logits", "")):
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(found, Tensor) and found.is_floating_point():
            ends = output.get(other) if isinstance(output, dict) else getattr(output, other, None) if other else None
            return found, ends if isinstance(ends, Tensor) else None, name
    return None, None, ""


def _labels_in(batch: Any, logits: Tensor) -> Tensor | None:
    """The labels that a batch holds under a usual name, if they can be those of the logits."""
    if not isinstance(batch, Mapping):
        return None
    labels = next((batch[name] for name in LABELS if isinstance(batch.get(name), Tensor)), None)
    if labels is None or not labels.dim() or len(labels) != len(logits):
        return None
    return labels.reshape(-1) if logits.dim() == 2 and logits.shape[1] == 1 else labels


def _depends_on(logits: Tensor | None, outputs: Outputs) -> list[int]:
    """Which calls of encoders a tensor depends on, by the numbers of the calls."""
    if logits is None or not logits.requires_grad:
        return []
    flat = [(place, one) for place, call in enumerate(outputs) for one in call if one.requires_grad]
    if not flat:
        return []
    total = logits.nan_to_num().float().sum()
    gradients = torch.autograd.grad(total, [one for _, one in flat], retain_graph=True, allow_unused=True)
    found = {place for (place, _), gradient in zip(flat, gradients, strict=True) if gradient is not None}
    return sorted(found)


def _may_be_a_start(loss: LossCall, seen: Seen) -> bool:
    """Whether a loss may be that of a span's start: one class per token, one label per text."""
    target = loss.target
    return (
        loss.holds == "classes"
        and tuple(loss.logits.shape) == (seen.rows, seen.tokens)
        and isinstance(target, Tensor)
        and tuple(target.shape) == (seen.rows,)
    )


def _rows_read(scores: Tensor, last: Tensor) -> Tensor:
    """The first row of the hidden states that each score depends on, (n,); -1 where it depends on none."""
    rows = []
    for score in scores:
        (gradient,) = torch.autograd.grad(score, last, retain_graph=True, allow_unused=True)
        size = torch.zeros(len(last)) if gradient is None else gradient.detach().abs().flatten(1).amax(1).float().cpu()
        touched = size > 1e-6 * size.max().clamp(min=torch.finfo(torch.float32).tiny)
        rows.append(int(touched.int().argmax()) if bool(touched.any()) else -1)
    return torch.tensor(rows)


def _groups(decision: Decision, last: Tensor) -> list[list[int]]:
    """The units of each example of a model that decides per token."""
    units = len(decision.logits)
    if decision.width:
        return [list(range(start, start + decision.width)) for start in range(0, units, decision.width)]
    groups: dict[int, list[int]] = {}
    for unit, row in enumerate(rows_by_digits(decision.scores(torch.arange(units)), last)):
        groups.setdefault(row, []).append(unit)
    return [groups[row] for row in sorted(groups) if row >= 0]


def rows_by_digits(scores: Tensor, last: Tensor) -> list[int]:
    """The row that each of many scores depends on, by as many gradients as their number has binary digits.

    Args:
        scores: (u,) in the autograd graph.
        last: (rows, s, d) the encoder's last hidden states, in the same graph.

    Returns:
        One row per score; -1 where a score depends on no token that no other score depends on.
    """
    units = len(scores)
    number = torch.zeros(last.shape[:2], dtype=torch.long, device=last.device)
    read = [_tokens_read(scores, last)]
    for digit in range(max(units - 1, 0).bit_length()):
        chosen = torch.tensor([unit >> digit & 1 for unit in range(units)], device=scores.device).bool()
        with_digit, without = _tokens_read(scores[chosen], last), _tokens_read(scores[~chosen], last)
        number += with_digit.long() << digit
        # A token that is read by scores of both kinds belongs to none alone.
        read.append(~(with_digit & without))
    alone = torch.stack(read).all(0)
    rows = [-1] * units
    for row, token in alone.nonzero().tolist():
        rows[int(number[row, token])] = row
    return rows


def _tokens_read(scores: Tensor, last: Tensor) -> Tensor:
    """Which tokens some scores depend on, (rows, s)."""
    gradient: Tensor | None = torch.autograd.grad(scores.sum(), last, retain_graph=True, allow_unused=True)[0]
    if gradient is None:
        return torch.zeros(last.shape[:2], dtype=torch.bool, device=last.device)
    return (gradient != 0).any(-1)


def _chosen_unit(decision: Decision, units: Sequence[int], counts: Counter[int]) -> int | None:
    """The unit of an example that is explained: see ``SCORES``."""
    if decision.labels is None:
        return None
    labelled = [(unit, label) for unit in units if (label := int(decision.labels[unit])) != decision.ignored]
    if not labelled:
        return None
    if decision.kind == "next token":
        return labelled[-1][0]
    if decision.kind == "token classification":
        return min(labelled, key=lambda one: counts[one[1]])[0]
    return labelled[0][0]


def count_labels(decisions: Sequence[Decision]) -> Counter[int]:
    """How often each label stands in the decisions of a probe."""
    counts: Counter[int] = Counter()
    for decision in decisions:
        if decision.labels is not None and not decision.labels.is_floating_point() and decision.labels.dim() == 1:
            counts.update(label for label in decision.labels.tolist() if label != decision.ignored)
    return counts


def _vocabulary(encoder: nn.Module) -> int | None:
    try:
        table = encoder.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    number = getattr(table, "num_embeddings", None)
    return number if isinstance(number, int) else None


def _generates(model: nn.Module, encoder: nn.Module) -> bool:
    """Whether an encoder is that of a model with a decoder."""
    for module in model.modules():
        get_encoder = getattr(module, "get_encoder", None)
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and callable(get_encoder):
            try:
                if get_encoder() is encoder:
                    return True
            except (AttributeError, NotImplementedError, TypeError):
                continue
    return False
