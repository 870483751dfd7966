"""The one context in which a user's model is touched, and that puts everything back."""

import operator
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

READABLE_ATTENTION = ("eager", "sdpa", None)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states of torch, numpy and Python back afterwards, whatever happened.

    Around everything that is not the model's: a logger or a user's target may draw random numbers, too.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def undisturbed(model: nn.Module, *, parameters_require_grad: bool) -> Iterator[list[RemovableHandle]]:
    """Run an analysis on a model that is being trained, and leave no trace of it.

    Inside: every module in eval mode, gradients enabled even below ``torch.inference_mode``, autocast off, compiled
    modules run eagerly (hooks added after compilation would not fire), attention kernels that cannot be read (flash,
    flex) replaced by sdpa. Afterwards, whatever happened: each module's own attributes (``training`` among them), the
    contents of its buffers, each parameter's own ``requires_grad``, the configurations, and the random states of torch,
    numpy and Python are what they were, and the hooks whose handles were appended to the yielded list are gone. What a
    forward pass writes elsewhere (a list that it appends to, a file) is out of reach.

    Args:
        model: the module whose parts may be run.
        parameters_require_grad: whether parameters take part in the autograd graph. Without, the gradient goes to
            the hidden states alone, and nothing is saved for weight gradients.

    Yields:
        A list for the handles of the hooks that the analysis registers.
    """
    attributes = [(module, dict(vars(module)), _parts(module)) for module in model.modules()]
    requires_grad = [
        (parameter, parameter.requires_grad) for parameter in model.parameters() if parameter.is_floating_point()
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    configs = {id(config): (config, dict(vars(config))) for config in _configs(model)}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    handles: list[RemovableHandle] = []
    unreadable = _unreadable_attention(model)
    devices = {parameter.device for parameter, _ in requires_grad if not parameter.is_meta}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            cuda = sorted({device.index for device in devices if device.type == "cuda" and device.index is not None})
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            for device_type in {"cpu", *(device.type for device in devices)}:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            # Importing dynamo takes seconds; a process that never imported it has compiled nothing.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # The flag alone: train() and eval() are methods that users override.
            for module, _, _ in attributes:
                module.training = False
                # A feed-forward network that runs in chunks gives the same, but its norm never sees a whole sequence.
                if vars(module).get("chunk_size_feed_forward"):
                    vars(module)["chunk_size_feed_forward"] = 0
            for config, implementation in unreadable:
                config._attn_implementation_internal = "sdpa" if implementation[1] else "eager"
            for parameter, _ in requires_grad:
                parameter.requires_grad_(parameters_require_grad)
            yield handles
    finally:
        for handle in handles:
            handle.remove()
        for config, before in configs.values():
            _restore(vars(config), before)
        for buffer, was in buffers:
            # Bit by bit, NaN included: what is written back unchanged would still be a write.
            if not torch.equal(_bits(buffer), _bits(was)):
                with torch.no_grad():
                    buffer.copy_(was)
        for module, values, parts in attributes:
            _restore(vars(module), values)
            for name, content in parts.items():
                _restore(vars(module)[name], content)
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _parts(module: nn.Module) -> dict[str, dict[str, Any]]:
    """A module's own tables of parameters, buffers and children: a forward pass may exchange entries of them."""
    return {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")}


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    # In their order, too: nothing is slower to compare than all parts of all modules by their names.
    if list(now) != list(before) or not all(map(operator.is_, now.values(), before.values())):
        now.clear()
        now.update(before)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor.detach().reshape(1).view(torch.uint8)
    )


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of the Hugging Face models in a module: a forward pass with labels writes into them."""
    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]


def _unreadable_attention(model: nn.Module) -> list[tuple[Any, tuple[str, bool]]]:
    """The configurations whose attention is a kernel that shows nothing: (its name, whether sdpa can stand in)."""
    found = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            implementation = getattr(module.config, "_attn_implementation", None)
            if implementation not in READABLE_ATTENTION:
                found[id(module.config)] = (
                    module.config,
                    (implementation, bool(getattr(module, "_supports_sdpa", True))),
                )
    return list(found.values())
