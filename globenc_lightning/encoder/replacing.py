"""Run a model whose encoders go on with other first hidden states than those they made.

No layer is looked at: the encoders were read, and their structure proven, on the states that they made themselves.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from globenc_lightning.encoder.contexts import OwnContexts, memory_of
from globenc_lightning.encoder.precision import LOW, FullPrecision
from globenc_lightning.encoder.reading import Skipped, encoders_called, watch_call
from globenc_lightning.encoder.structure import Structure
from globenc_lightning.errors import ModelCallError


def run_from(
    model: nn.Module,
    structures: tuple[Structure | Skipped, ...],
    states: Sequence[Tensor],
    call: Callable[[], Any],
    handles: list[RemovableHandle],
    contexts: OwnContexts,
) -> tuple[Any, list[Tensor | None]]:
    """Run the model from given first hidden states on.

    Must run in ``undisturbed``, as :func:`~globenc_lightning.encoder.reading.read`.

    Args:
        model: the module that is called.
        structures: what the structure pass found, one per call of an encoder.
        states: (b, s, d) for each of these calls that is read.
        call: runs the model.
        handles: takes what puts things back once the backward pass is done, for the caller to remove.
        contexts: what becomes of the contexts that the forward opens.

    Returns:
        What the model returned; and for each call that is read the states that it went on with, which require a
        gradient; None where its first hidden states are made of another call's, and were left as they were.
    """
    leaves: list[Tensor | None] = []
    failed: list[Exception] = []
    entered: list[Structure | Skipped] = []
    waiting: list[Structure] = []
    own = [one for one in structures if isinstance(one, Structure)]
    kept = {memory_of(one) for one in (*model.parameters(), *model.buffers())}
    hooks: list[RemovableHandle] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(entered) >= len(structures) or structures[len(entered)].encoder is not module:
            raise ModelCallError("from other hidden states, the forward pass calls its encoders in another order.")
        structure = structures[len(entered)]
        entered.append(structure)
        waiting[:] = [structure] if isinstance(structure, Structure) else []

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if waiting:
            raise ModelCallError("from other hidden states, the forward pass leaves its encoder's layers out.")

    def entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not waiting or waiting[0].entry is not module:
            return None
        structure = waiting.pop()
        argument = structure.entry_argument
        given: Tensor = args[argument] if isinstance(argument, int) else kwargs[argument]
        if _depends_on(given, leaves):
            leaves.append(None)
            return None
        new = states[len(leaves)].to(given.dtype)
        new = new.transpose(0, 1) if structure.sequence_first else new
        if memory_of(given) in kept or 0 in given.stride():
            given = new.clone()
        else:
            # The very tensor that the model made, so that whatever else uses it sees the same states. It may be one
            # that somebody keeps.
            handles.append(_Restored(given))  # type: ignore[arg-type]
            with torch.no_grad():
                given.copy_(new)
        if structure.sequence_first:
            leaf = given.transpose(0, 1).requires_grad_()
            given = leaf.transpose(0, 1)
        else:
            leaf = given.requires_grad_()
        leaves.append(leaf)
        if isinstance(argument, int):
            return (*args[:argument], given, *args[argument + 1 :]), kwargs
        return args, {**kwargs, argument: given}

    chains = []
    for encoder in encoders_called(model, structures):
        closing = next((one.closing for one in own if one.encoder is encoder), None)
        chains.append(watch_call(encoder, contexts.apart(before), contexts.apart(after), failed, hooks, closing))
    for module in {id(one.entry): one.entry for one in own}.values():
        hooks.append(module.register_forward_pre_hook(contexts.apart(entry), with_kwargs=True))
    for chain in chains:
        hooks += [] if chain is None else chain.watch_exit()
    with ExitStack() as stack:
        stack.callback(_remove, hooks)
        low = any(one.dtype in LOW for structure in own for one in structure.encoder.parameters())
        if contexts.connected and not low:
            devices = {one.device.type for one in model.parameters()} - {"meta"} | {"cpu"}
            stack.enter_context(FullPrecision(devices))
        stack.enter_context(contexts)
        output = call()
    if failed:
        raise ModelCallError(f"from other hidden states, an encoder raised: {failed[0]}") from failed[0]
    if len(leaves) != len(own):
        raise ModelCallError("from other hidden states, the forward pass calls fewer encoders than from its own.")
    return output, leaves


def _depends_on(given: Tensor, leaves: Sequence[Tensor | None]) -> bool:
    """Whether a tensor is made of one of others, by its autograd graph.

    That it requires a gradient does not tell: for checkpointing, hooks let what embeddings give require one.
    """
    sources = [one for one in leaves if one is not None]
    if not given.requires_grad or not sources:
        return False
    wanted = {one.grad_fn for one in sources} - {None}
    seen: set[Any] = set()
    stack = [given.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if node in wanted or any(variable is one for one in sources):
            return True
        stack += [following for following, _ in node.next_functions]
    return any(given is one for one in sources)


class _Restored:
    """Puts a tensor's numbers back."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._numbers = tensor, tensor.detach().clone()

    def remove(self) -> None:
        """Put them back."""
        with torch.no_grad():
            self._tensor.copy_(self._numbers)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
