"""``attribute``: one forward and one backward over a batch give maps, rollouts, saliency and correlation.

The way of a batch: trimmed and cloned -> the model's own forward, read layer by layer (``encoder``) -> each layer's
maps and their rollout, computed as soon as the layer is done (``functional``) -> the backward to the first hidden
states -> ``Attributions``.

Axes: ``b`` example, ``l`` layer, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from globenc_lightning.encoder.calling import (
    ADVICE,
    LABELS,
    Way,
    has_own_forward,
    logits_of,
    too_large,
    unused_mask,
    ways_to_call,
)
from globenc_lightning.encoder.contexts import OwnContexts
from globenc_lightning.encoder.layers import layer_inputs
from globenc_lightning.encoder.norms import tolerance, working
from globenc_lightning.encoder.precision import LOW, FullPrecision, exact_products
from globenc_lightning.encoder.reading import EncoderCall, LayerDone, find_encoders, find_structures, read
from globenc_lightning.encoder.structure import Structure
from globenc_lightning.encoder.undisturbed import (
    as_evaluated,
    attention_of,
    exchanged_attention,
    own_attention,
    undisturbed,
)
from globenc_lightning.errors import (
    CutGraphError,
    GlobEncError,
    GlobEncWarning,
    ModelCallError,
    NonFiniteError,
    OutOfMemoryError,
    ProbeError,
    UnsupportedEncoderError,
    is_out_of_memory,
)
from globenc_lightning.functional import (
    METHODS,
    READOUTS,
    gradient_x_input,
    local_maps,
    normalize_rows,
    readout_row,
    rollout_step,
    spearman,
)
from globenc_lightning.functional.kernels import KernelCache
from globenc_lightning.functional.rollout import log_scale
from globenc_lightning.probe import is_by_token

Target = str | Callable[..., Any]

TARGETS = ("predicted", "label")


@dataclass(frozen=True, eq=False)
class Attributions:
    """Everything that one analysis found, detached and on the model's device.

    Attributes:
        local: method -> (b, l, q, k) map of each layer; zero at padding. Empty if only rows were kept.
        rollout: method -> (b, l, q, k) aggregated over the layers up to ``l``, up to one positive scale per example
            and layer. Empty if only rows were kept.
        log_scale: method -> (b, l) float64, natural logarithm of that scale: ``rollout * exp(log_scale)`` is the raw
            product of the maps.
        rows: method -> (b, l, k) the readout row of each rollout.
        last: method -> (b, q, k) the rollout of the last layer.
        saliency: (b, k) L2 norm over ``d`` of gradient x input at the encoder's first hidden states.
        correlation: method -> (b, l) float64, Spearman's rho of the readout row with the saliency; NaN if undefined.
        attention_mask: (b, k) true for real tokens, after trailing padding was cut off.
        predicted: (b,) index of the class with the largest logit.
        logits: (b, c), as the model gave them.
        reconstruction_error: (l,) how far the decomposition is from the layers' own outputs, in two random directions,
            each relative to its own size.
        readout: which row was read.
        normalize: whether rows were divided by their sum before the rollout.
        target: the name of the target.
        input_ids: (b, k) the token ids that the encoder was called with, or None.
        head_gradient: (b, k) length of the score's gradient with respect to the encoder's last hidden states: which
            tokens the head reads. None if it reads none of them.
        encoder: the path of the encoder in the model.
        rule: ``"post-LN"``, the paper's, or ``"pre-LN"``, an extension of it that is not in the paper.
        others: where the forward pass calls several encoders, or one several times: the attributions of the further
            calls, in call order.
    """

    local: dict[str, Tensor]
    rollout: dict[str, Tensor]
    log_scale: dict[str, Tensor]
    rows: dict[str, Tensor]
    last: dict[str, Tensor]
    saliency: Tensor
    correlation: dict[str, Tensor]
    attention_mask: Tensor
    predicted: Tensor
    logits: Tensor
    reconstruction_error: Tensor
    readout: str
    normalize: bool
    target: str
    input_ids: Tensor | None
    head_gradient: Tensor | None
    encoder: str
    rule: str
    others: tuple["Attributions", ...] = ()

    @property
    def head_reads(self) -> str:
        """What the head makes its decision of: ``"readout"``, ``"other tokens"`` too, or something ``"elsewhere"``."""
        if self.head_gradient is None:
            return "elsewhere"
        if self.readout == "mean":
            return "readout"
        mask = self.attention_mask
        row = readout_row(torch.eye(mask.shape[1], device=mask.device).expand(len(mask), -1, -1), mask, self.readout)
        outside = self.head_gradient.masked_fill(row.bool() | ~mask, 0.0)
        return "other tokens" if bool(outside.max() > 1e-6 * self.head_gradient.max()) else "readout"

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in the order they were asked for."""
        return tuple(self.correlation)

    def to_html(self, tokens: Any = None, **options: Any) -> str:
        """The last layer beside the saliency in coloured tokens; ``tokens`` is a tokenizer, or one list per example."""
        from globenc_lightning.report import notebook

        return notebook.sentences(self, tokens, **options)

    def _repr_html_(self) -> str:
        return self.to_html()


