"""Keys of callback states in a checkpoint: short, the same in every process, and different for different settings.

A key names a file in some profilers, so it holds letters, digits and underscores alone.
"""

import enum
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PRIMITIVES = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device)
MAX_DEPTH = 8
"""How far values are followed into values: what lies deeper is named by its type."""
MAX_NAME = 40
DIGITS = 12


def state_key(name: str, made_of: Mapping[str, Any], place: int = 1) -> str:
    """The key of a state.

    Args:
        name: the qualified name of the callback's class.
        made_of: everything that tells one callback of this class from another, in primitives.
        place: the place of the callback among those of its Trainer that are made of the same, from 1.

    Returns:
        The class name, a digest and, from the second place on, the place.
    """
    digest = hashlib.sha256(repr((name, sorted(made_of.items()))).encode("utf-8", "backslashreplace")).hexdigest()
    return f"{prefix(name)}{digest[:DIGITS]}{f'_{place}' if place > 1 else ''}"


def prefix(name: str) -> str:
    """What the keys of a class begin with."""
    return f"{re.sub('[^A-Za-z0-9]+', '_', name)[-MAX_NAME:].strip('_')}_"


def code_digest(function: Any) -> str | None:
    """Returns a digest of what a callable does, as far as that can be told, or None for None and a text.

    Bytecode, constants, names, defaults, and the primitives that it holds in its closure, its attributes or as bound
    arguments; no address, no file and no line. It is the same in another process with the same version of Python.

    Args:
        function: a function, a method, a partial or any other callable.

    Returns:
        Twelve hexadecimal digits, or None.
    """
    if function is None or isinstance(function, str):
        return None
    described = _described(function, 0, ())
    return hashlib.sha256(described.encode("utf-8", "backslashreplace")).hexdigest()[:DIGITS]


def _described(value: Any, depth: int, within: tuple[int, ...]) -> str:
    """A text of a value that holds nothing of this process alone."""
    kind = type(value)
    if isinstance(value, enum.Enum):
        return f"{kind.__qualname__}.{value.name}"
    if isinstance(value, PRIMITIVES):
        return f"{kind.__qualname__} {value!r}"
    if isinstance(value, type | BuiltinFunctionType | ModuleType):
        return f"{kind.__qualname__} {getattr(value, '__qualname__', value.__name__)}"
    if kind.__module__ in ("operator", "_operator"):
        # itemgetter(1) and the like show what they were made with.
        return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))
    if isinstance(value, Tensor):
        return f"{kind.__qualname__} {tuple(value.shape)} {value.dtype}"
    if depth >= MAX_DEPTH or id(value) in within:
        return kind.__qualname__
    return f"{kind.__qualname__} {_parts(value, depth + 1, (*within, id(value)))}"


def _parts(value: Any, depth: int, within: tuple[int, ...]) -> str:
    """What a value is made of."""

    def each(values: Any) -> list[str]:
        return [_described(one, depth, within) for one in values]

    if isinstance(value, FunctionType):
        defaults = [value.__defaults__, value.__kwdefaults__]
        return repr([_code(value.__code__, depth, within), *each([*defaults, *_held(value)])])
    if isinstance(value, MethodType):
        return repr(each([value.__func__, value.__self__]))
    if isinstance(value, partial):
        return repr(each([value.func, value.args, value.keywords]))
    if isinstance(value, set | frozenset):
        return repr(sorted(each(value)))
    if isinstance(value, dict):
        return repr([*zip(each(value), each(value.values()), strict=True)])
    if isinstance(value, list | tuple):
        return repr(each(value))
    shown = each([type(value).__call__]) if callable(value) else []
    # The weights and buffers of a module, and all that it is made of, are no part of what it is called for.
    held = {} if isinstance(value, nn.Module) else getattr(value, "__dict__", {})
    return repr([type(value).__qualname__, *shown, *zip(held, each(held.values()), strict=True)])


def _code(code: CodeType, depth: int, within: tuple[int, ...]) -> str:
    constants = [
        _code(one, depth, within) if isinstance(one, CodeType) else _described(one, depth, within)
        for one in code.co_consts
    ]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return repr((code.co_code.hex(), code.co_argcount, code.co_kwonlyargcount, constants, names))


def _held(function: FunctionType) -> list[Any]:
    """What the cells of a closure hold; a cell may be empty still."""
    held = []
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:
            held.append("nothing yet")
    return held


def older_state(
    states: Mapping[str, Any], name: str, made_of: Mapping[str, Any], taken: Sequence[str], old_key: str
) -> str | None:
    """The key of the state that a callback goes on with where the checkpoint has none of its own key.

    Args:
        states: the states of a checkpoint by their keys.
        name: the qualified name of the callback's class.
        made_of: what the callback is made of, as for :func:`state_key`.
        taken: keys that belong to other callbacks.
        old_key: the key that earlier versions of this package gave the callback.

    Returns:
        The old key; else the first key whose state was made of the same but for the code of its functions, which is
        another after an edit or with another version of Python; else None.
    """
    if old_key in states and old_key not in taken:
        return old_key
    return next(
        (key for key, known in made_before(states, name, taken).items() if settings_of(known) == settings_of(made_of)),
        None,
    )


def made_before(states: Mapping[str, Any], name: str, taken: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """What the states of a class in a checkpoint were made of, but for those that belong to other callbacks."""
    # To the end: the name of another class may begin with this one's.
    own = re.compile(f"{prefix(name)}[0-9a-f]{{{DIGITS}}}(_[0-9]+)?")
    return {
        key: state["made_of"]
        for key, state in states.items()
        if isinstance(key, str)
        and own.fullmatch(key)
        and key not in taken
        and isinstance(state, Mapping)
        and isinstance(state.get("made_of"), Mapping)
    }


def settings_of(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """What a callback is made of, without the code of its functions."""
    return {key: value for key, value in made_of.items() if not key.endswith("_code")}
