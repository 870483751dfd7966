"""Batches of any form: copied, moved, cut and stored as they are.

A batch is any nesting of mappings, lists, tuples, named tuples and dataclasses, with tensors, texts and primitives in
it. Nothing in it is known by its name.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from globenc_lightning.errors import ProbeError


def copied(batch: Any) -> Any:
    """A copy of a batch whose tensors are clones on the CPU, made outside of inference mode."""
    return _changed(batch, lambda tensor: tensor.detach().cpu().clone())


def moved(batch: Any, device: torch.device) -> Any:
    """A copy of a batch whose tensors are on a device, made outside of inference mode."""
    return _changed(batch, lambda tensor: tensor.to(device))


def fresh(batch: Any) -> Any:
    """A copy of a batch where it is: containers and tensors are copies, so that a step may change them."""
    return _changed(batch, lambda tensor: tensor.clone())


def _changed(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a batch, frozen dataclasses included, with every tensor changed."""

    def change_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        return leaf.copy() if isinstance(leaf, np.ndarray | list) else leaf

    with torch.inference_mode(False), torch.no_grad():
        return _rebuilt(batch, change_leaf)


def leaves(batch: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The parts of a batch that hold no further parts, each with the keys, places or field names that lead to it.

    A list that holds neither tensors nor containers (texts, numbers) is a leaf.
    """
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from leaves(value, (*path, key))
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from leaves(getattr(batch, field.name, None), (*path, field.name))
    elif _holds_parts(batch):
        for place, value in enumerate(batch):
            yield from leaves(value, (*path, place))
    else:
        yield path, batch


def size_of(batch: Any) -> int | None:
    """How many examples a batch holds: the length that most of its tensors and lists have; None where none tells it."""
    if _is_list_of_examples(batch):
        return len(batch)
    lengths = [length for _, leaf in leaves(batch) if (length := _length(leaf)) is not None]
    lengths += [len(one) for one in _lists(batch)]
    return Counter(lengths).most_common(1)[0][0] if lengths else None


def rows_of(batch: Any, rows: Sequence[int]) -> Any:
    """Some examples of a batch: rows of every tensor and list that has as many as the batch has examples.

    Args:
        batch: the batch.
        rows: the numbers of the examples.

    Returns:
        A batch of the same form. Whether it means the same is for its user to prove.
    """
    if _is_list_of_examples(batch):
        return [_rebuilt(batch[row], lambda leaf: leaf) for row in rows]
    size = size_of(batch)

    def cut(leaf: Any) -> Any:
        if _length(leaf) != size:
            return leaf
        if isinstance(leaf, Tensor):
            return leaf[list(rows)]
        part = [leaf[row] for row in rows]
        return tuple(part) if isinstance(leaf, tuple) else part

    def cut_list(parts: list[Any]) -> list[Any]:
        alone = len(parts) == size and all(_length(part) != size for part in parts)
        return [parts[row] for row in rows] if alone else parts

    return _rebuilt(batch, cut, cut_list)


def columns_of(batch: Any, like: Tensor, keep: slice) -> Any:
    """A batch whose tensors of the shape (b, s) of a text, and more axes after these, are cut to some of its columns.

    Args:
        batch: the batch.
        like: (b, s) a tensor of the text, its padding mask for example.
        keep: the columns that are kept.

    Returns:
        A batch of the same form. Whether it means the same is for its user to prove.
    """

    def cut(leaf: Any) -> Any:
        fits = isinstance(leaf, Tensor) and leaf.dim() >= 2 and leaf.shape[:2] == like.shape
        return leaf[:, keep].clone() if fits else leaf

    return _rebuilt(batch, cut)


def padding_masks(batch: Any, size: int) -> list[Tensor]:
    """What looks like the padding masks of a batch's texts, whatever they are called; one for each shape.

    Args:
        batch: the batch.
        size: how many examples it holds.

    Returns:
        (b, s) each, true for real tokens: an entry of ones beside one another and zeros, in the shape of another entry
        that holds more numbers than these. Whether they are masks is for their user to prove.
    """
    texts = [
        leaf
        for _, leaf in leaves(batch)
        if isinstance(leaf, Tensor) and leaf.dim() == 2 and len(leaf) == size and not leaf.is_floating_point()
    ]
    found: dict[tuple[int, ...], Tensor] = {}
    wide = {tuple(leaf.shape) for leaf in texts if bool(((leaf != 0) & (leaf != 1)).any())}
    for leaf in texts:
        ones = leaf != 0
        starts = ones[:, :1].int().sum(1) + (ones[:, 1:] & ~ones[:, :-1]).sum(1)
        if tuple(leaf.shape) in wide and bool(((leaf == 0) | (leaf == 1)).all()) and bool((starts == 1).all()):
            same = found.get(tuple(leaf.shape))
            # Types of tokens are of ones and zeros, too, and have fewer ones than the mask.
            found[tuple(leaf.shape)] = ones if same is None else ones | same
    return list(found.values())


def stored(batch: Any) -> Any:
    """A batch in tensors, primitives, lists and mappings, for a checkpoint that loads with ``weights_only=True``.

    Args:
        batch: the batch.

    Returns:
        The same for :func:`restored`.

    Raises:
        ProbeError: it holds something that is none of these.
    """
    if isinstance(batch, Tensor):
        return batch.detach().as_subclass(Tensor)
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf":
        return {"kind": "array", "keys": [], "parts": [torch.from_numpy(np.ascontiguousarray(batch))]}
    if batch is None or isinstance(batch, bool):
        return batch
    if isinstance(batch, str):
        # The text itself: what an enumeration of texts calls its members is something else.
        return str.__str__(batch)
    for primitive in (int, float):
        if isinstance(batch, primitive):
            # Subclasses, numpy's among them, would not be loaded.
            return primitive(batch)
    if isinstance(batch, Mapping):
        kind = "encoding" if type(batch).__name__ == "BatchEncoding" else "mapping"
        return {"kind": kind, "keys": [stored(key) for key in batch], "parts": [stored(one) for one in batch.values()]}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch)]
        return {"kind": "dataclass", "keys": names, "parts": [stored(getattr(batch, name)) for name in names]}
    if isinstance(batch, tuple):
        fields = getattr(batch, "_fields", None)
        kind = "tuple" if fields is None else "named"
        return {"kind": kind, "keys": list(fields or ()), "parts": [stored(one) for one in batch]}
    if isinstance(batch, list):
        return {"kind": "list", "keys": [], "parts": [stored(one) for one in batch]}
    raise ProbeError(f"the batch holds a {type(batch).__name__}, which does not travel in checkpoints.")


def restored(state: Any, template: Any = None) -> Any:
    """The batch that :func:`stored` was called on.

    Args:
        state: what it returned.
        template: a batch of the same form, for dataclasses and named tuples: a checkpoint names no classes.

    Returns:
        The batch.

    Raises:
        ProbeError: the batch holds a dataclass or a named tuple, and there is no template of the same form.
    """
    if not isinstance(state, dict):
        return state
    kind, keys, parts = state["kind"], state["keys"], state["parts"]
    if kind == "array":
        return parts[0].numpy()
    if kind in ("mapping", "encoding"):
        known = template if isinstance(template, Mapping) else {}
        built = {key: restored(one, known.get(key)) for key, one in zip(keys, parts, strict=True)}
        if kind == "encoding":
            from transformers import BatchEncoding

            return BatchEncoding(built)
        return built
    if kind in ("dataclass", "named"):
        names = list(getattr(template, "_fields", ()))
        if dataclasses.is_dataclass(template) and not isinstance(template, type):
            names = [field.name for field in dataclasses.fields(template)]
        if names != keys:
            raise ProbeError("the probe in the checkpoint is made of a class that no batch has shown yet.")
        values = {key: restored(one, getattr(template, key)) for key, one in zip(keys, parts, strict=True)}
        if kind == "named":
            return template._replace(**values)
        new = object.__new__(type(template))
        for key, value in values.items():
            object.__setattr__(new, key, value)
        return new
    inner = template if isinstance(template, list | tuple) and len(template) == len(parts) else [None] * len(parts)
    made = [restored(one, like) for one, like in zip(parts, inner, strict=True)]
    return tuple(made) if kind == "tuple" else made


def needs_template(state: Any) -> bool:
    """Whether a stored batch holds a dataclass or a named tuple."""
    if isinstance(state, list | tuple):
        return any(needs_template(one) for one in state)
    if not isinstance(state, dict):
        return False
    if "kind" not in state:
        return any(needs_template(one) for one in state.values())
    return state["kind"] in ("dataclass", "named") or any(needs_template(one) for one in state["parts"])


def _holds_parts(value: Any) -> bool:
    if isinstance(value, str | bytes) or not isinstance(value, list | tuple):
        return False
    inner = (Tensor, Mapping, list, tuple)
    return any(isinstance(one, inner) or dataclasses.is_dataclass(one) for one in value)


def _is_list_of_examples(batch: Any) -> bool:
    """Whether a batch is a list of mappings or dataclasses, one for each example."""
    return isinstance(batch, list) and len(batch) > 0 and all(_is_example(one) for one in batch)


def _is_example(value: Any) -> bool:
    if not isinstance(value, Mapping) and (not dataclasses.is_dataclass(value) or isinstance(value, type)):
        return False
    # One loader's part of a batch that combines several holds many examples.
    return all(not isinstance(leaf, Tensor) or leaf.dim() < 2 for _, leaf in leaves(value))


def _length(leaf: Any) -> int | None:
    if isinstance(leaf, Tensor):
        return len(leaf) if leaf.dim() else None
    return len(leaf) if isinstance(leaf, list | tuple) and len(leaf) else None


def _lists(batch: Any) -> Iterator[list[Any]]:
    """The lists in a batch that hold one part per example, perhaps."""
    if isinstance(batch, Mapping):
        inner: list[Any] = list(batch.values())
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        inner = [getattr(batch, field.name, None) for field in dataclasses.fields(batch)]
    elif _holds_parts(batch):
        inner = list(batch)
        if isinstance(batch, list):
            yield batch
    else:
        return
    for part in inner:
        yield from _lists(part)


def _rebuilt(
    batch: Any, change: Callable[[Any], Any], change_list: Callable[[list[Any]], list[Any]] = lambda parts: parts
) -> Any:
    """A batch of the same form with every leaf changed, and the lists of further parts before these."""
    if isinstance(batch, Mapping):
        values = {key: _rebuilt(value, change, change_list) for key, value in batch.items()}
        return values if type(batch) is dict else _like_mapping(batch, values)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        new = object.__new__(type(batch))
        # With slots there is no __dict__, and a class may keep more than its fields.
        names = dict.fromkeys([*(field.name for field in dataclasses.fields(batch)), *getattr(batch, "__dict__", ())])
        for name in names:
            if hasattr(batch, name):
                object.__setattr__(new, name, _rebuilt(getattr(batch, name), change, change_list))
        return new
    if _holds_parts(batch):
        inner = change_list(batch) if isinstance(batch, list) else batch
        parts = [_rebuilt(one, change, change_list) for one in inner]
        if hasattr(batch, "_fields"):
            return type(batch)(*parts)
        return tuple(parts) if isinstance(batch, tuple) else parts
    return change(batch)


def _like_mapping(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    try:
        return type(batch)(values)  # type: ignore[call-arg]
    except TypeError:
        pass
    try:
        # A defaultdict is made of more than its entries.
        like: Any = copy.copy(batch)
        like.update(values)
    except (TypeError, AttributeError):
        return values
    return like
