"""Gathers the weights of a model that is sharded by ``fully_shard`` (FSDP2), and shards them again; knows torch alone.

A forward pass of a sharded model waits for the other processes at every shard. An analysis runs as many passes as its
examples need, in each process its own number, so it has to find the whole weights in place: they are gathered once
before it, stay whole in all of its passes, and are sharded again after it. Meanwhile each process holds every weight of
the model, in the precision of its ``MixedPrecisionPolicy``, beside its own shards; gradients and optimizer states stay
sharded.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from globenc_lightning import processes
from globenc_lightning.errors import GlobEncError, OutOfMemoryError, UnsupportedEncoderError, is_out_of_memory

PATIENCE = 60.0
"""For so many seconds a process that wants the whole weights waits until the others want them, too."""

INSTEAD = (
    "Shard it by fully_shard alone (FSDP2; ModelParallelStrategy(tensor_parallel_size=1) in Lightning), train it by "
    "DDP, or load a checkpoint into a whole model in one process and call attribute() there."
)
_SHARDED_BY_THE_PASS = ("_sharded_state", "_all_gather_result")
"""What tells a group of parameters whether they are gathered: sharding them again sets it."""


def refusal(model: nn.Module) -> str | None:
    """Returns why a model's whole weights are not to be had; None where every process holds or can gather them.

    Args:
        model: any module.
    """
    modules = list(model.modules())
    return _refusal(modules, _shards(modules))


@contextmanager
def whole_weights(model: nn.Module, together: bool = False) -> Iterator[None]:
    """Hold the whole weights of a model that is sharded by ``fully_shard``, and shard them again afterwards.

    Does nothing for a model that is not sharded. Inside, no forward and no backward pass exchanges anything, so that
    each process runs as many as it likes. Afterwards, whatever happened, the shards, the settings of every shard
    (``set_reshard_after_forward``, ``set_reshard_after_backward``, ``set_requires_gradient_sync``) and the state of a
    training that goes on are what they were. It has to be outside of
    :func:`~globenc_lightning.encoder.undisturbed.undisturbed`, which puts back the parameters that it finds.

    Each process needs memory for all weights: their number times the bytes of one in the precision that the policy of
    ``fully_shard`` computes in (two for bfloat16, four for float32), and while they come in those of the largest shard
    once more. A process that has no room for them says so before any weight is sent.

    Args:
        model: any module.
        together: whether all processes are known to be here. Otherwise, they have to come within ``PATIENCE`` seconds,
            and what would wait for another process inside is refused.

    Raises:
        UnsupportedEncoderError: the model is spread over the processes in another way.
        OutOfMemoryError: a process has no memory for all weights.
        GlobEncError: not all processes have come, or a forward pass of the model is under way. Nothing was touched.
    """
    modules = list(model.modules())
    shards = _shards(modules)
    reason = _refusal(modules, shards)
    if reason is not None:
        raise UnsupportedEncoderError(reason)
    if not shards:
        yield
        return
    _wait_for_others(shards, together)
    kept = _Kept(modules, shards)
    with ExitStack() as stack:
        stack.callback(kept.put_back)
        _gather(shards, kept)
        if not together:
            stack.enter_context(processes.without_exchange())
        yield


def _refusal(modules: list[nn.Module], shards: list[Any]) -> str | None:
    try:
        _check_parts(shards)
        kind = _other_kind(modules, shards)
    except AttributeError as error:
        return (
            f"this model is sharded by fully_shard of torch {torch.__version__}, whose parts are not known here "
            f"({error}), so it is not analysed. Train it by DDP, or load a checkpoint into a whole model in one process"
            " and call attribute() there."
        )
    if kind is None:
        return None
    return f"this model's parameters are spread over the processes by {kind}, so it is not analysed. {INSTEAD}"


def _other_kind(modules: list[nn.Module], shards: list[Any]) -> str | None:
    """How a model is spread over the processes, if it is not by ``fully_shard`` alone."""
    if any(base.__name__ == "FullyShardedDataParallel" for kind in set(map(type, modules)) for base in kind.__mro__):
        return "FullyShardedDataParallel (FSDP1)"
    # Where tensors of many processes are registered; a parameter's own object changes with its shard's state.
    dtensors = set()
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if "ds_id" in vars(parameter):
                return "ZeRO stage 3 of DeepSpeed, where stages 1 and 2 would leave every process the whole model"
            if _is_dtensor(parameter):
                dtensors.add((id(module), name))
    for group in _groups(*shards):
        for parameter in group.fsdp_params:
            if parameter.is_dtensor:
                return "tensor parallelism (DTensor)"
            info = parameter._module_info
            dtensors.discard((id(info.module), info.param_name))
            dtensors.difference_update(zip(map(id, info.shared_modules), info.shared_param_names, strict=True))
    return "tensor parallelism (DTensor)" if dtensors else None


def _is_dtensor(parameter: Any) -> bool:
    """By name: importing the class takes seconds where nothing is sharded."""
    return type(parameter) is not nn.Parameter and type(parameter).__name__ == "DTensor"


def _shards(modules: list[nn.Module]) -> list[Any]:
    """Those of a model's modules that ``fully_shard`` was called on."""
    # A process that has not imported it has sharded nothing; importing it takes seconds.
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None:
        return []
    kinds = {one for one in set(map(type, modules)) if issubclass(one, kind)}
    return [module for module in modules if type(module) in kinds]


