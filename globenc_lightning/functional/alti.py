"""ALTI: how close each token's contribution is to what the layer makes of all of them.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden, ``v`` head
width. Source: Ferrando, Gállego & Costa-jussà, EMNLP 2022, section 3. Its L1 distance is no quadratic form, so that the
vectors have to be there; never more of them at once than a device works on anyway.
"""

import torch
from torch import Tensor

from globenc_lightning.functional.attribution import FrozenNorm, chunks
from globenc_lightning.functional.devices import chunk_of
from globenc_lightning.functional.rollout import normalize_rows


@torch.no_grad()
def alti(
    attention: Tensor,
    values: Tensor,
    projection: Tensor,
    residual: Tensor,
    output: Tensor,
    mask: Tensor,
    norm: FrozenNorm | None = None,
    divided: Tensor | None = None,
) -> Tensor:
    """Returns the contributions of one layer, (b, q, k): rows add up to 1; zero wherever ``q`` or ``k`` is padding.

    With ``T_qk`` the part of the output that comes from token ``k`` (the attention's vector and, on the diagonal, the
    residual, through the frozen norm after them), and ``y_q`` the output, ``max(0, |y_q|_1 - |y_q - T_qk|_1)`` divided
    by its sum over ``k``.

    Args:
        attention: (b, h, q, k) attention probabilities.
        values: (b, h, k, v) value vectors, value bias included.
        projection: (d, h * v) weight of the output projection.
        residual: (b, q, d) what the residual connection adds to the attention's output.
        output: (b, q, d) ``y_q``: what leaves LayerNorm 1 (post-LN), or the stream after the attention.
        mask: (b, s) true for real tokens.
        norm: LayerNorm 1 with its statistics frozen (post-LN), or None.
        divided: (b, q) what the attention's vectors are divided by (a norm on the attention's output), or None.
    """
    b, h, s, v = values.shape
    d = projection.shape[0]
    if norm is not None:
        # The norm of a sum of vectors is the sum of the norms: its centring and weight act on the weights.
        projection, residual = _through(projection.T, norm).T, _through(residual, norm)
    scale = residual.new_ones(b, s) if norm is None else norm.scale
    if divided is not None:
        residual = residual * divided.unsqueeze(-1)
        scale = scale * divided
    # All of it times what it is divided by, which depends on the receiving token alone.
    target = output * scale.unsqueeze(-1)
    distance = attention.new_empty(b, s, s)
    by_head = projection.view(d, h, v).permute(1, 2, 0)
    for examples, tokens in chunks(b, s, d * (s + 2 * h), chunk_of(attention.device)):
        # (e, t, h, d): of some examples and attended tokens, the heads' vectors.
        vectors = torch.matmul(values[examples, :, tokens], by_head).transpose(1, 2)
        weights = attention[examples, :, :, tokens].permute(0, 3, 2, 1)
        missing = torch.matmul(weights, vectors).sub_(target[examples].unsqueeze(1))
        distance[examples, :, tokens] = torch.linalg.vector_norm(missing, 1, dim=-1).transpose(1, 2)
    seen = torch.diagonal(attention, dim1=2, dim2=3).transpose(1, 2).unsqueeze(-1) * values.transpose(1, 2)
    own = torch.addmm(residual.flatten(0, 1), seen.reshape(b * s, -1), projection.T).view_as(residual)
    torch.diagonal(distance, dim1=1, dim2=2).copy_(torch.linalg.vector_norm(own - target, 1, dim=-1))
    whole = torch.linalg.vector_norm(target, 1, dim=-1)
    shares = ((whole.unsqueeze(-1) - distance) / scale.unsqueeze(-1)).clamp_(min=0)
    real = mask.bool()
    return normalize_rows(shares.masked_fill_(~(real.unsqueeze(1) & real.unsqueeze(2)), 0.0))


def _through(vectors: Tensor, norm: FrozenNorm) -> Tensor:
    """Vectors (..., d) through a frozen norm, but for the division by its scale."""
    vectors = vectors - vectors.mean(-1, keepdim=True) if norm.centered else vectors
    return vectors if norm.weight is None else vectors * norm.weight
