"""What the processes of one training tell each other; torch alone, and nothing where there is one process.

Every function that exchanges something has to be called by all processes, the same number of times and in the same
order: so what is exchanged also says what went wrong, and nobody waits for a process that has failed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from globenc_lightning.errors import CollectiveError

EXCHANGING = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
"""Namespaces of the operators in which a process waits for others."""


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


def have_met(ranks: Sequence[int], patience: float) -> bool:
    """Whether all of some processes call this within a time: the same answer in all that wait for it.

    An exchange would wait for a process that does not come until the training is given up. The processes' store can be
    asked, and lets go.

    Args:
        ranks: the processes, this one among them; all have to name the same.
        patience: how many seconds a process waits.

    Returns:
        Whether they all came. Those that did not do not find their places taken when they come later.
    """
    name = "globenc_lightning/" + ",".join(map(str, ranks))
    store = distributed.PrefixStore(name, distributed.distributed_c10d._get_default_store())
    while True:
        turn = store.add("turn", 0)
        there, verdict = f"{turn}/there", f"{turn}/verdict"
        is_last = store.add(there, 1) == len(ranks)
        late = store.check([verdict])
        if is_last:
            store.compare_set(verdict, "", "met")
        elif not late:
            try:
                store.wait([verdict], timedelta(seconds=patience))
            except RuntimeError:
                # Unless the last one has come just now.
                store.compare_set(verdict, "", "missed")
        met = store.get(verdict) == b"met"
        # Whoever is first begins the next turn.
        store.compare_set("turn", str(turn), str(turn + 1))
        if met or not (late or is_last):
            return met


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
