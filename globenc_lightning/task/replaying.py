"""A user's own step, run again on the probe up to its loss, and the proof that it decides what the user's step decided.

Axes: ``b`` example, ``u`` unit (one decision, see :mod:`globenc_lightning.task.kinds`), ``s`` token, ``d`` hidden.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from math import comb
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from globenc_lightning.encoder.checks import Checks
from globenc_lightning.encoder.norms import tolerance, working
from globenc_lightning.encoder.reading import Outputs, find_encoders
from globenc_lightning.encoder.torch_modules import is_torch_encoder, parts_called
from globenc_lightning.encoder.undisturbed import random_states_kept
from globenc_lightning.errors import CutGraphError, ModelCallError, NonFiniteError
from globenc_lightning.task.batches import fresh, leaves, size_of
from globenc_lightning.task.calling import LABELS, logits_of
from globenc_lightning.task.kinds import (
    BY_TOKEN,
    Decision,
    Seen,
    decision_of,
    decision_of_output,
    decision_of_squashed,
)
from globenc_lightning.task.watching import LossCall, LossSeen, LossWatch, Squashed


class Part(NamedTuple):
    """A batch of the probe, as the user's loader gave it.

    Attributes:
        batch: the batch, on the CPU.
        place: its number in its data loader.
        loader: the number of its data loader.
        wanted: how many of its examples belong to the probe, from the first on.
        skipped: the numbers of the examples that are passed over, since their texts have no token.
    """

    batch: Any
    place: int
    loader: int
    wanted: int
    skipped: tuple[int, ...] = ()

    @property
    def chosen(self) -> list[int]:
        """The numbers of the examples that belong to the probe."""
        return [one for one in range(self.wanted + len(self.skipped)) if one not in self.skipped][: self.wanted]


def part_of(batch: Any, place: int, loader: int, limit: int) -> Part:
    """The first examples of a batch, but for those whose text has no token.

    Args:
        batch: the batch, on the CPU.
        place: its number in its data loader.
        loader: the number of its data loader.
        limit: at most so many examples.

    Returns:
        The part; it has no example where all texts are empty.
    """
    size = size_of(batch)
    if size is None:
        return Part(batch, place, loader, limit)
    empty = [
        leaf.flatten(1).any(1).logical_not()
        for path, leaf in leaves(batch)
        if isinstance(leaf, Tensor)
        and leaf.dim() > 1
        and len(leaf) == size
        # A mask of any other name is seen when the encoder is called with it.
        and path
        and str(path[-1]).endswith("attention_mask")
    ]
    without = torch.stack(empty).any(0).nonzero().flatten().tolist() if empty else []
    chosen = [one for one in range(size) if one not in without][:limit]
    return Part(batch, place, loader, len(chosen), tuple(without))


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
        source: ``"loss"``; ``"squashed"`` (logits that a loss is made of which the step writes out); ``"output"`` (a
            model's named output, where the step computes no loss); or ``"returned"`` (the loss itself).
        function: the name of the loss function, of the function that squashes, or of the output.
        index: the number of it among those that the step computes, from 0.
        stop_at: after how many losses the step has computed all that is needed.
        call: which call of an encoder is shown.
        calls: how many calls of encoders the decision depends on.
        seen: how that encoder was called; its ``rows`` and ``tokens`` are those of one batch.
        depends: the calls of encoders that the decision depends on.
    """

    source: str
    function: str
    index: int
    stop_at: int | None
    call: int
    calls: int
    seen: Seen
    depends: tuple[int, ...] = ()


