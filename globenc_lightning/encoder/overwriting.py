"""Tensors that a forward pass writes into after a module has returned them, kept as they were returned.

Falcon adds the attention's output into the tensor that its feed-forward network returned. Whoever kept that tensor and
looks at it later sees the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from globenc_lightning.encoder.contexts import memory_of, writes_in_place
from globenc_lightning.encoder.trace import AttentionTrace


class WritesTrace(AttentionTrace):
    """An :class:`AttentionTrace` that also tells when an operation is about to write into a tensor.

    Args:
        report: called with each attention call.
        before_write: called with the tensor that is about to be written into.
        inside: see :class:`AttentionTrace`.
    """

    def __init__(
        self, report: Callable[..., None], before_write: Callable[[Tensor], None], *, inside: bool = False
    ) -> None:
        super().__init__(report, inside=inside)
        self._before_write = before_write

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Tell of the write, then run the function."""
        if args and isinstance(args[0], Tensor) and (writes_in_place(func) or (kwargs and kwargs.get("inplace"))):
            self._before_write(args[0])
        return super().__torch_function__(func, types, args, kwargs)


class Returned:
    """What the modules of a forward pass returned, as it was before anything was written into it.

    ``x.add_(y)`` writes into every tensor that shares the memory of ``x``; a copy of each is made before that.
    """

    def __init__(self) -> None:
        self._held: dict[int | None, list[tuple[list[Tensor], int]]] = {}
        self._copies: dict[int, dict[int, Tensor]] = {}

    def hold(self, outputs: list[Tensor]) -> None:
        """Hold what a module returned."""
        for place, tensor in enumerate(outputs):
            self._held.setdefault(memory_of(tensor), []).append((outputs, place))

    def before_write(self, tensor: Tensor) -> None:
        """Copy what is about to be written into."""
        memory, copies = memory_of(tensor), dict[int, Tensor]()
        for outputs, place in () if memory is None else self._held.pop(memory, ()):
            kept = outputs[place]
            # The copy is a part of the graph: gradients go through it to what the tensor was computed from.
            copy = copies.setdefault(id(kept), kept.clone())
            self._copies.setdefault(id(outputs), {})[place] = copy

    def before(self, outputs: Sequence[Tensor]) -> list[Tensor] | None:
        """What a module returned, as it was, or None where nothing was written into."""
        copies = self._copies.get(id(outputs))
        return None if copies is None else [copies.get(place, tensor) for place, tensor in enumerate(outputs)]
