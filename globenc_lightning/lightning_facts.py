"""What is known of a Trainer and its module: where a loop stands, and what else acts at its hooks."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from globenc_lightning import processes

if TYPE_CHECKING:
    import pytorch_lightning as pl

# Lightning gives every callback the module's own methods of these names.
LENT_BY_TRAINER = ("log", "log_dict")
# Hooks in which the weights may be exchanged for those that a validation is to see, and whose own of them are known.
BEFORE_VALIDATION = ("on_validation_model_eval", "on_validation_start", "on_validation_epoch_start")
KNOWN_SOURCES = ("pytorch_lightning.", "lightning.pytorch.", "globenc_lightning.")


@contextmanager
def without_logging(pl_module: "pl.LightningModule") -> Iterator[None]:
    """What a module's own forward logs is about the user's batches, not about the probe."""
    own = {name: vars(pl_module)[name] for name in LENT_BY_TRAINER if name in vars(pl_module)}
    try:
        for name in LENT_BY_TRAINER:
            vars(pl_module)[name] = lambda *args, **kwargs: None
        yield
    finally:
        for name in LENT_BY_TRAINER:
            vars(pl_module).pop(name, None)
        vars(pl_module).update(own)


def log_monitored(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", scalars: Mapping[str, float], to_loggers: bool
) -> None:
    """Log figures that callbacks monitor, those that are defined; to the loggers, too, where that is asked for."""
    if getattr(trainer, "barebones", False):
        # Lightning answers with a warning for every figure.
        return
    defined = {tag: rho for tag, rho in scalars.items() if rho == rho}
    # None rather than True: where there is no logger, Lightning would remark on every figure.
    logger = None if to_loggers else False
    # All processes have the same figures; the mean of three equal numbers may differ from them in the last bit.
    pl_module.log_dict(defined, logger=logger, add_dataloader_idx=False, sync_dist=True, reduce_fx="max", batch_size=1)


def act_as_a_validation_starts(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> list[str]:
    """The callbacks, but for Lightning's and ours, and the module, if they do something before its first batch."""
    return [
        type(one).__name__
        for one in [*getattr(trainer, "callbacks", []), pl_module]
        if not all(_source(one, hook).startswith(KNOWN_SOURCES) for hook in BEFORE_VALIDATION if hasattr(one, hook))
    ]


