"""Value Zeroing: how far a token's output turns when another token's value vectors are set to zero.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden, ``v`` head
width. Source: Mohebbi, Zuidema, Chrupała & Alishahi, EACL 2023, section 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from globenc_lightning.functional.rollout import normalize_rows


@torch.no_grad()
def value_zeroing(
    attention: Tensor,
    values: Tensor,
    context: Tensor,
    rest: Callable[[Tensor], Tensor],
    mask: Tensor,
    whole: Tensor | None = None,
) -> Tensor:
    """Returns the scores of one layer, (b, q, k): rows add up to 1; zero wherever ``q`` or ``k`` is padding.

    ``1 - cos(out_q, out_q without v_k)``, exactly: without the value vectors of token ``k`` each head's context vector
    lacks ``A^h_qk v^h_k``, and all that follows the attention is computed again, once for each ``k``.

    Args:
        attention: (b, h, q, k) attention probabilities.
        values: (b, h, k, v) value vectors, value bias included.
        context: (b, h, q, v) what the heads gave.
        rest: gives the layer's output (b, q, d) of the heads' context vectors.
        mask: (b, s) true for real tokens.
        whole: (b, q, d) the output of the context vectors as they are, where the caller knows it.
    """
    b, _, s, k = attention.shape
    real = mask.bool()
    outputs = _directions(rest(context) if whole is None else whole)
    scores = outputs.new_zeros(b, s, k)
    # Elsewhere than on a processor, to ask costs more than to compute what nobody needs.
    counts = real.any(0).tolist() if real.device.type == "cpu" else [True] * k
    for token in (place for place, one in enumerate(counts) if one):
        removed = attention[..., token, None] * values[:, :, token, None, :]
        without = _directions(rest(context - removed))
        # For vectors of length 1, half the square of their distance: 1 less a cosine near 1 would be rounding.
        scores[..., token] = without.sub_(outputs).square_().sum(-1) / 2
    return normalize_rows(scores.masked_fill_(~(real.unsqueeze(1) & real.unsqueeze(2)), 0.0))


def _directions(vectors: Tensor) -> Tensor:
    """Vectors (..., d) divided by their length."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.clamp(min=torch.finfo(vectors.dtype).tiny)