@dataclass(frozen=True)
class Settings:
    """What is to be computed; checked when it is made.

    Attributes:
        methods: any of ``METHODS``.
        target: ``"predicted"``, ``"label"`` or a callable.
        readout: one of ``READOUTS``.
        normalize: divide rows by their sum before the rollout.
        exclude_special_tokens: leave special tokens out of the correlation.
    """

    methods: Sequence[str] = ("N-Enc",)
    target: Target = "predicted"
    readout: str = "cls"
    normalize: bool = False
    exclude_special_tokens: bool = False

    def __post_init__(self) -> None:
        """Check the choices, and say what there is to choose from."""
        if not isinstance(self.methods, str | Sequence):
            raise ValueError(f"methods must be a sequence of {', '.join(METHODS)}; got {self.methods!r}")
        for name in ("normalize", "exclude_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}")
        methods = (self.methods,) if isinstance(self.methods, str) else tuple(self.methods)
        object.__setattr__(self, "methods", methods)
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
        if not methods or len(set(methods)) < len(methods):
            raise ValueError(f"methods must name at least one method, each once; got {methods!r}")
        if self.readout not in READOUTS:
            raise ValueError(f"unknown readout {self.readout!r}: choose from {', '.join(READOUTS)}")
        if not callable(self.target) and self.target not in TARGETS:
            raise ValueError(
                f"unknown target {self.target!r}: choose 'predicted' or 'label', or give a callable "
                "target(logits, batch) that returns one class index or one score per example"
            )

    @property
    def target_name(self) -> str:
        """The target in words."""
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", "callable")


@dataclass(eq=False)
class Reader:
    """A model, and what is known of it from one analysis to the next.

    Attributes:
        model: the user's module.
        forward: the user's own way to call it, or None.
        way: the name of the way of calling it that gave logits, once found.
        structures: how its encoder is built, once found: one structure per call of an encoder in a forward pass.
        kernels: what can be used again while the weights stand still.
        max_tokens: how many tokens are analysed at once; fewer once the memory did not suffice.
        connected: whether the forward cuts the autograd graph (no_grad, detach) or drops parts of it (checkpoint), so
            that it is run with the graph kept whole.
        attention: the attention implementations with which the structures were found.
        written: the names of parameters that its forward writes into.
    """

    model: nn.Module
    forward: Callable[..., Any] | None = None
    way: str | None = None
    structures: tuple[Structure, ...] = ()
    kernels: KernelCache = field(default_factory=KernelCache)
    max_tokens: int = 4096
    connected: bool = False
    attention: tuple[Any, ...] = ()
    written: set[str] = field(default_factory=set)

    @property
    def structure(self) -> Structure | None:
        """The structure of the first encoder that is called."""
        return self.structures[0] if self.structures else None


class _Kept(NamedTuple):
    """What is remembered of a structure or of a part of it: its class, and its values, the modules by weak references.

    A dictionary with weak keys keeps a key alive for as long as a value of it reaches the key, and any module may refer
    to the whole model: by an attribute, a hook, a forward that was put in its place.
    """

    kind: type
    values: tuple[Any, ...]


# What the structure pass found of models that are still alive, so that calling ``attribute`` again costs one forward
# and one backward. It decides nothing: every layer that is read is proven anew, and found anew where the proof fails.
# It holds no part of a model: attributes of the model could hold one, but would show in its ``vars`` and its pickles.
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


_REMEMBERED = ("way", "structures", "kernels", "connected", "attention", "written")


def _reader_of(model: nn.Module) -> Reader:
    """A reader of a model that knows what is remembered of it."""
    known = _KNOWN.get(model)
    if known is not None:
        try:
            return Reader(model, **{name: _resolved(value) for name, value in known.items()})
        except ReferenceError:
            # A part of the model was exchanged since.
            pass
    return Reader(model)


def _remember(reader: Reader) -> None:
    try:
        _KNOWN[reader.model] = {name: _kept(getattr(reader, name)) for name in _REMEMBERED}
    except TypeError:
        # Something stands in for a forward that nobody can refer to weakly.
        _KNOWN.pop(reader.model, None)