@dataclass(eq=False)
class Layout:
    """Where the examples of a chunk are: found by gradients, never assumed.

    Attributes:
        units: (n,) the unit of each example.
        rows: (n,) the row of the encoder's call that each is decided from; (n, c) by choice.
        labelled: (n,) whether the example has a label that counts, where tokens are decided; all have one when None.
        labels: the labels of all units when it was found.
        even: whether every example has as many units as the others.
    """

    units: Tensor
    rows: Tensor
    labelled: Tensor | None = None
    labels: Tensor | None = None
    even: bool = True


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
        weights: for each call of an encoder that is read: (rows, s) how much of each token's row is read, where that is
            one token; None before it is known.
    """

    batch: Any
    part: Part
    examples: tuple[int, ...]
    kept: tuple[int, ...]
    expected: Decision | None = None
    layout: Layout | None = None
    weights: list[Tensor] | None = None


class Ran(NamedTuple):
    """What a run of the step computed.

    Attributes:
        losses: the calls of loss functions, in order.
        squashed: logits that probabilities were made of, in order.
        outputs: the named outputs of models with a head, in order.
        returned: what the step returned; None where it was ended at its loss.
    """

    losses: list[LossCall]
    squashed: list[Squashed]
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

    def search(self, model: nn.Module, outputs: Outputs, trained: Sequence[Tensor] = ()) -> Callable[[Chunk], Ran]:
        """A way to run the step that ends at the decision, for the pass that finds the encoder's structure.

        Args:
            model: the module.
            outputs: what the encoders have returned so far, in the autograd graph.
            trained: the parameters that are trained; what depends on none of them, a teacher's loss say, is no
                decision. Not asked for when empty.

        Returns:
            The way.
        """

        def run(chunk: Chunk) -> Ran:
            search = _Search(self, model, outputs, trained)
            self.task = None
            with search.head:
                ran = _run(self.step, chunk, model, None if self.step.logits else search.wanted)
            self.task = search.found(ran)
            return ran

        return run

    def completed(self, model: nn.Module, encoder: nn.Module, causal: bool) -> Task:
        """What was found, with what the encoder itself tells."""
        if self.task is None:
            raise AssertionError("the step was run before")
        seen = replace(
            self.task.seen, vocabulary=_vocabulary(model, encoder), causal=causal, generates=_generates(model, encoder)
        )
        self.task = replace(self.task, seen=seen)
        return self.task

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
        if task.source == "squashed":
            if task.index >= len(ran.squashed) or ran.squashed[task.index].name != task.function:
                raise ModelCallError(f"{self.step.name} went another way than when its decision was found.")
            squashed = ran.squashed[task.index]
            decision = decision_of_squashed(squashed, _labels_like(batch, squashed), seen, size)
            if decision is None:
                raise ModelCallError(
                    f"{self.step.name} writes its loss out, and decides per token: which labels count cannot be told. "
                    "Call the loss function on all tokens, with ignore_index=-100, or name the batch's entry 'labels'."
                )
            return decision
        if task.source == "returned":
            loss = _returned_loss(ran.returned)
            if loss is None:
                raise ModelCallError(f"{self.step.name} went another way than when its decision was found.")
            return Decision("loss", loss.reshape(-1, 1))
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


class _Search:
    """The decision among all that a step computes, looked for while the step runs.

    Args:
        replay: what is asked for.
        model: the module.
        outputs: what the encoders have returned so far, in the autograd graph.
        trained: the parameters that are trained.
    """

    def __init__(self, replay: Replay, model: nn.Module, outputs: Outputs, trained: Sequence[Tensor]) -> None:
        self.head = _HeadOutputs(model, replay.decision)
        self._replay = replay
        self._outputs = outputs
        self._trained = trained
        self._task: Task | None = None
        self._decisions = 0
        self._similarity: tuple[int, list[int], LossCall] | None = None

    def wanted(self, losses: list[LossCall]) -> bool:
        """Whether the loss that was computed last is the decision, or its second half."""
        loss, place = losses[-1], len(losses) - 1
        if self._task is not None:
            # The second loss of a span.
            return True
        if self._outputs and not any(one.requires_grad for call in self._outputs for one in call):
            raise CutGraphError("the encoders are called where gradients are off.")
        # Two texts are compared by what comes out: each argument depends on its own alone.
        compares = loss.holds in ("similarity", "distance", "triplet", "pair")
        calls = self._calls(loss.result if compares else loss.logits) if loss.result.requires_grad else []
        if not calls:
            return False
        if loss.holds in ("similarity", "distance"):
            # A loss may follow that says what the similarities are: classes, or what they are to be.
            self._similarity = self._similarity or (place, calls, loss)
            return False
        if self._similarity is not None and _depends_on(loss.logits, [[self._similarity[2].result]]):
            if loss.holds not in ("classes", "labels"):
                place, calls, loss = self._similarity
            self._similarity = None
        self._decisions += 1
        if isinstance(self._replay.decision, str):
            if not self.head.leads_to(loss.logits):
                return False
        elif self._decisions <= self._replay.decision:
            return False
        self._task = self._made("loss", loss.name, place, calls, loss.logits)
        return not _may_be_a_start(loss, self._task.seen)

    def found(self, ran: Ran) -> Task:
        """The decision, once the step has run.

        Args:
            ran: what it computed.

        Raises:
            ModelCallError: nothing in it depends on an encoder.
        """
        stop_at = len(ran.losses)
        if self._task is not None:
            return replace(self._task, stop_at=stop_at)
        if self._similarity is not None and self._decisions == self._replay.decision:
            place, calls, loss = self._similarity
            return replace(self._made("loss", loss.name, place, calls, loss.logits), stop_at=stop_at)
        task = self._written_out(ran) or self._output(ran)
        if task is not None:
            return task
        if not self._outputs:
            raise ModelCallError(f"{self._replay.step.name} calls no encoder.")
        returned = _returned_loss(ran.returned)
        calls = self._calls(returned)
        if calls and returned is not None and not ran.outputs and self._decisions == self._replay.decision:
            return self._made("returned", "the loss that it returns", 0, calls, returned)
        what = "no loss"
        if ran.losses:
            what = "one loss, and it does not depend" if len(ran.losses) == 1 else f"{len(ran.losses)} losses, none"
        if self._decisions:
            raise ModelCallError(
                f"decision={self._replay.decision!r}: {self._replay.step.name} computes {self._decisions} losses that "
                "depend on an encoder, and this is none of them."
            )
        ending = " on an encoder." if ran.losses and len(ran.losses) == 1 else " that depends on an encoder."
        raise CutGraphError(f"{self._replay.step.name} computes {what}{ending}")

    def _written_out(self, ran: Ran) -> Task | None:
        """The last logits that are squashed on the one way from the encoders to the loss, where no loss is called."""
        loss = _returned_loss(ran.returned)
        if loss is None or self._decisions or not self._calls(loss) or isinstance(self._replay.decision, str):
            return None
        flat = [one for call in self._outputs for one in call if one.requires_grad]
        whole = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
        for place, squashed in reversed(list(enumerate(ran.squashed))):
            calls = self._calls(squashed.logits)
            if not calls:
                continue
            above: Tensor | None = torch.autograd.grad(loss, squashed.logits, retain_graph=True, allow_unused=True)[0]
            if above is None:
                continue
            through = torch.autograd.grad(squashed.logits, flat, above, retain_graph=True, allow_unused=True)
            if all(_alike(one, other) for one, other in zip(whole, through, strict=True)):
                return self._made("squashed", squashed.name, place, calls, squashed.logits)
        return None

    def _output(self, ran: Ran) -> Task | None:
        for place, output in enumerate(ran.outputs):
            logits, _, name = _named(output)
            calls = self._calls(logits)
            if calls and logits is not None:
                return self._made("output", name, place, calls, logits)
        return None

    def _calls(self, tensor: Tensor | None) -> list[int]:
        """Which calls of encoders a tensor depends on, those of encoders that are trained before others.

        None where it depends on nothing that is trained.
        """
        calls = _depends_on(tensor, self._outputs)
        if not calls or tensor is None or not self._trained:
            return calls
        if not _is_trained(tensor, self._trained):
            return []
        own = [
            call
            for call in calls
            if any(_is_trained(one, self._trained) for one in self._outputs[call] if one.requires_grad)
        ]
        return own + [call for call in calls if call not in own]

    def _made(self, source: str, function: str, index: int, calls: Sequence[int], logits: Tensor) -> Task:
        number = self._replay.encoder_call
        if number >= len(calls):
            raise ModelCallError(
                f"encoder_call={number}: the decision depends on {len(calls)} calls of encoders; choose from 0 to "
                f"{len(calls) - 1}."
            )
        call = calls[number]
        last = next(one for one in self._outputs[call] if one.requires_grad)
        rows, tokens = self._outputs[call][0].shape[:2]
        seen = Seen(
            rows,
            tokens,
            None,
            False,
            False,
            len(calls),
            _mixes_texts(logits, self._outputs),
            _chooses_texts(logits, self._outputs, rows),
            _is_by_token(logits, last),
            _is_by_column(logits, last),
        )
        return Task(source, function, index, None, call, len(calls), seen, tuple(calls))


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
        CutGraphError: an example is decided from no row.
        ModelCallError: two examples are decided from the same row, or none has a label that counts.
    """
    units = len(decision.logits)
    if not decision.logits.requires_grad:
        raise CutGraphError("the decision depends on none of the encoder's last hidden states.")
    if not bool(torch.isfinite(decision.logits.detach().amax(1)).all()):
        # A logit of minus infinity is a class that is ruled out.
        raise NonFiniteError(f"the logits of {replay.step.name} hold NaN or infinity.")
    if decision.kind == "loss" and units == 1:
        kept = torch.tensor([one for one in chunk.kept if one < len(last)])
        return Layout(torch.zeros_like(kept), kept)
    if decision.kind in BY_TOKEN:
        return _token_layout(replay, decision, chunk, last)
    wanted = torch.tensor([one for one in chunk.kept if one < units])
    if decision.kind == "choice":
        classes = decision.logits.shape[1]
        rows = torch.stack([_rows_read(decision.logits[wanted][:, place], last) for place in range(classes)], 1)
    else:
        rows = _rows_read(decision.scores(wanted), last)
    return Layout(wanted, _proven_rows(rows), labels=_plain(decision.labels))