@contextmanager
def weights_of_a_validation(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Iterator[None]:
    """Averaged weights where Lightning's averaging would put them for a validation, and the trained ones back."""
    with ExitStack() as stack:
        for one in _averaging(trainer):
            one.on_validation_epoch_start(trainer, pl_module)
            stack.callback(one.on_validation_epoch_end, trainer, pl_module)
        yield


def _averaging(trainer: "pl.Trainer") -> list[Any]:
    """The callbacks of Lightning's that put averaged weights in for a validation."""
    callbacks = getattr(trainer, "callbacks", [])
    return [one for one in callbacks if _source(one, "on_validation_epoch_start").endswith(".weight_averaging")]


def _source(one: Any, hook: str) -> str:
    """The module that a hook is written in."""
    return f"{getattr(getattr(one, hook), '__module__', '')}"


def is_alone(trainer: "pl.Trainer") -> bool:
    """Whether this process is the only one of its training."""
    return trainer.world_size == 1 or not processes.are_connected()


def is_last_batch(trainer: "pl.Trainer", batch_idx: int, dataloader_idx: int) -> bool:
    """Whether a validation is at its last batch, as far as its loader tells.

    A validation that Lightning goes on with after a resume is shown from its first batch, while its loop counts on from
    the batch that it was interrupted at, and takes several batches for the last one.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else trainer.validate_loop
    if not loop.batch_progress.is_last_batch:
        return False
    counts = loop.max_batches
    if not getattr(loop, "_is_sequential", False) or dataloader_idx >= len(counts):
        return True
    return dataloader_idx == len(counts) - 1 and not batch_idx + 1 < counts[dataloader_idx] < float("inf")


def logged_step(trainer: "pl.Trainer") -> int:
    """The step at which Lightning writes a validation's metrics; one less than ``global_step`` under some flags."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def validation_is_due(trainer: "pl.Trainer") -> bool:
    """Whether a training batch has ended, its last hooks not yet, and a validation follows it."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return trainer.training and batches.completed == batches.processed - 1 and _should_validate(trainer)


def validation_is_owed(trainer: "pl.Trainer", seen: int, epoch: int) -> bool:
    """Whether a validation is to follow the latest training batch and has not begun.

    Args:
        trainer: the Trainer.
        seen: after how many training batches the latest validation began, as :func:`batches_trained` counts them.
        epoch: the epoch of the latest training batch.
    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    ended = 0 < batches.ready == batches.processed != seen and trainer.current_epoch == epoch
    return trainer.state.fn == "fit" and not trainer.sanity_checking and ended and _should_validate(trainer)


def _should_validate(trainer: "pl.Trainer") -> bool:
    """Whether Lightning validates after the training batch that it is at."""
    fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
    should_validate = getattr(trainer.fit_loop.epoch_loop, "_should_check_val_fx", None)
    if fetcher is None or should_validate is None or not trainer.enable_validation:
        return False
    return bool(should_validate(fetcher))


def batches_trained(trainer: "pl.Trainer") -> int:
    """How many training batches were processed, those of earlier starts included."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


def goes_on_validating(trainer: "pl.Trainer") -> bool:
    """Whether Lightning itself goes on with the validation that a checkpoint was written from inside of."""
    return bool(getattr(trainer.fit_loop.epoch_loop.val_loop, "restarted_mid_evaluation", False))


def has_averaged_weights(trainer: "pl.Trainer", ours: Any, at_end: bool) -> bool:
    """Whether a callback of Lightning's has put averaged weights into the module, within a validation.

    Args:
        trainer: the Trainer.
        ours: the callback that asks.
        at_end: whether the validation is at its end, where callbacks before ours have put the trained weights back.
    """
    callbacks = list(getattr(trainer, "callbacks", []))
    places = [index for index, one in enumerate(callbacks) if any(one is other for other in _averaging(trainer))]
    own = next((index for index, one in enumerate(callbacks) if one is ours), -1)
    return any(not at_end or place > own for place in places)


def sanity_check_saw_all(trainer: "pl.Trainer") -> bool:
    """Whether the sanity check showed every batch of every validation loader."""
    return all(
        shown >= there for shown, there in zip(trainer.num_sanity_val_batches, trainer.num_val_batches, strict=True)
    )


class Run(NamedTuple):
    """Where a Trainer's logger writes.

    Attributes:
        folder: its folder; that of the Trainer's default root where it has none.
        name: a name for the run.
    """

    folder: str
    name: str


def run_of(trainer: "pl.Trainer") -> Run:
    """Returns where a Trainer's logger writes. All processes have to ask: they are told by the first."""
    folder, logger = trainer.log_dir or trainer.default_root_dir, trainer.logger
    version = getattr(logger, "version", None)
    named = [getattr(logger, "name", None), f"version_{version}" if isinstance(version, int) else version]
    return Run(str(folder), "-".join(str(one) for one in named if one) or "run")


def facts_of(pl_module: "pl.LightningModule", trainer: "pl.Trainer") -> dict[str, Any]:
    """Returns the seed and the hyperparameters of a training, in primitives."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    held: dict[Any, Any] = {}
    for one in (getattr(trainer, "datamodule", None), pl_module):
        held.update(getattr(one, "hparams", None) or {})
    return {
        "seed": int(seed) if seed.lstrip("-").isdigit() else None,
        "hyperparameters": {str(name): _primitive(value) for name, value in held.items()},
    }


def _primitive(value: Any) -> Any:
    """A value as JSON takes it: what is neither a primitive nor a collection of them is told by its class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _primitive(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_primitive(one) for one in value]
    return type(value).__name__


def holders(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> list[Any]:
    """Where a tokenizer may be kept."""
    holders: list[Any] = [pl_module, getattr(trainer, "datamodule", None)]
    for loader in _loaders_within(trainer.val_dataloaders):
        dataset = getattr(loader, "dataset", None)
        holders += [getattr(loader, "collate_fn", None), dataset, getattr(dataset, "dataset", None)]
    return holders


def _loaders_within(loaders: Any) -> list[Any]:
    """The data loaders in lists, mappings and combinations of them."""
    loaders = getattr(loaders, "iterables", loaders)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return (
        [one for part in loaders for one in _loaders_within(part)] if isinstance(loaders, list | tuple) else [loaders]
    )


@dataclass(frozen=True)
class Training:
    """A Trainer and its module, as far as an analysis has to know them.

    Attributes:
        trainer: the Trainer.
        module: the module that is trained.
    """

    trainer: "pl.Trainer"
    module: "pl.LightningModule"

    def places(self) -> list[Any]:
        """Returns the objects in which a tokenizer may be kept."""
        return holders(self.trainer, self.module)

    @property
    def is_alone(self) -> bool:
        """Whether this process is the only one."""
        return is_alone(self.trainer)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.trainer.is_global_zero)

    @property
    def share(self) -> tuple[int, int] | None:
        """This process's rank and the number of processes; None where it is alone."""
        return None if self.is_alone else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def is_fit(self) -> bool:
        """Whether it trains, and does not only validate."""
        return self.trainer.state.fn == "fit"

    @property
    def logged_step(self) -> int:
        """The step at which a validation's metrics are written."""
        return logged_step(self.trainer)

    @property
    def step(self) -> int:
        """How many optimizer steps were taken."""
        return int(self.trainer.global_step)

    @property
    def is_sanity_check(self) -> bool:
        """Whether the batches of a validation are shown before the training."""
        return bool(self.trainer.sanity_checking)

    @property
    def share_of_validation(self) -> float:
        """How much of a whole validation a sanity check shows; 0 where the loaders do not tell."""
        shown, there = sum(self.trainer.num_sanity_val_batches), sum(self.trainer.num_val_batches)
        return shown / there if there else 0.0

    @property
    def is_untrained(self) -> bool:
        """Whether no training batch was ever begun."""
        return self.step == 0 and not self.trainer.fit_loop.epoch_loop.batch_progress.total.ready

    @property
    def batches(self) -> int:
        """How many training batches were processed."""
        return batches_trained(self.trainer)

    @property
    def is_within_validation(self) -> bool:
        """Whether a validation of the training runs."""
        return bool(self.trainer.validating and not self.trainer.sanity_checking)

    @property
    def goes_on_validating(self) -> bool:
        """Whether Lightning itself goes on with the validation that its checkpoint was written from inside of."""
        return goes_on_validating(self.trainer)

    @property
    def epoch(self) -> int:
        """The epoch."""
        return int(self.trainer.current_epoch)

    @property
    def loggers(self) -> list[Any]:
        """The trainer's loggers."""
        return list(self.trainer.loggers)

    @property
    def is_trial(self) -> bool:
        """Whether its loggers swallow everything (``fast_dev_run``)."""
        return bool(getattr(self.trainer, "fast_dev_run", False))

    @property
    def has_shown_all(self) -> bool:
        """Whether a validation is over, or a sanity check that showed every batch."""
        return not self.trainer.sanity_checking or sanity_check_saw_all(self.trainer)

    def quietly(self) -> AbstractContextManager[None]:
        """Returns a context in which what the module logs goes nowhere."""
        return without_logging(self.module)

    def as_validated(self) -> AbstractContextManager[None]:
        """Returns a context in which the weights are those that a validation would see."""
        return weights_of_a_validation(self.trainer, self.module)

    @property
    def is_averaging(self) -> bool:
        """Whether a callback of Lightning's averages weights."""
        return bool(_averaging(self.trainer))

    def put_weights_back(self) -> None:
        """Exchange averaged weights, which a checkpoint holds in their place, for the trained ones."""
        for one in _averaging(self.trainer):
            one.on_validation_epoch_end(self.trainer, self.module)
