"""The GlobEnc tab's server side: records out of TensorBoard's data provider, JSON and static files to the browser.

TensorBoard imports this module in its own process, and an ImportError here would keep TensorBoard from starting: so it
is the standard library, numpy, werkzeug and tensorboard alone.

Axes: ``l`` layer, ``q`` token that receives, ``k`` token that is attended to. Layers are counted from 0.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from tensorboard.util import tb_logging
from werkzeug import wrappers

from globenc_lightning.report.dashboard import dynamics, store

STATIC = Path(__file__).resolve().parent / "static"
ENTRY = "/static/index.js"
CONTENT_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
}
# TensorBoard keeps the newest points of a tag in any case; a tag of ours has one, and more where a resumed training
# wrote some of its validations again.
POINTS = 1000
KEPT_VALIDATIONS = 8000
KEPT_DETAILS = 48
KEPT_INDICES = 64
KEPT_ROWS = 256 * 2**20
"""So many bytes of readout rows are kept: 30 runs of 50 validations, 16 sentences of 24 tokens, take 110 MB."""
COMPARED = ("target", "readout", "normalize", "exclude_special_tokens")
"""Runs that differ in one of these settings are not averaged."""
MOST_WORDS, LONGEST_WORD = 200, 200
READ_AT_ONCE = 100
MAX_REASONS = 20

logger = tb_logging.get_logger()

_Value = TypeVar("_Value")
_Answer = dict[str, Any]
_Rows = NDArray[np.float32]


class _RefusalError(Exception):
    """A request that has no answer, and why."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code