def _token_layout(replay: Replay, decision: Decision, chunk: Chunk, last: Tensor) -> Layout:
    """The layout of a model that decides per token: one token of each example is chosen."""
    groups = _groups(decision, last)
    kept = [one for one in chunk.kept if one < len(groups)]
    chosen = [chosen_unit(decision, groups[one], replay.counts) for one in kept]
    if not any(one is not None for one in chosen):
        raise ModelCallError("no example of the batch has a label that counts, so no token of it is decided.")
    labelled = torch.tensor([one is not None for one in chosen])
    # An example without a label has no decision; any unit stands for it, and its score is left out.
    wanted = torch.tensor(
        [(groups[at] or [0])[0] if one is None else one for at, one in zip(kept, chosen, strict=True)]
    )
    rows = _rows_read(decision.scores(wanted), last)
    if not bool(labelled.all()):
        free = [row for row in range(len(last)) if row not in set(rows[labelled].tolist())]
        own = {place: at for place, (at, one) in enumerate(zip(kept, chosen, strict=True)) if one is None}
        for place, at in own.items():
            row = int(rows[place]) if groups[at] else at
            rows[place] = row if row in free else next(iter(free), -1)
            free = [one for one in free if one != int(rows[place])]
    even = len({len(group) for group in groups}) == 1 and groups[0] == list(range(decision.width or 0))
    return Layout(wanted, _proven_rows(rows), labelled, _plain(decision.labels), even)


