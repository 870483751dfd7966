"""What a model calls its classes."""

from collections.abc import Mapping

from torch import nn

NAMED = ("classification", "binary", "multi-label", "token classification")
"""The kinds of decision whose answers are a model's classes."""


def class_names(model: nn.Module, encoder: str, task: str = "classification") -> list[str] | None:
    """The names of the classes of the head that stands on an encoder.

    A teacher, a decoder or a metric in the same module has names of its own, which are not taken.

    Args:
        model: the module.
        encoder: the path of the encoder whose figures are shown, or the name of the encoder's class.
        task: the kind of decision.

    Returns:
        The names, in the order of the classes; None where the head has none but the default ones.
    """
    if task not in NAMED:
        return None
    modules = dict(model.named_modules())
    parts = encoder.split(".") if encoder in modules else []
    # The innermost model that holds the encoder, from the encoder itself outwards.
    for path in [".".join(parts[:size]) for size in range(len(parts), -1, -1)]:
        module = modules[path]
        names = getattr(getattr(module, "config", None), "id2label", None)
        # A body without a head may still name the classes of the head that it once had.
        if not isinstance(names, Mapping) or getattr(module, "num_labels", None) != len(names):
            continue
        if names and set(names) == set(range(len(names))):
            ordered = [str(names[index]) for index in range(len(names))]
            return None if ordered == [f"LABEL_{index}" for index in range(len(names))] else ordered
    return None
