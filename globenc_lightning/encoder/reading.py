"""A model's forward pass, read layer by layer.

``find_structures`` runs the model once on a few examples and finds out how the encoders that it calls are built;
``read`` runs it on a batch and reports each layer's activations as soon as the layer is done, so that no more than one
layer's attention is held.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from globenc_lightning.encoder.checks import Checks, brought_home
from globenc_lightning.encoder.contexts import OwnContexts
from globenc_lightning.encoder.layers import (
    POST_LN,
    Distance,
    Layer,
    LayerActivations,
    LayerWeights,
    distances,
    errors_of,
    layer_weights,
    random_directions,
)
from globenc_lightning.encoder.multihead import Projected
from globenc_lightning.encoder.norms import tolerance
from globenc_lightning.encoder.overwriting import Returned, WritesTrace
from globenc_lightning.encoder.precision import LOW, FullPrecision, exact_products
from globenc_lightning.encoder.recording import ModuleCall, Recording, tensors_in
from globenc_lightning.encoder.structure import (
    Structure,
    drawn_sets,
    makeup_of,
    misses,
    names_of,
    prove_token_by_token,
    resolve,
)
from globenc_lightning.encoder.torch_modules import (
    Chain,
    GivenTokens,
    advice_on,
    by_example,
    final_norms,
    holder_of,
    is_sequence_first,
    is_torch_encoder,
    torch_encoders,
    why_none,
)
from globenc_lightning.encoder.trace import AttentionCall, AttentionTrace
from globenc_lightning.errors import (
    CutGraphError,
    GlobEncError,
    ModelCallError,
    NonFiniteError,
    UnsupportedEncoderError,
    is_out_of_memory,
)

Call = Callable[[Mapping[str, Any]], Any]
"""Runs the model on a batch and returns whatever the model returns."""


@dataclass(eq=False)
class EncoderCall:
    """What one call of an encoder gave.

    Attributes:
        hidden: (b, s, d) its first hidden states, which require a gradient.
        mask: (b, s) true for real tokens.
        errors: (l,) the reconstruction error of each layer in two random directions; empty until
            :class:`~globenc_lightning.encoder.checks.Checks` has looked at them.
        last: (b, s, d) its last hidden states, as it returned them.
        ids: (b, s) the token ids that it was called with, or None.
        span: the number of tokens over which it was shown to mix them by attention alone.
    """

    hidden: Tensor
    mask: Tensor
    errors: list[float]
    last: Tensor
    ids: Tensor | None
    span: int


class ReadForward(NamedTuple):
    """What a forward pass gave.

    Attributes:
        output: what the model returned, still in the autograd graph.
        calls: one entry per call of an encoder, in call order.
    """

    output: Any
    calls: tuple[EncoderCall, ...]


class LayerDone(NamedTuple):
    """A layer whose activations are complete.

    Attributes:
        call: which call of an encoder it belongs to.
        place: which layer of that encoder it is.
        layer: the layer.
        activations: its activations.
        weights: its effective weights.
        mask: (b, s) true for real tokens.
        rest: gives the layer's output (b, q, d) of what its attention gives instead, (b, h, q, v), see
            :class:`~globenc_lightning.encoder.tape.Tape`; None where it was not asked for.
    """

    call: int
    place: int
    layer: Layer
    activations: LayerActivations
    weights: LayerWeights
    mask: Tensor
    rest: Callable[[Tensor], Tensor] | None = None


def find_encoders(model: nn.Module, *, inner: bool = False) -> dict[str, nn.Module]:
    """The encoders inside a module, by their path: of Hugging Face, or of torch's own modules where there are none.

    The former are told by what they hold. The outermost models without a head; of one that is made of several (encoder
    and decoder, two towers) its parts, decoders left out; of a model of the user's own that holds another one, that
    one.

    Args:
        model: the module.
        inner: take the other side where one model without a head holds just one other: of transformers' own classes
            the inner, of the user's own the outer.

    Returns:
        The encoders.
    """
    found: dict[str, nn.Module] = {}
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, module in models.items():
        base = module.base_model
        if base is module:
            found[name] = module
        elif not any(isinstance(other, PreTrainedModel) for other in module.modules() if other is not module):
            # What its class calls the base is a module of the user's own, or a list of layers.
            path = next((path for path, other in module.named_modules(prefix=name) if other is base), name)
            runs = path != name and isinstance(base, nn.Module) and not isinstance(base, nn.ModuleList | nn.ModuleDict)
            found[path if runs else name] = base if runs else module
    if not models:
        return next(iter(torch_encoders(model)), {})
    return {name: found[name] for name in _parts_or_whole(found, _outermost(found), inner)}


def _outermost(names: Mapping[str, nn.Module] | list[str]) -> list[str]:
    return [n for n in names if not any(n != other and (other == "" or n.startswith(other + ".")) for other in names)]


def _parts_or_whole(found: Mapping[str, nn.Module], names: list[str], inner: bool) -> list[str]:
    chosen = []
    for name in names:
        prefix = name + "." if name else ""
        parts = _outermost([other for other in found if other != name and other.startswith(prefix)])
        whole = found[name]
        if len(parts) == 1 and inner == type(whole).__module__.startswith("transformers."):
            chosen += _parts_or_whole(found, parts, inner)
            continue
        if len(parts) < 2:
            chosen.append(name)
            continue
        get_encoder = getattr(whole, "get_encoder", None)
        if getattr(getattr(whole, "config", None), "is_encoder_decoder", False) and callable(get_encoder):
            encoder = get_encoder()
            parts = [part for part in parts if found[part] is encoder]
        chosen += _parts_or_whole(found, parts, inner)
    return chosen


def _choices(model: nn.Module) -> list[dict[str, nn.Module]]:
    """What may be meant by the encoders of a module, the likeliest first."""
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return torch_encoders(model) or [{}]
    choices = [find_encoders(model), find_encoders(model, inner=True)]
    return choices[:1] if list(choices[0]) == list(choices[1]) else choices


class Skipped(NamedTuple):
    """A call of an encoder that is not read: the decision does not depend on it, or another one is shown."""

    encoder: nn.Module


Outputs = list[list[Tensor]]
"""The tensors (b, s, d) that each call of an encoder returned so far, in call order."""


def find_structures(
    model: nn.Module,
    call: Call,
    batch: Any,
    handles: list[RemovableHandle],
    outputs: Outputs | None = None,
    chosen: Callable[[Any], int] | None = None,
) -> tuple[tuple[Structure | Skipped, ...], Any]:
    """Run the structure pass: which encoders are called, and how their layers are built.

    Must run in eval mode with gradients for the parameters (see ``undisturbed``).

    Args:
        model: the module that is called.
        call: runs it on a batch.
        batch: a few examples.
        handles: takes the handles of the hooks, for the caller to remove.
        outputs: takes what the encoders return, while the model runs.
        chosen: tells by what the model returned which call of an encoder is looked at; all of them when None.

    Returns:
        One structure per call of an encoder, in call order, and what the model returned.

    Raises:
        UnsupportedEncoderError: no encoder was called, or one that cannot be read.
        NonFiniteError: an encoder's output is not finite.
    """
    choices = _choices(model)
    if not choices[0]:
        raise UnsupportedEncoderError(
            f"there is no encoder in {type(model).__name__}: GlobEncCallback needs a module that holds a Hugging Face "
            "encoder (a PreTrainedModel such as AutoModel.from_pretrained gives), an nn.TransformerEncoder or blocks "
            f"around nn.MultiheadAttention, for example as self.model.{why_none(model)}"
        )
    failures: list[tuple[bool, bool, Exception]] = []
    # Where the forward cuts or drops the autograd graph, the proof needs it whole.
    for connected in (False, True):
        for encoders in choices:
            try:
                contexts = OwnContexts(model, connected=connected)
                seen: Outputs = [] if outputs is None else outputs
                seen.clear()
                found = _structures(model, call, batch, handles, encoders, contexts, seen, chosen)
            except NonFiniteError:
                raise
            except (UnsupportedEncoderError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                failures.append((connected, bool(seen), error))
            else:
                # An error holds the frames it was raised in, and they hold the activations.
                failures.clear()
                return found
    # Of modules that may be meant by the encoder, those that are called have the reason.
    failures.sort(key=lambda one: not one[1])
    plain, whole = (next(error for flag, _, error in failures if flag is wanted) for wanted in (False, True))
    reason = whole if isinstance(whole, GlobEncError) else plain
    hint = advice_on(choices[0]) if isinstance(reason, UnsupportedEncoderError) else ""
    if hint:
        raise UnsupportedEncoderError(f"{reason} {hint}") from reason
    raise reason


def _structures(
    model: nn.Module,
    call: Call,
    batch: Mapping[str, Any],
    handles: list[RemovableHandle],
    encoders: Mapping[str, nn.Module],
    contexts: OwnContexts,
    outputs: Outputs,
    chosen: Callable[[Any], int] | None,
) -> tuple[tuple[Structure | Skipped, ...], Any]:
    """One structure pass, with these modules as the encoders; see :func:`find_structures`."""
    recorder = _Recorder(batch, outputs)
    hook = contexts.apart
    failed: list[Exception] = []
    makeups = {path: makeup_of(encoder) for path, encoder in encoders.items()}
    chains: list[Chain] = []
    own = any(is_torch_encoder(encoder) for encoder in encoders.values())
    try:
        for path, encoder in encoders.items():
            chain = watch_call(
                encoder,
                hook(recorder.encoder_entered(path, makeups[path])),
                hook(recorder.encoder_left),
                failed,
                handles,
            )
            for name, module in encoder.named_modules(prefix=path):
                if module is not encoder:
                    handles.append(module.register_forward_pre_hook(hook(recorder.entered), with_kwargs=True))
                    handles.append(module.register_forward_hook(hook(recorder.left(name)), with_kwargs=True))
            if chain is not None:
                handles += chain.watch_exit()
                chains.append(chain)
                for name, module in final_norms(model, encoder).items():
                    before, after = recorder.closing(name)
                    handles.append(module.register_forward_pre_hook(hook(before), with_kwargs=True))
                    handles.append(module.register_forward_hook(hook(after), with_kwargs=True))
        # What bfloat16 rounds off, and what a faster matrix product does, would hide a wrong structure.
        trace = WritesTrace(recorder.attended, recorder.returned.before_write, inside=own)
        with exact_products(), FullPrecision(_devices(model)), contexts.watched_by(trace):
            output = call(batch)
    except RuntimeError as error:
        if isinstance(error, GlobEncError) or is_out_of_memory(error) or not contexts.hint():
            raise
        raise ModelCallError(f"{type(error).__name__}: {error}\n{contexts.hint()}") from error
    finally:
        _remove(handles)
    _refuse_failed(failed)
    if any(chain.is_open for chain in chains):
        # It was called, so that its reason is the one to tell.
        outputs.append([])
        _refuse_unfinished(encoders, chains)
    if not recorder.spans:
        raise UnsupportedEncoderError(
            f"{type(model).__name__} holds {names_of(encoders.items())}, and its forward pass calls none of them, "
            "neither by encoder(...) nor by encoder.forward(...) (calls of its parts alone do not count). Give "
            "forward=, a callable forward(module, batch) that calls one of them and returns the logits."
        )
    with exact_products(), FullPrecision(_devices(model)):
        place = None if chosen is None else chosen(output)
        return tuple(
            hook(_structure)(span, recorder.returned) if place is None or place == index else Skipped(span.encoder)
            for index, span in enumerate(recorder.spans)
        ), output


class _ForwardHandle:
    """Takes a forward back that stands in for a module's own."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._attributes = vars(module)
        self._before = self._attributes.get("forward")
        self._attributes["forward"] = forward

    def remove(self) -> None:
        """Put the module's own forward back."""
        if self._before is None:
            self._attributes.pop("forward", None)
        else:
            self._attributes["forward"] = self._before


