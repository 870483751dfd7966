"""The share of attribution on a set of tokens over a training."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globenc_lightning import dynamics
from globenc_lightning.errors import RecordError
from globenc_lightning.record.libraries import load_pandas
from globenc_lightning.study.frames import probe
from globenc_lightning.study.loading import Run
from globenc_lightning.study.rows import example_rows

SETS = {
    "negations": (
        "not", "no", "never", "n't", "nor", "none", "nothing", "nobody", "neither", "without", "cannot", "hardly",
    ),
    "punctuation": ("[punctuation]",),
    "special": ("[special]",),
}  # fmt: skip
"""Sets of tokens by name."""
CONTRACTION = "n't"


def wanted_tokens(tokens: str | Sequence[str]) -> list[str]:
    """Returns the texts that a set stands for: a name in ``SETS``, one token, or several of both.

    Raises:
        RecordError: there is none, or something that is no text.
    """
    given = [tokens] if isinstance(tokens, str) else [*tokens]
    if not given or not all(isinstance(one, str) and one for one in given):
        raise RecordError(
            f"tokens must be texts, such as ['not', 'never'], or one of {', '.join(map(repr, SETS))}; got {tokens!r}."
        )
    return [text for one in given for text in SETS.get(one, (one,))]


def marked_tokens(told: Any, wanted: Sequence[str]) -> NDArray[np.bool_]:
    """Returns which tokens of a probe are in a set: by themselves, or as part of a whole word that is.

    A piece of a word is not the word ("no" in "nobody"), and signs before and after a word are no part of it ("not," is
    "not", and a comma). ``"n't"`` stands for whole words that end so, however they were cut into tokens.

    Args:
        told: a row per example and token, as the record's probe.
        wanted: texts; ``"[special]"`` and ``"[punctuation]"`` stand for kinds of tokens.

    Returns:
        A truth value per row.
    """
    names = {one.lower() for one in wanted}
    tokens = [*map(str, told["token"])]
    special = [not unknown and bool(one) for one, unknown in zip(told["special"], told["special"].isna(), strict=True)]
    found = np.array(dynamics.marked(tokens, special, [*names]), dtype=bool)
    bare = [_bare(one) for one in tokens]
    numbers = [None if unknown else one for one, unknown in zip(told["word"], told["word"].isna(), strict=True)]
    words = [*zip(told["example"].tolist(), numbers, strict=True)]
    by_example: dict[Any, list[list[int]]] = {}
    for (example, word), places in itertools.groupby(range(len(tokens)), key=lambda place: words[place]):
        if word is not None:
            by_example.setdefault(example, []).append([*places])
    for pieces in by_example.values():
        for places in pieces:
            if len(places) > 1:
                _mark_word(found, places, bare, names)
        if CONTRACTION in names:
            _mark_contractions(found, pieces, bare)
    return found


def _mark_word(found: NDArray[np.bool_], places: Sequence[int], bare: Sequence[str], names: set[str]) -> None:
    """Mark the pieces of one word."""
    signs = [not any(letter.isalnum() for letter in bare[place]) for place in places]
    if all(signs):
        return
    first, last = signs.index(False), len(signs) - signs[::-1].index(False)
    whole, core = (_joined(bare, part) for part in (places, places[first:last]))
    for place, sign in zip(places, signs, strict=True):
        if not sign:
            found[place] = False
    if whole in names:
        found[[*places]] = True
    elif core in names or (CONTRACTION in names and core.endswith(CONTRACTION)):
        found[[*places[first:last]]] = True


def _mark_contractions(found: NDArray[np.bool_], pieces: Sequence[Sequence[int]], bare: Sequence[str]) -> None:
    """Mark "don't" where it was cut into the words "don", "'" and "t"."""
    texts = [_joined(bare, places) for places in pieces]
    for number in range(len(texts) - 2):
        if texts[number].endswith("n") and texts[number + 1 : number + 3] == ["'", "t"]:
            for places in pieces[number : number + 3]:
                found[[*places]] = True
    for text, places in zip(texts, pieces, strict=True):
        if len(places) == 1 and text.endswith(CONTRACTION):
            found[[*places]] = True


def _joined(bare: Sequence[str], places: Sequence[int]) -> str:
    return "".join(bare[place] for place in places).lower().replace("’", "'")


def _bare(token: str) -> str:
    return token.removeprefix("##").strip("▁").removesuffix("</w>")


def mass(runs: Sequence[Run], methods: Sequence[str], layers: Sequence[int], tokens: str | Sequence[str]) -> Any:
    """Returns the share of each example's attribution that lies on a set of tokens.

    ``mass`` is the sum of an example's readout row over the tokens of the set, divided by its sum over all tokens,
    special ones included. An example without such a token has 0: ``tokens`` says how many it has.

    Columns: run, seed, step, example, method, layer, mass, tokens.
    """
    pandas = load_pandas()
    wanted = wanted_tokens(tokens)
    frames = []
    for run in runs:
        told = probe(run)
        marks = marked_tokens(told, wanted)
        chosen = {example: marks[part.index.to_numpy()] for example, part in told.groupby("example")}
        for one in example_rows(run, methods, layers, special_tokens=True):
            mine = chosen[one.example]
            parts: dict[str, Any] = {"run": run.label, "seed": run.seed, "step": one.steps, "example": one.example}
            parts |= {"method": one.method, "layer": one.layer, "mass": dynamics.mass(one.values, mine)}
            frames.append(pandas.DataFrame(parts | {"tokens": int(mine.sum())}))
    return pandas.concat(frames, ignore_index=True)
