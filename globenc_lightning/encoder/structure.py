"""Which modules are a layer's projection, norms and residual: found by data flow, and proven.

One forward pass over a few examples (the structure pass) records what every module is given and gives. From there:

    attention call -> context -> the linear map that takes the context, o
                              -> the norm whose input less o is the layer's input x
       post-LN: -> the norm whose input less the first norm's output is what another module gave (the feed-forward
                   network); its output is the next layer's x
       pre-LN:  -> the module whose output, added to what entered the first norm, is the next layer's x

No module is known by its name or class. What was found is proven by the identities of
:func:`~globenc_lightning.encoder.layers.reconstruction_error`, and a gradient shows that values and feed-forward are
computed token by token. What cannot be proven is refused.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden, ``v`` head
width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from globenc_lightning.encoder.layers import (
    POST_LN,
    PRE_LN,
    Gain,
    Layer,
    LayerActivations,
    layer_weights,
    reconstruction_error,
)
from globenc_lightning.encoder.norms import Norm, difference, find_norm, tolerance, working
from globenc_lightning.encoder.trace import AttentionCall
from globenc_lightning.errors import UnsupportedEncoderError


class ModuleCall(NamedTuple):
    """What one call of a module was given and gave.

    Attributes:
        module: the module.
        name: its path in the model.
        inputs: its tensor arguments of three axes, by position or keyword, as (b, q, d).
        outputs: the tensors of three axes in what it returned, as (b, q, d).
        start: when it was called, counting every call and return of the forward pass.
        end: when it returned.
        leaf: whether no other module was called inside it.
    """

    module: nn.Module
    name: str
    inputs: Mapping[int | str, Tensor]
    outputs: Sequence[Tensor]
    start: int
    end: int
    leaf: bool


@dataclass(frozen=True, eq=False)
class Recording:
    """Everything that the structure pass saw inside one call of an encoder.

    Attributes:
        encoder: the path of the encoder in the model, for messages.
        calls: the module calls, in the order of their start.
        attention: the attention calls with the time of each.
        outputs: the tensors of three axes that the encoder returned.
        mask: (b, s) true for real tokens.
        channels_first: whether the tensors of ``calls`` were (b, d, q) and are transposed here.
        originals: what was transposed, by the identity of the transposed tensor.
        makeup: what the encoder was made of before its forward pass, see :func:`makeup_of`.
        sequence_first: whether the tensors of ``calls`` were (q, b, d) and are transposed here.
        projected: the projections inside attention calls that project their output themselves, as calls of the modules
            that hold their weights; (b, q, d) in any case.
        given: the tensors of three axes that the encoder itself was called with, by position or keyword.
    """

    encoder: str
    calls: Sequence[ModuleCall]
    attention: Sequence[tuple[int, AttentionCall]]
    outputs: Sequence[Tensor]
    mask: Tensor
    channels_first: bool = False
    originals: Mapping[int, Tensor] = field(default_factory=dict)
    makeup: tuple[Any, ...] = ()
    sequence_first: bool = False
    projected: Sequence[ModuleCall] = ()
    given: Mapping[int | str, Tensor] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[int, int]:
        """The axes of the model's own tensors that are transposed here, where they are."""
        return (0, 1) if self.sequence_first else (1, 2)


class Role(NamedTuple):
    """What a module call tells about a layer.

    Attributes:
        layer: the layer's index.
        given: the activation that one of its arguments is, or None.
        argument: which argument.
        gives: the activation that it returns, or None.
    """

    layer: int
    given: str | None = None
    argument: int | str = 0
    gives: str | None = None


class WatchedCall(NamedTuple):
    """One call of a module that is looked at in every forward pass, and what it tells."""

    module: nn.Module
    roles: tuple[Role, ...]