def watch_call(
    encoder: nn.Module,
    entered: Callable[..., None],
    left: Callable[..., Any],
    failed: list[Exception],
    handles: list[RemovableHandle],
    closing: nn.Module | None = None,
) -> Chain | None:
    """Report each call of an encoder once, be it ``encoder(...)`` or ``encoder.forward(...)``.

    Hooks alone would not see the latter. The handles take everything back.

    Args:
        encoder: the encoder.
        entered: called with the module, its positional and its keyword arguments.
        left: called with the same and what the module returned; may return what the forward goes on with instead.
        failed: takes what a call raised; the forward around it may go on.
        handles: takes the handles.
        closing: the norm that ends a list of blocks, if one does.

    Returns:
        Where the encoder is a list of blocks, what has yet to watch their end, after other hooks; else None.
    """
    if Chain.fits(encoder):
        chain = Chain(encoder, entered, left, closing)
        handles += chain.watch_entry()
        return chain
    forward = encoder.forward
    expected: list[nn.Module] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        expected.append(module)
        entered(module, args, kwargs)

    @wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        # Where the module was called itself, the hooks around this report it.
        reported = bool(expected)
        if reported:
            expected.pop()
        else:
            entered(encoder, args, kwargs)
        try:
            output = forward(*args, **kwargs)
        except Exception as error:
            failed.append(error)
            raise
        instead = None if reported else left(encoder, args, kwargs, output)
        return output if instead is None else instead

    handles.append(encoder.register_forward_pre_hook(before, with_kwargs=True))
    handles.append(encoder.register_forward_hook(left, with_kwargs=True))
    handles.append(_ForwardHandle(encoder, watched))  # type: ignore[arg-type]
    return None


