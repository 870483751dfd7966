"""Which of several texts of an example the figures are of, and what the other texts say.

A step that compares two texts calls an encoder on each of them. The figures are of one call; the batch names the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from globenc_lightning.report.verdicts import plain
from globenc_lightning.task.batches import leaves, size_of
from globenc_lightning.tokenizers import naming

if TYPE_CHECKING:
    from globenc_lightning.measurement import Measurement
    from globenc_lightning.probe import ProbeSet

_OF_IDS = ("input_ids", "inputids", "token_ids", "tokens", "ids")


LIMIT = 240
"""So many characters of a text that is not drawn are kept: they are in every record."""


class Texts(NamedTuple):
    """The texts of the examples that the figures are not of.

    Attributes:
        shown: which text the figures are of, in words; empty where an example has one.
        others: one per example: the name and the text of each other text, as far as the batch tells them.
    """

    shown: str
    others: tuple[tuple[tuple[str, str], ...], ...]


class _Entry(NamedTuple):
    """One text of each example of a batch: its name there, and the tokens or the text itself of every row."""

    name: str
    rows: Sequence[Any]


def texts_of(measurement: Measurement, probe: ProbeSet) -> Texts:
    """Name the text that is shown, and find the others in the probe's batches.

    Args:
        measurement: The figures, with the token ids that the encoder was called with.
        probe: The examples.

    Returns:
        The texts; nothing where the decision is made of one.
    """
    size = len(measurement.names)
    if measurement.calls < 2:
        return Texts("", ((),) * size)
    name = naming(probe.tokenizer)
    shown = ""
    others: list[tuple[tuple[str, str], ...]] = []
    for index, (entries, row) in enumerate(islice(_rows(probe, size), size)):
        ids = measurement.ids[index] if index < len(measurement.ids) else None
        own = [] if ids is None else [entry for entry in entries if _holds(entry.rows[row], ids, probe.tokenizer)]
        if not own:
            others.append(())
            continue
        shown = shown or own[0].name
        found = [(one.name, _as_text(one.rows[row], name)) for one in entries if one.name not in {e.name for e in own}]
        others.append(tuple(found))
    which = f"text {measurement.call + 1} of {measurement.calls}"
    return Texts(f"{which}, {shown}" if shown else which, tuple(others))


def _rows(probe: ProbeSet, size: int) -> Iterator[tuple[list[_Entry], int]]:
    """The texts of the batch that each example is of, and its row in it."""
    count = 0
    for part in probe.parts:
        entries = _entries(part.batch)
        for row in range(part.wanted):
            yield entries, row
        count += part.wanted
    yield from (([], 0) for _ in range(count, size))


def _entries(batch: Any) -> list[_Entry]:
    size = size_of(batch)
    found = []
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.dim() == 2 and len(leaf) == size and _are_ids(leaf):
                found.append(_Entry(_name(path), list(leaf)))
        elif isinstance(leaf, list | tuple) and len(leaf) == size and all(isinstance(one, str) for one in leaf):
            found.append(_Entry(_name(path), leaf))
    return found


def _are_ids(leaf: Tensor) -> bool:
    """Whether whole numbers are token ids: no mask, no marks of segments, no labels that do not count, no places."""
    if leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool or not leaf.numel():
        return False
    places = torch.arange(leaf.shape[1], device=leaf.device).expand_as(leaf)
    return int(leaf.min()) >= 0 and int(leaf.max()) > 1 and not torch.equal(leaf, places.to(leaf.dtype))


def _name(path: Sequence[Any]) -> str:
    """What the batch calls a text: ``query`` of ``query_input_ids``, ``passage`` of ``passage`` / ``input_ids``."""
    kept = []
    for part in path:
        word = str(part) if isinstance(part, str) else f"entry {part}"
        for ending in _OF_IDS:
            if word.lower().endswith(ending):
                word = word[: len(word) - len(ending)].rstrip("_-. ")
                break
            if word.lower().startswith(ending):
                word = word[len(ending) :].lstrip("_-. ")
                break
        if word:
            kept.append(word)
    return " ".join(kept) or "input_ids"


def _holds(row: Any, ids: Tensor, tokenizer: Any) -> bool:
    """Whether a row of a batch is the text that the encoder was called with, padded on either side."""
    if isinstance(row, str):
        if tokenizer is None:
            return False
        try:
            given = [int(one) for one in tokenizer(row)["input_ids"]]
        except Exception:
            # A tokenizer of somebody's own may be called in another way: then the text has no name.
            return False
        # A step may have cut it.
        return bool(given) and given[: len(ids) - 1] == ids.tolist()[:-1]
    count = len(ids)
    ids = ids.to(row.device)
    return count <= len(row) and bool(torch.equal(row[:count], ids) or torch.equal(row[len(row) - count :], ids))


def _as_text(row: Any, name: Any) -> str:
    if isinstance(row, str):
        return row if len(row) <= LIMIT else f"{row[: LIMIT - 1]}…"
    ids = [int(one) for one in row]
    # What is left at the end is padding.
    while len(ids) > 1 and ids[-1] == ids[-2]:
        ids.pop()
    tokens = name(ids)
    return plain(tokens[:-1] if tokens and tokens[-1].lower() in ("[pad]", "<pad>", "0") else tokens, LIMIT)
