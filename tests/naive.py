"""GlobEnc from its definition: every vector is built, (q, k, d) for each example, and nothing is clever.

Written from the formulas alone and shared with nothing in the package, so that the two can only agree by being right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """A LayerNorm, or an RMSNorm if not ``centered``.

    ``real`` (b, q, d) is the vector that enters it in the model's forward pass; None for the first norm after the
    attention, whose input is derived.
    """

    weight: Tensor | None
    eps: float = 1e-12
    centered: bool = True
    real: Tensor | None = None

    def deviation(self, real: Tensor) -> Tensor:
        """(..., d) -> (..., 1)."""
        if self.centered:
            real = real - real.mean(-1, keepdim=True)
        return (real.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def linear(self, vectors: Tensor, real: Tensor) -> Tensor:
        """``lin(vectors; self, real)``: vectors (q, k, d) with the statistics of real (q, d)."""
        if self.centered:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        vectors = vectors / self.deviation(real).unsqueeze(1)
        return vectors if self.weight is None else vectors * self.weight


def local_maps(
    attention: Tensor,
    values: Tensor,
    projection: Tensor,
    projection_bias: Tensor | None,
    residual: Tensor,
    norms: Sequence[Norm],
    mask: Tensor,
    first_norms: int = 1,
    own_norm: Norm | None = None,
    numbers: Sequence[float] = (1, 1, 1),
) -> dict[str, Tensor]:
    """All eight maps (b, q, k) of one layer.

    attention (b, h, q, k), values (b, h, k, v), projection (d, h * v), projection_bias (d,), residual (b, q, d),
    mask (b, s). ``norms`` are those of N-Enc in the order of the forward pass; N-ResLN takes the ``first_norms`` of
    them. ``own_norm`` is one that the attention's output passes before the residual is added. ``numbers`` are what the
    attention's output, the residual and what leaves the first of two norms are multiplied by. Each example is cut to
    its real tokens first, so padding cannot have an influence.
    """
    maps: dict[str, Tensor] = {}
    for example in range(len(mask)):
        kept = mask[example].bool().nonzero().squeeze(1)
        single = _single(
            attention[example][:, kept][:, :, kept],
            values[example][:, kept],
            projection,
            projection_bias,
            residual[example, kept],
            [(norm, None if norm.real is None else norm.real[example, kept]) for norm in norms],
            first_norms,
            own_norm,
            None if own_norm is None or own_norm.real is None else own_norm.real[example, kept],
            numbers,
        )
        for method, matrix in single.items():
            padded = maps.setdefault(method, matrix.new_zeros(*mask.shape, mask.shape[1]))
            padded[example, kept.unsqueeze(1), kept] = matrix
    return maps


def _single(
    attention: Tensor,
    values: Tensor,
    projection: Tensor,
    projection_bias: Tensor | None,
    residual: Tensor,
    norms: Sequence[tuple[Norm, Tensor | None]],
    first_norms: int,
    own_norm: Norm | None,
    entered_own: Tensor | None,
    numbers: Sequence[float],
) -> dict[str, Tensor]:
    heads, tokens, width = values.shape
    identity = torch.eye(tokens, dtype=attention.dtype)

    alone = attention.new_zeros(tokens, tokens, len(projection))  # a_qk
    for head in range(heads):
        transformed = values[head] @ projection[:, head * width : (head + 1) * width].T  # t^h_k
        alone += attention[head].unsqueeze(-1) * transformed
    if own_norm is not None and entered_own is not None:
        alone = own_norm.linear(alone, entered_own)
    alone = numbers[0] * alone
    with_residual = alone + numbers[1] * identity.unsqueeze(-1) * residual.unsqueeze(1)  # r_qk

    enters_first_norm = with_residual.sum(1)  # p1_q
    if projection_bias is not None:
        enters_first_norm = enters_first_norm + numbers[0] * projection_bias
    after = [with_residual]
    for norm, real in norms:
        entering = numbers[2] * after[-1] if len(after) == 2 else after[-1]  # of two norms, the second
        after.append(norm.linear(entering, enters_first_norm if real is None else real))
    encoded = after[-1]

    weights = attention.mean(0)
    mixture = torch.zeros_like(identity)
    for query in range(tokens):
        preserving = encoded[query, query]
        others = torch.arange(tokens) != query
        ratio = torch.zeros((), dtype=attention.dtype)
        if weights[query, others].sum() > 0:  # a token that attends to itself alone mixes nothing
            mixing = encoded[query, others].sum(0)
            ratio = mixing.norm() / (mixing.norm() + preserving.norm())
            mixture[query, others] = ratio * weights[query, others] / weights[query, others].sum()
        mixture[query, query] = 1 - ratio

    norm_alone = alone.norm(dim=-1)
    return {
        "W": weights,
        "W-FixedRes": 0.5 * weights + 0.5 * identity,
        "W-Res": mixture,
        "N": norm_alone,
        "N-FixedRes": 0.5 * norm_alone / norm_alone.sum(-1, keepdim=True) + 0.5 * identity,
        "N-Res": with_residual.norm(dim=-1),
        "N-ResLN": after[first_norms].norm(dim=-1),
        "N-Enc": encoded.norm(dim=-1),
    }


def rollout(local: Tensor, normalize: bool = False) -> Tensor:
    """(b, l, q, k) -> the raw products (b, l, q, k)."""
    product = torch.zeros_like(local)
    for example in range(local.shape[0]):
        for layer in range(local.shape[1]):
            current = local[example, layer].clone()
            if normalize:
                for query in range(len(current)):
                    if current[query].sum() != 0:
                        current[query] = current[query] / current[query].sum()
            product[example, layer] = current if layer == 0 else current @ product[example, layer - 1]
    return product


def saliency(gradient: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """(b, k, d), (b, k, d), (b, k) -> (b, k) float64."""
    lengths = torch.zeros(mask.shape, dtype=torch.float64)
    for example, token in mask.bool().nonzero().tolist():
        lengths[example, token] = (gradient[example, token].double() * hidden[example, token].double()).norm()
    return lengths