@dataclass(frozen=True, eq=False)
class Structure:
    """An encoder that was read and proven.

    Attributes:
        encoder: the encoder module.
        encoder_name: its path in the model.
        layers: the layers in call order; a shared module stands in several of them.
        entry: the first module that receives the encoder's first hidden states and computes attention from them.
        entry_argument: which argument they are: a position or a keyword.
        order: all calls of the watched modules, in the order of the forward pass.
        channels_first: whether watched modules work on (b, d, q).
        causal: whether no token attends to what comes after it.
        errors: the reconstruction error of each layer.
        length: the number of real tokens of the longest example that it was proven with.
        span: the number of tokens, padding included, over which values and feed-forward networks were shown to look at
            one token at a time.
        sequence_first: whether watched modules work on (q, b, d).
        makeup: what the encoder was made of, see :func:`makeup_of`.
        width: the size ``d`` of its hidden states.
    """

    encoder: nn.Module
    encoder_name: str
    layers: tuple[Layer, ...]
    entry: nn.Module
    entry_argument: int | str
    order: tuple[WatchedCall, ...]
    channels_first: bool
    causal: bool
    errors: tuple[float, ...]
    length: int
    makeup: tuple[Any, ...]
    width: int
    span: int
    sequence_first: bool = False

    @property
    def rule(self) -> str:
        """The rule of its layers."""
        return self.layers[0].rule

    @property
    def closing(self) -> nn.Module | None:
        """The final norm, where it stands outside of the encoder: after a list of blocks."""
        norms = self.layers[-1].norms[0 if self.rule == PRE_LN else 2 :]
        inside = {id(module) for module in self.encoder.modules()}
        return next((norm.module for norm in norms if id(norm.module) not in inside), None)


class _Found(NamedTuple):
    """A layer that was found: with its activations, and the calls that tell them."""

    layer: Layer
    activations: LayerActivations
    roles: list[tuple[ModuleCall, Role]]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in what a module returned: itself, or those in its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, tuple | list) else []


def resolve(recording: Recording, encoder: nn.Module) -> Structure:
    """Find the layers in what the structure pass recorded, and prove them.

    Args:
        recording: what the structure pass saw.
        encoder: the encoder module.

    Returns:
        The structure.

    Raises:
        UnsupportedEncoderError: naming the layer, the module and the reason.
    """
    if not recording.attention:
        raise UnsupportedEncoderError(
            f"{recording.encoder} ({type(encoder).__name__}): no attention call was seen in its forward pass. It has "
            "no softmax attention over all pairs of tokens, or computes it in a way that cannot be read (einsum, "
            "sparse or nn.MultiheadAttention kernels). GlobEnc is not defined for it here."
        )
    tokens = recording.mask.shape[1]
    for index, (_, attention) in enumerate(recording.attention):
        if attention.projected is not None and attention.projected.refusal:
            raise UnsupportedEncoderError(
                f"{recording.encoder}, attention call {index + 1}, of a multi-head attention: "
                f"{attention.projected.refusal}."
            )
        if tuple(attention.probabilities.shape[-2:]) != (tokens, tokens):
            raise UnsupportedEncoderError(
                f"{recording.encoder}, attention call {index + 1}: {attention.probabilities.shape[2]} tokens attend to "
                f"{attention.probabilities.shape[3]} in a sequence of {tokens}; only self-attention over one sequence "
                "is defined (no cross-attention, prefix or memory)."
            )
    try:
        return _resolve(recording, encoder)
    except UnsupportedEncoderError as error:
        examples = len(recording.mask)
        for turned in (_channels_last(recording), _examples_first(recording)):
            if turned is None:
                continue
            try:
                return _resolve(turned, encoder)
            except UnsupportedEncoderError as reason:
                if turned.sequence_first and tokens != examples:
                    raise reason from error
        # The reason that counts is the one found with the usual layout.
        raise


