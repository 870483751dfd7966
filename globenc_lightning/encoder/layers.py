"""One encoder layer: what is known of it, what a forward pass computed in it, and the proof that both agree.

Four rules. *post-LN* (the paper's): a norm follows each residual connection. The others are extensions of the paper,
and in all of them the residual stream is never normalised inside the layer: the model's final norm acts in the last
layer. *pre-LN*: nothing but attention, an elementwise gain on it (LayerScale) and the residual acts on the vectors.
*sublayer-norm* (Gemma 2 and 3, OLMo 2, GLM-4): each sub-layer's output passes a norm of its own before it is added to
the residual stream; the attention's, with its statistics frozen at what really entered it, acts on the attention's
vectors and not on the residual. *parallel* (GPT-NeoX, GPT-J, Falcon): attention and feed-forward network work on the
same input ``x`` and both are added to it; as everywhere, the feed-forward network's output is position-wise and left
out, and what is decomposed is ``x`` and the attention's output.

A sub-layer's output and the stream that it is added to may be multiplied by numbers (Granite, DeepNorm), see
:class:`Branch`.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden, ``v`` head
width, ``n`` direction that an identity is tested in.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from globenc_lightning.encoder.norms import Norm, at_least, tolerance, working
from globenc_lightning.encoder.trace import AttentionCall
from globenc_lightning.functional import FrozenNorm

POST_LN, PRE_LN, SUBLAYER_NORM, PARALLEL = "post-LN", "pre-LN", "sublayer-norm", "parallel"


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


class Branch(NamedTuple):
    """How the output ``y`` of a sub-layer joins the residual stream ``x``: ``kept x + factor norm(gain y)``.

    Attributes:
        gain: an elementwise factor, or None.
        norm: a norm that the output passes, or None. Of the feed-forward network it is a part of the network.
        factor: the number that the output is multiplied by.
        kept: the number that the stream is multiplied by.
    """

    gain: Gain | None = None
    norm: Norm | None = None
    factor: float = 1.0
    kept: float = 1.0

    def joined(self, output: Tensor) -> Tensor:
        """The output (..., d) as it is added to the stream; of a branch without a norm."""
        output = output if self.gain is None else output * self.gain.value().to(output.dtype)
        return output if self.factor == 1 else output * self.factor

    def stream(self, before: Tensor) -> Tensor:
        """The stream (..., d) as the output is added to it."""
        return before if self.kept == 1 else before * self.kept


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of an encoder, in call order.

    Attributes:
        name: the layer's path in the model, for messages.
        rule: ``"post-LN"``, ``"pre-LN"``, ``"sublayer-norm"`` or ``"parallel"``.
        projection: the linear map that takes the heads' context vectors.
        projection_name: its path in the model.
        norms: what the vectors of N-Enc pass through: the norms after attention and after the feed-forward network
            (post-LN), the model's final norm (the last layer of every rule, of post-LN after these two), or nothing.
        branches: how the attention's and the feed-forward network's output join the residual stream.
        channels_first: whether the projection takes (b, d, q) instead of (b, q, d).
    """

    name: str
    rule: str
    projection: nn.Module
    projection_name: str
    norms: tuple[Norm, ...]
    branches: tuple[Branch, Branch] = (Branch(), Branch())
    channels_first: bool = False

    def tolerance(self, dtype: torch.dtype) -> float:
        """How large the reconstruction error may be where the layer computes in ``dtype``."""
        return tolerance(dtype, *(norm.precision for norm in self.all_norms()))

    def all_norms(self) -> tuple[Norm, ...]:
        """The norms that the decomposition goes through: of the attention's output, and those in ``norms``."""
        own = self.branches[0].norm
        return self.norms if own is None else (own, *self.norms)

    @property
    def last(self) -> str:
        """The activation that is complete last, and is handed on."""
        if self.rule == POST_LN:
            return "output" if len(self.norms) < 3 else "final"
        return "output" if self.norms else "stream"

    def parts(self) -> str:
        """The modules that the decomposition goes through, for messages."""
        return ", ".join([self.projection_name, *(norm.name for norm in self.all_norms())])

    @property
    def scaled(self) -> bool:
        """Whether numbers are multiplied where the feed-forward network's output joins the stream."""
        return (self.branches[1].factor, self.branches[1].kept) != (1, 1)


