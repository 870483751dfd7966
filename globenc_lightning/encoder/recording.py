"""What the structure pass sees of a forward pass: every call of a module, what it was given and what it gave.

Axes: ``b`` example, ``q`` token that receives, ``d`` hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from globenc_lightning.encoder.layers import POST_LN, Layer, LayerActivations
from globenc_lightning.encoder.norms import difference, tolerance, working
from globenc_lightning.encoder.trace import AttentionCall


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
        before: ``outputs`` as they were before the forward pass wrote into them; None where it did not.
        overwritten: whether ``outputs`` are copies of that kind.
        joined: its tensor arguments and what it returned of two axes, which may be (b * q, d).
    """

    module: nn.Module
    name: str
    inputs: Mapping[int | str, Tensor]
    outputs: Sequence[Tensor]
    start: int
    end: int
    leaf: bool
    before: Sequence[Tensor] | None = None
    overwritten: bool = False
    joined: tuple[Mapping[int | str, Tensor], Sequence[Tensor]] = ({}, ())


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
        originals: what was transposed or taken apart, by the identity of the tensor that stands for it here.
        joined: whether tensors (b * q, d) are among those of ``calls``, as (b, q, d).
        makeup: what the encoder was made of before its forward pass, see
            :func:`~globenc_lightning.encoder.structure.makeup_of`.
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
    joined: bool = False
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
        overwritten: whether what it returns is written into later, so that a copy has to be taken at once.
    """

    layer: int
    given: str | None = None
    argument: int | str = 0
    gives: str | None = None
    overwritten: bool = False


class Found(NamedTuple):
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


def stream_of(found: Found) -> Tensor:
    """What a layer hands on to the next one."""
    stream = found.activations.output if found.layer.rule == POST_LN else found.activations.stream
    if stream is None:
        raise AssertionError("a layer that was found has all of its activations")
    return stream


def input_of(call: ModuleCall) -> Tensor:
    """The first tensor that a call was given."""
    return next(iter(call.inputs.values()))


def argument_of(call: ModuleCall) -> int | str:
    """Which argument that is."""
    return next(iter(call.inputs))


def equal(left: Tensor, right: Tensor, mask: Tensor, scale: Tensor | None = None) -> bool:
    """Whether two tensors agree at the real tokens, each channel relative to itself or to a third tensor's channel."""
    if left.shape != right.shape or left.shape[:2] != mask.shape:
        return False
    size = None if scale is None else working(scale)[mask]
    return difference(working(left)[mask], working(right)[mask], size) <= tolerance(left.dtype)


def common_path(*names: str) -> str:
    """The path of the innermost module that several modules are in; empty for the model itself."""
    shared = []
    for level in zip(*(name.split(".") for name in names), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def channels_last(recording: Recording) -> Recording | None:
    """The recording with tensors of shape (b, d, q) turned around, or None if there are none."""
    tokens = recording.mask.shape[1]
    turned = _turned(recording, lambda tensor: tensor.shape[2] == tokens, (1, 2))
    return None if turned is None else replace(turned, channels_first=True)


def examples_first(recording: Recording) -> Recording | None:
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


def texts_apart(recording: Recording) -> Recording | None:
    """The recording with tensors (b * q, d) among the others, as (b, q, d), or None if there are none.

    OPT joins the texts of a batch, padding included, before its feed-forward network.
    """
    rows, originals = recording.mask.numel(), dict[int, Tensor]()

    def apart(tensor: Tensor) -> Tensor:
        view = tensor.view(*recording.mask.shape, -1)
        originals[id(view)] = tensor
        return view

    calls = []
    for call in recording.calls:
        given = {key: apart(tensor) for key, tensor in call.joined[0].items() if tensor.shape[0] == rows}
        gave = [apart(tensor) for tensor in call.joined[1] if tensor.shape[0] == rows]
        calls.append(call._replace(inputs={**call.inputs, **given}, outputs=[*call.outputs, *gave]))
    return replace(recording, calls=calls, joined=True, originals=originals) if originals else None


def as_returned(recording: Recording) -> Recording | None:
    """The recording with copies of what was written into later, as it was before, or None if nothing was."""
    if all(call.before is None for call in recording.calls):
        return None
    calls = [
        call if call.before is None else call._replace(outputs=call.before, overwritten=True)
        for call in recording.calls
    ]
    return replace(recording, calls=calls)


def in_layout_of(gradient: Tensor, tensor: Tensor, axes: tuple[int, int] = (1, 2)) -> Tensor:
    """A gradient with respect to what was transposed or taken apart, in the layout (b, q, d) of what stands for it."""
    return gradient.view_as(tensor) if gradient.dim() == 2 else gradient.transpose(*axes)
