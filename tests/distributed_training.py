"""One small training in several processes, run as ``python -m tests.distributed_training``.

Each process writes what it has, to ``<folder>/rank_<n>.json``: its history, what was logged, the warnings of ours.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from globenc_lightning import GlobEncCallback
from tests.training import Album, Sentences, Steps, TakesTuples, as_tuples, fit, loader, said


class FailsInOne(Steps):
    """Its forward raises in the process of one rank, and in one validation alone."""

    rank = 1
    at_step = 2

    def forward(self, **batch: Tensor) -> Any:
        if self.global_rank == self.rank and self.trainer.global_step == self.at_step:
            raise ArithmeticError("not here")
        return self.model(**batch)


def still(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that changes nothing, so that all numbers of processes train the same model."""
    return torch.optim.SGD(parameters, lr=0.0)


def ddp(**options: Any) -> Any:
    return DDPStrategy(process_group_backend="gloo", **options)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """An explicit probe: the same figures from any number of processes."""
    module = Steps().to(getattr(torch, options.dtype))
    return {"module": module, "probe": Sentences(options.examples).first(options.examples), "strategy": ddp()}


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """As ``given``, compared with more than the saliency."""
    return {**given(options), "methods": ["N-Enc"], "references": ("integrated gradients", "HTA")}


def collected(options: argparse.Namespace) -> dict[str, Any]:
    """A probe from the validation loop: what the first process is shown."""
    return {"module": Steps(), "strategy": ddp(), "num_examples": 6}


def fails(options: argparse.Namespace) -> dict[str, Any]:
    """A failure in one process of several."""
    return {"module": FailsInOne(), "strategy": ddp(), "probe": Sentences(6).first(6)}


def fails_and_raises(options: argparse.Namespace) -> dict[str, Any]:
    """A failure in one process that is to end the training."""
    return {**fails(options), "on_error": "raise"}


class Gathers(Steps):
    """Its loss has the texts of all processes as negatives."""

    def loss_of(self, batch: Any) -> Tensor:
        output = self.model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
        others = self.everybody(output)
        return torch.nn.functional.cross_entropy(output @ others.flatten(0, -2).T, torch.arange(len(output)))

    def everybody(self, output: Tensor) -> Tensor:
        return self.all_gather(output, sync_grads=True)


class GathersByTorch(Gathers):
    """The same by torch, in a step that goes on where that fails."""

    def everybody(self, output: Tensor) -> Tensor:
        try:
            return torch.stack(torch.distributed.nn.functional.all_gather(output))
        except Exception:
            return output


class FailsToBeFound(TakesTuples):
    """The steps of one process fail whenever they are run again, which is with gradients or in evaluation."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.global_rank == 1 and torch.is_grad_enabled():
            raise ArithmeticError("not here")
        super().validation_step(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and not self.training:
            raise ArithmeticError("not here")
        return super().training_step(batch, batch_idx)


@dataclass
class Batch:
    """A batch of a class of its own."""

    parts: tuple[Tensor, ...]
    source: str = "films"


class TakesBatches(TakesTuples):
    """Its batches are of a class of their own."""

    def loss_of(self, batch: Any) -> Tensor:
        return super().loss_of(batch.parts)


class NoTraveller:
    """What a batch holds beside its tensors, and no checkpoint takes."""


class TakesNoTravellers(TakesTuples):
    """Its batches hold something that does not travel from one process to another."""

    def loss_of(self, batch: Any) -> Tensor:
        return super().loss_of(batch[:3])


def tuples(options: argparse.Namespace) -> dict[str, Any]:
    """Batches that the step alone knows, all of the first process's rows in one, of which each analyses some."""
    return {"module": TakesTuples(), "strategy": ddp(), "num_examples": 5, "collate": as_tuples, "batch": 5}


def dataclasses(options: argparse.Namespace) -> dict[str, Any]:
    """Batches of a class of their own."""
    return {**tuples(options), "module": TakesBatches(), "collate": lambda rows: Batch(as_tuples(rows))}


