"""Answers about many runs: a run's correlations on their own, its drift, and the share of chosen tokens.

TensorBoard's process imports this module: the standard library, numpy, werkzeug and tensorboard alone.

Axes: ``v`` validation, ``m`` method, ``l`` layer, ``k`` token, of all sentences one after the other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globenc_lightning import dynamics
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.answering import Answer, numbers
from globenc_lightning.report.dashboard.trainings import Training, Validation, only_item

Rows = NDArray[np.float32]

COMPARED = ("target", "readout", "normalize", "exclude_special_tokens")
"""Runs that differ in one of these settings are not averaged."""


def table_of(run: str, tag: str, training: Training) -> Answer:
    """A run's correlations, every method and layer, and what tells whether they can be averaged with another's.

    Args:
        run: its name.
        tag: its callback's.
        training: its validations.
    """
    newest = training.newest
    answer: Answer = {"run": run, "tag": tag, "steps": [], "methods": [], "layers": 0, "probe": None, "mean": {}}
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
            method: [None if one is None else numbers(one.mean[place]) for _, one in seen]
            for place, method in enumerate(newest.methods)
        },
    }


def dynamics_of(
    training: Training,
    newest: store.Summary,
    rows: Rows,
    *,
    methods: Sequence[str],
    layer: int,
    against: str,
    by: str,
    wanted: Sequence[str],
) -> Answer:
    """Drift and mass over a training, of some methods at one layer, as means over the sentences.

    Args:
        training: its validations.
        newest: the newest that has figures.
        rows: (v, m, l, k) what :func:`empty_rows` and :func:`fill` made.
        methods: any of the training's.
        layer: counted from 0.
        against: one of ``dynamics.AGAINST``.
        by: one of ``dynamics.MEASURES``.
        wanted: the tokens whose share is asked for.
    """
    sentences = newest.sentences
    plain = [[not one for one in sentence.special] for sentence in sentences]
    chosen = [dynamics.marked(one.tokens, one.special, wanted) for one in sentences]
    known = [one.summary is not None and one.summary.sentences == sentences for one in training.validations]
    pairs = dynamics.partners(known, against)
    starts = starts_of(newest)
    answer: Answer = {"drift": {}, "mass": {}, "chance": dynamics.chance([sum(one) for one in plain], by)}
    answer["chosen"] = [sum(one) for one in chosen]
    for method in methods:
        table = rows[:, list(newest.methods).index(method), layer].astype(np.float64)
        each = [table[:, first:last] for first, last in itertools.pairwise(starts)]
        moved = [dynamics.drift(one[:, of], pairs, by) for one, of in zip(each, plain, strict=True)]
        shares = [dynamics.mass(one, of) for one, of in zip(each, chosen, strict=True)]
        answer["drift"][method] = dynamics.mean(np.stack(moved))
        answer["mass"][method] = dynamics.mean(np.stack(shares))
    return answer


def empty_rows(training: Training, newest: store.Summary) -> Rows:
    """Room (v, m, l, k) for every readout row of a training, NaN so far."""
    shape = (len(training.validations), len(newest.methods), newest.layers, int(starts_of(newest)[-1]))
    return np.full(shape, np.nan, dtype=np.float32)


def starts_of(newest: store.Summary) -> NDArray[np.int64]:
    """Where each sentence's tokens begin, and where the last one's end."""
    return np.cumsum([0, *(len(one.tokens) for one in newest.sentences)])


def fill(rows: Rows, validation: Validation, newest: store.Summary, data: Any) -> None:
    """Put one validation's rows into its place; what cannot be read, or is of another validation, stays empty."""
    try:
        detail = store.detail_from_bytes(only_item(data))
    except store.RecordError:
        return
    starts = starts_of(newest)
    lengths = tuple(len(one.tokens) for one in newest.sentences)
    if validation.summary is None or detail.moment != validation.summary.moment or detail.lengths != lengths:
        return
    for place, method in enumerate(newest.methods):
        for sentence, codes in detail.rows.get(method, {}).items():
            if len(codes) == newest.layers:
                rows[place, :, starts[sentence] : starts[sentence + 1]] = codes