def _resolve(recording: Recording, encoder: nn.Module) -> Structure:
    norms = {call.start: norm for call in recording.calls if (norm := _norm_of(call, recording.mask)) is not None}
    found: list[_Found] = []
    for index in range(len(recording.attention)):
        found.append(_resolve_layer(index, recording, norms, found[-1] if found else None))
    _close(recording, norms, found)

    errors = []
    for index, (layer, activations, _) in enumerate(found):
        attention = activations.attention
        width = attention.probabilities.shape[1] * attention.values.shape[-1]
        weights = layer_weights(layer, width, activations.residual)
        error = reconstruction_error(layer, activations, weights, recording.mask)
        allowed = layer.tolerance(activations.residual.dtype)
        if not error <= allowed:
            raise UnsupportedEncoderError(misses(index, layer, error, allowed))
        _prove_token_by_token(index, layer, activations, recording)
        errors.append(error)

    roles: dict[int, list[Role]] = {}
    for call, role in (pair for one in found for pair in one.roles):
        roles.setdefault(call.start, []).append(role)
    watched = {id(call.module) for one in found for call, _ in one.roles}
    order = tuple(
        WatchedCall(call.module, tuple(roles.get(call.start, ())))
        for call in recording.calls
        if id(call.module) in watched
    )
    entry, argument = _entry(recording, found[0].activations.residual, encoder)
    return Structure(
        encoder,
        recording.encoder,
        tuple(one.layer for one in found),
        entry,
        argument,
        order,
        recording.channels_first,
        all(_is_causal(call.probabilities, recording.mask) for _, call in recording.attention),
        tuple(errors),
        int(recording.mask.sum(1).max()),
        recording.makeup,
        found[0].activations.residual.shape[-1],
        recording.mask.shape[1],
        recording.sequence_first,
    )


def makeup_of(encoder: nn.Module) -> tuple[Any, ...]:
    """What an encoder is made of: modules, hooks, whatever stands in for a forward, and flags.

    The reconstruction identity sees what the decomposition uses. That values and feed-forward network look at one token
    at a time is shown by gradients when the structure is found; it has to be shown anew when one of these changes.
    """
    return tuple(
        (
            module,
            type(module),
            vars(module).get("forward"),
            tuple(module._forward_pre_hooks.values()),
            tuple(module._forward_hooks.values()),
            tuple((name, value) for name, value in vars(module).items() if type(value) in _FLAGS),
        )
        for module in encoder.modules()
    )


_FLAGS = (bool, int, float, str, type(None))


def misses(index: int, layer: Layer, error: float, allowed: float) -> str:
    """The message for a layer whose identity fails."""
    return (
        f"layer {index + 1} ({layer.name}): the {layer.rule} decomposition through {layer.parts()} misses what the "
        f"layer itself computes by {error:.1e} (allowed: {allowed:.0e}), so its figures would be wrong."
    )


