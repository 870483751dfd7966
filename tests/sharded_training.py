"""Sharded trainings in several processes, run as ``python -m tests.sharded_training`` in each of them.

Each process writes what it has seen to ``<folder>/rank_<n>.json``.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from globenc_lightning import METHODS, GlobEncCallback, ProbeSet, attribute
from globenc_lightning.analysis import Reader
from globenc_lightning.measurement import measure
from globenc_lightning.packed import LEVELS
from globenc_lightning.settings import Settings
from tests.distributed_training import FailsInOne
from tests.sharded_models import bits_of, inputs_of, layers_of, post_ln, pre_ln
from tests.training import Album, Sentences, Steps, build_trainer, loader, said


class Sharded(Steps):
    """Shards its model, in a strategy that has a mesh for it.

    Args:
        model: the whole model.
        precision: what ``fully_shard`` computes in.
    """

    def __init__(self, model: Any, precision: torch.dtype | None = None) -> None:
        super().__init__(model.train())
        self.precision = precision

    def configure_model(self) -> None:
        if isinstance(self.model, FSDPModule):
            return
        options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}
        if self.precision is not None:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=self.precision, reduce_dtype=torch.float32)
        for layer in layers_of(self.model):
            fully_shard(layer, **options)
        fully_shard(self.model, **options)


class ShardedAndFails(FailsInOne, Sharded):
    """Its forward raises in one process, after the first layer."""

    def forward(self, **batch: Tensor) -> Any:
        hook = layers_of(self.model)[1].register_forward_pre_hook(lambda *_: super(ShardedAndFails, self).forward())
        fails = self.global_rank == self.rank and self.trainer.global_step == self.at_step
        if not fails:
            hook.remove()
        try:
            return self.model(**batch)
        finally:
            hook.remove()


def strategy_of(processes: int, whole: bool) -> ModelParallelStrategy:
    """A strategy whose checkpoints are one file each, or folders of shards."""
    return ModelParallelStrategy(processes, 1, save_distributed_checkpoint=not whole, process_group_backend="gloo")


def trained(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> tuple[pl.Trainer, list[Tensor]]:
    """Train; also returns the bits of the shards and of the optimizer's states in this process."""
    connected = torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if connected else int(os.environ["WORLD_SIZE"])
    ckpt, whole = options.pop("ckpt_path", None), options.pop("whole", False)
    settings: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 2, "devices": world}
    trainer = build_trainer(callbacks, **{**settings, "strategy": strategy_of(world, whole), **options})
    torch.manual_seed(1)
    trainer.fit(module, loader(Sentences(8 * world, seed=1), 2), loader(Sentences(20), 4), ckpt_path=ckpt)
    bits = [one.clone() for one in bits_of(module)]
    for state in trainer.optimizers[0].state.values():
        bits += [one.to_local().clone() if hasattr(one, "to_local") else one.clone() for one in state.values()]
    return trainer, bits


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def told(callback: GlobEncCallback) -> dict[str, Any]:
    return {"steps": [entry.step for entry in callback.history], "missing": callback.history.missing_steps}


def whole_figures(module: Sharded, like: Any, batch: Any) -> Any:
    """What a whole model with the module's present weights gives."""
    whole = copy.deepcopy(like).train(False)
    whole.load_state_dict({name: one.full_tensor() for name, one in module.model.state_dict().items()})
    return attribute(whole if module.precision is None else whole.to(module.precision), batch, methods=METHODS)


def against(entry: Any, expected: Any) -> dict[str, float]:
    """By how much a validation's figures differ from an analysis at the most, beyond the precision they are kept in."""
    found = {"rows": 0.0, "rho": 0.0}
    for method in METHODS:
        rho = (entry.by_example[method] - expected.correlation[method].float()).abs().max()
        found["rho"] = max(found["rho"], float(rho))
        # The first process alone keeps them.
        for place, row in enumerate(entry.rows.get(method, ())):
            wanted = expected.rows[method][place][-1, expected.attention_mask[place]]
            lost = wanted.max() / (2 * LEVELS)
            found["rows"] = max(found["rows"], float((row - wanted).abs().max() - lost))
    return found


def equal_trainings(options: argparse.Namespace) -> dict[str, Any]:
    """Trainings with and without a callback, those that are named or all of them; a given and a collected probe."""
    result = {}
    examples = inputs_of(Sentences(options.examples).first(options.examples))
    for name, make, precision, probe, more in (
        ("post-LN", post_ln, None, examples, {"accumulate_grad_batches": 2, "limit_train_batches": 4}),
        ("pre-LN", pre_ln, None, None, {"val_check_interval": 1}),
        ("bfloat16", post_ln, torch.bfloat16, examples, {"at": True}),
    ):
        if options.names and name not in options.names:
            continue
        at = [1] if more.pop("at", False) else None
        like, callback, logger = make(), callback_of(probe, at), Album()
        with said() as messages:
            module = Sharded(copy.deepcopy(like), precision)
            trainer, bits = trained(module, callback, logger=logger, **more)
            _, expected = trained(Sharded(copy.deepcopy(like), precision), **more)
        # The first process is shown every second or third row.
        batch = probe or inputs_of(rows(range(0, 5 * options.processes, options.processes)))
        one = {**told(callback), "equal": equal(bits, expected), "messages": messages}
        one["last"] = against(callback.history[-1], whole_figures(module, like, batch))
        one["first"] = against(callback.history[0], whole_figures_of(like, precision, batch))
        one["masked"] = difference_of_gains(callback.history[0].faithfulness, like, precision, batch)
        one["classes"] = sorted({type(part).__name__ for part in module.model.modules() if hasattr(part, "reshard")})
        one["monitored"] = sorted(tag for tag in trainer.callback_metrics if tag.startswith("globenc"))
        result[name] = one
    return result