def _groups(*shards: Any) -> list[Any]:
    """The groups of parameters of shards, each gathered in one go; modules that are sharded together share theirs."""
    found = {}
    for shard in shards:
        state = shard._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            # Before there could be several.
            groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
        found.update({id(group): group for group in groups})
    return list(found.values())


def _check_parts(shards: list[Any]) -> None:
    """Look for every part that is used below.

    Raises:
        AttributeError: this torch has other ones.
    """
    for shard in shards:
        state = shard._get_fsdp_state()
        _ = state._training_state, state._is_root, state._state_ctx, state._comm_ctx, state._lazy_init
        for group in _groups(shard):
            _ = group._training_state, group._sharded_state, group.is_unsharded, group.is_sharded, group.comm_ctx
            _ = group.post_forward_mesh_info, group.reshard_after_backward, group.reduce_grads, group.all_reduce_grads
            _ = group.mp_policy, group.device, group.fsdp_params, group._post_forward_indices
            _ = [parameter.all_gather_outputs for parameter in group.fsdp_params]
            _ = group._to_sharded


def _wait_for_others(shards: list[Any], together: bool) -> None:
    """Make sure that every process will gather the weights, before any of them waits for another."""
    groups = _groups(*shards)
    trouble: Exception | None = None
    if any(group._training_state.name != "IDLE" for group in groups):
        trouble = GlobEncError(
            "a forward or backward pass of this sharded model is under way (or was left by an error), so its weights "
            "cannot be gathered: analyse it between two passes, not from within one."
        )
    else:
        trouble = _ask_for_memory(groups)
    ranks = sorted({rank for group in groups for rank in group.mesh_info.mesh.mesh.flatten().tolist()})
    if together:
        # A process that has no room must not leave the others waiting for its shards.
        said = "" if trouble is None else f"{type(trouble).__name__}: {trouble}"
        for rank, other in enumerate(processes.gathered(said)):
            if other and trouble is None:
                trouble = GlobEncError(f"in the process of rank {rank}: {other}")
    if trouble is not None:
        raise trouble
    if not together and len(ranks) > 1 and not processes.have_met(ranks, PATIENCE):
        raise GlobEncError(
            f"this model is sharded by fully_shard over {len(ranks)} processes, which gather its weights together, and "
            f"not all of them have asked for an analysis within {PATIENCE:g} s: call attribute() in all of them, at "
            "the same place in the training, each on the same or on its own inputs. A checkpoint that is loaded into a "
            "whole model can be analysed by one process alone."
        )


def _ask_for_memory(groups: list[Any]) -> OutOfMemoryError | None:
    """Take the memory of the whole weights and leave it again, so that it is there when they are gathered."""
    wanted: list[tuple[Any, torch.dtype, torch.device]] = []
    largest = 0
    for group in [group for group in groups if not group.is_unsharded]:
        size = 0
        for parameter in group.fsdp_params:
            whole = parameter.sharded_param
            dtype = (group.mp_policy.param_dtype if whole.is_floating_point() else None) or whole.dtype
            wanted.append((whole.shape, dtype, group.device))
            size += whole.numel() * dtype.itemsize
        largest = max(largest, size)
    # What comes in of a group is held until its weights are made of it.
    wanted += [(torch.Size([largest]), torch.uint8, group.device) for group in groups[:1]]
    try:
        held = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in wanted]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = sum(shape.numel() * dtype.itemsize for shape, dtype, _ in wanted)
        return OutOfMemoryError(
            f"the memory does not suffice for the whole weights of this sharded model: an analysis gathers all of them "
            f"in each process, {size / 2**30:.2f} GiB. Load a checkpoint into a whole model on a larger device or on "
            "the CPU, and call attribute() there."
        )
    del held
    return None


