"""Aggregation of local maps over the layers, and the row that is read out of it.

Axes: ``b`` example, ``l`` layer, ``q`` token that receives, ``k`` token that is attended to. Source: Abnar & Zuidema,
ACL 2020, section 3; unnormalised as in Modarressi et al., NAACL 2022, section 3.4.
"""

import math

import torch
from torch import Tensor

from globenc_lightning.functional.devices import binary_exponent, inverse_power_of_two, with_float64

READOUTS = ("cls", "last", "mean")
"""Which row of a rollout is read: the first real token's, the last real token's, or the mean of all real tokens'."""


def normalize_rows(local: Tensor) -> Tensor:
    """Divide every row by its sum; a row of zeros (padding) stays as it is.

    Args:
        local: (..., q, k), not negative.

    Returns:
        (..., q, k).
    """
    total = local.sum(-1, keepdim=True)
    return local / torch.where(total == 0, torch.ones_like(total), total)


def rollout_step(local: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One layer more: ``map^l R^(l-1)``, times one power of two per example.

    Products of many layers overflow, so each example's matrix is scaled to a largest entry in [0.5, 1), or as far as
    that is a normal number's distance away. A power of two changes no digit: the order of the entries is that of the
    unscaled product, ties included.

    Args:
        local: (b, q, k) the layer's own map.
        previous: (b, q, k) the scaled rollout of the layers below, or None for the first layer.

    Returns:
        The scaled rollout (b, q, k), and its largest entry before it was scaled, (b,), which tells the scale: see
        :func:`log_scale`.
    """
    product = local if previous is None else torch.matmul(local, previous)
    peak = product.flatten(1).amax(1) if product.shape[-1] else product.new_zeros(len(product))
    factor = inverse_power_of_two(peak).view(-1, 1, 1)
    return local * factor if previous is None else product.mul_(factor), peak


def rollout(local: Tensor, *, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Rollout of all layers: ``R^1 = map^1``, ``R^l = map^l R^(l-1)``.

    Args:
        local: (b, l, q, k).
        normalize: divide the rows of every map by their sum first. This is another method, not another scale: its
            ranks differ.

    Returns:
        The rollout (b, l, q, k) up to one positive scale per example and layer, and the natural logarithm of that
        scale, (b, l) float64: ``rollout * exp(log_scale)`` is the raw product.
    """
    layers, peaks = [], []
    previous = None
    for layer in range(local.shape[1]):
        current = normalize_rows(local[:, layer]) if normalize else local[:, layer]
        previous, peak = rollout_step(current, previous)
        layers.append(previous)
        peaks.append(peak)
    return torch.stack(layers, 1), log_scale(torch.stack(peaks, 1))


def log_scale(peaks: Tensor) -> Tensor:
    """Natural logarithm of the scale of each layer's rollout.

    Args:
        peaks: (..., l) the largest entries that :func:`rollout_step` tells, layer by layer.

    Returns:
        (..., l) float64, on the CPU where the device has none.
    """
    return binary_exponent(with_float64(peaks)).double().cumsum(-1) * math.log(2.0)


def readout_row(matrix: Tensor, mask: Tensor, readout: str = "cls") -> Tensor:
    """The row that tells what the model's decision is made of.

    Args:
        matrix: (b, ..., q, k).
        mask: (b, s) true for real tokens.
        readout: one of :data:`READOUTS`.

    Returns:
        (b, ..., k); zeros for an example without a real token.

    Raises:
        ValueError: a readout that does not exist.
    """
    if readout not in READOUTS:
        raise ValueError(f"unknown readout {readout!r}: choose from {', '.join(READOUTS)}")
    real = mask.bool()
    inner = [1] * (matrix.dim() - 3)
    if readout == "mean":
        rows = matrix.masked_fill(~real.view(len(real), *inner, -1, 1), 0.0)
        return rows.sum(-2) / real.sum(1).clamp(min=1).view(-1, *inner, 1)
    place = readout_place(mask, readout).view(-1, *inner, 1, 1).expand(*matrix.shape[:-2], 1, matrix.shape[-1])
    row = matrix.gather(-2, place).squeeze(-2)
    return row.masked_fill(~real.any(1).view(-1, *inner, 1), 0.0)


def readout_place(mask: Tensor, readout: str) -> Tensor:
    """Which token's row is read.

    Args:
        mask: (b, s) true for real tokens.
        readout: ``"cls"``, the first real token, or ``"last"``, the last one.

    Returns:
        (b,) its place; 0 for an example without a real token.
    """
    real = mask.bool().int()
    if readout == "cls":
        return real.argmax(1)
    return (real * torch.arange(1, real.shape[1] + 1, device=mask.device)).argmax(1)
