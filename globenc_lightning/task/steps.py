"""The steps of a user's module that may tell what it decides, and how they are called."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from globenc_lightning.task.replaying import Step

OWNERS = ("pytorch_lightning", "lightning")
"""Packages whose own steps are placeholders."""


def steps_of(module: nn.Module, forward: Callable[..., Any] | None = None) -> list[Step]:
    """The steps that are watched, the best first.

    Args:
        module: the user's module.
        forward: the user's own way to get logits, ``forward(module, batch)``; no step is watched then.

    Returns:
        The steps: the validation step, then the training step where Lightning does the optimisation (else it would be
        done in the step itself).
    """
    if forward is not None:
        return [Step("forward=", lambda batch, place, loader: forward(module, batch), True)]
    names = ["validation_step"]
    if getattr(module, "automatic_optimization", True):
        names.append("training_step")
    return [Step(name, _caller(module, name)) for name in names if _is_own(module, name)]


def _is_own(module: nn.Module, name: str) -> bool:
    function = getattr(type(module), name, None)
    own = vars(module).get(name, function)
    return callable(own) and f"{getattr(own, '__module__', '')}".partition(".")[0] not in OWNERS


def _caller(module: nn.Module, name: str) -> Callable[[Any, int, int], Any]:
    """Calls a step with as many arguments as Lightning would give it."""

    def call(batch: Any, place: int, loader: int) -> Any:
        step = getattr(module, name)
        parameters = inspect.signature(step).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        anything = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        arguments = [batch]
        if len(positional) > 1 or anything:
            arguments.append(place)
        if any(p.name == "dataloader_idx" for p in positional):
            # A step for one loader has a default for it, or does without.
            arguments.append(loader)
        return step(*arguments)

    return call
