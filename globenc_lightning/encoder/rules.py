"""How one layer is put together: each rule is tried on what the structure pass saw, the paper's first.

A rule looks for the tensors that have to add up: the attention's output ``o``, the layer's input ``x``, the sum that a
later module is given, the feed-forward network's output. What it finds is proven afterwards, see ``structure.py``.

    post-LN, pre-LN   a norm is given x + o; its output, or its input, plus the feed-forward network's goes on
    sublayer-norm     a norm is given o; some module is given x + norm(o); that plus the feed-forward network's goes on
    parallel          a module is given x + o + the feed-forward network's output
    scaled            post-LN or pre-LN, with numbers before x or o, found as the coefficients that fit

Axes: ``b`` example, ``q`` token that receives, ``d`` hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from globenc_lightning.encoder.fitting import constants
from globenc_lightning.encoder.layers import (
    PARALLEL,
    POST_LN,
    PRE_LN,
    SUBLAYER_NORM,
    Branch,
    Gain,
    Layer,
    LayerActivations,
)
from globenc_lightning.encoder.norms import FEW, Norm, at_least, tolerance, working
from globenc_lightning.encoder.recording import (
    Found,
    ModuleCall,
    Recording,
    Role,
    argument_of,
    common_path,
    equal,
    input_of,
    stream_of,
)
from globenc_lightning.encoder.trace import AttentionCall
from globenc_lightning.errors import UnsupportedEncoderError

Teller = tuple[ModuleCall, int | str]
"""The call that is given a tensor, and as which argument."""


@dataclass(frozen=True, eq=False)
class _Look:
    """What the rules look at, for one attention call.

    Attributes:
        index: the layer's index.
        where: the encoder and the attention call, for messages.
        recording: what the structure pass saw.
        norms: the norms among the calls, by their start.
        attention: the attention call.
        after: the module calls from this attention call to the next.
        projections: those that take the heads' context.
        earlier: what was seen before the attention call, the latest first.
        streams: what may be the layer's input: what the layer below hands on; of the first layer, anything earlier.
        gains: parameters that may be a LayerScale.
    """

    index: int
    where: str
    recording: Recording
    norms: Mapping[int, Norm]
    attention: AttentionCall
    after: Sequence[ModuleCall]
    projections: Sequence[ModuleCall]
    earlier: Sequence[Tensor]
    streams: Sequence[Tensor]
    gains: Sequence[Gain]

    @property
    def mask(self) -> Tensor:
        """(b, s) true for real tokens."""
        return self.recording.mask

    @property
    def first(self) -> Tensor:
        """The first hidden state that was seen: all later ones are computed from it."""
        return self.earlier[-1]

    def residual(self, summed: Tensor, output: Tensor) -> Tensor | None:
        """The layer's input, if the sum is it and the output, added."""
        rest = summed - output
        return next((one for one in self.streams if equal(one, rest, self.mask, summed)), None)


def find_layer(index: int, recording: Recording, norms: Mapping[int, Norm], below: Found | None) -> Found:
    """Find one layer: projection, residual and norms, and how the feed-forward network is added.

    Args:
        index: the layer's index.
        recording: what the structure pass saw.
        norms: the norms among the calls, by their start.
        below: the layer before, or None.

    Returns:
        The layer, its activations and the calls that tell them.

    Raises:
        UnsupportedEncoderError: naming the module that no rule explains.
    """
    look = _look(index, recording, norms, below)
    broken: list[str] = []
    half = _sum_in_norm(look, broken)
    if half is not None:
        return _second_half(look, half)
    found = _norm_on_output(look)
    if found is not None:
        return found
    unknown = _sum_in_no_norm(look)
    # Where a module is given x + o, the feed-forward network is not beside the attention but after it.
    for rule in () if unknown is not None else (_parallel,) if broken else (_parallel, _scaled):
        found = rule(look)
        if found is not None:
            return found
    raise UnsupportedEncoderError(_reason(look, broken, unknown))


