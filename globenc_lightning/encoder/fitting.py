"""Which numbers a sub-layer's output and the residual stream are multiplied by: the coefficients that fit.

Axes: ``b`` example, ``q`` token, ``d`` hidden, ``n`` real tokens.
"""

import torch
from torch import Tensor

from globenc_lightning.encoder.norms import at_least, difference, tolerance, working

LEAST = 1e-3
"""A term whose coefficient is smaller is no term: a tensor that is not in the sum would fit with a coefficient of 0."""


def fitted(total: Tensor, stream: Tensor, output: Tensor, mask: Tensor) -> tuple[float, float] | None:
    """Find ``kept`` and ``factor`` with ``total = kept stream + factor output``.

    A coefficient is 1 where that fits: both are free only where nothing simpler does.

    Args:
        total: (b, q, d) the sum.
        stream: (b, q, d) one term.
        output: (b, q, d) the other.
        mask: (b, q) true for real tokens.

    Returns:
        Both numbers; None if the sum is not made of the two terms, or if they are multiples of each other.
    """
    if not total.shape == stream.shape == output.shape or total.shape[:2] != mask.shape:
        return None
    given = [working(one)[mask] for one in (total, stream, output)]
    if not all(bool(torch.isfinite(one).all()) for one in given) or not given[0].numel():
        return None
    # Each channel counts alike: beside a large one, the others would not matter.
    sizes = at_least(given[0].abs().amax(0), given[0].dtype)
    whole, first, second = ((one / sizes).double().flatten() for one in given)
    square, across, other = first @ first, first @ second, second @ second
    determinant = square * other - across * across
    if float(determinant) <= 1e-6 * float(square * other):
        return None
    along, beside = first @ whole, second @ whole
    tried = (
        (1.0, float((beside - across) / other)),
        (float((along - across) / square), 1.0),
        (
            float((along * other - beside * across) / determinant),
            float((beside * square - along * across) / determinant),
        ),
    )
    for kept, factor in tried:
        if min(abs(kept), abs(factor)) < LEAST:
            continue
        if difference(kept * given[1] + factor * given[2], given[0], given[0]) <= tolerance(total.dtype):
            return kept, factor
    return None


def constants(total: Tensor, stream: Tensor, output: Tensor, mask: Tensor, first: Tensor) -> tuple[float, float] | None:
    """The numbers that :func:`fitted` finds, if they are numbers and not computed from the hidden states.

    A gate that is one number for all of these examples would fit, and be another number for others. The sum less its
    two terms is nothing, and the gradient of that is the numbers' own.

    Args:
        total: (b, q, d) the sum, in the autograd graph.
        stream: (b, q, d) one term.
        output: (b, q, d) the other.
        mask: (b, q) true for real tokens.
        first: (b, q, d) the first hidden states.

    Returns:
        Both numbers, or None. What a forward takes out of the autograd graph cannot be followed.
    """
    numbers = fitted(total, stream, output, mask)
    sources = [one for one in (stream, first) if one.requires_grad]
    if numbers is None or numbers == (1.0, 1.0) or not total.requires_grad or not sources:
        return numbers
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(total.shape, generator=generator, dtype=torch.float32).to(total)
    direction = direction.masked_fill(~mask.unsqueeze(-1), 0.0)
    with torch.enable_grad():
        rest = total - numbers[0] * stream - numbers[1] * output
    changes, sizes = (
        torch.autograd.grad(one, sources, direction, retain_graph=True, allow_unused=True) for one in (rest, total)
    )
    for change, size in zip(changes, sizes, strict=True):
        if change is not None and size is not None and not bool(change.abs().max() <= 1e-4 * size.abs().max()):
            return None
    return numbers