def _proven_rows(rows: Tensor) -> Tensor:
    """Rows, each of which one example is decided from.

    Args:
        rows: (n,) or (n, c) rows of the encoder's call; -1 for none.

    Raises:
        CutGraphError: an example is decided from no row.
        ModelCallError: two examples are decided from the same row.
    """
    flat = rows.flatten().tolist()
    if min(flat, default=0) < 0:
        raise CutGraphError("the decision of an example depends on none of the encoder's last hidden states.")
    if len(set(flat)) < len(flat):
        raise ModelCallError("two examples are decided from the same text, so their saliency cannot be told apart.")
    return rows


def prove_units(decision: Decision, layout: Layout, counts: Mapping[int, int], name: str) -> None:
    """Prove that the units that are explained are those that the labels tell, on every run anew.

    Args:
        decision: what the run decided.
        layout: which units are explained.
        counts: how often each label stands in the probe.
        name: the step's name, for messages.

    Raises:
        ModelCallError: the labels tell others: a unit is shifted, or the units are in another order.
    """
    labels = _plain(decision.labels)
    if labels is not None and layout.labels is not None and not _equal(labels, layout.labels):
        raise ModelCallError(
            f"{name} decides on other labels, or in another order, than when its decision was found: a probe that is "
            "not the same each time has no figures. Draw at random in the data set, not in the step."
        )
    if decision.kind not in BY_TOKEN or labels is None:
        return
    counted = labels != decision.ignored
    for unit, known in zip(layout.units.tolist(), _all_of(layout.labelled, len(layout.units)), strict=True):
        if not known:
            continue
        right = bool(counted[unit])
        if decision.width and layout.even:
            start = unit - unit % decision.width
            own, place = slice(start, start + decision.width), unit - start
            if decision.kind == "next token":
                right = right and not bool(counted[own][place + 1 :].any())
            elif decision.kind == "token classification":
                often = [counts[label] for label in labels[own][counted[own]].tolist()]
                before = [counts[label] for label in labels[own][:place][counted[own][:place]].tolist()]
                mine = counts[int(labels[unit])]
                right = right and mine == min(often) and mine not in before
            else:
                right = right and not bool(counted[own][:place].any())
        if not right:
            raise ModelCallError(f"the token that is explained is not the one that the labels of {name} tell.")