def _kept(value: Any) -> Any:
    """A value with weak references in place of the objects of the model."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, KernelCache | set):
        # Tensors without their graphs, and names.
        return value
    if isinstance(value, ref):
        # The function of an attention implementation; nobody can refer weakly to a weak reference.
        return _Kept(ref, (value,))
    if isinstance(value, tuple):
        return _Kept(type(value), tuple(_kept(one) for one in value))
    if is_dataclass(value) and not isinstance(value, nn.Module):
        return _Kept(type(value), tuple(_kept(getattr(value, one.name)) for one in fields(value)))
    return ref(value)


def _resolved(kept: Any) -> Any:
    """The value that :func:`_kept` was called on.

    Raises:
        ReferenceError: an object of it is gone.
    """
    if isinstance(kept, _Kept):
        values = tuple(_resolved(one) for one in kept.values)
        return values if kept.kind is tuple else kept.kind(*values)
    if isinstance(kept, ref):
        value = kept()
        if value is None:
            raise ReferenceError("a part of the model is gone")
        return value
    return kept


@dataclass(eq=False)
class _Layers:
    """What the layers of one call of an encoder gave so far; ``m`` is a method.

    Attributes:
        settings: what is computed.
        readout: which row is read.
        depth: how many layers there are.
        keep_maps: whether every layer's maps and rollouts are kept.
        local: method -> (b, l, q, k), filled layer by layer.
        rollout: method -> (b, l, q, k), filled layer by layer.
        rows: (b, m, k) for each layer.
        exponents: (m, b) for each layer.
        previous: (m, b, q, k) the last layer's rollouts.
    """

    settings: Settings
    readout: str
    depth: int
    keep_maps: bool
    local: dict[str, Tensor] = field(default_factory=dict)
    rollout: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    exponents: list[Tensor] = field(default_factory=list)
    previous: Tensor | None = None
    _maps: Tensor | None = None

    def add(self, done: LayerDone, kernel: Callable[..., Tensor]) -> None:
        """Take one layer more: its maps, one step of the rollout, the row that is read."""
        methods, (b, s) = self.settings.methods, done.mask.shape
        inputs = layer_inputs(done.layer, done.activations, done.weights, mixed="W-Res" in methods)
        if self._maps is None:
            # The same memory for every layer: fresh pages would cost more than what is computed in them.
            self._maps = inputs.attention.new_empty(len(methods), b, s, s)
        local_maps(*inputs, done.mask, methods, kernel, out=self._maps)
        step = normalize_rows(self._maps) if self.settings.normalize else self._maps
        below = None if self.previous is None else self.previous.flatten(0, 1)
        rolled, exponent = rollout_step(step.flatten(0, 1), below)
        self.previous = rolled.view_as(step)
        self.exponents.append(exponent.view(len(methods), b))
        self.rows.append(readout_row(self.previous.transpose(0, 1), done.mask, self.readout))
        if self.keep_maps:
            self._keep(self.local, self._maps, done.place)
            self._keep(self.rollout, self.previous, done.place)

    def _keep(self, kept: dict[str, Tensor], maps: Tensor, place: int) -> None:
        _, b, s, _ = maps.shape
        for method, one in zip(self.settings.methods, maps, strict=True):
            if method not in kept:
                kept[method] = one.new_empty(b, self.depth, s, s)
            kept[method][:, place] = one


def attribute(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    methods: Sequence[str] = ("N-Enc",),
    target: Target = "predicted",
    readout: str = "cls",
    normalize: bool = False,
    exclude_special_tokens: bool = False,
    forward: Callable[..., Any] | None = None,
) -> Attributions:
    """Attribute a model's decisions to its input tokens, and compare with its gradients.

    GlobEnc and its relatives (Modarressi et al., NAACL 2022, section 3) with gradient x input saliency and Spearman's
    rho between them (section 4), by one forward and one backward pass. The model is left exactly as it was.

    Args:
        model: any module with a Hugging Face encoder in it.
        inputs: ``input_ids`` (b, s), ``attention_mask`` (b, s) if there is padding, and whatever else the model takes.
        methods: any of ``METHODS``.
        target: which score the saliency is taken of: the logit of the ``"predicted"`` class, of the ``"label"`` in
            the inputs, or a callable ``target(logits, inputs)`` that returns one class index or one differentiable
            score per example, (b,).
        readout: which row of a rollout is compared: ``"cls"`` (first real token), ``"last"`` (last real token) or
            ``"mean"`` (mean over the real tokens).
        normalize: divide every map's rows by their sum before the rollout. The paper does not; ranks differ.
        exclude_special_tokens: leave special tokens out of the correlation; needs ``special_tokens_mask`` in the
            inputs (``tokenizer(..., return_special_tokens_mask=True)``).
        forward: how to call the model when its own forward gives no logits: ``forward(model, inputs)`` returns them.

    Returns:
        The attributions.

    Raises:
        ValueError: an unknown method, target or readout, or a forward that cannot be called.
        ProbeError: inputs that cannot be used.
        ModelCallError: the model could not be called, or gives no logits.
        UnsupportedEncoderError: the encoder cannot be read, or reading it does not reproduce its activations.
        NonFiniteError: the model's activations hold NaN or infinity.
        OutOfMemoryError: the memory does not suffice for the batch.
        GlobEncError: anything else; all of the above but ValueError are of this kind.

    Example:
        >>> batch = tokenizer(["A joy to watch ."], return_tensors="pt")  # doctest: +SKIP
        >>> attribute(model, batch).rows["N-Enc"][0, -1]  # doctest: +SKIP
    """
    settings = Settings(methods, target, readout, normalize, exclude_special_tokens)
    _check_module(model)
    if forward is not None and not callable(forward):
        raise ValueError(f"forward must be a callable forward(model, inputs) that returns logits; got {forward!r}")
    if forward is not None:
        return _attributed(Reader(model, forward), inputs, settings)
    reader = _reader_of(model)
    found = _attributed(reader, inputs, settings)
    _remember(reader)
    return found


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ModelCallError(
            f"model must be a module (torch.nn.Module) that holds a Hugging Face encoder; got {what}. Give the module "
            "that is trained itself, for example attribute(lightning_module, batch)."
        )


def _attributed(reader: Reader, inputs: Mapping[str, Any], settings: Settings) -> Attributions:
    """:func:`analyze` of one batch that nobody divides."""
    try:
        return analyze(reader, inputs, settings)
    except GlobEncError:
        raise
    except Exception as error:
        raise OutOfMemoryError(
            f"the memory does not suffice for this batch ({type(error).__name__}): give fewer or shorter examples at a "
            "time, or fewer methods."
        ) from error


def analyze(
    reader: Reader,
    inputs: Mapping[str, Any],
    settings: Settings,
    *,
    keep_maps: bool = True,
    special_tokens: Tensor | None = None,
) -> Attributions:
    """:func:`attribute` for a model that is analysed again and again; see there.

    Args:
        reader: the model, with its structure once that is known.
        inputs: as for :func:`attribute`.
        settings: what is computed.
        keep_maps: keep every layer's map and rollout, or the readout rows and the last rollout alone.
        special_tokens: (b, s) true for special tokens; ``special_tokens_mask`` of the inputs when None.

    Returns:
        The attributions.
    """
    # What is made below inference mode could never take part in a gradient.
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _analyze(reader, inputs, settings, keep_maps, special_tokens)
    except GlobEncError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            # Smaller batches may fit: the caller's to decide.
            raise
        raise GlobEncError(f"the analysis failed: {type(error).__name__}: {error}") from error


def _analyze(
    reader: Reader, inputs: Mapping[str, Any], settings: Settings, keep_maps: bool, special: Tensor | None
) -> Attributions:
    batch = prepare(reader.model, inputs)
    _refuse_offloaded(reader.model)
    if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in batch.values()):
        # There, an id without an embedding is no error that the process could go on from.
        reason = too_large(reader.model, batch)
        if reason is not None:
            raise ProbeError(reason)
    special = batch.get("special_tokens_mask") if special is None else special
    lengths = _lengths(batch)
    longest = 2 if lengths is None else int(lengths.max())
    if longest == 0:
        raise ProbeError("the inputs hold no real token: attention_mask is zero everywhere.")

    whole = False
    known = reader.structure is not None and reader.attention == attention_of(reader.model)
    if reader.structure is None or not known or (reader.structure.length == 1 and longest > 1):
        whole = _find_shortest(reader, batch, lengths)
    try:
        found = _forward_and_backward(reader, batch, settings, keep_maps)
    except UnsupportedEncoderError:
        if whole:
            raise
        # The module has changed since its structure was found (adapters were added, say), or goes another way for the
        # whole text than for its beginning.
        _find(reader, batch, lengths)
        found = _forward_and_backward(reader, batch, settings, keep_maps)
    pairs = list(zip(reader.structures, found.calls, strict=True))
    if any(structure.span != call.span for structure, call in pairs):
        reader.structures = tuple(replace(structure, span=call.span) for structure, call in pairs)
    records = [
        _record(structure, call, layers, saliency, head, found.logits, special, settings)
        for structure, call, layers, saliency, head in zip(
            reader.structures, found.calls, found.layers, found.saliency, found.heads, strict=True
        )
    ]
    return replace(records[0], others=tuple(records[1:]))


def _record(
    structure: Structure,
    call: EncoderCall,
    layers: "_Layers",
    saliency: Tensor,
    head: Tensor | None,
    logits: Tensor,
    special: Tensor | None,
    settings: Settings,
) -> Attributions:
    """The attributions of one call of an encoder."""
    mask = call.mask
    if not torch.isfinite(saliency[mask]).all():
        raise NonFiniteError("the gradient of the target's score holds NaN or infinity, so there is no saliency.")
    if not mask.any(1).all():
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        warnings.warn(f"rows without a real token have no figures: {empty}", GlobEncWarning, stacklevel=5)
    counted = mask
    if settings.exclude_special_tokens:
        if special is None or special.shape != mask.shape:
            raise ProbeError(
                "exclude_special_tokens=True needs to know the special tokens: give a tokenizer, or pass "
                "special_tokens_mask in the inputs (tokenizer(..., return_special_tokens_mask=True))."
            )
        counted = mask & ~special.bool().to(mask.device)
    methods = settings.methods
    rows = torch.stack(layers.rows, 2)
    correlation = spearman(rows, saliency[:, None, None], counted[:, None, None])
    if layers.previous is None:
        raise AssertionError("an encoder without layers is refused when its structure is found")
    return Attributions(
        local=layers.local,
        rollout=layers.rollout,
        log_scale=dict(zip(methods, log_scale(torch.stack(layers.exponents, 2)), strict=True)),
        rows={method: row.contiguous() for method, row in zip(methods, rows.unbind(1), strict=True)},
        last=dict(zip(methods, layers.previous, strict=True)),
        saliency=saliency,
        correlation=dict(zip(methods, correlation.unbind(1), strict=True)),
        attention_mask=mask,
        predicted=logits.argmax(1) if logits.dim() == 2 else logits.flatten(1).argmax(1),
        logits=logits,
        reconstruction_error=torch.tensor(call.errors, dtype=torch.float64),
        readout=effective_readout(structure, settings.readout),
        normalize=settings.normalize,
        target=settings.target_name,
        input_ids=call.ids,
        head_gradient=head,
        encoder=structure.encoder_name,
        rule=structure.rule,
    )


def effective_readout(structure: Structure, readout: str) -> str:
    """The row that is read: a causal model's first token sees nothing but itself, so its last one is read instead."""
    return "last" if structure.causal and readout == "cls" else readout


