"""Spearman's rank correlation, masked, for many pairs of vectors at once; and its summary over the probe set."""

from typing import NamedTuple

import torch
from torch import Tensor

from globenc_lightning.functional.devices import with_float64


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
    # Padding goes last, whatever it holds, beside infinities of real tokens: hence the count of real tokens below.
    values = (values if values.is_floating_point() else values.double()).masked_fill(~mask, float("inf"))
    ordered, order = values.sort(dim=-1)
    place = torch.arange(values.shape[-1], device=values.device)
    real = mask.sum(-1, keepdim=True)
    same = ordered[..., 1:] == ordered[..., :-1]
    ranks = (place + 1).double().expand(values.shape)
    # A processor is asked whether there are ties at all; elsewhere to ask costs more than to look for them.
    if values.device.type != "cpu" or bool((same & (place[1:] <= real)).any()):
        edge = same.new_zeros((*values.shape[:-1], 1))
        places = place.expand(values.shape)
        first = places.masked_fill(torch.cat([edge, same], -1), 0).cummax(-1).values
        after = places.masked_fill(torch.cat([same, edge], -1), values.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
        ranks = (first + after.minimum(real - 1)).double() / 2 + 1
    return torch.zeros_like(ranks).scatter_(-1, order, ranks).masked_fill_(~mask, 0.0)


def spearman(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Spearman's rho over the last axis; ties get mean ranks, as in ``scipy.stats.spearmanr``.

    Args:
        left: (..., k).
        right: (..., k), broadcastable with ``left``.
        mask: (..., k) true for the tokens that count, broadcastable with both.

    Returns:
        (...) float64 in [-1, 1]; NaN where it is undefined: fewer than two tokens, a constant input, a NaN. On the CPU
        where the device has no float64.
    """
    left, right, mask = (with_float64(one) for one in (left, right, mask))
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
