"""``attribute``: one forward and one backward over a batch give maps, rollouts, saliency and correlation.

The way of a batch: trimmed and cloned -> the model's own forward, read layer by layer (``encoder``) -> each layer's
maps and their rollout, computed as soon as the layer is done (``functional``) -> the backward to the first hidden
states -> ``Attributions``.

Axes: ``b`` example, ``l`` layer, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden.
"""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from globenc_lightning.attributions import Attributions
from globenc_lightning.encoder.checks import Checks, brought_home
from globenc_lightning.encoder.contexts import OwnContexts
from globenc_lightning.encoder.masking import CallOfEncoder
from globenc_lightning.encoder.norms import tolerance, working
from globenc_lightning.encoder.precision import LOW, FullPrecision, exact_products
from globenc_lightning.encoder.reading import (
    EncoderCall,
    LayerDone,
    Outputs,
    Skipped,
    find_encoders,
    find_structures,
    note_calls,
    read,
)
from globenc_lightning.encoder.structure import Structure
from globenc_lightning.encoder.torch_modules import zeros_at_padding
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
    ModelCallError,
    NonFiniteError,
    OutOfMemoryError,
    ProbeError,
    UnsupportedEncoderError,
    is_out_of_memory,
    warn,
)
from globenc_lightning.explained import Explained, Within
from globenc_lightning.functional import (
    READOUTS,
    gradient_x_input,
    spearman,
)
from globenc_lightning.functional.kernels import KernelCache
from globenc_lightning.functional.rollout import log_scale
from globenc_lightning.probe import is_by_token
from globenc_lightning.references import (
    INTEGRATED,
    Reference,
    Scored,
    integrated_gradients,
    of_jacobian,
    takes_jacobian,
    told_of,
)
from globenc_lightning.rolling import Layers
from globenc_lightning.rolling import Tell as TellExamples
from globenc_lightning.settings import AUTO, Settings, Target
from globenc_lightning.sharding import whole_weights
from globenc_lightning.signing import Network, Signed, signed_scores
from globenc_lightning.task.advice import advice, advice_on_mask, advice_on_target
from globenc_lightning.task.batches import moved
from globenc_lightning.task.calling import (
    LABELS,
    SPAN_LABELS,
    Way,
    ends_of,
    has_own_forward,
    logits_of,
    named_in,
    size_of_batch,
    too_large,
    unused_mask,
    ways_to_call,
)
from globenc_lightning.task.kinds import BY_TOKEN, Decision, decision_of_output, detached
from globenc_lightning.task.replaying import (
    Chunk,
    Layout,
    Ran,
    Replay,
    chosen_unit,
    compare,
    count_labels,
    digits_read,
    find_layout,
    prove_head,
    prove_rows,
    prove_units,
    rows_of_digits,
    seen_of,
)
from globenc_lightning.task.watching import LossWatch

MOST_LOGITS = 1000
"""Decisions over more entries are over a vocabulary."""


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
        numbers: tells whether the weights have moved since numbers were found by which a layer multiplies; None where
            they need not be found anew.
        written: the names of parameters that its forward writes into.
        reads: which tokens the decision was found to read, see ``Attributions.readout``; None before that is known.
        squashes: whether its forward gives probabilities, which are taken back to the logits they were made of.
        whole: whether its logits depend on columns of padding, so that none are cut off.
        replay: the user's own step, run again; None where the model is called itself.
        decisions: for each batch of the probe, what the step decides on it, and which tokens are real.
        chunks: the batches that a probe is analysed in, by the largest number of tokens and the examples.
        proven: which of these were proven with a second set of weights: a head that begins at zero gives the same on
            any batch.
        encoder_call: where the model is called itself: which call of an encoder is shown, the others after it.
        within: where in the user's batches the mapping is that the model is called on, as code: ``"['first']"``.
        remembered: by name, what was taken from what is remembered of the model, beside what it was taken from.
        unsigned: why there are no signed scores, once they were refused; not asked for again.
        incomplete: the largest completeness error of integrated gradients that was told of.
    """

    model: nn.Module
    forward: Callable[..., Any] | None = None
    way: str | None = None
    structures: tuple[Structure | Skipped, ...] = ()
    kernels: KernelCache = field(default_factory=KernelCache)
    max_tokens: int = 4096
    connected: bool = False
    attention: tuple[Any, ...] = ()
    numbers: tuple[int, ...] | None = None
    written: set[str] = field(default_factory=set)
    reads: str | None = None
    squashes: bool = True
    whole: bool = False
    replay: Replay | None = None
    decisions: list[tuple[Decision, Tensor | None]] = field(default_factory=list)
    chunks: dict[tuple[int, tuple[int, ...]], list[Chunk]] = field(default_factory=dict)
    proven: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    encoder_call: int = 0
    within: str = ""
    remembered: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    unsigned: str = ""
    incomplete: float = 0.0

    @property
    def structure(self) -> Structure | None:
        """The structure of the first call of an encoder that is read."""
        return next(iter(self.read), None)

    @property
    def read(self) -> tuple[Structure, ...]:
        """The structures of the calls that are read."""
        return tuple(one for one in self.structures if isinstance(one, Structure))


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


_REMEMBERED = (
    *("way", "structures", "kernels", "connected", "attention", "numbers"),
    *("written", "reads", "squashes", "whole"),
)


def _reader_of(model: nn.Module) -> Reader:
    """A reader of a model that knows what is remembered of it."""
    known = _KNOWN.get(model)
    if known is not None:
        try:
            resolved = {name: _resolved(value) for name, value in known.items()}
            return Reader(model, **resolved, remembered={name: (resolved[name], known[name]) for name in known})
        except ReferenceError:
            # A part of the model was exchanged since.
            pass
    return Reader(model)


def _remember(reader: Reader) -> None:
    try:
        _KNOWN[reader.model] = {name: _kept_of(reader, name) for name in _REMEMBERED}
    except TypeError:
        # Something stands in for a forward that nobody can refer to weakly.
        _KNOWN.pop(reader.model, None)


def _kept_of(reader: Reader, name: str) -> Any:
    """What is kept of a reader's attribute: what it was taken from, where it is that very object still."""
    value = getattr(reader, name)
    before, kept = reader.remembered.get(name, (None, None))
    return kept if before is value and value is not None else _kept(value)


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
        parts = tuple(_kept(one) for one in value)
        # Names and numbers need no place of their own.
        return value if all(map(operator.is_, parts, value)) else _Kept(type(value), parts)
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