class _Recent(Generic[_Value]):
    """The values that were asked for last, as many as their sizes allow; for several threads."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._values: OrderedDict[Hashable, tuple[_Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> _Value | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: _Value, size: int = 1) -> None:
        with self._lock:
            self._values[key] = value, size
            self._values.move_to_end(key)
            total = sum(one for _, one in self._values.values())
            while total > self._room and len(self._values) > 1:
                total -= self._values.popitem(last=False)[1][1]


@dataclass(frozen=True, eq=False)
class _Validation:
    """One entry of a training: a summary, the note that there is none, or what is wrong with it."""

    ordinal: int
    wall_time: float
    record: store.Summary | store.Missing | None
    trouble: str | None = None

    @property
    def summary(self) -> store.Summary | None:
        return self.record if isinstance(self.record, store.Summary) else None

    @property
    def reason(self) -> str | None:
        """Why it has no figures, as the training said."""
        said = self.record.reason if isinstance(self.record, store.Missing) else None
        return None if said is None else said.removeprefix("GlobEncCallback: ")


@dataclass(frozen=True, eq=False)
class _Training:
    """All validations of one callback in one run, in their order."""

    written: Mapping[int, float | None]
    read: Mapping[int, _Validation]
    validations: Sequence[_Validation]
    newest: store.Summary | None
    messages: Sequence[str]


class GlobEncPlugin(base_plugin.TBPlugin):
    """The plugin that TensorBoard finds by its entry point.

    Args:
        context: what TensorBoard gives every plugin.
    """

    plugin_name = store.PLUGIN

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._trainings: _Recent[_Training] = _Recent(KEPT_VALIDATIONS)
        self._details: _Recent[store.Detail] = _Recent(KEPT_DETAILS)
        self._indices: _Recent[tuple[_Training, str]] = _Recent(KEPT_INDICES)
        self._tables: _Recent[tuple[_Training, str]] = _Recent(4 * KEPT_INDICES)
        self._rows: _Recent[tuple[_Training, _Rows]] = _Recent(KEPT_ROWS)

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """What answers below ``data/plugin/globenc``."""
        routes: dict[str, Callable[[_Request], _Answer | str]] = {
            "/runs": self._runs,
            "/index": self._index,
            "/sentence": self._sentence,
            "/detail": self._detail,
            "/tokens": self._tokens,
            "/movement": self._movement,
            "/table": self._table,
            "/dynamics": self._dynamics,
        }
        return {
            ENTRY: _static_file,
            "/static/*": _static_file,
            **{route: _as_app(answer) for route, answer in routes.items()},
        }

    def is_active(self) -> bool:
        """Nothing but data makes the tab active, and TensorBoard sees by itself whether there are any."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Where the tab begins."""
        return base_plugin.FrontendMetadata(es_module_path=ENTRY, tab_name="GlobEnc")

    def _runs(self, request: _Request) -> _Answer:
        runs = []
        for run, times in sorted(self._listed(request).items()):
            found: dict[str, list[float]] = {}
            for name, time in times.items():
                parsed = store.parsed_tag(name)
                if parsed is not None and parsed[1] == "summary":
                    found.setdefault(parsed[0], []).append(time or 0.0)
            # A resumed training may write validations again: their number stays, and the newest of them is newer.
            callbacks = [
                {"tag": tag, "validations": len(written), "written": max(written)}
                for tag, written in sorted(found.items())
            ]
            if callbacks:
                runs.append({"run": run, "callbacks": callbacks})
        return {"runs": runs}

    def _index(self, request: _Request) -> str:
        run, tag = request.text("run"), request.text("tag")
        training = self._training(request, run, tag)
        # Asked for again and again while a training runs, and long to write down.
        key = (request.experiment, run, tag)
        known = self._indices.get(key)
        if known is None or known[0] is not training:
            known = training, _as_json(_index_of(run, tag, training))
            self._indices.put(key, known)
        return known[1]

    def _sentence(self, request: _Request) -> _Answer:
        training = self._training(request, request.text("run"), request.text("tag"), refresh=False)
        newest = _has_data(training)
        sentence = request.whole("sentence", len(newest.sentences), "sentences")
        return {
            "rho": {
                method: [
                    None if one.summary is None else _numbers(one.summary.rho[place, sentence])
                    for one in training.validations
                ]
                for place, method in enumerate(newest.methods)
            }
        }

    def _detail(self, request: _Request) -> _Answer:
        training = self._training(request, request.text("run"), request.text("tag"), refresh=False)
        newest = _has_data(training)
        index = request.whole("index", len(training.validations), "validations")
        sentence = request.whole("sentence", len(newest.sentences), "sentences")
        summary = _seen(training, index)
        detail = self._read_detail(request, summary)
        rows = {method: of[sentence] for method, of in detail.rows.items() if sentence in of}
        maps = {method: of[sentence] for method, of in detail.maps.items() if sentence in of}
        return {
            "index": index,
            "sentence": sentence,
            "step": summary.moment.step,
            "rows": {method: _as_shares(codes, store.ROW_LEVELS) for method, codes in rows.items()},
            "rows_note": _note("rows", summary.methods, rows, detail.budget),
            "saliency": _as_shares(detail.saliency[sentence], store.ROW_LEVELS),
            "rollout": {method: _as_shares(codes, store.MAP_LEVELS) for method, codes in maps.items()},
            "rollout_note": _note("maps", summary.methods, maps, detail.budget),
            "rho": {method: _numbers(summary.rho[place, sentence]) for place, method in enumerate(summary.methods)},
        }

    def _tokens(self, request: _Request) -> _Answer:
        """Every sentence's readout row of one method and layer at one validation: all that a slider's step shows."""
        training = self._training(request, request.text("run"), request.text("tag"), refresh=False)
        newest = _has_data(training)
        index = request.whole("index", len(training.validations), "validations")
        method, layer = request.method(newest), request.whole("layer", newest.layers, "layers")
        summary = _seen(training, index)
        detail = self._read_detail(request, summary)
        rows = detail.rows.get(method, {})
        count = len(newest.sentences)
        return {
            "index": index,
            "step": summary.moment.step,
            "rows": [
                _as_shares(rows[sentence][layer], store.ROW_LEVELS) if sentence in rows else None
                for sentence in range(count)
            ],
            "saliency": [_as_shares(detail.saliency[sentence], store.ROW_LEVELS) for sentence in range(count)],
            "rho": _numbers(summary.rho[list(summary.methods).index(method), :, layer]),
        }

    def _movement(self, request: _Request) -> _Answer:
        training = self._training(request, request.text("run"), request.text("tag"), refresh=False)
        newest = _has_data(training)
        method, layer = request.method(newest), request.whole("layer", newest.layers, "layers")
        most = request.whole("k", 1000, "tokens", 5)
        if not most:
            raise _RefusalError("k must be at least 1.")
        indices = [request.whole(name, len(training.validations), "validations") for name in ("from", "to")]
        details = [self._read_detail(request, _seen(training, index)) for index in indices]
        before, after = (detail.rows.get(method, {}) for detail in details)
        old, new = (_seen(training, index).sentences for index in indices)
        moved: list[_Answer] = [
            {"sentence": sentence, "other_text": False}
            | movement(before[sentence][layer], after[sentence][layer], most)
            for sentence in range(len(newest.sentences))
            if sentence in before and sentence in after and old[sentence].tokens == new[sentence].tokens
        ]
        moved.sort(key=lambda one: (one["distance"] is None, -(one["distance"] or 0.0), one["overlap"]))
        # Two texts have no tokens in common that could gain or lose.
        moved += [
            {"sentence": sentence, "other_text": True, "distance": None, "overlap": None, "gained": [], "lost": []}
            for sentence in range(len(newest.sentences))
            if old[sentence].tokens != new[sentence].tokens
        ]
        return {"sentences": moved}

    def _table(self, request: _Request) -> str:
        """A run's correlations alone, every method and layer, and what tells whether it can be averaged with others."""
        run, tag = request.text("run"), request.text("tag")
        training = self._training(request, run, tag)
        key = (request.experiment, run, tag)
        known = self._tables.get(key)
        if known is None or known[0] is not training:
            known = training, _as_json(_table_of(run, tag, training))
            self._tables.put(key, known)
        return known[1]

    def _dynamics(self, request: _Request) -> _Answer:
        """Drift and mass over a training, of some methods at one layer, as means over the sentences."""
        run, tag = request.text("run"), request.text("tag")
        training = self._training(request, run, tag, refresh=False)
        newest = _has_data(training)
        layer = request.whole("layer", newest.layers, "layers")
        methods = request.words("methods", len(newest.methods))
        unknown = [one for one in methods if one not in newest.methods]
        if unknown:
            raise _RefusalError(f"There are no figures of the method {unknown[0]!r}.", 404)
        against, by = request.one_of("against", dynamics.AGAINST), request.one_of("by", dynamics.MEASURES)
        wanted = request.words("tokens", MOST_WORDS)
        sentences, rows = newest.sentences, self._read_rows(request, training, newest)
        plain = [[not one for one in sentence.special] for sentence in sentences]
        chosen = [dynamics.marked(one.tokens, one.special, wanted) for one in sentences]
        known = [one.summary is not None and one.summary.sentences == sentences for one in training.validations]
        pairs = dynamics.partners(known, against)
        starts = np.cumsum([0, *(len(one.tokens) for one in sentences)])
        answer: _Answer = {"drift": {}, "mass": {}, "chance": dynamics.chance([sum(one) for one in plain], by)}
        answer["chosen"] = [sum(one) for one in chosen]
        for method in methods:
            table = rows[:, list(newest.methods).index(method), layer].astype(np.float64)
            each = [table[:, first:last] for first, last in itertools.pairwise(starts)]
            moved = [dynamics.drift(one[:, of], pairs, by) for one, of in zip(each, plain, strict=True)]
            shares = [dynamics.mass(one, of) for one, of in zip(each, chosen, strict=True)]
            answer["drift"][method] = dynamics.mean(np.stack(moved))
            answer["mass"][method] = dynamics.mean(np.stack(shares))
        return answer

    def _read_rows(self, request: _Request, training: _Training, newest: store.Summary) -> _Rows:
        """Every readout row of a run, (validation, method, layer, all sentences' tokens); NaN where there is none."""
        run, tag = request.text("run"), request.text("tag")
        key = (request.experiment, run, tag)
        known = self._rows.get(key)
        if known is not None and known[0] is training:
            return known[1]
        starts = np.cumsum([0, *(len(one.tokens) for one in newest.sentences)])
        shape = (len(training.validations), len(newest.methods), newest.layers, int(starts[-1]))
        rows = np.full(shape, np.nan, dtype=np.float32)
        old: dict[tuple[int, float], NDArray[np.float32]] = {}
        if known is not None and known[1].shape[1:] == shape[1:]:
            # A training that runs has one validation more.
            before = known[0].validations
            old = {(one.ordinal, one.wall_time): known[1][place] for place, one in enumerate(before)}
        wanted: dict[str, int] = {}
        for place, one in enumerate(training.validations):
            if (one.ordinal, one.wall_time) in old:
                rows[place] = old[one.ordinal, one.wall_time]
            elif one.summary is not None and one.summary.sentences == newest.sentences:
                wanted[store.tag(tag, "detail", one.ordinal)] = place
        names = list(wanted)
        for start in range(0, len(names), READ_AT_ONCE):
            for name, (_, data) in self._read(request, run, names[start : start + READ_AT_ONCE]).items():
                _fill(rows[wanted[name]], training.validations[wanted[name]], newest, starts, data)
        self._rows.put(key, (training, rows), rows.nbytes)
        return rows

    def _listed(self, request: _Request, run: str | None = None) -> dict[str, dict[str, float | None]]:
        """Run -> tag -> when its newest point was written."""
        if self._provider is None:
            raise _RefusalError("this TensorBoard gives plugins no data.", 404)
        found = self._provider.list_tensors(
            request.context,
            experiment_id=request.experiment,
            plugin_name=self.plugin_name,
            run_tag_filter=None if run is None else provider.RunTagFilter(runs=[run]),
        )
        return {run: {tag: series.max_wall_time for tag, series in tags.items()} for run, tags in found.items()}

    def _read(self, request: _Request, run: str, tags: Sequence[str]) -> dict[str, tuple[float, Any]]:
        """Tag -> the newest point: when it was written, and its data."""
        found = self._provider.read_tensors(
            request.context,
            experiment_id=request.experiment,
            plugin_name=self.plugin_name,
            downsample=POINTS,
            run_tag_filter=provider.RunTagFilter(runs=[run], tags=tags),
        )
        newest = {
            tag: max(points, key=lambda point: point.wall_time) for tag, points in found.get(run, {}).items() if points
        }
        return {tag: (point.wall_time, point.numpy) for tag, point in newest.items()}

    def _training(self, request: _Request, run: str, tag: str, refresh: bool = True) -> _Training:
        """All summaries of a run; those that have been read before are not read again."""
        key = (request.experiment, run, tag)
        known = self._trainings.get(key)
        if known is not None and not refresh:
            return known
        written = {}
        for name, time in self._listed(request, run).get(run, {}).items():
            parsed = store.parsed_tag(name)
            if parsed is not None and parsed[:2] == (tag, "summary"):
                written[parsed[2]] = time
        if not written:
            raise _RefusalError(f"There are no GlobEnc data of {tag!r} in the run {run!r}.", 404)
        if known is not None and known.written == written:
            return known
        read = {}
        if known is not None:
            read = {one: known.read[one] for one, time in written.items() if known.written.get(one, -1.0) == time}
        wanted = sorted(written.keys() - read.keys())
        newest = None if known is None else known.newest
        probe = () if newest is None else newest.sentences
        for start in range(0, len(wanted), READ_AT_ONCE):
            names = {store.tag(tag, "summary", one): one for one in wanted[start : start + READ_AT_ONCE]}
            for name, (time, data) in self._read(request, run, list(names)).items():
                one = _read_summary(names[name], time, data)
                if one.summary is not None:
                    # The tokens are most of a summary, and nearly always those of the one before.
                    probe = probe if one.summary.sentences == probe else one.summary.sentences
                    one = replace(one, record=replace(one.summary, sentences=probe))
                read[names[name]] = one
        training = _put_together(written, read)
        self._trainings.put(key, training, len(written))
        return training

    def _read_detail(self, request: _Request, summary: store.Summary) -> store.Detail:
        run, tag, ordinal = request.text("run"), request.text("tag"), summary.moment.ordinal
        name = store.tag(tag, "detail", ordinal)
        key = (request.experiment, run, name, summary.moment)
        known = self._details.get(key)
        if known is not None:
            return known
        found = self._read(request, run, [name]).get(name)
        if found is None:
            raise _RefusalError("The attributions of this validation have not been written, or not yet.", 404)
        try:
            detail = store.detail_from_bytes(_only_item(found[1]))
        except store.RecordError as error:
            raise _RefusalError(f"The attributions of this validation cannot be read: {error}.", 404) from error
        if detail.moment != summary.moment or detail.lengths != tuple(len(one.tokens) for one in summary.sentences):
            raise _RefusalError("The attributions of this validation belong to another one.", 404)
        if any(rows.shape[0] != summary.layers for of in detail.rows.values() for rows in of.values()):
            raise _RefusalError("The attributions of this validation are of another model.", 404)
        self._details.put(key, detail)
        return detail


