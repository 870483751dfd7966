"""The share of attribution on a set of tokens over a training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

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


def marked_tokens(told: Any, wanted: Sequence[str]) -> Any:
    """Returns which tokens of a probe are in a set: by themselves, or as part of a whole word that is.

    Args:
        told: a row per example and token, as the record's probe.
        wanted: texts; ``"[special]"`` and ``"[punctuation]"`` stand for kinds of tokens.

    Returns:
        A truth value per row.
    """
    names = {one.lower() for one in wanted}
    special = [bool(one) if one is not None else False for one in told["special"].tolist()]
    found = np.array(dynamics.marked([*told["token"]], special, [*names]), dtype=bool)
    words = told.assign(bare=[_bare(one) for one in told["token"]], place=range(len(told)))
    words = words[words["word"].notna()]
    for _, part in words.groupby(["example", "word"], sort=False):
        if len(part) > 1:
            # A piece of a word is not the word: "no" in "nobody".
            found[part["place"].to_numpy()] = "".join(part["bare"]).lower() in names
    return found


def _bare(token: str) -> str:
    return str(token).removeprefix("##").strip("▁").removesuffix("</w>")


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