def callback_of(probe: Any, at: Any) -> GlobEncCallback:
    return GlobEncCallback(probe, num_examples=5, at_steps=at, faithfulness=["N-Enc"])


def difference_of_gains(found: Any, like: Any, precision: torch.dtype | None, batch: Any) -> float:
    """By how much the gains of a sharded model differ from those of a whole one, before the first step."""
    whole = copy.deepcopy(like).train(False)
    whole = whole if precision is None else whole.to(precision)
    expected = measure(Reader(whole), ProbeSet.from_batch(batch), Settings(METHODS), masked=["N-Enc"]).faithfulness
    if expected is None or not torch.equal(found.span.isnan(), expected.span.isnan()):
        return float("inf")
    return float((found.span - expected.span).abs().nan_to_num().max())


def whole_figures_of(like: Any, precision: torch.dtype | None, batch: Any) -> Any:
    whole = copy.deepcopy(like).train(False)
    return attribute(whole if precision is None else whole.to(precision), batch, methods=METHODS)


def rows(places: Iterable[int]) -> dict[str, Tensor]:
    data = Sentences(20)
    return {key: torch.stack([data.rows[place][key] for place in places]) for key in data.rows[0]}


def one_fails(options: argparse.Namespace) -> dict[str, Any]:
    """A validation whose analysis fails in one process, in the middle of a forward pass."""
    like, callback = post_ln(), GlobEncCallback(inputs_of(Sentences(5).first(5)))
    with said() as messages:
        _, bits = trained(ShardedAndFails(copy.deepcopy(like)), callback)
    _, expected = trained(ShardedAndFails(copy.deepcopy(like)))
    return {"failure": {**told(callback), "equal": equal(bits, expected), "messages": messages}}


def resumed(options: argparse.Namespace) -> dict[str, Any]:
    """Trainings that go on from a checkpoint before a validation that is due; one file, and a folder of shards."""
    result, like, probe = {}, post_ln(), inputs_of(Sentences(5).first(5))
    for whole in (False, True):
        folder = options.folder / f"whole_{whole}"
        keeps = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        callback, again = GlobEncCallback(probe), GlobEncCallback(probe)
        trained(Sharded(copy.deepcopy(like)), callback, keeps, enable_checkpointing=True, whole=whole)
        with said() as messages:
            path = str(folder / "step=2.ckpt")
            _, bits = trained(Sharded(post_ln()), again, ckpt_path=path, whole=whole)
        # The state of the callback in the checkpoint is one that nobody asks for there.
        _, expected = trained(Sharded(post_ln()), ckpt_path=path, whole=whole)
        one = {**told(again), "uninterrupted": told(callback), "equal": equal(bits, expected), "messages": messages}
        one["same"] = [
            all(torch.equal(left.by_example[method], right.by_example[method]) for method in METHODS)
            for left, right in zip(again.history, callback.history, strict=True)
        ]
        validated = GlobEncCallback(probe)
        trainer = build_trainer([validated], devices=options.processes, strategy=strategy_of(options.processes, whole))
        # A module that was never run before: the analysis comes after the first pass of a validation.
        fresh = Sharded(copy.deepcopy(like))
        trainer.validate(fresh, loader(Sentences(20), 4), verbose=False)
        one["validated"] = {**told(validated), **against(validated.history[-1], whole_figures(fresh, like, probe))}
        result["one file" if whole else "shards"] = one
    return result


class TensorParallel(Steps):
    """Spreads single weights over the processes."""

    def configure_model(self) -> None:
        plan: dict[str, Any] = {"intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel()}
        for layer in layers_of(self.model):
            parallelize_module(layer, self.device_mesh["tensor_parallel"], plan)


def tensor_parallel(options: argparse.Namespace) -> dict[str, Any]:
    """A training that is refused: the model is spread over the processes in another way."""
    callback, album = GlobEncCallback(inputs_of(Sentences(5).first(5))), Album()
    strategy = ModelParallelStrategy(1, options.processes, process_group_backend="gloo")
    with said() as messages:
        trainer, _ = trained(TensorParallel(post_ln()), callback, logger=album, strategy=strategy)
    reasons = [reason for _, reason in callback.history.reasons]
    return {"refused": {**told(callback), "messages": messages, "reasons": reasons, "trained": trainer.global_step}}


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    one.__name__: one for one in (equal_trainings, one_fails, resumed, tensor_parallel)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", help=f"some of {', '.join(CASES)}, with commas between them")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--examples", type=int, default=5)
    options = parser.parse_args()
    options.processes = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    result = {case: CASES[case](options) for case in options.cases.split(",")}
    rank = torch.distributed.get_rank()
    (options.folder / f"rank_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