class _Request:
    """What a browser asks for, checked."""

    def __init__(self, request: wrappers.Request) -> None:
        self._arguments = request.args
        self.context = plugin_util.context(request.environ)
        self.experiment = plugin_util.experiment_id(request.environ)

    def text(self, name: str) -> str:
        value = self._arguments.get(name)
        if value is None:
            raise _RefusalError(f"{name}= is missing.")
        return str(value)

    def whole(self, name: str, count: int, things: str, default: int | None = None) -> int:
        """A number that counts ``things`` from 0, of which there are ``count``."""
        text = self._arguments.get(name)
        if text is None and default is not None:
            return default
        value = self.text(name)
        if not value.isascii() or not value.isdigit() or len(value) > 9:
            raise _RefusalError(f"{name}= must be a whole number.")
        if int(value) >= count:
            raise _RefusalError(f"{name}={value} is out of range: there are {count} {things}, counted from 0.", 404)
        return int(value)

    def one_of(self, name: str, values: Sequence[str]) -> str:
        value = self.text(name)
        if value not in values:
            raise _RefusalError(f"{name}= must be one of {', '.join(values)}.")
        return value

    def words(self, name: str, most: int) -> list[str]:
        """A list of texts, in JSON."""
        try:
            value = json.loads(self.text(name))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list) or not all(isinstance(one, str) and len(one) <= LONGEST_WORD for one in value):
            raise _RefusalError(f"{name}= must be a list of texts of at most {LONGEST_WORD} characters, in JSON.")
        if len(value) > most:
            raise _RefusalError(f"{name}= holds {len(value)} texts; at most {most} are taken.")
        return value

    def method(self, summary: store.Summary) -> str:
        method = self.text("method")
        if method not in summary.methods:
            raise _RefusalError(f"There are no figures of the method {method!r}.", 404)
        return method


