"""``GlobEncCallback``: Lightning's hooks and nothing else."""

import importlib.util
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor
from typing_extensions import override

from globenc_lightning import processes, state_keys
from globenc_lightning.analysis import AUTO, Reader, Settings, Target
from globenc_lightning.encoder.reading import find_encoders
from globenc_lightning.encoder.undisturbed import random_states_kept
from globenc_lightning.errors import (
    CollectiveError,
    EmptyProbeError,
    GlobEncError,
    ModelCallError,
    ProbeError,
    UnsupportedEncoderError,
    warn,
)
from globenc_lightning.functional import METHODS
from globenc_lightning.lightning_facts import (
    LENT_BY_TRAINER,
    act_as_a_validation_starts,
    holders,
    is_alone,
    is_last_batch,
    logged_step,
    sanity_check_saw_all,
    validation_is_due,
    weights_of_a_validation,
    without_logging,
)
from globenc_lightning.measurement import History, Measurement, about, history_entry, measure, put_together
from globenc_lightning.planning import find
from globenc_lightning.probe import ProbeSet, fingerprint, main_input
from globenc_lightning.remarks import remarks
from globenc_lightning.report import images, page, publish
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.dashboard.records import kept_maps, records
from globenc_lightning.report.names import class_names
from globenc_lightning.report.texts import texts_of
from globenc_lightning.report.verdicts import verdicts
from globenc_lightning.task.batches import copied, leaves, needs_template, size_of
from globenc_lightning.task.replaying import Part, part_of
from globenc_lightning.task.steps import steps_of
from globenc_lightning.tokenizers import (
    Shown,
    as_tokenizer,
    disagree,
    find_tokenizer,
    likeliest,
    tokenizers_held,
)

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import Callback
elif "lightning.pytorch" in sys.modules or importlib.util.find_spec("pytorch_lightning") is None:
    # Lightning comes in two packages with the same classes. A Trainer of either takes a callback of the other, but
    # LightningCLI wants its own: so it is the one that the program uses, if that can be told.
    from lightning.pytorch.callbacks import Callback
else:
    from pytorch_lightning.callbacks import Callback