def _look(index: int, recording: Recording, norms: Mapping[int, Norm], below: Found | None) -> _Look:
    mask = recording.mask
    time, attention = recording.attention[index]
    until = recording.attention[index + 1][0] if index + 1 < len(recording.attention) else float("inf")
    after = [call for call in recording.calls if time < call.start < until]
    where = f"{recording.encoder}, attention call {index + 1}"
    context = attention.context.transpose(1, 2).flatten(2)
    mixed = torch.matmul(working(attention.probabilities), working(attention.repeated_values()))
    if not equal(mixed.to(context.dtype).transpose(1, 2).flatten(2), context, mask):
        raise UnsupportedEncoderError(
            f"{where}: the attention probabilities times the values are not what the attention call returned."
        )
    projections = [call for call in recording.projected if time < call.start < until]
    projections += [
        call for call in after if len(call.inputs) == 1 and call.outputs and equal(input_of(call), context, mask)
    ]
    if not projections:
        raise UnsupportedEncoderError(
            f"{where}: no module takes the heads' concatenated context vectors, so the output projection is unknown."
        )
    normed = next((call.name for call in projections if call.start in norms), None)
    if normed is not None:
        raise UnsupportedEncoderError(
            f"{where}: {normed} normalises the heads' context vectors before the output projection, and there is no "
            "rule for it."
        )
    earlier = list(_seen_before(recording, time))
    streams = earlier if below is None else [stream_of(below)]
    gains = _gains(recording, norms, time, until)
    return _Look(index, where, recording, norms, attention, after, projections, earlier, streams, gains)


@dataclass(frozen=True, eq=False)
class _Half:
    """A layer up to what the feed-forward network is given.

    Attributes:
        layer: the layer, its second branch unknown.
        activations: what is known of them.
        roles: the calls that tell them.
        first: the call that is given the sum of the layer's input and the attention's output.
    """

    layer: Layer
    activations: LayerActivations
    roles: list[tuple[ModuleCall, Role]]
    first: ModuleCall


def _sum_in_norm(look: _Look, broken: list[str]) -> _Half | None:
    """A norm that is given the layer's input and the attention's output, added.

    Args:
        look: what is looked at.
        broken: takes the names of norms that are given the attention's output and something else than the layer's
            input.
    """
    for projection in look.projections:
        for first in look.after:
            if first.start not in look.norms or first.start < projection.end:
                continue
            attended = input_of(first)
            if attended.shape != projection.outputs[0].shape:
                continue
            for gain in (None, *look.gains):
                output = _gained(projection.outputs[0], gain)
                x = look.residual(attended, output)
                if x is not None:
                    return _half(look, "", projection, first, argument_of(first), x, Branch(gain))
                if gain is None and any(equal(one, attended - output, look.mask, attended) for one in look.earlier):
                    broken.append(first.name)
    return None


def _half(
    look: _Look, rule: str, projection: ModuleCall, first: ModuleCall, argument: int | str, x: Tensor, branch: Branch
) -> _Half:
    name = common_path(projection.name, first.name) or look.recording.encoder
    layer = Layer(name, rule, projection.module, projection.name, (), (branch, Branch()), look.recording.channels_first)
    activations = LayerActivations(look.attention, x, first.inputs[argument])
    gives = "normed" if rule == "" else None
    return _Half(layer, activations, [(first, Role(look.index, "attended", argument, gives=gives))], first)


def _norm_on_output(look: _Look) -> Found | None:
    """A norm on the attention's output alone; then any module that is given the layer's input and that, added."""
    for projection in look.projections:
        for inner in look.after:
            if inner.start not in look.norms or inner.start < projection.end:
                continue
            if not equal(input_of(inner), projection.outputs[0], look.mask):
                continue
            for first, argument in _given_after(look, inner):
                x = look.residual(first.inputs[argument], inner.outputs[0])
                if x is None:
                    continue
                branch = Branch(norm=look.norms[inner.start])
                half = _half(look, SUBLAYER_NORM, projection, first, argument, x, branch)
                half.activations.projected = input_of(inner)
                half.roles.insert(0, (inner, Role(look.index, "projected", argument_of(inner))))
                found = _stream_goes_on(look, half, fit=False)
                if found is not None:
                    return found
    return None


def _sum_in_no_norm(look: _Look) -> ModuleCall | None:
    """A module that is no known norm and is given the layer's input and the attention's output, added."""
    for projection in look.projections:
        for first, argument in _given_after(look, projection):
            if look.residual(first.inputs[argument], projection.outputs[0]) is not None:
                return first
    return None