def _as_app(answer: Callable[[_Request], _Answer | str]) -> Callable[..., Any]:
    """A WSGI application that sends what ``answer`` returns, or why it does not, as JSON."""

    def app(request: wrappers.Request) -> wrappers.Response:
        content: _Answer | str
        code = 200
        try:
            if request.method not in ("GET", "HEAD"):
                raise _RefusalError("Only GET is answered here.", 405)
            content = answer(_Request(request))
        except _RefusalError as refusal:
            content, code = {"error": str(refusal)}, refusal.code
        except errors.PublicError as error:
            content, code = {"error": str(error)}, error.http_code
        except Exception as error:
            logger.error("The GlobEnc tab could not answer %s", request.path, exc_info=True)
            content, code = {"error": f"The data could not be read ({type(error).__name__})."}, 500
        text = content if isinstance(content, str) else _as_json(content)
        return http_util.Respond(request, text, "application/json", code=code)

    return wrappers.Request.application(app)


@wrappers.Request.application
def _static_file(request: wrappers.Request) -> wrappers.Response:
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


def movement(before: ArrayLike, after: ArrayLike, most: int) -> _Answer:
    """How far a sentence's attributions moved.

    Args:
        before: (k) attributions, not negative.
        after: (k) the same tokens' later.
        most: how many of the largest are compared.

    Returns:
        ``distance``, 1 - Spearman's rho of the two, None where it is undefined; ``overlap``, the share of the ``most``
        largest tokens in common; ``gained`` and ``lost``, the tokens whose share of the sum grew and shrank, the most
        first.
    """
    old, new = (np.asarray(values, dtype=np.float64) for values in (before, after))
    most = min(most, len(old))
    tops = [set(np.argsort(-values, kind="stable")[:most].tolist()) for values in (old, new)]
    gain = new / max(new.sum(), 1e-300) - old / max(old.sum(), 1e-300)
    order = np.argsort(-gain, kind="stable")
    rho = _spearman(old, new)
    return {
        "distance": None if rho is None else round(1 - rho, 4),
        "overlap": round(len(tops[0] & tops[1]) / most, 4) if most else 1.0,
        "gained": [int(place) for place in order if gain[place] > 0][:most],
        "lost": [int(place) for place in order[::-1] if gain[place] < 0][:most],
    }