def prove_rows(scores: Tensor, rows: Tensor, last: Tensor) -> Callable[[Tensor | None, Checks], None]:
    """Prove that each example is decided from its own row, and none from another's, on every run anew.

    Args:
        scores: (n,) in the autograd graph.
        rows: (n,) the row that each is decided from.
        last: (r, s, d) the encoder's last hidden states, in the same graph.

    Returns:
        The proof, for the gradient (r, s, d) of the sum of the scores with respect to ``last``; it raises
        ModelCallError once the checks that it is given are looked at.
    """
    # The gradient of a sum with a factor for each score is in each row the factor of the score that reads it, times the
    # gradient of the sum without.
    factors = torch.linspace(1.0, 2.0, len(scores), dtype=scores.dtype, device=scores.device)
    total = (scores * factors).sum()
    scaled: Tensor | None = torch.autograd.grad(total, last, retain_graph=True, allow_unused=True)[0]

    def prove(plain: Tensor | None, checks: Checks) -> None:
        if plain is None or scaled is None:
            return
        own, other, read = (working(one)[rows].flatten(1) for one in (plain, scaled, last.detach()))
        effect = (torch.linalg.vector_norm(own, dim=1) * torch.linalg.vector_norm(read, dim=1)).max()
        least = 8 * torch.finfo(scores.dtype).eps * scores.detach().abs().max()
        size = torch.linalg.vector_norm(other, dim=1)
        apart = torch.linalg.vector_norm(other - own * working(factors).unsqueeze(1), dim=1)
        # Neighbours' factors are 1 / (n - 1) apart.
        mixed = (apart > size * min(1e-3, 0.1 / len(scores))).any()
        checks.add(torch.stack([(own != 0).any() & (effect < least), mixed]), _refuse_mixed)

    return prove


def _refuse_mixed(found: Tensor) -> None:
    constant, mixed = found.tolist()
    if constant:
        raise ModelCallError(
            "the score is the same whatever the texts are, but for rounding (the similarity of a text with itself, "
            "say), so it has no saliency."
        )
    if mixed:
        raise ModelCallError(
            "the examples are decided from other texts than those that are shown for them, or several from one: "
            "their saliency cannot be told apart."
        )