TAG = "globenc"
MAX_REASON = 4000


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
    - images ``globenc/heatmap/...``, ``globenc/filmstrip/...``, ``globenc/correlation/...`` where a logger can show
      images (TensorBoard, Weights & Biases, MLflow, Comet, Aim and others, see
      :mod:`globenc_lightning.report.publish`);
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

    The probe and the history travel in checkpoints, and a resumed training goes on with both. A validation that was due
    when the checkpoint was written is left out by Lightning on resume: its figures are made up for, with averaged
    weights where Lightning's ``WeightAveraging`` would have put them, and written, but not seen by those who monitor.
    Where the module or a callback that is not Lightning's acts as a validation starts, they are missing.

    A callback that is used in several trainings keeps its probe: make a new one for other data (the next fold, say). Of
    several callbacks in one Trainer (two heads, two targets, two probes), the second logs below ``globenc_2/``, the
    third below ``globenc_3/``. To resume such a training, make the same ones in the same order.

    Several processes (DDP) share the work: each analyses some of the examples, all of them remember the whole, and the
    first one logs it. The probe is what the first process was given or was shown. An error in one of them that is to
    stop the training is raised there as it is, and in the others by its text. With ``strategy="ddp_spawn"``, logs and
    checkpoints hold everything, but this object's ``history`` stays empty: Lightning brings back the weights and the
    monitored figures alone. A model whose parameters are spread over the processes (FSDP, tensor parallelism) is not
    analysed.

    Args:
        probe: the examples: None takes the first ``num_examples`` rows of the validation loop (its sanity check
            included), in batches of any form, as the module's own step gets them; or texts (with a tokenizer), a batch
            as a mapping of tensors, or a :class:`ProbeSet`. With ``forward=``, a batch of any form.
        num_examples: how many examples are taken from the validation loop.
        methods: any of ``METHODS``.
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

    Attributes:
        probe: the :class:`ProbeSet`, once it is fixed.
        history: one :class:`~globenc_lightning.measurement.HistoryEntry` per analysed validation, in a list that can
            save pictures of itself (:class:`~globenc_lightning.measurement.History`). ``history.reasons`` says why
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
    ) -> None:
        super().__init__()
        self._settings = Settings(methods, target, readout, normalize, exclude_special_tokens)
        for name, value, least in (
            ("num_examples", num_examples, 1),
            ("every_n_validations", every_n_validations, 1),
            ("heatmap_examples", heatmap_examples, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        if (
            isinstance(decision, bool)
            or not isinstance(decision, int | str)
            or (isinstance(decision, int) and decision < 0)
        ):
            raise ValueError(
                f"decision must be the number of a loss, from 0, or the path of a head such as 'head'; got {decision!r}"
            )
        if isinstance(encoder_call, bool) or not isinstance(encoder_call, int) or encoder_call < 0:
            raise ValueError(f"encoder_call must be a whole number of at least 0; got {encoder_call!r}")
        if decision != 0 and forward is not None:
            raise ValueError(
                "decision= chooses among the losses of the module's own steps, which forward= takes the place of: give "
                "one of them, and have forward(module, batch) return the logits of the head that is meant"
            )
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be 'warn' or 'raise'; got {on_error!r}")
        if not isinstance(custom_scalars, bool):
            raise ValueError(f"custom_scalars must be True or False; got {custom_scalars!r}")
        if forward is not None and not callable(forward):
            raise ValueError(f"forward must be callable, forward(module, batch); got {type(forward).__name__}")
        self._num_examples = num_examples
        self._every_n_validations = every_n_validations
        self._heatmap_examples = heatmap_examples
        self._tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
        self._forward = forward
        self._code = {"target_code": state_keys.code_digest(target), "forward_code": state_keys.code_digest(forward)}
        self._on_error = on_error
        self._custom_scalars = custom_scalars
        self._decision = decision
        self._encoder_call = encoder_call
        self._assumed: str | None = None

        self.history = History()
        self.probe: ProbeSet | None = None
        self._texts: list[str] | None = None
        self._take_probe(probe)
        if decision != 0 and self._is_called_itself():
            raise ValueError(
                "decision= chooses among the losses of the module's own steps, which are run on batches of the "
                "validation loop: leave probe= out, or say with forward= which logits are meant, for example "
                "forward=lambda module, batch: module.head(...)"
            )
        self._probe_name = "validation" if probe is None else self._fingerprint()
        self._tag = TAG
        self._place = 1
        self._probe_is_shared = False
        self._resumed = False
        self._due_epoch: int | None = None
        self._refused = False
        self._collecting: list[Part] = []
        self._seen_batches = False
        self._template: Any = None
        self._unshared: str | None = None
        self._stored: Mapping[str, Any] | None = None
        self._looked_for_tokenizer = False
        self._named_by_encoder = False
        self._reader: Reader | None = None
        self._described: dict[str, str] = {}
        self._validations = 0
        self._pending: Measurement | None = None
        self._analyzed = False
        self._said: set[str] = set()
        self._unshown: list[str] = []
        self._session = 0.0
        self._looks_back = False

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Look at what the loop is about to do."""
        if self._reader is not None and self._reader.model is not pl_module:
            self._reader = None
        self._probe_is_shared = False
        # A state that comes back within the session that wrote it, as finders of a learning rate or a batch size bring
        # it back, is no resumed training: so all processes have to know the session by the same number.
        if self._session:
            # Of the training before; a state that was loaded before the first one counts.
            self._resumed, self._due_epoch = False, None
        self._session = time.time() if is_alone(trainer) else processes.from_first(time.time())
        self._looks_back = stage != "fit" and bool(self.history)
        same = [one for one in getattr(trainer, "callbacks", []) if isinstance(one, GlobEncCallback)]
        place = next((index for index, one in enumerate(same) if one is self), 0)
        self._tag = f"{TAG}_{place + 1}" if place else TAG
        self._place = 1 + sum(one._key(1) == self._key(1) for one in same[:place])
        if place:
            rank_zero_info(f"GlobEncCallback number {place + 1} of this Trainer logs below {self._tag}/.")

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say once that nothing will be seen where nothing is validated."""
        self._unshown = []
        if not self._resumed and trainer.global_step == 0:
            # Another training: its pictures and reasons start anew, while the history keeps everything.
            self.history.begin()
        self._refuse_shards(trainer, pl_module)
        if not trainer.enable_validation:
            self._refuse(
                trainer,
                "GlobEncCallback works at validation, and this training has none: give the Trainer a validation loader "
                "and the module a validation_step, and leave limit_val_batches above 0.",
            )

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Measure the model before the first training step, if the probe is already known."""
        if self._resumed:
            self._guarded(lambda: self._compare_tokenizers(trainer, pl_module))
            if self._due_epoch is not None:
                self._make_up(trainer, pl_module, self._due_epoch)
        elif trainer.global_step == 0 and trainer.enable_validation and not self._refused:
            self._name_given_probe(trainer, pl_module)
            if self._has_probe(trainer):
                failure = self._attempt(lambda: self._baseline(trainer, pl_module))
                if failure is not None:
                    self._leave_out(trainer, 0, failure)
        self._show_reasons(trainer)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """From here on, a validation is another one than those in the checkpoint."""
        self._resumed = False

    @override
    def on_validation_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Start to collect the probe anew: a sanity check shows the first rows, and the validation shows them again."""
        self._refuse_shards(trainer, pl_module)
        self._pending, self._analyzed, self._collecting, self._seen_batches = None, False, [], False

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
        if self._stored is not None:
            self._note(trainer, self._attempt(lambda: self._restore_like(trainer, pl_module, batch)))
        if self.probe is None and self._texts is None and not self._refused:
            if self._template is None:
                self._template = copied(batch)
            if trainer.is_global_zero:
                self._note(
                    trainer, self._attempt(lambda: self._collect(trainer, pl_module, batch, batch_idx, dataloader_idx))
                )

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
        if is_last_batch(trainer):
            self._finish_collecting(trainer, pl_module)
            if not trainer.sanity_checking:
                self._validate(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Log what was found."""
        if trainer.sanity_checking:
            return
        if not self._analyzed:
            # A loader that does not know its end has shown no last batch.
            self._finish_collecting(trainer, pl_module)
            self._validate(trainer, pl_module)
        if self._pending is not None:
            measurement, self._pending = self._pending, None
            step = self._step(trainer)
            # Lightning writes what it logs at its own step, and a validation on its own, or one that a resumed training
            # repeats, would go back or double a point. In a training we write: a logger that fails at a figure of ours
            # would end it from within Lightning. A validate() on its own prints what Lightning logs.
            new = not self._is_repeated(trainer)
            usual = new and step == logged_step(trainer) and trainer.state.fn != "fit"
            self._guarded(lambda: self._log_monitored(trainer, pl_module, measurement, usual))
            if new:
                monitored = None if usual else self._monitored(measurement)
                self._guarded(lambda: self._publish(trainer, measurement, step, monitored))
        self._show_reasons(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say why there is nothing to see where no validation was reached."""
        if trainer.enable_validation and not (self._validations or self.history.latest or self.history.reasons):
            self._refuse(
                trainer,
                "GlobEncCallback: this training ended before its first validation, so it has no figures: train for "
                "longer, or validate more often (val_check_interval, check_val_every_n_epoch).",
            )
            self._show_reasons(trainer)

    @override
    @_wrapping_the_inherited
    def state_dict(self) -> dict[str, Any]:
        """The probe and the history, in tensors and primitives."""
        return {
            "probe": self._probe_state(),
            "num_examples": self._num_examples,
            **self.history.state_dict(),
            "described": dict(self._described),
            "validations": self._validations,
            "session": self._session,
            "made_of": self._made_of(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written; its probe goes before any other.

        After a training, ``validate()`` and ``test()`` look at a checkpoint's weights and go on from nowhere: what has
        been seen since is kept.
        """
        if not self._looks_back:
            self._guarded(lambda: self._load(state_dict))

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Find the state of a callback whose key has changed, since the key is what Lightning looks it up by."""
        if not self._looks_back:
            self._guarded(lambda: self._find_state(trainer, checkpoint.get("callbacks") or {}))

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Note that a validation was about to come: a training that is resumed from here leaves it out."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            state["due_epoch"] = trainer.current_epoch if validation_is_due(trainer) else None

    @property
    @override
    def state_key(self) -> str:
        """What Lightning looks this callback's state up by: its class, a digest of its settings, and its place.

        The digest is of what the figures depend on and a new process can know as well: the probe, the methods, the
        target, the readout, ``normalize``, ``exclude_special_tokens``, and the code of the functions ``target`` and
        ``forward`` with the primitives that they hold, as they were when the callback was made. Callbacks of one
        Trainer that are the same in all of that (equal ones, or those that differ in ``num_examples``, the tokenizer,
        or a tensor that a target holds) are told apart by their order: the second one's key ends in ``_2``. So a script
        that makes the same callbacks in the same order finds every state again.

        A function that was edited, or is run by another version of Python, has another digest. Its state is then found
        by the other settings, the history goes on, and a warning says so. Checkpoints of earlier versions, whose keys
        were long, are read too.
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
        """What can travel: everything but the ways to the module, which are found again."""
        state = {name: value for name, value in self.__dict__.items() if name not in LENT_BY_TRAINER}
        return {**state, "_reader": None}

    def _key(self, place: int) -> str:
        return state_keys.state_key(type(self).__qualname__, self._made_of(), place)

    def _made_of(self) -> dict[str, Any]:
        """Everything that the state's key is made of, in primitives."""
        return {**self._named_settings(), **self._code}

    def _named_settings(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "probe": self._probe_name,
            "methods": list(settings.methods),
            "target": settings.target_name,
            "readout": settings.readout,
            "normalize": settings.normalize,
            "exclude_special_tokens": settings.exclude_special_tokens,
            **self._which(),
        }

    def _which(self) -> dict[str, Any]:
        """The arguments that earlier versions did not have, where they are not the default: keys stay the same."""
        given = {"decision": self._decision, "encoder_call": self._encoder_call}
        return {name: value for name, value in given.items() if value != 0}

    def _find_state(self, trainer: "pl.Trainer", states: dict[Any, Any]) -> None:
        """Give the state that this callback goes on with its key, if it has another one in this checkpoint."""
        if self.state_key in states:
            return
        others = [one for one in getattr(trainer, "callbacks", []) if one is not self]
        taken = [one.state_key for one in others]
        name, made_of = type(self).__qualname__, self._made_of()
        settings = [self._named_settings()]
        if self._settings.readout == AUTO:
            # The default of earlier versions, which is what the new one finds where a head reads the first token.
            settings.append({**self._named_settings(), "readout": "cls"})
        known, old_key = None, ""
        for one in settings:
            if known is None:
                old_key = self._generate_state_key(**one)
                known = state_keys.older_state(states, name, {**made_of, **one}, taken, old_key)
        if known is not None:
            edited = [one for one in ("target", "forward") if known != old_key and self._is_edited(states[known], one)]
            if known == old_key:
                rank_zero_info("GlobEncCallback: its state, which an earlier version wrote, is restored.")
            states[self.state_key] = states.pop(known)
            if edited:
                self._say(
                    f"GlobEncCallback: {' and '.join(edited)} is not the code that the checkpoint was written with (it "
                    "was edited, or this is another version of Python). The history goes on: its earlier figures are "
                    "those of the earlier code. Make a new callback and a new log folder to begin anew."
                )
            return
        found = [*state_keys.made_before(states, name, taken).values()]
        if found:
            now = state_keys.settings_of(made_of)
            was = min((state_keys.settings_of(one) for one in found), key=lambda one: len(_differences(one, now)))
            differences = "; ".join(_differences(was, now))
            self._say(
                "GlobEncCallback: the checkpoint holds the history of a callback with other settings, so this one "
                f"begins a new history: {differences}. Write the earlier settings to go on with it."
            )

    def _is_edited(self, state: Mapping[str, Any], function: str) -> bool:
        return bool(state["made_of"].get(f"{function}_code") != self._code[f"{function}_code"])

    @property
    def _missing_steps(self) -> list[int]:
        return self.history.missing_steps

    def _probe_state(self) -> Mapping[str, Any] | None:
        """The probe as a checkpoint takes it; one that a checkpoint held and that waits for a batch stays as it is."""
        if self.probe is None or self._stored is not None:
            return self._stored
        try:
            return self.probe.state_dict()
        except ProbeError as error:
            self._say(
                "GlobEncCallback: the probe does not travel in checkpoints, so a resumed training takes another: "
                f"{error}"
            )
            return None

    def _let_go(self) -> None:
        self._reader = None
        for name in LENT_BY_TRAINER:
            self.__dict__.pop(name, None)

    def _fingerprint(self) -> str:
        if self._texts is not None:
            return fingerprint(self._texts)
        return self.probe.fingerprint() if self.probe is not None else ""

    def _load(self, state: Mapping[str, Any]) -> None:
        history = History.from_state_dict(state)
        if state.get("session") == self._session:
            self._go_back(state, history)
            return
        if state["probe"] is not None and needs_template(state["probe"].get("parts")):
            self._stored = state["probe"]
        elif state["probe"] is not None:
            stored = ProbeSet.from_state_dict(state["probe"])
            if self._probe_name == "validation" and state["num_examples"] != self._num_examples:
                self._say(
                    f"GlobEncCallback: num_examples is {self._num_examples} now and was {state['num_examples']} when "
                    f"the checkpoint was written. Its {len(stored)} examples are kept, so that the curves go on."
                )
            self.probe, self._texts, self._collecting = stored, None, []
            self._looked_for_tokenizer = False
        self.history, self._described = history, dict(state["described"])
        self._validations = state["validations"]
        self._due_epoch = state.get("due_epoch")
        self._resumed = True

    def _go_back(self, state: Mapping[str, Any], history: History) -> None:
        """Be what we were when this session wrote a state: a trial run ends like this, and leaves nothing behind."""
        if state["probe"] is not None:
            # The same session: the probe is the one that it was, or was fixed since.
            if not needs_template(state["probe"].get("parts")):
                self.probe, self._texts = ProbeSet.from_state_dict(state["probe"]), None
        elif self._probe_name == "validation":
            self.probe, self._probe_is_shared = None, False
        self._collecting, self._pending = [], None
        self.history, self._validations = history, state["validations"]

    def _compare_tokenizers(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Tell if the tokenizer is another than the one that named the stored probe."""
        if self.probe is None or self.probe.tokens == self.probe.with_tokens(None).tokens:
            return
        tokenizer = self._within_reach(trainer, pl_module)
        if tokenizer is None:
            return
        # The names of a probe stay what they are.
        self._named_by_encoder = True
        if self.probe.is_named_by(tokenizer):
            # Earlier versions stored the tokenizer's internal spelling.
            self.probe = self.probe.with_tokens(tokenizer)
        else:
            self._say(
                "GlobEncCallback: the tokenizer is not the one that the probe in the checkpoint was made with. The "
                "probe and its tokens are kept, so that the curves and filmstrips go on."
            )

    def _refuse_shards(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._refused = processes.sharded_over_processes(pl_module)
        if self._refused:
            self._refuse(
                trainer,
                "GlobEncCallback: this model's parameters are spread over the processes (FSDP, tensor parallelism or "
                "ZeRO stage 3), so it is not analysed. Use DDP to see figures, or attribute() on a checkpoint.",
            )

    def _take_probe(self, probe: Any) -> None:
        """Look at the probe argument; texts wait for a tokenizer if none was given."""
        if probe is None:
            return
        if isinstance(probe, ProbeSet):
            self.probe = probe if self._tokenizer is None else probe.with_tokens(self._tokenizer)
        elif self._forward is not None and _is_own_form(probe):
            size = size_of(probe)
            part = Part(copied(probe), 0, 0, self._num_examples if size is None else size)
            self.probe = ProbeSet.from_parts([part]).with_tokens(self._tokenizer)
        elif isinstance(probe, Mapping):
            self.probe = ProbeSet.from_batch(probe, tokenizer=self._tokenizer)
        elif isinstance(probe, str) or (isinstance(probe, Sequence) and all(isinstance(one, str) for one in probe)):
            texts = [probe] if isinstance(probe, str) else list(probe)
            if self._tokenizer is None and texts:
                self._texts = texts
            else:
                self.probe = ProbeSet.from_texts(texts, self._tokenizer)
        else:
            raise ProbeError(
                f"probe must be None, texts, a batch (a mapping of tensors) or a ProbeSet; got {type(probe).__name__}. "
                "Write ProbeSet.from_texts(texts, tokenizer), or {'input_ids': ids, 'attention_mask': mask}."
            )
        if self.probe is not None and not len(self.probe):
            raise ProbeError("the probe is empty: give at least one example.")

    def _is_called_itself(self) -> bool:
        """Whether the probe was given as what the model itself takes, not as batches of its step."""
        return self._texts is not None or (self.probe is not None and not self.probe.parts)

    def _collect(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, place: int, loader: int
    ) -> None:
        wanted = self._num_examples - sum(part.wanted for part in self._collecting)
        self._seen_batches = True
        part = part_of(copied(batch), place, loader, wanted)
        if part.wanted:
            self._collecting.append(part)
        if sum(part.wanted for part in self._collecting) >= self._num_examples:
            self._fix_probe(trainer, pl_module)

    def _restore_like(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any) -> None:
        """Put the probe of a checkpoint into the form of a batch: a checkpoint names no classes."""
        if self._stored is not None:
            stored, self._stored = self._stored, None
            self.probe = ProbeSet.from_state_dict(stored, batch)
            self._compare_tokenizers(trainer, pl_module)

    def _finish_collecting(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """A whole validation has fewer rows than were asked for: take what there is."""
        self._name_given_probe(trainer, pl_module)
        over = not trainer.sanity_checking or sanity_check_saw_all(trainer)
        if self.probe is None and over and self._seen_batches:
            self._note(trainer, self._attempt(lambda: self._fix_probe(trainer, pl_module)))

    def _name_given_probe(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """A probe that was given before there was a tokenizer gets one now."""
        given = self._texts is not None or (self.probe is not None and not self.probe.is_named)
        if given and not self._looked_for_tokenizer:
            self._note(trainer, self._attempt(lambda: self._fix_probe(trainer, pl_module)))

    def _fix_probe(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._looked_for_tokenizer = True
        tokenizer = self._within_reach(trainer, pl_module)
        if self._texts is not None:
            if tokenizer is None:
                raise ProbeError(
                    "the probe is made of texts and no tokenizer is within reach: write "
                    "GlobEncCallback(probe=texts, tokenizer=tokenizer)."
                )
            self.probe, self._texts = ProbeSet.from_texts(self._texts, tokenizer), None
        elif self.probe is not None:
            self.probe = self.probe.with_tokens(tokenizer)
        elif self._collecting:
            self.probe, self._collecting = ProbeSet.from_parts(self._collecting).with_tokens(tokenizer), []
        else:
            raise EmptyProbeError("the probe is empty: the validation shows no example with a real token.")
        self._template = None
        if tokenizer is None:
            rank_zero_info("GlobEncCallback: no tokenizer is within reach, so token ids are shown; give tokenizer=.")

    def _within_reach(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Any | None:
        """The tokenizer of the text that is shown; where several name it differently, which one was taken is told."""
        if self._tokenizer is not None:
            return self._tokenizer
        found, shown = tokenizers_held(holders(trainer, pl_module)), self._shown(pl_module)
        if len(found) < 2:
            return find_tokenizer((one.tokenizer for one in found), find_encoders(pl_module).values())
        chosen = likeliest(found, shown)
        if shown.path is not None and disagree(found, shown):
            self._say(
                f"GlobEncCallback: {len(found)} tokenizers are within reach ({', '.join(one.name for one in found)}), "
                f"and they name the tokens differently: {chosen.name} was taken for {shown.path or 'the encoder'}. To "
                "take another, give GlobEncCallback its tokenizer=.",
                kind="tokenizers",
            )
        return chosen.tokenizer

    def _shown(self, pl_module: "pl.LightningModule") -> Shown:
        """What is known of the text whose tokens are named: its encoder and its ids."""
        structure = None if self._reader is None else self._reader.structure
        ids = [] if self.probe is None else self.probe.some_ids()
        if structure is not None:
            return Shown(structure.encoder_name, structure.encoder, ids)
        encoders = find_encoders(pl_module)
        if len(encoders) == 1:
            return Shown(*next(iter(encoders.items())), ids)
        return Shown(ids=ids)

    def _name_by_encoder(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
        """Take the tokenizer of the encoder that is shown, once that is known; whether it is another than before."""
        known = self._reader is not None and self._reader.structure is not None
        if not known or self.probe is None or self.probe.tokenizer is None or self._named_by_encoder:
            return False
        self._named_by_encoder = True
        tokenizer, before = self._within_reach(trainer, pl_module), self.probe.tokenizer
        if tokenizer is None or tokenizer is before:
            return False
        self.probe = self.probe.with_tokens(tokenizer)
        return True

    def _has_probe(self, trainer: "pl.Trainer") -> bool:
        """Whether the probe is fixed: the same answer, and the same probe, in all processes.

        What goes wrong here is told by :meth:`_measure`, where every process waits for what all of them found.
        """
        if is_alone(trainer):
            return self.probe is not None
        if not self._probe_is_shared:
            mine: tuple[dict[str, Any] | None, str] | None = None
            self._unshared = None
            if self.probe is not None and trainer.is_global_zero:
                try:
                    mine = (self.probe.state_dict(), "")
                except ProbeError as error:
                    mine = (None, str(error))
            first = processes.from_first(mine)
            if first is not None:
                self._probe_is_shared = True
                state, trouble = first
                if trouble:
                    self._unshared = trouble
                elif not trainer.is_global_zero:
                    self._take_shared(trainer, state)
        return self._probe_is_shared

    def _take_shared(self, trainer: "pl.Trainer", state: Mapping[str, Any]) -> None:
        """Be given the probe of the first process."""
        own = self.probe.parts if self.probe is not None else ()
        template = own[0].batch if own else self._template
        try:
            probe = ProbeSet.from_state_dict(state, template)
            tokenizer = self._within_reach(trainer, trainer.lightning_module)
            # The tokens are those of the first process; further texts are named by what is within reach here.
            self.probe, self._texts = replace(probe, tokenizer=tokenizer if probe.is_named else None), None
        except Exception as error:
            self._unshared = f"{type(error).__name__}: {error}"
        self._template = None

    def _validate(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Analyse this validation, if it is its turn."""
        self._analyzed = True
        repeated = self._is_repeated(trainer)
        if not self._is_its_turn(trainer, repeated):
            return

        def run() -> None:
            self._pending = self._measure(trainer, pl_module)

        failure = self._attempt(run)
        if failure is not None and not repeated:
            self._leave_out(trainer, self._step(trainer), failure)

    def _is_its_turn(self, trainer: "pl.Trainer", repeated: bool) -> bool:
        """Count this validation; whether it is analysed."""
        self._validations += not repeated
        ready = not self._refused and (self._stored is not None or self._has_probe(trainer))
        return ready and (self._validations - 1) % self._every_n_validations == 0

    def _is_repeated(self, trainer: "pl.Trainer") -> bool:
        """Whether a resumed training runs a validation again that is already in its history."""
        known = bool(self.history) and self.history[-1].step >= logged_step(trainer)
        return self._resumed and trainer.state.fn == "fit" and known

    def _step(self, trainer: "pl.Trainer") -> int:
        """The step of this validation's figures. Another Trainer's ``validate()`` counts from 0; ours never go back."""
        step = logged_step(trainer)
        if trainer.state.fn != "fit":
            step = max([step, *(entry.step for entry in self.history.latest)])
        return step

    def _measure(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Measurement:
        """Measure the probe set: on one's own, or each process its share, and all of them the whole."""
        probe, found, failure = self.probe, None, None
        shares: list[Sequence[int]] = []
        try:
            if self._reader is None:
                self._reader = Reader(pl_module, self._forward, encoder_call=self._encoder_call)
            if self._unshared is not None or probe is None:
                raise ProbeError(f"the processes do not share a probe: {self._unshared}")
            with without_logging(pl_module), processes.without_exchange():
                if probe.parts and self._reader.replay is None:
                    probe = self.probe = self._find_decision(pl_module, self._reader, probe)
                shares = [range(rank, len(probe), trainer.world_size) for rank in range(trainer.world_size)]
                mine = range(len(probe)) if is_alone(trainer) else shares[trainer.global_rank]
                if self._name_by_encoder(trainer, pl_module):
                    probe = self.probe or probe
                if mine:
                    shown = kept_maps(probe.lengths(), self._settings, self._heatmap_examples)
                    found = self._measured(self._reader, probe, shown, mine)
                    if self._name_by_encoder(trainer, pl_module):
                        found = measure(self._reader, self.probe or probe, self._settings, shown, mine)
        except Exception as error:
            if is_alone(trainer):
                raise
            if isinstance(error, CollectiveError):
                # What was found in a step that caught the refusal is not the user's own decision.
                self._reader = None
            # The others have to hear of it before anything else happens here.
            failure = error
        if is_alone(trainer) and found is not None:
            return self._looked_at(found)
        said = "" if failure is None else f"{type(failure).__name__}: {failure}"
        answers = processes.gathered((said, None if found is None else dict(vars(found))))
        if failure is not None:
            raise failure
        for rank, (trouble, _) in enumerate(answers):
            if trouble:
                raise GlobEncError(f"in the process of rank {rank}: {trouble}")
        return self._looked_at(
            put_together(
                [(share, Measurement(**parts)) for share, (_, parts) in zip(shares, answers, strict=True) if parts]
            )
        )

    def _measured(
        self, reader: Reader, probe: ProbeSet, shown: Mapping[int, Collection[str]], mine: Sequence[int]
    ) -> Measurement:
        try:
            return measure(reader, probe, self._settings, shown, mine)
        except ModelCallError as error:
            if self._assumed is None:
                raise
            # Why the module's own steps tell nothing is the first thing to know.
            raise ModelCallError(f"{self._assumed}\nCalled by itself instead: {error}") from error

    def _find_decision(self, pl_module: "pl.LightningModule", reader: Reader, probe: ProbeSet) -> ProbeSet:
        """Find what the module's own step decides on the probe; else the probe as the model itself may take it."""
        try:
            return find(reader, probe, steps_of(pl_module, self._forward), self._decision, self._encoder_call)
        except (UnsupportedEncoderError, CollectiveError):
            raise
        except GlobEncError as error:
            assumed = None if self._forward or self._decision else _assumed_probe(probe)
            if assumed is None:
                raise
            self._assumed = str(error)
            rank_zero_info(
                f"GlobEncCallback: what is decided was assumed, not found in the module's own steps ({error})"
            )
            return assumed

    def _looked_at(self, measurement: Measurement) -> Measurement:
        """Remember what the encoder was called with, once the probe's batches have told it."""
        if self.probe is not None and not self.probe.is_seen and any(ids is not None for ids in measurement.ids):
            self.probe = self.probe.seen(
                measurement.ids, [_label(truth, measurement.task) for truth in measurement.truths]
            )
        return measurement

    def _baseline(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        measurement = self._measure(trainer, pl_module)
        self._publish(trainer, measurement, 0, self._monitored(measurement))

    def _make_up(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", epoch: int) -> None:
        """Analyse the validation that Lightning leaves out on resume: the weights are still those it was due for.

        It is written and remembered. It cannot be monitored: to those who monitor, there was no validation.
        """
        self._due_epoch, self._resumed = None, False
        strangers = act_as_a_validation_starts(trainer, pl_module)
        if strangers:
            # They may exchange the weights, and what else they do is not ours to call.
            if self._is_its_turn(trainer, repeated=False):
                reason = (
                    "GlobEncCallback: the checkpoint is from between a training step and the validation after it, "
                    "which Lightning leaves out on resume. It is missing here, too: which weights it would have been "
                    f"made with is up to what {', '.join(strangers)} does as a validation starts."
                )
                self._say(reason)
                self._leave_out(trainer, self._step(trainer), reason)
        elif self._stored is not None:
            # Batches of classes of their own: no batch has shown these yet.
            if self._is_its_turn(trainer, repeated=False):
                reason = (
                    "GlobEncCallback: the checkpoint is from between a training step and the validation after it, "
                    "which Lightning leaves out on resume. It is missing here, too: the probe's batches are of a class "
                    "of their own, which a checkpoint does not hold, so they wait for the next validation's."
                )
                self._say(reason)
                self._leave_out(trainer, self._step(trainer), reason)
        else:
            with weights_of_a_validation(trainer, pl_module):
                self._validate(trainer, pl_module)
        if self._pending is not None:
            measurement, self._pending = self._pending, None
            monitored = self._monitored(measurement)
            self._guarded(lambda: self._publish(trainer, measurement, self._step(trainer), monitored, epoch))
        self._resumed = True

    def _log_monitored(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", measurement: Measurement, to_loggers: bool
    ) -> None:
        if getattr(trainer, "barebones", False):
            # Lightning answers with a warning for every figure.
            return
        scalars = {tag: rho for tag, rho in self._monitored(measurement).items() if rho == rho}
        # None rather than True: where there is no logger, Lightning would remark on every figure.
        logger = None if to_loggers else False
        # All processes have the same figures; the mean of three equal numbers may differ from them in the last bit.
        pl_module.log_dict(
            scalars, logger=logger, add_dataloader_idx=False, sync_dist=True, reduce_fx="max", batch_size=1
        )

    def _monitored(self, measurement: Measurement) -> dict[str, float]:
        return {f"{self._tag}/spearman/{method}": float(one.mean[-1]) for method, one in measurement.summary().items()}

    def _by_layer(self, measurement: Measurement) -> dict[str, float]:
        return {
            f"{self._tag}/spearman_by_layer/{method}/layer_{layer + 1:02d}": float(rho)
            for method, one in measurement.summary().items()
            for layer, rho in enumerate(one.mean)
        }

    def _publish(
        self,
        trainer: "pl.Trainer",
        measurement: Measurement,
        step: int,
        monitored: Mapping[str, float] | None = None,
        epoch: int | None = None,
    ) -> None:
        """Remember a measurement, and write what ``self.log`` does not."""
        self.history.append(history_entry(measurement, step, trainer.current_epoch if epoch is None else epoch))
        if self.probe is not None:
            origin, call = self._origin(self.probe), self._call_in_words()
            names = class_names(trainer.lightning_module, measurement.encoder, measurement.task)
            said = verdicts(measurement, self.probe, names)
            truths, text = [one.truth for one in said], texts_of(measurement, self.probe).shown
            self.history.about = about(measurement, self.probe, self._settings, origin, call, truths, text)
        self._say_what_is_special(measurement)
        failure: Exception | None = None
        if trainer.is_global_zero:
            scalars = {**(monitored or {}), **self._by_layer(measurement)}
            try:
                self._guarded(lambda: publish.log_scalars(trainer.loggers, scalars, step))
                self._guarded(lambda: self._draw(trainer, measurement, step))
                self._guarded(lambda: self._record(trainer, measurement))
                self._describe(trainer, step)
            except Exception as error:
                failure = error
        if self._on_error == "raise" and not is_alone(trainer):
            # A training that ends in one process has to end in all of them.
            trouble = processes.from_first(None if failure is None else f"{type(failure).__name__}: {failure}")
            if trouble and failure is None:
                raise GlobEncError(f"in the process of rank 0: {trouble}")
        if failure is not None:
            raise failure

    def _draw(self, trainer: "pl.Trainer", measurement: Measurement, step: int) -> None:
        able = [logger for logger in trainer.loggers if publish.can_show_images(logger)]
        unable = sorted({type(logger).__name__ for logger in trainer.loggers if logger not in able})
        if unable and not getattr(trainer, "fast_dev_run", False):
            self._say(f"GlobEncCallback: {', '.join(unable)} can show no images; it gets the scalars alone.")
        if able and self.probe is not None:
            history = self.history.latest
            drawn = {example: maps for example, maps in measurement.last.items() if example < self._heatmap_examples}
            measurement = replace(measurement, last=drawn)
            names = class_names(trainer.lightning_module, measurement.encoder, measurement.task)
            pictures = images.pictures(measurement, self.probe, history, self._missing_steps, self._settings, names)
            tagged = {self._tag + tag.removeprefix(TAG): picture for tag, picture in pictures.items()}
            publish.log_images(able, tagged, step)

    def _call_in_words(self) -> str:
        reader = self._reader
        if reader is None or reader.replay is None or reader.replay.task is None:
            return "assumed: the module was called by itself" if self._assumed else "the module itself"
        task = reader.replay.task
        return f"{reader.replay.step.name}: {task.function}"

    def _origin(self, probe: ProbeSet) -> str:
        if self._probe_name == "validation":
            return f"the first {len(probe)} examples that the validation showed"
        return "texts that were given" if probe.texts else "a batch or a ProbeSet that was given"

    def _describe(self, trainer: "pl.Trainer", step: int) -> None:
        """Write what the figures are of: once to a run, and again when it is no longer what that run shows."""
        about, reasons = self.history.about, self.history.reasons
        if about is None and not reasons:
            return
        text, tables = page.markdown(about, reasons), page.tables(about, reasons)
        wanting = [
            one for one in getattr(trainer, "callbacks", []) if isinstance(one, GlobEncCallback) and one._custom_scalars
        ]
        # A run has one layout, so each of us writes that of all.
        layout = page.layout({one._tag: one._settings.methods for one in wanting}) if self in wanting else {}
        described = fingerprint([text, repr(layout)])

        def write(logger: Any) -> None:
            run = fingerprint(publish.run_of(logger))
            if self._described.get(run) != described:
                publish.log_text(logger, f"{self._tag}/about", text, tables, step)
                if layout:
                    publish.log_layout(logger, layout)
                self._described[run] = described

        for logger in trainer.loggers:
            self._guarded(partial(write, logger))

    def _record(self, trainer: "pl.Trainer", measurement: Measurement) -> None:
        """Write the newest entry of the history for the dashboard."""
        able = [logger for logger in trainer.loggers if publish.can_keep_records(logger)]
        if able and self.probe is not None:
            newest = self.history[-1]
            moment = self._moment(self._count() - 1, newest.step, newest.epoch)
            names = class_names(trainer.lightning_module, measurement.encoder, measurement.task)
            summary, detail = records(measurement, self.probe, self._settings, moment, names)
            # Whoever sees the summary asks for the other: it comes last.
            written = {"detail": store.to_bytes(detail), "summary": store.to_bytes(summary)}
            tagged = {store.tag(self._tag, kind, moment.ordinal): data for kind, data in written.items()}
            publish.log_records(able, tagged, newest.step)

    def _leave_out(self, trainer: "pl.Trainer", step: int, reason: str) -> None:
        """Remember that a validation has no figures, and show that and why."""
        self._missing_steps.append(step)
        self.history.reasons.append((step, _shortened(reason)))
        self._show_missing(trainer, self._count() - 1, step, reason)

    def _refuse(self, trainer: "pl.Trainer", reason: str) -> None:
        """Say why there are no figures, once."""
        self._say(reason)
        self._note(trainer, reason)

    def _note(self, trainer: "pl.Trainer", reason: str | None) -> None:
        """Keep a reason why there are no figures, once, if it is one; :meth:`_show_reasons` writes it."""
        if reason is not None and all(text != _shortened(reason) for _, text in self.history.reasons):
            self.history.reasons.append((self._step(trainer), _shortened(reason)))
            self._unshown.append(_shortened(reason))

    def _show_reasons(self, trainer: "pl.Trainer") -> None:
        """Write the reasons that are new to where they are seen though warnings are switched off."""
        kept = [text for _, text in self.history.reasons]
        # Not what was found in a trial run whose history was taken back.
        unshown, self._unshown = [text for text in self._unshown if text in kept], []
        if unshown:
            reason = "\n".join(unshown)
            # A note of the first validation's place, as long as no validation takes it.
            self._show_missing(trainer, None if self._count() else 0, self._step(trainer), reason)

    def _show_missing(self, trainer: "pl.Trainer", ordinal: int | None, step: int, reason: str) -> None:
        """Write why there are no figures into the text and, with a place among the validations, into the tab."""
        if trainer.is_global_zero:
            if ordinal is not None:
                moment = self._moment(ordinal, step, trainer.current_epoch)
                self._quietly(lambda: self._record_missing(trainer, store.Missing(moment, _shortened(reason))))
            self._quietly(lambda: self._describe(trainer, step))

    def _record_missing(self, trainer: "pl.Trainer", missing: store.Missing) -> None:
        able = [logger for logger in trainer.loggers if publish.can_keep_records(logger)]
        if able:
            tag = store.tag(self._tag, "summary", missing.moment.ordinal)
            publish.log_records(able, {tag: store.to_bytes(missing)}, missing.moment.step)

    def _count(self) -> int:
        """How many validations of this training were to be analysed."""
        return len(self.history.latest) + len(self._missing_steps)

    def _moment(self, ordinal: int, step: int, epoch: int) -> store.Moment:
        return store.Moment(ordinal, step, epoch, self._session)

    def _say_what_is_special(self, measurement: Measurement) -> None:
        """What somebody who reads the figures has to know, each once."""
        for message, kind in remarks(measurement, self._settings, self._encoder_call):
            self._say(message, kind)

    def _guarded(self, job: Callable[[], None]) -> bool:
        """Do something that must not stop a training, unless the user wants it to; whether it was done."""
        return self._attempt(job) is None

    def _quietly(self, job: Callable[[], None]) -> None:
        """Do something that never stops a training: one process alone does it, and the others would wait for it."""
        self._attempt(job, raises=False)

    def _attempt(self, job: Callable[[], None], raises: bool = True) -> str | None:
        """Do something that must not stop a training, unless the user wants it to; what was said if it failed."""
        try:
            with random_states_kept():
                job()
        except Exception as error:
            if raises and self._on_error == "raise":
                raise
            # A refusal tells its error to the digit, which moves with the weights: the layer is what tells it apart.
            kind = re.sub(r"[0-9.]+e[-+][0-9]+", "", f"{type(error).__name__}: {error}")
            text = f"GlobEncCallback: {type(error).__name__}: {error}\nThe training goes on without these figures."
            self._say(text, kind)
            return text
        return None

    def _say(self, message: str, kind: str | None = None) -> None:
        """Warn once: once for each message, or once for a kind of message whose numbers differ."""
        if (kind or message) not in self._said:
            self._said.add(kind or message)
            _warn(message)


@rank_zero_only
def _warn(message: str) -> None:
    warn(message)


def _shortened(reason: str) -> str:
    """A reason as it is kept and written: an error may hold a whole tensor."""
    return reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 1]}…"


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, in words."""
    # Arguments that a state does not name have their default.
    was, now = ({"decision": 0, "encoder_call": 0, **one} for one in (was, now))
    return [f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in now if was.get(name) != now[name]]


def _assumed_probe(probe: ProbeSet) -> ProbeSet | None:
    """The examples of a probe as a model itself may take them: the entries of mappings, by their usual names."""
    found: ProbeSet | None = None
    for part in probe.parts:
        try:
            taken = ProbeSet.from_batch(_mapping_within(part.batch), limit=part.wanted)
        except ProbeError:
            continue
        found = taken if found is None else found.joined(taken)
    return None if found is None else found.with_tokens(probe.tokenizer)


def _mapping_within(batch: Any) -> Any:
    """The batch itself, or the first loader's part of a batch that combines several loaders."""
    if isinstance(batch, Mapping) and main_input(batch) is None:
        return next((part for part in batch.values() if isinstance(part, Mapping) and main_input(part)), batch)
    return batch


def _is_own_form(probe: Any) -> bool:
    """Whether a batch has a form that its user alone knows, and tells by ``forward=``: a tuple, or own names."""
    if isinstance(probe, Mapping):
        return main_input(probe) is None and size_of(probe) is not None
    return isinstance(probe, list | tuple) and any(isinstance(leaf, Tensor) for _, leaf in leaves(probe))


def _label(truth: tuple[float, ...], task: str) -> Tensor | None:
    """What an example's label says, as a tensor: a class index; else a value, or several of them."""
    if not truth:
        return None
    if len(truth) == 1 and task not in ("regression", "multi-label"):
        return torch.tensor(int(truth[0]))
    return torch.tensor([float(one) for one in truth]) if len(truth) > 1 else torch.tensor(float(truth[0]))
