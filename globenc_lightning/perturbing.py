"""Has the examples of one batch decided again on masked copies: a few forward passes, without gradients.

The copies of a batch: every token masked; random tokens masked, and these alone kept; and the same with the first
tokens of each method. A copy differs from the text in the ids that the encoder is called with, and in nothing else:
what a step does with its batch around that call (finding the last token, pooling, pairing) stays as it is.

Axes: ``n`` example, ``b`` text of the encoder's call, ``s`` token of it, ``k`` real token of an example.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from globenc_lightning.encoder.masking import by_token_id, tokens_masked
from globenc_lightning.errors import MaskingError
from globenc_lightning.explained import Explained
from globenc_lightning.functional.perturbation import Gains, first_tokens, gains, random_row, span_of
from globenc_lightning.task.fixed import fixed_score
from globenc_lightning.task.kinds import VALUES


class Masked(NamedTuple):
    """What the masked copies of a batch tell, on the CPU; NaN where an example is left out.

    Attributes:
        gains: method -> what its copies tell, (n,) each.
        span: (n,) the score of the whole text less that of the copy with every token masked.
        tokens: method -> (n, s) the tokens that it masked.
        unit: ``"probability"`` or ``"value"``.
        passes: how many forward passes it took.
        by_id: whether the tokenizer's mask token stood for masked tokens, or else none could be attended to.
    """

    gains: dict[str, Gains]
    span: Tensor
    tokens: dict[str, Tensor]
    unit: str
    passes: int
    by_id: bool


def maskable_tokens(real: Tensor, ids: Tensor, special: Sequence[Tensor | None], mask_id: int | None) -> Tensor:
    """Returns which tokens may be masked, (n, s): real ones that are neither special nor masked already.

    Where nothing tells the special tokens of an example, its first and its last token stand for them.

    Args:
        real: (n, s) true for real tokens.
        ids: (n, s) the token ids.
        special: (k,) per example: true for special tokens; None where nothing tells them.
        mask_id: the tokenizer's mask token, or None.
    """
    found = real.clone()
    for place, marks in enumerate(special):
        columns = real[place].nonzero().flatten()
        if marks is not None and len(marks) == len(columns):
            found[place, columns[marks.bool()]] = False
        elif len(columns):
            found[place, columns[[0, -1]]] = False
    return found if mask_id is None else found & (ids != mask_id)


def masked_again(
    explained: Explained,
    rows: Mapping[str, Tensor],
    real: Tensor,
    special: Sequence[Tensor | None],
    mask_id: int | None,
) -> Masked:
    """Run the masked copies of a batch: three forward passes, and two for each method.

    Args:
        explained: the decision that was explained, and the way to have it made again.
        rows: method -> (n, s) a number per token, the largest of which are masked first; on the CPU.
        real: (n, s) true for real tokens, on the CPU.
        special: (k,) per example: true for special tokens, which are never masked; None where nothing tells them.
        mask_id: the tokenizer's mask token, or None.

    Raises:
        MaskingError: what is decided cannot be decided again on masked copies.
    """
    call, whole = explained.call, explained.decision
    if call is None:
        raise MaskingError("the encoder is given no token ids (images, audio or embeddings), so no token can be masked")
    count = len(whole.logits)
    if explained.is_shared:
        raise MaskingError("what is decided of each example is not told: one loss of all of them, or a target's score")
    own = torch.arange(count) if explained.rows is None else explained.rows.cpu()
    ids = call.ids.cpu()
    mask_id = mask_id if by_token_id(call, mask_id) else None
    maskable = maskable_tokens(real, ids[own], special, mask_id)
    if explained.labelled is not None:
        # Nothing is decided of the others.
        maskable &= explained.labelled.cpu().unsqueeze(1)
    chance = torch.zeros(real.shape, dtype=torch.float64)
    for place, row in enumerate(own.tolist()):
        drawn = random_row(ids[row, real[place]].tolist())
        chance[place, real[place]] = torch.tensor(drawn, dtype=torch.float64)
    first = {method: first_tokens(row, maskable) for method, row in rows.items()}
    by_chance = first_tokens(chance, maskable)

    passes = 0

    def score(masked: Tensor) -> Tensor:
        """The scores (n,) of the copies without some tokens (n, s)."""
        nonlocal passes
        passes += 1
        where = torch.zeros(ids.shape, dtype=torch.bool)
        where[own] = masked
        decision = explained.again(partial(tokens_masked, call, where.to(call.ids.device), mask_id))
        if decision.kind != whole.kind or decision.logits.shape != whole.logits.shape:
            raise MaskingError("the step decides something else on masked copies than on the texts")
        return fixed_score(decision, whole)

    is_value = whole.kind in VALUES
    full, nothing = fixed_score(whole, whole), score(maskable)
    # Examples with one token or none have no copies of their own.
    full = full.masked_fill(maskable.sum(1) < 2, float("nan"))
    without_random, random_alone = score(by_chance), score(maskable & ~by_chance)
    found = {
        method: gains(
            full, nothing, (score(masked), without_random), (score(maskable & ~masked), random_alone), is_value
        )
        for method, masked in first.items()
    }
    unit = "value" if is_value else "probability"
    return Masked(found, span_of(full, nothing, is_value)[0], first, unit, passes, mask_id is not None)
