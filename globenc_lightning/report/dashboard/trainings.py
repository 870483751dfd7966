"""All validations of one callback in one run, put together from their records.

TensorBoard's process imports this module: the standard library, numpy, werkzeug and tensorboard alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from globenc_lightning.report.dashboard import shown, store
from globenc_lightning.report.dashboard.answering import RefusalError

MAX_REASONS = 20


@dataclass(frozen=True, eq=False)
class Validation:
    """One entry of a training: a summary, the note that there is none, or what is wrong with it."""

    ordinal: int
    wall_time: float
    record: store.Summary | store.Missing | None
    trouble: str | None = None

    @property
    def summary(self) -> store.Summary | None:
        """What it found; None where it has no figures."""
        return self.record if isinstance(self.record, store.Summary) else None

    @property
    def reason(self) -> str | None:
        """Why it has no figures, as the training said."""
        said = self.record.reason if isinstance(self.record, store.Missing) else None
        return None if said is None else said.removeprefix("GlobEncCallback: ")


@dataclass(frozen=True, eq=False)
class Training:
    """All validations of one callback in one run, in their order."""

    written: Mapping[int, float | None]
    read: Mapping[int, Validation]
    validations: Sequence[Validation]
    newest: store.Summary | None
    messages: Sequence[str]


def has_data(training: Training) -> store.Summary:
    """The newest summary, or a refusal that says why there is none."""
    if training.newest is None:
        raise RefusalError(" ".join(training.messages), 404)
    return training.newest


def seen(training: Training, index: int) -> store.Summary:
    """The summary of a validation that has figures."""
    validation = training.validations[index]
    if validation.summary is None:
        reason = validation.trouble or validation.reason or "its analysis failed"
        raise RefusalError(f"This validation has no figures: {reason.rstrip('.')}.", 404)
    return validation.summary


def only_item(array: Any) -> Any:
    """The bytes in a tensor of one string."""
    array = np.asarray(array)
    return array.item() if array.size == 1 else b""


def read_summary(ordinal: int, wall_time: float, data: Any) -> Validation:
    """One validation out of its summary's bytes, or with what is wrong with them."""
    try:
        record = store.summary_from_bytes(only_item(data))
    except store.RecordError as error:
        return Validation(ordinal, wall_time, None, str(error))
    if record.moment.ordinal != ordinal:
        return Validation(ordinal, wall_time, None, "it belongs to another validation")
    return Validation(ordinal, wall_time, record)


def put_together(written: Mapping[int, float | None], read: Mapping[int, Validation]) -> Training:
    """All validations in their order, without those that a resumed training did again or that cannot be compared."""
    validations: list[Validation] = []
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
        count = min(len(one.summary.sentences) for one in validations if one.summary is not None)
        validations = [_cut(one, count) for one in validations]
        newest = next(one.summary for one in reversed(validations) if one.summary is not None)
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
    return Training(written, read, validations, newest, messages)


def _if_comparable(validation: Validation, newest: store.Summary) -> Validation:
    summary = validation.summary
    if summary is None or summary is newest:
        return validation
    same = _are_of_one_probe(summary, newest) and summary.methods == newest.methods
    if same and summary.layers == newest.layers and summary.settings == newest.settings:
        return validation
    trouble = "another probe, other methods or other settings than the newest validation's"
    return Validation(validation.ordinal, validation.wall_time, None, trouble)


def _are_of_one_probe(summary: store.Summary, newest: store.Summary) -> bool:
    """Whether two validations show the same examples: where several texts can be chosen, another one may be shown."""
    if summary.words.get("task") == newest.words.get("task") == "choice":
        return bool(summary.sentences) == bool(newest.sentences)
    return shown.begin_alike(summary, newest)


def _cut(validation: Validation, count: int) -> Validation:
    summary = validation.summary
    return validation if summary is None else replace(validation, record=shown.cut(summary, count))
