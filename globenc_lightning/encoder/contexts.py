"""Contexts that a user's forward opens (autocast, no_grad, checkpoint, ...), set aside while the forward is analysed.

``undisturbed`` switches such contexts off around a forward pass; a forward may open them again inside. The mode here
runs every torch function of the forward outside of them, so that the activations are those of full precision and,
where it is asked for, the score is connected with the hidden states.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from globenc_lightning.errors import GlobEncError, is_out_of_memory

_DETACHING = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
_DETACHING_IN_PLACE = (torch.Tensor.detach_, torch.detach_)
_LEAVING_TORCH = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)
_FLAGGING = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


class OwnContexts(TorchFunctionMode):
    """Runs the torch functions of a forward pass outside the contexts that this forward opens.

    autocast is always set aside. When ``connected``, so is everything that cuts the autograd graph or recomputes parts
    of it: ``no_grad``, ``inference_mode``, ``detach`` and ``.data`` have no effect on activations, and what
    ``checkpoint`` would drop is kept. No value changes by that. What is written into the model's own parameters and
    buffers stays out of the graph.

    Args:
        model: the module that is called.
        connected: whether the autograd graph is kept connected.
    """

    def __init__(self, model: nn.Module, *, connected: bool) -> None:
        super().__init__()
        self._connected = connected
        self._trace: TorchFunctionMode | None = None
        self._apart = 0
        own = [*model.parameters(), *model.buffers()]
        self._devices = tuple({"cpu", *(tensor.device.type for tensor in own)} - {"meta"})
        self._own = frozenset(memory_of(tensor) for tensor in own) - {None} if connected else frozenset()
        self._returned: dict[int, tuple[Tensor, Tensor]] = {}
        self._cast = False

    @property
    def connected(self) -> bool:
        """Whether the autograd graph is kept connected."""
        return self._connected

    def watched_by(self, trace: TorchFunctionMode) -> "OwnContexts":
        """Let a mode see the functions of the forward, and none of those that hooks of the analysis call.

        A second mode on the stack would cost each function as much again.

        Args:
            trace: the mode.

        Returns:
            The mode to enter instead of it.
        """
        self._trace = trace
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function outside the contexts."""
        kwargs = kwargs or {}
        if self._apart:
            return func(*args, **kwargs)
        if not self._connected:
            if not self._autocast():
                return self._seen(func, types, args, kwargs)
            with self._outside():
                return self._seen(func, types, args, kwargs)
        if func is torch._C._set_grad_enabled:
            return None
        # no_grad is set aside above, so that gradients are off nowhere but inside an autograd.Function (a reentrant
        # checkpoint), which cuts what it returns from its graph.
        inside = not torch.is_grad_enabled()
        args, kwargs = self.in_graph(args, inside), self.in_graph(kwargs, inside)
        with self._outside(), torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            result = self._run(func, types, args, kwargs)
            if inside:
                for tensor in result if isinstance(result, tuple | list) else (result,):
                    if isinstance(tensor, Tensor) and tensor.requires_grad and not tensor.is_leaf:
                        self._returned[id(tensor)] = (tensor, tensor.view_as(tensor))
        return result

    def _run(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.requires_grad:
            if func in _LEAVING_TORCH:
                return func(first.detach(), *args[1:], **kwargs)
            if not self._is_own(first) and func in _DETACHING_IN_PLACE:
                return first
            if func in _FLAGGING and not first.is_leaf:
                return first
            if func == torch.Tensor.__deepcopy__ and not first.is_leaf:
                return first.clone()
            if not self._is_own(first) and func in _DETACHING:
                return first.view_as(first)
        written = kwargs.get("out", first if writes_in_place(func) else None)
        if isinstance(written, Tensor) and self._is_own(written):
            with torch.no_grad():
                return func(*args, **kwargs)
        return self._seen(func, types, args, kwargs)

    def _seen(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._trace is None:
            return func(*args, **kwargs)
        return self._trace.__torch_function__(func, types, args, kwargs)

    def in_graph(self, value: Any, inside: bool = False) -> Any:
        """What the forward goes on with instead of a tensor that an ``autograd.Function`` has cut from its graph.

        Args:
            value: a tensor, or what a module is given or returns.
            inside: whether it is used inside such a function, which is to cut it later.

        Returns:
            The same, with such tensors exchanged.
        """
        if not self._returned:
            return value
        if type(value) in (tuple, list):
            return type(value)(self.in_graph(part, inside) for part in value)
        if isinstance(value, Mapping):
            return {name: self.in_graph(part, inside) for name, part in value.items()}
        if not isinstance(value, Tensor) or id(value) not in self._returned:
            return value
        cut = inside or not value.requires_grad or type(value.grad_fn).__name__ == "CheckpointFunctionBackward"
        return self._returned[id(value)][1] if cut else value

    def apart(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook of the analysis, run outside the user's contexts, with its own contexts obeyed.

        Args:
            hook: the hook.

        Returns:
            The hook to register; what goes wrong in it is a ``GlobEncError``.
        """

        @wraps(hook)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._apart += 1
            inside = not torch.is_grad_enabled()
            try:
                with self._outside(), self._set_aside():
                    return hook(*self.in_graph(args, inside), **kwargs)
            except GlobEncError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise GlobEncError(f"reading the encoder failed with {type(error).__name__}: {error}") from error
            finally:
                self._apart -= 1

        return run

    def hint(self) -> str:
        """What may be behind an error of the forward; empty if nothing is known."""
        if not self._cast:
            return ""
        return (
            "The forward pass uses autocast, and is analysed without it, in the precision of the weights: cast to a "
            "module's own dtype, x.to(module.weight.dtype), rather than to half precision."
        )

    def _autocast(self) -> bool:
        for device in self._devices:
            if torch.is_autocast_enabled(device):
                self._cast = True
                return True
        return False

    def _is_own(self, tensor: Tensor) -> bool:
        return memory_of(tensor) in self._own

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Take this mode off the stack: it would pass on each function of a hook, and cost more than many of them.

        Where the forward has opened a mode of its own since, it stays below that.
        """
        if _get_current_function_mode() is not self:
            yield
            return
        super().__exit__(None, None, None)
        try:
            yield
        finally:
            super().__enter__()

    @contextmanager
    def _outside(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._autocast():
                for device in self._devices:
                    stack.enter_context(torch.autocast(device, enabled=False))
            if self._connected or self._apart:
                if torch.is_inference_mode_enabled():
                    stack.enter_context(torch.inference_mode(False))
                if not torch.is_grad_enabled():
                    stack.enter_context(torch.enable_grad())
            yield


def writes_in_place(func: Callable[..., Any]) -> bool:
    """Whether a function's name says that it writes into its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def memory_of(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins, or None where it has none (sparse, wrapped or empty tensors)."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    # The alias, not the tensor: an output that is saved for its own backward would hold itself.
    return tensor.detach(), tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError("a tensor that the gradient needs was changed in place later in the forward pass")
    return tensor
