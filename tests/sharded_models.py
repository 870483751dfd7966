"""Sharded models in several processes without a Trainer, run as ``python -m tests.sharded_models`` in each of them.

Each process writes what it has seen to ``<folder>/rank_<n>.json``.
"""

import argparse
import copy
import json
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import GPT2Config, GPT2ForSequenceClassification

from globenc_lightning import METHODS, attribute, sharding
from tests.training import CLASSES, VOCABULARY, Sentences, classifier, redrawn

BATCH = Sentences(6).first(6)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits


def cut(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cuts the graph, so that gradients are taken within the forward pass."""
    with torch.no_grad():
        return logits_of(model, batch)


def post_ln() -> Any:
    return classifier(num_hidden_layers=2).eval()


def pre_ln() -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "pad_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=CLASSES, use_cache=False))
    redrawn(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith("weight") and one.dim() == 2 and "wte" not in name and "wpe" not in name:
                one.normal_(0, 1.5 / one.shape[0] ** 0.5, generator=draw)
            elif name.endswith("bias") and "ln" not in name:
                one.normal_(0, 0.2, generator=draw)
    return model.eval()


def layers_of(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = model.bert.encoder.layer if hasattr(model, "bert") else model.transformer.h
    return found


@dataclass(frozen=True)
class Form:
    """A way to shard a model.

    Attributes:
        model: makes the whole model.
        linears: whether every linear module is a shard of its own.
        layers: whether every layer is.
        root: whether the model is.
        hybrid: whether it is replicated besides being sharded.
        checkpointed: whether the layers' activations are computed again in the backward pass.
        precision: what ``fully_shard`` computes in.
        options: further arguments of ``fully_shard``.
    """

    model: Callable[[], Any] = post_ln
    linears: bool = False
    layers: bool = True
    root: bool = True
    hybrid: bool = False
    checkpointed: bool = False
    frozen: bool = False
    precision: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def sharded(self, whole: Any) -> Any:
        """A copy of a whole model that is sharded."""
        model, size = copy.deepcopy(whole), distributed.get_world_size()
        sizes = ((size, 1), ("replicated", "sharded")) if self.hybrid else ((size,), ("sharded",))
        mesh = init_device_mesh("cpu", sizes[0], mesh_dim_names=sizes[1])
        if self.frozen:
            for parameter in model.bert.parameters():
                parameter.requires_grad = False
        layers = layers_of(model)
        if self.checkpointed:
            for place, layer in enumerate(layers):
                layers[place] = checkpoint_wrapper(layer)
        options: dict[str, Any] = {**self.options, "mesh": mesh}
        if self.precision is not None:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=self.precision, reduce_dtype=torch.float32)
        if self.linears:
            for module in [one for one in model.modules() if type(one) is nn.Linear]:
                fully_shard(module, **options)
        for layer in layers if self.layers else ():
            fully_shard(layer, **options)
        return fully_shard(model, **options) if self.root else model


FORMS: dict[str, Form] = {
    "layers": Form(),
    "layers, pre-LN": Form(pre_ln),
    "linears": Form(linears=True),
    "root": Form(layers=False),
    "root, pre-LN": Form(pre_ln, layers=False),
    "layers without the root": Form(root=False),
    "bfloat16": Form(precision=torch.bfloat16),
    "bfloat16, pre-LN": Form(pre_ln, precision=torch.bfloat16),
    "checkpointed": Form(checkpointed=True),
    "checkpointed, pre-LN": Form(pre_ln, checkpointed=True),
    "whole after a forward": Form(options={"reshard_after_forward": False}),
    "frozen": Form(frozen=True),
    "hybrid": Form(hybrid=True),
}


def settings_of(model: nn.Module) -> list[Any]:
    """What the shards of a model are told, and where they are."""
    found: list[Any] = [(name, type(one).__name__) for name, one in model.named_parameters()]
    for shard in [one for one in model.modules() if isinstance(one, FSDPModule)]:
        state = shard._get_fsdp_state()
        found.append((state._is_root, state._training_state.name, getattr(state, "_auto_reshard_after_forward", None)))
        found.append((id(state._state_ctx), id(state._comm_ctx), len(state._state_ctx.all_states)))
        found.append(id(state._state_ctx.iter_forward_root))
        for group in sharding._groups(shard):
            found.append((id(group.post_forward_mesh_info), group.reshard_after_backward, group.reduce_grads))
            found.append((group._training_state.name, group._sharded_state.name, group.all_reduce_grads))
            found.append(list(group._post_forward_indices))
    return found


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.float().backward()
    optimizer.step()
    optimizer.zero_grad()


def bits_of(model: nn.Module) -> list[Tensor]:
    return [one.to_local() if hasattr(one, "to_local") else one.detach() for one in model.parameters()]


def difference(found: Any, expected: Any) -> dict[str, float]:
    """By how much the figures of a model differ at the most."""
    rows = [(found.rows[method] - expected.rows[method]).abs().max() for method in METHODS]
    rho = [(found.correlation[method] - expected.correlation[method]).abs().max() for method in METHODS]
    return {"rows": float(torch.stack(rows).max()), "rho": float(torch.stack(rho).max())}


def whole_of(form: Form, model: Any, like: Any) -> Any:
    """A whole model with a sharded one's present weights, in the precision that the sharded one computes in."""
    whole = copy.deepcopy(like)
    with torch.no_grad():
        for one, other in zip(whole.parameters(), model.parameters(), strict=True):
            one.copy_(other.full_tensor() if hasattr(other, "full_tensor") else other)
    return whole if form.precision is None else whole.to(form.precision)


def analyses(names: list[str]) -> dict[str, Any]:
    """The named forms, or all of them: each process analyses inputs of its own, and all train.

    What a ``forward=`` leads to is found anew each time, which takes more passes; where it cuts the graph, gradients
    are taken within the forward pass.
    """
    rank = distributed.get_rank()
    inputs = inputs_of(Sentences(4 + rank, seed=rank).first(4 + rank))
    forward = None if rank == 0 else cut
    return {name: analysed(FORMS[name], inputs, forward) for name in FORMS if name in names or not names}


def analysed(form: Form, inputs: dict[str, Tensor], forward: Any) -> dict[str, Any]:
    """A sharded model against a whole one with its weights, and against a sharded one that is only trained."""
    like = form.model()
    one, other = form.sharded(like), form.sharded(like)
    optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=3e-3) for m in (one, other)]
    differences, settings = [], []

    def look() -> None:
        before = settings_of(one)
        found = attribute(one, inputs, methods=METHODS, forward=forward)
        settings.append(settings_of(one) == before)
        whole = whole_of(form, one, like)
        differences.append(difference(found, attribute(whole, inputs, methods=METHODS, forward=forward)))

    look()
    for place in range(3):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            draw = Sentences(4, seed=10 * place + distributed.get_rank()).first(4)
            if place == 1:
                # Half of an accumulated gradient, kept where it is.
                for shard in model.modules():
                    if isinstance(shard, FSDPModule):
                        shard.set_requires_gradient_sync(False, recurse=False)
                model(**draw).loss.float().backward()
                for shard in model.modules():
                    if isinstance(shard, FSDPModule):
                        shard.set_requires_gradient_sync(True, recurse=False)
                if model is one:
                    look()
            step(model, optimizer, draw)
            if place == 1:
                # What no backward pass follows leaves the root whole.
                with torch.no_grad():
                    model(**draw)
                if model is one:
                    look()
    equal = all(torch.equal(a, b) for a, b in zip(bits_of(one), bits_of(other), strict=True))
    return {"differences": differences, "settings": settings, "equal": equal}