def _parallel(look: _Look) -> Found | None:
    """The layer's input, the attention's output and the feed-forward network's, added in one place."""
    few = tuple(look.mask.nonzero()[:FEW].T)
    # What such an attention gives is told by no call that could be watched.
    inside = {call.start for call in look.recording.projected}
    for projection in (one for one in look.projections if one.start not in inside):
        shape = projection.outputs[0].shape
        outs = [(call, out) for call in look.after for out in call.outputs if out.shape == shape]
        for gain in (None, *look.gains):
            output = _gained(projection.outputs[0], gain)
            for stream, teller in _streams_after(look, shape, projection.end):
                size = at_least(working(stream)[look.mask].abs().amax(0), stream.dtype) * tolerance(stream.dtype)
                for x in look.streams:
                    if x.shape != shape:
                        continue
                    rest = stream[few] - x[few] - output[few]
                    for call, out in outs:
                        # Most are not what is looked for, which a few tokens show.
                        if not bool(((out[few] - rest).abs() <= size).all()) or call is projection:
                            continue
                        if teller is not None and call.end > teller[0].start:
                            continue
                        if equal(out, stream - x - output, look.mask, stream):
                            return _parallel_layer(look, projection, call, out, stream, teller, x, gain)
    return None


def _parallel_layer(
    look: _Look,
    projection: ModuleCall,
    call: ModuleCall,
    out: Tensor,
    stream: Tensor,
    teller: Teller | None,
    x: Tensor,
    gain: Gain | None,
) -> Found:
    name = common_path(projection.name, call.name) or look.recording.encoder
    layer = Layer(
        name,
        PARALLEL,
        projection.module,
        projection.name,
        (),
        (Branch(gain), Branch()),
        look.recording.channels_first,
    )
    activations = LayerActivations(look.attention, x, projected=projection.outputs[0], added=out, stream=stream)
    roles = [
        (projection, Role(look.index, gives="projected", overwritten=projection.overwritten)),
        (call, Role(look.index, gives="added", overwritten=call.overwritten)),
    ]
    if teller is not None:
        roles.append((teller[0], Role(look.index, "stream", teller[1])))
    return Found(layer, activations, roles)


def _scaled(look: _Look) -> Found | None:
    """Post-LN or pre-LN, with numbers before the layer's input or the attention's output."""
    for projection in look.projections:
        for first in look.after:
            if first.start not in look.norms or first.start < projection.end:
                continue
            attended = input_of(first)
            for x in look.streams:
                numbers = constants(attended, x, projection.outputs[0], look.mask, look.first)
                if numbers is not None:
                    branch = Branch(kept=numbers[0], factor=numbers[1])
                    half = _half(look, "", projection, first, argument_of(first), x, branch)
                    return _second_half(look, half)
    return None


def _second_half(look: _Look, half: _Half) -> Found:
    """How the feed-forward network's output is added: without numbers before anything, or with those that fit."""
    for fit in (False, True):
        found = _norm_again(look, half, fit) or _stream_goes_on(look, half, fit)
        if found is not None:
            return found
    raise UnsupportedEncoderError(
        f"layer {look.index + 1} ({half.layer.name}): the output of a feed-forward network is added neither to what "
        f"leaves {half.first.name} (post-LN) nor to what enters it (pre-LN)."
    )


def _norm_again(look: _Look, half: _Half, fit: bool) -> Found | None:
    """post-LN: a second norm is given what left the first and the feed-forward network's output, added."""
    first = half.first
    normed = first.outputs[0]
    later = [call for call in look.after if call.start > first.end]
    for second in later:
        if second.start not in look.norms or input_of(second).shape != normed.shape:
            continue
        total = input_of(second)
        added = None if fit else total - normed
        for call in (one for one in later if one.end < second.start):
            for out in call.outputs:
                joined = _joined(look, total, normed, added, out, ())
                if joined is None:
                    continue
                name = common_path(half.layer.name, second.name) or half.layer.name
                activations = replace(
                    half.activations, normed=normed, stream=total, output=second.outputs[0], added=out if fit else None
                )
                roles = [*half.roles, (second, Role(look.index, "stream", argument_of(second), gives="output"))]
                if fit:
                    roles.append((call, Role(look.index, gives="added", overwritten=call.overwritten)))
                norms = (look.norms[first.start], look.norms[second.start])
                branches = (half.layer.branches[0], joined)
                return Found(
                    replace(half.layer, name=name, rule=POST_LN, norms=norms, branches=branches), activations, roles
                )
    return None


