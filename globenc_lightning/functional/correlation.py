"""Spearman's rank correlation, masked, for many pairs of vectors at once; and its summary over the probe set."""

from typing import NamedTuple

import torch
from torch import Tensor


class CorrelationSummary(NamedTuple):
    """Correlations over the probe set.

    Attributes:
        mean: (...) mean over the examples with a defined rho; NaN where there is none.
        sd: (...) their sample standard deviation; NaN for fewer than two.
        n: (...) how many examples have a defined rho.
        undefined: (...) how many have none (a constant or single-token input).
    """

    mean: Tensor
    sd: Tensor
    n: Tensor
    undefined: Tensor


def masked_ranks(values: Tensor, mask: Tensor) -> Tensor:
    """Ranks from 1 among the real tokens, ties sharing their mean rank.

    Args:
        values: (..., k).
        mask: (..., k) true for real tokens, broadcastable to ``values``.

    Returns:
        (..., k) float64; zero where the mask is false.
    """
    mask = mask.bool().expand(values.shape)
    # Padding goes last, whatever it holds; infinities of real tokens rank below it only by the count of real tokens.
    values = (values if values.is_floating_point() else values.double()).masked_fill(~mask, float("inf")).contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True).minimum(mask.sum(-1, keepdim=True))
    return ((below + up_to + 1).double() / 2).masked_fill_(~mask, 0.0)


def spearman(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Spearman's rho over the last axis; ties get mean ranks, as in ``scipy.stats.spearmanr``.

    Args:
        left: (..., k).
        right: (..., k), broadcastable with ``left``.
        mask: (..., k) true for the tokens that count, broadcastable with both.

    Returns:
        (...) float64 in [-1, 1]; NaN where it is undefined: fewer than two tokens, a constant input, a NaN.
    """
    if left.shape[-1] == 0:
        shape = torch.broadcast_shapes(left.shape, right.shape, mask.shape)[:-1]
        return torch.full(shape, float("nan"), dtype=torch.float64, device=left.device)
    mask = mask.bool()
    middle = (mask.sum(-1, keepdim=True).double() + 1) / 2
    deviations, variances, unknown = [], [], []
    for values in (left, right):
        # Each is ranked in its own shape: one vector that is compared with many is ranked once.
        shape = torch.broadcast_shapes(values.shape, mask.shape)
        ranks = masked_ranks(values.expand(shape), mask)
        deviation = (ranks - middle).masked_fill_(~mask, 0.0)
        deviations.append(deviation)
        variances.append(deviation.square().sum(-1))
        unknown.append((values.isnan() & mask).any(-1))
    product = variances[0] * variances[1]
    defined = (product > 0) & ~(unknown[0] | unknown[1])
    covariance = torch.linalg.vecdot(*deviations)
    rho = covariance / torch.where(defined, product, torch.ones_like(product)).sqrt()
    return torch.where(defined, rho.clamp(-1.0, 1.0), float("nan"))


def summarize(correlation: Tensor) -> CorrelationSummary:
    """Mean and spread over the probe set; undefined correlations are counted and left out, never zero.

    Args:
        correlation: (b, ...) with NaN where undefined.

    Returns:
        One number per remaining axis, see :class:`CorrelationSummary`.
    """
    defined = ~correlation.isnan()
    n = defined.sum(0)
    mean = correlation.nan_to_num().sum(0) / n
    deviation = torch.where(defined, correlation - mean, torch.zeros_like(correlation))
    sd = (deviation.square().sum(0) / (n - 1).clamp(min=0)).sqrt()
    return CorrelationSummary(mean, torch.where(n > 1, sd, float("nan")), n, (~defined).sum(0))
