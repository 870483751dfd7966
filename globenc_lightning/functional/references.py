"""What rows are compared with besides the saliency: integrated gradients, and the size of a token's Jacobian.

Axes: ``b`` example, ``k`` token, ``d`` hidden, ``n`` point of a path, ``r`` direction.
"""

import torch
from torch import Tensor


def midpoints(count: int) -> tuple[list[float], float]:
    """Points and weight of the midpoint rule on [0, 1].

    Of a fine-tuned encoder the score jumps somewhere on the way from a baseline to the text. Equal distances meet such
    a jump better than the points of Gauss and Legendre, which are dense at both ends: see ``POINTS``.

    Args:
        count: how many points, at least one.

    Returns:
        The points, and the weight of each.
    """
    return [(place + 0.5) / count for place in range(count)], 1 / count


def mean_state(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the real tokens of an example's first hidden states, at each of them; padding stays as it is.

    Args:
        hidden: (b, k, d) the first hidden states.
        mask: (b, k) true for real tokens.

    Returns:
        (b, k, d).
    """
    real = mask.bool().unsqueeze(-1)
    total = hidden.masked_fill(~real, 0.0).sum(1, keepdim=True)
    return torch.where(real, total / real.sum(1, keepdim=True).clamp(min=1), hidden)


def directions(width: int, count: int, seed: int = 0) -> Tensor:
    """Random orthogonal directions, the same each time, whose projections give a squared length without bias.

    For a matrix J with ``width`` rows, the mean of ``sum_r |u_r J|^2`` over all such directions is ``|J|_F^2``. The
    standard deviation of that sum is at most ``sqrt(2 (d - r) / (r (d + 2)))`` of it, reached by a J of rank one. Of a
    J whose singular values are spread over ``e`` directions it is about ``sqrt(1 / e)`` of this. The length, its root,
    is off by half as much. With ``count`` of ``width`` and more, the directions are all axes and nothing is left out.

    Args:
        width: how many rows the matrix has.
        count: how many directions.
        seed: of the generator, which is nobody else's.

    Returns:
        (r, d) float64 on the CPU: each of length ``sqrt(d / r)``.
    """
    if count >= width:
        return torch.eye(width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T * (width / count) ** 0.5


def largest_deviation(width: int, count: int) -> float:
    """How large the standard deviation of a length from ``count`` directions can be, as a share of the length.

    Args:
        width: how many rows the matrix has.
        count: how many directions.

    Returns:
        Half of the bound that :func:`directions` states for the square; 0 where nothing is left out.
    """
    return 0.5 * (2 * max(0, width - count) / (count * (width + 2))) ** 0.5


def completeness_error(contributions: Tensor, difference: Tensor) -> Tensor:
    """How far contributions are from adding up to the difference of two scores.

    Relative to the sum of their sizes, which is never below the difference by much: where a text speaks for and
    against, the difference alone may be near zero.

    Args:
        contributions: (b, k) signed; zero at padding.
        difference: (b,) score of the input less score of the baseline.

    Returns:
        (b,) 0 where nothing contributes and nothing differs.
    """
    scale = torch.maximum(contributions.abs().sum(-1), difference.abs())
    missing = (contributions.sum(-1) - difference).abs()
    return torch.where(scale > 0, missing / torch.where(scale > 0, scale, 1.0), missing)