class _Found(NamedTuple):
    """What one forward and one backward gave; all but the logits (b, c) one entry per call of an encoder."""

    layers: list["_Layers"]
    saliency: list[Tensor]
    heads: list[Tensor | None]
    calls: tuple[EncoderCall, ...]
    logits: Tensor


def _forward_and_backward(reader: Reader, batch: Mapping[str, Any], settings: Settings, keep_maps: bool) -> _Found:
    failures: list[str] = []
    # Another batch may offer other entries; then the best way that they offer is the one to try.
    way: Way | None = None
    for offered in _ways(reader, batch, failures):
        way = offered if way is None or offered.name == reader.way else way
        if way.name == reader.way:
            break
    if way is None:
        raise ModelCallError(f"{type(reader.model).__name__} gives no logits for the probe.\n{ADVICE}")
    _refuse_unused_mask(way, batch)
    if not reader.connected:
        try:
            return _attempt(reader, way, batch, settings, keep_maps, connected=False)
        except ModelCallError as error:
            if not isinstance(error, CutGraphError) and not isinstance(error.__cause__, RuntimeError):
                raise
    # The forward cuts the graph, or drops parts of it that it cannot compute again while it is read.
    found = _attempt(reader, way, batch, settings, keep_maps, connected=True)
    reader.connected = True
    return found


