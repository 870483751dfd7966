"""Activations and norms made linear at what enters them: values are those of the function, gradients those of a line.

An activation ``f`` becomes ``f(0) + slope * z`` with the slope ``(f(z) - f(0)) / z`` held fixed; a norm becomes a
division by the standard deviation that it really had. No value changes by that, to the last bit.

Axes: ``b`` example, ``q`` token, ``d`` hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]


class _Sloped(torch.autograd.Function):
    """``f(z)``, whose gradient is the slope of the line from f(0) to f(z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, function: Elementwise, zero: Tensor, steepness: Tensor) -> Tensor:
        value = function(z)
        # Close to 0, a quotient of differences has no digits left; where f(0) = 0, f(z) / z keeps them.
        close = torch.where(zero == 0, torch.finfo(z.dtype).tiny, torch.finfo(z.dtype).eps ** 0.5)
        slope = (value - zero) / torch.where(z == 0, torch.ones_like(z), z)
        ctx.save_for_backward(torch.where(z.abs() <= close, steepness, slope))
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None, None


def at_zero(function: Elementwise, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns f(0) and f'(0) of an elementwise function, both of the shape of ``like``."""
    zero = torch.zeros_like(like).requires_grad_()
    with torch.enable_grad():
        value = function(zero)
        steepness: tuple[Tensor | None, ...] = (None,)
        if value.requires_grad:
            steepness = torch.autograd.grad(value.sum(), zero, allow_unused=True)
    return value.detach(), torch.zeros_like(value) if steepness[0] is None else steepness[0].nan_to_num()


def sloped(z: Tensor, function: Elementwise, zero: Tensor, steepness: Tensor) -> Tensor:
    """Returns ``function(z)``, as a multiple of ``z`` that is held fixed, and ``f(0)``.

    Args:
        z: what enters the activation, in the autograd graph.
        function: the activation; it may not write into its argument.
        zero: f(0), as :func:`at_zero` gives it.
        steepness: f'(0), the slope where nothing enters.
    """
    result: Tensor = _Sloped.apply(z, function, zero, steepness)
    return result


class _Normed(torch.autograd.Function):
    """A norm over the last axes, whose gradient holds the statistics fixed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Elementwise, axes: tuple[int, ...], weight: Tensor | None, eps: float, mean: bool
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        power = wide.var(axes, correction=0, keepdim=True) if mean else wide.square().mean(axes, keepdim=True)
        ctx.save_for_backward((power + eps).rsqrt(), weight)
        ctx.axes, ctx.mean = axes, mean
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inverse, weight = ctx.saved_tensors
        scaled = (gradient if weight is None else gradient * weight) * inverse
        scaled = scaled - scaled.mean(ctx.axes, keepdim=True) if ctx.mean else scaled
        return scaled.to(gradient.dtype), None, None, None, None, None


def normed(
    x: Tensor, function: Elementwise, shape: Sequence[int], weight: Tensor | None, eps: float, *, centered: bool
) -> Tensor:
    """Returns what a norm over the last axes makes of ``x``, with its statistics held fixed.

    Args:
        x: (..., *shape) in the autograd graph.
        function: the norm.
        shape: the axes that it normalises.
        weight: what the normalised entries are multiplied with, or None.
        eps: what is added to the variance, or to the mean square.
        centered: whether the mean is taken off.
    """
    axes = tuple(range(-len(shape), 0))
    result: Tensor = _Normed.apply(x, function, axes, weight, eps, centered)
    return result


class _Valued(torch.autograd.Function):
    """A value, with the gradient of another tensor."""

    @staticmethod
    def forward(ctx: Any, linear: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def group_normed(x: Tensor, value: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    """Returns ``value``, what a group norm made of ``x`` (b, c, ...), with its statistics held fixed."""
    wide = x.detach().reshape(len(x), groups, -1)
    inverse = (wide.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    parts = x.reshape(len(x), groups, -1)
    linear = ((parts - parts.mean(-1, keepdim=True)) * inverse).reshape(x.shape)
    if weight is not None:
        linear = linear * weight.view(1, -1, *[1] * (x.dim() - 2))
    result: Tensor = _Valued.apply(linear, value)
    return result