def _spearman(left: NDArray[np.float64], right: NDArray[np.float64]) -> float | None:
    ranks = [_ranks(values) for values in (left, right)]
    x, y = (one - one.mean() if len(one) else one for one in ranks)
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 0 else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; ties share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[which.reshape(-1)]


def _only_item(array: Any) -> Any:
    """The bytes in a tensor of one string."""
    array = np.asarray(array)
    return array.item() if array.size == 1 else b""


def _read_summary(ordinal: int, wall_time: float, data: Any) -> _Validation:
    try:
        record = store.summary_from_bytes(_only_item(data))
    except store.RecordError as error:
        return _Validation(ordinal, wall_time, None, str(error))
    if record.moment.ordinal != ordinal:
        return _Validation(ordinal, wall_time, None, "it belongs to another validation")
    return _Validation(ordinal, wall_time, record)


def _put_together(written: Mapping[int, float | None], read: Mapping[int, _Validation]) -> _Training:
    validations: list[_Validation] = []
    left_out = 0
    session = -math.inf
    for ordinal in sorted(read):
        record = read[ordinal].record
        if record is not None and record.moment.session < session:
            left_out += 1
            continue
        session = session if record is None else max(session, record.moment.session)
        validations.append(read[ordinal])
    newest = next((one.summary for one in reversed(validations) if one.summary is not None), None)
    if newest is not None:
        validations = [_if_comparable(one, newest) for one in validations]
    messages = []
    troubles = [one.trouble for one in validations if one.trouble is not None]
    if troubles:
        messages.append(
            f"{len(troubles)} of {len(validations)} validations cannot be shown: {'; '.join(sorted(set(troubles)))}."
        )
    if left_out:
        messages.append(
            f"{left_out} validations are left out: the training was resumed from a checkpoint older than they are."
        )
    reasons = [*dict.fromkeys(one.reason for one in validations if one.reason is not None)] if newest is None else []
    messages += reasons[:MAX_REASONS]
    if len(reasons) > MAX_REASONS:
        messages.append(f"There are {len(reasons) - MAX_REASONS} reasons more.")
    if newest is None and not troubles and not reasons:
        messages.append("No validation has figures yet: the analysis of each of them failed.")
    return _Training(written, read, validations, newest, messages)


