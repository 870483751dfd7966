"""Which sentences of a probe a validation's records hold, and which methods' rows and maps of each of them.

The room of a record is limited. Methods are taken in the order of the ladder's importance, the drawn one first, and a
sentence never has a method without all that come before it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from globenc_lightning.report.page import MAX_EXAMPLES

ROWS_ROOM = 2 * 1024 * 1024
"""Bytes that one validation's readout rows may take. Of 8 methods, 16 sentences of 512 tokens at 12 layers fit, 64 of
128 tokens at 12 layers, and 64 of 64 tokens at 24 layers."""
MAPS_ROOM = 256 * 1024
"""Bytes for the last layer's maps: those of 16 sentences of 128 tokens and one method fit."""
MOST_SENTENCES = 1000
"""So many sentences of a probe are held at most."""
MAPPED_SENTENCES = 256
"""So many sentences get the drawn method's map before any of them gets another's."""

IMPORTANCE = (
    *("N-Enc", "N-ResLN", "N-Res", "N", "W-FixedRes", "W", "W-Res", "N-FixedRes"),
    *("ALTI", "Value-Zeroing"),
)
"""What the ladder compares: the whole layer, one part less at each step, then rollout of weights, then the variants; and
the rivals."""

Part = tuple[int, str]
"""A sentence, counted from 0, and a method."""


class Rows(NamedTuple):
    """What a record holds.

    Attributes:
        sentences: so many of the first ones; everything but their rows is held of each.
        rows: the sentences and methods whose rows are held.
    """

    sentences: int
    rows: list[Part]


def by_importance(methods: Sequence[str], drawn: str) -> list[str]:
    """Returns the methods in the order in which room is given to them: the drawn one, then as ``IMPORTANCE`` says."""
    return sorted(methods, key=lambda one: (one != drawn, IMPORTANCE.index(one)))


def rows_that_fit(lengths: Sequence[int], layers: int, methods: Sequence[str]) -> Rows:
    """Choose the sentences of a record and their rows.

    The first sentences, as many as are listed in texts, come first: each gets a method's rows, as far as there is room,
    before any of them gets those of the next method. One that is too long for what is left gets none, and shorter ones
    after it may. What remains is for further sentences, each with everything.

    Args:
        lengths: (b) how many tokens each sentence has.
        layers: of the encoder.
        methods: in the order of :func:`by_importance`.

    Returns:
        The number of sentences, and the rows.
    """
    first = min(MAX_EXAMPLES, len(lengths))
    rows, room = _down_the_ladder([2 * layers * length for length in lengths[:first]], methods, ROWS_ROOM)
    count = first
    for length in lengths[first:MOST_SENTENCES]:
        # Rows, rho, saliency, and the tokens themselves.
        size = len(methods) * (2 * layers * length + 4 * layers) + 10 * length
        if size > room:
            break
        room -= size
        rows += [(count, method) for method in methods]
        count += 1
    return Rows(count, rows)


def maps_that_fit(lengths: Sequence[int], methods: Sequence[str]) -> list[Part]:
    """Choose the last layer's maps that are measured and held.

    Args:
        lengths: (b) how many tokens each sentence has.
        methods: in the order of :func:`by_importance`.

    Returns:
        Sentences and methods: the drawn method's maps of many sentences before another's of the first ones.
    """
    sizes = [length**2 for length in lengths]
    many, _ = _down_the_ladder(sizes[:MAPPED_SENTENCES], methods[:1], MAPS_ROOM)
    left = MAPS_ROOM - sum(sizes[index] for index, _ in many)
    mapped = [index for index, _ in many if index < MAX_EXAMPLES]
    others, _ = _down_the_ladder([sizes[index] for index in mapped], methods[1:], left)
    return many + [(mapped[place], method) for place, method in others]


def _down_the_ladder(sizes: Sequence[int], methods: Sequence[str], room: int) -> tuple[list[Part], int]:
    """Returns one method after the other of all sentences that fit, and the room that is left.

    Room only shrinks, and a sentence takes as much with each method: one that has no room for a method has none for the
    next.
    """
    taken: list[Part] = []
    for method in methods:
        for index, size in enumerate(sizes):
            if size <= room:
                room -= size
                taken.append((index, method))
    return taken, room