def prove_head(ran: Ran, task: Task, decision: Decision, name: str, trained: Sequence[Tensor] = ()) -> None:
    """Prove that the decision that is read out of a run is the one that was found while it ran.

    Args:
        ran: the run in which it was found.
        task: what was found.
        decision: what was read out.
        name: the step's name, for messages.
        trained: the parameters that are trained.

    Raises:
        ModelCallError: the loss depends on the encoder by other logits than those of the decision, or these are of a
            model that is not trained.
    """
    if trained and not _is_trained(decision.logits, trained):
        raise ModelCallError(f"the logits that are explained depend on nothing that is trained: {name} has others.")
    if task.source != "loss" or decision.kind in ("loss", "similarity", "span"):
        return
    loss = ran.losses[task.index]
    found = _plain(decision.logits)
    same_size = [
        one for one in (loss.logits, loss.unscaled, loss.input) if found is not None and one.numel() == found.numel()
    ]
    if found is not None and any(_equal(_in_order(one.detach().cpu()), _in_order(found)) for one in same_size):
        return
    raise ModelCallError(f"the logits that are explained are not those that {loss.name} in {name} is called with.")


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.flatten().sort().values


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()


def _all_of(flags: Tensor | None, count: int) -> list[bool]:
    return [True] * count if flags is None else flags.tolist()


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two gradients are the same, up to rounding."""
    if one is None or other is None:
        left = one if other is None else other
        return left is None or not bool((left != 0).any())
    difference = torch.linalg.vector_norm(working(one) - working(other))
    return bool(difference <= 1e-4 * torch.linalg.vector_norm(working(one)))


def _is_trained(tensor: Tensor, trained: Sequence[Tensor]) -> bool:
    """Whether a tensor depends on parameters that are trained."""
    total = tensor.nan_to_num().float().sum()
    if not total.requires_grad:
        return False
    # The nearest parameter has a gradient, as a rule, and a short way to it; all of them take a whole backward pass.
    for count, parameter in enumerate(_parameters_behind(total, trained)):
        if count >= NEAREST:
            wanted = [one for one in trained if one.requires_grad]
            gradients = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
            return any(one is not None for one in gradients)
        if torch.autograd.grad(total, parameter, retain_graph=True, allow_unused=True)[0] is not None:
            return True
    return False


NEAREST = 4
"""So many parameters are asked for their gradient one by one."""


def _parameters_behind(tensor: Tensor, wanted: Sequence[Tensor]) -> Iterator[Tensor]:
    """Those of some parameters that a tensor was computed from, the nearest in the autograd graph first."""
    places = {id(one) for one in wanted if one.requires_grad}
    queue, seen = deque([tensor.grad_fn]), set()
    while queue:
        node = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        parameter = getattr(node, "variable", None)
        if parameter is not None and id(parameter) in places:
            yield parameter
        queue.extend(following for following, _ in node.next_functions)


def _returned_loss(returned: Any) -> Tensor | None:
    """The loss that a step returns."""
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    fits = isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()
    return loss if fits else None


def _labels_like(batch: Any, squashed: Squashed) -> Tensor | None:
    """The labels that a batch holds under a usual name, or as its one tensor that can be those of tokens."""
    shape = squashed.logits.shape
    if squashed.axis is not None:
        shape = torch.Size(size for axis, size in enumerate(shape) if axis != squashed.axis)
    named = batch if isinstance(batch, Mapping) else {}
    for name in LABELS:
        labels = named.get(name)
        if isinstance(labels, Tensor) and (labels.shape == shape or labels.numel() == shape.numel()):
            return labels
    if squashed.axis is None or len(shape) != 2:
        return None
    tensors = [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.shape == shape]
    # Ids are never negative; labels that do not count are.
    marked = [one for one in tensors if not one.is_floating_point() and bool((one == -100).any())]
    return marked[0] if len(marked) == 1 else None


def _mixes_texts(logits: Tensor, outputs: Outputs) -> bool:
    """Whether one logit compares two texts, and the others of its unit compare other texts."""
    if logits.dim() != 2:
        return False
    if logits.shape[1] < 2:
        # One pair, whose texts are compared with no other.
        return logits.shape == (1, 1) and _texts_read(logits[0, 0], outputs) > 1
    # A text's similarity with itself may be masked: one of the others still compares two.
    alone = max(_texts_read(logits[0, place], outputs) for place in range(min(3, logits.shape[1])))
    return 1 < alone < _texts_read(logits[0].sum(), outputs)


def _chooses_texts(logits: Tensor, outputs: Outputs, rows: int) -> bool | None:
    """Whether each logit of a unit is read from a text of its own; None where the shapes speak against it."""
    if logits.dim() != 2 or logits.shape[1] < 2 or logits.shape[0] * logits.shape[1] != rows:
        return None
    return _texts_read(logits[0, 0], outputs) < _texts_read(logits[0].sum(), outputs)


def _is_by_token(logits: Tensor, last: Tensor) -> bool | None:
    """Whether units are tokens: each is read from one text, and two of them from the same.

    None where there are not as many as there are texts, so that the shapes tell it.
    """
    flat = logits.reshape(-1, 1) if logits.dim() == 1 else logits
    if flat.dim() != 2 or len(flat) != len(last) or len(flat) < 2:
        return None
    read = []
    for unit in flat:
        gradient: Tensor | None = torch.autograd.grad(unit.sum(), last, retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            return None
        rows = (gradient.abs().flatten(1).amax(1) > 0).nonzero().flatten().tolist()
        if len(rows) != 1:
            return None
        read += rows
    return len(set(read)) < len(read)


def _is_by_column(logits: Tensor, last: Tensor) -> bool | None:
    """Whether each logit of a unit is read from a token of its own; None where there are not as many as tokens."""
    if logits.dim() == 3 and logits.shape[-1] == 1:
        logits = logits.squeeze(-1)
    tokens = last.shape[1]
    if logits.dim() != 2 or logits.shape != last.shape[:2] or tokens < 2:
        return None
    for place in (0, tokens - 1):
        gradient: Tensor | None = torch.autograd.grad(logits[0, place], last, retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            return False
        sizes = gradient[0].norm(dim=-1)
        if int(sizes.argmax()) != place or bool((sizes[place] <= 1.01 * sizes.roll(1)[place]).any()):
            return False
    return True


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
    watch = LossWatch(wanted, notes=True)

    def left(module: nn.Module, args: Any, output: Any) -> None:
        if _named(output)[0] is not None:
            outputs.append(output)

    def entered_encoder(module: nn.Module, args: Any) -> None:
        watch.inside += 1

    def left_encoder(module: nn.Module, args: Any, output: Any) -> None:
        watch.inside -= 1

    handles = [
        module.register_forward_hook(left)
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.base_model is not module
    ]
    for part in (part for encoder in find_encoders(model).values() for part in parts_called(encoder)):
        handles.append(part.register_forward_pre_hook(entered_encoder))
        handles.append(part.register_forward_hook(left_encoder, always_call=True))
    returned = None
    try:
        # What a step draws at random, which tokens it masks say, is the same each time.
        with random_states_kept():
            _seed()
            with watch:
                # A copy: a step may take its labels out of the batch, or write into it.
                returned = step.run(fresh(chunk.batch), chunk.part.place, chunk.part.loader)
    except LossSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if step.logits and _named(returned)[1] is None:
        outputs = [{"logits": logits_of(returned, size_of(chunk.batch))}]
    elif step.logits:
        # A span has two.
        outputs = [returned]
    elif not outputs and _named(returned)[0] is not None:
        outputs.append(returned)
    return Ran(watch.losses, watch.squashed, outputs, returned)


def _seed() -> None:
    """Begin all random numbers anew. torch.manual_seed would seed a GPU that nobody has used yet, for good."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


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
    if not scores.requires_grad:
        raise CutGraphError("the decision depends on none of the encoder's last hidden states.")
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
        whole = [list(range(start, start + decision.width)) for start in range(0, units, decision.width)]
        # A mask may have chosen as many as would fit.
        ends = torch.tensor([unit for group in whole for unit in (group[0], group[-1])])
        if decision.kind == "text to text" or decision.width == 1 or decision.width == last.shape[1]:
            return whole
        rows = _rows_read(decision.scores(ends), last).view(-1, 2)
        if bool((rows[:, 0] == rows[:, 1]).all()):
            return whole
    groups: list[list[int]] = [[] for _ in range(len(last))]
    for unit, row in enumerate(rows_by_digits(decision.scores(torch.arange(units)), last)):
        if row >= 0:
            groups[row].append(unit)
    return groups


