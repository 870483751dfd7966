"""Run a model in full precision, whatever it was written for.

A structure that rounding hides is no structure that was proven: beside one large channel, bfloat16 cannot tell a
residual connection from a scaled one. So the structure of an encoder is found and proven in float32 (float64 where the
model is), one operation at a time: nothing of the model is copied or changed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOW = (torch.float16, torch.bfloat16)
"""The precisions that are raised to float32."""

_COARSENESS = {"highest": 0.0, "ieee": 0.0, "none": 0.0, "high": 5e-3, "tf32": 5e-3, "medium": 5e-2, "bf16": 5e-2}
_CASTS = (torch.Tensor.half, torch.Tensor.bfloat16)
# A table of vectors is larger than what is looked up in it: the rows are raised, not the table.
_LOOKUPS = (F.embedding, torch.embedding)
# Operations that write into their first argument, by name, besides those that end in an underscore.
_WRITES = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"})


def matmul_coarseness() -> float:
    """How far float32 matrix products may be from float32, relative to the largest entry: 0 where they are exact.

    ``torch.set_float32_matmul_precision`` and its successors let them run in TensorFloat-32 or bfloat16.
    """
    backends = _matmul_backends()
    if backends:
        return max(_COARSENESS.get(backend.fp32_precision, 5e-2) for backend in backends)
    return _COARSENESS[torch.get_float32_matmul_precision()]


@contextmanager
def exact_products() -> Iterator[None]:
    """Let float32 matrix products be computed in float32, and put the switches back afterwards."""
    changed: list[tuple[Any, str]] = []
    before = None
    try:
        for backend in _matmul_backends():
            was = backend.fp32_precision
            if _COARSENESS.get(was, 1.0):
                changed.append((backend, was))
                backend.fp32_precision = "ieee"
        if not _matmul_backends() and torch.get_float32_matmul_precision() != "highest":
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for backend, was in changed:
            # A switch that follows a more general one says so by "none"; it has to go on following it.
            backend.fp32_precision = "none"
            if backend.fp32_precision != was:
                backend.fp32_precision = was
        if before is not None:
            torch.set_float32_matmul_precision(before)


def _matmul_backends() -> list[Any]:
    """The switches of torch 2.9 and later; the older one cannot be asked any more once they were used."""
    matmuls = [getattr(getattr(torch.backends, name, None), "matmul", None) for name in ("cuda", "mkldnn")]
    # The CUDA matmul object takes any attribute name, so that hasattr() does not tell.
    if not hasattr(torch.backends, "fp32_precision"):
        return []
    return [matmul for matmul in matmuls if matmul is not None]


class FullPrecision(TorchFunctionMode):
    """Computes in float32 what a model's code computes in half precision, by autocast or by its weights' type.

    Each operation gets its half-precision arguments as float32, and a cast to half precision becomes one to float32.
    Weights are raised as they are used, and kept for the backward pass as what they are, so that no more than one
    of them exists in float32 at a time. Operations in float32 and float64 stay bit for bit what they are.

    Args:
        devices: the types of the devices on which the model's own code may switch autocast on.
    """

    def __init__(self, devices: Iterable[str] = ("cpu",)) -> None:
        super().__init__()
        self._devices = tuple(devices)
        self._raised: dict[int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "FullPrecision":
        """Start; weights that the backward pass needs are kept in their own precision."""
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._packed, _unpacked))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """End."""
        super().__exit__(*exception)
        self._stack.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function on raised arguments."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        with ExitStack() as stack:
            for device in self._devices:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return self._run(func, name, args, kwargs)

    def _run(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _CASTS:
            return self._raise(args[0])
        if func not in _LOOKUPS:
            writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
            if writes and not args:
                # Initialisations name what they write into.
                return func(**kwargs)
            if writes and isinstance(args[0], Tensor) and args[0].dtype in LOW:
                # A table in half precision (running means, say) takes what is written into it as it is itself.
                lowered = _lowered((args[1:], kwargs), args[0].dtype)
                return func(args[0], *lowered[0], **lowered[1])
            kept = args[:1] if writes else ()
            args = (*kept, *(self._raise(one) for one in args[len(kept) :]))
            kwargs = {key: value if key == "out" else self._raise(value) for key, value in kwargs.items()}
            if writes:
                return func(*args, **kwargs)
        try:
            return _lifted(func(*args, **kwargs))
        finally:
            self._raised.clear()

    def _raise(self, value: Any) -> Any:
        """The value with every half-precision tensor and type in it raised."""
        if isinstance(value, Tensor):
            if value.dtype not in LOW:
                return value
            raised = value.float()
            if isinstance(value, nn.Parameter):
                self._raised[raised.untyped_storage().data_ptr()] = value
            return raised
        if isinstance(value, torch.dtype):
            return torch.float32 if value in LOW else value
        if type(value) in (tuple, list):
            return type(value)(self._raise(one) for one in value)
        return value

    def _packed(self, tensor: Tensor) -> Any:
        """What is kept for the backward pass: the weight in its own precision, where the tensor is a raised weight."""
        weight = self._raised.get(tensor.untyped_storage().data_ptr()) if self._raised else None
        if weight is None:
            # The tensor itself could lead back to the graph that keeps it, and nothing would ever be freed.
            return tensor.detach()
        return weight, tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpacked(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    weight, size, stride, offset = kept
    raised: Tensor = weight.detach().float().as_strided(size, stride, offset)
    return raised


def _lowered(value: Any, dtype: torch.dtype) -> Any:
    """The value with every float32 tensor in it in half precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == torch.float32 else value
    if type(value) in (tuple, list):
        return type(value)(_lowered(one, dtype) for one in value)
    if type(value) is dict:
        return {key: _lowered(one, dtype) for key, one in value.items()}
    return value


def _lifted(value: Any) -> Any:
    """What a function returned, raised: some make their result in half precision by themselves."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in LOW else value
    if type(value) in (tuple, list):
        return type(value)(_lifted(one) for one in value)
    return value
