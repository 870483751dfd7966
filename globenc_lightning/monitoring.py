"""Looks at a training: takes the probe, analyses the model when it is time, writes and remembers what was found.

What a Trainer is comes in as a :class:`~globenc_lightning.lightning_facts.Training`, at each of its moments.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from globenc_lightning import processes, sharding
from globenc_lightning.choices import Choices
from globenc_lightning.collecting import Collector
from globenc_lightning.errors import GlobEncError
from globenc_lightning.lightning_facts import Training, act_as_a_validation_starts
from globenc_lightning.measurement import History, HistoryEntry, Measurement, about, history_entry
from globenc_lightning.measuring import Measurer
from globenc_lightning.reasons import Reasons, shortened
from globenc_lightning.record.keeping import RecordKeeper, recorded
from globenc_lightning.remarks import remarks
from globenc_lightning.report.dashboard.records import kept_maps
from globenc_lightning.report.names import class_names
from globenc_lightning.report.output import TAG, Destination, Output, by_layer, monitored
from globenc_lightning.report.texts import texts_of
from globenc_lightning.report.verdicts import verdicts
from globenc_lightning.schedule import Schedule

LEFT_OUT = (
    "GlobEncCallback: the checkpoint is from between a training step and the validation after it, which Lightning "
    "leaves out on resume. It is missing here, too: "
)
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
        layouts: tag -> methods, of each callback of the Trainer that writes a layout for Custom Scalars.
        resumed: whether the training goes on from a checkpoint and has not trained since.
        refused: whether the model is one that is not analysed at all.
        has_validated: whether the validation that is running was looked at already.
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
        self.layouts: Callable[[], Mapping[str, Sequence[str]]] = dict
        self.resumed = False
        self.refused = False
        self._choices = choices
        self._schedule = schedule
        self._reasons = reasons
        self._collector = collector
        self._keeper = keeper
        self._measurer = Measurer(choices.settings, choices.forward, choices.decision, choices.encoder_call)
        self._output = Output(choices.settings, choices.heatmap_examples, reasons)
        self._due_epoch: int | None = None
        self._latest: int | None = None
        self._pending: Measurement | None = None
        self.has_validated = False

    def begin_session(self, model: Any, now: float, tag: str) -> None:
        """A Trainer begins something: a training, or a validation on its own."""
        self._measurer.let_go(but_for=model)
        self._collector.begin_sharing()
        # A state that comes back within the session that wrote it, as finders of a learning rate or a batch size bring
        # it back, is no resumed training: so all processes have to know the session by the same number.
        if self.session:
            # Of the training before; a state that was loaded before the first one counts.
            self.resumed, self._due_epoch = False, None
        self.session, self.tag = now, tag

    def begin_training(self, training: Training) -> None:
        """A training begins, or goes on."""
        self._reasons.begin()
        if not self.resumed and training.step == 0:
            # Another training: its pictures and reasons start anew, while the history keeps everything.
            self.history.begin()
            self._latest = None
            if self._keeper is not None:
                self._keeper.begin()
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
        self._pending, self.has_validated = None, False
        self._collector.begin_validation()

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
        repeated = self.is_repeated(training)
        if not self._is_its_turn(training, repeated):
            return

        def run() -> None:
            self._pending = self._measure(training)

        failure = self._reasons.attempt(run)
        if failure is not None and not repeated:
            self.leave_out(training, self.step(training), failure)

    def _is_its_turn(self, training: Training, repeated: bool) -> bool:
        """Count this validation; whether it is analysed."""
        if not repeated:
            self._schedule.count_validation()
        ready = not self.refused and (self._collector.waits_for_a_batch or self._has_probe(training))
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

    def _measure(self, training: Training) -> Measurement:
        settings, drawn = self._choices.settings, self._choices.heatmap_examples
        return self._measurer.measure(
            training.module,
            self._collector,
            training.places,
            lambda probe: kept_maps(probe.lengths(), settings, drawn),
            training.quietly(),
            training.share,
        )

    def look(self, training: Training, step: int, validation: bool = True) -> None:
        """Analyse the model outside of a validation: what is found is written, and cannot be monitored."""
        if self.refused or not self._has_probe(training):
            if not validation and not self.refused:
                self.refuse(training, NO_PROBE_YET)
            return

        def run() -> None:
            # Before the first step there is no average of weights yet.
            with nullcontext() if validation else training.as_validated():
                measurement = self._measure(training)
            self.publish(training, measurement, step, monitored(measurement, self.tag), validation=validation)

        failure = self._reasons.attempt(run)
        if failure is not None:
            self.leave_out(training, step, failure)

    def go_on(self, training: Training) -> None:
        """A training goes on from a checkpoint: make up for the validation that Lightning leaves out.

        The weights are still those it was due for. It is written and remembered. It cannot be monitored: to those who
        monitor, there was no validation.
        """
        self._reasons.attempt(lambda: self._collector.compare_tokenizers(training.module, training.places))
        if self._due_epoch is None:
            return
        epoch, self._due_epoch, self.resumed = self._due_epoch, None, False
        strangers, why = act_as_a_validation_starts(training.trainer, training.module), ""
        if strangers:
            # They may exchange the weights, and what else they do is not ours to call.
            why = (
                f"which weights it would have been made with is up to what {', '.join(strangers)} does as a validation"
            )
            why += " starts."
        elif self._collector.waits_for_a_batch:
            why = "the probe's batches are of a class of their own, which a checkpoint does not hold, so they wait for"
            why += " the next validation's."
        if not why:
            with training.as_validated():
                self.validate(training)
        elif self._is_its_turn(training, repeated=False):
            self._reasons.say(LEFT_OUT + why)
            self.leave_out(training, self.step(training), LEFT_OUT + why)
        measurement = self.taken()
        if measurement is not None:
            step, scalars = self.step(training), monitored(measurement, self.tag)
            self._reasons.attempt(lambda: self.publish(training, measurement, step, scalars, epoch))
        self.resumed = True

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
        self.history.append(entry)
        if validation:
            self._latest = step
        probe, settings = self._collector.probe, self._choices.settings
        names = class_names(training.module, measurement.encoder, measurement.task)
        if probe is not None:
            origin, call = self._collector.origin, self._measurer.call_in_words()
            truths = [one.truth for one in verdicts(measurement, probe, names)]
            text = texts_of(measurement, probe).shown
            self.history.about = about(measurement, probe, settings, origin, call, truths, text)
        for message, kind in remarks(measurement, settings, self._choices.encoder_call):
            self._reasons.say(message, kind)
        failure: Exception | None = None
        if training.is_first:
            written = {**scalars, **by_layer(measurement, self.tag)}
            try:
                self._output.write(self._destination(training), measurement, probe, self.history, names, written)
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
        return Destination(training.loggers, self.tag, self.session, self.layouts(), training.is_trial)

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
        history, pointer = self.history, None
        if self._keeper is not None:
            pointer, kept = self._keeper.pointer(history.latest)
            history = history.with_latest(kept)
        return {
            "probe": self._collector.state(),
            "num_examples": self._choices.num_examples,
            **history.state_dict(),
            "described": dict(self._output.described),
            "validations": self._schedule.validations,
            "session": self.session,
            **({} if pointer is None else {"record": pointer, "latest": self._latest}),
        }

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
            self._pending = None
            if self._keeper is not None:
                self._keeper.forget_after(max((entry.step for entry in history.latest), default=-1))
        else:
            self._collector.restore(state["probe"], state["num_examples"])
            self._output.described = dict(state["described"])
            self._due_epoch = state.get("due_epoch")
            self.resumed = True
        self.history, self._latest, self._schedule.validations = history, latest, state["validations"]

    def _restore_recorded(self, history: History, pointer: Mapping[str, Any]) -> None:
        """Put the entries that a checkpoint's pointer stands for into a history."""
        kept = history.latest
        history[history.start :] = (
            recorded(pointer, kept) if self._keeper is None else self._keeper.restored(pointer, kept)
        )