def _closing_of(structures: Sequence[Structure]) -> nn.Module | None:
    """The final norm after each of the runs through one encoder.

    Raises:
        UnsupportedEncoderError: it follows some of them and not others.
    """
    closings = {id(one.closing): one.closing for one in structures}
    if len(closings) > 1:
        raise UnsupportedEncoderError(
            f"{structures[0].encoder_name}: a forward pass runs through its layers {len(structures)} times, and its "
            "final norm follows the last of these runs alone, so none of them is the whole encoder. Keep as many "
            "layers in the nn.ModuleList as a forward pass calls: a layer that is called again may stand there again."
        )
    return next(iter(closings.values()), None)


def note_calls(
    encoder: nn.Module,
    given: list[tuple[Tensor | None, Tensor | None, tuple[int, ...]]],
    handles: list[RemovableHandle],
    batch: Any,
    model: nn.Module,
    sequence_first: bool = False,
) -> None:
    """Note with which ids and mask an encoder is called, and the shape of its first output; nothing else is looked at.

    Args:
        encoder: the encoder.
        given: takes the ids (b, s) or None, the mask (b, s) or None, and the shape (b, s, d) of each call.
        handles: takes the handles of the hooks, for the caller to remove.
        batch: the batch that the model is called with.
        model: the model.
        sequence_first: whether the encoder gives (s, b, d).
    """
    tokens = GivenTokens(model, [encoder])
    own = is_torch_encoder(encoder)
    entered: list[tuple[Tensor | None, Tensor | None]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = _given(module, "input_ids", args, kwargs)
        told = None if own else told_mask(module, args, kwargs, batch)
        # Copies: what follows may write into them.
        entered.append(
            (
                None if ids is None or ids.dim() != 2 else ids.detach().cpu().clone(),
                None if told is None else told.mask.detach().cpu().clone(),
            )
        )

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        shape = next((tuple(tensor.shape) for tensor in tensors_in(output) if _is_hidden(tensor)), None)
        ids, mask = entered.pop()
        if shape is None or entered:
            return
        if own:
            shape = (shape[1], shape[0], *shape[2:]) if sequence_first else shape
            found = tokens.take((shape[0], shape[1]), sequence_first)
            ids, mask = (None if one is None else one.cpu() for one in found)
        given.append((ids, mask, shape))

    chain = watch_call(encoder, before, after, [], handles)
    handles += tokens.watch()
    if chain is not None:
        handles += chain.watch_exit()


def _refuse_unfinished(encoders: Mapping[str, nn.Module], chains: list[Chain]) -> None:
    for chain in chains:
        if chain.is_open:
            raise UnsupportedEncoderError(
                f"{names_of(encoders.items())}: {chain.unfinished()}, one after the other; which of them are the "
                "encoder cannot be told. Keep those that are called in an nn.ModuleList of their own."
            )


def _refuse_failed(failed: list[Exception]) -> None:
    if not failed:
        return
    error = failed.pop(0)
    failed.clear()
    raise UnsupportedEncoderError(
        f"a call of the encoder raised {type(error).__name__}: {error}, and the forward pass went on without it: which "
        "calls count cannot be told. Name a forward pass whose encoder calls succeed with forward=."
    ) from error


class ToldMask(NamedTuple):
    """Which tokens are real, as far as it is told.

    Attributes:
        mask: (b, s) true for real tokens.
        heard: whether the encoder itself was told: else it may attend to what the batch calls padding.
    """

    mask: Tensor
    heard: bool


@dataclass(eq=False)
class _Span:
    """What the structure pass saw of one call of an encoder."""

    path: str
    encoder: nn.Module
    mask: ToldMask | None
    makeup: tuple[Any, ...]
    calls: list[ModuleCall] = field(default_factory=list)
    attention: list[tuple[int, AttentionCall]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    projected: list[ModuleCall] = field(default_factory=list)
    given: dict[int | str, Tensor] = field(default_factory=dict)

    def attention_mask(self) -> Tensor:
        """Which tokens are real, (b, s)."""
        if not self.attention:
            return torch.ones(1, 1).bool()
        return real_tokens(self.mask, self.attention[0][1].probabilities)


class _Recorder:
    """The hooks of the structure pass."""

    def __init__(self, batch: Any, outputs: Outputs) -> None:
        self.spans: list[_Span] = []
        self.returned = Returned()
        self._batch = batch
        self._outputs = outputs
        self._clock = 0
        self._open: list[tuple[nn.Module, int, bool]] = []
        self._inside = 0
        self._ended: list[Tensor] = []

    def encoder_entered(self, path: str, makeup: tuple[Any, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside += 1
            if self._inside == 1:
                mask = None if is_torch_encoder(module) else told_mask(module, args, kwargs, self._batch)
                self.spans.append(_Span(path, module, mask, makeup, given=_hidden_in(args, kwargs)))

        return hook

    def encoder_left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._inside -= 1
        if self._inside:
            return None
        output, instead = self._by_example(module, output)
        self.spans[-1].outputs.extend(tensor for tensor in tensors_in(output) if _is_hidden(tensor))
        self._outputs.append(self.spans[-1].outputs)
        self._ended = [one for one in tensors_in(output if instead is None else instead) if _is_hidden(one)]
        return instead

    def _by_example(self, encoder: nn.Module, output: Any) -> tuple[Any, Any]:
        """What an encoder returned as (b, s, d), and what the forward goes on with instead, if anything."""
        if not is_torch_encoder(encoder) or not self.spans[-1].attention:
            return output, None
        b, s = self.spans[-1].attention_mask().shape
        first = is_sequence_first(encoder)
        return by_example(
            output, lambda tensor: _is_hidden(tensor) and tuple(tensor.shape[:2]) == (s, b) and (b != s or first)
        )

    def closing(self, name: str) -> tuple[Callable[..., None], Callable[..., Any]]:
        """Hooks of a module that may be the norm after an encoder's blocks, which belongs to it."""
        left = self.left(name)
        follows: list[bool] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            follows.append(not self._inside and any(one is other for one in given for other in self._ended))
            if follows[-1]:
                self._inside += 1
                self.entered(module, args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not follows.pop():
                return None
            left(module, args, kwargs, output)
            self._inside -= 1
            output, instead = self._by_example(self.spans[-1].encoder, output)
            self.spans[-1].outputs[:0] = [one for one in tensors_in(output) if _is_hidden(one)]
            return instead

        return before, after

    def entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._clock += 1
        if self._open:
            self._open[-1] = (*self._open[-1][:2], False)
        self._open.append((module, self._clock, True))

    def left(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._clock += 1
            while self._open:
                opened, start, leaf = self._open.pop()
                if opened is module:
                    break
            else:
                return
            given = _hidden_in(args, kwargs)
            gave = [tensor for tensor in tensors_in(output) if _is_hidden(tensor)]
            if self._inside:
                flat = [tensor for tensor in tensors_in(output) if _may_be_joined(tensor)]
                arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
                joined = ({key: value for key, value in arguments if _may_be_joined(value)}, flat)
                call = ModuleCall(module, name, given, gave, start, self._clock, leaf, joined=joined)
                self.spans[-1].calls.append(call)
                self.returned.hold(gave)

        return hook

    def attended(self, found: AttentionCall) -> None:
        if self._inside:
            self._clock += 1
            span = self.spans[-1]
            span.attention.append((self._clock, found))
            span.mask = span.mask or _told(found)
            if found.projected is not None:
                self._projected(span, found, found.projected)

    def _projected(self, span: _Span, found: AttentionCall, told: Projected) -> None:
        """Note the output projection inside an attention call as a call of the module that holds its weight."""
        holder = holder_of(told.weight, span.encoder)
        if holder is not None:
            path, module = holder
            context = found.context.transpose(1, 2).flatten(2)
            name, start = f"{span.path}.{path}".removeprefix("."), self._clock + 1
            span.projected.append(ModuleCall(module, name, {0: context}, [told.output], start, start + 1, True))
            self._clock += 2


def _told(found: AttentionCall) -> ToldMask | None:
    """Which tokens are real, as far as an attention call's own masks tell it."""
    real = None if found.projected is None else found.projected.real
    return None if real is None else ToldMask(real, True)


def _structure(span: _Span, returned: Returned) -> Structure:
    name = span.path or type(span.encoder).__name__
    mask = span.attention_mask()
    outputs = [tensor for tensor in span.outputs if tensor.shape[:2] == mask.shape]
    if any(not torch.isfinite(tensor[mask]).all() for tensor in outputs):
        raise NonFiniteError(_not_finite(name))
    calls = [call._replace(before=returned.before(call.outputs)) for call in span.calls]
    calls.sort(key=lambda one: one.start)
    recording = Recording(
        name,
        calls,
        span.attention,
        outputs,
        mask,
        makeup=span.makeup,
        projected=span.projected,
        given=span.given,
    )
    return resolve(recording, span.encoder)


def told_mask(encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: Any) -> ToldMask | None:
    """Which tokens are real, as far as an encoder's arguments or the batch tell it.

    Args:
        encoder: the encoder.
        args: its positional arguments.
        kwargs: its keyword arguments.
        batch: the batch that the model was called with.

    Returns:
        The padding mask that the encoder was called with; else the mask of the batch's text that it was called with;
        else the tokens that a mask of more axes lets others see. None where nothing tells it.
    """
    own = _given(encoder, "attention_mask", args, kwargs)
    if own is not None and own.dim() == 2:
        return ToldMask(own.bool(), True)
    of_batch = _mask_in(batch, _given(encoder, "input_ids", args, kwargs))
    if of_batch is not None:
        return ToldMask(of_batch, False)
    return None if own is None else ToldMask(seen_tokens(own), True)


def _given(encoder: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The argument of that name, if it is a tensor of two axes or more."""
    value = kwargs.get(name)
    if value is None and args:
        names = list(inspect.signature(encoder.forward).parameters)
        place = names.index(name) if name in names else len(args)
        value = args[place] if place < len(args) else None
    return value if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] > 0 else None


def _mask_in(batch: Any, ids: Tensor | None) -> Tensor | None:
    """The padding mask of a text in the batch, (b, s); of the only text where the encoder was given no ids."""
    if not isinstance(batch, Mapping):
        return None
    masks = {
        key: batch.get(f"{key.removesuffix('input_ids')}attention_mask")
        for key, value in batch.items()
        if str(key).endswith("input_ids") and isinstance(value, Tensor)
    }
    found = [
        mask
        for key, mask in masks.items()
        if isinstance(mask, Tensor) and mask.dim() == 2 and (ids is None or _same_ids(batch[key], ids))
    ]
    return found[0].bool() if len(found) == 1 or (found and ids is not None) else None


def _same_ids(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right.to(left))


def seen_tokens(mask: Tensor) -> Tensor:
    """The real tokens in an attention mask of three or four axes: those that another token may attend to.

    Args:
        mask: (b, q, k) or (b, h or 1, q, k): true, or 1, where a token is attended to; or what is added to the scores,
            large and negative where it is not.

    Returns:
        (b, k). A token that nobody but itself may see is padding, except the last one of a causal mask. So are the
        columns that are seen only by rows which see everything, as a fully masked row is opened for the softmax's sake.
    """
    additive = mask.is_floating_point() and not bool((mask > 0).any())
    allowed = mask > -1e3 if additive else mask.bool()
    allowed = allowed if allowed.dim() == 3 else allowed.any(1)
    q, k = allowed.shape[1:]
    if q != k or k == 1:
        return allowed.any(1)
    itself = torch.eye(k, dtype=torch.bool, device=mask.device)
    opened = allowed.all(2, keepdim=True)
    opened[:, -1] = False
    opened &= ~opened[:, :-1].all(1, keepdim=True)
    others = allowed & ~itself
    seen = (others & ~opened).any(1)
    seen[:, -1] |= allowed[:, -1, -1] & others[:, -1].any(1)
    # A text of one token is seen by nobody else.
    alone = ~seen.any(1, keepdim=True)
    return torch.where(alone, allowed.diagonal(dim1=1, dim2=2), seen)


def real_tokens(told: ToldMask | None, probabilities: Tensor) -> Tensor:
    """Which tokens of a sequence are real.

    Args:
        told: what the encoder's arguments or the batch tell, see :func:`told_mask`, or None.
        probabilities: (b, h, q, k) of its first attention call.

    Returns:
        (b, s): what is told if it has one entry per token; else true where any token attends. What the batch calls
        padding and the encoder attends to is text to it. Rows that attend to everything alike do not tell: softmax
        makes them of a row that is masked as a whole.
    """
    b, _, q, k = probabilities.shape
    if told is not None and tuple(told.mask.shape) == (b, k):
        mask = told.mask.to(probabilities.device)
        # Where others than the tokens are attended to, the encoder is refused for that.
        if told.heard or q != k:
            return mask
        reached = (probabilities != 0).any(1) & mask.unsqueeze(2) & ~mask.unsqueeze(1)
        return torch.where(reached.any(), _attended(probabilities), mask)
    # Frames of audio have no mask of their own: nobody attends to those that are padding.
    return _attended(probabilities)


def _attended(probabilities: Tensor) -> Tensor:
    """The tokens (b, k) that any token attends to; rows that attend to everything alike tell nothing."""
    attends = (probabilities != 0).any(1)
    even = (probabilities == probabilities[..., :1]).all(-1).all(1)
    even &= ~even.all(1, keepdim=True)
    return (attends & ~even.unsqueeze(-1)).any(1)


class _Proof(NamedTuple):
    """What a layer's identity gave, to be looked at once the whole forward pass is done.

    Attributes:
        place: which layer.
        dtype: what it computes in.
        allowed: how large its error may be.
        distances: of each part of its identity.
    """

    place: int
    dtype: torch.dtype
    allowed: float
    distances: list[Distance]


class _Reading:
    """One call of an encoder in a forward pass that is being read."""

    def __init__(
        self,
        index: int,
        structure: Structure,
        given: ToldMask | None,
        done: Callable[[LayerDone], None],
        checks: Checks,
    ) -> None:
        self.structure = structure
        self.hidden: Tensor | None = None
        self.last: Tensor | None = None
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.errors: list[float] = []
        self.position = 0
        self._index = index
        self._given = given
        self._done = done
        self._open: list[int] = []
        self._attention: AttentionCall | None = None
        self._current: LayerActivations | None = None
        self._layer = 0
        self._stream: Tensor | None = None
        self._directions: Tensor | None = None
        self._checks = checks
        self._proofs: list[_Proof] = []
        self._tape: LayerActivations | None = None
        self._taped_stream: Tensor | None = None
        self._older: set[Any] = set()
        self.proves = False

    def another_way(self) -> UnsupportedEncoderError:
        return UnsupportedEncoderError(
            f"{self.structure.encoder_name}: the forward pass called its modules in another order than when its "
            "structure was found."
        )

    def entry(self, tensor: Tensor) -> Tensor | None:
        """Take the first hidden states; returns what the model goes on with instead, if it does."""
        if self.hidden is not None:
            return None
        if tensor.is_inference():
            raise CutGraphError(f"{self.structure.encoder_name} is called below torch.inference_mode().")
        instead = None
        if self.structure.sequence_first:
            tensor = tensor.transpose(0, 1)
        # The very tensor that the model goes on with, so that nothing is replaced and every use of it is seen.
        self.hidden = tensor if tensor.requires_grad else tensor.requires_grad_()
        if self.structure.sequence_first:
            instead = self.hidden.transpose(0, 1)
        self._stream = tensor.detach()
        self._taped_stream = self.hidden
        return instead

    def attended(self, call: AttentionCall) -> None:
        if self.mask is None:
            self.mask = real_tokens(self._given or _told(call), call.probabilities)
            # What was shown of the beginning of a text may not hold over longer distances.
            self.proves = torch.is_grad_enabled() and self.mask.shape[1] > self.structure.span
        if self._attention is not None:
            raise self.another_way()
        self._attention = call

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.position >= len(self.structure.order) or self.structure.order[self.position].module is not module:
            raise self.another_way()
        roles = self.structure.order[self.position].roles
        self._open.append(self.position)
        self.position += 1
        for role in roles:
            if role.given is not None:
                argument = role.argument
                tensor = args[argument] if isinstance(argument, int) else kwargs[argument]
                self._end_tape(role.layer, role.given, tensor)
                self._see(role.layer, role.given, tensor)

    def left(self, module: nn.Module, output: Any) -> None:
        watched = self.structure.order[self._open.pop()]
        for role in watched.roles:
            if role.gives is not None:
                gave = self._returned_by(output)
                self._end_tape(role.layer, role.gives, gave)
                self._see(role.layer, role.gives, gave.clone() if role.overwritten else gave)

    def ended(self, output: Any) -> None:
        """The encoder returned: the last layer's stream may be its output, seen by no other module."""
        if self._current is not None and self._layer == len(self.structure.layers) - 1 and self._current.stream is None:
            gave = [t for t in tensors_in(output) if _is_hidden(t) and t.shape == self._current.residual.shape]
            if gave:
                self._end_tape(self._layer, "stream", gave[0])
                self._see(self._layer, "stream", gave[0].transpose(0, 1) if self.structure.sequence_first else gave[0])
        last = self._stream
        if last is not None and self.mask is not None:
            self._check(self.mask)
            self.last = self._returned([t for t in tensors_in(output) if _is_hidden(t)], last, self.mask)
        if self.position != len(self.structure.order) or self._layer != len(self.structure.layers):
            raise self.another_way()

    def _returned(self, returned: list[Tensor], last: Tensor, mask: Tensor) -> Tensor:
        """The one of the tensors that the encoder returned which is the output of its last layer."""
        fitting = [one for one in returned if one.shape == last.shape]
        # Nearly every encoder returns that very tensor, or nothing else of its shape.
        same = [one for one in fitting if one.data_ptr() == last.data_ptr()][:1] or fitting
        refusal = UnsupportedEncoderError(
            f"{self.structure.encoder_name}: what it returns is not the output of its last layer."
        )
        if not same:
            raise refusal
        apart = [self._apart(one.detach(), last, mask) for one in same]
        if len(same) > 1:
            for one, far in zip(same, brought_home(apart), strict=True):
                if float(far) <= 1:
                    return one
            raise refusal

        def judge(far: Tensor) -> None:
            if not float(far) <= 1:
                raise refusal

        self._checks.add(apart[0], judge)
        return same[0]

    def _apart(self, returned: Tensor, last: Tensor, mask: Tensor) -> Tensor:
        """How far two tensors are apart at the real tokens, as a multiple of what rounding explains, ()."""
        padding = ~mask.unsqueeze(-1)
        allowed = tolerance(last.dtype) * last.masked_fill(padding, 0.0).abs().amax()
        return (returned - last).masked_fill(padding, 0.0).abs().amax() / allowed.clamp(
            min=torch.finfo(last.dtype).tiny
        )

    def _check(self, mask: Tensor) -> None:
        """Ask for the proof of all layers: whether their distances are as small as rounding lets them be."""
        precisions = list(dict.fromkeys(one.dtype for one in self._proofs))
        proofs = [one for dtype in precisions for one in self._proofs if one.dtype == dtype]
        errors = [
            errors_of([found for one in proofs if one.dtype == dtype for found in one.distances], mask, dtype)
            for dtype in precisions
        ]

        def judge(values: Tensor) -> None:
            *each, any_real = values.tolist()
            if not any_real:
                raise UnsupportedEncoderError(
                    f"{self.structure.encoder_name}: one of its calls is given no real token, so nothing of it can be "
                    "proven."
                )
            given = iter(each)
            by_layer = {one.place: max(next(given) for _ in one.distances) for one in proofs}
            for one in self._proofs:
                layer, error = self.structure.layers[one.place], by_layer[one.place]
                if error == float("inf"):
                    raise NonFiniteError(_not_finite(f"layer {one.place + 1} ({layer.name})"))
                if not error <= one.allowed:
                    raise UnsupportedEncoderError(misses(one.place, layer, error, one.allowed))
                self.errors.append(error)

        if errors:
            self._checks.add(torch.cat([*errors, mask.any().to(errors[0]).reshape(1)]), judge)

    def _returned_by(self, output: Any) -> Tensor:
        """The hidden states in what a module returned; some join the texts of a batch."""
        tensors = tensors_in(output)
        found = next((tensor for tensor in tensors if _is_hidden(tensor)), None)
        if found is None and self.structure.joined and self.mask is not None:
            found = next((t for t in tensors if _may_be_joined(t) and len(t) == self.mask.numel()), None)
        if found is None:
            raise self.another_way()
        return found

    def _end_tape(self, index: int, name: str, tensor: Tensor) -> None:
        """End the tape of a layer at what it gives: the stream, or what leaves the second norm (post-LN)."""
        attention = self._attention if self._current is None else self._current.attention
        ends = "output" if self.structure.layers[index].rule == POST_LN else "stream"
        if attention is not None and attention.tape is not None and index == self._layer and name == ends:
            attention.tape.close(tensor, self._older)

    def _as_usual(self, tensor: Tensor) -> Tensor:
        """A tensor of the model as (b, q, d)."""
        if self.structure.channels_first:
            return tensor.transpose(1, 2)
        if tensor.dim() == 2 and self.mask is not None:
            return tensor.view(*self.mask.shape, -1)
        return tensor.transpose(0, 1) if self.structure.sequence_first else tensor

    def _rest(self, layer: Layer, attention: AttentionCall) -> Callable[[Tensor], Tensor] | None:
        """Gives the layer's output of what its attention gives instead, where that was asked for."""
        tape = attention.tape
        if tape is None:
            return None
        where = f"layer {self._layer + 1} ({layer.name})"
        tape.refuse(where)
        return lambda context: self._as_usual(tape.replay(context, where))

    def _see(self, index: int, name: str, tensor: Tensor) -> None:
        taped, tensor = tensor, self._as_usual(tensor.detach())
        if self._current is None:
            if self._attention is None or self._stream is None or index != self._layer:
                raise self.another_way()
            self._current = LayerActivations(self._attention, self._stream)
            if self.proves and self._taped_stream is not None:
                self._tape = LayerActivations(self._attention, self._taped_stream)
            self._attention = None
        if index != self._layer or getattr(self._current, name) is not None:
            raise self.another_way()
        setattr(self._current, name, tensor)
        if self._tape is not None:
            setattr(self._tape, name, taped)
        layer = self.structure.layers[index]
        if name == layer.last:
            self._finish(layer, self._current)

    def _finish(self, layer: Layer, activations: LayerActivations) -> None:
        if self.mask is None:
            raise self.another_way()
        with torch.no_grad():
            width = activations.attention.probabilities.shape[1] * activations.attention.values.shape[-1]
            weights = layer_weights(layer, width, activations.residual)
            # First, so that the projection is in the cache for the few directions below.
            rest = self._rest(layer, activations.attention)
            self._done(LayerDone(self._index, self._layer, layer, activations, weights, self.mask, rest))
            if self._directions is None:
                self._directions = random_directions(activations.residual.shape[-1], weights.projection)
            found = distances(layer, activations, weights, self._directions)
            dtype = activations.residual.dtype
            self._proofs.append(_Proof(self._layer, dtype, layer.tolerance(dtype), found))
            if self._tape is not None:
                self._prove(layer, self._tape, self.mask)
        # A final norm follows the last layer.
        self._stream = getattr(activations, layer.last)
        if self._tape is not None:
            self._taped_stream = getattr(self._tape, layer.last)
        self._current = self._tape = None
        self._layer += 1

    def _prove(self, layer: Layer, tape: LayerActivations, mask: Tensor) -> None:
        """Show that values and feed-forward network look at one token at a time over the whole length."""
        originals: dict[int, Tensor] = {}
        turned: dict[str, Any] = {}
        # The first hidden states are seen before the encoder turns them around.
        names = ("attended", "normed", "added", "stream", *(("residual",) if self._layer else ()))
        axes = (0, 1) if self.structure.sequence_first else (1, 2)
        with torch.enable_grad():
            other = self.structure.channels_first or self.structure.sequence_first
            for name in names if other or self.structure.joined else ():
                tensor = getattr(tape, name)
                if tensor is not None and (other or tensor.dim() == 2):
                    turned[name] = tensor.view(*mask.shape, -1) if tensor.dim() == 2 else tensor.transpose(*axes)
                    originals[id(turned[name])] = tensor
            tape = replace(tape, **turned)
            prove_token_by_token(self._layer, layer, tape, mask, drawn_sets(mask), originals, axes)


def read(
    model: nn.Module,
    structures: tuple[Structure | Skipped, ...],
    call: Call,
    batch: Any,
    on_layer: Callable[[LayerDone], None],
    handles: list[RemovableHandle],
    contexts: OwnContexts | None = None,
    checks: Checks | None = None,
    tapes: bool = False,
) -> ReadForward:
    """Run the model on a batch and report each layer as soon as it is done.

    Must run in eval mode (see ``undisturbed``).

    Args:
        model: the module that is called.
        structures: what the structure pass found, one per call of an encoder; those that are skipped are not read.
        call: runs the model on a batch.
        batch: the examples.
        on_layer: called with each layer, in call order.
        handles: takes the handles of the hooks, for the caller to remove.
        contexts: what becomes of the contexts that the forward opens; autocast alone is set aside when None.
        checks: takes the proofs of the layers, for the caller to look at before anything is handed out; they are looked
            at here when None.
        tapes: whether what each layer computes of its attention's output is noted, see :attr:`LayerDone.rest`.

    Returns:
        What the model returned, and the hidden states to take gradients with respect to.

    Raises:
        UnsupportedEncoderError: the reconstruction identity fails, or the model took another way than in the
            structure pass.
        NonFiniteError: the model's activations are not finite.
    """
    asked = Checks() if checks is None else checks
    readings: list[_Reading | None] = []
    current: list[_Reading | None] = []
    own = [structure for structure in structures if isinstance(structure, Structure)]

    def done(layer: LayerDone) -> None:
        on_layer(layer)
        trace.give_back(layer.activations.attention)

    def encoder_entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = len(readings)
        if index >= len(structures) or structures[index].encoder is not module or current:
            raise UnsupportedEncoderError(
                "the forward pass called its encoders in another order than when their structure was found."
            )
        structure, reading = structures[index], None
        if isinstance(structure, Structure):
            told = None if is_torch_encoder(module) else told_mask(module, args, kwargs, batch)
            reading = _Reading(index, structure, told, done, asked)
            ids = _given(module, "input_ids", args, kwargs)
            reading.ids = ids if ids is not None and ids.dim() == 2 else None
        readings.append(reading)
        current.append(reading)

    def encoder_left(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        reading = current.pop()
        if reading is None:
            return None
        instead = None
        if reading.structure.sequence_first:
            shape = None if reading.mask is None else tuple(reading.mask.shape[::-1])
            output, instead = by_example(output, lambda one: _is_hidden(one) and tuple(one.shape[:2]) == shape)
        reading.ended(output)
        if reading.mask is not None and is_torch_encoder(module):
            b, s = reading.mask.shape
            reading.ids = tokens.take((b, s), reading.structure.sequence_first)[0]
        return instead

    def entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reading = current[-1] if current else None
        if reading is None or reading.structure.entry is not module:
            return None
        argument = reading.structure.entry_argument
        instead = reading.entry(args[argument] if isinstance(argument, int) else kwargs[argument])
        if instead is None:
            return None
        if isinstance(argument, int):
            return (*args[:argument], instead, *args[argument + 1 :]), kwargs
        return args, {**kwargs, argument: instead}

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reading = current[-1] if current else None
        if reading is not None:
            reading.entered(module, args, kwargs)

    def left(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        reading = current[-1] if current else None
        if reading is not None:
            reading.left(module, output)

    def attended(found: AttentionCall) -> None:
        reading = current[-1] if current else None
        if reading is not None:
            reading.attended(found)
        elif found.tape is not None:
            found.tape.stop()

    trace = AttentionTrace(attended, inside=any(is_torch_encoder(structure.encoder) for structure in own), tapes=tapes)
    if any(makeup_of(structure.encoder) != structure.makeup for structure in own):
        raise UnsupportedEncoderError("the encoder has been changed since its structure was found.")
    contexts = OwnContexts(model, connected=False) if contexts is None else contexts
    hook = contexts.apart
    failed: list[Exception] = []
    encoders = encoders_called(model, structures)
    tokens = GivenTokens(model, encoders)
    handles += tokens.watch(hook)
    chains = []
    for encoder in encoders:
        closing = _closing_of([one for one in own if one.encoder is encoder])
        chains.append(watch_call(encoder, hook(encoder_entered), hook(encoder_left), failed, handles, closing))
    for module in _distinct(structure.entry for structure in own):
        handles.append(module.register_forward_pre_hook(hook(entry), with_kwargs=True))
    for module in _distinct(one.module for structure in own for one in structure.order):
        handles.append(module.register_forward_pre_hook(hook(entered), with_kwargs=True))
        handles.append(module.register_forward_hook(hook(left), with_kwargs=True))
    for chain in chains:
        handles += [] if chain is None else chain.watch_exit()
    with ExitStack() as stack:
        if contexts.connected and not any(_computes_low(structure.encoder) for structure in own):
            # Casts to half precision that belong to an autocast which is set aside.
            stack.enter_context(FullPrecision(_devices(model)))
        stack.enter_context(contexts.watched_by(trace))
        output = call(batch)
    _remove(handles)
    _refuse_failed(failed)
    calls = []
    for reading in readings:
        if reading is None:
            continue
        if reading.hidden is None or reading.mask is None or reading.last is None:
            raise reading.another_way()
        last = contexts.in_graph(reading.last)
        span = reading.mask.shape[1] if reading.proves else reading.structure.span
        calls.append(EncoderCall(reading.hidden, reading.mask, reading.errors, last, reading.ids, span))
    if len(readings) != len(structures):
        raise UnsupportedEncoderError("the forward pass called fewer encoders than when their structure was found.")
    if checks is None:
        asked.settle()
    return ReadForward(output, tuple(calls))


def encoders_called(model: nn.Module, structures: tuple[Structure | Skipped, ...]) -> list[nn.Module]:
    """The encoders of a model of which its calls are counted: those among which all are that were found."""
    known = {id(structure.encoder) for structure in structures}
    choices = [list(choice.values()) for choice in _choices(model)]
    return next((some for some in choices if known <= {id(encoder) for encoder in some}), choices[0])


def _not_finite(where: str) -> str:
    return f"{where}: the hidden states of real tokens hold NaN or infinity, so there is nothing to attribute."


def _hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Tensor]:
    """The tensors of three axes among a call's arguments, by position or keyword."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {key: value for key, value in arguments if _is_hidden(value)}


def _computes_low(encoder: nn.Module) -> bool:
    """Whether an encoder's weights are in half precision."""
    return any(parameter.dtype in LOW for parameter in encoder.parameters())


def _devices(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()} - {"meta"} | {"cpu"}


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def _may_be_joined(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _distinct(modules: Any) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
