"""What an analysis has explained, and a way to have the same examples decided again on masked copies.

Axes: ``n`` example, ``b`` text of the encoder's call, ``s`` token.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from globenc_lightning.encoder.masking import CallOfEncoder
from globenc_lightning.task.kinds import Decision

Within = Callable[[], AbstractContextManager[None]]
"""Makes a context that changes something about one forward pass."""


@dataclass(frozen=True, eq=False)
class Explained:
    """The decision that one batch of an analysis has explained.

    Attributes:
        decision: on the examples, on the CPU: the number of a unit is that of an example.
        rows: (n,) the row of the encoder's call that each example is decided from; its own number when None.
        is_shared: whether one number is decided of all examples together.
        labelled: (n,) whether anything is decided of an example; of all of them when None.
        mask: (b, s) the real tokens of the encoder's call.
        call: the encoder's call that is shown; None where it was given no token ids.
        again: decides the examples again by one forward pass in evaluation, without gradients, inside a context.
    """

    decision: Decision
    rows: Tensor | None
    is_shared: bool
    labelled: Tensor | None
    mask: Tensor
    call: CallOfEncoder | None
    again: Callable[[Within], Decision]
