"""A device made of Python: what would go wrong on a GPU goes wrong on it, without one.

Its tensors say that they are on the device ``pydev:0`` and hold their numbers in a tensor of the CPU. An operator that
gets a tensor of the CPU with axes beside one of the device raises, as a GPU would. Every operator counts as a launch of
a kernel, but for views, and every look at a value (``item``, ``nonzero``, a copy to the CPU), for which a GPU would
have to be waited for, is noted with the line of the package that asked for it.

``restricted()`` takes float64 and ``frexp`` away, as Apple's MPS has neither.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import globenc_lightning

NAME = "pydev"
PACKAGE = str(Path(globenc_lightning.__file__).parent)
aten = torch.ops.aten

_LOOKS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.is_nonzero, aten.masked_select, aten.unique_dim}
_COPIES = {aten._to_copy, aten.copy_, aten.copy, aten._copy_from}
_NO_KERNEL = {aten.detach, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
_NO_KERNEL |= {aten._unsafe_view, aten.lift_fresh, aten.is_same_size, aten.set_, aten.resize_}
_MANY = {aten._foreach_add_, aten._foreach_mul_}


class Counts:
    """What was asked of the device.

    Attributes:
        launches: how many kernels a device would have run, by the name of the operator.
        lines: the same by the line that asked for them, of the package or of other code; filled where it is wanted.
        looks: how often it would have been waited for, by the line of the package that asked for a value.
        foreign: looks that other code asked for: the model's own, say.
    """

    def __init__(self, by_line: bool = False) -> None:
        self.by_line = by_line
        self.launches: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        self.foreign: Counter[str] = Counter()

    @property
    def kernels(self) -> int:
        return sum(self.launches.values())


_counting: list[Counts] = []
_restrictions: list[bool] = []


@contextmanager
def counted(by_line: bool = False) -> Iterator[Counts]:
    """Count what is asked of the device inside this context."""
    counts = Counts(by_line)
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


@contextmanager
def restricted() -> Iterator[None]:
    """Take away what MPS does not have: float64 and frexp."""
    _restrictions.append(True)
    try:
        yield
    finally:
        _restrictions.pop()


def _line() -> tuple[str, bool]:
    """The innermost line that is none of torch's, and whether it is the package's."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        mode = frame.f_code.co_name == "__torch_function__" or path.endswith(
            ("encoder/precision.py", "encoder/contexts.py")
        )
        if path != __file__ and not mode and "/torch/" not in path and "<string>" not in path:
            own = path.startswith(PACKAGE)
            return f"{path[len(PACKAGE) + 1 :] if own else Path(path).name}:{frame.f_lineno}", own
        frame = frame.f_back
    return "backward", False


def _note_look() -> None:
    where, own = _line()
    for counts in _counting:
        (counts.looks if own else counts.foreign)[where] += 1


def _note_launch(func: Any, args: tuple[Any, ...]) -> None:
    if not _counting or func.is_view or func.overloadpacket in _NO_KERNEL:
        return
    several = len(args[0]) if func.overloadpacket in _MANY else 1
    for counts in _counting:
        counts.launches[func.overloadpacket.__name__] += several
        if counts.by_line:
            counts.lines[_line()[0]] += several


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class DeviceTensor(Tensor):
    """A tensor of the device, whose numbers are held by a tensor of the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> "DeviceTensor":
        if held.dtype == torch.float64 and _restrictions:
            raise TypeError("Cannot convert a tensor to float64 on this device, which has none.")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        _note_look()
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.held!r})"

    def __deepcopy__(self, memo: Any) -> Any:
        copied = DeviceTensor(self.held.clone(), False)
        copied = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        memo[id(self)] = copied
        return copied.requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the numbers of its tensors, and give its results a place on the device."""
    packet = func.overloadpacket
    wanted = kwargs.get("device")
    if packet in _COPIES:
        return _copy(func, args, kwargs)
    tensors: list[Tensor] = []
    tree_map(lambda one: tensors.append(one) if isinstance(one, Tensor) else None, (args, kwargs))
    ours = any(isinstance(one, DeviceTensor) for one in tensors)
    on_device = (ours and wanted is None) or _is_device(wanted)
    indices = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
    if ours:
        for one in tensors:
            if not isinstance(one, DeviceTensor) and one.dim() and not indices:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {func} got one on {NAME}:0 and one on the CPU"
                )
    masks = (one for one in (args[1] or () if indices else ()) if isinstance(one, DeviceTensor))
    if packet in _LOOKS or any(one.dtype in (torch.bool, torch.uint8) for one in masks):
        _note_look()
    if _restrictions and on_device and (packet is aten.frexp or kwargs.get("dtype") == torch.float64):
        raise TypeError(f"{func}: this device has no frexp and no float64.")
    _note_launch(func, args)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(_held, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if not on_device:
        return result
    wrapped = tree_map(lambda one: DeviceTensor(one) if isinstance(one, Tensor) else one, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if _writes(func) else wrapped


def _writes(func: Any) -> bool:
    return any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    packet = func.overloadpacket
    if packet is aten._copy_from:
        args = (args[1], args[0], *args[2:])
    if packet is not aten._to_copy:
        to, source = args[0], args[1]
        if isinstance(source, DeviceTensor) and not isinstance(to, DeviceTensor):
            _note_look()
        _note_launch(aten.copy_.default, args)
        _held(to).copy_(_held(source))
        return to
    source = args[0]
    device = kwargs.get("device")
    target = _is_device(device) if device is not None else isinstance(source, DeviceTensor)
    if isinstance(source, DeviceTensor) and not target:
        _note_look()
    _note_launch(func, args)
    rest = {key: value for key, value in kwargs.items() if key != "device"}
    if _restrictions and target and rest.get("dtype") == torch.float64:
        raise TypeError("Cannot convert a tensor to float64 on this device, which has none.")
    made = aten._to_copy.default(_held(source), **rest)
    return DeviceTensor(made) if target else made


class _Factories(TorchDispatchMode):
    """Makes tensors on the device where a function names it, and moves others there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_device(kwargs.get("device")):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class _Module:
    """What torch asks of a device."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def set_device(_: Any) -> None:
        pass

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def manual_seed(seed: int) -> None:
        pass

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_library: list[Any] = []


def register() -> torch.device:
    """Register the device, once per process, and return it."""
    if not _library:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        library = torch.library.Library("aten", "IMPL", "PrivateUse1")
        kernels: dict[str, Callable[..., Any]] = {
            "empty.memory_format": lambda size, **kwargs: DeviceTensor(torch.empty(size, dtype=kwargs.get("dtype"))),
            "empty_strided": lambda size, stride, **kwargs: DeviceTensor(
                torch.empty_strided(size, stride, dtype=kwargs.get("dtype"))
            ),
            "_copy_from": lambda source, to, non_blocking=False: _copy(
                aten._copy_from.default, (source, to, non_blocking), {}
            ),
        }
        for name, kernel in kernels.items():
            library.impl(name, kernel)
        _library.append(library)
        # The backward pass of a device runs in a thread of its own. At the end of the process that thread would call
        # Python once more, which is gone by then.
        os.environ["TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT"] = "0"
    return torch.device(NAME, 0)


@contextmanager
def python_device() -> Iterator[torch.device]:
    """The device, for as long as this context lasts."""
    device = register()
    with ExitStack() as stack:
        stack.enter_context(_Factories())
        yield device
