"""``GlobEncCallback``: Lightning's hooks and nothing else."""

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from globenc_lightning import processes, state_keys
from globenc_lightning.choices import Choices
from globenc_lightning.collecting import Collector
from globenc_lightning.functional import METHODS
from globenc_lightning.lightning_facts import (
    LENT_BY_TRAINER,
    Training,
    facts_of,
    is_alone,
    is_last_batch,
    log_monitored,
    run_of,
    validation_is_due,
)
from globenc_lightning.measurement import History
from globenc_lightning.monitoring import Monitor
from globenc_lightning.probe import ProbeSet
from globenc_lightning.reasons import Reasons
from globenc_lightning.record.keeping import Record, RecordKeeper, options_of
from globenc_lightning.report.output import TAG, monitored
from globenc_lightning.report.page import Charted
from globenc_lightning.restoring import find_state
from globenc_lightning.schedule import Schedule
from globenc_lightning.settings import AUTO, Settings, Target

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import Callback
elif "lightning.pytorch" in sys.modules or importlib.util.find_spec("pytorch_lightning") is None:
    # Lightning comes in two packages with the same classes. A Trainer of either takes a callback of the other, but
    # LightningCLI wants its own: so it is the one that the program uses, if that can be told.
    from lightning.pytorch.callbacks import Callback
else:
    from pytorch_lightning.callbacks import Callback

NO_VALIDATION = (
    "GlobEncCallback works at validation, and this training has none: give the Trainer a validation loader and the "
    "module a validation_step, and leave limit_val_batches above 0."
)
NONE_REACHED = (
    "GlobEncCallback: this training ended before its first validation, so it has no figures: train for longer, or "
    "validate more often (val_check_interval, check_val_every_n_epoch)."
)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _wrapping_the_inherited(method: _Method) -> _Method:
    """Let Lightning take a method for the inherited one.

    It refuses two callbacks of one key that have a ``state_dict`` of their own, when the Trainer is made and no
    callback can see its place in it yet. A method that wraps the inherited one is none of its own to it; from ``setup``
    on, the keys of one Trainer's callbacks differ.
    """
    return cast(_Method, wraps(getattr(Callback, method.__name__), assigned=(), updated=())(method))