def _if_comparable(validation: _Validation, newest: store.Summary) -> _Validation:
    summary = validation.summary
    if summary is None or summary is newest:
        return validation
    same = _are_of_one_probe(summary, newest) and summary.methods == newest.methods
    if same and summary.layers == newest.layers and summary.settings == newest.settings:
        return validation
    trouble = "another probe, other methods or other settings than the newest validation's"
    return _Validation(validation.ordinal, validation.wall_time, None, trouble)


def _are_of_one_probe(summary: store.Summary, newest: store.Summary) -> bool:
    """Whether two validations show the same examples: where several texts can be chosen, another one may be shown."""
    if summary.words.get("task") == newest.words.get("task") == "choice":
        return len(summary.sentences) == len(newest.sentences)
    return summary.sentences == newest.sentences


def _index_of(run: str, tag: str, training: _Training) -> _Answer:
    newest = training.newest
    answer: _Answer = {"run": run, "tag": tag, "messages": list(training.messages)}
    answer["validations"] = [_described(place, one, newest) for place, one in enumerate(training.validations)]
    if newest is None:
        return answer | {
            "methods": [],
            "drawn_method": None,
            "layers": 0,
            "settings": {},
            "class_names": None,
            "words": {},
            "sentences": [],
            "correlation": {},
        }
    return answer | {
        "methods": newest.methods,
        "drawn_method": newest.drawn_method,
        "layers": newest.layers,
        "settings": newest.settings,
        "class_names": newest.class_names,
        "words": newest.words,
        "sentences": [
            _sentence_of(one, newest.decided[place] if newest.decided else None)
            for place, one in enumerate(newest.sentences)
        ],
        "correlation": {
            method: {
                name: [
                    None if one.summary is None else _numbers(getattr(one.summary, name)[place])
                    for one in training.validations
                ]
                for name in ("mean", "low", "high", "n")
            }
            for place, method in enumerate(newest.methods)
        },
    }


def _table_of(run: str, tag: str, training: _Training) -> _Answer:
    newest = training.newest
    answer: _Answer = {"run": run, "tag": tag, "steps": [], "methods": [], "layers": 0, "probe": None, "mean": {}}
    if newest is None:
        return answer
    seen = [(one.record.moment.step, one.summary) for one in training.validations if one.record is not None]
    # A run that chooses among several texts shows other tokens at each validation.
    chooses = newest.words.get("task") == "choice" and newest.settings.get("probe")
    shown = newest.settings["probe"] if chooses else [[*one.tokens] for one in newest.sentences]
    return answer | {
        "steps": [step for step, _ in seen],
        "methods": newest.methods,
        "layers": newest.layers,
        "examples": len(newest.sentences),
        "probe": hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12],
        "settings": {name: newest.settings.get(name) for name in COMPARED},
        "places": [place for place, one in enumerate(training.validations) if one.record is not None],
        "mean": {
            method: [None if one is None else _numbers(one.mean[place]) for _, one in seen]
            for place, method in enumerate(newest.methods)
        },
    }


