"""What the processes of one training tell each other; torch alone, and nothing where there is one process.

Every function that exchanges something has to be called by all processes, the same number of times and in the same
order: so what is exchanged also says what went wrong, and nobody waits for a process that has failed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from globenc_lightning.errors import CollectiveError

EXCHANGING = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
"""Namespaces of the operators in which a process waits for others."""
SHARDED_MODULES = ("FullyShardedDataParallel",)
"""Classes of modules whose parameters are spread over the processes, by name: importing them takes seconds."""


def are_connected() -> bool:
    """Whether this process can talk to others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks.

    Args:
        value: tensors on the CPU and primitives, and lists and mappings of them.

    Returns:
        One value per process.
    """
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The value of the process of rank zero.

    Args:
        value: tensors on the CPU and primitives; only that of rank zero matters.

    Returns:
        That value.
    """
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def without_exchange() -> Iterator[None]:
    """Refuse whatever waits for another process, before it does: the processes run a step on different examples.

    Raises:
        CollectiveError: inside, at every such operator.
    """
    if not are_connected():
        yield
        return
    with _RefusesExchange() as refuses:
        try:
            yield
        except CollectiveError:
            raise
        except Exception as error:
            if refuses.reason is not None:
                # What follows from a step that went another way because of the refusal is no reason of its own.
                raise CollectiveError(refuses.reason) from error
            raise
    if refuses.reason is not None:
        # The code that was run has caught it.
        raise CollectiveError(refuses.reason)


class _RefusesExchange(TorchDispatchMode):
    """Raises where an operator exchanges something."""

    reason: str | None = None

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator if it is one of this process alone."""
        if getattr(func, "namespace", "") in EXCHANGING:
            self.reason = (
                f"the step exchanges tensors with the other processes ({getattr(func, '__name__', func)}), and a step "
                "that does that is not analysed in a training of several processes. Its figures can be seen in a "
                "training of one process (devices=1)."
            )
            raise CollectiveError(self.reason)
        return func(*args, **(kwargs or {}))


def sharded_over_processes(model: nn.Module) -> bool:
    """Whether no process holds the whole model (FSDP, FSDP2, tensor parallelism, ZeRO stage 3).

    A forward pass of such a model is an exchange in itself: a process that leaves it early leaves the others waiting.
    """
    if any(type(module).__name__ in SHARDED_MODULES for module in model.modules()):
        return True
    return any(_is_shard(parameter) for parameter in model.parameters())


def _is_shard(parameter: torch.Tensor) -> bool:
    names = {type(parameter).__name__, type(parameter.data).__name__}
    return "DTensor" in names or hasattr(parameter, "ds_id")
