"""What one analysis of a batch gives.

Axes: ``b`` example, ``l`` layer, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.functional import readout_row


@dataclass(frozen=True, eq=False)
class Attributions:
    """Everything that one analysis found, detached and on the model's device.

    Attributes:
        local: method -> (b, l, q, k) map of each layer; zero at padding. Empty if only rows were kept.
        rollout: method -> (b, l, q, k) aggregated over the layers up to ``l``, up to one positive scale per example
            and layer. Empty if only rows were kept.
        log_scale: method -> (b, l) float64, natural logarithm of that scale: ``rollout * exp(log_scale)`` is the raw
            product of the maps.
        rows: method -> (b, l, k) the readout row of each rollout, or how much can flow from it to each input token.
        last: method -> (b, q, k) the rollout of the last layer.
        saliency: (b, k) L2 norm over ``d`` of gradient x input at the encoder's first hidden states.
        correlation: method -> (b, l) float64, Spearman's rho of the readout row with the saliency; NaN if undefined.
        attention_mask: (b, k) true for real tokens, after trailing padding was cut off.
        predicted: (b,) index of the class with the largest logit; 1 where a single logit is above 0.
        logits: (b, c), or (b, s, c) of a model that decides per token, as the model gave them; where it gave
            probabilities, the logits that they were made of.
        reconstruction_error: (l,) how far the decomposition is from the layers' own outputs, in two random directions,
            each relative to its own size.
        readout: which row was read: ``"cls"``, ``"last"``, ``"mean"``, ``"token"`` (one token of each example) or
            ``"weighted"`` (by how much the score depends on the tokens' last hidden states).
        normalize: whether rows were divided by their sum before the rollout.
        target: the name of the target.
        input_ids: (b, k) the token ids that the encoder was called with, or None.
        head_gradient: (b, k) length of the score's gradient with respect to the encoder's last hidden states: which
            tokens the head reads. None if it reads none of them.
        encoder: the path of the encoder in the model.
        rule: ``"post-LN"``, the paper's, or ``"pre-LN"``, ``"sublayer-norm"`` or ``"parallel"``, extensions of it.
        others: where the forward pass calls several encoders, or one several times: the attributions of the further
            calls, in call order.
        score: (b,) the score whose gradient the saliency is.
        probability: (b,) of what is predicted; NaN where the decision has none.
        position: (b,) the token that the decision is read at, where that is one token, or that it is about; else -1.
        task: the kind of decision, see :data:`globenc_lightning.task.kinds.SCORES`.
        calls: how many calls of encoders the decision depends on.
        answers: one per example: what is decided, see ``Decision.answers``.
        truths: one per example: what its label says, in the same form; empty where there is none.
        distance: whether the score of a similarity is a distance, so that less is more alike.
        decided: (b, c) the logits of the decision whose score is explained: of one token, where a model decides per
            token; (b, 0) where it is over a vocabulary of more than 1,000 entries.
        loss: (b,) of that decision, in the usual form of its kind, see ``Decision.losses``; NaN where it has none.
        references: reference -> (b, k), what the rows are compared with besides the saliency, where it was asked for;
            zero at padding.
        reference_correlation: reference -> method -> (b, l) float64, as ``correlation`` with that reference.
        reference_error: reference -> (b,) how far off it is, as a share: how much integrated gradients miss of the
            score's difference, relative to the sum of the contributions' sizes; the relative standard error of
            ``"HTA"`` by random directions, the mean over the tokens; 0 of ``"exact HTA"``.
        signed: (b, k) each token's signed contribution to the score; zero at padding. None where not asked for, and
            where the score is not linear once attention, norms and activations are held fixed.
        left_out: (b,) the score less the sum of these: what biases contribute, and whatever else is none of these
            tokens: another call of an encoder, padding that a head reads.
        aggregation: ``"rollout"``; or ``"maxflow"``, where the rows are flows, and there is no rollout, no last map and
            no scale: a flow goes from one token alone.
    """

    local: dict[str, Tensor]
    rollout: dict[str, Tensor]
    log_scale: dict[str, Tensor]
    rows: dict[str, Tensor]
    last: dict[str, Tensor]
    saliency: Tensor
    correlation: dict[str, Tensor]
    attention_mask: Tensor
    predicted: Tensor
    logits: Tensor
    reconstruction_error: Tensor
    readout: str
    normalize: bool
    target: str
    input_ids: Tensor | None
    head_gradient: Tensor | None
    encoder: str
    rule: str
    others: tuple["Attributions", ...] = ()
    score: Tensor | None = None
    probability: Tensor | None = None
    position: Tensor | None = None
    task: str = "classification"
    calls: int = 1
    answers: tuple[tuple[int, ...], ...] = ()
    truths: tuple[tuple[float, ...], ...] = ()
    distance: bool = False
    decided: Tensor | None = None
    loss: Tensor | None = None
    references: dict[str, Tensor] = field(default_factory=dict)
    reference_correlation: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    signed: Tensor | None = None
    left_out: Tensor | None = None
    aggregation: str = "rollout"
    reference_error: dict[str, Tensor] = field(default_factory=dict)

    @property
    def head_reads(self) -> str:
        """Returns ``"readout"``, ``"other tokens"`` or ``"elsewhere"``, by what the head makes its decision of."""
        if self.head_gradient is None:
            return "elsewhere"
        if self.readout not in ("cls", "last"):
            return "readout"
        mask = self.attention_mask
        row = readout_row(torch.eye(mask.shape[1], device=mask.device).expand(len(mask), -1, -1), mask, self.readout)
        outside = self.head_gradient.masked_fill(row.bool() | ~mask, 0.0)
        return "other tokens" if bool(outside.max() > 1e-6 * self.head_gradient.max()) else "readout"

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in the order they were asked for."""
        return tuple(self.correlation)

    def to_html(self, tokens: Any = None, **options: Any) -> str:
        """The last layer beside the saliency in coloured tokens; ``tokens`` is a tokenizer, or one list per example."""
        from globenc_lightning.report import notebook

        return notebook.sentences(self, tokens, **options)

    def _repr_html_(self) -> str:
        return self.to_html()