def rows_by_digits(scores: Tensor, last: Tensor) -> list[int]:
    """The row that each of many scores depends on, by few gradients: 5 for 8 scores, 8 for 64.

    Args:
        scores: (u,) in the autograd graph.
        last: (rows, s, d) the encoder's last hidden states, in the same graph.

    Returns:
        One row per score; -1 where a score depends on no token that no other score depends on.
    """
    return rows_of_digits(digits_read(scores, last).cpu(), len(scores))


def digits_read(scores: Tensor, last: Tensor) -> Tensor:
    """Which of many scores each token is read by, (rows, s); -1 where it is none of them, or several.

    See :func:`rows_by_digits`; nothing has been looked at yet.
    """
    passes, codes = _codes_of(len(scores))
    number = torch.zeros(last.shape[:2], dtype=torch.long, device=last.device)
    for one in range(passes):
        chosen = [unit for unit, code in enumerate(codes) if code >> one & 1]
        number += _tokens_read(scores[chosen], last).long() << one
    # A token that is read by several scores has more ones than any code.
    units = torch.full((2**passes,), -1)
    units[codes] = torch.arange(len(codes))
    return units.to(last.device)[number]


def _codes_of(units: int) -> tuple[int, list[int]]:
    """Numbers of few digits, one per unit, all with as many ones: how many digits, and the numbers.

    Any two of them together have more ones than one alone, so that no third number is mistaken for them.
    """
    digits = 1
    while comb(digits, digits // 2) < units:
        digits += 1
    ones = (digits + 1) // 2
    return digits, [sum(1 << place for place in places) for places in islice(combinations(range(digits), ones), units)]


def rows_of_digits(read: Tensor, units: int) -> list[int]:
    """The row that each of many scores depends on, of what :func:`digits_read` tells, on the CPU; -1 for none."""
    rows = [-1] * units
    for row, token in reversed((read >= 0).nonzero().tolist()):
        # Of several texts of an example the first.
        rows[int(read[row, token])] = row
    return rows


def _tokens_read(scores: Tensor, last: Tensor) -> Tensor:
    """Which tokens some scores depend on, (rows, s)."""
    gradient: Tensor | None = torch.autograd.grad(scores.sum(), last, retain_graph=True, allow_unused=True)[0]
    if gradient is None:
        return torch.zeros(last.shape[:2], dtype=torch.bool, device=last.device)
    return (gradient != 0).any(-1)


def chosen_unit(decision: Decision, units: Sequence[int], counts: Counter[int]) -> int | None:
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


def seen_of(model: nn.Module, encoder: nn.Module, mask: Tensor, causal: bool, calls: int = 1) -> Seen:
    """How an encoder was called.

    Args:
        model: the module.
        encoder: the encoder in it.
        mask: (rows, s) of its call.
        causal: whether no token sees what comes after it.
        calls: how many calls of encoders the decision depends on.

    Returns:
        The call.
    """
    rows, tokens = mask.shape
    return Seen(rows, tokens, _vocabulary(model, encoder), causal, _generates(model, encoder), calls)


def _vocabulary(model: nn.Module, encoder: nn.Module) -> int | None:
    if is_torch_encoder(encoder):
        # Its embeddings stand beside it, and those of words are more than those of places or of segments.
        return max((one.num_embeddings for one in model.modules() if isinstance(one, nn.Embedding)), default=None)
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
