"""Signed contributions of the tokens to a score: one more forward and backward pass through the frozen network.

DecompX (Modarressi et al., ACL 2023) without biases. ``encoder/frozen.py`` makes the network linear; here it is run,
and what comes out is proven: the scores are those of the analysis, and the contributions of tokens and biases add up to
them.

Axes: ``b`` example, ``k`` token, ``d`` hidden.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from globenc_lightning.encoder.checks import Checks
from globenc_lightning.encoder.contexts import OwnContexts
from globenc_lightning.encoder.frozen import FrozenNetwork
from globenc_lightning.encoder.norms import tolerance, working
from globenc_lightning.encoder.precision import LOW, FullPrecision, exact_products
from globenc_lightning.encoder.reading import EncoderCall, Skipped, read
from globenc_lightning.encoder.structure import Structure
from globenc_lightning.encoder.undisturbed import undisturbed
from globenc_lightning.errors import GlobEncError, is_out_of_memory

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How much of all contributions may be missing in their sum, for rounding."""


class Scored(Protocol):
    """What is decided on a batch: a score for each example, (n,), and what is differentiated, ()."""

    @property
    def scores(self) -> Tensor: ...  # noqa: D102

    @property
    def total(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Signed:
    """What each token contributes to the score of its example.

    Attributes:
        scores: (b, k) of each call of an encoder that is read, in units of the score; zero at padding. Empty where they
            are refused.
        reason: why there are none, in words; empty where there are.
    """

    scores: list[Tensor] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Network:
    """A model and how it is called.

    Attributes:
        model: the user's module.
        structures: what the structure pass found, one per call of an encoder.
        call: runs the model on a batch.
        judge: the scores of what that gave.
        written: the names of parameters that its forward writes into.
        connected: whether the autograd graph is kept connected.
    """

    model: nn.Module
    structures: tuple[Structure | Skipped, ...]
    call: Callable[[Any], Any]
    judge: Callable[[Any, tuple[EncoderCall, ...], OwnContexts, Checks], Scored]
    written: set[str]
    connected: bool


def signed_scores(network: Network, texts: Any, scores: Tensor, kind: str, *, own_target: bool = False) -> Signed:
    """Compute signed contributions, or say why there are none.

    Args:
        network: the model, as the analysis has run it.
        texts: the batch.
        scores: (n,) what the analysis found.
        kind: the kind of decision, for the words of a refusal.
        own_target: whether the score is the user's own target.

    Returns:
        The contributions, proven to add up.
    """
    try:
        return _proven(network, texts, scores, "target" if own_target else kind)
    except Exception as error:
        if is_out_of_memory(error):
            # Smaller batches may fit: the caller's to decide.
            raise
        # Whatever fails here, the figures of the analysis itself are not lost with it.
        told = str(error) if isinstance(error, GlobEncError) else f"{type(error).__name__}: {error}"
        return Signed(reason=f"the network with attention, norms and activations held fixed cannot be run: {told}")


def _proven(network: Network, texts: Any, scores: Tensor, kind: str) -> Signed:
    frozen, checks = FrozenNetwork(), Checks()
    contexts = OwnContexts(network.model, connected=network.connected)
    types = {one.dtype for one in network.model.parameters() if one.is_floating_point()}
    with ExitStack() as stack:
        handles = stack.enter_context(
            undisturbed(network.model, parameters_require_grad=False, written=network.written)
        )
        stack.enter_context(exact_products())
        with ExitStack() as forward:
            forward.enter_context(frozen)
            if not types.isdisjoint(LOW):
                # What rounding in half precision loses could not be told from what was not made linear.
                devices = {one.device.type for one in network.model.parameters()} - {"meta"} | {"cpu"}
                forward.enter_context(FullPrecision(devices))
            result = read(
                network.model, network.structures, network.call, texts, lambda _: None, handles, contexts, checks
            )
        judged = network.judge(result.output, result.calls, contexts, checks)
        if not judged.total.requires_grad:
            return Signed(reason=_no_way(kind))
        sources = [call.hidden for call in result.calls]
        with frozen.counting(sources):
            gradients = torch.autograd.grad(judged.total, sources, allow_unused=True)
    given = [working(one.hidden) for one in result.calls]
    parts = [
        torch.zeros(one.shape[:2], dtype=one.dtype, device=one.device)
        if gradient is None
        else (working(gradient) * one).sum(-1)
        for gradient, one in zip(gradients, given, strict=True)
    ]
    masks = [call.mask for call in result.calls]
    return _checked(judged, parts, masks, frozen, checks, scores, types, kind)


def _checked(
    judged: Scored,
    parts: Sequence[Tensor],
    masks: Sequence[Tensor],
    frozen: FrozenNetwork,
    checks: Checks,
    scores: Tensor,
    types: set[torch.dtype],
    kind: str,
) -> Signed:
    """The contributions (b, k) of all tokens, padding included, once they are found to add up."""
    # A row without a real token may hold NaN, and is nobody's.
    parts = [torch.where(mask.any(1, keepdim=True), one, 0.0) for mask, one in zip(masks, parts, strict=True)]
    signed = [torch.where(mask, one, 0.0) for mask, one in zip(masks, parts, strict=True)]
    added = torch.stack(frozen.added) if frozen.added else judged.total.new_zeros(1)
    looked = [judged.total.detach(), judged.scores.detach(), scores, added, *parts]
    total, again, expected, constants, *tokens = [one.double() for one in checks.settle(*looked)]
    size = constants.abs().sum() + sum(one.abs().sum() for one in tokens)
    missing = float(total - constants.sum() - sum(one.sum() for one in tokens))
    # Some norms compute in float32 whatever they are given.
    precision = torch.float64 if frozen.types == {torch.float64} else torch.float32
    allowed = ALLOWED[precision] * float(size)
    # Written so that NaN is refused.
    if not abs(missing) <= allowed:
        return Signed(reason=_missing(missing, float(total), frozen.odd, kind))
    far = tolerance(*(types or {torch.float32})) * float(expected.abs().max().clamp(min=1.0)) if len(expected) else 0.0
    if len(expected) and not float((again - expected).abs().max()) <= far:
        return Signed(reason="the forward pass gave other scores when it was run a second time on the same examples")
    return Signed(signed)


_WHY = {
    "target": "target= has to be linear in the logits, a logit or a difference of two, say",
    "similarity": "a similarity multiplies the vectors of two texts, and no part of it belongs to one of them",
    "loss": "a loss is not linear in the logits; what is explained has to be a logit or a value",
}


def _no_way(kind: str) -> str:
    return f"the score does not depend on the hidden states once attention is held fixed{_because(kind, [])}"


def _missing(missing: float, total: float, odd: Sequence[str], kind: str) -> str:
    return (
        "the contributions of tokens and biases do not add up to the score, which would have to be linear in the first "
        f"hidden states with attention, norms and activations held fixed: {missing:.3g} of {total:.3g} is missing"
        f"{_because(kind, odd)}"
    )


def _because(kind: str, odd: Sequence[str]) -> str:
    why = _WHY.get(kind, "")
    if odd and (not why or kind == "target"):
        # A target may be a logit.
        why = f"on the way to the score stands {', '.join(odd[:3])}"
    return f" ({why})" if why else ""
