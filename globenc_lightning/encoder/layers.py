"""One encoder layer: what is known of it, what a forward pass computed in it, and the proof that both agree.

Two rules. *post-LN* (the paper's): a norm follows each residual connection. *pre-LN*, an extension of the paper: the
residual stream is never normalised inside the layer, so nothing but attention, an elementwise gain on it (LayerScale)
and the residual acts on the vectors; the model's final norm acts in the last layer.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden, ``v`` head
width, ``n`` direction that an identity is tested in.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from globenc_lightning.encoder.norms import Norm, at_least, tolerance, working
from globenc_lightning.encoder.trace import AttentionCall
from globenc_lightning.functional import FrozenNorm

POST_LN, PRE_LN = "post-LN", "pre-LN"


class Gain(NamedTuple):
    """An elementwise factor on what is added to the residual stream (LayerScale).

    Attributes:
        module: the module that holds it.
        name: the name of its parameter.
    """

    module: nn.Module
    name: str

    def value(self) -> Tensor:
        """The factor as it stands now, (d,)."""
        return working(getattr(self.module, self.name))


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of an encoder, in call order.

    Attributes:
        name: the layer's path in the model, for messages.
        rule: ``"post-LN"`` or ``"pre-LN"``.
        projection: the linear map that takes the heads' context vectors.
        projection_name: its path in the model.
        norms: what the vectors of N-Enc pass through: the norms after attention and after the feed-forward network
            (post-LN), the model's final norm (the last pre-LN layer), or nothing.
        gains: the factors on the attention's and on the feed-forward network's output, where there are any.
        channels_first: whether the projection takes (b, d, q) instead of (b, q, d).
    """

    name: str
    rule: str
    projection: nn.Module
    projection_name: str
    norms: tuple[Norm, ...]
    gains: tuple[Gain | None, Gain | None] = (None, None)
    channels_first: bool = False

    def tolerance(self, dtype: torch.dtype) -> float:
        """How large the reconstruction error may be where the layer computes in ``dtype``."""
        return tolerance(dtype, *(norm.precision for norm in self.norms))

    def parts(self) -> str:
        """The modules that the decomposition goes through, for messages."""
        return ", ".join([self.projection_name, *(norm.name for norm in self.norms)])


@dataclass(eq=False)
class LayerActivations:
    """What one layer of one forward pass computed, detached, (b, q, d) each.

    Attributes:
        attention: the attention call.
        residual: the layer's input.
        attended: the residual and the attention's output, added: what enters LayerNorm 1 (post-LN) or the norm before
            the feed-forward network (pre-LN).
        normed: what leaves LayerNorm 1 (post-LN alone).
        added: the feed-forward network's output (pre-LN alone).
        stream: the residual stream after the feed-forward network: what enters LayerNorm 2 (post-LN), the next layer or
            the final norm (pre-LN).
        output: what leaves LayerNorm 2 (post-LN) or the final norm (the last pre-LN layer).
        frozen: the layer's norms at what entered them, once :func:`frozen_norms` has been asked for them.
    """

    attention: AttentionCall
    residual: Tensor
    attended: Tensor | None = None
    normed: Tensor | None = None
    added: Tensor | None = None
    stream: Tensor | None = None
    output: Tensor | None = None
    frozen: tuple[FrozenNorm, ...] | None = None


class LayerWeights(NamedTuple):
    """The effective weights of a layer as they stand now.

    Attributes:
        projection: (d, h * v), the gain included.
        bias: (d,) the projection's bias, the gain included, or None.
    """

    projection: Tensor
    bias: Tensor | None


class LayerInputs(NamedTuple):
    """What the maths takes of a layer, see :func:`globenc_lightning.functional.local_maps`."""

    attention: Tensor
    values: Tensor
    projection: Tensor
    residual: Tensor
    mixed: Tensor | None
    norms: dict[str, tuple[FrozenNorm, ...]]


