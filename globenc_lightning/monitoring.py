"""Looks at a training: takes the probe, analyses the model when it is time, writes and remembers what was found.

What a Trainer is comes in as a :class:`~globenc_lightning.lightning_facts.Training`, at each of its moments.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from globenc_lightning import processes, sharding
from globenc_lightning.choices import Choices
from globenc_lightning.collecting import Collector
from globenc_lightning.errors import GlobEncError
from globenc_lightning.lightning_facts import (
    Training,
    act_as_a_validation_starts,
    has_averaged_weights,
    validation_is_owed,
)
from globenc_lightning.measurement import History, HistoryEntry, Measurement, about, history_entry
from globenc_lightning.measuring import Measurer
from globenc_lightning.progress import Cost, Progress
from globenc_lightning.progress_bars import display_of, say
from globenc_lightning.reasons import Reasons, shortened
from globenc_lightning.record.keeping import RecordKeeper, recorded
from globenc_lightning.remarks import remarks, without_faithfulness
from globenc_lightning.report.dashboard.records import kept_maps
from globenc_lightning.report.names import class_names
from globenc_lightning.report.output import TAG, Destination, Output, by_layer, monitored
from globenc_lightning.report.page import Charted
from globenc_lightning.report.texts import texts_of
from globenc_lightning.report.verdicts import verdicts
from globenc_lightning.schedule import Schedule
from globenc_lightning.unfinished import BASELINE, STEP, VALIDATION, Before, Moment

LEFT_OUT = (
    "GlobEncCallback: the checkpoint is from between a training step and the end of the validation after it, which "
    "Lightning leaves out on resume. It is missing here, too: "
)
CLOCK_STEP = 1.0
NO_PROBE_YET = (
    "GlobEncCallback: at_steps= asks for figures before any validation has shown the probe: give probe=, or let the "
    "Trainer's sanity check show enough examples (num_sanity_val_steps)."
)


class Monitor:
    """What a callback does at the moments of a training.

    Args:
        choices: the callback's arguments.
        schedule: when the model is analysed.
        reasons: where warnings go.
        collector: holds the probe.
        keeper: keeps the record, or None where none is asked for.

    Attributes:
        history: what was found.
        tag: what the tags of this callback begin with.
        session: a number of this process's training; 0 before the first.
        layouts: tag -> what is computed, of each callback of the Trainer that writes a layout for Custom Scalars.
        resumed: whether the training goes on from a checkpoint and has not trained since.
        refused: whether the model is one that is not analysed at all.
        has_validated: whether the validation that is running was looked at already.
        is_at_end: whether that validation is over, but for the hooks of its end.
    """

    def __init__(
        self,
        choices: Choices,
        schedule: Schedule,
        reasons: Reasons,
        collector: Collector,
        keeper: RecordKeeper | None = None,
    ) -> None:
        self.history = History()
        self.tag = TAG
        self.session = 0.0
        self.layouts: Callable[[], Mapping[str, Charted]] = dict
        self.resumed = False
        self.refused = False
        self._choices = choices
        self._schedule = schedule
        self._reasons = reasons
        self._collector = collector
        self._keeper = keeper
        self._measurer = Measurer(choices.settings, choices.forward, choices.decision, choices.encoder_call)
        self._output = Output(choices.settings, choices.heatmap_examples, reasons)
        self._latest: int | None = None
        self._pending: Measurement | None = None
        self.has_validated = False
        self.is_at_end = False
        # What the checkpoint that a training goes on from owes, and what is owed by one that is written now.
        self._due_epoch: int | None = None
        self._owed: Moment | None = None
        self._moment: Moment | None = None
        # What was written of a validation that Lightning itself goes on with.
        self._carried: list[str] = []
        self._before = Before(0, 0, 0, 0, None)
        self._seen_batches = -1
        self._batch_epoch = 0
        self._keeps_rows = True
        self._cost = Cost()
        # The clock of what is written: this machine's, or ahead of it where it is behind an earlier start's.
        self._earliest = 0.0
        self._ahead = 0.0

    def begin_session(self, model: Any, now: float, tag: str) -> None:
        """A Trainer begins something: a training, or a validation on its own."""
        self._measurer.let_go(but_for=model)
        self._collector.begin_sharing()
        # A state that comes back within the session that wrote it, as finders of a learning rate or a batch size bring
        # it back, is no resumed training: so all processes have to know the session by the same number.
        if self.session:
            # Of the training before; a state that was loaded before the first one counts.
            self.resumed, self._due_epoch, self._owed = False, None, None
            self._earliest = 0.0
        self._moment, self._seen_batches, self._carried = None, -1, []
        self._ahead, self.tag = 0.0, tag
        self._set_clock(now)

    def _keep_order(self, until: float) -> None:
        """Let what is written from here count as later than a checkpoint, whatever this machine's clock says.

        Args:
            until: the time at which the checkpoint was written, by the clock of its training.
        """
        self._earliest = until + CLOCK_STEP
        if self.session:
            self._set_clock(self.session)

    def _set_clock(self, now: float) -> None:
        self.session = max(now, self._earliest)
        self._ahead += self.session - now

    def begin_training(self, training: Training) -> None:
        """A training begins, or goes on."""
        self._reasons.begin()
        if not self.resumed and training.step == 0:
            # Another training: its pictures and reasons start anew, while the history keeps everything.
            self.history.begin()
            self._latest = None
            if self._keeper is not None:
                self._keeper.begin()
        self._keeps_rows = training.is_first
        if not self._keeps_rows:
            self.history.drop_rows()
        self.look_for_shards(training)

    def look_for_shards(self, training: Training) -> None:
        """Refuse a model that no process holds or can gather as a whole."""
        reason = sharding.refusal(training.module)
        self.refused = reason is not None
        if self.refused:
            self.refuse(training, f"GlobEncCallback: {reason}")

    def begin_validation(self, training: Training) -> None:
        """A validation or a sanity check begins."""
        self.look_for_shards(training)
        self._pending, self.has_validated, self.is_at_end = None, False, False
        self._cost.begin_validation()
        self._collector.begin_validation()
        if training.is_fit and not training.is_sanity_check:
            self._seen_batches = training.batches
            if not self.is_repeated(training):
                self._begin(Moment(VALIDATION, None, training.epoch, self._carried))
                self._carried = []

    def end_sanity_check(self, training: Training) -> None:
        """A sanity check is over: a whole validation would take as much longer as it has more batches."""
        self._cost.end_validation(training.share_of_validation)

    def end_validation(self) -> None:
        """Everything about a validation is written: no checkpoint owes it any more."""
        self._moment = None

    def begin_batch(self, training: Training) -> None:
        """A training batch begins: from here on, a validation is another one than those in the checkpoint."""
        self.resumed, self._batch_epoch = False, training.epoch

    def _begin(self, moment: Moment) -> None:
        """From here to its end, a checkpoint holds the state from before a moment."""
        history = self.history
        counts = len(history), len(history.missing_steps), len(history.reasons)
        self._before = Before(*counts, self._schedule.validations, self._latest)
        self._moment = moment

    @contextmanager
    def _within(self, moment: Moment) -> Iterator[None]:
        """A moment outside of a validation. What stops the training (a signal, Ctrl-C) leaves it unfinished."""
        self._begin(moment)
        yield
        self._moment = None

    def see_batch(self, training: Training, batch: Any, place: int, loader: int) -> None:
        """Take a batch of a validation as it passes by, if the probe is made of it."""
        collector, model, places = self._collector, training.module, training.places
        if collector.waits_for_a_batch:
            self._try_noted(training, lambda: collector.restore_like(batch, loader, model, places))
        if collector.is_wanted and not self.refused:
            collector.keep_template(batch)
            if training.is_first:
                self._try_noted(training, lambda: collector.collect(batch, place, loader, model, places))

    def finish_collecting(self, training: Training) -> None:
        """Take what there is where a whole validation has fewer rows than were asked for."""
        self.name_given_probe(training)
        if self._collector.can_be_fixed and training.has_shown_all:
            self._fix_probe(training)

    def name_given_probe(self, training: Training) -> None:
        """Name the tokens of a probe that was given before there was a tokenizer."""
        if self._collector.can_be_named:
            self._fix_probe(training)

    def _fix_probe(self, training: Training) -> None:
        self._try_noted(training, lambda: self._collector.fix(training.module, training.places))

    def _has_probe(self, training: Training) -> bool:
        """Whether the probe is fixed: the same answer, and the same probe, in all processes."""
        if training.is_alone:
            return self._collector.probe is not None
        return self._collector.is_shared(training.is_first, training.module, training.places)

    def validate(self, training: Training) -> None:
        """Analyse a validation, if it is its turn."""
        self.has_validated = True
        if not training.is_sanity_check:
            self._cost.end_validation()
        repeated = self.is_repeated(training)
        if not self._is_its_turn(training, repeated):
            return

        def run() -> None:
            self._pending = self._measure(training, self._masks(self._schedule.analysed))

        failure = self._reasons.attempt(run)
        if failure is not None and not repeated:
            self.leave_out(training, self.step(training), failure)

    def _is_its_turn(self, training: Training, repeated: bool, needs_probe: bool = True) -> bool:
        """Count this validation; whether it is analysed."""
        if not repeated:
            self._schedule.count_validation()
        if self.refused:
            return False
        ready = not needs_probe or self._collector.waits_for_a_batch or self._has_probe(training)
        return ready and self._schedule.is_turn

    def is_repeated(self, training: Training) -> bool:
        """Whether a resumed training runs a validation again that is already in its history."""
        known = self._latest is not None and self._latest >= training.logged_step
        return self.resumed and training.is_fit and known

    def step(self, training: Training) -> int:
        """The step of this validation's figures. Another Trainer's ``validate()`` counts from 0; ours never go back."""
        step = training.logged_step
        return step if training.is_fit else max([step, *(entry.step for entry in self.history.latest)])

    def taken(self) -> Measurement | None:
        """Returns what the latest validation found, once."""
        measurement, self._pending = self._pending, None
        return measurement

    def _masks(self, place: int) -> bool:
        """Whether tokens are masked at an analysed validation, by its place among them."""
        return place % self._choices.faithfulness_every_n == 0

    def _measure(self, training: Training, masks: bool) -> Measurement:
        settings, drawn = self._choices.settings, self._choices.heatmap_examples
        whose = "" if training.is_alone else " of the first process"
        progress = Progress(lambda: display_of(training.trainer), self._cost.analysis, whose)
        self._measurer.tell = progress.tell
        try:
            measurement = self._measurer.measure(
                training.module,
                self._collector,
                training.places,
                lambda probe: kept_maps(probe.lengths(), settings, drawn),
                training.quietly(),
                training.share,
                self._choices.masked_methods if masks else (),
            )
        finally:
            self._measurer.tell = None
            progress.end()
        self._cost.analysis = progress.seconds
        if training.is_fit:
            # A validation on its own says nothing: the training that follows has to.
            is_given = self._collector.name != "validation"
            every = self._choices.every_n_validations
            words = self._cost.words(len(measurement.names), settings.methods, every, is_given=is_given)
            if words is not None:
                say(training.trainer, words)
        return measurement

    def look(self, training: Training, step: int, validation: bool = True, written: Sequence[str] = ()) -> None:
        """Analyse the model outside of a validation: what is found is written, and cannot be monitored.

        Args:
            training: the training.
            step: the step of the figures.
            validation: whether it stands for a validation, the one before the first step; else for a training step.
            written: kinds of results that were written before the training was interrupted.
        """
        if self.refused or not self._has_probe(training):
            if not validation and not self.refused:
                self.refuse(training, NO_PROBE_YET)
            return

        def run() -> None:
            # Before the first step there is no average of weights yet.
            with nullcontext() if validation else self._as_validated(training):
                # Training steps lie between the validations that are counted.
                masked = self._masks(0) if validation else self._choices.faithfulness_every_n == 1
                measurement = self._measure(training, masked)
            self.publish(training, measurement, step, monitored(measurement, self.tag), validation=validation)

        with self._within(Moment(BASELINE if validation else STEP, step, training.epoch, list(written))):
            failure = self._reasons.attempt(run)
            if failure is not None:
                self.leave_out(training, step, failure)

    @contextmanager
    def _as_validated(self, training: Training) -> Iterator[None]:
        """The weights that a validation would see; a checkpoint that is written inside tells that they are not back."""
        with training.as_validated():
            moment = self._moment
            if moment is not None:
                moment.is_exchanged = training.is_averaging
            try:
                yield
            finally:
                if moment is not None:
                    moment.is_exchanged = False

    def begin_steps(self, training: Training) -> None:
        """The training steps begin: analyse the model before the first one, or make up for what a checkpoint owes."""
        self._batch_epoch = training.epoch
        written: Sequence[str] = ()
        if self.resumed:
            written = self._owed.written if self._owed is not None and self._owed.kind == BASELINE else ()
            self.go_on(training)
            if not training.is_untrained or self.history.analyses:
                return
        elif training.step:
            return
        if training.trainer.enable_validation and not self.refused:
            self.name_given_probe(training)
            self.look(training, 0, written=written)

    def go_on(self, training: Training) -> None:
        """A training goes on from a checkpoint: make up for what Lightning leaves out.

        The weights are still those it was due for. It is written and remembered. It cannot be monitored: to those who
        monitor, there was no validation.
        """
        self._reasons.attempt(lambda: self._collector.compare_tokenizers(training.module, training.places))
        owed, due = self._owed, self._due_epoch
        if owed is not None and owed.is_exchanged:
            training.put_weights_back()
            owed.is_exchanged = False
        if owed is not None and owed.kind == STEP and not (due is not None and self._schedule.next_is_turn):
            self.look(training, owed.step or training.step, validation=False, written=owed.written)
        validation = owed if owed is not None and owed.kind == VALIDATION else None
        if training.goes_on_validating:
            # Lightning itself goes on with it, so that it is looked at as any other.
            self._carried = [] if validation is None else validation.written
        else:
            self._seen_batches = training.batches
            if due is not None:
                self._make_up(training, due, validation)
        self._owed, self._due_epoch = None, None

    def _make_up(self, training: Training, epoch: int, owed: Moment | None) -> None:
        """Analyse a validation that Lightning leaves out, or say why it is missing."""
        self._begin(Moment(VALIDATION, None, epoch) if owed is None else owed)
        # From here on, the moment itself tells what is owed.
        self._owed, self._due_epoch, self.resumed = None, None, False
        why = self._why_not_made_up(training)
        if not why:
            swapped = owed is not None and owed.has_validation_weights
            with nullcontext() if swapped else self._as_validated(training):
                self.validate(training)
            measurement = self.taken()
            if measurement is not None:
                step, scalars = self.step(training), monitored(measurement, self.tag)
                self._reasons.attempt(lambda: self.publish(training, measurement, step, scalars, epoch))
        elif self._is_its_turn(training, repeated=False, needs_probe=False):
            self._reasons.say(LEFT_OUT + why)
            self.leave_out(training, self.step(training), LEFT_OUT + why)
        self.resumed, self._moment = True, None

    def _why_not_made_up(self, training: Training) -> str:
        """Why the validation that a checkpoint owes cannot be analysed now; empty where it can."""
        strangers = act_as_a_validation_starts(training.trainer, training.module)
        if strangers:
            # They may exchange the weights, and what else they do is not ours to call.
            why = (
                f"which weights it would have been made with is up to what {', '.join(strangers)} does as a validation"
            )
            return f"{why} starts."
        if self._collector.waits_for_a_batch:
            why = "the probe's batches are of a class of their own, which a checkpoint does not hold, so they wait for"
            return f"{why} the next validation's."
        self.name_given_probe(training)
        if not self.refused and not self._has_probe(training):
            return "no validation had shown enough examples for the probe yet."
        return ""

    def publish(
        self,
        training: Training,
        measurement: Measurement,
        step: int,
        scalars: Mapping[str, float],
        epoch: int | None = None,
        validation: bool = True,
    ) -> None:
        """Remember a measurement, and write it.

        Args:
            training: the training.
            measurement: what was found.
            step: the step at which it is logged.
            scalars: tag -> figure, beside those by layer.
            epoch: the epoch, if it is not the current one.
            validation: whether a validation asked for it.

        Raises:
            GlobEncError: another process failed at it and ``on_error="raise"``; or whatever failed here.
        """
        epoch = training.epoch if epoch is None else epoch
        entry = history_entry(measurement, step, epoch, validation)
        self.history.append(entry if self._keeps_rows else entry.without_rows())
        entry = self.history[-1]
        if validation:
            self._latest = step
        probe, settings = self._collector.probe, self._choices.settings
        names = class_names(training.module, measurement.encoder, measurement.task)
        if probe is not None:
            origin, call = self._collector.origin, self._measurer.call_in_words()
            truths = [one.truth for one in verdicts(measurement, probe, names)]
            text = texts_of(measurement, probe).shown
            masked = self._choices.masked_methods
            self.history.about = about(measurement, probe, settings, origin, call, truths, text, masked)
        if measurement.unmasked:
            text = f"GlobEncCallback: {without_faithfulness(measurement)}"
            self._reasons.say(text)
            self._reasons.note(self.history, step, text)
        unsigned = self._measurer.why_unsigned()
        if unsigned and not len(measurement.left_out):
            # The analysis has warned of it.
            self._reasons.note(self.history, step, f"GlobEncCallback: signed=True gives no scores: {unsigned}.")
        for message, kind in remarks(measurement, settings, self._choices.encoder_call):
            self._reasons.say(message, kind)
        failure: Exception | None = None
        if training.is_first:
            written = {**scalars, **by_layer(measurement, self.tag)}
            try:
                done = [] if self._moment is None else self._moment.written
                self._output.write(self._destination(training), measurement, probe, self.history, names, written, done)
                # Also where it was written already: a resume takes back what its checkpoint does not know of.
                self._keep(training, measurement, entry)
            except Exception as error:
                failure = error
        if self._choices.on_error == "raise" and not training.is_alone:
            # A training that ends in one process has to end in all of them.
            trouble = processes.from_first(None if failure is None else f"{type(failure).__name__}: {failure}")
            if trouble and failure is None:
                raise GlobEncError(f"in the process of rank 0: {trouble}")
        if failure is not None:
            raise failure

    def _keep(self, training: Training, measurement: Measurement, entry: HistoryEntry) -> None:
        """Write a measurement into the record, if there is one and it is no trial."""
        keeper, probe, about = self._keeper, self._collector.probe, self.history.about
        if keeper is not None and probe is not None and about is not None and not training.is_trial:
            self._reasons.attempt(lambda: keeper.write(measurement, probe, entry, about, entry.validation))

    def _destination(self, training: Training) -> Destination:
        now = time.time() + self._ahead
        return Destination(training.loggers, self.tag, self.session, self.layouts(), training.is_trial, now)

    def leave_out(self, training: Training, step: int, reason: str) -> None:
        """Remember that an analysis failed, and show that and why."""
        self.history.missing_steps.append(step)
        self.history.reasons.append((step, shortened(reason)))
        self._show_missing(training, self.history.analyses - 1, step, reason)

    def refuse(self, training: Training, reason: str) -> None:
        """Say why there are no figures, once."""
        self._reasons.say(reason)
        self._reasons.note(self.history, self.step(training), reason)

    def _try_noted(self, training: Training, job: Callable[[], None]) -> None:
        """Do something that must not stop a training; its failure is a reason why there are no figures."""
        failure = self._reasons.attempt(job)
        if failure is not None:
            self._reasons.note(self.history, self.step(training), failure)

    def show_reasons(self, training: Training) -> None:
        """Write the reasons that are new to where they are seen though warnings are switched off."""
        reason = self._reasons.to_show(self.history)
        if reason:
            # A note of the first validation's place, as long as no validation takes it.
            self._show_missing(training, None if self.history.analyses else 0, self.step(training), reason)

    def _show_missing(self, training: Training, ordinal: int | None, step: int, reason: str) -> None:
        if training.is_first:
            self._output.write_missing(self._destination(training), self.history, ordinal, step, training.epoch, reason)

    def let_go(self) -> None:
        """Forget the model: a training has ended."""
        self._measurer.let_go()

    def __getstate__(self) -> dict[str, Any]:
        """What can travel: the callback that owns this says anew whose layouts are written."""
        return {**self.__dict__, "layouts": dict}

    def state_dict(self) -> dict[str, Any]:
        """Returns the probe and the history, in tensors and primitives, for a checkpoint.

        Where a record is kept, a pointer to it stands for the entries that it gives back.
        """
        history, validations, latest = self.history, self._schedule.validations, self._latest
        moment = self._moment or self._owed
        if self._moment is not None:
            before = self._before
            history, validations, latest = history.until(before), before.validations, before.latest
        pointer = None
        if self._keeper is not None:
            pointer, kept = self._keeper.pointer(history.latest)
            history = history.with_latest(kept)
        return {
            "probe": self._collector.state(),
            "num_examples": self._choices.num_examples,
            **history.state_dict(),
            "described": dict(self._output.described),
            "validations": validations,
            "session": self.session,
            "until": time.time() + self._ahead,
            "owed": None if moment is None else moment.state(),
            **({} if pointer is None else {"record": pointer, "latest": latest}),
        }

    def note_what_is_owed(self, state: dict[str, Any], training: Training, ours: Any) -> None:
        """Note in a checkpoint which validation or training step its weights are still to be analysed for.

        Args:
            state: what :meth:`state_dict` gave; completed.
            training: the training.
            ours: the callback.
        """
        moment, trainer = self._moment, training.trainer
        owed = validation_is_owed(trainer, self._seen_batches, self._batch_epoch)
        state["due_epoch"] = training.epoch if owed else self._due_epoch
        if moment is not None and moment.kind == VALIDATION:
            state["due_epoch"] = moment.epoch
            averaged = training.is_within_validation and has_averaged_weights(trainer, ours, self.is_at_end)
            state["owed"]["has_validation_weights"] = averaged or moment.has_validation_weights
        elif moment is None and self._owed is None and training.is_fit and self._schedule.is_pending(training.step):
            state["owed"] = Moment(STEP, training.step, training.epoch).state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called."""
        history = History.from_state_dict(state)
        latest = state.get("latest", next((one.step for one in reversed(history) if one.validation), None))
        if state.get("record") is not None:
            # An entry that cannot be read back is missing in the pictures; whatever else was kept goes on.
            self._reasons.attempt(lambda: self._restore_recorded(history, state["record"]))
        if state.get("session") == self.session:
            # A trial run ends like this, and leaves nothing behind.
            self._collector.go_back(state["probe"])
            self._pending, self._seen_batches = None, -1
            if self._keeper is not None:
                self._keeper.forget_after(max((entry.step for entry in history.latest), default=-1))
        else:
            self._collector.restore(state["probe"], state["num_examples"])
            self._output.described = dict(state["described"])
            # Earlier versions noted no more than a validation that was about to come.
            self._due_epoch, self._owed = state.get("due_epoch"), Moment.from_state(state.get("owed"))
            self.resumed = True
            self._keep_order(float(state.get("until", state.get("session", 0.0))))
        if not self._keeps_rows:
            history.drop_rows()
        self.history, self._latest, self._schedule.validations = history, latest, state["validations"]

    def _restore_recorded(self, history: History, pointer: Mapping[str, Any]) -> None:
        """Put the entries that a checkpoint's pointer stands for into a history."""
        kept = history.latest
        entries = recorded(pointer, kept) if self._keeper is None else self._keeper.restored(pointer, kept)
        history[history.start :] = entries
