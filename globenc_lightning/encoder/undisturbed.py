"""The one context in which a user's model is touched, and that puts everything back."""

import operator
import random
import sys
import sysconfig
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from globenc_lightning.errors import GlobEncWarning, is_out_of_memory

DEPTH = 4
"""How deep containers and objects inside a module's attributes are kept: a cache holds a list of layers of tensors."""

LONGEST = 1000
"""Longer containers are put back themselves; what hangs on their entries is not."""

MOST_COPIED = 2 << 30
"""How many bytes of parameters are copied at the most while nobody knows which of them a forward writes into."""

LARGEST = 64 << 20
"""Tensors and arrays of more bytes are not copied, unless they are buffers."""

_EQUAL_TO_SDPA = ("flash_attention", "flash_paged", "npu_flash_attention", "flex_attention", "sdpa_paged")
"""Modules of ``transformers.integrations`` whose kernels compute what sdpa does, and show nothing of it."""


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states of torch, numpy and Python back afterwards, whatever happened.

    Around everything that is not the model's: a logger or a user's target may draw random numbers, too.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def undisturbed(
    model: nn.Module, *, parameters_require_grad: bool, written: set[str] | None = None
) -> Iterator[list[RemovableHandle]]:
    """Run an analysis on a model that is being trained, and leave no trace of it.

    Inside: every module in eval mode, gradients enabled even below ``torch.inference_mode``, autocast off, compiled
    modules run eagerly (hooks added after compilation would not fire), attention kernels that cannot be read (flash,
    flex) replaced by sdpa, which computes the same. Afterwards, whatever happened, the model is what it was, see
    :func:`_kept`, and the hooks whose handles were appended to the yielded list are gone.

    Args:
        model: the module whose parts may be run.
        parameters_require_grad: whether parameters take part in the autograd graph. Without, the gradient goes to
            the hidden states alone, and nothing is saved for weight gradients.
        written: names of parameters that a forward has written into before; those found written are added. They are
            copied beforehand. When None, or with ``parameters_require_grad``, every parameter is.

    Yields:
        A list for the handles of the hooks that the analysis registers.
    """
    handles: list[RemovableHandle] = []
    with _kept(model, None if parameters_require_grad else written, set() if written is None else written) as kept:
        try:
            with ExitStack() as stack:
                _enter(stack, model)
                stack.enter_context(torch.enable_grad())
                # The flag alone: train() and eval() are methods that users override.
                for module in model.modules():
                    module.training = False
                    # A feed-forward network that runs in chunks gives the same, but its norm never sees a whole
                    # sequence.
                    if vars(module).get("chunk_size_feed_forward"):
                        vars(module)["chunk_size_feed_forward"] = 0
                for config, stand_in in _exchanged(model):
                    config._attn_implementation_internal = stand_in
                for parameter in kept.parameters:
                    # The attribute: requires_grad_() refuses parameters that are not initialized yet.
                    parameter.requires_grad = parameters_require_grad
                yield handles
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def as_evaluated(model: nn.Module, written: set[str] | None = None) -> Iterator[None]:
    """Run a model as its user does in an evaluation, and leave no trace of it.

    Its own ``eval()``, its own attention implementation and chunks, no gradients. As in :func:`undisturbed`, nothing is
    cast and nothing is compiled.

    Args:
        model: the module.
        written: as for :func:`undisturbed`.
    """
    # A train() or eval() of one's own may write into any parameter: adapters are merged into the weights, say.
    own = any(
        name in vars(module) or getattr(type(module), name) is not getattr(nn.Module, name)
        for module in model.modules()
        for name in ("train", "eval")
    )
    with _kept(model, None if own else written, set() if written is None else written) as kept, ExitStack() as stack:
        _enter(stack, model)
        stack.enter_context(torch.no_grad())
        if kept.complete or not own:
            model.eval()
        else:
            for module in model.modules():
                module.training = False
        yield


def attention_of(model: nn.Module) -> tuple[Any, ...]:
    """The attention implementations that a model's configurations name, with the functions registered for them."""
    found = []
    for config in _configs(model):
        name = getattr(config, "_attn_implementation", None)
        function = _registered(name)
        try:
            # Where nobody else needs a function any more, it is not kept alive from here.
            found.append((name, None if function is None else ref(function)))
        except TypeError:
            found.append((name, function))
    return tuple(found)