def _resolve_layer(index: int, recording: Recording, norms: Mapping[int, Norm], below: _Found | None) -> _Found:
    """Find one layer: projection, residual and first norm, then which stream the feed-forward network is added to."""
    mask = recording.mask
    time, attention = recording.attention[index]
    until = recording.attention[index + 1][0] if index + 1 < len(recording.attention) else float("inf")
    after = [call for call in recording.calls if time < call.start < until]
    where = f"{recording.encoder}, attention call {index + 1}"
    context = attention.context.transpose(1, 2).flatten(2)
    mixed = torch.matmul(working(attention.probabilities), working(attention.repeated_values()))
    if not _equal(mixed.to(context.dtype).transpose(1, 2).flatten(2), context, mask):
        raise UnsupportedEncoderError(
            f"{where}: the attention probabilities times the values are not what the attention call returned."
        )
    projections = [call for call in recording.projected if time < call.start < until]
    projections += [
        call for call in after if len(call.inputs) == 1 and call.outputs and _equal(_input(call), context, mask)
    ]
    if not projections:
        raise UnsupportedEncoderError(
            f"{where}: no module takes the heads' concatenated context vectors, so the output projection is unknown."
        )
    earlier = list(_seen_before(recording, time))
    streams = earlier if below is None else [_stream(below)]
    gains = _gains(recording, norms, time, until)
    broken = None
    for projection in projections:
        for first in after:
            if first.start not in norms or first.start < projection.end:
                continue
            attended = _input(first)
            if attended.shape != projection.outputs[0].shape:
                continue
            for gain in (None, *gains):
                residual = attended - _scaled(projection.outputs[0], gain)
                x = next((one for one in streams if _equal(one, residual, mask, attended)), None)
                if x is None:
                    if gain is None and any(_equal(one, residual, mask, attended) for one in earlier):
                        broken = broken or first.name
                    continue
                name = _common_path(projection.name, first.name) or recording.encoder
                layer = Layer(name, "", projection.module, projection.name, (), (gain, None), recording.channels_first)
                activations = LayerActivations(attention, x, attended)
                return _second_half(index, layer, activations, first, recording, norms, after, gains)
    if broken is not None:
        raise UnsupportedEncoderError(
            f"{where}: what the residual connection before {broken} adds is not the output of the layer before: "
            "something between the two layers changes the hidden states (a convolution or another norm), and there is "
            "no rule for it."
        )
    joined = next(
        (call.name for call in after if _is_on_joined_texts(call, width=projections[0].outputs[0].shape[-1])), None
    )
    reason = "this is neither a post-LN nor a pre-LN layer."
    if joined is not None:
        reason = (
            f"{joined} is given tensors that are not of the axes (examples, tokens, width), as where the texts of a "
            "batch are joined to one before the feed-forward network, and there is no rule for it."
        )
    raise UnsupportedEncoderError(
        f"{where}: no norm takes the output of {projections[0].name} plus an earlier hidden state: {reason}"
    )


def _is_on_joined_texts(call: ModuleCall, width: int) -> bool:
    """Whether a call is that of what may be a norm, with tensors of other axes than hidden states have."""
    shapes = [tuple(one.shape) for one in call.module.parameters(recurse=False)]
    return call.leaf and not call.inputs and bool(shapes) and set(shapes) == {(width,)}


def _second_half(
    index: int,
    layer: Layer,
    activations: LayerActivations,
    first: ModuleCall,
    recording: Recording,
    norms: Mapping[int, Norm],
    after: Sequence[ModuleCall],
    gains: Sequence[Gain],
) -> _Found:
    mask = recording.mask
    attended, normed = _input(first), first.outputs[0]
    roles = [(first, Role(index, "attended", *_argument(first), gives="normed"))]
    later = [call for call in after if call.start > first.end]
    for second in later:
        if second.start in norms and _input(second).shape == normed.shape:
            added = _input(second) - normed
            between = (call for call in later if call.end < second.start)
            if any(_equal(out, added, mask, _input(second)) for call in between for out in call.outputs):
                name = _common_path(layer.name, second.name) or layer.name
                activations.normed, activations.stream = normed, _input(second)
                activations.output = second.outputs[0]
                roles.append((second, Role(index, "stream", *_argument(second), gives="output")))
                pair = (norms[first.start], norms[second.start])
                return _Found(replace(layer, name=name, rule=POST_LN, norms=pair), activations, roles)

    for stream, teller in _streams_after(first, after, recording):
        added = stream - attended
        for call in later:
            if teller is not None and call.end > teller[0].start:
                continue
            for out in call.outputs:
                for gain in (None, *gains):
                    if not _equal(_scaled(out, gain), added, mask, stream):
                        continue
                    activations.added, activations.stream = out, stream
                    roles.append((call, Role(index, gives="added")))
                    if teller is not None:
                        roles.append((teller[0], Role(index, "stream", teller[1])))
                    name = _common_path(layer.name, call.name) or layer.name
                    found = replace(layer, name=name, rule=PRE_LN, gains=(layer.gains[0], gain))
                    return _Found(found, activations, roles)
    raise UnsupportedEncoderError(
        f"layer {index + 1} ({layer.name}): the output of a feed-forward network is added neither to what leaves "
        f"{first.name} (post-LN) nor to what enters it (pre-LN)."
    )


