"""Kinds of decision: which logits a loss or an output holds, and the score of an example that is explained.

Axes: ``b`` example, ``u`` unit (one decision: an example, or one of its tokens), ``c`` class, ``s`` token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from globenc_lightning.task.watching import LossCall, Squashed

SCORES = {
    "classification": "logit of the largest class",
    "binary": "the logit",
    "multi-label": "logit of the label with the largest probability",
    "regression": "the value",
    "token classification": "logit of the largest class, at the labelled token whose label is rarest in the probe",
    "masked token": "logit of the largest token, at the first labelled position",
    "next token": "logit of the largest token, at the last labelled position",
    "span": "largest start logit + largest end logit",
    "choice": "logit of the largest choice, in that choice's text",
    "similarity": "similarity of the example with its partner",
    "text to text": "logit of the largest token, at the first labelled position of the decoder",
    "loss": "the loss",
}
"""Every kind of decision, and the score that is explained by default, in words."""

VALUES = ("regression", "similarity", "loss")
"""Kinds that give a value, which is neither right nor wrong."""

BY_TOKEN = ("token classification", "masked token", "next token", "text to text")
"""Kinds that decide once per token, so that one token of each example has to be chosen."""


@dataclass(frozen=True, eq=False)
class Decision:
    """What one run of a step decided.

    Attributes:
        kind: one of ``SCORES``.
        logits: (u, c), in the autograd graph; the values (u, 1) of a regression, the similarities of a pair.
        labels: (u,) class indices, (u, c) for several labels or values, or None.
        ends: (u, s) logits of a span's end, whose starts the logits are; or None.
        end_labels: (u,) the labels of the ends, or None.
        ignored: the label that does not count.
        distance: whether a similarity is a distance, so that less is more alike.
        width: how many units one encoder row gives: 1, or the number of its tokens (one less where the text is
            shifted); None where a mask chose them.
    """

    kind: str
    logits: Tensor
    labels: Tensor | None = None
    ends: Tensor | None = None
    end_labels: Tensor | None = None
    ignored: int = -100
    distance: bool = False
    width: int | None = 1

    def scores(self, units: Tensor, chosen: Sequence[Tensor] | None = None) -> Tensor:
        """The score of each unit, (n,), in the autograd graph.

        Args:
            units: (n,) the units.
            chosen: which logits the scores are, as :meth:`chosen` tells it of another run; the largest when None.
        """
        logits = self.logits[units]
        if self.kind == "span" and self.ends is not None:
            both = (logits, self.ends[units])
            if chosen is None:
                return both[0].amax(1) + both[1].amax(1)
            return _gathered(both[0], chosen[0]) + _gathered(both[1], chosen[1])
        if self.kind == "similarity" and logits.shape[1] > 1:
            return logits.gather(1, self._partners(units).unsqueeze(1)).squeeze(1)
        if logits.shape[1] == 1:
            return logits[:, 0]
        return logits.amax(1) if chosen is None else _gathered(logits, chosen[0])

    def chosen(self, units: Tensor) -> tuple[Tensor, ...]:
        """Which logits the scores of the units are, (n,): those of the starts, then of the ends, of a span."""
        ends = () if self.ends is None else (self.ends[units].detach().argmax(1),)
        return (self.logits[units].detach().argmax(1), *ends)

    def predicted(self, units: Tensor) -> Tensor:
        """(n,) the class, label, token, choice or start that is decided for; 1 where a single logit is above 0."""
        logits = self.logits[units].detach()
        if logits.shape[1] == 1:
            yes_or_no = self.kind in ("binary", *BY_TOKEN)
            return (logits[:, 0] > 0).long() if yes_or_no else torch.zeros(len(units), dtype=torch.long)
        return logits.argmax(1)

    def probability(self, units: Tensor) -> Tensor:
        """(n,) the probability of what is predicted: softmax of classes, sigmoid of labels; NaN where there is none."""
        logits = self.logits[units].detach().float()
        if self.kind == "binary" or (self.kind in BY_TOKEN and logits.shape[1] == 1):
            return torch.sigmoid(logits[:, 0])
        if self.kind == "multi-label":
            return torch.sigmoid(logits).amax(1)
        if self.kind in VALUES:
            return torch.full((len(units),), float("nan"))
        found = logits.softmax(1).amax(1)
        if self.kind == "span" and self.ends is not None:
            found = found * self.ends[units].detach().float().softmax(1).amax(1)
        return found

    def label(self, units: Tensor) -> Tensor | None:
        """What the labels of the units are, (n,) or (n, c), or None."""
        if self.labels is None:
            return None
        return self.labels[units]

    def answers(self, units: Tensor) -> list[tuple[int, ...]]:
        """What each unit is decided to be: a class, token or choice; every label that holds; a span's start and end."""
        if self.kind in VALUES:
            return [() for _ in units]
        if self.kind == "multi-label":
            return [tuple(one.nonzero().flatten().tolist()) for one in (self.logits[units].detach() > 0).cpu()]
        first = self.predicted(units).tolist()
        if self.kind == "span" and self.ends is not None:
            ends = self.ends[units].detach().argmax(1).tolist()
            return list(zip(first, ends, strict=True))
        return [(one,) for one in first]

    def truths(self, units: Tensor) -> list[tuple[float, ...]]:
        """What each unit is labelled as, in the form of :meth:`answers`; a value's target; nothing where unknown."""
        labels = self.label(units)
        if labels is None or self.kind in ("similarity", "loss"):
            return [() for _ in units]
        labels = labels.detach().cpu()
        if self.kind == "multi-label" and labels.dim() == 2:
            return [tuple(one.nonzero().flatten().tolist()) for one in labels > 0.5]
        if labels.dim() == 2:
            # Probabilities of classes, a teacher's say.
            return [(int(one),) for one in labels.argmax(1)]
        if self.kind == "span" and self.end_labels is not None:
            return list(zip(labels.tolist(), self.end_labels.detach().cpu()[units.cpu()].tolist(), strict=True))
        if self.kind == "regression":
            return [(float(one),) for one in labels]
        if self.kind == "binary":
            # Smoothed labels are none of 0 and 1.
            return [(int(one > 0.5),) for one in labels]
        return [(int(one),) for one in labels]

    def losses(self, units: Tensor) -> Tensor:
        """(n,) the loss of each unit in the usual form of its kind, whatever weights the user's own loss has.

        Cross entropy of classes, of a span's starts plus its ends; binary cross entropy, the mean over several labels;
        the squared error of a value; the loss itself. NaN where there is no label that counts, and for similarities.
        """
        logits = self.logits[units].detach().float()
        nothing = torch.full((len(units),), float("nan"), device=logits.device)
        labels = self.label(units)
        if self.kind == "loss":
            return logits[:, 0]
        if labels is None or self.kind == "similarity":
            return nothing
        labels = labels.to(logits.device)
        if self.kind == "regression":
            return (logits[:, 0] - labels.float()).square()
        if self.kind in ("binary", "multi-label") or logits.shape[1] == 1:
            if labels.numel() != logits.numel():
                return nothing
            known = (labels != self.ignored).reshape(logits.shape)
            entropy = F.binary_cross_entropy_with_logits(logits, labels.reshape(logits.shape).float(), reduction="none")
            return torch.where(known, entropy, float("nan")).nanmean(1)
        found = _cross_entropy(logits, labels, self.ignored)
        if self.kind == "span" and self.ends is not None:
            ends = None if self.end_labels is None else self.end_labels[units].to(logits.device)
            later = self.ends[units].detach().float()
            found = nothing if ends is None else found + _cross_entropy(later, ends, self.ignored)
        return found

    def of(self, units: Tensor) -> "Decision":
        """Returns the decision on some units (n,) alone, in their order: a unit's number is its place among them."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[units]

        logits, labels = self.logits[units], self.labels
        paired = self.kind == "similarity" and logits.shape[1] > 1
        labels = self._partners(units) if paired else part(labels)
        return replace(self, logits=logits, labels=labels, ends=part(self.ends), end_labels=part(self.end_labels))

    def _partners(self, units: Tensor) -> Tensor:
        if self.labels is None or self.labels.dim() != 1:
            return units.to(self.logits.device)
        return self.labels[units].long().to(self.logits.device)


def _gathered(logits: Tensor, chosen: Tensor) -> Tensor:
    """(n,) one of the logits (n, c) of each unit."""
    return logits.gather(1, chosen.unsqueeze(1)).squeeze(1)


def _cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """(n,) of logits (n, c) and class indices (n,) or probabilities (n, c); NaN where a label does not count."""
    if labels.shape == logits.shape and labels.is_floating_point():
        return -(labels.float() * logits.log_softmax(1)).sum(1)
    counts = (labels != ignored) & (labels >= 0) & (labels < logits.shape[1])
    found = -logits.log_softmax(1).gather(1, labels.long().where(counts, 0).unsqueeze(1)).squeeze(1)
    return torch.where(counts, found, float("nan"))


@dataclass(frozen=True)
class Seen:
    """How an encoder was called in a step.

    Attributes:
        rows: the number of its texts.
        tokens: the number of tokens of each, padding included.
        vocabulary: how many words it knows, or None.
        causal: whether no token sees what comes after it.
        generates: whether a decoder follows it.
        calls: how many calls of encoders the decision depends on.
        mixes: whether one logit compares two texts, and others of its unit compare other texts: similarities.
        chooses: whether each logit of a unit is read from a text of its own: choices.
        by_token: whether units are tokens, some of which are of one text; None where the shapes tell it.
        by_column: whether each logit of a unit is read from a token of its own; None where the shapes tell it.
    """

    rows: int
    tokens: int
    vocabulary: int | None
    causal: bool
    generates: bool
    calls: int
    mixes: bool = False
    chooses: bool | None = None
    by_token: bool | None = None
    by_column: bool | None = None


def decision_of(losses: Sequence[LossCall], seen: Seen, size: int | None) -> Decision:
    """The kind of decision that a loss is of, told by its function and the shapes of its arguments.

    Args:
        losses: the loss, and the one after it where that is computed alike (the two of a span).
        seen: how the encoder was called.
        size: the number of examples in the batch, if the batch tells it.

    Returns:
        The decision.
    """
    loss = losses[0]
    logits, target = loss.logits, loss.target if isinstance(loss.target, Tensor) else None
    if loss.holds == "classes" and logits.dim() >= 1 and target is not None:
        found = _of_classes(losses, logits, target, seen, size)
    elif loss.holds == "labels":
        found = _of_labels(logits, target, seen, size)
    elif loss.holds == "values":
        # A value that is squeezed into a range is the value all the same.
        found = _of_values(loss.input, target, seen, size)
    elif loss.holds in ("similarity", "distance", "triplet", "pair"):
        found = _of_pairs(loss)
    else:
        found = None
    return found or Decision("loss", _by_example(loss.result, seen, size))


def _by_example(losses: Tensor, seen: Seen, size: int | None) -> Tensor:
    """The loss of each example, (b, 1), the mean of its losses where it has several; all as they are where none has."""
    if losses.dim() > 1 and len(losses) in (seen.rows, size):
        losses = losses.flatten(1).mean(1)
    return losses.reshape(-1, 1)


def decision_of_squashed(squashed: Squashed, labels: Tensor | None, seen: Seen, size: int | None) -> Decision | None:
    """The kind of decision of a loss that a step writes out, told by the logits that it made probabilities of.

    Args:
        squashed: the logits.
        labels: what the batch holds under a usual name and in a fitting shape, where the probabilities were not
            gathered by an index.
        seen: how the encoder was called.
        size: the number of examples in the batch, if the batch tells it.

    Returns:
        The decision; None where logits alone do not tell it (a model that decides per token, and no labels).
    """
    logits = squashed.logits
    if squashed.holds == "labels" or squashed.axis is None:
        fits = labels is not None and labels.numel() == logits.numel()
        return _of_labels(logits, labels if fits else None, seen, size)
    logits = logits.movedim(squashed.axis, -1)
    units = logits.shape[:-1]
    # What the batch calls labels tells which do not count; an index to gather by has no such ones.
    known = [one for one in (labels, squashed.target) if one is not None and one.shape == units]
    target = known[0] if known else None
    if logits.dim() == 2 and not seen.by_token:
        decision = _of_examples(logits, target, seen, size, -100)
        if decision is not None:
            return decision
    if target is None:
        return None
    return _by_token(logits.flatten(0, -2), target.flatten(), seen, -100, units[1:].numel() if len(units) > 1 else None)


def decision_of_output(
    logits: Tensor, ends: Tensor | None, labels: Tensor | None, seen: Seen, size: int | None
) -> Decision | None:
    """The kind of decision of a model's named outputs, where a step computes no loss.

    Args:
        logits: the output's ``logits`` or ``start_logits``.
        ends: its ``end_logits``, or None.
        labels: the labels, if any are known.
        seen: how the encoder was called.
        size: the number of examples in the batch, if the batch tells it.

    Returns:
        The decision; None where logits alone do not tell it (a model that decides per token, and no labels).
    """
    if ends is not None:
        return Decision("span", logits.flatten(0, -2), ends=ends.flatten(0, -2))
    if logits.dim() == 3:
        return None if labels is None else _by_token(logits.flatten(0, 1), labels.flatten(), seen, -100)
    if logits.dim() == 1:
        logits = logits.unsqueeze(1)
    if logits.dim() != 2:
        return None
    if logits.shape[1] == 1:
        kind = "regression" if labels is not None and labels.is_floating_point() else "binary"
        return Decision(kind, logits, labels)
    if _chooses(logits, seen):
        return Decision("choice", logits, labels)
    several = labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return Decision("multi-label" if several else "classification", logits, labels)


def _of_classes(
    losses: Sequence[LossCall], logits: Tensor, target: Tensor, seen: Seen, size: int | None
) -> Decision | None:
    loss = losses[0]
    if logits.dim() == 1:
        logits, target = logits.unsqueeze(0), target.reshape(1, *target.shape)
    if logits.dim() > 2:
        shared = target.is_floating_point() and target.shape == logits.shape
        # (b, c, s): the classes come second. kl_div, and targets that are probabilities, may have them last.
        last = loss.name == "kl_div"
        logits = logits if last else logits.movedim(1, -1)
        target = (target if last else target.movedim(1, -1)) if shared else target
        inner = logits.shape[1:-1].numel()
        logits = logits.flatten(0, -2)
        target = target.flatten(0, -2) if shared else target.flatten()
        return _by_token(logits, target, seen, loss.ignored, inner)
    other = losses[1] if len(losses) > 1 else None
    if (
        other is not None
        and logits.shape == (seen.rows, seen.tokens) == tuple(other.logits.shape)
        and other.holds == "classes"
        and isinstance(other.target, Tensor)
        and seen.by_column is not False
    ):
        return Decision("span", logits, target, other.logits, other.target, loss.ignored)
    if seen.mixes:
        return Decision("similarity", loss.unscaled, target, ignored=loss.ignored)
    if loss.name == "kl_div" and loss.unscaled.shape == logits.shape:
        # Both models' logits are divided by a temperature, which is none of the student's.
        logits = loss.unscaled
    decision = None if seen.by_token else _of_examples(logits, target, seen, size, loss.ignored)
    return decision or _by_token(logits, target, seen, loss.ignored)


def _of_examples(logits: Tensor, target: Tensor | None, seen: Seen, size: int | None, ignored: int) -> Decision | None:
    """The kind of decision of logits (u, c), where each unit is an example; None where it is a token."""
    units = len(logits)
    if seen.mixes:
        return Decision("similarity", logits, target, ignored=ignored)
    if units == seen.rows:
        return Decision("classification", logits, target, ignored=ignored)
    if _chooses(logits, seen):
        return Decision("choice", logits, target, ignored=ignored)
    if units == size and seen.rows % units == 0:
        return Decision("classification", logits, target, ignored=ignored)
    return None


def _chooses(logits: Tensor, seen: Seen) -> bool:
    """Whether logits (u, c) are choices: each is read from a text of its own."""
    fits = logits.shape[0] * logits.shape[1] == seen.rows and logits.shape[1] > 1
    # Two classes of pairs that are encoded in one call have as many texts.
    return fits and not seen.generates and seen.chooses is not False


def _by_token(logits: Tensor, target: Tensor, seen: Seen, ignored: int, inner: int | None = None) -> Decision:
    units, classes = logits.shape
    width = inner if inner is not None else (units // seen.rows if units % seen.rows == 0 else None)
    kind = "token classification"
    if seen.generates:
        kind = "text to text"
    elif seen.vocabulary is not None and classes >= seen.vocabulary:
        kind = "next token" if seen.causal else "masked token"
    return Decision(kind, logits, target if target.dim() == 1 else target.argmax(1), ignored=ignored, width=width)


def _of_labels(logits: Tensor, target: Tensor | None, seen: Seen, size: int | None) -> Decision | None:
    flat = None if target is None or target.numel() != logits.numel() else target.reshape(-1)
    if logits.dim() == 0:
        logits = logits.reshape(1)
    if logits.dim() == 3 and logits.shape[-1] == 1:
        logits = logits.squeeze(-1)
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        if flat is not None and (seen.by_token or not _is_by_example(len(logits), seen, size)):
            # One logit per token, of those that count.
            return _by_token(logits.reshape(-1, 1), flat.long(), seen, -100)
        return Decision("binary", logits.reshape(-1, 1), flat)
    if logits.dim() == 2 and seen.by_column and flat is not None and logits.shape == (seen.rows, seen.tokens):
        return _by_token(logits.reshape(-1, 1), flat.long(), seen, -100, seen.tokens)
    if logits.dim() == 2:
        return Decision("multi-label", logits, target)
    return None


def _is_by_example(units: int, seen: Seen, size: int | None) -> bool:
    return size is None or units in (seen.rows, size)


def _of_values(values: Tensor, target: Tensor | None, seen: Seen, size: int | None) -> Decision | None:
    if values.dim() > 2 or (values.dim() == 2 and values.shape[1] > 1) or seen.by_token:
        return None
    if values.dim() and not _is_by_example(len(values), seen, size):
        return None
    fits = target is not None and target.numel() == values.numel()
    return Decision("regression", values.reshape(-1, 1), target.reshape(-1) if target is not None and fits else None)


def _of_pairs(loss: LossCall) -> Decision | None:
    if loss.holds == "triplet":
        if not isinstance(loss.target, Tensor):
            return None
        return Decision("similarity", F.pairwise_distance(loss.input, loss.target).reshape(-1, 1), distance=True)
    if loss.holds == "pair":
        if not isinstance(loss.target, Tensor):
            return None
        return Decision("similarity", F.cosine_similarity(loss.input, loss.target).reshape(-1, 1))
    if loss.result.dim() == 1:
        return Decision("similarity", loss.result.unsqueeze(1), distance=loss.holds == "distance")
    if loss.result.dim() == 2 and loss.result.shape[0] == loss.result.shape[1]:
        return Decision("similarity", loss.result)
    return None


def detached(decision: Decision) -> Decision:
    """The decision without the autograd graph, on the CPU."""

    def plain(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().cpu()

    return replace(
        decision,
        logits=decision.logits.detach().cpu(),
        labels=plain(decision.labels),
        ends=plain(decision.ends),
        end_labels=plain(decision.end_labels),
    )
