"""Records the figures of saved checkpoints, as the callback records those of a training.

``python -m globenc_lightning.record.replay`` is the command ``globenc replay``.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from globenc_lightning.choices import Choices
from globenc_lightning.collecting import Collector
from globenc_lightning.errors import EmptyProbeError, ProbeError, RecordError, warn
from globenc_lightning.functional import METHODS
from globenc_lightning.lightning_facts import without_logging
from globenc_lightning.measurement import About, History, HistoryEntry, Measurement, about, history_entry
from globenc_lightning.measuring import Measurer
from globenc_lightning.probe import ProbeSet
from globenc_lightning.reasons import Reasons
from globenc_lightning.record.reading import Record
from globenc_lightning.record.schema import run_name
from globenc_lightning.record.writing import RecordOptions, RunRecord
from globenc_lightning.remarks import without_faithfulness
from globenc_lightning.report.dashboard.records import kept_maps
from globenc_lightning.report.names import class_names
from globenc_lightning.report.output import TAG, Destination, Output, by_layer, monitored
from globenc_lightning.report.texts import texts_of
from globenc_lightning.report.verdicts import verdicts
from globenc_lightning.settings import AUTO, Settings, Target
from globenc_lightning.task.steps import steps_of


class Replay:
    """Measures models on one probe, one after the other, and writes what is found into a record.

    Args:
        folder: the record's folder.
        run: the run's name.
        probe: the examples: a :class:`ProbeSet`; texts, with a tokenizer; a batch, as the module's own step or the
            model takes it; or a data loader, whose first batches are taken.
        tokenizer: a tokenizer or the folder of one; None looks for one in the model.
        choices: what is computed; ``Choices(Settings())`` when None.
        options: what is recorded.
        extra: what is told of the run besides: seed, hyperparameters, in JSON's primitives.

    Attributes:
        history: what was found, the analyses included that the record held before.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        run: str = "replay",
        probe: Any = None,
        *,
        tokenizer: Any | None = None,
        choices: Choices | None = None,
        options: RecordOptions | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.record = RunRecord(folder, run_name(run), options)
        self.history = History()
        self._choices = choices or Choices(Settings())
        self._reasons = Reasons("raise")
        self._batches: Iterator[Any] | None = None
        given = probe
        if _is_loader(probe):
            self._batches, given = iter(probe), None
        elif probe is not None and not isinstance(probe, ProbeSet) and not _is_texts(probe):
            self._batches, given = iter([probe]), None
        self._collector = Collector(given, tokenizer, self._choices, self._reasons)
        self._holders = [probe, *(getattr(probe, name, None) for name in ("collate_fn", "dataset"))]
        self._extra = dict(extra or {})
        self._output = Output(self._choices.settings, self._choices.heatmap_examples, self._reasons)

    def go_on(self) -> list[int]:
        """Take up the analyses that the record holds already; returns their steps."""
        self.history = History(self.record.entries())
        return [entry.step for entry in self.history]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the probe of a callback's state in a checkpoint.

        Raises:
            ProbeError: its batches are of classes that a checkpoint does not hold.
        """
        self._collector.restore(state["probe"], state["num_examples"])
        if self._collector.waits_for_a_batch:
            raise ProbeError(
                "the probe in the checkpoint is made of batches of classes of their own, which a checkpoint does not "
                "hold: give the validation loader as the probe."
            )

    def measure(self, model: nn.Module, step: int, epoch: int = 0, to: Destination | None = None) -> HistoryEntry:
        """Measure a model, and write what is found.

        Args:
            model: a LightningModule, a Hugging Face model with a head, or any module that :func:`attribute` takes. It
                is left as it is.
            step: the step that its figures are of.
            epoch: the epoch.
            to: loggers that get the pictures and the data of the GlobEnc tab, too.

        Returns:
            The figures.

        Raises:
            GlobEncError: the analysis cannot be done, with the reason.
        """
        choices, collector = self._choices, self._collector

        def places() -> list[Any]:
            return [model, *self._holders]

        self._collect(model, places)
        if collector.can_be_named:
            collector.fix(model, places)
        elif self.history or collector.probe is not None:
            collector.compare_tokenizers(model, places)
        measurer = Measurer(choices.settings, choices.forward, choices.decision, choices.encoder_call)
        measurement = measurer.measure(
            model,
            collector,
            places,
            lambda probe: kept_maps(probe.lengths(), choices.settings, choices.heatmap_examples),
            _quietly(model),
            masked=choices.masked_methods,
        )
        if measurement.unmasked:
            warn(without_faithfulness(measurement))
        probe = collector.agreed()
        names = class_names(model, measurement.encoder, measurement.task)
        told = self._about(measurement, probe, names, measurer.call_in_words())
        entry = history_entry(measurement, step, epoch, False)
        self._refuse_another_probe(told, step)
        self.record.write(measurement, probe, entry, told, extra=self._extra, validation=False)
        self.history.append(entry)
        self.history.about = told
        if to is not None:
            scalars = {**monitored(measurement, to.tag), **by_layer(measurement, to.tag)}
            self._output.write(to, measurement, probe, self.history, names, scalars, done=[])
        return entry

    def _collect(self, model: nn.Module, places: Callable[[], list[Any]]) -> None:
        """Take the probe out of the batches that were given, once."""
        batches, self._batches = self._batches, None
        if batches is None:
            return
        if not steps_of(model, self._choices.forward):
            # A model that has no step is called itself.
            self._collector.probe = _first_examples(batches, self._choices.num_examples)
            self._collector.fix(model, places)
            return
        self._collector.begin_validation()
        for place, batch in enumerate(batches):
            self._collector.collect(batch, place, 0, model, places)
            if not self._collector.is_wanted:
                return
        if self._collector.can_be_fixed:
            self._collector.fix(model, places)

    def _refuse_another_probe(self, told: About, step: int) -> None:
        """Refuse to put figures beside those of other examples.

        Raises:
            RecordError: the run's other analyses are of another probe.
        """
        if not set(self.record.steps()) - {step}:
            return
        recorded = Record.open(self.record.folder).about(self.record.run).get("probe")
        if recorded != told.probe:
            raise RecordError(
                f"the run {self.record.run} in {self.record.folder} is of another probe ({recorded}) than this "
                f"analysis ({told.probe}), so their figures cannot be compared: choose another run or folder."
            )

    def _about(self, measurement: Measurement, probe: ProbeSet, names: Sequence[str] | None, call: str) -> About:
        truths = [one.truth for one in verdicts(measurement, probe, names)]
        text = texts_of(measurement, probe).shown
        chosen = self._choices
        return about(
            measurement, probe, chosen.settings, self._collector.origin, call, truths, text, chosen.masked_methods
        )


def record_checkpoint(
    model: nn.Module,
    probe: Any,
    *,
    step: int,
    folder: str | os.PathLike[str],
    run: str = "replay",
    epoch: int = 0,
    tokenizer: Any | None = None,
    num_examples: int = 16,
    methods: Sequence[str] = METHODS,
    target: Target = "predicted",
    readout: str = AUTO,
    normalize: bool = False,
    exclude_special_tokens: bool = False,
    forward: Callable[..., Any] | None = None,
    decision: int | str = 0,
    encoder_call: int = 0,
    options: RecordOptions | None = None,
    extra: Mapping[str, Any] | None = None,
    aggregation: str = "rollout",
    references: Sequence[str] = ("saliency",),
    signed: bool = False,
    faithfulness: bool | Sequence[str] = False,
) -> HistoryEntry:
    """Measure one saved model on a probe and write what is found into a record, as the callback does in a training.

    Args:
        model: a LightningModule, a Hugging Face model with a head, or any module that :func:`attribute` takes.
        probe: a :class:`ProbeSet`; texts, with a tokenizer; a batch, as the module's own step or the model takes it; or
            a data loader, whose first ``num_examples`` examples are taken.
        step: the step that its figures are of; an analysis of the same step is replaced.
        folder: the record's folder, which several runs may share.
        run: the run's name.
        epoch: the epoch.
        tokenizer: a tokenizer or the folder of one; None looks for one in the model.
        num_examples: how many examples are taken from batches.
        methods: as for :class:`GlobEncCallback`.
        target: as for :class:`GlobEncCallback`.
        readout: as for :class:`GlobEncCallback`.
        normalize: as for :class:`GlobEncCallback`.
        exclude_special_tokens: as for :class:`GlobEncCallback`.
        forward: as for :class:`GlobEncCallback`.
        decision: as for :class:`GlobEncCallback`.
        encoder_call: as for :class:`GlobEncCallback`.
        options: what is recorded.
        extra: what is told of the run besides, such as ``{"seed": 1}``.
        aggregation: as for :class:`GlobEncCallback`.
        references: as for :class:`GlobEncCallback`.
        signed: as for :class:`GlobEncCallback`.
        faithfulness: as for :class:`GlobEncCallback`.

    Returns:
        The figures.

    Raises:
        GlobEncError: the analysis cannot be done, or the record cannot be written, with the reason.
        ValueError: an argument that cannot be used.

    Example:
        >>> from globenc_lightning import record_checkpoint
        >>> record_checkpoint(model, texts, step=500, folder="record", tokenizer=tokenizer)  # doctest: +SKIP
    """
    settings = Settings(methods, target, readout, normalize, exclude_special_tokens, aggregation, references, signed)
    choices = Choices(
        settings,
        num_examples,
        forward=forward,
        decision=decision,
        encoder_call=encoder_call,
        faithfulness=faithfulness,
    )
    replay = Replay(folder, run, probe, tokenizer=tokenizer, choices=choices, options=options, extra=extra)
    return replay.measure(model, step, epoch)


def _first_examples(batches: Iterable[Any], number: int) -> ProbeSet:
    """Returns a probe of the first examples of some batches, of as many batches as that takes.

    Raises:
        ProbeError: no example has a real token, or a batch is of a form that the model cannot take.
    """
    probe: ProbeSet | None = None
    empty: EmptyProbeError | None = None
    for batch in batches:
        try:
            found = ProbeSet.from_batch(batch, limit=number - (0 if probe is None else len(probe)))
        except EmptyProbeError as error:
            empty = error
            continue
        joined = found if probe is None else probe.joined(found)
        if probe is not None and len(joined) == len(probe):
            warn(
                f"the probe has {len(probe)} of {number} examples: the next batch has entries of other names or "
                "shapes, so that its examples cannot be put beside them."
            )
            break
        probe = joined
        if len(probe) >= number:
            break
    if probe is None:
        raise empty or EmptyProbeError("the probe is empty: the loader gives no batch.")
    return probe


def event_files(folder: Path, session: float) -> Destination:
    """Returns TensorBoard event files in a folder as the place where pictures and the data of the tab go."""
    logger: Any = load_tensorboard_logger()
    return Destination([logger(str(folder.parent), name="", version=folder.name)], TAG, session, {})


def load_tensorboard_logger() -> Any:
    """Returns Lightning's logger for TensorBoard, of whichever of its two packages is installed."""
    name = "pytorch_lightning" if importlib.util.find_spec("pytorch_lightning") else "lightning.pytorch"
    return importlib.import_module(f"{name}.loggers").TensorBoardLogger


def _quietly(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which what a LightningModule logs goes nowhere."""
    module: Any = model
    return without_logging(module) if callable(getattr(model, "log", None)) else nullcontext()


def _is_loader(probe: Any) -> bool:
    known = isinstance(probe, Mapping | ProbeSet | str | list | tuple)
    return isinstance(probe, Iterable) and not known and hasattr(probe, "dataset")


def _is_texts(probe: Any) -> bool:
    return isinstance(probe, str) or (
        isinstance(probe, Sequence) and bool(probe) and all(isinstance(one, str) for one in probe)
    )


if __name__ == "__main__":
    import sys

    from globenc_lightning.record.command import main

    sys.exit(main(["replay", *sys.argv[1:]]))
