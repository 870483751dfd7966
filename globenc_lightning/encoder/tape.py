"""What a layer computes of its attention's output, noted as it runs, and computed again of another output.

The torch functions from an attention call to the end of its layer are noted with their arguments: output projection,
norms, residual connections and feed-forward network, however the model's code is divided into modules. They are called
again with other numbers where these came from the attention's output; everything else stays what it was. No module of
the user's is called, so no hook runs twice, nothing is counted, and parameters and buffers are only read.

What the numbers alone would decide (which expert runs, say) cannot be computed again, and is refused.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``v`` head width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from globenc_lightning.encoder.contexts import memory_of, writes_in_place
from globenc_lightning.encoder.norms import working
from globenc_lightning.encoder.precision import LOW, FullPrecision
from globenc_lightning.errors import UnsupportedEncoderError

# What functions without a tensor among their results tell of a tensor beside its numbers, by their names.
_TELL_NO_NUMBERS = frozenset(
    {
        *("__get__", "__hash__", "__len__", "__repr__", "__format__", "data_ptr", "dim", "element_size", "get_device"),
        *("has_names", "is_complex", "is_contiguous", "is_conj", "is_floating_point", "is_inference", "is_neg"),
        *("is_pinned", "is_same_size", "is_shared", "is_signed", "ndimension", "nelement", "numel", "register_hook"),
        *("register_post_accumulate_grad_hook", "retain_grad", "size", "storage_offset", "stride", "type"),
        *("untyped_storage", "storage", "__reduce_ex__", "result_type", "can_cast"),
    }
)
_SETS_NO_NUMBERS = frozenset({"requires_grad", "grad", "names"})


class _Operation(NamedTuple):
    """One call of a torch function.

    Attributes:
        function: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        results: the tensors in what it returned.
        changed: the tensors among its arguments that it wrote into.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    changed: list[Tensor]


