"""The GlobEnc tab's server side: records out of TensorBoard's data provider, JSON and static files to the browser.

TensorBoard imports this module in its own process, and an ImportError here would keep TensorBoard from starting: so it
is the standard library, numpy, werkzeug and tensorboard alone.

Axes: ``l`` layer, ``q`` token that receives, ``k`` token that is attended to. Layers are counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tensorboard.data import provider
from tensorboard.plugins import base_plugin

from globenc_lightning import dynamics
from globenc_lightning.report.dashboard import many_runs, shown, store
from globenc_lightning.report.dashboard.answering import (
    Answer,
    Recent,
    RefusalError,
    Request,
    all_as_shares,
    as_app,
    as_json,
    as_shares,
    numbers,
    static_file,
)
from globenc_lightning.report.dashboard.moving import movements
from globenc_lightning.report.dashboard.trainings import (
    Training,
    Validation,
    has_data,
    only_item,
    put_together,
    read_summary,
    seen,
)

ENTRY = "/static/index.js"
# TensorBoard keeps the newest points of a tag in any case; a tag of ours has one, and more where a resumed training
# wrote some of its validations again.
POINTS = 1000
KEPT_VALIDATIONS = 8000
"""So many validations of 16 sentences are kept, or fewer of more."""
KEPT_DETAILS = 64 * 2**20
"""So many bytes of attributions of single validations are kept."""
KEPT_INDICES = 64
KEPT_ROWS = 512 * 2**20
"""So many bytes of readout rows are kept: 30 runs of 50 validations, 16 sentences of 24 tokens, take 97 MB."""
MOST_WORDS = 200
READ_AT_ONCE = 100


class GlobEncPlugin(base_plugin.TBPlugin):
    """The plugin that TensorBoard finds by its entry point.

    Args:
        context: what TensorBoard gives every plugin.
    """

    plugin_name = store.PLUGIN

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._trainings: Recent[Training] = Recent(KEPT_VALIDATIONS)
        self._details: Recent[store.Detail] = Recent(KEPT_DETAILS)
        self._indices: Recent[tuple[Training, str]] = Recent(KEPT_INDICES)
        self._tables: Recent[tuple[Training, str]] = Recent(4 * KEPT_INDICES)
        self._rows: Recent[tuple[Training, many_runs.Rows]] = Recent(KEPT_ROWS)

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """What answers below ``data/plugin/globenc``."""
        routes: dict[str, Callable[[Request], Answer | str]] = {
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
            ENTRY: static_file,
            "/static/*": static_file,
            **{route: as_app(answer) for route, answer in routes.items()},
        }

    def is_active(self) -> bool:
        """Nothing but data makes the tab active, and TensorBoard sees by itself whether there are any."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Where the tab begins."""
        return base_plugin.FrontendMetadata(es_module_path=ENTRY, tab_name="GlobEnc")

    def _runs(self, request: Request) -> Answer:
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

    def _index(self, request: Request) -> str:
        run, tag = request.text("run"), request.text("tag")
        training = self._training(request, run, tag)
        # Asked for again and again while a training runs, and long to write down.
        key = (request.experiment, run, tag)
        known = self._indices.get(key)
        if known is None or known[0] is not training:
            known = training, as_json(_index_of(run, tag, training))
            self._indices.put(key, known)
        return known[1]

    def _sentence(self, request: Request) -> Answer:
        training = self._training(request, request.text("run"), request.text("tag"), refresh=False)
        newest = has_data(training)
        sentence = request.whole("sentence", len(newest.sentences), "sentences")
        return {
            "rho": {
                method: [
                    None if one.summary is None else numbers(one.summary.rho[place, sentence])
                    for one in training.validations
                ]
                for place, method in enumerate(newest.methods)
            }
        }

    def _detail(self, request: Request) -> Answer:
        training = self._training(request, request.text("run"), request.text("tag"), refresh=False)
        newest = has_data(training)
        index = request.whole("index", len(training.validations), "validations")
        sentence = request.whole("sentence", len(newest.sentences), "sentences")
        summary = seen(training, index)
        detail = self._read_detail(request, summary)
        rows = {method: of[sentence] for method, of in detail.rows.items() if sentence in of}
        maps = {method: of[sentence] for method, of in detail.maps.items() if sentence in of}
        return {
            "index": index,
            "sentence": sentence,
            "step": summary.moment.step,
            "rows": {method: as_shares(codes, store.ROW_LEVELS) for method, codes in rows.items()},
            "rows_note": shown.note("rows", summary.methods, rows, detail.budget),
            "saliency": as_shares(detail.saliency[sentence], store.ROW_LEVELS),
            "rollout": {method: as_shares(codes, store.MAP_LEVELS) for method, codes in maps.items()},
            "rollout_note": shown.NO_MAPS
            if summary.words.get("aggregation") == "maxflow"
            else shown.note("maps", summary.methods, maps, detail.budget),
            "rho": {method: numbers(summary.rho[place, sentence]) for place, method in enumerate(summary.methods)},
        }

    def _tokens(self, request: Request) -> Answer:
        """Every sentence's readout row of one method and layer at one validation: all that a slider's step shows."""
        training = self._training(request, request.text("run"), request.text("tag"), refresh=False)
        newest = has_data(training)
        index = request.whole("index", len(training.validations), "validations")
        method, layer = request.method(newest), request.whole("layer", newest.layers, "layers")
        summary = seen(training, index)
        detail = self._read_detail(request, summary)
        rows = detail.rows.get(method, {})
        count = len(newest.sentences)
        looked_at = [rows[one][layer] if one in rows else None for one in range(count)]
        return {
            "index": index,
            "step": summary.moment.step,
            "rows": all_as_shares(looked_at, store.ROW_LEVELS),
            "saliency": all_as_shares(detail.saliency[:count], store.ROW_LEVELS),
            "rho": numbers(summary.rho[list(summary.methods).index(method), :, layer]),
            **shown.stored_rows(detail, summary.methods, count, method),
        }

    def _movement(self, request: Request) -> Answer:
        training = self._training(request, request.text("run"), request.text("tag"), refresh=False)
        newest = has_data(training)
        method, layer = request.method(newest), request.whole("layer", newest.layers, "layers")
        most = request.whole("k", 1000, "tokens", 5)
        if not most:
            raise RefusalError("k must be at least 1.")
        indices = [request.whole(name, len(training.validations), "validations") for name in ("from", "to")]
        details = [self._read_detail(request, seen(training, index)) for index in indices]
        before, after = (detail.rows.get(method, {}) for detail in details)
        old, new = (seen(training, index).sentences for index in indices)
        places = [
            sentence
            for sentence in range(len(newest.sentences))
            if sentence in before and sentence in after and old[sentence].tokens == new[sentence].tokens
        ]
        found = movements([(before[one][layer], after[one][layer]) for one in places], most)
        moved: list[Answer] = [
            {"sentence": place, "other_text": False} | one for place, one in zip(places, found, strict=True)
        ]
        moved.sort(key=lambda one: (one["distance"] is None, -(one["distance"] or 0.0), one["overlap"]))
        # Two texts have no tokens in common that could gain or lose.
        moved += [
            {"sentence": sentence, "other_text": True, "distance": None, "overlap": None, "gained": [], "lost": []}
            for sentence in range(len(newest.sentences))
            if old[sentence].tokens != new[sentence].tokens
        ]
        lacking = {one for one in range(len(newest.sentences)) if one not in before or one not in after}
        lacking -= {one["sentence"] for one in moved}
        return {"sentences": moved, "lacking": sorted(lacking), "room": details[-1].budget}

    def _table(self, request: Request) -> str:
        """A run's correlations alone, every method and layer, and what tells whether it can be averaged with others."""
        run, tag = request.text("run"), request.text("tag")
        training = self._training(request, run, tag)
        key = (request.experiment, run, tag)
        known = self._tables.get(key)
        if known is None or known[0] is not training:
            known = training, as_json(many_runs.table_of(run, tag, training))
            self._tables.put(key, known)
        return known[1]

    def _dynamics(self, request: Request) -> Answer:
        """Drift and mass over a training, of some methods at one layer, as means over the sentences."""
        run, tag = request.text("run"), request.text("tag")
        training = self._training(request, run, tag, refresh=False)
        newest = has_data(training)
        layer = request.whole("layer", newest.layers, "layers")
        methods = request.words("methods", len(newest.methods))
        unknown = [one for one in methods if one not in newest.methods]
        if unknown:
            raise RefusalError(f"There are no figures of the method {unknown[0]!r}.", 404)
        against, by = request.one_of("against", dynamics.AGAINST), request.one_of("by", dynamics.MEASURES)
        wanted = request.words("tokens", MOST_WORDS)
        rows = self._read_rows(request, training, newest)
        return many_runs.dynamics_of(
            training, newest, rows, methods=methods, layer=layer, against=against, by=by, wanted=wanted
        )

    def _read_rows(self, request: Request, training: Training, newest: store.Summary) -> many_runs.Rows:
        """Every readout row of a run; those that have been read before are not read again."""
        run, tag = request.text("run"), request.text("tag")
        key = (request.experiment, run, tag)
        known = self._rows.get(key)
        if known is not None and known[0] is training:
            return known[1]
        rows = many_runs.empty_rows(training, newest)
        old: dict[tuple[int, float], int] = {}
        if known is not None and known[1].codes.shape[1:] == rows.codes.shape[1:]:
            # A training that runs has one validation more.
            old = {(one.ordinal, one.wall_time): place for place, one in enumerate(known[0].validations)}
            same = [(one.ordinal, one.wall_time) for one in training.validations]
            many_runs.take_over(rows, known[1], [(at, old[one]) for at, one in enumerate(same) if one in old])
        wanted = {
            store.tag(tag, "detail", one.ordinal): place
            for place, one in enumerate(training.validations)
            if (one.ordinal, one.wall_time) not in old
            and one.summary is not None
            and one.summary.sentences == newest.sentences
        }
        names = list(wanted)
        for start in range(0, len(names), READ_AT_ONCE):
            for name, (_, data) in self._read(request, run, names[start : start + READ_AT_ONCE]).items():
                many_runs.fill(rows, wanted[name], training.validations[wanted[name]], newest, data)
        self._rows.put(key, (training, rows), rows.nbytes)
        return rows

    def _listed(self, request: Request, run: str | None = None) -> dict[str, dict[str, float | None]]:
        """Run -> tag -> when its newest point was written."""
        if self._provider is None:
            raise RefusalError("this TensorBoard gives plugins no data.", 404)
        found = self._provider.list_tensors(
            request.context,
            experiment_id=request.experiment,
            plugin_name=self.plugin_name,
            run_tag_filter=None if run is None else provider.RunTagFilter(runs=[run]),
        )
        return {run: {tag: series.max_wall_time for tag, series in tags.items()} for run, tags in found.items()}

    def _read(self, request: Request, run: str, tags: Sequence[str]) -> dict[str, tuple[float, Any]]:
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

    def _training(self, request: Request, run: str, tag: str, refresh: bool = True) -> Training:
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
            raise RefusalError(f"There are no GlobEnc data of {tag!r} in the run {run!r}.", 404)
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
                one = read_summary(names[name], time, data)
                if one.summary is not None:
                    # The tokens are most of a summary, and nearly always those of the one before.
                    probe = probe if one.summary.sentences == probe else one.summary.sentences
                    one = replace(one, record=replace(one.summary, sentences=probe))
                read[names[name]] = one
        training = put_together(written, read)
        self._trainings.put(key, training, sum(_size(one) for one in training.validations))
        return training

    def _read_detail(self, request: Request, summary: store.Summary) -> store.Detail:
        run, tag, ordinal = request.text("run"), request.text("tag"), summary.moment.ordinal
        name = store.tag(tag, "detail", ordinal)
        key = (request.experiment, run, name, summary.moment)
        known = self._details.get(key)
        if known is not None:
            return known
        found = self._read(request, run, [name]).get(name)
        if found is None:
            raise RefusalError("The attributions of this validation have not been written, or not yet.", 404)
        try:
            detail = store.detail_from_bytes(only_item(found[1]))
        except store.RecordError as error:
            raise RefusalError(f"The attributions of this validation cannot be read: {error}.", 404) from error
        if detail.moment != summary.moment or not shown.lengths_agree(detail, summary):
            raise RefusalError("The attributions of this validation belong to another one.", 404)
        if any(rows.shape[0] != summary.layers for of in detail.rows.values() for rows in of.values()):
            raise RefusalError("The attributions of this validation are of another model.", 404)
        self._details.put(key, detail, shown.nbytes(detail))
        return detail


def _size(validation: Validation) -> int:
    """How much of the room for validations one takes."""
    return 1 if validation.summary is None else -(-len(validation.summary.sentences) // 16)


def _index_of(run: str, tag: str, training: Training) -> Answer:
    newest = training.newest
    answer: Answer = {"run": run, "tag": tag, "messages": list(training.messages)}
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
            "examples": 0,
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
        "examples": shown.examples_of(newest),
        "correlation": {
            method: {
                name: [
                    None if one.summary is None else numbers(getattr(one.summary, name)[place])
                    for one in training.validations
                ]
                for name in ("mean", "low", "high", "n")
            }
            for place, method in enumerate(newest.methods)
        },
    }


def _sentence_of(sentence: store.Sentence, decided: store.Decided | None) -> Answer:
    answer: Answer = {"tokens": sentence.tokens, "special": sentence.special, "label": sentence.label}
    if decided is None:
        return answer | {"truth_name": "label", "truth": None, "others": []}
    return answer | {"truth_name": decided.truth_name, "truth": decided.truth, "others": decided.others}


def _described(place: int, validation: Validation, newest: store.Summary | None) -> Answer:
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
        "probability": None if summary is None else numbers(summary.probability),
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
