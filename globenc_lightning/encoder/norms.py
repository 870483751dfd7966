"""Which normalisation a module computes: found by trying the formulas, whatever the module's class is called.

Axes: ``b`` example, ``q`` token, ``d`` hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from globenc_lightning.encoder.precision import matmul_coarseness
from globenc_lightning.functional import FrozenNorm

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far, relative to the largest entry, a formula may be from the model's own activations."""

OFFSETS = (0.0, 1.0)
"""What may be added to a norm's weight before it is multiplied with."""

_EXACT = (torch.float32, torch.float64)

FEW = 4
"""So many tokens are looked at first, for what they rule out."""


def tolerance(*precisions: torch.dtype) -> float:
    """The tolerance for activations that were computed in these precisions."""
    loosened = matmul_coarseness()
    return max(max(TOLERANCE.get(dtype, 1e-4), loosened if dtype == torch.float32 else 0.0) for dtype in precisions)


def working(tensor: Tensor) -> Tensor:
    """The tensor in the precision that the maths is done in: at least float32."""
    tensor = tensor.detach()
    return tensor if tensor.dtype in _EXACT else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation layer: which module it is, and what it computes.

    Attributes:
        module: the module itself.
        name: its path in the model.
        weight: the name of its elementwise weight, or None.
        bias: the name of its elementwise bias, or None.
        epsilon: what is added to the variance (or to the mean square).
        centered: whether the mean is taken off (LayerNorm) or not (RMSNorm).
        precision: what the module computes in; some cast to float32 whatever they are given.
        offset: what is added to the weight before anything is multiplied with it (Gemma's norms: 1).
    """

    module: nn.Module
    name: str
    weight: str | None
    bias: str | None
    epsilon: float
    centered: bool
    precision: torch.dtype
    offset: float = 0.0

    def parameter(self, name: str | None) -> Tensor | None:
        """The parameter of that name as it stands now, (d,), or None."""
        return None if name is None else working(getattr(self.module, name))

    def factor(self) -> Tensor | None:
        """What the normalised vectors are multiplied with, element by element, (d,), or None for nothing."""
        weight = self.parameter(self.weight)
        return weight + self.offset if weight is not None and self.offset else weight

    def frozen(self, entering: Tensor) -> FrozenNorm:
        """The norm with its statistics frozen at what really enters it, (b, q, d)."""
        return FrozenNorm(self.factor(), self._scale(entering), self.centered)

    def _scale(self, entering: Tensor) -> Tensor:
        """What the norm divides what enters it by, (b, q)."""
        if entering.device.type != "cpu":
            # Fewer operations, and more work, than those below.
            if not self.centered:
                return entering.square().mean(-1).add_(self.epsilon).sqrt_()
            kept = torch.native_layer_norm(entering, entering.shape[-1:], None, None, self.epsilon)
            return kept[2].squeeze(-1).reciprocal()
        deviation = entering - entering.mean(-1, keepdim=True) if self.centered else entering
        power = torch.linalg.vector_norm(deviation, dim=-1).square_().div_(entering.shape[-1])
        return power.add_(self.epsilon).sqrt_()


def find_norm(module: nn.Module, name: str, entering: Tensor, leaving: Tensor) -> Norm | None:
    """Try the formulas of LayerNorm and RMSNorm on what a module was given and what it gave.

    The weight may be what is multiplied with, or what that differs from 1 by.

    Args:
        module: a module without children.
        name: its path in the model.
        entering: (n, d) real tokens that entered it.
        leaving: (n, d) what left it.

    Returns:
        What the module computes, or None if it is no norm over the last axis.
    """
    width = entering.shape[-1]
    parameters = [key for key, value in module.named_parameters(recurse=False)]
    if len(parameters) > 2 or any(getattr(module, key).shape != (width,) for key in parameters):
        return None
    orders: list[tuple[str | None, str | None, float]] = [(None, None, 0.0)]
    if len(parameters) == 1:
        orders = [(parameters[0], None, offset) for offset in OFFSETS]
    elif parameters:
        pairs = (parameters, parameters[::-1])
        orders = [(weight, bias, offset) for offset in OFFSETS for weight, bias in pairs]
    numbers = {value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 1}
    for precision in dict.fromkeys((leaving.dtype, torch.float32)):
        given, expected = working(entering.to(precision)), working(leaving.to(precision))
        if not expected.numel():
            continue
        held = at_least(expected.abs().amax(0), expected.dtype)
        tried: list[tuple[float, Norm]] = []
        for weight, bias, offset in orders:
            for centered in (True, False):
                for epsilon in (*sorted(numbers - {0.0}), 0.0):
                    norm = Norm(module, name, weight, bias, epsilon, centered, precision, offset)
                    # Most modules are no norm, which a few tokens show.
                    few = (_apply(norm, given[:FEW]) - expected[:FEW]).abs().amax(0) / held
                    if bool((few <= tolerance(precision)).all()):
                        tried.append((difference(_apply(norm, given), expected), norm))
        error, best = min(tried, key=lambda one: one[0], default=(float("inf"), None))
        if best is None:
            continue
        if error <= tolerance(precision):
            # Rounding cannot tell a small epsilon from none, so the module's own number is taken where both fit.
            level = min(max(2 * error, 8 * torch.finfo(precision).eps), tolerance(precision))
            alike = (norm for other, norm in tried if other <= level)
            return next(norm for norm in alike if _formula(norm) == _formula(best))
    return None


def _formula(norm: Norm) -> tuple[str | None, bool, float]:
    return norm.weight, norm.centered, norm.offset


def _apply(norm: Norm, entering: Tensor) -> Tensor:
    frozen, bias = norm.frozen(entering), norm.parameter(norm.bias)
    out = (entering - entering.mean(-1, keepdim=True)) if norm.centered else entering
    out = out / frozen.scale.unsqueeze(-1)
    out = out if frozen.weight is None else out * frozen.weight.to(out)
    return out if bias is None else out + bias.to(out)


def difference(left: Tensor, right: Tensor, size: Tensor | None = None) -> float:
    """Largest distance of any channel, relative to what that channel holds.

    A distance relative to the largest entry of all would hide a wrong channel beside a large one.

    Args:
        left: (n, d).
        right: (n, d) what it is to be.
        size: (n, d) what it was computed from, where that is larger; the right tensor when None.

    Returns:
        The distance; infinite if anything is not finite, or there is nothing to compare.
    """
    if left.shape != right.shape or right.numel() == 0:
        return float("inf")
    held = (right if size is None else size).abs().flatten(0, -2).amax(0)
    distance = (left - right).abs().flatten(0, -2).amax(0) / at_least(held, right.dtype)
    return float(distance.max()) if torch.isfinite(distance).all() else float("inf")


def at_least(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Sizes that a distance is divided by, (..., n), none so small that rounding beside the largest would exceed it."""
    share = min(64 * torch.finfo(dtype).eps / TOLERANCE[dtype], 1.0)
    return sizes.maximum(sizes.amax(-1, keepdim=True) * share).clamp(min=torch.finfo(sizes.dtype).tiny)