def _close(recording: Recording, norms: Mapping[int, Norm], found: list[_Found]) -> None:
    """What follows the last layer: nothing, or the encoder's final norm."""
    layer, activations, roles = found[-1]
    last = _stream(found[-1])
    for call in recording.calls:
        if (
            call.start in norms
            and call.start > roles[0][0].end
            and _equal(_input(call), last, recording.mask)
            and any(_equal(call.outputs[0], output, recording.mask) for output in recording.outputs)
        ):
            if layer.rule == POST_LN:
                activations.final = call.outputs[0]
                roles.append((call, Role(len(found) - 1, gives="final")))
                found[-1] = _Found(replace(layer, norms=(*layer.norms, norms[call.start])), activations, roles)
                return
            activations.output = call.outputs[0]
            kept = [pair for pair in roles if pair[1].given != "stream"]
            kept.append((call, Role(len(found) - 1, "stream", *_argument(call), gives="output")))
            found[-1] = _Found(replace(layer, norms=(norms[call.start],)), activations, kept)
            return
    if not any(_equal(last, output, recording.mask) for output in recording.outputs):
        raise UnsupportedEncoderError(
            f"{recording.encoder}: what it returns is not the output of its last layer ({layer.name}): something "
            "follows that the decomposition does not know."
        )


def _prove_token_by_token(index: int, layer: Layer, activations: LayerActivations, recording: Recording) -> None:
    """Show by gradients that values and feed-forward network of each token look at no other token."""
    prove_token_by_token(
        index,
        layer,
        activations,
        recording.mask,
        separating_sets(recording.mask),
        recording.originals,
        recording.axes,
    )


def prove_token_by_token(
    index: int,
    layer: Layer,
    activations: LayerActivations,
    mask: Tensor,
    sets: Iterable[Tensor],
    originals: Mapping[int, Tensor] | None = None,
    axes: tuple[int, int] = (1, 2),
) -> None:
    """Show that values and feed-forward network of the tokens of each set depend on no token outside of it.

    Args:
        index: the layer's index.
        layer: the layer.
        activations: its activations, in the autograd graph.
        mask: (b, s) true for real tokens.
        sets: (s,) each, true for the tokens of the set.
        originals: the tensors that activations are transposed views of, by the identity of the view.
        axes: the axes that are exchanged in these: (b, d, q) or (q, b, d).

    Raises:
        UnsupportedEncoderError: naming the layer and what depends on other tokens.
    """
    after, source = (
        (activations.stream, activations.normed) if layer.rule == POST_LN else (activations.added, activations.attended)
    )
    if after is None or source is None:
        raise AssertionError("a layer that was found has all of its activations")
    values = activations.attention.values.transpose(1, 2).flatten(2)
    parts = (("the values", values, activations.residual), ("the feed-forward network", after, source))
    generator = torch.Generator().manual_seed(0)
    sets = list(sets)
    for what, part, seen in parts:
        hidden = (originals or {}).get(id(seen), seen)
        if not part.requires_grad or not hidden.requires_grad:
            raise UnsupportedEncoderError(_cannot_be_followed(index, layer, what))
        direction = torch.randn(part.shape, generator=generator, dtype=torch.float32).to(part)
        direction = direction.masked_fill(~mask.unsqueeze(-1), 0.0)
        for chosen in sets:
            inside = chosen.to(mask.device).expand_as(mask)
            (gradient,) = torch.autograd.grad(
                part, hidden, direction.masked_fill(~inside.unsqueeze(-1), 0.0), retain_graph=True, allow_unused=True
            )
            if gradient is None:
                raise UnsupportedEncoderError(_cannot_be_followed(index, layer, what))
            spread = (gradient if hidden is seen else gradient.transpose(*axes)).abs().amax(-1)
            largest = spread.masked_fill(~inside, 0.0).amax(1)
            # What is not finite has no gradient that tells anything; the identity speaks of it.
            if not bool((spread.masked_fill(inside, 0.0).amax(1) <= 1e-6 * largest).all()):
                raise UnsupportedEncoderError(
                    f"layer {index + 1} ({layer.name}): {what} of one token depends on other tokens (a convolution, "
                    "say); the decomposition knows no mixing but attention's."
                )


