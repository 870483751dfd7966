"""Records as bytes: a JSON header and arrays in one compressed string, checked when they are read.

A magic word, a version, and compressed, the length of a JSON header, the header, and the arrays that it lists,
little-endian, one after the other. A reader trusts nothing: what does not add up is a ``RecordError``.

This module is read by TensorBoard's process: the standard library and numpy alone.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

VERSION = 1
LARGEST = 16 * 1024 * 1024
"""A record that claims to be larger than this, in bytes, is not read."""

_MAGIC = b"GlobEnc\n"
_PREFIX = struct.Struct("<8sI")
_LENGTH = struct.Struct("<I")
_TYPES = ("<f4", "<i4", "<u2", "|u1")

_Value = TypeVar("_Value")


class RecordError(ValueError):
    """A record that is damaged, or that another version has written."""


def encode(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A JSON header and arrays in one string of bytes.

    Args:
        header: what JSON can hold, NaN left out.
        arrays: by name, of one of the types that are allowed.

    Returns:
        The bytes.
    """
    listed = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": listed}, allow_nan=False, separators=(",", ":")).encode("ascii")
    parts = [_LENGTH.pack(len(text)), text, *(array.tobytes() for array in arrays.values())]
    return _PREFIX.pack(_MAGIC, VERSION) + zlib.compress(b"".join(parts), 6)


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read what :func:`encode` wrote; everything is checked before it is used.

    Args:
        data: the bytes.

    Returns:
        The header and the arrays.

    Raises:
        RecordError: it is damaged, or another version's.
    """
    if not isinstance(data, bytes) or len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise RecordError("it does not begin as a record of this package does")
    version = _PREFIX.unpack_from(data)[1]
    if version != VERSION:
        raise RecordError(f"it is written in format {version}, and this version of the package reads format {VERSION}")
    raw = _decompressed(data[_PREFIX.size :])
    return checked(lambda: _split(raw))


def _decompressed(data: bytes) -> bytes:
    engine = zlib.decompressobj()
    try:
        raw = engine.decompress(data, LARGEST)
    except zlib.error as error:
        raise RecordError("its compressed part is damaged") from error
    if engine.unconsumed_tail:
        raise RecordError(f"it would take more than {LARGEST // 1024 // 1024} MB")
    if not engine.eof or engine.unused_data:
        raise RecordError("it is cut off, or something follows it")
    return raw


def checked(read: Callable[[], _Value]) -> _Value:
    """Whatever goes wrong while strange data is read is one kind of error."""
    try:
        return read()
    except RecordError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, struct.error) as error:
        raise RecordError("its header is damaged") from error


def _split(raw: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    start = _LENGTH.size + _LENGTH.unpack_from(raw)[0]
    if start > len(raw):
        raise RecordError("its header is longer than the record")
    header = json.loads(raw[_LENGTH.size : start])
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind, shape in header["arrays"]:
        sizes = [whole(size) for size in shape]
        if kind not in _TYPES or len(sizes) > 3 or not isinstance(name, str):
            raise RecordError(f"it holds an array of an unknown kind, {kind!r}")
        dtype = np.dtype(kind)
        count = math.prod(sizes)
        arrays[name] = np.frombuffer(raw, dtype, count, start).reshape(sizes)
        start += count * dtype.itemsize
    if start != len(raw):
        raise RecordError("it is larger than its arrays")
    return header, arrays


def array(
    arrays: Mapping[str, NDArray[Any]], name: str, kind: str, shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    """Returns an array of a record, whose type and shape are the expected ones."""
    found = arrays[name]
    if found.dtype.str != kind or (shape is not None and found.shape != shape):
        raise RecordError(f"its {name} are of another kind or size than its header says")
    return found


def joined(parts: Any, kind: str) -> NDArray[Any]:
    """Returns arrays as one of a single axis."""
    return np.concatenate([np.zeros(0, kind), *(np.asarray(part).reshape(-1) for part in parts)]).astype(kind)


def divided(codes: NDArray[Any], shapes: Mapping[int, tuple[int, ...]]) -> dict[int, NDArray[Any]]:
    """Returns the parts of what :func:`joined` made, by sentence."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    if sum(sizes) != codes.size:
        raise RecordError("its numbers do not fit its sentences")
    parts = np.split(codes.reshape(-1), np.cumsum(sizes)[:-1]) if sizes else []
    return {place: part.reshape(shape) for (place, shape), part in zip(shapes.items(), parts, strict=True)}


def place(value: Any, within: Sequence[Any]) -> int:
    """Returns the number of something that the record holds."""
    if whole(value) >= len(within):
        raise RecordError("it names a sentence that it does not hold")
    return int(value)


def whole(value: Any, least: int = 0) -> int:
    """Returns a whole number of a header."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**53:
        raise RecordError("a whole number is missing from its header")
    return value


def text(value: Any) -> str:
    """Returns a text of a header."""
    if not isinstance(value, str):
        raise RecordError("a text is missing from its header")
    return value


def plain(value: Any) -> str | int | bool | None:
    """Returns a primitive value of a header."""
    if value is None or isinstance(value, bool | str):
        return value
    return whole(value, least=-(2**53))
