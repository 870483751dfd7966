"""Moments of a training whose analysis is not finished: what a checkpoint from inside one of them has to hold.

A signal (SLURM's SIGUSR1), Ctrl-C or an error writes a checkpoint from inside a validation, and Lightning leaves that
validation out on resume. Such a checkpoint holds the state from before the moment, and a :class:`Moment` that tells
what a resumed training has to make up for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VALIDATION = "validation"
STEP = "step"
BASELINE = "baseline"


@dataclass
class Moment:
    """A moment that is to be analysed, from its beginning until all of its results are written.

    Attributes:
        kind: ``"validation"``; ``"step"``, a training step that ``at_steps`` asks for; or ``"baseline"``, the model
            before the first step.
        step: the step of its figures; None where the moment itself tells it.
        epoch: the training's epoch.
        written: which results are written already, each with the run that it went to.
        has_validation_weights: whether a callback of Lightning's that averages weights has put them into the module.
        is_exchanged: whether we have: then the trained weights are to be put back.
    """

    kind: str
    step: int | None
    epoch: int
    written: list[str] = field(default_factory=list)
    has_validation_weights: bool = False
    is_exchanged: bool = False

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> "Moment | None":
        """Returns the moment that :meth:`state` was called on; None for None."""
        return None if state is None else cls(**{**state, "written": list(state["written"])})

    def state(self) -> dict[str, Any]:
        """Returns everything in primitives."""
        return {**vars(self), "written": list(self.written)}


@dataclass(frozen=True)
class Before:
    """What was known when a moment began, so that a checkpoint from inside of it can leave the moment out.

    Attributes:
        entries: the number of entries of the history.
        missing: the number of validations without figures.
        reasons: the number of reasons.
        validations: the number of validations that were counted.
        latest: the step of the latest validation with figures.
    """

    entries: int
    missing: int
    reasons: int
    validations: int
    latest: int | None