def travels_not(options: argparse.Namespace) -> dict[str, Any]:
    """Batches that cannot be told to the other processes."""
    return {
        **tuples(options),
        "module": TakesNoTravellers(),
        "collate": lambda rows: (*as_tuples(rows), NoTraveller()),
    }


def gathers(options: argparse.Namespace) -> dict[str, Any]:
    """A step that waits for the other processes."""
    return {"module": Gathers(), "strategy": ddp(find_unused_parameters=True), "num_examples": 3}


def gathers_by_torch(options: argparse.Namespace) -> dict[str, Any]:
    """A step that waits for the other processes and catches what goes wrong."""
    return {"module": GathersByTorch(), "strategy": ddp(find_unused_parameters=True), "num_examples": 3}


def is_not_found(options: argparse.Namespace) -> dict[str, Any]:
    """The decision is found in one process and not in the other."""
    return {**tuples(options), "module": FailsToBeFound()}


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """As ``given``, into event files, with one validation that fails in one process."""
    return {**fails(options), "probe": Sentences(options.examples).first(options.examples)}


def kept(options: argparse.Namespace) -> dict[str, Any]:
    """As ``given``, with a record, and a training step that is analysed besides the validations."""
    return {**given(options), "record": options.folder / "record", "at_steps": [1]}


def masked(options: argparse.Namespace) -> dict[str, Any]:
    """As ``given``, with masked copies."""
    return {**given(options), "faithfulness": ["N-Enc", "W"], "faithfulness_every_n": 2}


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    one.__name__: one
    for one in (
        *(given, compared, collected, fails, fails_and_raises, recorded, kept, masked),
        *(tuples, dataclasses, travels_not, gathers, gathers_by_torch, is_not_found),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--examples", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = CASES[options.case](options)
    module: pl.LightningModule = parts.pop("module")
    strategy = parts.pop("strategy")
    form = {"collate_fn": parts.pop("collate", None)}
    size = parts.pop("batch", 4)
    if options.case in ("given", "compared", "collected", "tuples", "kept", "masked"):
        module.configure_optimizers = lambda: still(module.parameters())  # type: ignore[method-assign]
    callback, logger = GlobEncCallback(heatmap_examples=1, **parts), Album()
    board = TensorBoardLogger(str(options.folder), name=None, version="board")
    result: dict[str, Any] = {}
    with said() as messages:
        try:
            trainer = fit(
                module,
                callback,
                train=loader(Sentences(8 * options.processes, seed=1), 2, **form),
                val=loader(Sentences(20 if size == 4 else 10 * options.processes), size, **form),
                logger=board if options.case == "recorded" else logger,
                max_epochs=2,
                limit_train_batches=2,
                strategy=strategy,
                devices=options.processes,
            )
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        else:
            result["steps"] = trainer.global_step
            result["monitored"] = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
    result["history"] = [
        {
            "step": entry.step,
            "by_example": {method: rho.tolist() for method, rho in entry.by_example.items()},
            "rows": {method: [row.tolist() for row in rows] for method, rows in entry.rows.items()},
            "references": {name: [row.tolist() for row in rows] for name, rows in entry.references.items()},
            "reference_rho": {
                name: {method: rho.tolist() for method, rho in by_method.items()}
                for name, by_method in entry.reference_rho.items()
            },
        }
        for entry in callback.history
    ]
    result["faithfulness"] = [
        None
        if one is None
        else {
            "gain": {method: gain.tolist() for method, gain in one.gain.items()},
            "span": one.span.tolist(),
            "masked": {method: [tokens.tolist() for tokens in texts] for method, texts in one.masked.items()},
        }
        for one in (entry.faithfulness for entry in callback.history)
    ]
    result["missing"] = callback.history.missing_steps
    seen = callback.probe is not None and callback.probe.is_seen
    result["probe"] = [row["input_ids"].tolist() for row in callback.probe.rows] if callback.probe and seen else None
    result["logged"] = [point for point in logger.points if point[1].startswith("globenc")]
    result["images"] = sorted({(tag, step) for tag, step, _ in logger.images})
    result["messages"] = messages
    (options.folder / f"rank_{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