def effective_linear(
    module: nn.Module, width: int, like: Tensor, channels_first: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of what a module really computes, adapters and quantisation included.

    Args:
        module: a linear map.
        width: the size of its input.
        like: a tensor with its input's dtype and device.
        channels_first: whether it takes (b, d, q).

    Returns:
        The weight (out, in) and the bias (out,) or None.
    """
    if type(module) is nn.Linear and _is_plain(module):
        return working(module.weight), None if module.bias is None else working(module.bias)
    # A wrapper's `.weight` is the base weight, without its adapter; that of a quantised or an offloaded module holds no
    # numbers to calculate with: ask the module itself.
    with torch.no_grad():
        probe = torch.eye(width + 1, width, dtype=like.dtype, device=like.device).unsqueeze(0)
        with _without_hooks(module):
            out = module.forward(probe.transpose(1, 2) if channels_first else probe)
        out = out.transpose(1, 2) if channels_first else out
        out = working(out).squeeze(0)
        return (out[:-1] - out[-1]).T.contiguous(), out[-1]


PLAIN: tuple[type, ...] = (nn.Parameter, Tensor)
"""Classes of weights that hold what they compute with."""


def _is_plain(module: nn.Linear) -> bool:
    """Whether a linear module computes with its weight as it stands: no tensor of another class, no other forward."""
    parameters = [one for one in (module.weight, module.bias) if one is not None]
    return "forward" not in vars(module) and all(
        type(one) in PLAIN and not one.is_meta and one.is_floating_point() for one in parameters
    )


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Silence the hooks of a module and of those in it: they may be the user's, and this is no forward of theirs."""
    tables = ("_forward_pre_hooks", "_forward_hooks")
    kept = [(vars(inner), name, vars(inner)[name]) for inner in module.modules() for name in tables]
    try:
        for attributes, name, hooks in kept:
            attributes[name] = type(hooks)()
        yield
    finally:
        for attributes, name, hooks in kept:
            attributes[name] = hooks


def layer_weights(layer: Layer, width: int, like: Tensor) -> LayerWeights:
    """The effective weights of a layer, see :func:`effective_linear`."""
    weight, bias = effective_linear(layer.projection, width, like, layer.channels_first)
    gain = layer.gains[0]
    if gain is not None:
        factor = gain.value()
        weight, bias = weight * factor.unsqueeze(-1), None if bias is None else bias * factor
    return LayerWeights(weight, bias)


def layer_inputs(
    layer: Layer, activations: LayerActivations, weights: LayerWeights, *, mixed: bool = True
) -> LayerInputs:
    """What the maths takes of a layer: working precision, frozen norms, the sum of what is mixed if it is wanted."""
    attended = working(_seen(activations.attended))
    frozen = frozen_norms(layer, activations)
    if layer.rule == POST_LN:
        norms = {"N-ResLN": frozen[:1], "N-Enc": frozen}
    else:
        norms = {"N-Res": frozen, "N-ResLN": frozen, "N-Enc": frozen}
    return LayerInputs(
        working(activations.attention.probabilities),
        working(activations.attention.repeated_values()),
        weights.projection,
        working(activations.residual),
        (attended if weights.bias is None else attended - weights.bias) if mixed else None,
        norms,
    )


def frozen_norms(layer: Layer, activations: LayerActivations) -> tuple[FrozenNorm, ...]:
    """The norms of a layer with their statistics frozen at what entered them; found once, and kept with it."""
    if activations.frozen is None:
        entering = [activations.attended] if layer.rule == POST_LN else []
        entering += [activations.stream] if layer.norms else []
        activations.frozen = tuple(
            norm.frozen(working(_seen(tensor))) for norm, tensor in zip(layer.norms, entering, strict=True)
        )
    return activations.frozen


def _seen(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise AssertionError("a layer is worked on once all of its activations were seen")
    return tensor


class Distance(NamedTuple):
    """How far one part of a layer's identity is from holding, at every token and in every direction, (b, q, n) each.

    Attributes:
        distance: the difference of the two sides.
        size: what it is relative to.
        stream: the residual stream that this was added to, which rounds it off; None where it was added to none.
    """

    distance: Tensor
    size: Tensor
    stream: Tensor | None


def distances(
    layer: Layer, activations: LayerActivations, weights: LayerWeights, directions: Tensor, *, everywhere: bool = False
) -> list[Distance]:
    """Distances between what the layer computed and what the decomposition says that it is.

    post-LN: ``sum_k u_qk + lin2(lin1(b_O) + beta1 + ffn) + beta2``, with ``u_qk`` the vectors inside N-Enc's norms
    (Modarressi et al., NAACL 2022, section 3) and ``lin`` the norms with frozen statistics, is the layer's output if,
    and only if, attention, values, projection, residual and both norms were read right. pre-LN: the sum of the vectors
    and the bias is the stream after attention, that and the feed-forward network's output is the stream that goes on,
    and the final norm's formula gives what it gives. Sums over ``k`` use the recomputed attention probabilities, the
    values and the effective weight, not the model's own intermediate results.

    Args:
        layer: the layer.
        activations: its activations.
        weights: its effective weights.
        directions: (n, d) directions in which the identity is tested; a wrong formula differs in a random direction
            with probability one.
        everywhere: whether these are all directions, so that terms may cancel in one of them.

    Returns:
        One per part of the identity; nothing has been looked at yet.
    """
    attended, stream = working(_seen(activations.attended)), working(_seen(activations.stream))
    dtype = activations.residual.dtype
    frozen = frozen_norms(layer, activations)
    biases = [norm.parameter(norm.bias) for norm in layer.norms]
    tested = directions
    if layer.rule == POST_LN:
        through2 = _transposed(directions, frozen[1])
        tested = torch.cat([directions, _transposed(through2, frozen[0])])
    added_by_attention = _added_by_attention(activations, weights, tested)
    attention, n = added_by_attention[..., : len(directions)], len(directions)
    residual = working(activations.residual).flatten(0, 1)
    summed = torch.addmm(added_by_attention.flatten(0, 1), residual, tested.T).view_as(added_by_attention)
    along = F.linear(attended, directions)
    size = attention
    if everywhere:
        # Terms that cancel leave their rounding.
        terms = _added_by_attention(activations, weights, directions, absolute=True)
        size = attention.abs() + 64 * torch.finfo(dtype).eps / tolerance(dtype) * terms
    found = [Distance(summed[..., :n] - along, size, along)]
    if layer.rule == POST_LN:
        between = stream - working(_seen(activations.normed))
        rest = F.linear(between, through2, None if biases[0] is None else through2 @ biases[0])
        total = torch.addcdiv(rest, summed[..., n:], frozen[0].scale.unsqueeze(-1))
        expected = F.linear(working(_seen(activations.output)), directions)
        return [*found, Distance(_output(total, frozen[1], biases[1], directions) - expected, expected, None)]

    added = working(_seen(activations.added))
    added = F.linear(added if layer.gains[1] is None else added * layer.gains[1].value(), directions)
    after = F.linear(stream, directions)
    found.append(Distance(along + added - after, added, after))
    if layer.norms:
        entering = F.linear(stream, _transposed(directions, frozen[0]))
        expected = F.linear(working(_seen(activations.output)), directions)
        found.append(Distance(_output(entering, frozen[0], biases[0], directions) - expected, expected, None))
    return found


def _output(total: Tensor, norm: FrozenNorm, bias: Tensor | None, directions: Tensor) -> Tensor:
    """What a frozen norm gives of what is left to divide by its scale, along the directions, (b, q, n)."""
    scale = norm.scale.unsqueeze(-1)
    return total / scale if bias is None else torch.addcdiv(directions @ bias, total, scale)


def errors_of(found: Sequence[Distance], mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest of each distance over the real tokens and directions, each relative to its own size.

    So nothing large hides what is small beside it: the attention's output is compared with what it is itself, as far as
    the rounding of the stream that it is added to lets it be told; the output (post-LN) or what is added to the stream
    (pre-LN) likewise.

    Args:
        found: the distances.
        mask: (b, s) true for real tokens.
        dtype: what the layer computes in.

    Returns:
        (t,), on the device; infinite where anything is not finite, or there is nothing to compare.
    """
    # One operation for all of them: elsewhere than on a processor each of many small ones would cost as much.
    nothing = torch.zeros_like(found[0].distance)
    parts = torch.stack(
        [
            torch.stack([one.distance for one in found]),
            torch.stack([one.size for one in found]),
            torch.stack([nothing if one.stream is None else one.stream for one in found]),
        ]
    )
    if not parts.numel():
        return torch.full((len(found),), float("inf"))
    distance, size, stream = parts.abs().masked_fill_(~mask.unsqueeze(-1), 0.0).flatten(2, 3).amax(2)
    scale = size + 8 * torch.finfo(dtype).eps / tolerance(dtype) * stream
    error = (distance / at_least(scale, dtype)).amax(-1)
    return torch.where(torch.isfinite(error) & mask.any(), error, float("inf"))


def reconstruction_error(
    layer: Layer,
    activations: LayerActivations,
    weights: LayerWeights,
    mask: Tensor,
    directions: Tensor | None = None,
) -> float:
    """The largest of a layer's :func:`distances`, see :func:`errors_of`; in all directions when None are given."""
    everywhere = directions is None
    if directions is None:
        residual = working(activations.residual)
        directions = torch.eye(residual.shape[-1], dtype=residual.dtype, device=residual.device)
    found = distances(layer, activations, weights, directions, everywhere=everywhere)
    return float(errors_of(found, mask, activations.residual.dtype).max())


def _transposed(directions: Tensor, norm: FrozenNorm) -> Tensor:
    """The directions that a frozen norm's output is tested in, taken to its input (its scale left out)."""
    directions = directions if norm.weight is None else directions * norm.weight
    return directions - directions.mean(-1, keepdim=True) if norm.centered else directions


def _added_by_attention(
    activations: LayerActivations, weights: LayerWeights, directions: Tensor, absolute: bool = False
) -> Tensor:
    """The attention's output along the directions, bias included, (b, q, n); the sum of its terms' sizes if wanted."""
    values, projection = working(activations.attention.repeated_values()), weights.projection
    bias = weights.bias
    if absolute:
        values, projection, bias = values.abs(), projection.abs(), None if bias is None else bias.abs()
    h, v = values.shape[1], values.shape[3]
    through = (directions @ projection).view(-1, h, v).transpose(0, 1)
    # Tokens come last in memory: a product with a few columns side by side would take four times as long.
    seen = torch.matmul(through, values.transpose(2, 3)).transpose(2, 3)
    total = torch.matmul(working(activations.attention.probabilities), seen).sum(1)
    return total if bias is None else total + directions @ bias


def random_directions(width: int, like: Tensor, count: int = 2) -> Tensor:
    """Fixed random directions for :func:`reconstruction_error`, (n, d), drawn without touching the global state."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(like)
