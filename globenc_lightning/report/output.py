"""Writes what a callback has measured to its trainer's loggers: scalars, pictures, the text of its choices, the tab."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from globenc_lightning.measurement import History, Measurement
from globenc_lightning.probe import ProbeSet, fingerprint
from globenc_lightning.reasons import Reasons, shortened
from globenc_lightning.report import images, page, publish
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.records import records
from globenc_lightning.report.scalars import by_layer, monitored
from globenc_lightning.settings import Settings

__all__ = ["TAG", "Destination", "Output", "by_layer", "monitored"]

TAG = "globenc"


@dataclass(frozen=True)
class Destination:
    """Where a callback's results go.

    Attributes:
        loggers: the trainer's loggers.
        tag: what its tags begin with: ``globenc``, or ``globenc_2`` for the second callback of a Trainer.
        session: a number of this process's training.
        layouts: tag -> what is computed, of each callback whose layout for Custom Scalars is written.
        is_trial: whether the loggers swallow everything (``fast_dev_run``).
        now: the time that the tab's records are written at; that of the machine's clock when None.
    """

    loggers: Sequence[Any]
    tag: str
    session: float
    layouts: Mapping[str, page.Charted]
    is_trial: bool = False
    now: float | None = None


class Output:
    """Writes measurements to loggers, and remembers what each run has been told already.

    Args:
        settings: what is computed.
        heatmap_examples: how many examples get pictures.
        reasons: what must not stop a training is tried there.

    Attributes:
        described: run -> fingerprint of the text that was written last; it travels in checkpoints.
    """

    def __init__(self, settings: Settings, heatmap_examples: int, reasons: Reasons) -> None:
        self.described: dict[str, str] = {}
        self._settings = settings
        self._heatmap_examples = heatmap_examples
        self._reasons = reasons

    def write(
        self,
        to: Destination,
        measurement: Measurement,
        probe: ProbeSet | None,
        history: History,
        names: Sequence[str] | None,
        scalars: Mapping[str, float],
        done: list[str],
    ) -> None:
        """Write the newest entry of a history; each kind of result is tried, whatever becomes of the others.

        Args:
            to: where.
            measurement: what the newest entry is of.
            probe: the examples.
            history: the validations so far, the newest included.
            names: the names of the model's classes, or None.
            scalars: tag -> figure, beside the pictures and records.
            done: the results that were written before the training was interrupted, each with the run that it went to;
                completed one by one. A training that goes on in another run writes them there, too.
        """
        step = history[-1].step
        jobs: dict[str, Callable[[], Any]] = {
            "scalars": lambda: publish.log_scalars(to.loggers, scalars, step),
            "pictures": lambda: self._draw(to, measurement, probe, history, names),
            "tab": lambda: self._record(to, measurement, probe, history, names),
        }
        place = fingerprint([publish.run_of(logger) for logger in to.loggers])
        for kind, job in jobs.items():
            if f"{kind} {place}" not in done:
                self._reasons.attempt(job)
                done.append(f"{kind} {place}")
        self.describe(to, history, step)

    def _draw(
        self,
        to: Destination,
        measurement: Measurement,
        probe: ProbeSet | None,
        history: History,
        names: Sequence[str] | None,
    ) -> None:
        able = [logger for logger in to.loggers if publish.can_show_images(logger)]
        unable = sorted({type(logger).__name__ for logger in to.loggers if logger not in able})
        if unable and not to.is_trial:
            self._reasons.say(f"GlobEncCallback: {', '.join(unable)} can show no images; it gets the scalars alone.")
        if able and probe is not None:
            drawn = {example: maps for example, maps in measurement.last.items() if example < self._heatmap_examples}
            measurement = replace(measurement, last=drawn)
            pictures = images.pictures(measurement, probe, history.latest, history.missing_steps, self._settings, names)
            tagged = {to.tag + tag.removeprefix(TAG): picture for tag, picture in pictures.items()}
            publish.log_images(able, tagged, history[-1].step)

    def _record(
        self,
        to: Destination,
        measurement: Measurement,
        probe: ProbeSet | None,
        history: History,
        names: Sequence[str] | None,
    ) -> None:
        """Write the newest entry of the history for the dashboard."""
        able = [logger for logger in to.loggers if publish.can_keep_records(logger)]
        if able and probe is not None:
            newest = history[-1]
            moment = store.Moment(history.analyses - 1, newest.step, newest.epoch, to.session)
            summary, detail = records(measurement, probe, self._settings, moment, names)
            # Whoever sees the summary asks for the other: it comes last.
            written = {"detail": store.to_bytes(detail), "summary": store.to_bytes(summary)}
            tagged = {store.tag(to.tag, kind, moment.ordinal): data for kind, data in written.items()}
            publish.log_records(able, tagged, newest.step, to.now)

    def describe(self, to: Destination, history: History, step: int) -> None:
        """Write what the figures are of: once to a run, and again when it is no longer what that run shows."""
        about, reasons = history.about, history.reasons
        if about is None and not reasons:
            return
        found = next((entry.faithfulness for entry in reversed(history.latest) if entry.faithfulness is not None), None)
        text, tables = page.markdown(about, reasons, found), page.tables(about, reasons, found)
        # A run has one layout, so each callback that wants one writes that of all.
        layout = page.layout(to.layouts) if to.tag in to.layouts else {}
        described = fingerprint([text, repr(layout)])

        def write(logger: Any) -> None:
            run = fingerprint(publish.run_of(logger))
            if self.described.get(run) != described:
                publish.log_text(logger, f"{to.tag}/about", text, tables, step)
                if layout:
                    publish.log_layout(logger, layout)
                self.described[run] = described

        for logger in to.loggers:
            self._reasons.attempt(partial(write, logger))

    def write_missing(
        self, to: Destination, history: History, ordinal: int | None, step: int, epoch: int, reason: str
    ) -> None:
        """Write why there are no figures into the text and, with a place among the validations, into the tab."""
        if ordinal is not None:
            missing = store.Missing(store.Moment(ordinal, step, epoch, to.session), shortened(reason))
            self._quietly(lambda: self._record_missing(to, missing))
        self._quietly(lambda: self.describe(to, history, step))

    def _record_missing(self, to: Destination, missing: store.Missing) -> None:
        able = [logger for logger in to.loggers if publish.can_keep_records(logger)]
        if able:
            tag = store.tag(to.tag, "summary", missing.moment.ordinal)
            publish.log_records(able, {tag: store.to_bytes(missing)}, missing.moment.step, to.now)

    def _quietly(self, job: Callable[[], None]) -> None:
        """Do something that never stops a training: one process alone does it, and the others would wait for it."""
        self._reasons.attempt(job, raises=False)