@dataclass(eq=False)
class LayerActivations:
    """What one layer of one forward pass computed, detached, (b, q, d) each.

    Attributes:
        attention: the attention call.
        residual: the layer's input.
        attended: the residual and the attention's output, added: what enters LayerNorm 1 (post-LN) or the norm before
            the feed-forward network (pre-LN). No module is given it where the sub-layers are parallel: there it is
            added up by :func:`attended_of`.
        projected: the attention's output: what enters its own norm (sublayer-norm), or what the projection gave
            (parallel).
        normed: what leaves LayerNorm 1 (post-LN alone).
        added: the feed-forward network's output (not post-LN, unless numbers are multiplied with it or the stream).
        stream: the residual stream after the feed-forward network: what enters LayerNorm 2 (post-LN), the next layer or
            the final norm (the other rules).
        output: what leaves LayerNorm 2 (post-LN) or the final norm (the last layer of the other rules).
        final: what leaves the final norm of a post-LN encoder that has one (its last layer).
        frozen: the layer's norms at what entered them, once :func:`frozen_norms` has been asked for them.
        divided: what the attention's own norm divides by, once :func:`_divided` has been asked for it.
    """

    attention: AttentionCall
    residual: Tensor
    attended: Tensor | None = None
    projected: Tensor | None = None
    normed: Tensor | None = None
    added: Tensor | None = None
    stream: Tensor | None = None
    output: Tensor | None = None
    final: Tensor | None = None
    frozen: tuple[FrozenNorm, ...] | None = None
    divided: FrozenNorm | None = None


class LayerWeights(NamedTuple):
    """The effective weights of a layer as they stand now.

    Attributes:
        projection: (d, h * v), the gain, the number and the centring and weight of the attention's own norm included;
            what that norm divides by depends on the token and is left out.
        bias: (d,) the projection's bias, with the same included, or None.
        shift: (d,) the bias of the attention's own norm, the number included, or None.
    """

    projection: Tensor
    bias: Tensor | None
    shift: Tensor | None = None


class LayerInputs(NamedTuple):
    """What the maths takes of a layer, see :func:`globenc_lightning.functional.local_maps`."""

    attention: Tensor
    values: Tensor
    projection: Tensor
    residual: Tensor
    mixed: Tensor | None
    norms: dict[str, tuple[FrozenNorm, ...]]


_PLAIN_MAPS = (nn.Linear, NonDynamicallyQuantizableLinear)
"""Classes that compute with their weight as it stands; the second is that of ``nn.MultiheadAttention``."""


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
    if isinstance(module, nn.Linear) and type(module) in _PLAIN_MAPS and _is_plain(module):
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
    branch = layer.branches[0]
    shift = None if branch.norm is None else branch.norm.parameter(branch.norm.bias)
    if branch.norm is not None and branch.norm.centered:
        weight, bias = weight - weight.mean(0, keepdim=True), None if bias is None else bias - bias.mean()
    for factor in (
        None if branch.gain is None else branch.gain.value(),
        None if branch.norm is None else branch.norm.factor(),
        None if branch.factor == 1 else weight.new_full((1,), branch.factor),
    ):
        if factor is not None:
            weight, bias = weight * factor.unsqueeze(-1), None if bias is None else bias * factor
    return LayerWeights(weight, bias, shift if shift is None or branch.factor == 1 else shift * branch.factor)


def layer_inputs(
    layer: Layer, activations: LayerActivations, weights: LayerWeights, *, mixed: bool = True
) -> LayerInputs:
    """What the maths takes of a layer: working precision, frozen norms, the sum of what is mixed if it is wanted."""
    frozen, bias = frozen_norms(layer, activations), weights.bias
    residual = layer.branches[0].stream(working(activations.residual))
    summed = None
    if mixed:
        summed = working(attended_of(layer, activations))
        summed = summed if weights.shift is None else summed - weights.shift
    kept = layer.branches[1].kept
    if layer.rule != POST_LN and layer.norms and kept != 1:
        frozen = (replace(frozen[0], scale=frozen[0].scale / abs(kept)), *frozen[1:])
    norms = {"N-Res": frozen, "N-ResLN": frozen, "N-Enc": frozen}
    if layer.rule == POST_LN:
        second = frozen[1] if kept == 1 else replace(frozen[1], scale=frozen[1].scale / abs(kept))
        norms = {"N-ResLN": frozen[:1], "N-Enc": (frozen[0], second, *frozen[2:])}
    divided = _divided(layer, activations)
    if divided is not None:
        # All of it divided by what the attention's norm divides by, and the residual multiplied with that.
        residual = residual * divided.scale.unsqueeze(-1)
        summed = None if summed is None else summed * divided.scale.unsqueeze(-1)
        norms = dict.fromkeys(norms, (divided, *frozen)) | {"N": (divided,)}
    return LayerInputs(
        working(activations.attention.probabilities),
        working(activations.attention.repeated_values()),
        weights.projection,
        residual,
        summed if summed is None or bias is None else summed - bias,
        norms,
    )


