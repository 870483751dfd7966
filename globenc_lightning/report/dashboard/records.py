"""A measurement as the records that the dashboard reads.

Axes: ``b`` sentence, ``l`` layer, ``q`` token that receives, ``k`` token that is attended to.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from globenc_lightning.measurement import Measurement, class_of, score_in_words
from globenc_lightning.probe import ProbeSet
from globenc_lightning.report.curves import mean_and_interval
from globenc_lightning.report.dashboard import packing, store
from globenc_lightning.report.images import READOUT_NAMES, drawn_method, target_words
from globenc_lightning.report.texts import texts_of
from globenc_lightning.report.verdicts import MARKS, verdicts
from globenc_lightning.settings import Settings


def kept_maps(lengths: Sequence[int], settings: Settings, drawn: int) -> dict[int, tuple[str, ...]]:
    """Which of the last layer's maps are kept: those of the method that is drawn first, then the others'.

    Args:
        lengths: (b) how many tokens each sentence has; of many, the first are looked at.
        settings: what is computed.
        drawn: so many of the first sentences get pictures, whether or not they fit the room.

    Returns:
        Sentence -> methods.
    """
    if settings.aggregation == "maxflow":
        # Flows go from one token alone; the other pictures of the sentences are drawn.
        return dict.fromkeys(range(min(drawn, len(lengths))), ())
    kept: dict[int, list[str]] = {index: [drawn_method(settings)] for index in range(min(drawn, len(lengths)))}
    for index, method in packing.maps_that_fit(lengths, _methods(settings)):
        if method not in kept.setdefault(index, []):
            kept[index].append(method)
    return {index: tuple(methods) for index, methods in sorted(kept.items())}


def records(
    measurement: Measurement,
    probe: ProbeSet,
    settings: Settings,
    moment: store.Moment,
    class_names: Sequence[str] | None = None,
) -> tuple[store.Summary, store.Detail]:
    """What one validation found, as it is written: means over the whole probe, and the examples that there is room for.

    Args:
        measurement: the figures.
        probe: the examples, with their tokens.
        settings: what was computed.
        moment: when it was.
        class_names: the model's names of its classes, or None.

    Returns:
        The summary, and the attributions as far as they fit, both of the same sentences.

    Raises:
        ValueError: an attribution that is no magnitude.
    """
    methods = tuple(measurement.correlation)
    intervals = [mean_and_interval(rho.numpy()) for rho in measurement.correlation.values()]
    mean, half, n, _ = (np.stack(parts) for parts in zip(*intervals, strict=True))
    size = len(measurement.names)
    fitting = _rows_that_fit(measurement, settings)
    measurement = measurement.first(fitting.sentences)
    texts = texts_of(measurement, probe)
    said = verdicts(measurement, probe, class_names)
    score = score_in_words(measurement.task, settings.target_name, measurement.distance)
    summary = store.Summary(
        moment=moment,
        methods=methods,
        drawn_method=drawn_method(settings),
        settings={
            "readout": measurement.readout,
            "target": settings.target_name,
            "normalize": settings.normalize,
            "exclude_special_tokens": settings.exclude_special_tokens,
            "rule": measurement.rule,
            "encoder": measurement.encoder,
            "probe": probe.fingerprint(),
        },
        class_names=None if class_names is None else tuple(class_names),
        sentences=tuple(_sentence(measurement, probe, index) for index in range(len(measurement.names))),
        predicted=tuple(measurement.predicted.tolist()),
        probability=measurement.probability.float().numpy(),
        rho=torch.stack(list(measurement.correlation.values())).float().numpy(),
        mean=mean.astype(np.float32),
        low=np.maximum(mean - half, -1.0).astype(np.float32),
        high=np.minimum(mean + half, 1.0).astype(np.float32),
        n=n.astype(np.int32),
        decided=tuple(
            store.Decided(
                **{**vars(one), "chance": None if one.chance is None else round(one.chance, 5)}, others=others
            )
            for one, others in zip(said, texts.others, strict=True)
        ),
        words={
            "task": measurement.task,
            "score": target_words(settings.target_name, score),
            "readout": READOUT_NAMES[measurement.readout],
            "text": texts.shown,
            **({} if settings.aggregation == "rollout" else {"aggregation": settings.aggregation}),
            "marked": MARKS.get(measurement.task, ""),
            # How many there are. A reader of an earlier version finds it in the words alone.
            **({"examples": str(size)} if fitting.sentences < size else {}),
            "shown": f"the first {fitting.sentences} of {size:,} examples" if fitting.sentences < size else "",
        },
    )
    return summary, _detail(measurement, settings, moment, fitting.rows)


def _rows_that_fit(measurement: Measurement, settings: Settings) -> packing.Rows:
    lengths = [len(one) for one in measurement.saliency]
    layers = next(iter(measurement.correlation.values())).shape[1]
    return packing.rows_that_fit(lengths, layers, _methods(settings))


def _detail(
    measurement: Measurement, settings: Settings, moment: store.Moment, fitting: Sequence[packing.Part]
) -> store.Detail:
    lengths = tuple(len(one) for one in measurement.saliency)
    order = _methods(settings)
    rows: dict[str, dict[int, np.ndarray]] = {method: {} for method in order}
    for index, method in fitting:
        rows[method][index] = store.shares(measurement.rows[index][method].numpy(), store.ROW_LEVELS)
    maps: dict[str, dict[int, np.ndarray]] = {method: {} for method in order}
    for index, method in packing.maps_that_fit(lengths, order):
        if method in measurement.last.get(index, ()):
            maps[method][index] = store.shares(measurement.last[index][method].numpy(), store.MAP_LEVELS)
    saliency = tuple(store.shares(one.numpy(), store.ROW_LEVELS) for one in measurement.saliency)
    budget = packing.ROWS_ROOM + packing.MAPS_ROOM
    return store.Detail(moment, lengths, saliency, _stored(rows), _stored(maps), budget)


def _sentence(measurement: Measurement, probe: ProbeSet, index: int) -> store.Sentence:
    tokens = measurement.names[index]
    special = probe.special[index] if probe.special else None
    marks = [False] * len(tokens) if special is None else [bool(mark) for mark in special.tolist()]
    return store.Sentence(tokens, tuple((marks + [False] * len(tokens))[: len(tokens)]), class_of(probe.rows[index]))


def _methods(settings: Settings) -> list[str]:
    """The methods in the order in which they get room."""
    return packing.by_importance(settings.methods, drawn_method(settings))


def _stored(parts: Mapping[str, dict[int, np.ndarray]]) -> dict[str, dict[int, np.ndarray]]:
    return {method: of for method, of in parts.items() if of}