def attribute(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    methods: Sequence[str] = ("N-Enc",),
    target: Target = "predicted",
    readout: str = AUTO,
    normalize: bool = False,
    exclude_special_tokens: bool = False,
    forward: Callable[..., Any] | None = None,
    aggregation: str = "rollout",
    references: Sequence[str] = ("saliency",),
    signed: bool = False,
) -> Attributions:
    """Attribute a model's decisions to its input tokens, and compare with its gradients.

    GlobEnc and its relatives (Modarressi et al., NAACL 2022, section 3) with gradient x input saliency and Spearman's
    rho between them (section 4), by one forward and one backward pass. The model is left exactly as it was.

    Of a model that is sharded by ``fully_shard`` (FSDP2), all processes have to call this at the same place, each on
    inputs of its own if it likes: they gather the whole weights, for which each needs memory, and shard them again.

    Args:
        model: any module with a Hugging Face encoder in it.
        inputs: ``input_ids`` (b, s), ``attention_mask`` (b, s) if there is padding, and whatever else the model takes;
            (b, c, s) for ``c`` choices. Labels in them tell what is decided: class indices (b,), values or several
            labels as numbers (b, c), one label per token (b, s), ``start_positions`` and ``end_positions`` of a span.
        methods: any of ``METHODS``, or of their rivals ``"ALTI"`` and ``"Value-Zeroing"``.
        target: which score the saliency is taken of: that of what is ``"predicted"`` (see
            :data:`globenc_lightning.task.kinds.SCORES`), the logit of the ``"label"`` in the inputs, or a callable
            ``target(logits, inputs)`` that returns one class index or one differentiable score per example, (b,).
        readout: which row of a rollout is compared: ``"auto"`` (where the decision reads: the tokens' rows, weighted by
            the length of the score's gradient with respect to their last hidden states), ``"cls"`` (first real token),
            ``"last"`` (last real token) or ``"mean"`` (mean over the real tokens).
        normalize: divide every map's rows by their sum before the rollout. The paper does not; ranks differ.
        exclude_special_tokens: leave special tokens out of the correlation; needs ``special_tokens_mask`` in the
            inputs (``tokenizer(..., return_special_tokens_mask=True)``).
        forward: how to call the model when its own forward gives no logits: ``forward(model, inputs)`` returns them.
        aggregation: how the layers' maps are put together: ``"rollout"``, as in the paper, or ``"maxflow"`` (attention
            flow, Abnar & Zuidema, ACL 2020), which takes much longer.
        references: what the rows are compared with besides the ``"saliency"``: ``"integrated gradients"``, ``"HTA"``,
            ``"exact HTA"``.
        signed: compute signed contributions to the score, too.

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
    settings = Settings(methods, target, readout, normalize, exclude_special_tokens, aggregation, references, signed)
    _check_module(model)
    if forward is not None and not callable(forward):
        raise ValueError(f"forward must be a callable forward(model, inputs) that returns logits; got {forward!r}")
    with whole_weights(model):
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
    inputs: Mapping[str, Any] | Chunk,
    settings: Settings,
    *,
    keep_maps: bool = True,
    special_tokens: Tensor | Callable[[Tensor], Tensor] | None = None,
    explained: list[Explained] | None = None,
    tell: TellExamples | None = None,
) -> Attributions:
    """:func:`attribute` for a model that is analysed again and again; see there.

    Args:
        reader: the model, with its structure once that is known.
        inputs: as for :func:`attribute`.
        settings: what is computed.
        keep_maps: keep every layer's map and rollout, or the readout rows and the last rollout alone.
        special_tokens: (b, s) true for special tokens, or a function that tells them of ids; ``special_tokens_mask`` of
            the inputs when None.
        explained: takes the decision that is explained, and a way to have it made again; not asked for when None.
        tell: is told how many of the examples are done, where one takes long by itself (flows).

    Returns:
        The attributions.
    """
    # What is made below inference mode could never take part in a gradient.
    try:
        with torch.inference_mode(False), torch.no_grad():
            found, tokens = _analyze(reader, inputs, settings, keep_maps, special_tokens)
            if explained is not None:
                explained.append(_explained(reader, found))
            return _recorded(reader, found, tokens, settings, tell)
    except GlobEncError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            # Smaller batches may fit: the caller's to decide.
            raise
        raise GlobEncError(f"the analysis failed: {type(error).__name__}: {error}") from error


def _analyze(
    reader: Reader,
    inputs: Mapping[str, Any] | Chunk,
    settings: Settings,
    keep_maps: bool,
    special: Tensor | Callable[[Tensor], Tensor] | None,
) -> tuple["_Found", Tensor | Callable[[Tensor], Tensor] | None]:
    """What one forward and one backward give, and what tells the special tokens of the texts as they were analysed."""
    _refuse_offloaded(reader.model)
    if isinstance(inputs, Chunk):
        return _analyze_chunk(reader, inputs, settings, keep_maps), special
    batch = prepare(reader.model, inputs)
    told = _told_at_home(inputs)
    if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in batch.values()):
        # There, an id without an embedding is no error that the process could go on from.
        reason = too_large(reader.model, told)
        if reason is not None:
            raise ProbeError(reason)
    special = told.get("special_tokens_mask") if special is None else special
    lengths = _lengths(told)
    longest = 2 if lengths is None else int(lengths.max())
    if longest == 0:
        raise ProbeError("the inputs hold no real token: attention_mask is zero everywhere.")

    whole = False
    shorter, keep = _without_padding(batch, told)
    known = reader.structure is not None and _is_as_found(reader)
    if reader.structure is None or not known or (reader.structure.length == 1 and longest > 1):
        whole = _find_shortest(reader, batch, shorter, lengths)
    if keep is not None and _decides_alike(reader, batch, shorter, keep, settings.target):
        batch, told = shorter, _without_padding(told, told)[0]
        if isinstance(special, Tensor) and special.dim() == 2:
            special = special[:, keep]
    try:
        found = _forward_and_backward(reader, batch, told, settings, keep_maps)
    except UnsupportedEncoderError:
        if whole:
            raise
        # The module has changed since its structure was found (adapters were added, say), or goes another way for the
        # whole text than for its beginning.
        _find(reader, batch, lengths)
        found = _forward_and_backward(reader, batch, told, settings, keep_maps)
    return found, special


def _analyze_chunk(reader: Reader, chunk: Chunk, settings: Settings, keep_maps: bool) -> "_Found":
    """:func:`_analyze` of a batch that the user's own step is run again on."""
    if reader.structure is None or not _is_as_found(reader):
        find_decision(reader, chunk)
    try:
        return _replayed(reader, chunk, settings, keep_maps)
    except UnsupportedEncoderError:
        find_decision(reader, chunk)
        return _replayed(reader, chunk, settings, keep_maps)


def find_decision(reader: Reader, chunk: Chunk) -> None:
    """Find which loss of the user's step is the decision, and the structure of the encoder that it depends on.

    Args:
        reader: the model, with its step.
        chunk: a few examples.

    Raises:
        GlobEncError: the step cannot be run on them, or its encoder cannot be read.
    """
    replay = _replay_of(reader)
    reader.kernels.clear()
    outputs: Outputs = []
    trained = [one for one in reader.model.parameters() if one.requires_grad]
    search = replay.search(reader.model, outputs, trained)
    batch = _moved(reader, chunk)

    def chosen(_: Any) -> int:
        if replay.task is None:
            raise AssertionError("the step was run before")
        return replay.task.call

    def call(_: Any) -> Ran:
        with _told(replay.step.name):
            return search(batch)

    with undisturbed(reader.model, parameters_require_grad=True, written=reader.written) as handles:
        structures, ran = find_structures(reader.model, call, batch.batch, handles, outputs, chosen)
        found = next((one for one in structures if isinstance(one, Structure)), None)
        task = replay.task
        if found is not None and task is not None:
            task = replay.completed(reader.model, found.encoder, found.causal)
            decision = replay.decided(ran, task.seen.rows, task.seen.tokens, batch.batch)
            prove_head(ran, task, decision, replay.step.name, trained)
    reader.structures, reader.attention, reader.reads = structures, attention_of(reader.model), None
    reader.unsigned = ""
    reader.numbers = _numbers_of(reader)
    _refuse_a_teacher(reader, replay)


def _refuse_a_teacher(reader: Reader, replay: Replay) -> None:
    """Prove that the encoder that is shown is trained, if one of those is that the decision depends on."""
    if replay.task is None or replay.encoder_call:
        return
    known = [place for place in replay.task.depends if place < len(reader.structures)]
    trained = [
        place for place in known if any(one.requires_grad for one in reader.structures[place].encoder.parameters())
    ]
    if trained and replay.task.call not in trained:
        raise ModelCallError(
            f"{replay.step.name}: the encoder that would be shown is frozen, and another one that the decision depends "
            "on is trained."
        )


def _is_as_found(reader: Reader) -> bool:
    """Whether nothing speaks against a model's being built as it was found to be."""
    return reader.attention == attention_of(reader.model) and reader.numbers == _numbers_of(reader)


def _numbers_of(reader: Reader) -> tuple[int, ...] | None:
    """Counters of the weights, where a layer multiplies by numbers that half precision could not tell from others.

    A number may be learned. In float32 the identity of the layer notices that it has moved.
    """
    numbers = (part for one in reader.read for layer in one.layers for part in layer.branches)
    if all((part.factor, part.kept) == (1, 1) for part in numbers):
        return None
    parameters = [one for one in reader.model.parameters() if not one.is_inference()]
    if not any(one.dtype in LOW for one in parameters):
        return None
    return tuple(one._version for one in parameters)


