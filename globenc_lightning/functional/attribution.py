"""Local attribution maps of one encoder layer, every method, without a (q, k, d) tensor.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden, ``v`` head
width. The vector inside a norm-based method's norm is ``M r_qk`` divided by numbers that depend on ``q`` alone, and
``M`` (the centring and the weights of the LayerNorms) does not depend on the input. Its squared length is therefore a
quadratic form in the heads' attention probabilities, with one (h, h) Gram matrix per attended token.

Sources: Modarressi et al., NAACL 2022, sections 3.1-3.3 (N-Enc and the ablations); Kobayashi et al., EMNLP 2020,
section 3 (N) and EMNLP 2021, sections 3-4 (N-Res, N-ResLN, the mixing ratio); Abnar & Zuidema, ACL 2020, section 3
(W-FixedRes).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from globenc_lightning.functional.devices import chunk_of

METHODS = ("W", "W-FixedRes", "W-Res", "N", "N-FixedRes", "N-Res", "N-ResLN", "N-Enc")
"""The eight local maps: attention weights (W) and norms (N), from attention alone to the whole encoder layer."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A normalisation layer with its statistics frozen at the real input: linear in what it is applied to.

    Attributes:
        weight: (d,) elementwise weight, or None for a norm without one.
        scale: (b, q) what the real input is divided by: its standard deviation (with epsilon), or its root mean
            square for an RMSNorm.
        centered: whether the mean over ``d`` is taken off first (LayerNorm) or not (RMSNorm).
    """

    weight: Tensor | None
    scale: Tensor
    centered: bool = True


def linearized(vectors: Tensor, norms: Sequence[FrozenNorm]) -> Tensor:
    """Pass vectors through frozen norms, one after the other.

    Args:
        vectors: (b, q, d).
        norms: the norms in the order of the forward pass.

    Returns:
        (b, q, d).
    """
    scale = _scale(norms)
    vectors = _unscaled(vectors, norms)
    return vectors if scale is None else vectors / scale.unsqueeze(-1)


def _unscaled(vectors: Tensor, norms: Sequence[FrozenNorm]) -> Tensor:
    """:func:`linearized` without the division by the scales, (b, q, d)."""
    fresh = False
    for norm in norms:
        if norm.centered:
            mean = vectors.mean(-1, keepdim=True)
            vectors, fresh = vectors.sub_(mean) if fresh else vectors - mean, True
        if norm.weight is not None:
            vectors, fresh = vectors.mul_(norm.weight) if fresh else vectors * norm.weight, True
    return vectors


def _scale(norms: Sequence[FrozenNorm]) -> Tensor | None:
    """What the vectors are divided by on their way through the norms, (b, q), or None for no norm at all."""
    scale = None
    for norm in norms:
        scale = norm.scale if scale is None else scale * norm.scale
    return scale


@torch.no_grad()
def gram_kernel(projection: Tensor, norms: Sequence[FrozenNorm] = (), heads: int | None = None) -> Tensor:
    """The input-independent part of every Gram matrix: ``K = (M W_O)^T (M W_O)``.

    Args:
        projection: (d, h * v) the attention's output projection, one block of ``v`` columns per head.
        norms: the norms whose weights and centring make up ``M``; their scales are not used.
        heads: how many heads there are, where :func:`source_gram` alone is given the kernel.

    Returns:
        (h * v, h * v), symmetric. Where the heads were given, a processor fills the rows of each head only from its own
        columns on, and the rest holds anything.
    """
    projection = _through_weights(projection, norms)
    if projection.device.type != "cpu":
        return projection.T @ projection
    width = projection.shape[1]
    kernel = projection.new_empty(width, width)
    panel = max(PANEL, -(-width // 4))
    if heads is not None:
        # Whole heads, so that none lacks its own columns.
        panel = -(-panel * heads // width) * (width // heads)
    for start in range(0, width, panel):
        # What lies left of the diagonal has been computed already, on the other side of it.
        stop = start + panel
        torch.mm(projection[:, start:stop].T, projection[:, start:], out=kernel[start:stop, start:])
        if heads is None:
            kernel[start:stop, :start] = kernel[:start, start:stop].T
    return kernel


def _through_weights(projection: Tensor, norms: Sequence[FrozenNorm]) -> Tensor:
    """``M W_O``: the projection (d, h * v) centred and multiplied as the norms do with what they are given."""
    fresh = False
    for norm in norms:
        if norm.centered:
            mean = projection.mean(0, keepdim=True)
            projection, fresh = projection.sub_(mean) if fresh else projection - mean, True
        if norm.weight is not None:
            weight = norm.weight.unsqueeze(-1)
            projection, fresh = projection.mul_(weight) if fresh else projection * weight, True
    return projection


PANEL = 128
"""How many rows of a symmetric product are worth a matrix product of their own."""


@torch.no_grad()
def source_gram(values: Tensor, kernel: Tensor) -> Tensor:
    """Gram matrices of the heads' transformed values, one per attended token.

    Args:
        values: (b, h, k, v).
        kernel: (h * v, h * v) as :func:`gram_kernel` gives it, for these heads or for any.

    Returns:
        (b, k, h, h): inner products of ``M W_O^h v^h_k`` and ``M W_O^h' v^h'_k``.
    """
    b, h, k, v = values.shape
    flat = values.transpose(1, 2).reshape(b * k, h * v)
    if values.device.type != "cpu":
        return _gram_at_once(flat, kernel, h).view(b, k, h, h)
    gram = flat.new_empty(b * k, h, h)
    room = flat.new_empty(flat.numel())
    for head in range(h):
        start, others = head * v, h - head
        # One GEMM per head over the heads not yet paired with it: nothing larger than (b k, h v) ever exists.
        product = room[: b * k * others * v].view(b * k, others * v)
        torch.mm(flat[:, start : start + v], kernel[start : start + v, start:], out=product)
        row = product.mul_(flat[:, start:]).view(b * k, others, v).sum(-1)
        gram[:, head, head:] = row
        gram[:, head:, head] = row
    return gram.view(b, k, h, h)


def _gram_at_once(flat: Tensor, kernel: Tensor, heads: int) -> Tensor:
    """Twice the work of :func:`source_gram`, all heads at once, where starting an operation costs more than its work.

    Args:
        flat: (t, h * v) the values of all attended tokens.
        kernel: (h * v, h * v).
        heads: how many heads there are.

    Returns:
        (t, h, h).
    """
    width = flat.shape[1] // heads
    by_head, blocks = flat.view(-1, heads, width).transpose(0, 1), kernel.view(heads, width, -1)
    grams = flat.new_empty(len(flat), heads, heads)
    for tokens, _ in chunks(len(flat), 1, heads * kernel.shape[1], chunk_of(flat.device)):
        part = flat[tokens]
        product = torch.bmm(by_head[:, tokens], blocks).mul_(part)
        torch.sum(product.view(heads, len(part), heads, width), -1, out=grams[tokens].transpose(0, 1))
    return grams


def chunks(outer: int, inner: int, entries: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Cut the first two axes of a tensor into parts of at most so many entries, or of one row.

    Args:
        outer: the size of the first axis.
        inner: the size of the second axis.
        entries: how many entries there are in all further axes.
        most: how many entries a part may have, see :func:`~globenc_lightning.functional.devices.chunk_of`.

    Yields:
        What to index the two axes with.
    """
    rows = max(1, most // max(1, entries))
    outer_step, inner_step = max(1, rows // max(1, inner)), min(rows, max(1, inner))
    for first in range(0, outer, outer_step):
        for second in range(0, inner, inner_step):
            yield slice(first, first + outer_step), slice(second, second + inner_step)


def _lengths(attention: Tensor, grams: Sequence[Tensor]) -> list[Tensor]:
    """Lengths of ``M a_qk`` for several ``M``.

    Args:
        attention: (b, h, q, k).
        grams: (b, k, h, h) each, as :func:`source_gram` gives them.

    Returns:
        (b, q, k) for each of them.
    """
    b, h, q, k = attention.shape
    if not grams:
        return []
    most = chunk_of(attention.device)
    if attention.numel() <= most:
        part = attention.permute(0, 3, 1, 2).contiguous()
        return [_length(part, gram) for gram in grams]
    lengths = [attention.new_empty(b, q, k) for _ in grams]
    # Examples and attended tokens.
    for examples, tokens in chunks(b, k, h * q, most):
        part = attention[examples, :, :, tokens].permute(0, 3, 1, 2).contiguous()
        for gram, length in zip(grams, lengths, strict=True):
            length[examples, :, tokens] = _length(part, gram[examples, tokens])
    return lengths


def _length(attention: Tensor, gram: Tensor) -> Tensor:
    """Lengths (b, q, k) of ``M a_qk``: of attention (b, k, h, q) and the Gram matrices (b, k, h, h), symmetric."""
    squared = torch.matmul(gram, attention).mul_(attention).sum(2)
    # Rounding can push the square of a vector that nearly vanishes below zero.
    return squared.clamp_(min=0).sqrt_().transpose(1, 2)


def _row_share(matrix: Tensor) -> Tensor:
    """Rows divided by their sum, (b, q, k); rows without anything in them stay zero."""
    total = matrix.sum(-1, keepdim=True)
    return matrix / torch.where(total == 0, torch.ones_like(total), total)


def _without_padding(matrix: Tensor, padding: Tensor | None) -> Tensor:
    """Zero what ``padding`` (b, q, k) marks, in place, whatever it holds: rows of padding may hold NaN."""
    return matrix if padding is None else matrix.masked_fill_(padding, 0.0)


def _half_fixed(out: Tensor, matrix: Tensor, real: Tensor) -> None:
    """Half of a matrix (b, q, k) and half of the identity, on the real tokens (b, s)."""
    torch.mul(matrix, 0.5, out=out)
    torch.diagonal(out, dim1=1, dim2=2).add_(real, alpha=0.5)


def _norm(vectors: Tensor) -> Tensor:
    """(b, q, d) -> (b, q)."""
    return torch.linalg.vector_norm(vectors, dim=-1)


def _identity(chain: Sequence[FrozenNorm]) -> tuple[int, ...]:
    """Tells chains of norms apart: two methods that pass the same norms share their Gram matrices."""
    return tuple(id(norm) for norm in chain)


def _check_methods(methods: Collection[str]) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: choose from {', '.join(METHODS)}")


def padding_of(real: Tensor) -> Tensor | None:
    """Returns where the row or the column of a map is padding, (b, q, k); None where a processor sees that none is.

    Args:
        real: (b, s) true for real tokens.
    """
    # Elsewhere to ask costs more than to work on all of them.
    whole = real.device.type == "cpu" and bool(real.all())
    return None if whole else ~(real.unsqueeze(1) & real.unsqueeze(2))


@torch.no_grad()
def local_maps(
    attention: Tensor,
    values: Tensor,
    projection: Tensor,
    residual: Tensor,
    mixed: Tensor | None,
    norms: Mapping[str, Sequence[FrozenNorm]],
    mask: Tensor,
    methods: Collection[str] = METHODS,
    kernel: Callable[[Tensor, Sequence[FrozenNorm]], Tensor] = gram_kernel,
    out: Tensor | None = None,
    padding: Tensor | None = None,
) -> dict[str, Tensor]:
    """The local maps of one layer: how much token ``k`` contributes to token ``q``; outside the autograd graph.

    ========== =======================================================================================
    W          mean over the heads of the attention probabilities
    W-FixedRes half of W and half of the identity
    W-Res      W off the diagonal, scaled to the layer's mixing ratio; its complement on the diagonal
    N          length of the attention's output vector ``a_qk``
    N-FixedRes half of N (rows summing to 1) and half of the identity
    N-Res      length of ``r_qk``, which is ``a_qk`` and on the diagonal the residual
    N-ResLN    length of ``r_qk`` through the frozen LayerNorm 1
    N-Enc      length of ``r_qk`` through the frozen LayerNorms 1 and 2: GlobEnc
    ========== =======================================================================================

    Args:
        attention: (b, h, q, k) attention probabilities.
        values: (b, h, k, v) value vectors, value bias included.
        projection: (d, h * v) weight of the output projection.
        residual: (b, q, d) what the residual connection adds to the attention's output: the layer's input.
        mixed: (b, q, d) the sum of ``r_qk`` over all ``k``: what enters LayerNorm 1 less the projection's bias. Only
            W-Res needs it; None where it is not asked for.
        norms: the frozen norms of ``"N"`` and ``"N-Res"`` (none in the paper), ``"N-ResLN"`` and ``"N-Enc"``, in the
            order of the forward pass; a method that is left out has none. N-FixedRes has those of N.
        mask: (b, s) true for real tokens, with s = q = k.
        methods: any of :data:`METHODS`.
        kernel: gives :func:`gram_kernel`'s result, where the caller keeps it while the weights stand still.
        out: (m, b, q, k) to write the maps of the m methods into; allocated when None.
        padding: what :func:`padding_of` tells of the mask, where the caller knows it.

    Returns:
        For each method (b, q, k), a view of ``out``; zero wherever ``q`` or ``k`` is padding.

    Raises:
        ValueError: a method that does not exist, or W-Res without ``mixed``.
    """
    _check_methods(methods)
    if "W-Res" in methods and mixed is None:
        raise ValueError("W-Res needs mixed, the sum of what is mixed: what enters LayerNorm 1 less the bias")
    b, s = mask.shape
    maps = torch.empty(len(methods), b, s, s, dtype=attention.dtype, device=attention.device) if out is None else out
    found = dict(zip(methods, maps.unbind(0), strict=True))
    real = mask.bool()
    padding = padding_of(real) if padding is None else padding

    if any(method in methods for method in ("W", "W-FixedRes", "W-Res")):
        weights = _without_padding(attention.mean(1), padding)
        if "W" in found:
            found["W"].copy_(weights)
        if "W-FixedRes" in found:
            _half_fixed(found["W-FixedRes"], weights, real)

    chains = {method: tuple(norms.get(method, ())) for method in ("N-Res", "N-ResLN", "N-Enc")}
    norm_based = {method: chain for method, chain in chains.items() if method in found}
    if norm_based or "W-Res" in found:
        itself = torch.diagonal(attention, dim1=2, dim2=3).transpose(1, 2).unsqueeze(-1) * values.transpose(1, 2)
        own = torch.addmm(residual.flatten(0, 1), itself.reshape(b * s, -1), projection.T).view_as(residual)

    plain, alone = [method for method in ("N", "N-FixedRes") if method in found], tuple(norms.get("N", ()))
    wanted = {**({"N": alone} if plain else {}), **norm_based}
    distinct = {_identity(chain): chain for chain in wanted.values()}
    grams = [source_gram(values, kernel(projection, chain)) for chain in distinct.values()]
    lengths = dict(zip(distinct, _lengths(attention, grams), strict=True))
    if plain:
        length, scale = lengths[_identity(alone)], _scale(alone)
        length = _without_padding(length if scale is None else length / scale.unsqueeze(-1), padding)
        if "N" in found:
            found["N"].copy_(length)
        if "N-FixedRes" in found:
            _half_fixed(found["N-FixedRes"], _row_share(length), real)
    # On the diagonal there is a whole vector, not the heads' alone.
    passing = {_identity(chain): chain for chain in norm_based.values()}
    if "W-Res" in found:
        passing[_identity(chains["N-Enc"])] = chains["N-Enc"]
    diagonals = {name: _norm(_unscaled(own, chain)) for name, chain in passing.items()}
    for method, chain in norm_based.items():
        length, diagonal, scale = lengths[_identity(chain)], diagonals[_identity(chain)], _scale(chain)
        if scale is None:
            found[method].copy_(length)
            torch.diagonal(found[method], dim1=1, dim2=2).copy_(diagonal)
        else:
            # N, which has no diagonal of its own, is done with it.
            torch.diagonal(length, dim1=1, dim2=2).copy_(diagonal)
            torch.div(length, scale.unsqueeze(-1), out=found[method])
        _without_padding(found[method], padding)

    if "W-Res" in found and mixed is not None:
        chain = chains["N-Enc"]
        preserving, mixing = diagonals[_identity(chain)], _norm(_unscaled(mixed - own, chain))
        torch.diagonal(weights, dim1=1, dim2=2).zero_()
        # A token that attends to nothing but itself mixes nothing, whatever rounding leaves of the difference.
        mixing = mixing.masked_fill(weights.sum(-1) <= 0, 0.0)
        ratio = mixing / (mixing + preserving)
        torch.mul(_row_share(weights), ratio.unsqueeze(-1), out=found["W-Res"])
        torch.diagonal(found["W-Res"], dim1=1, dim2=2).copy_(1 - ratio)
        _without_padding(found["W-Res"], padding)
    return found
