"""Sharded models in several processes without a Trainer, run as ``python -m tests.sharded_models`` in each of them.

Each process writes what it has seen to ``<folder>/rank_<n>.json``.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import GPT2Config, GPT2ForSequenceClassification

from globenc_lightning import METHODS, attribute, sharding
from tests.training import CLASSES, VOCABULARY, Sentences, classifier, redrawn


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits


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
        found.append((state._is_root, state._training_state.name, state._auto_reshard_after_forward))
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


def analyses(folder: Path) -> dict[str, Any]:
    """Every form: figures before the first pass, after steps and between accumulated gradients; bits afterwards."""
    result = {}
    rank = distributed.get_rank()
    # Each process has its own inputs. What a forward= leads to is found anew each time, which takes more passes.
    inputs = inputs_of(Sentences(4 + rank, seed=rank).first(4 + rank))
    forward = None if rank == 0 else logits_of
    for name, form in FORMS.items():
        like = form.model()
        one, other = form.sharded(like), form.sharded(like)
        optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=3e-3) for m in (one, other)]
        differences, settings = [], []

        def look(model: Any = one, form: Form = form, like: Any = like, kept: Any = differences) -> None:
            before = settings_of(model)
            found = attribute(model, inputs, methods=METHODS, forward=forward)
            settings.append(settings_of(model) == before)
            whole = whole_of(form, model, like)
            kept.append(difference(found, attribute(whole, inputs, methods=METHODS, forward=forward)))

        look()
        for place in range(3):
            for model, optimizer in zip((one, other), optimizers, strict=True):
                draw = Sentences(4, seed=10 * place + rank).first(4)
                if place == 1:
                    # Half of an accumulated gradient, kept where it is.
                    for shard in model.modules():
                        if isinstance(shard, FSDPModule):
                            shard.set_requires_gradient_sync(False, recurse=False)
                    model(**draw).loss.float().backward()
                    if model is one:
                        look()
                    for shard in model.modules():
                        if isinstance(shard, FSDPModule):
                            shard.set_requires_gradient_sync(True, recurse=False)
                step(model, optimizer, draw)
                if place == 1:
                    # What no backward pass follows leaves the root whole.
                    with torch.no_grad():
                        model(**draw)
                    if model is one:
                        look()
        equal = all(torch.equal(a, b) for a, b in zip(bits_of(one), bits_of(other), strict=True))
        result[name] = {"differences": differences, "settings": settings, "equal": equal}
    return result


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {one.__name__: one for one in (analyses,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    result = CASES[options.case](options.folder)
    (options.folder / f"rank_{rank}.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