def evaluate(
    reader: Reader, chunk: Chunk, within: Within = nullcontext, units: Tensor | None = None
) -> tuple[Decision, Tensor | None, Tensor | None]:
    """Run the user's step up to its loss as the user does in an evaluation, with no hook but one on the encoder.

    Args:
        reader: the model, with its step and the decision that was found.
        chunk: the examples.
        within: makes a context that the forward pass runs in.
        units: (n,) the units that are decided; all when None.

    Returns:
        The decision, on the CPU; the ids (rows, s) that the encoder was called with, and which of its tokens are real,
        as far as its arguments tell; None where they do not.
    """
    replay, structure = _replay_of(reader), reader.structure
    if structure is None or replay.task is None:
        raise AssertionError("the decision is found before it is evaluated")
    given: list[tuple[Tensor | None, Tensor | None, tuple[int, ...]]] = []
    handles: list[RemovableHandle] = []
    batch = _moved(reader, chunk)
    with as_evaluated(reader.model, reader.written), warnings.catch_warnings(), within():
        warnings.simplefilter("ignore")
        note_calls(structure.encoder, given, handles, chunk.batch, reader.model, structure.sequence_first)
        try:
            # The autocast that a step opens is set aside here as it is in the analysis.
            with _told(replay.step.name), OwnContexts(reader.model, connected=False):
                ran = replay.run(reader.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not given:
            raise ModelCallError(f"{replay.step.name} calls {structure.encoder_name} in another way than before.")
        own = [place for place, one in enumerate(reader.structures) if one.encoder is structure.encoder]
        ids, mask, shape = given[min(own.index(replay.task.call), len(given) - 1)]
        decision = replay.decided(ran, shape[0], shape[1], batch.batch)
        return detached(decision if units is None else decision.of(units)), ids, mask


def _replay_of(reader: Reader) -> Replay:
    if reader.replay is None:
        raise AssertionError("a chunk is analysed with the step that it is a batch of")
    return reader.replay


def _moved(reader: Reader, chunk: Chunk) -> Chunk:
    devices = (parameter.device for parameter in reader.model.parameters() if not parameter.is_meta)
    return replace(chunk, batch=moved(chunk.batch, next(devices, torch.device("cpu"))))


def _replayed(reader: Reader, chunk: Chunk, settings: Settings, keep_maps: bool) -> "_Found":
    replay = _replay_of(reader)

    def judge(ran: Ran, calls: tuple[EncoderCall, ...], contexts: OwnContexts, checks: Checks) -> _Judged:
        call = calls[0]
        decision = replay.decided(ran, len(call.mask), call.mask.shape[1], batch.batch)
        decision = replace(decision, logits=contexts.in_graph(decision.logits), ends=contexts.in_graph(decision.ends))
        if not decision.logits.requires_grad:
            raise CutGraphError(f"the decision of {replay.step.name} is made where gradients are off.")
        if chunk.expected is not None:
            compare(decision, chunk.expected, None, replay.step.name)
        if chunk.layout is None:
            chunk.layout = find_layout(replay, decision, chunk, call.last)
        layout, labels = chunk.layout, () if decision.labels is None else (decision.labels,)
        home, given = at_home(decision, layout.units, checks, *labels)
        prove_units(replace(decision, labels=next(iter(given), None)), layout, replay.counts, replay.step.name)
        judged = _judged(decision, home, layout, settings, batch.batch)
        if decision.kind in BY_TOKEN[:3] and decision.width == call.mask.shape[1]:
            # A head that reads several tokens still decides about one of them.
            judged = judged._replace(places=(layout.units % decision.width))

        def again(later: Ran, contexts: OwnContexts) -> Scored:
            other = replay.decided(later, len(call.mask), call.mask.shape[1], batch.batch)
            other = replace(other, logits=contexts.in_graph(other.logits), ends=contexts.in_graph(other.ends))
            return _scored(other, layout, settings, batch.batch, judged.chosen)[:2]

        return judged._replace(again=again)

    batch = _moved(reader, chunk)
    run = _Run(replay.step.name, lambda given: replay.run(reader.model, given), judge)
    found = _connected(reader, run, batch, settings, keep_maps)
    chunk.weights, chunk.expected = batch.weights, None
    found = _along_a_path(reader, run, batch, settings, found)
    found = _with_signed(reader, run, batch, settings, found)
    units = found.judged.units
    return found._replace(again=lambda within: evaluate(reader, chunk, within, units)[0])


def at_home(decision: Decision, units: Tensor, checks: Checks, *others: Tensor) -> tuple[Decision, tuple[Tensor, ...]]:
    """The decision on the units (n,) that are explained, on the CPU, with other tensors; what was asked for is checked.

    The logits of a vocabulary stay where they are, but for those of the units.
    """
    chosen = decision.of(units)
    names = [name for name in ("logits", "labels", "ends", "end_labels") if getattr(chosen, name) is not None]
    found = checks.settle(*(getattr(chosen, name) for name in names), *others)
    parts: dict[str, Any] = dict(zip(names, found, strict=False))
    return replace(chosen, **parts), tuple(found[len(names) :])


def _judged(decision: Decision, home: Decision, layout: Layout, settings: Settings, batch: Any) -> "_Judged":
    """The scores of a chunk's examples; ``home`` is the decision on them, on the CPU."""
    units, rows = layout.units, layout.rows
    scores, total, best = _scored(decision, layout, settings, batch)
    if rows.dim() == 2:
        every = torch.arange(len(units))
        chosen = home.predicted(every) if settings.target != "label" or home.labels is None else home.labels.long()
        rows = rows.gather(1, chosen.unsqueeze(1)).squeeze(1)
    return _Judged(
        logits=decision.logits[units].detach(),
        scores=scores,
        total=total,
        rows=rows,
        home=home,
        units=units,
        labelled=layout.labelled,
        one_call=True,
        apart=decision.kind != "loss" and not callable(settings.target),
        decided=_decided(decision, units),
        chosen=best,
    )


def _explained(reader: Reader, found: "_Found") -> Explained:
    """The decision that is explained, and how it is made again."""
    if found.again is None:
        raise AssertionError("what was decided can be decided again")
    number = 0 if reader.replay is not None else min(reader.encoder_call, len(reader.read) - 1)
    structure, given, judged = reader.read[number], found.calls[number], found.judged
    place = [place for place, one in enumerate(reader.structures) if isinstance(one, Structure)][number]
    call = None
    if given.ids is not None and given.ids.shape == given.mask.shape:
        before = sum(one.encoder is structure.encoder for one in reader.structures[:place])
        call = CallOfEncoder(reader.model, structure.encoder, before, given.ids.detach().clone())
    several = len(set(judged.units.tolist())) < len(judged.units)
    shared = judged.home.kind == "loss" and (reader.replay is None or several)
    return Explained(judged.home, judged.rows, shared, judged.labelled, given.mask, call, found.again)


def _scored(
    decision: Decision, layout: Layout, settings: Settings, batch: Any, best: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """The scores (n,) of a chunk's examples, what is differentiated (), and which logits the scores are.

    The logits are those that ``best`` names, of another run; the scores are those of this run when None.
    """
    units, device = layout.units, decision.logits.device
    labels = decision.label(units)
    if callable(settings.target):
        # A class index that the user's target gave stays what it was; a score is computed anew.
        logits, each = decision.logits, 1
        if decision.kind in BY_TOKEN and decision.width:
            # As a model that decides per token gives them: (b, s, c).
            each, logits = decision.width, logits.unflatten(0, (-1, decision.width))
        with _told("target(logits, batch)"):
            chosen = best[0] if best else settings.target(logits, batch)
        if not isinstance(chosen, Tensor) or tuple(chosen.shape) != (len(logits),):
            raise ModelCallError(
                "target(logits, batch) must return one class index or one score per example, a tensor of shape "
                f"({len(logits)},)"
            )
        best = ()
        if not chosen.is_floating_point():
            if logits.dim() != 2:
                raise ModelCallError(f"class indices need logits of shape (b, c); these have {tuple(logits.shape)}")
            best = (chosen.detach(),)
            chosen = logits.gather(1, chosen.long().unsqueeze(1)).squeeze(1)
        scores = chosen[units // each]
    elif settings.target == "label" and decision.logits.shape[1] > 1:
        if labels is None or labels.dim() != 1 or labels.is_floating_point():
            raise ProbeError(
                f"target='label' needs one class index per example, and the {decision.kind} that is trained has none: "
                "use target='predicted', or a callable."
            )
        scores = decision.logits[units].gather(1, labels.long().to(device).unsqueeze(1)).squeeze(1)
    else:
        scores = decision.scores(units, best)
        best = decision.chosen(units) if best is None else best
    if layout.labelled is not None:
        # Without a label, nothing is decided.
        scores = torch.where(layout.labelled.to(device), scores, 0.0 * scores)
    total = decision.logits.sum() if decision.kind == "loss" else scores.sum()
    return scores, total, best or ()


def _recorded(
    reader: Reader,
    found: "_Found",
    special: Tensor | Callable[[Tensor], Tensor] | None,
    settings: Settings,
    tell: TellExamples | None = None,
) -> Attributions:
    """What one forward and one backward gave, as attributions."""
    spans = {id(structure): call.span for structure, call in zip(reader.read, found.calls, strict=True)}
    if any(structure.span != spans[id(structure)] for structure in reader.read):
        reader.structures = tuple(
            replace(one, span=spans[id(one)]) if isinstance(one, Structure) else one for one in reader.structures
        )
    records = [_record(structure, place, found, special, settings, tell) for place, structure in enumerate(reader.read)]
    number = reader.encoder_call if reader.replay is None else 0
    if number >= len(records):
        raise ModelCallError(
            f"encoder_call={number}: one forward pass calls encoders {len(records)} times; choose from 0 to "
            f"{len(records) - 1}."
        )
    return replace(records.pop(number), others=tuple(records))


def _record(
    structure: Structure,
    place: int,
    found: "_Found",
    special: Tensor | Callable[[Tensor], Tensor] | None,
    settings: Settings,
    tell: TellExamples | None,
) -> Attributions:
    """The attributions of one call of an encoder."""
    call, layers, saliency, judged = found.calls[place], found.layers[place], found.saliency[place], found.judged
    head, chosen, home = found.heads[place], judged.rows, found.at_home[place]
    references = found.references[place]
    mask, ids = call.mask, call.ids
    signed = found.signed.scores[place] if found.signed.scores else None
    if chosen is not None:
        signed = None if signed is None else signed[chosen]
        # Texts that no example is decided from, of other choices say, are left out.
        references = {name: Reference(*(part[chosen] for part in one)) for name, one in references.items()}
        mask, saliency, ids = mask[chosen], saliency[chosen], None if ids is None else ids[chosen]
        head = None if head is None else head[chosen]
        home = _AtHome(home.mask[chosen], None if home.head is None else home.head[chosen], home.finite[chosen])
    if not home.finite.all():
        raise NonFiniteError("the gradient of the target's score holds NaN or infinity, so there is no saliency.")
    if home.head is not None and zeros_at_padding(structure.encoder):
        name = structure.encoder_name or type(structure.encoder).__name__
        if bool((home.head.masked_fill(home.mask, 0.0) > 0).any()):
            warn(
                f"what is decided reads padding, where {name} gives zeros in evaluation (nested tensors) and something "
                "else in training: the figures are those of what is trained, and a validation's own metrics are not. "
                "Write nn.TransformerEncoder(..., enable_nested_tensor=False), or leave padding out of the mean."
            )
    if not home.mask.any(1).all():
        empty = (~home.mask.any(1)).nonzero().flatten().tolist()
        warn(f"rows without a real token have no figures: {empty}")
    counted = mask
    if settings.exclude_special_tokens:
        if callable(special):
            special = None if ids is None else special(ids.cpu())
        if special is None or special.shape != mask.shape:
            raise ProbeError(
                "exclude_special_tokens=True needs to know the special tokens: give a tokenizer, or pass "
                "special_tokens_mask in the inputs (tokenizer(..., return_special_tokens_mask=True))."
            )
        counted = mask & ~special.bool().to(mask.device)
    if layers.flows:
        whole = found.at_home[place].mask
        examples = range(len(whole)) if chosen is None else chosen.tolist()
        rows = layers.flow_rows(whole, examples, tell).to(mask.device)
    else:
        rows = torch.stack(layers.rows, 2)
        rows = rows if chosen is None else rows[chosen]
    local, rollout, last, scales = _chosen_maps(layers, chosen)
    correlation = spearman(rows, saliency[:, None, None], counted[:, None, None])

    def by_method(values: Iterable[Tensor]) -> dict[str, Tensor]:
        found_of = dict(zip(layers.methods, values, strict=True))
        return {method: found_of[method] for method in settings.methods}

    compared = {
        name: spearman(rows, references[name].lengths[:, None, None], counted[:, None, None]).unbind(1)
        for name in settings.further_references
    }
    decision, device = judged.home, mask.device
    every = torch.arange(len(decision.logits))
    return Attributions(
        local=local,
        rollout=rollout,
        log_scale={} if scales is None else by_method(scales),
        rows=by_method(row.contiguous() for row in rows.unbind(1)),
        last={} if last is None else by_method(last),
        saliency=saliency,
        correlation=by_method(correlation.unbind(1)),
        attention_mask=mask,
        predicted=decision.predicted(every).to(device),
        logits=judged.logits,
        reconstruction_error=torch.tensor(call.errors, dtype=torch.float64),
        readout=layers.readout,
        normalize=settings.normalize,
        target=settings.target_name,
        input_ids=None if ids is None else ids.to(device),
        head_gradient=head,
        encoder=structure.encoder_name,
        rule=structure.rule,
        score=judged.scores.detach(),
        probability=decision.probability(every).to(device),
        position=_positions(home.head, home.mask, judged.places).to(device),
        task=decision.kind,
        calls=found.encoder_calls,
        answers=tuple(decision.answers(every)),
        truths=tuple(decision.truths(every)),
        distance=decision.distance,
        decided=judged.decided,
        loss=decision.losses(every).to(device),
        aggregation=settings.aggregation,
        references={name: references[name].lengths for name in compared},
        reference_correlation={name: by_method(rho) for name, rho in compared.items()},
        reference_error={name: references[name].error for name in compared},
        signed=signed,
        left_out=None if signed is None else working(judged.scores) - signed.sum(1),
    )


def _chosen_maps(
    layers: Layers, chosen: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None, Tensor | None]:
    """The maps, the rollouts, the last rollout (m, b, q, k) and the scales (m, b, l) of some examples; all when None.

    Flows go from one token alone: there is no whole rollout then, and no scale.
    """
    local, rollout, last = layers.local, layers.rollout, layers.previous
    peaks = torch.stack(layers.peaks, 2) if layers.peaks else None
    if chosen is not None:
        local, rollout = ({method: maps[chosen] for method, maps in kept.items()} for kept in (local, rollout))
        last, peaks = (None if one is None else one[:, chosen] for one in (last, peaks))
    return local, rollout, last, None if peaks is None else log_scale(peaks)


def _decided(decision: Decision, units: Tensor) -> Tensor:
    """The logits (n, c) of some units; (n, 0) of a vocabulary, which would fill a record."""
    logits = decision.logits[units].detach()
    return logits if logits.shape[1] <= MOST_LOGITS else logits[:, :0]


def _positions(head: Tensor | None, mask: Tensor, decided: Tensor | None = None) -> Tensor:
    """The one token that each example's score reads, (b,), or else that it is about; -1 where neither is one."""
    otherwise = torch.full((len(mask),), -1) if decided is None else decided
    if head is None:
        return otherwise
    weights = head.masked_fill(~mask, 0.0)
    peak, place = weights.max(1)
    alone = (peak > 0) & (weights.sum(1) <= peak * (1 + 1e-6))
    return torch.where(alone, place, otherwise)


def effective_readout(structure: Structure, readout: str) -> str:
    """The row that is read: a causal model's first token sees nothing but itself, so its last one is read instead."""
    readout = "cls" if readout == AUTO else readout
    return "last" if structure.causal and readout == "cls" else readout


class _Judged(NamedTuple):
    """What a forward pass decided on the examples.

    Attributes:
        logits: (n, c).
        scores: (n,) in the autograd graph.
        total: () what is differentiated.
        rows: (n,) the row of the encoder's call that each example is decided from; None where they are the same.
        home: the decision on the examples alone, on the CPU.
        units: (n,) the unit of each example.
        one_call: whether one call of an encoder is looked at, whatever others there are.
        apart: whether it is to be proven that each score is read from its own row alone.
        places: (n,) the token that each example's decision is about; None where the logits do not tell it.
        decided: (n, c) the logits of each example's decision, see ``Attributions.decided``.
        labelled: (n,) whether anything is decided of an example; of all of them when None.
        chosen: which logits the scores are, see ``Decision.chosen``.
        again: the scores of what was decided here, in what another run of the model gave.
    """

    logits: Tensor
    scores: Tensor
    total: Tensor
    rows: Tensor | None
    home: Decision
    units: Tensor
    one_call: bool
    apart: bool = False
    places: Tensor | None = None
    decided: Tensor | None = None
    labelled: Tensor | None = None
    chosen: Sequence[Tensor] = ()
    again: Callable[[Any, OwnContexts], Scored] | None = None


class _Run(NamedTuple):
    """A way to get a decision: a call of the model, and how to judge what it gave."""

    name: str
    call: Callable[[Any], Any]
    judge: Callable[[Any, tuple[EncoderCall, ...], OwnContexts, Checks], _Judged]


class _AtHome(NamedTuple):
    """What is asked of one call of an encoder once its backward pass is done, on the CPU.

    Attributes:
        mask: (b, s) true for real tokens.
        head: (b, s) length of the score's gradient with respect to each token's last hidden states, or None.
        finite: (b,) whether the saliency of all real tokens is finite.
    """

    mask: Tensor
    head: Tensor | None
    finite: Tensor


class _Found(NamedTuple):
    """What one forward and one backward gave; but for the decision one entry per call of an encoder that is read.

    What is decided can be decided again, see :class:`Explained`.
    """

    layers: list[Layers]
    saliency: list[Tensor]
    heads: list[Tensor | None]
    calls: tuple[EncoderCall, ...]
    judged: _Judged
    encoder_calls: int
    at_home: list[_AtHome]
    references: list[dict[str, Reference]]
    signed: Signed = Signed()
    again: Callable[[Within], Decision] | None = None


def _forward_and_backward(
    reader: Reader, batch: Mapping[str, Any], told: Mapping[str, Any], settings: Settings, keep_maps: bool
) -> _Found:
    failures: list[str] = []
    # Another batch may offer other entries; then the best way that they offer is the one to try.
    way: Way | None = None
    for offered in _ways(reader, batch, failures):
        way = offered if way is None or offered.name == reader.way else way
        if way.name == reader.way:
            break
    if way is None:
        tried = "".join(f"\n    {failure}" for failure in failures)
        raise ModelCallError(
            f"{type(reader.model).__name__} gives no logits for the probe.{tried}\n{_advice(reader, batch)}"
        )
    _refuse_unused_mask(reader, way, told)

    watch = LossWatch()

    def judge(output: Any, calls: tuple[EncoderCall, ...], contexts: OwnContexts, checks: Checks) -> _Judged:
        def decided(output: Any, contexts: OwnContexts) -> tuple[Decision, Tensor]:
            outcome, squashed = _before_squashing(output, watch)
            return _decided_by(reader, contexts.in_graph(outcome), squashed, batch, told, settings, calls)

        return _judged_output(output, contexts, decided, batch, told, settings, calls, checks)

    call = _watched(way.call, watch) if reader.squashes else way.call
    run = _Run(way.name, call, judge)
    found = _along_a_path(reader, run, batch, settings, _connected(reader, run, batch, settings, keep_maps))
    found = _with_signed(reader, run, batch, settings, found)
    units, same_way = found.judged.units, way
    # Without the hidden states, which would keep the autograd graph.
    calls = tuple(replace(one, hidden=torch.empty(0), last=torch.empty(0)) for one in found.calls)

    def again(within: Within) -> Decision:
        return _decided_again(reader, same_way, batch, told, settings, calls, units, within)

    return found._replace(again=again)


def _with_signed(reader: Reader, run: "_Run", batch: Any, settings: Settings, found: "_Found") -> "_Found":
    """What was found, with signed contributions where they are asked for and the network can be made linear."""
    if not settings.signed or reader.unsigned:
        return found

    def call(_: Any) -> Any:
        with _told(run.name):
            return run.call(batch)

    network = Network(reader.model, reader.structures, call, run.judge, reader.written, reader.connected)
    texts, judged = batch.batch if isinstance(batch, Chunk) else batch, found.judged
    own = callable(settings.target)
    signed = signed_scores(network, texts, judged.scores.detach(), judged.home.kind, own_target=own)
    if signed.reason:
        warn(f"{run.name}: there are no signed scores, the other figures are as ever: {signed.reason}.")
        # In a training, the next analysis would find the same.
        reader.unsigned = signed.reason
    return found._replace(signed=signed)


def _decided_again(
    reader: Reader,
    way: Way,
    batch: Mapping[str, Any],
    told: Mapping[str, Any],
    settings: Settings,
    calls: tuple[EncoderCall, ...],
    units: Tensor,
    within: Within,
) -> Decision:
    """What a model decides in its user's own evaluation, on the CPU.

    Args:
        reader: the model.
        way: how it is called.
        batch: the batch.
        told: the same with ids, masks and labels on the CPU.
        settings: what is computed.
        calls: the calls of encoders in the analysis.
        units: (n,) the unit of each example.
        within: makes a context that the forward pass runs in.
    """
    watch = LossWatch()
    with as_evaluated(reader.model, reader.written), warnings.catch_warnings(), within():
        warnings.simplefilter("ignore")
        with _told(way.name), OwnContexts(reader.model, connected=False):
            output = (_watched(way.call, watch) if reader.squashes else way.call)(_copied(batch))
        outcome, squashed = _before_squashing(output, watch)
        decision, _ = _decided_by(reader, outcome, squashed, batch, told, settings, calls)
        return detached(decision.of(units))


def _decided_by(
    reader: Reader,
    outcome: Any,
    squashed: str | None,
    batch: Mapping[str, Any],
    told: Mapping[str, Any],
    settings: Settings,
    calls: tuple[EncoderCall, ...],
) -> tuple[Decision, Tensor]:
    """What a model's output decides on a batch, and its logits as the model gives them.

    Args:
        reader: the model.
        outcome: what it returned, its logits in the autograd graph.
        squashed: ``"classes"`` or ``"labels"`` where it returned probabilities of these.
        batch: the batch.
        told: the same with ids, masks and labels on the CPU.
        settings: what is computed.
        calls: the calls of encoders.
    """
    ends = ends_of(outcome, batch, calls[0].mask.shape[1])
    logits = logits_of(outcome if ends is None else ends[0], size_of_batch(batch), _width(reader, reader.read))
    return _decision_of(reader, logits, ends, squashed, told, settings.target, calls), logits


def _judged_output(
    output: Any,
    contexts: OwnContexts,
    decided: Callable[[Any, OwnContexts], tuple[Decision, Tensor]],
    batch: Mapping[str, Any],
    told: Mapping[str, Any],
    settings: Settings,
    calls: tuple[EncoderCall, ...],
    checks: Checks,
) -> _Judged:
    """The scores of a batch's examples by what a model returned.

    Args:
        output: what it returned.
        contexts: those that it was run in.
        decided: what an output decides, see :func:`_decided_by`.
        batch: the batch.
        told: the same with ids, masks and labels on the CPU.
        settings: what is computed.
        calls: the calls of encoders.
        checks: what is to be looked at with what was decided.
    """
    size, call = size_of_batch(batch), calls[0]
    decision, logits = decided(output, contexts)
    chosen: tuple[Tensor, ...] = ()
    real = call.mask.any(1) if len(call.mask) == size else torch.ones(size, dtype=torch.bool, device=logits.device)
    if decision.kind in BY_TOKEN and decision.width is not None:
        (real,) = checks.settle(real)
    if callable(settings.target):
        with _told("target(logits, batch)"):
            scores, chosen = _scores_of_target(logits, batch, settings.target)
        units, place = _units_read(decision, scores, logits)
    else:
        units = _units(decision, size, real)
        place = None
        if settings.target == "label":
            scores = _scores_of_labels(decision, units, told, logits)
            place = None if decision.labels is None else decision.labels
        else:
            scores, chosen = decision.scores(units), decision.chosen(units)
    predicted = decision.predicted(units)
    rows = _rows_of(decision, scores, predicted if place is None else place, calls, checks)
    home, _ = at_home(decision, units, checks)
    # Only rows with something in them: a row of padding may hold NaN, and its gradient would be nobody's.
    used = torch.stack([one.mask.any(1) for one in calls if len(one.mask) == size] or [real]).all(0).to(scores.device)

    def again(later: Any, contexts: OwnContexts) -> Scored:
        other, logits = decided(later, contexts)
        if callable(settings.target):
            with _told("target(logits, batch)"):
                scores = _scores_of_target(logits, batch, settings.target, chosen)[0]
        elif settings.target == "label":
            scores = _scores_of_labels(other, units, told, logits)
        else:
            scores = other.scores(units, chosen)
        return scores, torch.where(used, scores, 0.0).sum()

    return _Judged(
        logits.detach(),
        scores,
        torch.where(used, scores, 0.0).sum(),
        rows(),
        home,
        units,
        one_call=False,
        decided=_decided(decision, units),
        again=again,
    )


def _decision_of(
    reader: Reader,
    logits: Tensor,
    ends: tuple[Tensor, Tensor] | None,
    squashed: str | None,
    batch: Mapping[str, Any],
    target: Target,
    calls: tuple[EncoderCall, ...],
) -> Decision:
    """What logits are taken for, where no loss tells it: by their shape, the labels in the inputs, and the encoder.

    Raises:
        ModelCallError: they alone do not tell it, and there is no target.
    """
    structure, size = reader.structure, len(logits)
    if structure is None:
        raise AssertionError("the structure is found before its logits are judged")
    if ends is not None:
        starts, stops = (_label_of(batch, name, size) for name in SPAN_LABELS)
        return Decision("span", ends[0], starts, ends=ends[1], end_labels=stops)
    seen = seen_of(reader.model, structure.encoder, calls[0].mask, structure.causal, len(calls))
    labels = next((found for name in LABELS if (found := _label_of(batch, name, size)) is not None), None)
    decision: Decision | None = None
    if logits.dim() == 3 and logits.shape[2] > 1:
        fits = labels is not None and not labels.is_floating_point() and labels.shape == logits.shape[:2]
        words = seen.vocabulary is not None and logits.shape[2] >= seen.vocabulary
        if fits and labels is not None and words and seen.causal and not seen.generates:
            # Each position decides for the token after it.
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        found = labels if fits and labels is not None else torch.full(logits.shape[:2], -100, device=logits.device)
        decision = decision_of_output(logits, None, found, seen, size)
        if decision is not None:
            decision = replace(decision, labels=decision.labels if fits else None, width=logits.shape[1])
            decision = decision if fits or callable(target) else None
    elif logits.dim() == 2 and not (labels is not None and labels.dim() == 2 and logits.shape == calls[0].mask.shape):
        decision = _of_one_vector(reader, logits, labels, squashed, len(calls[0].mask))
    if decision is not None:
        return decision
    if callable(target):
        return Decision("loss", logits.flatten(1).amax(1, keepdim=True))
    needed = "labels of shape (b, s) in the inputs, under labels, or " if logits.dim() == 3 else ""
    raise ModelCallError(
        f"{type(reader.model).__name__}: the logits have the shape {tuple(logits.shape)}, which alone does not tell "
        f"which of the scores of an example is to be explained: give {needed}a target, for example "
        f"{advice_on_target(logits)}"
    )


def _of_one_vector(
    reader: Reader, logits: Tensor, labels: Tensor | None, squashed: str | None, rows: int
) -> Decision | None:
    """The decision in logits (b, c)."""
    size, classes = logits.shape
    values = labels is not None and labels.is_floating_point()
    flags = labels is not None and bool(((labels == 0) | (labels == 1)).all())
    if classes == 1:
        of_config = _problem_of(reader.model) == "regression"
        kind = "regression" if squashed is None and values and (of_config or not flags) else "binary"
        return Decision(kind, logits, None if labels is None or labels.numel() != size else labels.reshape(-1))
    if squashed != "classes" and rows == size * classes and rows != size:
        return Decision("choice", logits, labels if labels is not None and labels.dim() == 1 else None)
    if labels is not None and labels.shape == logits.shape:
        if flags and squashed != "classes":
            return Decision("multi-label", logits, labels)
        if values and squashed is None and bool((labels < 0).any() | ((labels.sum(1) - 1).abs() > 1e-3).any()):
            # Several values: which of them is meant is not told.
            return None
        return Decision("classification", logits, labels)
    if squashed == "labels" or _problem_of(reader.model) == "multi_label_classification":
        return Decision("multi-label", logits)
    fits = labels is not None and labels.dim() == 1 and not labels.is_floating_point()
    return Decision("classification", logits, labels if fits else None)


def _problem_of(model: nn.Module) -> str | None:
    """What the one Hugging Face head in a model was configured for."""
    found = {getattr(getattr(module, "config", None), "problem_type", None) for module in model.modules()} - {None}
    return found.pop() if len(found) == 1 else None


def _label_of(batch: Mapping[str, Any], name: str, size: int) -> Tensor | None:
    value = batch.get(name)
    return value if isinstance(value, Tensor) and value.dim() and len(value) == size else None


def _units(decision: Decision, size: int, real: Tensor) -> Tensor:
    """The unit of each example that is explained, (b,) on the CPU, see ``SCORES``."""
    if decision.kind not in BY_TOKEN or decision.width is None:
        return torch.arange(size)
    counts, width = count_labels([decision]), decision.width
    units = [chosen_unit(decision, range(one * width, (one + 1) * width), counts) for one in range(size)]
    without = [place for place, unit in enumerate(units) if unit is None and bool(real[place])]
    if without:
        raise ProbeError(
            f"the examples {without} have no label that counts ({decision.ignored} everywhere), so no token of them is "
            "decided: give one label at least, or name the score by a callable target."
        )
    return torch.tensor([place * width if unit is None else unit for place, unit in enumerate(units)])


def _units_read(decision: Decision, scores: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which unit the user's own score of each example is of, (b,), and which choice."""
    units = torch.arange(len(logits))
    by_token = decision.kind in BY_TOKEN and decision.width is not None
    if not (by_token or decision.kind == "choice") or not logits.requires_grad or not scores.requires_grad:
        return units, None
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        scores.sum(), logits, retain_graph=True, allow_unused=True
    )
    gradient = gradients[0]
    if gradient is None:
        return units * (decision.width or 1), None
    sizes = gradient.detach().abs()
    place = (sizes.flatten(2).amax(2).argmax(1) if by_token else sizes.argmax(1)).cpu()
    return (units * (decision.width or 1) + place, None) if by_token else (units, place)


def _scores_of_target(
    logits: Tensor, batch: Mapping[str, Any], target: Callable[..., Any], before: tuple[Tensor, ...] = ()
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the user's own target gives, as one score per example, (b,); and the class indices, (b,), if it gave these.

    Class indices that it gave ``before`` stay what they were.
    """
    if before:
        return logits.gather(1, before[0].unsqueeze(1)).squeeze(1), before
    chosen = target(logits, batch)
    if not isinstance(chosen, Tensor) or tuple(chosen.shape) != (len(logits),):
        raise ModelCallError(
            "target(logits, batch) must return one class index or one score per example, a tensor of shape "
            f"({len(logits)},)"
        )
    if chosen.is_floating_point():
        return chosen, ()
    if logits.dim() != 2:
        raise ModelCallError(f"class indices need logits of shape (b, c); these have {tuple(logits.shape)}")
    if bool(((chosen < 0) | (chosen >= logits.shape[1])).any()):
        raise ModelCallError(
            f"target(logits, batch) returned class indices from {int(chosen.min())} to {int(chosen.max())}; the logits "
            f"have the classes 0 to {logits.shape[1] - 1}."
        )
    chosen = chosen.to(logits.device).long()
    return logits.gather(1, chosen.unsqueeze(1)).squeeze(1), (chosen,)


def _scores_of_labels(decision: Decision, units: Tensor, batch: Mapping[str, Any], logits: Tensor) -> Tensor:
    """The logit of each example's label, (b,)."""
    if decision.kind == "span" and decision.ends is not None:
        pairs = [(logits, decision.labels), (decision.ends, decision.end_labels)]
        if any(labels is None for _, labels in pairs):
            raise ProbeError(
                f"target='label' needs labels in the batch, under {' and '.join(SPAN_LABELS)}; it holds "
                f"{', '.join(map(str, batch))}. Add them, or use target='predicted'."
            )
        return torch.stack([_at(one, labels, SPAN_LABELS) for one, labels in pairs if labels is not None]).sum(0)
    if decision.kind in BY_TOKEN and decision.labels is not None:
        return _at(decision.logits[units], decision.labels[units], LABELS[:1])
    labels = _labels(batch, logits)
    return logits.gather(1, labels.to(logits.device).long().unsqueeze(1)).squeeze(1)


def _at(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise ProbeError(
            f"target='label': {' and '.join(names)} must lie between 0 and {logits.shape[1] - 1}, as many as the "
            "logits have."
        )
    return logits.gather(1, labels.to(logits.device).long().unsqueeze(1)).squeeze(1)


def _rows_of(
    decision: Decision, scores: Tensor, place: Tensor, calls: tuple[EncoderCall, ...], checks: Checks
) -> Callable[[], Tensor | None]:
    """The row of the encoder's call that each example is decided from; None where they are the examples' own.

    A forward may sort its texts by length, for example, or flatten choices: row i of its encoder is not row i of the
    batch until shown.

    Args:
        decision: what was decided, in the autograd graph.
        scores: (b,) the scores.
        place: (b,) the choice that is explained, where there are choices.
        calls: the calls of encoders.
        checks: takes what tells the rows; they are known once it has looked.

    Returns:
        Tells the rows, (b,), then.
    """
    size, last = len(scores), calls[0].last
    found: list[list[int]] = []
    if decision.kind == "choice":
        choices = decision.logits.flatten()
        checks.add(digits_read(choices, last), lambda read: found.append(rows_of_digits(read, len(choices))))
        chosen: list[Tensor] = []
        checks.add(place, chosen.append)

        def of_choices() -> Tensor:
            rows = torch.tensor(found[0]).view(decision.logits.shape)
            if bool((rows < 0).any()):
                raise ModelCallError(
                    "which text each choice is decided from cannot be told: a choice reads the texts of others, too."
                )
            return rows.gather(1, chosen[0].long().unsqueeze(1)).squeeze(1)

        return of_choices
    own_texts = len(calls[0].mask) == size
    if not scores.requires_grad or (own_texts and (len(calls) > 1 or size < 2)):
        return lambda: None
    checks.add(digits_read(scores, last), lambda read: found.append(rows_of_digits(read, size)))

    def of_examples() -> Tensor | None:
        rows, own = found[0], list(range(size))
        if not own_texts:
            if min(rows) < 0:
                raise ModelCallError(
                    f"the encoder is called with {len(calls[0].mask)} texts for {size} examples, and which of them an "
                    "example is decided from cannot be told."
                )
            return torch.tensor(rows)
        # Where examples share texts, or read none, nothing tells them apart.
        return torch.tensor(rows) if sorted(rows) == own and rows != own else None

    return of_examples


def _connected(reader: Reader, run: _Run, batch: Any, settings: Settings, keep_maps: bool) -> _Found:
    """One forward and one backward, or two where what the decision reads has to be known first."""

    def attempt(readout: str, weights: list[Tensor] | None, waits: bool = False) -> _Found:
        if not reader.connected:
            try:
                return _attempt(reader, run, batch, settings, keep_maps, readout, weights, waits, connected=False)
            except ModelCallError as error:
                if not isinstance(error, CutGraphError) and not isinstance(error.__cause__, RuntimeError):
                    raise
        # The forward cuts the graph, or drops parts of it that it cannot compute again while it is read.
        found = _attempt(reader, run, batch, settings, keep_maps, readout, weights, waits, connected=True)
        reader.connected = True
        return found

    if settings.readout != AUTO:
        return attempt(settings.readout, None)
    if reader.reads is None and not isinstance(batch, Chunk):
        # Most heads read one end of the text; then one pass does.
        reader.reads = effective_readout(reader.read[0], AUTO)
    known = batch.weights if isinstance(batch, Chunk) and reader.reads == "token" else None
    if reader.reads in (*READOUTS, "elsewhere"):
        found = attempt("cls" if reader.reads == "elsewhere" else reader.reads, None)
        if _reads(reader, found)[0] == reader.reads:
            return found
    elif known is not None:
        # The token that is decided stays the same, as long as the probe and its labels do.
        found = attempt("token", known)
        name, weights = _reads(reader, found)
        if name == "token" and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, known, strict=True)):
            return found
    else:
        found = attempt("cls", None, waits=True)
    reader.reads, weights = _reads(reader, found)
    if isinstance(batch, Chunk):
        batch.weights = weights if reader.reads == "token" else None
    by_token = reader.reads not in (*READOUTS, "elsewhere")
    readout = "cls" if reader.reads == "elsewhere" else reader.reads
    waited = []
    for layers, structure, call, weight in zip(found.layers, reader.read, found.calls, weights, strict=True):
        if by_token:
            waited.append(layers.read(readout, weight, call.mask))
        else:
            waited.append(layers.read(effective_readout(structure, readout), None, call.mask))
    return found if all(waited) else attempt(readout, weights if by_token else None)


def _reads(reader: Reader, found: _Found) -> tuple[str, list[Tensor]]:
    """Which tokens the decision reads of the first call of an encoder, and how much of each token of every call."""
    names, weights = [], []
    for structure, home in zip(reader.read, found.at_home, strict=True):
        name, weight = reading_of(home.head, home.mask, found.judged.rows, structure.causal)
        names.append(name)
        weights.append(weight)
    same = len(set(names)) == 1
    return names[0] if same or names[0] not in READOUTS else "weighted", weights


def reading_of(head: Tensor | None, mask: Tensor, rows: Tensor | None, causal: bool) -> tuple[str, Tensor]:
    """Which tokens a decision reads.

    Args:
        head: (b, q) length of the score's gradient with respect to each token's last hidden states, or None.
        mask: (b, q) true for real tokens.
        rows: the rows that count; all when None.
        causal: whether no token sees what comes after it.

    Returns:
        ``"cls"``, ``"last"``, ``"mean"``, ``"token"``, ``"weighted"``, or ``"elsewhere"`` where it reads none of them;
        and how much of each token it reads, (b, q), adding up to 1.
    """
    if head is None:
        return "elsewhere", mask.float()
    weights = head.masked_fill(~mask, 0.0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    own, real = (weights, mask) if rows is None else (weights[rows.to(mask.device)], mask[rows.to(mask.device)])
    used = real.any(1) & (own.sum(1) > 0)
    # A text of one token does not tell: its first token is its last, and the mean of all.
    used = used & (real.sum(1) > 1) if bool((used & (real.sum(1) > 1)).any()) else used
    own, real = own[used], real[used]
    if not len(own):
        return "elsewhere", weights
    length, first = real.sum(1, keepdim=True), real.int().argmax(1)
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    peak, place = own.max(1)
    if bool((peak > 1 - 1e-5).all()):
        # "cls" stands for the last token of a causal model, whose first one sees nothing but itself.
        ends = [("last", last)] if causal else [("cls", first), ("last", last)]
        return next((name for name, end in ends if bool((place == end).all())), "token"), weights
    uneven = (own * length - 1.0).abs().masked_fill(~real, 0.0)
    return "mean" if float(uneven.max()) < 1e-3 else "weighted", weights


def _attempt(reader: Reader, *args: Any, connected: bool) -> _Found:
    """:func:`_attempted`, and once more where kernels were used again whose weights have moved."""
    if any(parameter.device.type != "cpu" for parameter in reader.model.parameters()):
        # Where it costs to look at the weights, their counters tell first whether they stand still.
        counters = tuple((id(one), one._version) for one in reader.model.parameters() if not one.is_inference())
        if counters != reader.kernels.counters:
            reader.kernels.clear()
            reader.kernels.counters = counters
    try:
        return _attempted(reader, *args, connected=connected)
    except _StaleKernelsError:
        reader.kernels.clear()
        return _attempted(reader, *args, connected=connected)
    finally:
        reader.kernels.doubt = None


def _attempted(
    reader: Reader,
    run: _Run,
    batch: Any,
    settings: Settings,
    keep_maps: bool,
    readout: str,
    weights: list[Tensor] | None,
    waits: bool,
    *,
    connected: bool,
) -> _Found:
    """One forward and one backward, with the autograd graph as the model's forward leaves it, or kept connected.

    Where it ``waits``, the rows are read once it is known which, see :class:`~globenc_lightning.rolling.Layers`.
    """
    places = [place for place, one in enumerate(reader.structures) if isinstance(one, Structure)]
    contexts, checks = OwnContexts(reader.model, connected=connected), Checks()
    collected: dict[int, Layers] = {}
    for number, (place, structure) in enumerate(zip(places, reader.read, strict=True)):
        row = readout if weights is not None else effective_readout(structure, readout)
        weight = None if weights is None else weights[number]
        collected[place] = Layers(settings, row, len(structure.layers), keep_maps, checks, weight, waits)

    def on_layer(done: LayerDone) -> None:
        heads = done.activations.attention.probabilities.shape[1]
        collected[done.call].add(done, partial(reader.kernels.kernel, (done.call, done.place), heads=heads))

    texts = batch.batch if isinstance(batch, Chunk) else batch

    def hint() -> str:
        return (too_large(reader.model, texts) if isinstance(texts, Mapping) else None) or contexts.hint()

    def call(_: Any) -> Any:
        with _told(run.name, hint):
            return run.call(batch)

    tapes = "Value-Zeroing" in settings.methods
    reader.kernels.doubt = lambda same: checks.add(same, _refuse_stale)
    with undisturbed(reader.model, parameters_require_grad=False, written=reader.written) as handles:
        try:
            result = read(reader.model, reader.structures, call, texts, on_layer, handles, contexts, checks, tapes)
            with _told("the gradient of the scores with respect to the last hidden states"):
                judged = run.judge(result.output, result.calls, contexts, checks)
        except Exception as error:
            if not is_out_of_memory(error):
                # A layer that is not what it was found to be is the first thing to know.
                checks.settle()
            raise
        sources = [*(call.hidden for call in result.calls), *(call.last for call in result.calls)]
        gradients: tuple[Tensor | None, ...] = tuple(None for _ in sources)
        prove = None
        if judged.total.requires_grad:
            if judged.apart and judged.rows is not None:
                prove = prove_rows(judged.scores, judged.rows, result.calls[0].last)
            with _told("the backward pass from the score to the hidden states"):
                gradients = torch.autograd.grad(
                    judged.total, sources, retain_graph=takes_jacobian(settings.references), allow_unused=True
                )
        saliency = []
        for structure, call_, gradient in zip(reader.read, result.calls, gradients, strict=False):
            if gradient is None:
                raise CutGraphError(
                    f"the score does not depend on the encoder's hidden states ({structure.encoder_name}), even where "
                    "no_grad(), inference_mode() and detach() are left out: the head does not use them, or takes them "
                    "through something without a gradient (numpy, .tolist(), argmax, rounding), or the target's score "
                    "does."
                )
            saliency.append(gradient_x_input(working(gradient), working(call_.hidden), call_.mask))
        _refuse_other_rows(judged, result.calls[0], gradients[0], checks)
        if prove is not None:
            prove(gradients[len(result.calls)], checks)
        chosen = settings.readout != AUTO
        references = [
            of_jacobian(settings.references, call_, head, effective_readout(structure, settings.readout), chosen)
            for structure, call_, head in zip(reader.read, result.calls, gradients[len(result.calls) :], strict=True)
        ]
    heads = [
        None if one is None else torch.linalg.vector_norm(working(one), dim=-1)
        for one in gradients[len(result.calls) :]
    ]
    homes = _brought_home(checks, result.calls, heads, saliency)
    heads = [None if home.head is None else head for home, head in zip(homes, heads, strict=True)]
    count = reader.replay.task.calls if judged.one_call and reader.replay and reader.replay.task else len(places)
    return _Found(list(collected.values()), saliency, heads, result.calls, judged, count, homes, references)


def _along_a_path(reader: Reader, run: _Run, batch: Any, settings: Settings, found: _Found) -> _Found:
    """What was found, with integrated gradients where they are asked for: more runs of the model."""
    judged = found.judged
    if INTEGRATED not in settings.references or judged.again is None:
        return found

    def call() -> Any:
        with _told(run.name):
            return run.call(batch if isinstance(batch, Chunk) else _copied(batch))

    with _told("the gradient along the path to the hidden states"):
        along = integrated_gradients(
            reader.model,
            reader.structures,
            found.calls,
            call,
            judged.again,
            (judged.scores, judged.total),
            judged.rows,
            apart=judged.home.kind not in ("similarity", "loss") and not callable(settings.target),
            connected=reader.connected,
            written=reader.written,
        )
    for references, one in zip(found.references, along, strict=True):
        references[INTEGRATED] = one
    word, reader.incomplete = told_of(brought_home([along[0].error])[0], reader.incomplete)
    if word:
        warn(word)
    return found


def _brought_home(
    checks: Checks, calls: Sequence[EncoderCall], heads: Sequence[Tensor | None], saliency: Sequence[Tensor]
) -> list[_AtHome]:
    """Look at all that was asked for, and at what tells which tokens the decision reads."""
    asked: list[Tensor] = []
    for call, head, one in zip(calls, heads, saliency, strict=True):
        finite = (torch.isfinite(one) | ~call.mask).all(1)
        asked += [call.mask, torch.zeros_like(one) if head is None else head, finite]
    home = checks.settle(*asked)
    return [
        _AtHome(mask, head if bool((head != 0).any()) else None, finite)
        for mask, head, finite in zip(home[::3], home[1::3], home[2::3], strict=True)
    ]


class _StaleKernelsError(GlobEncError):
    """Kernels were used again whose weights have moved."""


def _refuse_stale(same: Tensor) -> None:
    if not bool(same):
        raise _StaleKernelsError


def _refuse_other_rows(judged: _Judged, call: EncoderCall, gradient: Tensor | None, checks: Checks) -> None:
    """Prove that the examples are decided from the rows that they were found to be decided from, and from no other."""
    # Another example's text may stand beside an example's own, as the second of a pair.
    if judged.rows is None or gradient is None or judged.home.kind in ("similarity", "loss"):
        return
    read = gradient.abs().flatten(1).amax(1) > 0

    def judge(read: Tensor) -> None:
        if judged.rows is not None and not bool(read[judged.rows].all()):
            raise ModelCallError("the examples are decided from other texts than when these were found.")

    checks.add(read, judge)


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
    """Clone a batch for the analysis, on the model's device.

    Args:
        model: the module that will be called.
        inputs: a mapping with ``input_ids`` (b, s), or (b, c, s) for ``c`` choices, or other tensors of examples
            (images, audio).

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
        _check_masks(inputs)
        return {key: value.to(device).clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _check_ids(key: str, ids: Tensor) -> None:
    if ids.dim() > 3:
        raise ProbeError(
            f"{key} has the shape {tuple(ids.shape)}; (examples, tokens) is expected, or (examples, choices, tokens) "
            "for a model of multiple choice."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ProbeError(f"{key} has the type {ids.dtype}; token ids are integers: write batch[{key!r}].long().")


def _refuse_offloaded(model: nn.Module) -> None:
    """Raise where the weights of an encoder are not in memory, or not in one: the maps are made of them."""
    for path, encoder in find_encoders(model).items():
        absent = [name for name, parameter in encoder.named_parameters() if parameter.is_meta]
        if absent:
            raise UnsupportedEncoderError(
                f"{path or type(model).__name__}: {len(absent)} of its parameters are on the meta device, {absent[0]} "
                "for one: they are offloaded (accelerate's cpu_offload, disk_offload or device_map), or were never "
                "loaded. The maps are made of these weights, so load the whole encoder onto one device, for example "
                "AutoModel.from_pretrained(name).to('cpu'), or model.to_empty(device='cpu') and load_state_dict."
            )
        devices = sorted({str(parameter.device) for parameter in encoder.parameters()})
        if len(devices) > 1:
            raise UnsupportedEncoderError(
                f"{path or type(model).__name__}: its parameters are on several devices ({', '.join(devices)}), as "
                "device_map spreads them. The maps of its layers are multiplied with one another, so put the whole "
                f"encoder onto one device, for example model.to({devices[-1]!r}), or load it without device_map."
            )


def _texts_of(batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The ids (b, s) of every text in a batch and its mask, each with what its entries' names begin with."""
    # Two sentences encoded apart have names such as query_input_ids and query_attention_mask.
    for prefix in sorted((key[: -len("input_ids")] for key in batch if key.endswith("input_ids")), key=len):
        ids, mask = batch[f"{prefix}input_ids"], batch.get(f"{prefix}attention_mask")
        if isinstance(ids, Tensor) and ids.dim() >= 2 and isinstance(mask, Tensor):
            yield prefix, ids, mask


def _check_masks(inputs: Mapping[str, Any]) -> None:
    for prefix, ids, mask in _texts_of(inputs):
        if mask.shape != ids.shape:
            raise ProbeError(
                f"{prefix}attention_mask must have the shape {tuple(ids.shape)}; it has {tuple(mask.shape)}."
            )


def _told_at_home(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with ids, masks and labels on the CPU: what is read of them is read there, and comes in one copy."""
    told = dict(inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and not value.is_complex()}
    names = [name for name, value in tensors.items() if value.dim() <= (2 if value.is_floating_point() else 3)]
    with torch.inference_mode(False), torch.no_grad():
        told.update(zip(names, brought_home([inputs[name].clone() for name in names]), strict=True))
    return told


def _without_padding(batch: dict[str, Any], told: Mapping[str, Any]) -> tuple[dict[str, Any], slice | None]:
    """A batch without the columns that are padding in every example, and the columns that are kept.

    Whether it means the same is to be shown: heads may read padding, and the first token's position may count.

    Args:
        batch: the batch.
        told: the same with ids and masks on the CPU.

    Returns:
        The shorter batch, and which columns of its first text are kept; the batch itself and None where there is
        nothing to cut off.
    """
    shorter, kept = dict(batch), None
    for prefix, ids, mask in _texts_of(told):
        used = mask.bool().any(0).nonzero().flatten()
        if ids.dim() != 2 or not len(used) or len(used) == ids.shape[1]:
            continue
        columns = slice(int(used[0]), int(used[-1]) + 1)
        if columns.stop - columns.start == ids.shape[1]:
            continue
        kept = columns if kept is None else kept
        for key, value in batch.items():
            if key.startswith(prefix) and is_by_token(key, told[key], mask.bool()):
                shorter[key] = value[:, columns]
    return (batch, None) if kept is None else (shorter, kept)


def _decides_alike(reader: Reader, batch: dict[str, Any], shorter: dict[str, Any], keep: slice, target: Target) -> bool:
    """Whether a model gives the same logits, and the user's target the same score, without columns of padding.

    Args:
        reader: the model, with the way of calling it.
        batch: the whole batch.
        shorter: the batch without the columns.
        keep: the columns of the texts that it still has.
        target: the target.
    """
    if reader.whole:
        return False
    given: list[list[Tensor]] = []
    share = 0.0
    for one in (batch, shorter):
        try:
            logits, share = _evaluated(reader, one)
            given.append([logits, *([target(logits, _copied(one))] if callable(target) else [])])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # It wants the texts at their whole length.
            reader.whole = True
            return False
    for whole, cut in zip(*given, strict=True):
        # A model that decides per token decides for fewer; one that chooses a token has fewer to choose from.
        by_token = whole.shape != cut.shape and whole.dim() > 2
        mine, theirs = working(cut), working(whole[:, keep] if by_token else whole)
        alike = mine.shape == theirs.shape and torch.equal(torch.isfinite(mine), torch.isfinite(theirs))
        finite = torch.isfinite(mine)
        if not alike or (
            bool(finite.any())
            and float((mine - theirs)[finite].abs().max()) > share * max(1.0, float(theirs[finite].abs().max()))
        ):
            reader.whole = True
            return False
    return True


def _evaluated(reader: Reader, batch: dict[str, Any]) -> tuple[Tensor, float]:
    """The logits that a model gives as its user evaluates it, and how far rounding may move them, as a share."""
    failures: list[str] = []
    for way in _ways(reader, batch, failures):
        if way.name == reader.way:
            size = size_of_batch(batch)
            try:
                return _own_logits(reader, way, _copied(batch), size, reader.read, full_precision=True)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                return _own_logits(reader, way, _copied(batch), size, reader.read, full_precision=False)
    raise ModelCallError(f"the inputs do not offer what {reader.way} takes.")


def _lengths(batch: Mapping[str, Any]) -> Tensor | None:
    """How many real tokens each example has, (b,), or None where the inputs do not tell."""
    key = next((key for key in batch if key.endswith("input_ids")), None)
    if key is None:
        return None
    mask = batch.get(key[: -len("input_ids")] + "attention_mask")
    real = torch.ones_like(batch[key]).sum(-1) if mask is None else mask.bool().sum(-1)
    # The longest of several choices.
    return real.flatten(1).amax(1) if real.dim() > 1 else real


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    return len(value) if isinstance(value, list | tuple) else None


def _rows(value: Any, chosen: list[int]) -> Any:
    return value[chosen] if isinstance(value, Tensor) else [value[index] for index in chosen]


def _find_shortest(reader: Reader, batch: dict[str, Any], shorter: dict[str, Any], lengths: Tensor | None) -> bool:
    """:func:`_find` with the beginning of the texts, which takes a fraction of the memory; else with the whole.

    Args:
        reader: the model.
        batch: the batch.
        shorter: the same without columns of padding.
        lengths: how many real tokens each example has, (b,), or None.

    Returns:
        Whether the whole texts were used.
    """
    begun = _beginning(shorter, FIND_TOKENS) or (None if shorter is batch else shorter)
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
    size = size_of_batch(batch)
    order = torch.arange(size) if lengths is None else lengths.cpu().argsort(descending=True, stable=True)
    chosen = sorted(order[:examples].tolist())
    some = {key: _rows(value, chosen) if _length(value) == size else value for key, value in batch.items()}
    failures: list[str] = []
    refusal: GlobEncError | None = None
    cause: Exception | None = None
    for way in islice(_ways(reader, batch, failures), tries):
        name = way.name
        try:
            watch = LossWatch()
            with undisturbed(reader.model, parameters_require_grad=True, written=reader.written) as handles:
                structures, output = find_structures(reader.model, _watched(way.call, watch), _copied(some), handles)
                logits = logits_of(output, len(chosen), _width(reader, structures)).detach()
                squashes = _before_squashing(output, watch)[1] is not None
        except UnsupportedEncoderError as error:
            refusal = refusal or _with_own_attention(reader.model, error)
        except NonFiniteError as error:
            refusal = refusal or error
        except ModelCallError as error:
            cause = error
            failures.append(f"{name}: {error}")
        except GlobEncError as error:
            refusal = refusal or error
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
            _refuse_unused_mask(reader, way, batch)
            _refuse_another_model(reader, way, _copied(some), logits, structures)
            reader.way, reader.attention = name, attention_of(reader.model)
            reader.structures = tuple(one for one in structures if isinstance(one, Structure))
            reader.reads, reader.squashes, reader.numbers = None, squashes, _numbers_of(reader)
            reader.unsigned = ""
            if not way.own and has_own_forward(reader.model):
                tried = "; ".join(failures) or "it does not take the batch's entries by their names"
                warn(
                    f"{type(reader.model).__name__} has a forward of its own that gave no logits ({tried}); the "
                    f"figures are those of {name}. If another head is trained, "
                    "give forward=, a callable forward(module, batch) that returns its logits."
                )
            return
    if refusal is not None:
        raise refusal
    tried = "\n".join(f"    {failure}" for failure in failures) or (
        f"    {type(reader.model).__name__} has no forward of its own that takes {', '.join(map(str, batch))}, "
        "and holds no Hugging Face model with a head"
    )
    raise ModelCallError(
        f"{type(reader.model).__name__} gives no logits for the probe:\n{tried}\n{_advice(reader, _copied(some))}"
    ) from cause


def _advice(reader: Reader, batch: Mapping[str, Any]) -> str:
    return advice(reader.model, batch, reader.written)


def _watched(call: Callable[[Any], Any], watch: LossWatch) -> Callable[[Any], Any]:
    """A call that notes which probabilities were made of which logits."""

    def run(batch: Any) -> Any:
        with watch:
            return call(batch)

    return run


def _before_squashing(output: Any, watch: LossWatch) -> tuple[Any, str | None]:
    """What a model returned with its probabilities taken back to the logits that they were made of.

    Args:
        output: what it returned.
        watch: what was noted while it ran.

    Returns:
        The output, and whether the probabilities were of ``"classes"`` or ``"labels"``; None where there are none.
    """
    if isinstance(output, Tensor):
        return watch.behind(output)
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        parts = [watch.behind(one) if isinstance(one, Tensor) else (one, None) for one in output]
        kinds = [kind for one, kind in parts if kind is not None]
        return type(output)(one for one, _ in parts), next(iter(kinds), None)
    named = named_in(output, "logits")
    logits, kind = watch.behind(named) if isinstance(named, Tensor) else (named, None)
    return (output, None) if kind is None else ({"logits": logits}, kind)


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
            "model. Load it with one that can be read as it stands: attn_implementation='sdpa' or 'eager'"
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


def _refuse_unused_mask(reader: Reader, way: Way, batch: Mapping[str, Any]) -> None:
    name = unused_mask(reader.model, way, batch)
    if name is not None:
        raise ModelCallError(
            f"{way.name} is called without a mask, and the batch's entry {name!r} looks like one: padding would count "
            f"as text. Call it 'attention_mask' in the batch, or say how it is passed, "
            f"{advice_on_mask(reader.model, batch, name, reader.written)}"
        )


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