def _stream_goes_on(look: _Look, half: _Half, fit: bool) -> Found | None:
    """Not post-LN: the feed-forward network's output is added to what it was given, and that goes on."""
    attended = half.activations.attended
    if attended is None:
        raise AssertionError("what the feed-forward network is given is known by now")
    first = half.first
    # A norm is not the network; another module that is given the sum may be.
    later = [call for call in look.after if call.start > first.end or (call is first and first.start not in look.norms)]
    for stream, teller in _streams_after(look, attended.shape, first.end):
        added = None if fit else stream - attended
        for call in later:
            if teller is not None and call.end > teller[0].start:
                continue
            for out in call.outputs:
                joined = _joined(look, stream, attended, added, out, look.gains)
                if joined is None:
                    continue
                roles = [*half.roles, (call, Role(look.index, gives="added", overwritten=call.overwritten))]
                if teller is not None:
                    roles.append((teller[0], Role(look.index, "stream", teller[1])))
                name = common_path(half.layer.name, call.name) or half.layer.name
                rule, branches = half.layer.rule or PRE_LN, (half.layer.branches[0], joined)
                return Found(
                    replace(half.layer, name=name, rule=rule, branches=branches),
                    replace(half.activations, added=out, stream=stream),
                    roles,
                )
    return None


def _joined(
    look: _Look, total: Tensor, stream: Tensor, added: Tensor | None, output: Tensor, gains: Sequence[Gain]
) -> Branch | None:
    """How an output was added to a stream, if the total is that sum.

    Args:
        look: what the rules look at.
        total: (b, q, d) the sum.
        stream: (b, q, d) what it was added to.
        added: (b, q, d) their difference; None to look for numbers that fit.
        output: (b, q, d) the output.
        gains: what it may be multiplied by before.
    """
    if output.shape != stream.shape:
        return None
    if added is None:
        numbers = constants(total, stream, output, look.mask, look.first)
        return None if numbers is None else Branch(kept=numbers[0], factor=numbers[1])
    return next(
        (Branch(gain) for gain in (None, *gains) if equal(_gained(output, gain), added, look.mask, total)), None
    )


def _reason(look: _Look, broken: Sequence[str], unknown: ModuleCall | None) -> str:
    """Why no rule explains what follows an attention call."""
    if broken:
        return (
            f"{look.where}: what the residual connection before {broken[0]} adds is not the output of the layer "
            "before: something between the two layers changes the hidden states (a convolution or another norm), and "
            "there is no rule for it."
        )
    joined = next(
        (call.name for call in look.after if _is_on_joined_texts(call, look.projections[0].outputs[0].shape[-1])), None
    )
    reason = (
        "this is neither a post-LN nor a pre-LN layer, nor one with norms on its sub-layers' outputs or with attention "
        "and feed-forward network in parallel."
    )
    if unknown is not None:
        reason = (
            f"{unknown.name} ({type(unknown.module).__name__}) does, and what it computes is neither a LayerNorm nor "
            "an RMSNorm. So this is neither a post-LN nor a pre-LN layer, and there is no rule for it."
        )
    if joined is not None:
        reason = (
            f"{joined} is given tensors that are not of the axes (examples, tokens, width), as where the texts of a "
            "batch are joined to one before the feed-forward network, and there is no rule for it."
        )
    return (
        f"{look.where}: no norm takes the output of {look.projections[0].name} plus an earlier hidden state: {reason}"
    )


def _is_on_joined_texts(call: ModuleCall, width: int) -> bool:
    """Whether a call is that of what may be a norm, with tensors of other axes than hidden states have."""
    shapes = [tuple(one.shape) for one in call.module.parameters(recurse=False)]
    return call.leaf and not call.inputs and bool(shapes) and set(shapes) == {(width,)}


def _given_after(look: _Look, before: ModuleCall) -> Iterator[Teller]:
    """Calls after another one, with each tensor that they are given; norms first."""
    later = [call for call in look.after if call.start > before.end]
    for call in sorted(later, key=lambda one: one.start not in look.norms):
        for argument, tensor in call.inputs.items():
            if tensor.shape == before.outputs[0].shape:
                yield call, argument


def _seen_before(recording: Recording, time: int) -> Iterator[Tensor]:
    """Tensors that modules were given or gave before a time, the latest first."""
    for call in reversed(recording.calls):
        if call.start < time:
            # A call that encloses the time has returned only later.
            if call.end < time:
                yield from call.outputs
            yield from call.inputs.values()


def _streams_after(look: _Look, shape: torch.Size, time: int) -> Iterator[tuple[Tensor, Teller | None]]:
    """What may be the residual stream after a layer: what later modules are given, or the encoder's own output."""
    for call in look.after:
        if call.start > time:
            for argument, tensor in call.inputs.items():
                if tensor.shape == shape:
                    yield tensor, (call, argument)
    for output in look.recording.outputs:
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


def _gained(tensor: Tensor, gain: Gain | None) -> Tensor:
    """A sub-layer's output times a gain, if that is of its width."""
    if gain is None:
        return tensor
    factor = gain.value().to(tensor.dtype)
    return tensor * factor if factor.shape[0] == tensor.shape[-1] else tensor