class AltiInputs(NamedTuple):
    """What the maths of ALTI takes of a layer, see :func:`globenc_lightning.functional.alti.alti`."""

    attention: Tensor
    values: Tensor
    projection: Tensor
    residual: Tensor
    output: Tensor
    mask: Tensor
    norm: FrozenNorm | None
    divided: Tensor | None


def alti_inputs(layer: Layer, activations: LayerActivations, weights: LayerWeights, mask: Tensor) -> AltiInputs:
    """What ALTI takes of a layer: up to what the feed-forward network is given, or would be beside it (parallel)."""
    post = layer.rule == POST_LN
    divided = _divided(layer, activations)
    return AltiInputs(
        working(activations.attention.probabilities),
        working(activations.attention.repeated_values()),
        weights.projection,
        layer.branches[0].stream(working(activations.residual)),
        working(_seen(activations.normed) if post else attended_of(layer, activations)),
        mask,
        frozen_norms(layer, activations)[0] if post else None,
        None if divided is None else divided.scale,
    )


def attended_of(layer: Layer, activations: LayerActivations) -> Tensor:
    """The residual and the attention's output, added, (b, q, d); where no module is given it, it is added up here."""
    if activations.attended is None:
        branch = layer.branches[0]
        joined = branch.joined(working(_seen(activations.projected)))
        activations.attended = branch.stream(working(activations.residual)) + joined
    return activations.attended


def frozen_norms(layer: Layer, activations: LayerActivations) -> tuple[FrozenNorm, ...]:
    """The norms of a layer with their statistics frozen at what entered them; found once, and kept with it."""
    if activations.frozen is None:
        entering = [activations.attended] if layer.rule == POST_LN else []
        entering += [activations.stream] if layer.norms else []
        entering += [activations.output] if len(layer.norms) > 2 else []
        activations.frozen = tuple(
            norm.frozen(working(_seen(tensor))) for norm, tensor in zip(layer.norms, entering, strict=True)
        )
    return activations.frozen


def _divided(layer: Layer, activations: LayerActivations) -> FrozenNorm | None:
    """What the attention's own norm divides its output by, as a norm that does nothing else; None without such a norm.

    Its centring and its weight are in :class:`LayerWeights`.
    """
    norm = layer.branches[0].norm
    if norm is not None and activations.divided is None:
        scale = norm.frozen(working(_seen(activations.projected))).scale
        activations.divided = FrozenNorm(None, scale, centered=False)
    return activations.divided


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
    and the final norm's formula gives what it gives. sublayer-norm: the same, with the vectors through the attention's
    own norm, frozen at what really entered it, and that norm's bias. parallel: the sum of the attention's vectors and
    the bias is what the projection gave, and the layer's input, that and the feed-forward network's output are the
    stream that goes on. Numbers that a sub-layer's output or the stream is multiplied by stand in each of these sums.
    Sums over ``k`` use the recomputed attention probabilities, the values and the effective weight, not the model's own
    intermediate results.

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
    attended, stream = working(attended_of(layer, activations)), working(_seen(activations.stream))
    dtype = activations.residual.dtype
    frozen = frozen_norms(layer, activations)
    biases = [norm.parameter(norm.bias) for norm in layer.norms]
    residual = layer.branches[0].stream(working(activations.residual))
    divided = _divided(layer, activations)
    tested = directions
    if layer.rule == POST_LN:
        through2 = _transposed(directions, frozen[1])
        tested = torch.cat([directions, _transposed(through2, frozen[0])])
    added_by_attention = _added_by_attention(activations, weights, tested, divided)
    attention, n = added_by_attention[..., : len(directions)], len(directions)
    flat = residual.flatten(0, 1)
    summed = torch.addmm(added_by_attention.flatten(0, 1), flat, tested.T).view_as(added_by_attention)
    along = F.linear(attended, directions)
    size = attention
    if everywhere:
        # Terms that cancel leave their rounding.
        terms = _added_by_attention(activations, weights, directions, divided, absolute=True)
        size = attention.abs() + 64 * torch.finfo(dtype).eps / tolerance(dtype) * terms
    if layer.rule == PARALLEL:
        # What the projection gave is known by itself, and not only as a part of the stream.
        given = F.linear(layer.branches[0].joined(working(_seen(activations.projected))), directions)
        found = [Distance(attention - given, size, None)]
    else:
        found = [Distance(summed[..., :n] - along, size, along)]
    second = layer.branches[1]
    if layer.rule == POST_LN:
        normed = second.stream(working(_seen(activations.normed)))
        if layer.scaled:
            found += _sum_distances(normed, activations, second, attention, directions)
        bias = None if biases[0] is None else second.stream(through2 @ biases[0])
        rest = F.linear(stream - normed, through2, bias)
        total = torch.addcdiv(rest, second.stream(summed[..., n:]), frozen[0].scale.unsqueeze(-1))
        expected = F.linear(working(_seen(activations.output)), directions)
        found.append(Distance(_output(total, frozen[1], biases[1], directions) - expected, expected, None))
        if len(layer.norms) > 2:
            found.append(_norm_distance(frozen[2], biases[2], activations.output, activations.final, directions))
        return found

    before = attended if layer.rule == PARALLEL else second.stream(attended)
    own = attention if layer.rule == PARALLEL else None
    found += _sum_distances(before, activations, second, own, directions)
    if layer.norms:
        found.append(_norm_distance(frozen[0], biases[0], activations.stream, activations.output, directions))
    return found


