"""Answers about many runs: a run's correlations on their own, its drift, and the share of chosen tokens.

TensorBoard's process imports this module: the standard library, numpy, werkzeug and tensorboard alone.

Axes: ``v`` validation, ``m`` method, ``l`` layer, ``k`` token, of all sentences one after the other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globenc_lightning import dynamics
from globenc_lightning.report.dashboard import shown, store
from globenc_lightning.report.dashboard.answering import Answer, numbers
from globenc_lightning.report.dashboard.trainings import Training, Validation, only_item

COMPARED = ("target", "readout", "normalize", "exclude_special_tokens", "aggregation")
"""Runs that differ in one of these settings are not averaged."""
TOLD_BY = 64
"""So many sentences tell a probe from others of its size: all versions of the package show them of a large one."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Every readout row of a training, as it is stored.

    Attributes:
        codes: (v, m, l, k) shares of the largest of each row, in steps of 1 / ``store.ROW_LEVELS``.
        known: (v, m, b) whether a sentence's rows are there.
        starts: (b + 1) where each sentence's tokens begin, and where the last one's end.
    """

    codes: NDArray[np.uint16]
    known: NDArray[np.bool_]
    starts: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """How much memory they take."""
        return self.codes.nbytes + self.known.nbytes

    def of(self, method: int, layer: int) -> list[NDArray[np.float64]]:
        """(b) times (v, k) one method's rows of one layer, NaN where there are none."""
        found = []
        for sentence, (first, last) in enumerate(itertools.pairwise(self.starts)):
            rows = self.codes[:, method, layer, first:last].astype(np.float64)
            rows[~self.known[:, method, sentence]] = np.nan
            found.append(rows)
        return found


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
    examples = shown.examples_of(newest)
    told: Any = newest.settings["probe"] if chooses else [[*one.tokens] for one in newest.sentences[:TOLD_BY]]
    if examples > TOLD_BY:
        told = [told, examples]
    return answer | {
        "steps": [step for step, _ in seen],
        "methods": newest.methods,
        "layers": newest.layers,
        "examples": examples,
        "shown": len(newest.sentences),
        "probe": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12],
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
        rows: what :func:`empty_rows` and :func:`fill` made.
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
    answer: Answer = {
        "drift": {},
        "mass": {},
        "sentences": {},
        "chance": dynamics.chance([sum(one) for one in plain], by),
    }
    answer["chosen"] = [sum(one) for one in chosen]
    for method in methods:
        each = rows.of(list(newest.methods).index(method), layer)
        moved = [dynamics.drift(one[:, of], pairs, by) for one, of in zip(each, plain, strict=True)]
        shares = [dynamics.mass(one, of) for one, of in zip(each, chosen, strict=True)]
        answer["drift"][method] = dynamics.mean(np.stack(moved))
        answer["mass"][method] = dynamics.mean(np.stack(shares))
        answer["sentences"][method] = int(rows.known[:, list(newest.methods).index(method)].any(0).sum())
    return answer


def empty_rows(training: Training, newest: store.Summary) -> Rows:
    """Room for every readout row of a training."""
    counts = len(training.validations), len(newest.methods)
    starts = np.cumsum([0, *(len(one.tokens) for one in newest.sentences)])
    codes = np.zeros((*counts, newest.layers, int(starts[-1])), dtype=np.uint16)
    return Rows(codes, np.zeros((*counts, len(newest.sentences)), dtype=bool), starts)


def fill(rows: Rows, place: int, validation: Validation, newest: store.Summary, data: Any) -> None:
    """Put one validation's rows into its place; what cannot be read, or is of another validation, stays unknown."""
    try:
        detail = store.detail_from_bytes(only_item(data))
    except store.RecordError:
        return
    if validation.summary is None or detail.moment != validation.summary.moment:
        return
    if not shown.lengths_agree(detail, newest):
        return
    for number, method in enumerate(newest.methods):
        for sentence, codes in detail.rows.get(method, {}).items():
            if sentence < len(newest.sentences) and len(codes) == newest.layers:
                rows.codes[place, number, :, rows.starts[sentence] : rows.starts[sentence + 1]] = codes
                rows.known[place, number, sentence] = True


def take_over(rows: Rows, old: Rows, places: Sequence[tuple[int, int]]) -> None:
    """Copy validations of a training that had fewer: pairs of a place and the earlier place."""
    for place, earlier in places:
        rows.codes[place], rows.known[place] = old.codes[earlier], old.known[earlier]