def told(job: Callable[[], Any]) -> str:
    """What an error says; nothing where there is none."""
    try:
        job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Pair:
    """Two equal sharded models, of which the first is analysed and both are trained."""

    def __init__(self, form: Form) -> None:
        self.whole = form.model()
        self.one, self.other = form.sharded(self.whole), form.sharded(self.whole)
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (self.one, self.other)]
        self.place = 0

    def attribute(self, **options: Any) -> Any:
        return attribute(self.one, inputs_of(Sentences(3).first(3)), **options)

    def train(self) -> bool:
        """A step of each; whether they are still equal."""
        draw = Sentences(4, seed=10 * self.place + distributed.get_rank()).first(4)
        for model, optimizer in zip((self.one, self.other), self.optimizers, strict=True):
            step(model, optimizer, draw)
        self.place += 1
        return all(torch.equal(a, b) for a, b in zip(bits_of(self.one), bits_of(self.other), strict=True))


def troubles(names: list[str]) -> dict[str, Any]:
    """What goes wrong, in one process or in all: its error, and whether both models are equal after a step more."""
    sharding.PATIENCE = 5
    rank, result = distributed.get_rank(), {}
    pair = Pair(Form())

    def kept(name: str, job: Callable[[], Any]) -> None:
        before = settings_of(pair.one)
        error = told(job)
        distributed.barrier()
        result[name] = {"error": error, "settings": settings_of(pair.one) == before, "equal": pair.train()}

    def fails(model: Any, batch: dict[str, Tensor]) -> Tensor:
        if rank == 1:
            # In the middle of a pass: after the first layer.
            hook = layers_of(model)[1].register_forward_pre_hook(not_here)
            try:
                model(**batch)
            finally:
                hook.remove()
        return logits_of(model, batch)

    def not_here(*_: Any) -> None:
        raise ArithmeticError("not here")

    def exchanges(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = logits_of(model, batch)
        distributed.all_reduce(logits.detach().clone())
        return logits

    def takes_the_state(model: Any, batch: dict[str, Tensor]) -> Tensor:
        model.state_dict()
        return logits_of(model, batch)

    def within_a_forward() -> None:
        hook = layers_of(pair.one)[1].register_forward_pre_hook(lambda *_: pair.attribute())
        try:
            pair.one(**inputs_of(Sentences(3).first(3)))
        finally:
            hook.remove()

    kept("one alone", lambda: pair.attribute() if rank == 0 else None)
    kept("all but one", lambda: pair.attribute() if rank != 0 else None)
    kept("all", pair.attribute)
    kept("one fails", lambda: pair.attribute(forward=fails))
    kept("one is wrong", lambda: attribute(pair.one, {"input_ids": torch.tensor([[999]])} if rank else BATCH))
    kept("exchanges", lambda: pair.attribute(forward=exchanges))
    kept("takes the state", lambda: pair.attribute(forward=takes_the_state))
    kept("all again", pair.attribute)
    large = Large().sharded()
    kept("without room", lambda: without_room(rank == 1, lambda: attribute(large, BATCH)))
    kept("without room, together", lambda: without_room(rank == 1, lambda: gathered(large, True)))

    # It ends the pass that it is called in.
    error = told(within_a_forward)
    result["within a forward"] = {"error": error}

    pair = Pair(Form())
    for shard in pair.one.modules():
        if isinstance(shard, FSDPModule):
            shard.unshard()
    result["was whole"] = {"error": told(pair.attribute), "settings": are_whole(pair.one), "equal": pair.train()}
    pair = Pair(Form())
    with torch.inference_mode():
        # No training goes on from here, with or without an analysis.
        pair.one(**BATCH)
        logits = pair.one(**BATCH).logits
    error = told(pair.attribute)
    with torch.inference_mode():
        result["after a pass in inference mode"] = {"error": error, "equal": logits.equal(pair.one(**BATCH).logits)}
    pair = Pair(Form())
    with torch.inference_mode():
        error = told(pair.attribute)
    result["below inference mode"] = {"error": error, "equal": pair.train()}
    return result


def are_whole(model: nn.Module) -> bool:
    return all(not hasattr(one, "to_local") and one.untyped_storage().nbytes() for one in model.parameters())


def gathered(model: Any, together: bool) -> None:
    with sharding.whole_weights(model, together):
        assert are_whole(model)


class Large(nn.Module):
    """A model of 256 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1 << 20, 64)

    def sharded(self) -> Any:
        return fully_shard(self, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


def without_room(here: bool, job: Callable[[], Any]) -> None:
    """Do something in a process that gets no more than 100 MB more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if here:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20), limits[1]))
    try:
        job()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(names: list[str]) -> dict[str, Any]:
    """What is spread over the processes in other ways, and what a step of it gives before and after a refusal."""
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))
    plan: dict[str, Any] = {"intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel()}

    def tensor_parallel(model: Any) -> Any:
        for layer in layers_of(model):
            parallelize_module(layer, mesh["tensor"], plan)
        return model

    def both(model: Any) -> Any:
        model = tensor_parallel(model)
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    def zero(model: Any) -> Any:
        # What DeepSpeed's stage 3 leaves on a parameter.
        next(model.parameters()).ds_id = 0
        return model

    result = {}
    for name, made in {
        "tensor parallelism": tensor_parallel,
        "both": both,
        "FSDP1": lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
        "ZeRO-3": zero,
    }.items():
        model = made(post_ln())
        before = model(**BATCH).loss
        before.backward()
        error = told(lambda model=model: attribute(model, BATCH))
        after = model(**BATCH).loss
        after.backward()
        result[name] = {"error": error, "equal": bool(before == after)}
    return result


CASES: dict[str, Callable[[list[str]], dict[str, Any]]] = {one.__name__: one for one in (analyses, troubles, refused)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", help=f"some of {', '.join(CASES)}, with commas between them")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    result = {case: CASES[case](options.names) for case in options.cases.split(",")}
    (options.folder / f"rank_{rank}.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