def _attempt(
    reader: Reader, way: Way, batch: Mapping[str, Any], settings: Settings, keep_maps: bool, *, connected: bool
) -> _Found:
    """One forward and one backward, with the autograd graph as the model's forward leaves it, or kept connected."""
    collected = [
        _Layers(settings, effective_readout(structure, settings.readout), len(structure.layers), keep_maps)
        for structure in reader.structures
    ]

    def on_layer(done: LayerDone) -> None:
        collected[done.call].add(done, partial(reader.kernels.kernel, (done.call, done.place)))

    def call(given: Mapping[str, Any]) -> Any:
        with _told(way.name, lambda: too_large(reader.model, batch) or contexts.hint()):
            return way.call(given)

    contexts = OwnContexts(reader.model, connected=connected)
    with undisturbed(reader.model, parameters_require_grad=False, written=reader.written) as handles:
        result = read(reader.model, reader.structures, call, batch, on_layer, handles, contexts)
        size = len(result.calls[0].mask)
        logits = logits_of(contexts.in_graph(result.output), size, _width(reader, reader.structures))
        with _told("target(logits, batch)"):
            score = _score(logits, batch, settings.target, result.calls[0].mask)
        sources = [*(call.hidden for call in result.calls), *(call.last for call in result.calls)]
        gradients: tuple[Tensor | None, ...] = tuple(None for _ in sources)
        if score.requires_grad:
            # Only rows with something in them: a row of padding may hold NaN, and its gradient would be nobody's.
            used = torch.stack([call.mask.any(1) for call in result.calls if len(call.mask) == size]).all(0)
            with _told("the backward pass from the score to the hidden states"):
                gradients = torch.autograd.grad(score[used].sum(), sources, allow_unused=True)
        saliency = []
        heads = [
            None if one is None or not bool((one != 0).any()) else torch.linalg.vector_norm(working(one), dim=-1)
            for one in gradients[len(result.calls) :]
        ]
        for structure, call_, gradient in zip(reader.structures, result.calls, gradients, strict=False):
            if gradient is None:
                raise CutGraphError(
                    f"the score does not depend on the encoder's hidden states ({structure.encoder_name}), even where "
                    "no_grad(), inference_mode() and detach() are left out: the head does not use them, or takes them "
                    "through something without a gradient (numpy, .tolist(), argmax, rounding), or the target's score "
                    "does. " + ADVICE
                )
            saliency.append(gradient_x_input(working(gradient), working(call_.hidden), call_.mask))
    return _Found(collected, saliency, heads, result.calls, logits.detach())


@contextmanager
def _told(what: str, hint: Callable[[], str] = str) -> Iterator[None]:
    """Say where an error comes from that is not ours, and what would help."""
    try:
        yield
    except GlobEncError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reentrant = "use_reentrant" in str(error) and "incompatible" in str(error)
        help_ = "write checkpoint(..., use_reentrant=False) in the forward pass" if reentrant else hint()
        told = f"{what} raised {type(error).__name__}: {error}"
        raise ModelCallError(f"{told}\n{help_}" if help_ else told) from error