class GlobEncCallback(Callback):
    """Shows what an encoder attends to while it is being fine-tuned.

    At every validation, GlobEnc (Modarressi et al., NAACL 2022) and its relatives are computed for a fixed set of
    probe examples: global token attributions that take in attention, residual connections and both LayerNorms of
    every layer, aggregated over the layers. Their Spearman correlation with gradient x input saliency and pictures of
    them go to the trainer's loggers. The training is not changed: not its weights, its random numbers nor its data.

    Logged, at the step of the validation's own metrics:

    - ``globenc/spearman/<method>`` by ``self.log``, so that ``ModelCheckpoint`` and ``EarlyStopping`` can monitor it:
      rho at the last layer, mean over the probe set;
    - ``globenc/spearman_by_layer/<method>/layer_<NN>``: the same for every layer, from 01;
    - with ``references=``: ``globenc/spearman_with/<reference>/<method>`` by ``self.log``, and
      ``globenc/spearman_with_by_layer/<reference>/<method>/layer_<NN>``;
    - with ``faithfulness=``: ``globenc/faithfulness/<method>``, ``globenc/sufficiency_gain/<method>`` and
      ``globenc/log_odds/<method>`` by ``self.log``: means over the examples that have such a figure;
    - images ``globenc/heatmap/...``, ``globenc/filmstrip/...``, ``globenc/correlation/...``, and ``globenc/signed/...``
      and ``globenc/faithfulness/...`` where they were asked for, where a logger can show images (TensorBoard, Weights &
      Biases, MLflow, Comet, Aim and others, see ``globenc_lightning/report/publish.py``);
    - one text ``globenc/about``, where a logger takes texts: all choices, the probe's sentences, and why there are no
      figures where there are none;
    - two records ``globenc/dashboard/...`` for the GlobEnc tab, where a logger writes TensorBoard's event files.

    The first point of every curve is the model before the first training step, if the sanity check has already shown
    enough examples or the probe was given.

    A validation whose analysis failed has no figures, rather than zeros: its filmstrip row is hatched, its curves have
    a gap, and nothing is passed to ``self.log``. A callback that monitors a figure then sees the last one again, since
    Lightning keeps it; write ``EarlyStopping(..., strict=False)`` for a training in which even the first may be
    missing (``ModelCheckpoint`` has no such switch and stops it). The same holds where rho is undefined for every
    example. Nothing is written within the last 16 MB of a disk: they are left to the training's own logs.

    The probe and the history travel in checkpoints, and a resumed training goes on with both. A validation that was
    due, or not finished, when the checkpoint was written is left out by Lightning on resume: its figures are made up
    for, with averaged weights where Lightning's ``WeightAveraging`` would have put them, and written, but not seen by
    those who monitor. They are missing where the module or a callback that is not Lightning's acts as a validation
    starts, or where no validation had shown the probe yet.

    A callback that is used in several trainings keeps its probe: make a new one for other data (the next fold, say). Of
    several callbacks in one Trainer (two heads, two targets, two probes), the second logs below ``globenc_2/``, the
    third below ``globenc_3/``. To resume such a training, make the same ones in the same order.

    Several processes (DDP) share the work: each analyses some of the examples, all of them remember the whole, and the
    first one logs it. The probe is what the first process was given or was shown. An error in one of them that is to
    stop the training is raised there as it is, and in the others by its text. With ``strategy="ddp_spawn"``, logs and
    checkpoints hold everything, but this object's ``history`` stays empty: Lightning brings back the weights and the
    monitored figures alone.

    A model that is sharded by ``fully_shard`` (FSDP2, Lightning's ``ModelParallelStrategy``) is gathered for each
    analysis and sharded again after it: meanwhile each process needs memory for all of its weights, in the precision
    that ``fully_shard`` computes in. A process that has no room for them says so, and the validation is missing. Models
    that are spread over the processes in other ways (tensor parallelism, FSDP1, ZeRO stage 3) are not analysed.

    Args:
        probe: the examples: None takes the first ``num_examples`` rows of the validation loop (its sanity check
            included), in batches of any form, as the module's own step gets them; or texts (with a tokenizer), a batch
            as a mapping of tensors, or a :class:`ProbeSet`. With ``forward=``, a batch of any form.
        num_examples: how many examples are taken from the validation loop.
        methods: any of ``METHODS``, or of their rivals ``"ALTI"`` and ``"Value-Zeroing"``.
        target: which score the saliency is taken of: ``"predicted"``, the one of the kind of decision that is trained
            (:data:`globenc_lightning.task.kinds.SCORES`); the logit of the ``"label"``; or a callable
            ``target(logits, batch)`` that returns one class index or one score per example.
        readout: which row of a rollout is compared and drawn: ``"auto"`` (where the decision reads), ``"cls"`` (first
            token), ``"last"`` or ``"mean"``.
        normalize: divide every map's rows by their sum before the rollout. The paper does not; ranks differ.
        exclude_special_tokens: leave special tokens out of the correlation (needs a tokenizer).
        every_n_validations: analyse the first validation and every n-th after it; in between, a callback that monitors
            a figure sees the last one again.
        heatmap_examples: how many examples get pictures.
        tokenizer: a tokenizer or the folder of one; None looks for one in the module, the datamodule, the data
            loaders and the checkpoint's folder, takes the one of the encoder that is shown where there are several,
            and shows token ids where there is none.
        forward: how the module gives the logits that are explained, ``forward(module, batch)``, in place of its own
            steps.
        on_error: ``"warn"`` lets the training go on when an analysis fails, ``"raise"`` stops it.
        custom_scalars: write a layout for TensorBoard's Custom Scalars tab: all methods in one chart, and all layers
            of a method in another. A run has one layout, and nothing tells us whether you have written one of your own
            (``add_custom_scalars``): whichever is written last is shown.
        decision: which decision is explained, where the step computes several losses that depend on an encoder: the
            number of the loss, from 0, or the path of the head that it is made of.
        encoder_call: which text is shown, where the decision is made of several calls of an encoder (query and
            passage): the number of the call, from 0.
        at_steps: training steps that are analysed besides the validations, as numbers of optimizer steps taken, or
            ``"log"`` for the powers of two before the first validation. They are written and remembered at that step,
            and cannot be monitored.
        record: where the figures of every token, layer and example are kept for studies, in Parquet files
            (``pip install 'globenc-lightning[record]'``): True for a folder ``globenc/`` in the logger's run folder; a
            folder, which several runs may share; or :class:`~globenc_lightning.record.writing.RecordOptions`.
            Checkpoints then hold a pointer to it in place of the history.
        aggregation: how the layers' maps are put together: ``"rollout"``, as in the paper, or ``"maxflow"`` (attention
            flow, Abnar & Zuidema, ACL 2020), which takes much longer.
        references: what the rows are compared with besides the ``"saliency"``: ``"integrated gradients"``, ``"HTA"``,
            ``"exact HTA"``.
        signed: compute signed contributions to the explained score, too (DecompX, Modarressi et al., ACL 2023, without
            biases).
        faithfulness: whether, or for which methods, it is measured how much the decision depends on the tokens that
            they rank first, by forward passes on masked copies of the probe.
        faithfulness_every_n: how often that is measured: at the first analysed validation and every n-th after it.

    Attributes:
        probe: the :class:`ProbeSet`, once it is fixed.
        history: one :class:`~globenc_lightning.history.HistoryEntry` per analysed validation, in a list that can
            save pictures of itself (:class:`~globenc_lightning.history.History`). ``history.reasons`` says why
            there are no figures, where there are none.

    Raises:
        ValueError: an argument that cannot be used, before any training starts.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from globenc_lightning import GlobEncCallback
        >>> trainer = Trainer(callbacks=[GlobEncCallback()], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        probe: ProbeSet | Mapping[str, Any] | Sequence[str] | None = None,
        *,
        num_examples: int = 16,
        methods: Sequence[str] = METHODS,
        target: Target = "predicted",
        readout: str = AUTO,
        normalize: bool = False,
        exclude_special_tokens: bool = False,
        every_n_validations: int = 1,
        heatmap_examples: int = 4,
        tokenizer: Any | None = None,
        forward: Callable[..., Any] | None = None,
        on_error: str = "warn",
        custom_scalars: bool = False,
        decision: int | str = 0,
        encoder_call: int = 0,
        at_steps: Sequence[int] | str | None = None,
        record: Record = None,
        aggregation: str = "rollout",
        references: Sequence[str] = ("saliency",),
        signed: bool = False,
        faithfulness: bool | Sequence[str] = False,
        faithfulness_every_n: int = 1,
    ) -> None:
        super().__init__()
        settings = Settings(
            methods, target, readout, normalize, exclude_special_tokens, aggregation, references, signed
        )
        self._choices = Choices(
            settings,
            num_examples,
            every_n_validations,
            heatmap_examples,
            forward,
            on_error,
            custom_scalars,
            decision,
            encoder_call,
            faithfulness,
            faithfulness_every_n,
        )
        self._schedule = Schedule(every_n_validations, at_steps)
        self._reasons = Reasons(on_error)
        self._collector = Collector(probe, tokenizer, self._choices, self._reasons)
        if decision != 0 and self._collector.is_called_itself:
            raise ValueError(
                "decision= chooses among the losses of the module's own steps, which are run on batches of the "
                "validation loop: leave probe= out, or say with forward= which logits are meant, for example "
                "forward=lambda module, batch: module.head(...)"
            )
        options = options_of(record)
        self._keeper = None if options is None else RecordKeeper(options)
        self._monitor = Monitor(self._choices, self._schedule, self._reasons, self._collector, self._keeper)
        self._place = 1
        self._looks_back = False

    @property
    def probe(self) -> ProbeSet | None:
        """The fixed examples; None before they are known."""
        return self._collector.probe

    @property
    def history(self) -> History:
        """What was found, one entry per analysed validation."""
        return self._monitor.history

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Find this callback's place among others, and begin a session."""
        same = [one for one in getattr(trainer, "callbacks", []) if isinstance(one, GlobEncCallback)]
        place = next((index for index, one in enumerate(same) if one is self), 0)
        tag = f"{TAG}_{place + 1}" if place else TAG
        now = time.time() if is_alone(trainer) else processes.from_first(time.time())
        self._monitor.begin_session(pl_module, now, tag)
        self._monitor.layouts = lambda: _layouts(same)
        if self._keeper is not None:
            run = run_of(trainer)
            self._keeper.place(run.folder, f"{run.name}-{tag}" if place else run.name, facts_of(pl_module, trainer))
        self._looks_back = stage != "fit" and bool(self.history)
        self._place = 1 + sum(one._key(1) == self._key(1) for one in same[:place])
        if place:
            rank_zero_info(f"GlobEncCallback number {place + 1} of this Trainer logs below {tag}/.")

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say once that nothing will be seen where nothing is validated."""
        training = Training(trainer, pl_module)
        self._monitor.begin_training(training)
        if not trainer.enable_validation:
            self._monitor.refuse(training, NO_VALIDATION)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Measure the model before the first training step, if the probe is known, or make up for what was left out."""
        training = Training(trainer, pl_module)
        self._schedule.begin(trainer.global_step)
        self._monitor.begin_steps(training)
        self._monitor.show_reasons(training)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """From here on, a validation is another one than those in the checkpoint."""
        self._monitor.begin_batch(Training(trainer, pl_module))

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Analyse a training step that was asked for, unless the validation that follows it does."""
        schedule = self._schedule
        asked = schedule.has_steps and schedule.takes(trainer.global_step)
        if asked and not (schedule.next_is_turn and validation_is_due(trainer)):
            training = Training(trainer, pl_module)
            self._monitor.look(training, trainer.global_step, validation=False)
            self._monitor.show_reasons(training)

    @override
    def on_validation_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Start to collect the probe anew: a sanity check shows the first rows, and the validation shows them again."""
        self._monitor.begin_validation(Training(trainer, pl_module))

    @override
    def on_validation_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the probe's batches as they pass by; asking a loader for them would move its random state."""
        self._monitor.see_batch(Training(trainer, pl_module), batch, batch_idx, dataloader_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Analyse after the last batch: callbacks that swap averaged weights in have not yet swapped them out."""
        if is_last_batch(trainer, batch_idx, dataloader_idx) and not self._monitor.has_validated:
            self._monitor.finish_collecting(Training(trainer, pl_module))
            if not trainer.sanity_checking:
                self._monitor.validate(Training(trainer, pl_module))

    @override
    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Log what was found."""
        if trainer.sanity_checking:
            self._monitor.end_sanity_check(Training(trainer, pl_module))
            return
        training, monitor = Training(trainer, pl_module), self._monitor
        monitor.is_at_end = True
        if not monitor.has_validated:
            # A loader that does not know its end has shown no last batch.
            monitor.finish_collecting(training)
            monitor.validate(training)
        measurement = monitor.taken()
        if measurement is not None:
            step, scalars = monitor.step(training), monitored(measurement, monitor.tag)
            # Lightning writes what it logs at its own step, and a validation on its own, or one that a resumed training
            # repeats, would go back or double a point. In a training we write: a logger that fails at a figure of ours
            # would end it from within Lightning. A validate() on its own prints what Lightning logs.
            new = not monitor.is_repeated(training)
            usual = new and step == training.logged_step and not training.is_fit
            self._reasons.attempt(lambda: log_monitored(trainer, pl_module, scalars, usual))
            if new:
                written = {} if usual else scalars
                self._reasons.attempt(lambda: monitor.publish(training, measurement, step, written))
        monitor.show_reasons(training)
        monitor.end_validation()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say why there is nothing to see where no validation was reached."""
        seen = self._schedule.validations or self.history.latest or self.history.reasons
        if trainer.enable_validation and not seen:
            training = Training(trainer, pl_module)
            self._monitor.refuse(training, NONE_REACHED)
            self._monitor.show_reasons(training)

    @override
    @_wrapping_the_inherited
    def state_dict(self) -> dict[str, Any]:
        """The probe and the history, in tensors and primitives."""
        return {**self._monitor.state_dict(), "made_of": self._choices.made_of(self._collector.name)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written; its probe goes before any other.

        After a training, ``validate()`` and ``test()`` look at a checkpoint's weights and go on from nowhere: what has
        been seen since is kept.
        """
        if not self._looks_back:
            self._reasons.attempt(lambda: self._monitor.load_state_dict(state_dict))

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Find the state of a callback whose key has changed, since the key is what Lightning looks it up by."""
        if not self._looks_back:
            states, name, probe = checkpoint.get("callbacks") or {}, type(self).__qualname__, self._collector.name
            taken = [one.state_key for one in getattr(trainer, "callbacks", []) if one is not self]
            key, old, reasons = self.state_key, self._generate_state_key, self._reasons
            reasons.attempt(lambda: find_state(states, name, key, self._choices, probe, taken, old, reasons))

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Note what is still to be analysed: a training that is resumed from here leaves it out."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            self._monitor.note_what_is_owed(state, Training(trainer, pl_module), self)

    @property
    @override
    def state_key(self) -> str:
        """Returns what Lightning finds this callback's state by, made of its class, its settings and its place.

        ``globenc_lightning/state_keys.py`` says what the digest is of, and how an older state is found again.
        """
        return self._key(self._place)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the module."""
        self._let_go()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Let go of the module: no teardown follows an exception."""
        self._let_go()

    def __getstate__(self) -> dict[str, Any]:
        """What can travel: everything but what a Trainer has lent."""
        return {name: value for name, value in self.__dict__.items() if name not in LENT_BY_TRAINER}

    def _let_go(self) -> None:
        self._monitor.let_go()
        for name in LENT_BY_TRAINER:
            self.__dict__.pop(name, None)

    def _key(self, place: int) -> str:
        return state_keys.state_key(type(self).__qualname__, self._choices.made_of(self._collector.name), place)


def _layouts(callbacks: Sequence[GlobEncCallback]) -> dict[str, Charted]:
    """What stands in a run's one layout for Custom Scalars: what each callback that wants one computes, by its tag."""
    return {
        one._monitor.tag: Charted(
            one._choices.settings.methods, one._choices.settings.further_references, one._choices.masked_methods
        )
        for one in callbacks
        if one._choices.custom_scalars
    }
