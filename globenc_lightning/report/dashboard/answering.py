"""What a browser asks the GlobEnc tab's server, checked, and how answers are sent and remembered.

TensorBoard's process imports this module: the standard library, numpy, werkzeug and tensorboard alone.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.util import tb_logging
from werkzeug import wrappers

from globenc_lightning.report.dashboard import store

STATIC = Path(__file__).resolve().parent / "static"
CONTENT_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
}
LONGEST_WORD = 200
"""So many characters may a word in a list have."""

logger = tb_logging.get_logger()

_Value = TypeVar("_Value")
Answer = dict[str, Any]


class RefusalError(Exception):
    """A request that has no answer, and why."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code


class Recent(Generic[_Value]):
    """The values that were asked for last, as many as their sizes allow; for several threads."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._values: OrderedDict[Hashable, tuple[_Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> _Value | None:
        """The value of a key, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: _Value, size: int = 1) -> None:
        """Remember a value; the oldest ones go where there is no room."""
        with self._lock:
            self._values[key] = value, size
            self._values.move_to_end(key)
            total = sum(one for _, one in self._values.values())
            while total > self._room and len(self._values) > 1:
                total -= self._values.popitem(last=False)[1][1]


class Request:
    """What a browser asks for, checked."""

    def __init__(self, request: wrappers.Request) -> None:
        self._arguments = request.args
        self.context = plugin_util.context(request.environ)
        self.experiment = plugin_util.experiment_id(request.environ)

    def has(self, name: str) -> bool:
        """Whether an argument is there."""
        return name in self._arguments

    def text(self, name: str) -> str:
        """An argument that must be there."""
        value = self._arguments.get(name)
        if value is None:
            raise RefusalError(f"{name}= is missing.")
        return str(value)

    def whole(self, name: str, count: int, things: str, default: int | None = None) -> int:
        """A number that counts ``things`` from 0, of which there are ``count``."""
        text = self._arguments.get(name)
        if text is None and default is not None:
            return default
        value = self.text(name)
        if not value.isascii() or not value.isdigit() or len(value) > 9:
            raise RefusalError(f"{name}= must be a whole number.")
        if int(value) >= count:
            raise RefusalError(f"{name}={value} is out of range: there are {count} {things}, counted from 0.", 404)
        return int(value)

    def one_of(self, name: str, values: Sequence[str]) -> str:
        """One of several texts."""
        value = self.text(name)
        if value not in values:
            raise RefusalError(f"{name}= must be one of {', '.join(values)}.")
        return value

    def words(self, name: str, most: int) -> list[str]:
        """A list of texts, in JSON."""
        try:
            value = json.loads(self.text(name))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list) or not all(isinstance(one, str) and len(one) <= LONGEST_WORD for one in value):
            raise RefusalError(f"{name}= must be a list of texts of at most {LONGEST_WORD} characters, in JSON.")
        if len(value) > most:
            raise RefusalError(f"{name}= holds {len(value)} texts; at most {most} are taken.")
        return value

    def method(self, summary: store.Summary) -> str:
        """One of the methods that a training has."""
        method = self.text("method")
        if method not in summary.methods:
            raise RefusalError(f"There are no figures of the method {method!r}.", 404)
        return method


def as_app(answer: Callable[[Request], Answer | str]) -> Callable[..., Any]:
    """A WSGI application that sends what ``answer`` returns, or why it does not, as JSON."""

    def app(request: wrappers.Request) -> wrappers.Response:
        content: Answer | str
        code = 200
        try:
            if request.method not in ("GET", "HEAD"):
                raise RefusalError("Only GET is answered here.", 405)
            content = answer(Request(request))
        except RefusalError as refusal:
            content, code = {"error": str(refusal)}, refusal.code
        except errors.PublicError as error:
            content, code = {"error": str(error)}, error.http_code
        except Exception as error:
            logger.error("The GlobEnc tab could not answer %s", request.path, exc_info=True)
            content, code = {"error": f"The data could not be read ({type(error).__name__})."}, 500
        text = content if isinstance(content, str) else as_json(content)
        return http_util.Respond(request, text, "application/json", code=code)

    return wrappers.Request.application(app)


@wrappers.Request.application
def static_file(request: wrappers.Request) -> wrappers.Response:
    """One of the tab's own files."""
    name = request.path.rpartition("/static/")[2]
    try:
        path = (STATIC / name).resolve()
        served = path.is_relative_to(STATIC) and path.is_file() and path.suffix in CONTENT_TYPES
    except (ValueError, OSError):
        served = False
    if not served or request.method not in ("GET", "HEAD"):
        return http_util.Respond(request, "Not found", "text/plain", code=404)
    return http_util.Respond(request, path.read_bytes(), CONTENT_TYPES[path.suffix])


def as_json(content: Answer) -> str:
    """An answer as it is sent."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def numbers(values: NDArray[Any]) -> list[Any]:
    """Numbers as JSON can hold them: NaN becomes null."""
    if values.dtype.kind != "f":
        return list(values.tolist())
    return [round(one, 5) if math.isfinite(one) else None for one in values.tolist()]


def as_shares(codes: NDArray[Any], levels: int) -> list[Any]:
    """Shares of the row's largest value; five digits tell all steps apart."""
    return list(np.round(codes.astype(np.float64) / levels, 5).tolist())


def all_as_shares(rows: Sequence[NDArray[Any] | None], levels: int) -> list[list[Any] | None]:
    """The same for many rows (k) at once; None stays None."""
    there = [row for row in rows if row is not None]
    together = iter(as_shares(np.concatenate(there), levels) if there else [])
    return [None if row is None else list(itertools.islice(together, len(row))) for row in rows]