def exchanged_attention(model: nn.Module) -> dict[str, str]:
    """Which attention implementations :func:`undisturbed` replaces by which."""
    return {config._attn_implementation: stand_in for config, stand_in in _exchanged(model)}


def own_attention(model: nn.Module) -> list[str]:
    """The attention implementations of a model that are neither transformers' own nor replaced."""
    names = {getattr(config, "_attn_implementation", None) for config in _configs(model)}
    return sorted(name for name in names - {None, "eager", "sdpa"} - set(exchanged_attention(model)) if name)


def _enter(stack: ExitStack, model: nn.Module) -> None:
    """What holds whenever a user's model is run."""
    stack.enter_context(torch.inference_mode(False))
    devices = {parameter.device for parameter in model.parameters()}
    cuda = sorted({device.index for device in devices if device.type == "cuda" and device.index is not None})
    stack.enter_context(torch.random.fork_rng(devices=cuda))
    for device_type in {"cpu", *(device.type for device in devices)} - {"meta"}:
        stack.enter_context(torch.autocast(device_type, enabled=False))
    # Importing dynamo takes seconds; a process that never imported it has compiled nothing.
    if "torch._dynamo" in sys.modules:
        stack.enter_context(torch.compiler.set_stance("force_eager"))


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of the Hugging Face models in a module, each once."""
    found = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    return list(found.values())


def _registered(name: str | None) -> Any:
    """The function that transformers knows by the name of an attention implementation, or None."""
    if name is None:
        return None
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    # Where nothing is registered for it, "paged|sdpa" is another name of "sdpa".
    return ALL_ATTENTION_FUNCTIONS.get(name.removeprefix("paged|")) if function is None else function


def _exchanged(model: nn.Module) -> list[tuple[Any, str]]:
    """The configurations whose attention is a kernel that shows nothing, with the name of what computes the same.

    What a user has registered may be any other model: it is read as it stands, or refused.
    """
    found = {}
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        name = getattr(module.config, "_attn_implementation", None)
        if name in (None, "eager", "sdpa"):
            continue
        function = _registered(name)
        # The kernel that a flash attention runs on may be bound to it; whatever else is bound may change what it is.
        while isinstance(function, partial) and not function.args and set(function.keywords) <= {"implementation"}:
            function = function.func
        package, _, where = str(getattr(function, "__module__", "")).rpartition(".")
        sdpa = "sdpa" if getattr(module, "_supports_sdpa", True) else "eager"
        if package == "transformers.integrations" and where in _EQUAL_TO_SDPA:
            found[id(module.config)] = (module.config, sdpa)
        elif package == "transformers.integrations" and where == "eager_paged":
            found[id(module.config)] = (module.config, "eager")
    return list(found.values())


# ---- what everything was


@contextmanager
def _kept(model: nn.Module, copied: set[str] | None, written: set[str]) -> Iterator["_Kept"]:
    """Put a model back afterwards, whatever was done to it.

    Kept are of every module: its class, its attributes, its tables of parameters, buffers, children and hooks; the
    containers, tensors, arrays and random generators among its attributes, and those inside containers and inside
    objects of the user's own classes, ``DEPTH`` levels deep (torchmetrics are modules; configurations and caches of
    transformers are looked into); each parameter's data, ``requires_grad`` and gradient; the random states of numpy and
    Python. Each stays the same object. Not kept are libraries' objects, such as a Trainer or a logger, what a forward
    writes into a variable, a class or a file (a hook's list outside the model, say), and the entries of parameters
    that were not copied and of attributes of more than ``LARGEST`` bytes.

    Args:
        model: the module.
        copied: the names of the parameters that are copied; all of them when None, up to ``MOST_COPIED`` bytes.
        written: takes the names of parameters that were written into.

    Yields:
        What was kept.
    """
    kept = _Kept(model, copied)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        kept.prepare()
        yield kept
    finally:
        kept.put_back(written)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class _KeptTensor(NamedTuple):
    """A tensor as it was.

    Attributes:
        tensor: the tensor.
        kind: its class: a parameter that is not initialized changes it.
        data: an alias of its data, with their shape, strides and place in memory.
        copy: a copy of them, or None.
        requires_grad: whether it required a gradient.
        version: how often it had been written into; None where nobody counts.
    """

    tensor: Tensor
    kind: type
    data: Tensor
    copy: Tensor | None
    requires_grad: bool
    version: int | None

    def put_back(self) -> bool:
        """Make it what it was; returns whether a write was seen."""
        tensor, changed = self.tensor, False
        if type(tensor) is not self.kind:
            # Materialized: the object that an optimizer holds is the one that has to be uninitialized again.
            tensor.data = self.data
            tensor.__class__ = self.kind
        elif not issubclass(self.kind, UninitializedParameter | UninitializedBuffer):
            if not _same_place(tensor, self.data):
                tensor.data = self.data
                changed = True
            changed = changed or (self.version is not None and tensor._version != self.version)
            # Bit by bit, NaN included: what is written back unchanged would still be a write.
            if self.copy is not None and not _equal(tensor, self.copy):
                changed = True
                with torch.no_grad():
                    # Of an expanded tensor one entry of each: the others are the same place in memory.
                    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
                    tensor[once].copy_(self.copy[once])
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad = self.requires_grad
        return changed

    def is_lost(self) -> bool:
        """Whether it was written into, and there is no copy."""
        return self.copy is None and self.version is not None and self.tensor._version != self.version


class _Kept:
    """What a model was, and how it is put back: see :func:`_kept`.

    Attributes:
        modules: every module, also those in attributes.
        parameters: the model's parameters in floating point.
        complete: whether every parameter was copied.
    """

    def __init__(self, model: nn.Module, copied: set[str] | None) -> None:
        self.modules: list[nn.Module] = []
        self._classes: list[type] = []
        self._tables: list[tuple[Any, dict[Any, Any]]] = []
        self._sequences: list[tuple[Any, list[Any]]] = []
        self._empty: list[Any] = []
        self._tensors: list[_KeptTensor] = []
        self._states: list[Any] = []
        self._kinds: dict[type, str] = {}
        self._queue: deque[tuple[Any, int]] = deque()
        self._seen: set[int] = set()
        self._inference: list[tuple[Any, Any, Tensor]] = []
        self._hidden: dict[str, Tensor] = {}

        named = dict(model.named_parameters())
        # Whatever an attribute leads to is looked at afterwards, so that parameters and modules are known by then.
        self._seen.update(map(id, named.values()))
        self._buffers = set(map(id, model.buffers()))
        for module in model.modules():
            self._module(module)
        while self._queue:
            self._look(*self._queue.popleft())

        self.parameters = [one for one in named.values() if one.is_floating_point()]
        every: dict[str, Tensor] = {**named, **self._hidden}
        if copied is None:
            size = sum(one.nbytes for one in every.values() if _is_plain(one) and not _is_lazy(one))
            copied = set(every) if size <= MOST_COPIED else set()
        copied = copied | _renormalized(model)
        self.complete = copied >= set(every)
        self._parameters = {
            name: kept for name, one in every.items() if (kept := _keep(one, name in copied)) is not None
        }
        self._flags = [(one, one.requires_grad) for one in self.parameters]
        self._gradients = [(one, one.grad) for one in named.values()]

    def prepare(self) -> None:
        """Make what a forward below needs that is not below inference mode any more, and can be undone."""
        # What inference mode has made can neither be written into nor be saved for a gradient outside it.
        with torch.inference_mode(False):
            for table, key, tensor in self._inference:
                table[key] = tensor.clone()
        # A backward pass inside a forward would add to gradients that wait for their optimizer.
        for parameter, gradient in self._gradients:
            if gradient is not None:
                parameter.grad = None

    def put_back(self, written: set[str]) -> None:
        """Make everything what it was, and say which parameters were written into."""
        for module, kind in zip(self.modules, self._classes, strict=True):
            if type(module) is not kind:
                module.__class__ = kind
        for empty in self._empty:
            if empty:
                empty.clear()
        for now, before in self._tables:
            _restore(now, before)
        for now, entries in self._sequences:
            _restore_sequence(now, entries)
        lost = []
        for kept in self._tensors:
            if kept.put_back() and kept.is_lost():
                lost.append(f"an attribute, a tensor of shape {tuple(kept.data.shape)},")
        for restore in self._states:
            restore()
        for name, kept in self._parameters.items():
            if kept.put_back():
                written.add(name)
                if kept.is_lost():
                    lost.append(name)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        if lost:
            warnings.warn(
                f"the forward pass of an analysis wrote into {' and '.join(lost)} of which there was no copy, so this "
                "could not be undone, and the training is not what it would have been. From now on parameters that were"
                " written into are copied. Write where self.training is true, or in training_step.",
                GlobEncWarning,
                stacklevel=2,
            )

    def _module(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self.modules.append(module)
        self._classes.append(type(module))
        self._table(vars(module), 0)

    def _table(self, table: Any, depth: int) -> None:
        """Keep a dict, and put what has to be looked at into the queue."""
        before = dict(table) if type(table) is dict else dict(_methods(table).items(table))
        self._tables.append((table, before))
        if depth > DEPTH or len(before) > LONGEST:
            return
        for key, value in before.items():
            kind = type(value)
            if kind in _PLAIN:
                continue
            if kind in _EMPTIED and not value:
                self._empty.append(value)
            elif isinstance(value, Tensor):
                self._tensor(value, table, key)
            else:
                self._queue.append((value, depth))

    def _tensor(self, tensor: Tensor, table: Any = None, key: Any = None) -> None:
        if table is not None and _is_plain(tensor) and not _is_lazy(tensor) and tensor.is_inference():
            self._inference.append((table, key, tensor))
        elif id(tensor) not in self._seen:
            self._seen.add(id(tensor))
            kept = _keep(tensor, _is_lazy(tensor) or id(tensor) in self._buffers or tensor.nbytes <= LARGEST)
            if kept is not None:
                self._tensors.append(kept)

    def _look(self, value: Any, depth: int) -> None:
        cls = type(value)
        kind = self._kinds.get(cls)
        if kind is None:
            kind = self._kinds[cls] = _kind(cls)
        if not kind or id(value) in self._seen:
            return
        if kind == "module":
            # One that is no child, in a list or hidden from the state dict.
            place = f"a {type(value).__name__} in an attribute ({len(self._hidden)})"
            for module in value.modules():
                self._module(module)
            for name, parameter in value.named_parameters():
                if id(parameter) not in self._seen:
                    self._seen.add(id(parameter))
                    self._hidden[f"{place}: {name}"] = parameter
            return
        if kind == "tensor":
            self._tensor(value)
            return
        self._seen.add(id(value))
        if kind == "dict":
            self._table(value, depth + 1)
        elif kind in ("sequence", "fixed"):
            entries = list(value)
            if kind == "sequence":
                self._sequences.append((value, entries))
            if depth < DEPTH and len(entries) <= LONGEST:
                self._queue.extend((entry, depth + 1) for entry in entries if type(entry) not in _PLAIN)
        elif kind != "object":
            self._states.append(_STATES[kind](value))
        own = getattr(value, "__dict__", None)
        if kind in ("dict", "sequence", "object") and isinstance(own, dict) and depth <= DEPTH:
            self._table(own, depth + 1)


_PLAIN = frozenset(
    {bool, bytes, complex, float, int, range, slice, str, type, types.NoneType, types.BuiltinFunctionType}
    | {types.FunctionType, types.MethodType, torch.device, torch.dtype, torch.Size}
)
_EMPTIED = frozenset({dict, OrderedDict, list, set, deque})


def _kind(cls: type) -> str:
    """How an object of a class is kept; an empty name where it is not."""
    for base, name in (
        (nn.Module, "module"),
        (Tensor, "tensor"),
        (dict, "dict"),
        (list | set | deque | bytearray, "sequence"),
        (tuple | frozenset, "fixed"),
        (torch.Generator, "torch generator"),
        (np.random.Generator, "numpy generator"),
        (np.random.RandomState, "numpy random state"),
        (random.Random, "python random state"),
        (np.ndarray, "array"),
    ):
        if issubclass(cls, base):
            return name
    return "object" if _is_looked_into(cls) else ""


_CONFIGURATIONS_AND_CACHES = (
    "transformers.cache_utils",
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
)


def _is_looked_into(cls: type) -> bool:
    """Whether objects of a class are state that a forward may hold: of a user's own class, or one of those above.

    Whatever else inherits from a library's class (a Trainer, a logger, a dataset, a thread) is not.
    """
    bases = [base for base in cls.__mro__ if base is not object]
    if any(base.__module__ in _CONFIGURATIONS_AND_CACHES for base in bases):
        return True
    return all(base.__module__ in ("abc", "collections", "types", "typing") or _is_of_the_user(base) for base in bases)


def _is_of_the_user(cls: type) -> bool:
    root = cls.__module__.partition(".")[0]
    if root in ("__main__", "__mp_main__"):
        return True
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or root == __name__.partition(".")[0]:
        return False
    parts = PurePath(file).parts
    installed = "site-packages" in parts or "dist-packages" in parts
    return not installed and not PurePath(file).is_relative_to(sysconfig.get_path("stdlib"))


def _array_state(array: np.ndarray) -> Any:
    if array.nbytes > LARGEST or array.dtype.hasobject or not array.flags.writeable:
        return lambda: None
    before = array.copy()

    def restore() -> None:
        one, other = (np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in (array, before))
        if array.shape == before.shape and not np.array_equal(one, other):
            array[...] = before

    return restore


def _numpy_state(generator: np.random.Generator) -> Any:
    bits: Any = generator.bit_generator
    return partial(setattr, bits, "state", bits.state)


_STATES: Mapping[str, Any] = {
    "torch generator": lambda one: partial(one.set_state, one.get_state()),
    "numpy generator": _numpy_state,
    "numpy random state": lambda one: partial(one.set_state, one.get_state()),
    "python random state": lambda one: partial(one.setstate, one.getstate()),
    "array": _array_state,
}


def _keep(tensor: Tensor, copied: bool) -> _KeptTensor | None:
    """A tensor as it is; None where nothing can be kept of it (on no device, sparse, a library's own class)."""
    if not _is_plain(tensor):
        return None
    if _is_lazy(tensor):
        return _KeptTensor(tensor, type(tensor), tensor.data, None, tensor.requires_grad, None)
    if tensor.is_inference() or (tensor.numel() and tensor.untyped_storage().nbytes() == 0):
        # Made below inference mode, where prepare() takes care; or a part of a model that is sharded just now.
        return None
    data = tensor.detach()
    copy = _copy(data) if copied else None
    return _KeptTensor(tensor, type(tensor), data, copy, tensor.requires_grad, tensor._version)


def _is_plain(tensor: Tensor) -> bool:
    kinds = (Tensor, nn.Parameter, UninitializedParameter, UninitializedBuffer)
    return type(tensor) in kinds and (
        _is_lazy(tensor)
        or (tensor.layout is torch.strided and tensor.device.type != "meta" and not tensor.is_quantized)
    )


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def _copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        try:
            return tensor.clone()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return tensor.to("cpu", copy=True)


def _renormalized(model: nn.Module) -> set[str]:
    """The embeddings that torch itself writes into when they are looked up."""
    return {
        f"{name}.weight".removeprefix(".")
        for name, module in model.named_modules()
        if getattr(module, "max_norm", None) is not None
    }


def _same_place(tensor: Tensor, data: Tensor) -> bool:
    return (
        tensor.data_ptr() == data.data_ptr()
        and tensor.shape == data.shape
        and tensor.stride() == data.stride()
        and tensor.dtype == data.dtype
    )


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    one, other = _bits(tensor), _bits(copy.to(tensor.device))
    if one.dtype != other.dtype:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    # Eight bytes at a time: one by one takes six times as long.
    by_eight = flat.nbytes % 8 == 0 and flat.data_ptr() % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0
    return flat.view(torch.int64 if by_eight else torch.uint8)


def _restore(now: Any, before: dict[Any, Any]) -> None:
    # In their order, too: nothing is slower to compare than all parts of all modules by their names.
    base = _methods(now)
    if (
        len(now) == len(before)
        and all(map(operator.is_, base.keys(now), before))
        and all(map(operator.is_, base.values(now), before.values()))
    ):
        return
    base.clear(now)
    for key, value in before.items():
        base.__setitem__(now, key, value)


def _methods(table: Any) -> Any:
    """The class whose methods change a dict and do nothing else: a subclass may do more in its own, or refuse."""
    return OrderedDict if isinstance(table, OrderedDict) else dict


def _restore_sequence(now: Any, before: list[Any]) -> None:
    if len(now) == len(before) and all(map(operator.is_, now, before)):
        return
    base: Any = next(base for base in (list, set, deque, bytearray) if isinstance(now, base))
    base.clear(now)
    (base.update if base is set else base.extend)(now, before)
