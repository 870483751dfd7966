"""Lines that a user may write, each tried out before it is offered.

What calls a model is made of what is known: the models with a head and the encoders that were found in the module, and
the entries of the batch. A line that raises, or that gives no logits, is not offered.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from globenc_lightning.encoder.reading import find_encoders
from globenc_lightning.encoder.undisturbed import as_evaluated
from globenc_lightning.task.calling import LABELS, headed_models, logits_of, parameter_names, size_of_batch

MOST = 3
"""How many lines are offered at the most."""


class _Line(NamedTuple):
    """A way to get logits.

    Attributes:
        text: the way, as an expression of ``module`` and ``batch``.
        call: the same, to be tried.
    """

    text: str
    call: Callable[[Mapping[str, Any]], Any]


def advice(model: nn.Module, batch: Mapping[str, Any], written: set[str] | None = None) -> str:
    """What to write where it is not known how a model gives its logits.

    Args:
        model: the user's module.
        batch: the batch that it is called with.
        written: names of parameters that its forward writes into.

    Returns:
        Lines that run as they stand; where there are none, what is needed, in words.
    """
    lines = [line.text for line in _lines(model, batch) if _gives_logits(model, line, batch, written)][:MOST]
    if not lines:
        encoders = [path for path in find_encoders(model) if path]
        holds = [name for name, _ in model.named_children()]
        return (
            "Give forward=, a callable forward(module, batch) that returns the logits of the head that is trained "
            f"({type(model).__name__} holds {_listed(holds) or 'no modules'}"
            f"{f'; its encoder is {_listed(encoders)}' if encoders else ''}; the batch holds {_listed(batch)}). The "
            "argument exists in GlobEncCallback(...) and in attribute(...)."
        )
    which = "for example" if len(lines) == 1 else "the one of these that is trained"
    told = "\n".join(f"    GlobEncCallback(forward=lambda module, batch: {line})" for line in lines)
    return f"Name a callable that gives the logits, {which}\n{told}\n(the same argument exists in attribute(...))."


def advice_on_target(logits: Tensor) -> str:
    """An argument that names one score per example, for logits of any shape.

    Args:
        logits: (b, ...) the logits.

    Returns:
        The argument, which runs as it stands.
    """
    score = {2: "logits[:, 0]", 3: "logits[:, 0].amax(-1)"}.get(logits.dim(), "logits[:, 0].flatten(1).amax(1)")
    return f"target=lambda logits, batch: {score}"


def advice_on_mask(model: nn.Module, batch: Mapping[str, Any], mask: str, written: set[str] | None = None) -> str:
    """What to write where a batch holds its mask under a name that the model does not know.

    Args:
        model: the user's module.
        batch: the batch.
        mask: the entry that looks like a mask.
        written: names of parameters that the model's forward writes into.

    Returns:
        A line that runs as it stands, or what is needed in words.
    """
    accepted = parameter_names(getattr(model, "_orig_mod", model))
    name = next((one for one in ("attention_mask", "mask", "padding_mask") if one in accepted), None)
    if name is not None:
        given = {key: key for key in batch if key in accepted and key not in LABELS} | {name: mask}
        line = _called(model, "", given)
        if _gives_logits(model, line, batch, written):
            return f"for example\n    GlobEncCallback(forward=lambda module, batch: {line.text})"
    return "by forward=, a callable forward(module, batch) that returns the logits."


def _lines(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[_Line]:
    model = getattr(model, "_orig_mod", model)
    headed = headed_models(model)
    for name, module in headed:
        yield _called(model, name, _arguments(module, batch))
    if headed:
        return
    for path, encoder in find_encoders(model).items():
        width = getattr(getattr(encoder, "config", None), "hidden_size", None)
        for name, head in _heads(model, width):
            yield _through(model, path, name, head, _arguments(encoder, batch))


def _heads(model: nn.Module, width: int | None) -> list[tuple[str, nn.Module]]:
    """The modules outside of encoders that take hidden states of a width, the ones that are trained first."""
    inside = tuple(f"{path}." if path else "" for path in find_encoders(model))
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        parts = list(module.modules())
        first = next((part for part in parts if isinstance(part, nn.Linear)), None)
        whole = isinstance(module, nn.Linear | nn.Sequential) and not any(
            name.startswith(f"{other}.") for other, _ in found
        )
        if name and whole and first is not None and first.in_features == width and not name.startswith(inside):
            found.append((name, module))
    return sorted(found, key=lambda one: not any(parameter.requires_grad for parameter in one[1].parameters()))


def _arguments(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, str]:
    """Which entry of a batch is given to which parameter of a module's forward: those of the same names."""
    accepted = parameter_names(module)
    return {key: key for key in batch if key in accepted and key not in LABELS}


def _called(model: nn.Module, name: str, given: Mapping[str, str]) -> _Line:
    module = model.get_submodule(name)
    arguments = ", ".join(f"{parameter}=batch[{entry!r}]" for parameter, entry in given.items())
    return _Line(
        f"{_expression(name)}({arguments})",
        lambda batch: module(**{parameter: batch[entry] for parameter, entry in given.items()}),
    )


def _through(model: nn.Module, path: str, name: str, head: nn.Module, given: Mapping[str, str]) -> _Line:
    encoder = _called(model, path, given)
    return _Line(
        f"{_expression(name)}({encoder.text}.last_hidden_state[:, 0])",
        lambda batch: head(encoder.call(batch).last_hidden_state[:, 0]),
    )


def _expression(path: str) -> str:
    if not path:
        return "module"
    if all(part.isidentifier() for part in path.split(".")):
        return f"module.{path}"
    return f"module.get_submodule({path!r})"


def _gives_logits(model: nn.Module, line: _Line, batch: Mapping[str, Any], written: set[str] | None) -> bool:
    copy = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        with as_evaluated(model, written), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            logits_of(line.call(copy), size_of_batch(batch))
    except Exception:
        # Whatever goes wrong, it is no line to offer.
        return False
    return True


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))