def prepare(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Clone a batch for the analysis: on the model's device, without the trailing columns that are all padding.

    Args:
        model: the module that will be called.
        inputs: a mapping with ``input_ids`` (b, s), or other tensors of examples (images, audio).

    Returns:
        The batch.

    Raises:
        ProbeError: inputs that cannot be used, with what to write instead.
    """
    if not isinstance(inputs, Mapping):
        raise ProbeError(
            f"the inputs are a {type(inputs).__name__}, not a mapping: write "
            "{'input_ids': ids, 'attention_mask': mask}, or tokenizer(texts, padding=True, return_tensors='pt')."
        )
    for key, value in inputs.items():
        if not isinstance(key, str):
            raise ProbeError(
                f"the inputs' keys are names, such as 'input_ids'; one is {key!r}, a {type(key).__name__}."
            )
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            where = "on the meta device" if value.is_meta else f"of the layout {value.layout}"
            raise ProbeError(f"{key} is {where}; a dense tensor with its numbers in memory is expected.")
        if key.endswith("attention_mask") and value is not None and not isinstance(value, Tensor):
            raise ProbeError(
                f"{key} is a {type(value).__name__}; a tensor of the shape of the ids is expected, 1 for tokens and 0 "
                f"for padding: write torch.tensor({key})."
            )
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim() >= 2}
    if not tensors:
        raise ProbeError(
            "the inputs need input_ids, a tensor of shape (examples, tokens), or the tensors of images or audio; they "
            f"hold {', '.join(map(str, inputs)) or 'nothing'}. Write tokenizer(texts, padding=True, "
            "return_tensors='pt')."
        )
    for key, value in tensors.items():
        if value.numel() == 0:
            raise ProbeError(f"the inputs are empty: {key} has the shape {tuple(value.shape)}.")
        if str(key).endswith("input_ids"):
            _check_ids(str(key), value)
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = next(devices, next(iter(tensors.values())).device)
    with torch.inference_mode(False), torch.no_grad():
        keep = _columns_kept(inputs)
        batch = {}
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                value = value[:, : keep[key]] if key in keep else value
                value = value.to(device).clone()
            batch[key] = value
        return batch


def _check_ids(key: str, ids: Tensor) -> None:
    if ids.dim() > 2:
        one = "[:, 0]" if ids.dim() == 3 else "of two axes"
        raise ProbeError(
            f"{key} has the shape {tuple(ids.shape)}: several texts per example (multiple choice, say), of which "
            "attributions are not defined here; (examples, tokens) is expected. Give the texts as examples of their "
            f"own, for example batch[{key!r}]{one} and the mask alike, and the model's scores for them with forward=."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ProbeError(f"{key} has the type {ids.dtype}; token ids are integers: write batch[{key!r}].long().")


def _refuse_offloaded(model: nn.Module) -> None:
    """Raise where the weights of an encoder are not in memory: the maps are made of them."""
    for path, encoder in find_encoders(model).items():
        absent = [name for name, parameter in encoder.named_parameters() if parameter.is_meta]
        if absent:
            raise UnsupportedEncoderError(
                f"{path or type(model).__name__}: {len(absent)} of its parameters are on the meta device, {absent[0]} "
                "for one: they are offloaded (accelerate's cpu_offload, disk_offload or device_map), or were never "
                "loaded. The maps are made of these weights, so load the whole encoder onto one device, for example "
                "AutoModel.from_pretrained(name).to('cpu'), or model.to_empty(device='cpu') and load_state_dict."
            )


def _columns_kept(inputs: Mapping[str, Any]) -> dict[str, int]:
    """How many columns of each entry with one value per token are kept: up to the last real token of any example."""
    keep: dict[str, int] = {}
    # Two sentences encoded apart have names such as query_input_ids and query_attention_mask.
    prefixes = sorted((key[: -len("input_ids")] for key in inputs if key.endswith("input_ids")), key=len)
    for prefix in prefixes:
        ids, mask = inputs[f"{prefix}input_ids"], inputs.get(f"{prefix}attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not isinstance(mask, Tensor):
            continue
        if mask.shape != ids.shape:
            raise ProbeError(
                f"{prefix}attention_mask must have the shape {tuple(ids.shape)}; it has {tuple(mask.shape)}."
            )
        used = mask.bool().any(0).nonzero()
        columns = int(used[-1]) + 1 if len(used) else ids.shape[1]
        for key, value in inputs.items():
            if key.startswith(prefix) and is_by_token(key, value, mask.bool()):
                keep[key] = columns
    return keep


def _lengths(batch: Mapping[str, Any]) -> Tensor | None:
    """How many real tokens each example has, (b,), or None where the inputs do not tell."""
    key = next((key for key in batch if key.endswith("input_ids")), None)
    if key is None:
        return None
    mask = batch.get(key[: -len("input_ids")] + "attention_mask")
    return torch.ones_like(batch[key]).sum(1) if mask is None else mask.bool().sum(1)


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    return len(value) if isinstance(value, list | tuple) else None


def _rows(value: Any, chosen: list[int]) -> Any:
    return value[chosen] if isinstance(value, Tensor) else [value[index] for index in chosen]


def _find_shortest(reader: Reader, batch: dict[str, Any], lengths: Tensor | None) -> bool:
    """:func:`_find` with the beginning of the texts, which takes a fraction of the memory; else with the whole.

    Returns:
        Whether the whole texts were used.
    """
    begun = _beginning(batch, FIND_TOKENS)
    if begun is not None:
        try:
            _find(reader, begun, lengths, tries=1)
        except GlobEncError:
            # Some models want whole texts (an end-of-sequence token in each, say). Another way of calling them that
            # takes less may be another head.
            pass
        else:
            return False
    _find(reader, batch, lengths)
    return True


FIND_TOKENS = 64
"""How many tokens the structure pass looks at: it holds the attention and the graph of all layers at once."""


def _beginning(batch: Mapping[str, Any], tokens: int) -> dict[str, Any] | None:
    """The first tokens of a batch of texts, from the first real one on; None where nothing would be cut off."""
    cut = dict(batch)
    for key, ids in batch.items():
        if not key.endswith("input_ids") or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] <= tokens:
            continue
        prefix = key.removesuffix("input_ids")
        mask = batch.get(f"{prefix}attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        start = int(mask.bool().any(0).int().argmax())
        for name, value in batch.items():
            if name.startswith(prefix) and is_by_token(name, value, mask.bool()):
                cut[name] = value[:, start : start + tokens]
    return cut if any(cut[key] is not value for key, value in batch.items()) else None


def _find(
    reader: Reader, batch: dict[str, Any], lengths: Tensor | None, *, examples: int = 2, tries: int | None = None
) -> None:
    """Find the way to call the model and its encoder's structure, with the longest examples of the batch.

    ``tries`` is how many ways are tried at the most; all of them when None.
    """
    reader.kernels.clear()
    size = len(next(value for value in batch.values() if isinstance(value, Tensor) and value.dim() >= 2))
    order = torch.arange(size) if lengths is None else lengths.cpu().argsort(descending=True, stable=True)
    chosen = sorted(order[:examples].tolist())
    some = {key: _rows(value, chosen) if _length(value) == size else value for key, value in batch.items()}
    failures: list[str] = []
    refusal: GlobEncError | None = None
    cause: Exception | None = None
    for way in islice(_ways(reader, batch, failures), tries):
        name = way.name
        try:
            with undisturbed(reader.model, parameters_require_grad=True, written=reader.written) as handles:
                structures, output = find_structures(reader.model, way.call, _copied(some), handles)
                logits = logits_of(output, len(chosen), _width(reader, structures)).detach()
        except UnsupportedEncoderError as error:
            refusal = refusal or _with_own_attention(reader.model, error)
        except NonFiniteError as error:
            refusal = refusal or error
        except ModelCallError as error:
            cause = error
            failures.append(f"{name}: {error}")
        except Exception as error:
            if is_out_of_memory(error):
                # Another way of calling needs no less; smaller batches do.
                raise
            cause = error
            reason = too_large(reader.model, batch)
            if reader.forward is not None:
                told = f"forward= raised {type(error).__name__}: {error}"
                raise ModelCallError(f"{told}\n{reason}" if reason else told) from error
            if reason:
                raise ModelCallError(f"{name} raised {type(error).__name__}: {error}\n{reason}") from error
            failures.append(f"{name}: {type(error).__name__}: {error}")
        else:
            _refuse_unused_mask(way, batch)
            _refuse_another_model(reader, way, _copied(some), logits, structures)
            reader.way, reader.attention = name, attention_of(reader.model)
            reader.structures = tuple(one for one in structures if isinstance(one, Structure))
            if not way.own and has_own_forward(reader.model):
                tried = "; ".join(failures) or "it does not take the batch's entries by their names"
                warnings.warn(
                    f"{type(reader.model).__name__} has a forward of its own that gave no logits ({tried}); the "
                    f"figures are those of {name}. If that is not the head you train: {ADVICE}",
                    GlobEncWarning,
                    stacklevel=5,
                )
            return
    if refusal is not None:
        raise refusal
    tried = "\n".join(f"    {failure}" for failure in failures) or (
        f"    {type(reader.model).__name__} has no forward of its own that takes {', '.join(map(str, batch))}, "
        "and holds no Hugging Face model with a head"
    )
    raise ModelCallError(f"{type(reader.model).__name__} gives no logits for the probe:\n{tried}\n{ADVICE}") from cause


def _copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch that a forward may write into, without the next one seeing it."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}


def _refuse_another_model(
    reader: Reader, way: Way, batch: Mapping[str, Any], logits: Tensor, structures: Sequence[Any]
) -> None:
    """Compare the logits of an analysed forward pass with those of the model in its user's own evaluation.

    The identities prove the forward pass that was run, not that it is the user's: an attention implementation may have
    been exchanged, and a forward may ask whether gradients are on.

    Args:
        reader: the model.
        way: how it was called.
        batch: the examples it was called with.
        logits: (b, c) or more axes, what it gave.
        structures: what was found.

    Raises:
        UnsupportedEncoderError: they differ by more than rounding explains.
    """
    exchanged = exchanged_attention(reader.model)
    try:
        try:
            own, share = _own_logits(reader, way, _copied(batch), len(logits), structures, full_precision=True)
        except Exception:
            # A kernel that takes half precision alone, say.
            own, share = _own_logits(reader, way, batch, len(logits), structures, full_precision=False)
    except Exception:
        # A kernel that cannot run here, say: there is nothing to compare with, and nothing is wrong.
        return
    if own.shape != logits.shape:
        return
    mine, theirs = working(logits), working(own)
    finite = torch.isfinite(mine) & torch.isfinite(theirs)
    if not bool(finite.any()):
        return
    difference = float((mine - theirs)[finite].abs().max())
    # A head that has not learned anything gives logits near zero, with the rounding of what they are made of.
    allowed = share * max(1.0, float(theirs[finite].abs().max()))
    if difference <= allowed:
        return
    name = type(reader.model).__name__
    if exchanged:
        replaced = " and ".join(f"{old!r} by {new!r}" for old, new in exchanged.items())
        reason = (
            f"the analysis replaced its attention implementation {replaced}, which can be read, and that is another "
            "model. Set one that can be read as it stands: model.set_attn_implementation('sdpa') or 'eager'"
        )
    else:
        reason = (
            "its forward goes another way when it is analysed (every module in eval mode, gradients enabled, "
            "feed-forward networks not in chunks). Make it give the same in model.eval() with gradients and without, "
            "or say with forward= how to get logits that do not depend on it"
        )
    raise UnsupportedEncoderError(
        f"{name}: the logits of the analysed forward pass differ from the model's own in evaluation by "
        f"{difference:.1e} (allowed: {allowed:.0e}): {reason}."
    )


def _own_logits(
    reader: Reader, way: Way, batch: Mapping[str, Any], size: int, structures: Sequence[Any], *, full_precision: bool
) -> tuple[Tensor, float]:
    """The logits (b, c) of a model in its user's own evaluation, and how far rounding may move them, as a share.

    In full precision, as the structure is found, and without the autocast that the forward opens: the rounding of
    several layers in half precision may exceed any share that still tells two models apart.
    """
    precisions = {one.dtype for one in reader.model.parameters() if one.is_floating_point()}
    with ExitStack() as stack:
        stack.enter_context(as_evaluated(reader.model, reader.written))
        # The user hears the forward's warnings in an evaluation of their own.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if full_precision:
            stack.enter_context(exact_products())
            stack.enter_context(FullPrecision())
            precisions = {torch.float32 if one in LOW else one for one in precisions}
        stack.enter_context(OwnContexts(reader.model, connected=False))
        own = logits_of(way.call(batch), size, _width(reader, structures)).detach()
        return own, tolerance(own.dtype, *precisions)


def _with_own_attention(model: nn.Module, error: UnsupportedEncoderError) -> UnsupportedEncoderError:
    """The refusal of an encoder, with the name of an attention function that is not transformers' own."""
    names = own_attention(model)
    if not names:
        return error
    told = UnsupportedEncoderError(
        f"{error} Its attention is the implementation {', '.join(map(repr, names))}, which is read as it stands: code "
        "that calls torch.nn.functional.scaled_dot_product_attention, or a softmax and torch.matmul with the values, "
        "can be read."
    )
    told.__cause__ = error.__cause__
    return told


def _ways(reader: Reader, batch: Mapping[str, Any], failures: list[str]) -> Iterator[Way]:
    """The ways to call the model; what keeps others from being found is one more failure, told if nothing works."""
    try:
        yield from ways_to_call(reader.model, batch, reader.forward)
    except ModelCallError as error:
        failures.append(str(error))


def _width(reader: Reader, structures: Sequence[Any]) -> int | None:
    """How wide features are; a user who says how the model is called knows what it returns."""
    return None if reader.forward is not None else structures[0].width


def _refuse_unused_mask(way: Way, batch: Mapping[str, Any]) -> None:
    name = unused_mask(way, batch)
    if name is not None:
        raise ModelCallError(
            f"{way.name} is called without a mask, and the batch's entry {name!r} looks like one: padding would count "
            f"as text. Call it 'attention_mask' in the batch, or say how it is passed, for example\n    "
            f"GlobEncCallback(forward=lambda module, batch: module(batch['input_ids'], batch[{name!r}]))"
        )


def _score(logits: Tensor, batch: Mapping[str, Any], target: Target, mask: Tensor) -> Tensor:
    """One score per example, (b,), whose gradient is the saliency's."""
    by_token = logits.shape == mask.shape and any(
        isinstance(batch.get(name), Tensor) and batch[name].shape == mask.shape for name in LABELS
    )
    if callable(target):
        chosen = target(logits, batch)
        if not isinstance(chosen, Tensor) or tuple(chosen.shape) != (len(logits),):
            raise ModelCallError(
                "target(logits, batch) must return one class index or one score per example, a tensor of shape "
                f"({len(logits)},)"
            )
        if chosen.is_floating_point():
            return chosen
    elif logits.dim() != 2 or by_token:
        raise ModelCallError(
            f"the logits have the shape {tuple(logits.shape)}: for a model that decides per token, name the score to "
            "explain, for example target=lambda logits, batch: logits[:, 0].amax(-1)"
        )
    elif target == "label":
        chosen = _labels(batch, logits)
    else:
        chosen = logits.argmax(1)
    if logits.dim() != 2:
        raise ModelCallError(f"class indices need logits of shape (b, c); these have {tuple(logits.shape)}")
    if callable(target) and bool(((chosen < 0) | (chosen >= logits.shape[1])).any()):
        raise ModelCallError(
            f"target(logits, batch) returned class indices from {int(chosen.min())} to {int(chosen.max())}; the logits "
            f"have the classes 0 to {logits.shape[1] - 1}."
        )
    return logits.gather(1, chosen.to(logits.device).long().unsqueeze(1)).squeeze(1)


def _labels(batch: Mapping[str, Any], logits: Tensor) -> Tensor:
    name = next((name for name in LABELS if isinstance(batch.get(name), Tensor)), None)
    if name is None:
        raise ProbeError(
            f"target='label' needs labels in the batch, under one of {', '.join(LABELS)}; it holds "
            f"{', '.join(map(str, batch))}. Add them, or use target='predicted'."
        )
    labels = batch[name]
    classes = logits.shape[1]
    if labels.is_floating_point() or tuple(labels.shape) != (len(logits),):
        raise ProbeError(
            f"target='label' needs one class index per example; {name} has the shape {tuple(labels.shape)} and type "
            f"{labels.dtype}. Use target='predicted', or a callable."
        )
    if classes == 1:
        # One logit for two classes: there is nothing to choose.
        return torch.zeros_like(labels)
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ProbeError(f"target='label': {name} must lie between 0 and {classes - 1}, the classes of the logits.")
    return labels
