"""Which modules are a layer's projection, norms and residual: found by data flow, and proven.

One forward pass over a few examples (the structure pass) records what every module is given and gives. From there:

    attention call -> context -> the linear map that takes the context, o
                              -> the norm whose input less o is the layer's input x
       post-LN: -> the norm whose input less the first norm's output is what another module gave (the feed-forward
                   network); its output is the next layer's x
       pre-LN:  -> the module whose output, added to what entered the first norm, is the next layer's x

Further rules, for layers that are put together in another way, stand in :mod:`~globenc_lightning.encoder.rules`.
No module is known by its name or class. What was found is proven by the identities of
:func:`~globenc_lightning.encoder.layers.reconstruction_error`, and a gradient shows that values and feed-forward are
computed token by token. What cannot be proven is refused.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden, ``v`` head
width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from globenc_lightning.encoder.layers import (
    PARALLEL,
    POST_LN,
    Layer,
    LayerActivations,
    layer_weights,
    reconstruction_error,
)
from globenc_lightning.encoder.norms import Norm, find_norm
from globenc_lightning.encoder.recording import (
    Found,
    ModuleCall,
    Recording,
    Role,
    argument_of,
    as_returned,
    channels_last,
    equal,
    examples_first,
    in_layout_of,
    input_of,
    stream_of,
    texts_apart,
)
from globenc_lightning.encoder.rules import find_layer
from globenc_lightning.errors import UnsupportedEncoderError


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
        makeup: what the encoder was made of, see :func:`makeup_of`.
        width: the size ``d`` of its hidden states.
        joined: whether watched modules work on (b * q, d).
        sequence_first: whether watched modules work on (q, b, d).
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
    joined: bool = False
    sequence_first: bool = False

    @property
    def rule(self) -> str:
        """The rule of its layers."""
        return self.layers[0].rule

    @property
    def closing(self) -> nn.Module | None:
        """The final norm, where it stands outside of the encoder: after a list of blocks."""
        norms = self.layers[-1].norms[2 if self.rule == POST_LN else 0 :]
        inside = {id(module) for module in self.encoder.modules()}
        return next((norm.module for norm in norms if id(norm.module) not in inside), None)


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
    refused: list[tuple[bool, int, UnsupportedEncoderError]] = []
    try:
        for layout in (_as_it_is, channels_last, examples_first, texts_apart, as_returned):
            one, found = layout(recording), list[Found]()
            if one is not None:
                try:
                    return _resolve(one, encoder, found)
                except UnsupportedEncoderError as error:
                    # Tensors (q, b, d) of another number of tokens than of examples are in no other layout.
                    sure = one.sequence_first and tokens != len(recording.mask)
                    refused.append((sure, len(found), error))
        # The reason that counts is that of the layout that explains the most layers, the usual one's before others'.
        raise max(refused, key=lambda one: one[:2])[2]
    finally:
        # An error holds the frames it was raised in, and this one holds the error.
        refused.clear()


def _as_it_is(recording: Recording) -> Recording:
    return recording


def _resolve(recording: Recording, encoder: nn.Module, found: list[Found]) -> Structure:
    norms = {call.start: norm for call in recording.calls if (norm := _norm_of(call, recording.mask)) is not None}
    for index in range(len(recording.attention)):
        found.append(find_layer(index, recording, norms, found[-1] if found else None))
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
        recording.joined,
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


def _close(recording: Recording, norms: Mapping[int, Norm], found: list[Found]) -> None:
    """What follows the last layer: nothing, or the encoder's final norm."""
    layer, activations, roles = found[-1]
    last = stream_of(found[-1])
    for call in recording.calls:
        if (
            call.start in norms
            and call.start > roles[0][0].end
            and equal(input_of(call), last, recording.mask)
            and any(equal(call.outputs[0], output, recording.mask) for output in recording.outputs)
        ):
            if layer.rule == POST_LN:
                activations.final = call.outputs[0]
                roles.append((call, Role(len(found) - 1, gives="final")))
                found[-1] = Found(replace(layer, norms=(*layer.norms, norms[call.start])), activations, roles)
                return
            activations.output = call.outputs[0]
            kept = [pair for pair in roles if pair[1].given != "stream"]
            kept.append((call, Role(len(found) - 1, "stream", argument_of(call), gives="output")))
            found[-1] = Found(replace(layer, norms=(norms[call.start],)), activations, kept)
            return
    if not any(equal(last, output, recording.mask) for output in recording.outputs):
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
        originals: the tensors (b, d, q), (q, b, d) or (b * q, d) that activations are views of, by the identity of the
            view.
        axes: the axes that are exchanged in those of three axes.

    Raises:
        UnsupportedEncoderError: naming the layer and what depends on other tokens.
    """
    after, source = activations.added, activations.attended
    if layer.rule == POST_LN:
        after, source = activations.stream, activations.normed
    elif layer.rule == PARALLEL:
        source = activations.residual
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
            spread = (gradient if hidden is seen else in_layout_of(gradient, seen, axes)).abs().amax(-1)
            largest = spread.masked_fill(~inside, 0.0).amax(1)
            # What is not finite has no gradient that tells anything; the identity speaks of it.
            if bool((spread.masked_fill(inside, 0.0).amax(1) > 1e-6 * largest).any()):
                why = "a convolution, say"
                if layer.rule == PARALLEL and part is after:
                    why = "it may be computed from the attention's output, by a norm that is no module of its own, say"
                raise UnsupportedEncoderError(
                    f"layer {index + 1} ({layer.name}): {what} of one token depends on other tokens ({why}); the "
                    "decomposition knows no mixing but attention's."
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
                if equal(tensor, first_hidden, recording.mask):
                    return call.module, argument
    for argument, tensor in recording.given.items():
        if equal(tensor, first_hidden, recording.mask):
            return encoder, argument
    raise UnsupportedEncoderError(
        f"{recording.encoder}: no module receives the hidden states that enter the first layer, so gradients with "
        "respect to them cannot be taken."
    )


def _norm_of(call: ModuleCall, mask: Tensor) -> Norm | None:
    if not call.leaf or len(call.inputs) != 1 or len(call.outputs) != 1:
        return None
    entering, leaving = input_of(call), call.outputs[0]
    if entering.shape != leaving.shape or entering.shape[:2] != mask.shape:
        return None
    return find_norm(call.module, call.name, entering[mask], leaving[mask])


def _is_causal(probabilities: Tensor, mask: Tensor) -> bool:
    real = mask.unsqueeze(1) & mask.unsqueeze(2)
    ahead = real & torch.ones_like(real).triu(1)
    return bool(ahead.any()) and not bool((probabilities.amax(1)[ahead] > 0).any())


def names_of(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """A list of modules for a message: path and class."""
    return ", ".join(f"{name or 'the model itself'} ({type(module).__name__})" for name, module in modules)
