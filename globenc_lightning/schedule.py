"""When a training is looked at: at which validations, and at which training steps besides."""

from collections.abc import Sequence
from typing import Any

LOG = "log"


class Schedule:
    """Counts validations, and says which validations and training steps are analysed.

    Args:
        every_n_validations: the first validation and every n-th after it.
        at_steps: numbers of training steps, from 1; ``"log"`` for the powers of two before the first validation; None
            for no step besides the validations.

    Attributes:
        validations: how many validations there were; it travels in checkpoints.

    Raises:
        ValueError: ``at_steps`` is something else.
    """

    def __init__(self, every_n_validations: int, at_steps: Sequence[int] | str | None) -> None:
        self.validations = 0
        self._every = every_n_validations
        self._by_powers = at_steps == LOG
        self._steps = frozenset() if at_steps is None or self._by_powers else _checked(at_steps)
        self._latest = 0

    @property
    def has_steps(self) -> bool:
        """Whether training steps are analysed besides the validations."""
        return self._by_powers or bool(self._steps)

    def count_validation(self) -> None:
        """One more validation has come, which is none that a resumed training repeats."""
        self.validations += 1

    @property
    def is_turn(self) -> bool:
        """Whether the validation that was counted last is analysed."""
        return (self.validations - 1) % self._every == 0

    @property
    def analysed(self) -> int:
        """The place of the validation that was counted last among those that are analysed, from 0."""
        return (self.validations - 1) // self._every

    @property
    def next_is_turn(self) -> bool:
        """Whether the next validation will be analysed."""
        return self.validations % self._every == 0

    def begin(self, step: int = 0) -> None:
        """A training begins, or goes on, after so many optimizer steps: none of them is asked for any more."""
        self._latest = step

    def takes(self, step: int) -> bool:
        """Returns whether a training step is analysed, once for each: steps that accumulate gradients repeat it.

        Several optimizers count several steps at a time: one that was passed by is made up for at once.

        Args:
            step: how many optimizer steps were taken.
        """
        pending, self._latest = self.is_pending(step), max(step, self._latest)
        return pending

    def is_pending(self, step: int) -> bool:
        """Returns whether :meth:`takes` would take a training step, without taking it.

        Args:
            step: how many optimizer steps were taken.
        """
        new = range(self._latest + 1, step + 1)
        if self._by_powers:
            return not self.validations and any(one & (one - 1) == 0 for one in new)
        return any(one in self._steps for one in new)


def _checked(at_steps: Any) -> frozenset[int]:
    wanted = "at_steps must be numbers of training steps, from 1, such as [1, 2, 4, 8], or 'log'"
    if isinstance(at_steps, str) or not isinstance(at_steps, Sequence | set | frozenset | range):
        raise ValueError(f"{wanted}; got {at_steps!r}")
    for one in at_steps:
        if isinstance(one, bool) or not isinstance(one, int) or one < 1:
            raise ValueError(f"{wanted}; got {one!r} among them")
    return frozenset(at_steps)