def separating_sets(mask: Tensor) -> list[Tensor]:
    """Sets of tokens that tell every token from every other: for any two, one set holds the first and not the second.

    Args:
        mask: (b, s) true for real tokens; only its width counts.

    Returns:
        (s,) each; every token lies in another half of them, so that there are as few sets as there can be.
    """
    width, count = mask.shape[1], 0
    # Of Sperner's theorem: so many different halves of ``count`` sets are there, and none lies within another.
    while comb(count, count // 2) < width:
        count += 1
    members = list(islice(combinations(range(count), count // 2), width))
    return [torch.tensor([number in member for member in members]) for number in range(count)]


def drawn_sets(mask: Tensor) -> list[Tensor]:
    """Half of the tokens, drawn, and the other half: any mixing over a distance shows, at a fraction of the cost."""
    generator = torch.Generator().manual_seed(mask.shape[1])
    half = torch.rand(mask.shape[1], generator=generator) < 0.5
    return [half, ~half]


def _cannot_be_followed(index: int, layer: Layer, what: str) -> str:
    return f"layer {index + 1} ({layer.name}): {what} cannot be followed back to the layer's hidden states."


def _entry(recording: Recording, first_hidden: Tensor, encoder: nn.Module) -> tuple[nn.Module, int | str]:
    time = recording.attention[0][0]
    for call in recording.calls:
        if call.start < time < call.end:
            for argument, tensor in call.inputs.items():
                if _equal(tensor, first_hidden, recording.mask):
                    return call.module, argument
    for argument, tensor in recording.given.items():
        if _equal(tensor, first_hidden, recording.mask):
            return encoder, argument
    raise UnsupportedEncoderError(
        f"{recording.encoder}: no module receives the hidden states that enter the first layer, so gradients with "
        "respect to them cannot be taken."
    )


def _channels_last(recording: Recording) -> Recording | None:
    """The recording with tensors of shape (b, d, q) turned around, or None if there are none."""
    tokens = recording.mask.shape[1]
    turned = _turned(recording, lambda tensor: tensor.shape[2] == tokens, (1, 2))
    return None if turned is None else replace(turned, channels_first=True)


def _examples_first(recording: Recording) -> Recording | None:
    """The recording with tensors of shape (q, b, d) turned around, or None if there are none."""
    shape = recording.mask.shape[::-1]
    turned = _turned(recording, lambda tensor: tensor.shape[:2] == shape, (0, 1))
    if turned is None:
        return None
    given = {
        key: tensor.transpose(0, 1) if tensor.shape[:2] == shape else tensor for key, tensor in recording.given.items()
    }
    return replace(turned, sequence_first=True, given=given)


def _turned(recording: Recording, fits: Callable[[Tensor], bool], axes: tuple[int, int]) -> Recording | None:
    """The recording with two axes of some tensors exchanged, or None if there are no such tensors."""
    originals: dict[int, Tensor] = {}

    def turned(tensor: Tensor) -> Tensor:
        if not fits(tensor):
            return tensor
        view = tensor.transpose(*axes)
        originals[id(view)] = tensor
        return view

    if not any(fits(t) for call in recording.calls for t in (*call.inputs.values(), *call.outputs)):
        return None
    calls = [
        call._replace(
            inputs={key: turned(tensor) for key, tensor in call.inputs.items()},
            outputs=[turned(tensor) for tensor in call.outputs],
        )
        for call in recording.calls
    ]
    return replace(recording, calls=calls, originals=originals)


def _norm_of(call: ModuleCall, mask: Tensor) -> Norm | None:
    if not call.leaf or len(call.inputs) != 1 or len(call.outputs) != 1:
        return None
    entering, leaving = _input(call), call.outputs[0]
    if entering.shape != leaving.shape or entering.shape[:2] != mask.shape:
        return None
    return find_norm(call.module, call.name, entering[mask], leaving[mask])


def _seen_before(recording: Recording, time: int) -> Iterator[Tensor]:
    """Tensors that modules were given or gave before a time, the latest first."""
    for call in reversed(recording.calls):
        if call.start < time:
            # A call that encloses the time has returned only later.
            if call.end < time:
                yield from call.outputs
            yield from call.inputs.values()


def _streams_after(
    first: ModuleCall, after: Sequence[ModuleCall], recording: Recording
) -> Iterator[tuple[Tensor, tuple[ModuleCall, int | str] | None]]:
    """What may be the residual stream after a layer: what later modules are given, or the encoder's own output."""
    shape = _input(first).shape
    for call in after:
        if call.start > first.end:
            for argument, tensor in call.inputs.items():
                if tensor.shape == shape:
                    yield tensor, (call, argument)
    for output in recording.outputs:
        if output.shape == shape:
            yield output, None


def _gains(recording: Recording, norms: Mapping[int, Norm], time: int, until: float) -> list[Gain]:
    """Parameters of one axis that may be a LayerScale: of no norm, and of no module with a weight matrix."""
    gains: dict[tuple[int, str], Gain] = {}
    for call in recording.calls:
        own = dict(call.module.named_parameters(recurse=False))
        near = call.end > time and call.start < until and call.start not in norms
        if near and all(parameter.dim() == 1 for parameter in own.values()):
            gains.update({(id(call.module), name): Gain(call.module, name) for name in own})
    return list(gains.values())


def _scaled(tensor: Tensor, gain: Gain | None) -> Tensor:
    if gain is None:
        return tensor
    factor = gain.value().to(tensor.dtype)
    return tensor * factor if factor.shape[0] == tensor.shape[-1] else tensor


def _stream(found: _Found) -> Tensor:
    """What a layer hands on to the next one."""
    stream = found.activations.output if found.layer.rule == POST_LN else found.activations.stream
    if stream is None:
        raise AssertionError("a layer that was found has all of its activations")
    return stream


def _is_causal(probabilities: Tensor, mask: Tensor) -> bool:
    real = mask.unsqueeze(1) & mask.unsqueeze(2)
    ahead = real & torch.ones_like(real).triu(1)
    return bool(ahead.any()) and not bool((probabilities.amax(1)[ahead] > 0).any())


def _input(call: ModuleCall) -> Tensor:
    return next(iter(call.inputs.values()))


def _argument(call: ModuleCall) -> tuple[int | str]:
    return (next(iter(call.inputs)),)


def _equal(left: Tensor, right: Tensor, mask: Tensor, scale: Tensor | None = None) -> bool:
    """Whether two tensors agree at the real tokens, each channel relative to itself or to a third tensor's channel."""
    if left.shape != right.shape or left.shape[:2] != mask.shape:
        return False
    size = None if scale is None else working(scale)[mask]
    return difference(working(left)[mask], working(right)[mask], size) <= tolerance(left.dtype)


def _common_path(*names: str) -> str:
    shared = []
    for level in zip(*(name.split(".") for name in names), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def names_of(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """A list of modules for a message: path and class."""
    return ", ".join(f"{name or 'the model itself'} ({type(module).__name__})" for name, module in modules)
