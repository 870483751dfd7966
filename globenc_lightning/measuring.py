"""Measures a probe: finds what is decided, analyses it, in one process or in several, and puts the shares together."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from globenc_lightning import processes
from globenc_lightning.analysis import Reader
from globenc_lightning.collecting import Collector, Places, assumed_probe
from globenc_lightning.errors import CollectiveError, GlobEncError, ModelCallError, UnsupportedEncoderError
from globenc_lightning.measurement import Measurement, Tell, measure, put_together
from globenc_lightning.planning import find
from globenc_lightning.probe import ProbeSet
from globenc_lightning.settings import Settings
from globenc_lightning.sharding import whole_weights
from globenc_lightning.task.steps import steps_of

Shown = Callable[[ProbeSet], Mapping[int, Collection[str]]]
"""Says of which examples of a probe the whole last map is kept, and for which methods."""


class Measurer:
    """A model, what is known of how it decides, and its figures on a probe.

    Args:
        settings: what is computed.
        forward: the user's own way to call the module, ``forward(module, batch)``, or None.
        decision: which decision is explained, the number of a loss or the path of a head.
        encoder_call: which of several calls of an encoder is shown.

    Attributes:
        reader: the model, once it has been measured.
        assumed: why the module's own steps tell nothing, where the model is called itself instead; else None.
        tell: is told how many of this process's examples are analysed; None where nobody asks.
    """

    def __init__(
        self,
        settings: Settings,
        forward: Callable[..., Any] | None = None,
        decision: int | str = 0,
        encoder_call: int = 0,
    ) -> None:
        self.reader: Reader | None = None
        self.assumed: str | None = None
        self.tell: Tell | None = None
        self._settings = settings
        self._forward = forward
        self._decision = decision
        self._encoder_call = encoder_call

    def __getstate__(self) -> dict[str, Any]:
        """What can travel: everything but the way to the model, which is found again."""
        return {**self.__dict__, "reader": None}

    def let_go(self, but_for: nn.Module | None = None) -> None:
        """Forget the model, and what is known of it, unless it is this one."""
        if self.reader is not None and self.reader.model is not but_for:
            self.reader = None

    def call_in_words(self) -> str:
        """Returns what gives the decision."""
        reader = self.reader
        if reader is None or reader.replay is None or reader.replay.task is None:
            return "assumed: the module was called by itself" if self.assumed else "the module itself"
        return f"{reader.replay.step.name}: {reader.replay.task.function}"

    def measure(
        self,
        model: nn.Module,
        collector: Collector,
        places: Places,
        shown: Shown,
        quietly: AbstractContextManager[Any],
        share: tuple[int, int] | None = None,
        masked: Sequence[str] = (),
    ) -> Measurement:
        """Measure a probe on one's own, or each process its share and all of them the whole.

        Args:
            model: the module that is trained.
            collector: holds the probe; it is told what the analysis has found of it.
            places: where a tokenizer may be kept.
            shown: which maps are kept.
            quietly: a context in which the module's own step logs nothing.
            share: this process's rank and how many there are; None where it is alone. All processes call this.
            masked: the methods whose first tokens are masked; the same in all processes.

        Returns:
            The figures of the whole probe.

        Raises:
            GlobEncError: the analysis cannot be done, here or in another process.
        """
        found, failure, size = None, None, 0
        try:
            # All processes gather the weights, also one that has nothing to analyse: the others would wait for it.
            with whole_weights(model, together=share is not None):
                found, size = self._measured_here(model, collector, places, shown, quietly, share, masked)
        except Exception as error:
            if share is None:
                raise
            if isinstance(error, CollectiveError):
                # What was found in a step that caught the refusal is not the user's own decision.
                self.reader = None
            # The others have to hear of it before anything else happens here.
            failure = error
        measurement = _of_all(found, failure, size, share)
        if len(measurement.left_out) and bool(measurement.left_out.isnan().all()):
            # They were refused: nothing is shown or recorded as if there were some.
            measurement = replace(measurement, signed=[], left_out=measurement.left_out[:0])
        collector.saw(measurement)
        return measurement

    def why_unsigned(self) -> str:
        """Returns why there are no signed scores, once they were refused; else nothing."""
        return "" if self.reader is None else self.reader.unsigned

    def _measured_here(
        self,
        model: nn.Module,
        collector: Collector,
        places: Places,
        shown: Shown,
        quietly: AbstractContextManager[Any],
        share: tuple[int, int] | None,
        masked: Sequence[str],
    ) -> tuple[Measurement | None, int]:
        """Measure this process's share; also tells how many examples the whole probe has. See :meth:`measure`."""
        if self.reader is None:
            self.reader = Reader(model, self._forward, encoder_call=self._encoder_call)
        found, probe = None, collector.agreed()
        with quietly, processes.without_exchange():
            if probe.parts and self.reader.replay is None:
                probe = collector.probe = self._find_decision(model, self.reader, probe)
            mine = range(len(probe)) if share is None else range(share[0], len(probe), share[1])
            if collector.name_by_encoder(model, places, self.reader.structure):
                probe = collector.agreed()
            if mine:
                maps = shown(probe)
                found = self._measured(self.reader, probe, maps, mine, masked)
                if collector.name_by_encoder(model, places, self.reader.structure):
                    found = measure(self.reader, collector.agreed(), self._settings, maps, mine, self.tell, masked)
        return found, len(probe)

    def _measured(
        self,
        reader: Reader,
        probe: ProbeSet,
        maps: Mapping[int, Collection[str]],
        mine: Sequence[int],
        masked: Sequence[str],
    ) -> Measurement:
        try:
            return measure(reader, probe, self._settings, maps, mine, self.tell, masked)
        except ModelCallError as error:
            if self.assumed is None:
                raise
            # The lines that are offered are for forward=, which gets the user's own batch.
            told = str(error).replace("batch[", f"batch{reader.within}[")
            # Why the module's own steps tell nothing is the first thing to know.
            raise ModelCallError(f"{self.assumed}\nCalled by itself instead: {told}") from error

    def _find_decision(self, model: nn.Module, reader: Reader, probe: ProbeSet) -> ProbeSet:
        """Find what the module's own step decides on the probe; else the probe as the model itself may take it."""
        try:
            return find(reader, probe, steps_of(model, self._forward), self._decision, self._encoder_call)
        except (UnsupportedEncoderError, CollectiveError):
            raise
        except GlobEncError as error:
            assumed, within = (None, "") if self._forward or self._decision else assumed_probe(probe)
            if assumed is None:
                raise
            reader.within = within
            self.assumed = str(error)
            rank_zero_info(
                f"GlobEncCallback: what is decided was assumed, not found in the module's own steps ({error})"
            )
            return assumed


def _of_all(
    found: Measurement | None, failure: Exception | None, size: int, share: tuple[int, int] | None
) -> Measurement:
    """The figures of all processes; their errors are raised in each of them."""
    if share is None:
        if found is None:
            raise GlobEncError("nothing was measured: the probe is empty.")
        return found
    said = "" if failure is None else f"{type(failure).__name__}: {failure}"
    answers = processes.gathered((said, None if found is None else dict(vars(found))))
    if failure is not None:
        raise failure
    for rank, (trouble, _) in enumerate(answers):
        if trouble:
            raise GlobEncError(f"in the process of rank {rank}: {trouble}")
    shares = [range(rank, size, share[1]) for rank in range(share[1])]
    return put_together([(one, Measurement(**parts)) for one, (_, parts) in zip(shares, answers, strict=True) if parts])