def _norm_distance(
    norm: FrozenNorm, bias: Tensor | None, entering: Tensor | None, leaving: Tensor | None, directions: Tensor
) -> Distance:
    """How far a frozen norm of what enters it is from what leaves it."""
    total = F.linear(working(_seen(entering)), _transposed(directions, norm))
    expected = F.linear(working(_seen(leaving)), directions)
    return Distance(_output(total, norm, bias, directions) - expected, expected, None)


def _output(total: Tensor, norm: FrozenNorm, bias: Tensor | None, directions: Tensor) -> Tensor:
    """What a frozen norm gives of what is left to divide by its scale, along the directions, (b, q, n)."""
    scale = norm.scale.unsqueeze(-1)
    return total / scale if bias is None else torch.addcdiv(directions @ bias, total, scale)


def errors_of(found: Sequence[Distance], mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest of each distance over the real tokens and directions, each relative to its own size.

    So nothing large hides what is small beside it: the attention's output is compared with what it is itself, as far as
    the rounding of the stream that it is added to lets it be told; the output (post-LN) or what is added to the stream
    (the other rules) likewise.

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
        return torch.full((len(found),), float("inf"), device=mask.device)
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


def _sum_distances(
    before: Tensor, activations: LayerActivations, branch: Branch, attention: Tensor | None, directions: Tensor
) -> list[Distance]:
    """How far the stream before the feed-forward network and what that adds are from the stream after it.

    Relative to what is added; and to the attention's output along the directions (b, q, n) as well, where that joins in
    the same sum.
    """
    added = F.linear(branch.joined(working(_seen(activations.added))), directions)
    along, after = F.linear(before, directions), F.linear(working(_seen(activations.stream)), directions)
    distance = along + added - after
    found = [Distance(distance, added, after)]
    if attention is not None:
        summed = torch.maximum(torch.maximum(along.abs(), added.abs()), after.abs())
        found.append(Distance(distance, attention, summed))
    return found


def _transposed(directions: Tensor, norm: FrozenNorm) -> Tensor:
    """The directions that a frozen norm's output is tested in, taken to its input (its scale left out)."""
    directions = directions if norm.weight is None else directions * norm.weight
    return directions - directions.mean(-1, keepdim=True) if norm.centered else directions


def _added_by_attention(
    activations: LayerActivations,
    weights: LayerWeights,
    directions: Tensor,
    divided: FrozenNorm | None,
    absolute: bool = False,
) -> Tensor:
    """What the attention adds to the stream along the directions, biases included, (b, q, n).

    Divided by what its own norm divides by, where it has one; the sum of the terms' sizes if wanted.
    """
    values, projection = working(activations.attention.repeated_values()), weights.projection
    bias, shift = weights.bias, weights.shift
    if absolute:
        values, projection = values.abs(), projection.abs()
        bias, shift = None if bias is None else bias.abs(), None if shift is None else shift.abs()
    h, v = values.shape[1], values.shape[3]
    through = (directions @ projection).view(-1, h, v).transpose(0, 1)
    # Tokens come last in memory: a product with a few columns side by side would take four times as long.
    seen = torch.matmul(through, values.transpose(2, 3)).transpose(2, 3)
    total = torch.matmul(working(activations.attention.probabilities), seen).sum(1)
    total = total if bias is None else total + directions @ bias
    total = total if divided is None else total / divided.scale.unsqueeze(-1)
    return total if shift is None else total + directions @ shift


def random_directions(width: int, like: Tensor, count: int = 2) -> Tensor:
    """Fixed random directions for :func:`reconstruction_error`, (n, d), drawn without touching the global state."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(like)