class Tape:
    """The torch functions that follow one attention call.

    Args:
        source: what the attention call returned, in any layout that holds (b, h, q, v) in this order.
    """

    def __init__(self, source: Tensor) -> None:
        self.is_open = True
        self._source = source
        self._target: Tensor | None = None
        self._operations: list[_Operation] = []
        self._made: dict[int, Tensor] = {id(source): source}
        self._memory = {memory_of(source)} - {None}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._last_use: dict[int, int] = {}
        self._refusal = ""

    def stop(self) -> None:
        """Note nothing more, and forget what was noted."""
        self.is_open = False
        self._operations.clear()
        self._made.clear()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function as it is, and note it.

        Args:
            function: the function.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            What it returned.
        """
        given = [*_tensors(args), *_tensors(kwargs)]
        depends = any(memory_of(one) in self._memory for one in given)
        if depends and writes_in_place(function) and args and isinstance(args[0], Tensor):
            written = args[0]
            if id(written) not in self._made and memory_of(written) not in self._memory:
                # What stood there before is needed again.
                self._before[id(written)] = (written, written.detach().clone())
        versions = [_version(one) for one in given]
        result = function(*args, **kwargs)
        changed = [one for one, version in zip(given, versions, strict=True) if _version(one) != version]
        results = list(_tensors(result))
        if depends and not results and not changed:
            self._asked(function)
        elif results or changed:
            self._note(_Operation(function, args, kwargs, results, changed), depends)
        return result

    def _asked(self, function: Callable[..., Any]) -> None:
        """Something is asked of a tensor: its form may be, its numbers may not."""
        name = getattr(function, "__name__", str(function))
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        if name not in _TELL_NO_NUMBERS and not (name == "__set__" and attribute in _SETS_NO_NUMBERS):
            what = f"{name} of {attribute}" if name == "__set__" else name
            self._refusal = self._refusal or (
                f"its code looks at the numbers of hidden states ({what}), so that it may go another way for other "
                "numbers, as a mixture of experts does"
            )

    def _note(self, operation: _Operation, depends: bool) -> None:
        self._operations.append(operation)
        for one in operation.results:
            self._made[id(one)] = one
        if not depends:
            return
        for one in (*operation.results, *operation.changed):
            self._memory.add(memory_of(one))
        self._memory.discard(None)
        for one in operation.changed:
            known = id(one) in self._made or id(one) in self._before
            if not known and not any(memory_of(one) == memory_of(other) for other in self._made.values()):
                name = getattr(operation.function, "__name__", str(operation.function))
                self._refusal = self._refusal or f"its code writes into a tensor that it keeps ({name})"

    def close(self, target: Tensor, older: set[Any]) -> None:
        """The layer's output is known: keep the functions that it is computed by.

        Args:
            target: the layer's output.
            older: nodes of autograd graphs that are known to be older than this tape; more are added.
        """
        self.is_open = False
        if not self._refusal and memory_of(target) not in self._memory:
            self._refusal = "its output comes from something that is no torch function"
        kept: list[_Operation] = []
        needed = {memory_of(target)}
        for one in reversed(self._operations):
            written = {memory_of(tensor) for tensor in (*one.results, *one.changed)} & self._memory
            if written & needed:
                kept.append(one)
                needed |= {memory_of(tensor) for tensor in _given(one)} & self._memory
        self._target, self._operations = target, kept[::-1]
        alias = False
        for place, one in enumerate(self._operations):
            for tensor in _given(one):
                self._last_use[id(tensor)] = place
                if id(tensor) in self._made or id(tensor) in self._before:
                    continue
                if memory_of(tensor) in self._memory:
                    alias = True
                elif self._source.grad_fn is not None and _reaches(tensor.grad_fn, self._source.grad_fn, older):
                    self._refusal = self._refusal or (
                        "a part of it is computed by something that is no torch function (an autograd.Function or a "
                        "kernel of its own)"
                    )
        # Where a tensor is known by its memory alone, anything in that memory may be asked for.
        self._last_use = {} if alias else self._last_use
        used = {id(tensor) for one in self._operations for tensor in (*_given(one), *one.results)}
        by_memory = {memory_of(target)} if id(target) not in self._made else set()
        self._made = {
            key: one for key, one in self._made.items() if alias or key in used or memory_of(one) in by_memory
        }

    def refuse(self, where: str) -> None:
        """Raise where the functions cannot be called again.

        Args:
            where: the layer, for the message.

        Raises:
            UnsupportedEncoderError: with the reason.
        """
        if self._refusal:
            raise UnsupportedEncoderError(_refused(where, self._refusal))

    @torch.no_grad()
    def replay(self, context: Tensor, where: str) -> Tensor:
        """The layer's output of another output of its attention.

        Args:
            context: (b, h, q, v) what the attention gives instead.
            where: the layer, for messages.

        Returns:
            The output in the layout of the one that the tape was closed with, in at least float32.

        Raises:
            UnsupportedEncoderError: the functions give tensors of other forms.
        """
        source = self._source
        low = any(one.dtype in LOW for one in (source, *(t for op in self._operations for t in _given(op))))
        entering = torch.empty_strided(
            source.size(), source.stride(), dtype=torch.float32 if low else source.dtype, device=source.device
        )
        # Where several entries lie in one place there is nothing to copy into.
        entering = entering if _is_dense(source) else entering.contiguous()
        entering.copy_(context.reshape(source.shape))
        new: dict[int, Tensor] = {id(source): entering}
        # What code in half precision computes is computed in float32, or its rounding would be all that is seen.
        with FullPrecision({"cpu", source.device.type}) if low else nullcontext():
            new |= {key: (one.float() if low and one.dtype in LOW else one.clone()) for key, (_, one) in self._clones()}
            for place, one in enumerate(self._operations):
                args, kwargs = self._exchanged(one.args, new), self._exchanged(one.kwargs, new)
                results = list(_tensors(one.function(*args, **kwargs)))
                if [tuple(r.shape) for r in results] != [tuple(r.shape) for r in one.results]:
                    name = getattr(one.function, "__name__", str(one.function))
                    raise UnsupportedEncoderError(
                        _refused(where, f"how much it computes depends on the numbers of hidden states ({name})")
                    )
                for old, result in zip(one.results, results, strict=True):
                    new[id(old)] = result
                for tensor in _given(one):
                    if self._last_use.get(id(tensor)) == place and tensor is not self._target:
                        new.pop(id(tensor), None)
            return working(self._exchanged(self._target, new))

    def _clones(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        yield from self._before.items()

    def _exchanged(self, value: Any, new: dict[int, Tensor]) -> Any:
        """A value with every tensor that was computed anew in place of what it was."""
        if isinstance(value, Tensor):
            if id(value) in new:
                return new[id(value)]
            memory = memory_of(value)
            return self._alias(value, memory, new) if memory in self._memory else value
        if type(value) in (tuple, list):
            return type(value)(self._exchanged(one, new) for one in value)
        if type(value) is dict:
            return {key: self._exchanged(one, new) for key, one in value.items()}
        return value

    def _alias(self, value: Tensor, memory: int | None, new: dict[int, Tensor]) -> Tensor:
        """Another view of memory that was computed anew (a tensor's ``.data``, say)."""
        for key, one in self._made.items():
            found = new.get(key)
            if found is not None and memory_of(one) == memory and one.stride() == found.stride():
                offset = found.storage_offset() + value.storage_offset() - one.storage_offset()
                return found.as_strided(value.size(), value.stride(), offset)
        raise UnsupportedEncoderError(_refused("a layer", "a tensor in it cannot be followed"))


def _refused(where: str, why: str) -> str:
    return (
        f"Value-Zeroing is not defined for {where}: what follows its attention cannot be computed again of other numbers: "
        f"{why}. Leave 'Value-Zeroing' out of methods."
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a function's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)


def _given(operation: _Operation) -> Iterable[Tensor]:
    return [*_tensors(operation.args), *_tensors(operation.kwargs)]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_dense(tensor: Tensor) -> bool:
    return all(stride > 0 or size == 1 for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def _reaches(node: Any, wanted: Any, older: set[Any]) -> bool:
    """Whether a node of the autograd graph depends on another one, those that are older left out."""
    seen: set[Any] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one is None or one in seen or one in older:
            continue
        if one is wanted:
            return True
        seen.add(one)
        stack += [following for following, _ in one.next_functions]
    older |= seen
    return False