def _gather(shards: list[Any], kept: "_Kept") -> None:
    """Make the weights whole, and let every pass leave them so."""
    # What is made below inference mode could not take part in a training any more.
    with torch.inference_mode(False), torch.no_grad():
        for shard in _outermost(shards):
            # The first module that runs becomes the root, and an analysis may run a part of the model first.
            shard._get_fsdp_state()._lazy_init()
        for group in _groups(*shards):
            # As set_reshard_after_forward(False), which torch 2.6 does not have, and set_reshard_after_backward(False).
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
            # As set_requires_gradient_sync(False): gradients that a training accumulates stay where they are.
            group.reduce_grads = group.all_reduce_grads = False
        for shard in shards:
            shard.unshard()
        kept.keep_whole()


def _outermost(shards: list[Any]) -> list[Any]:
    """The shards that are not within another one."""
    within = {id(inner) for shard in shards for inner in shard.modules() if inner is not shard}
    return [shard for shard in shards if id(shard) not in within]


def _is_made_below_inference_mode(group: Any) -> bool:
    """Whether the places for a group's whole weights are of a validation without a training."""
    return any(tensor.is_inference() for parameter in group.fsdp_params for tensor in parameter.all_gather_outputs)


def _forget_whole_weights(group: Any) -> None:
    """Let a group make the places for its whole weights anew: in these, no gradient could be had."""
    group.reshard()
    for parameter in group.fsdp_params:
        parameter.all_gather_outputs = []
        del parameter._unsharded_param


class _Kept:
    """What a sharded model was: its parameters, and the settings and the state of its shards."""

    def __init__(self, modules: list[nn.Module], shards: list[Any]) -> None:
        states = [shard._get_fsdp_state() for shard in shards]
        self._groups = groups = _groups(*shards)
        for group in groups:
            if _is_made_below_inference_mode(group):
                _forget_whole_weights(group)
        self._sharded = [group for group in groups if not group.is_unsharded]
        for group in self._sharded:
            # After a forward, parameters may be sharded over fewer processes.
            group.reshard()
        self._parameters = [
            (module, name, parameter)
            for module in modules
            for name, parameter in module._parameters.items()
            if _is_dtensor(parameter)
        ]
        # They share their contexts, once a forward pass has told which of them is the root.
        every = [*states, *(one for state in states for one in (state._state_ctx, state._comm_ctx))]
        every += [*groups, *(group.comm_ctx for group in groups)]
        self._attributes = [
            (one, {name: (value, _copied(value)) for name, value in vars(one).items()})
            for one in {id(one): one for one in every}.values()
        ]

    def keep_whole(self) -> None:
        """Let nothing free the weights before :meth:`put_back`.

        The settings do not see to it alone: a gradient that is taken within a forward pass ends the pass of the shards
        around it, which then free what the pass goes on with, and a state dict that a step takes frees everything.
        """
        for group in self._groups:
            group._to_sharded = _nothing

    def put_back(self) -> None:
        """Shard what was sharded, and make the rest what it was."""
        # First of all the state: a shard whose forward pass was left by an error would stay whole.
        for one, attributes in self._attributes:
            for name, (value, entries) in attributes.items():
                if name in _SHARDED_BY_THE_PASS:
                    continue
                if vars(one)[name] is not value:
                    setattr(one, name, value)
                if entries is not None and list(value) != entries:
                    value.clear()
                    (value.update if isinstance(value, set) else value.extend)(entries)
        for group in self._groups:
            vars(group).pop("_to_sharded", None)
        for group in self._sharded:
            group.reshard()
        for module, name, parameter in self._parameters:
            # What was exchanged inside is not what the shard knows.
            if module._parameters.get(name) is not parameter:
                module._parameters[name] = parameter


def _nothing() -> None:
    """Leave the weights whole."""


def _copied(value: Any) -> list[Any] | None:
    """The entries of a list or a set."""
    return list(value) if type(value) in (list, set) else None