def _fill(rows: _Rows, validation: _Validation, newest: store.Summary, starts: NDArray[Any], data: Any) -> None:
    """Put one validation's rows into its place; what cannot be read, or is of another validation, stays empty."""
    try:
        detail = store.detail_from_bytes(_only_item(data))
    except store.RecordError:
        return
    lengths = tuple(len(one.tokens) for one in newest.sentences)
    if validation.summary is None or detail.moment != validation.summary.moment or detail.lengths != lengths:
        return
    for place, method in enumerate(newest.methods):
        for sentence, codes in detail.rows.get(method, {}).items():
            if len(codes) == newest.layers:
                rows[place, :, starts[sentence] : starts[sentence + 1]] = codes


def _sentence_of(sentence: store.Sentence, decided: store.Decided | None) -> _Answer:
    answer: _Answer = {"tokens": sentence.tokens, "special": sentence.special, "label": sentence.label}
    if decided is None:
        return answer | {"truth_name": "label", "truth": None, "others": []}
    return answer | {"truth_name": decided.truth_name, "truth": decided.truth, "others": decided.others}


def _described(place: int, validation: _Validation, newest: store.Summary | None) -> _Answer:
    record, summary = validation.record, validation.summary
    other_texts = {}
    if summary is not None and newest is not None and summary.sentences is not newest.sentences:
        pairs = enumerate(zip(summary.sentences, newest.sentences, strict=False))
        other_texts = {
            number: _sentence_of(own, summary.decided[number] if summary.decided else None)
            for number, (own, shown) in pairs
            if own != shown
        }
    return {
        "index": place,
        "ordinal": validation.ordinal,
        "step": None if record is None else record.moment.step,
        "epoch": None if record is None else record.moment.epoch,
        "wall_time": validation.wall_time,
        "missing": isinstance(record, store.Missing),
        "damaged": validation.trouble,
        "reason": validation.reason,
        "decided": None if summary is None or not summary.decided else [_in_words(one) for one in summary.decided],
        "other_texts": other_texts,
        "predicted": None if summary is None else summary.predicted,
        "probability": None if summary is None else _numbers(summary.probability),
    }


def _in_words(decided: store.Decided) -> list[Any]:
    """What changes from one validation to the next, as a list: a long training has many."""
    return [
        decided.name,
        decided.answer,
        decided.right,
        decided.chance,
        decided.chance_name,
        decided.where,
        decided.marked,
    ]


def _has_data(training: _Training) -> store.Summary:
    if training.newest is None:
        raise _RefusalError(" ".join(training.messages), 404)
    return training.newest


def _seen(training: _Training, index: int) -> store.Summary:
    """The summary of a validation that has figures."""
    validation = training.validations[index]
    if validation.summary is None:
        reason = validation.trouble or validation.reason or "its analysis failed"
        raise _RefusalError(f"This validation has no figures: {reason.rstrip('.')}.", 404)
    return validation.summary


def _note(things: str, methods: Sequence[str], stored: Mapping[str, Any], budget: int) -> str | None:
    absent = [method for method in methods if method not in stored]
    if not absent:
        return None
    which = "all methods" if len(absent) == len(methods) else ", ".join(absent)
    return f"The {things} of {which} are not stored for this sentence: a validation takes at most {budget // 1024} kB."


def _as_json(content: _Answer) -> str:
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def _numbers(values: NDArray[Any]) -> list[Any]:
    """Numbers as JSON can hold them: NaN becomes null."""
    if values.dtype.kind != "f":
        return list(values.tolist())
    return [round(one, 5) if math.isfinite(one) else None for one in values.tolist()]


def _as_shares(codes: NDArray[Any], levels: int) -> list[Any]:
    """Shares of the row's largest value; five digits tell all steps apart."""
    return list(np.round(codes.astype(np.float64) / levels, 5).tolist())
