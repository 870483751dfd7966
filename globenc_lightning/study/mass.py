"""The share of attribution on a set of tokens over a training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from globenc_lightning import dynamics
from globenc_lightning.study.frames import probe
from globenc_lightning.study.loading import Run
from globenc_lightning.study.matching import marked_tokens, wanted_tokens
from globenc_lightning.study.rows import example_rows, long_table, series_columns


def mass(runs: Sequence[Run], methods: Sequence[str], layers: Sequence[int], tokens: str | Sequence[str]) -> Any:
    """Returns the share of each example's attribution that lies on a set of tokens.

    ``mass`` is the sum of an example's readout row over the tokens of the set, divided by its sum over all tokens,
    special ones included. An example without such a token has 0: ``tokens`` says how many it has. Which tokens a set
    has is told in ``globenc_lightning/study/matching.py``.

    Columns: run, seed, step, example, method, layer, mass, tokens.
    """
    wanted = wanted_tokens(tokens)
    parts = []
    for run in runs:
        told = probe(run)
        marks = marked_tokens(told, wanted)
        chosen = {example: marks[part.index.to_numpy()] for example, part in told.groupby("example")}
        for one in example_rows(run, methods, layers, special_tokens=True):
            mine = chosen[one.example]
            part: dict[str, Any] = {
                "run": run.label,
                "seed": run.seed,
                "example": one.example,
                "tokens": int(mine.sum()),
            }
            part |= {"step": np.tile(one.steps, len(one.series)), **series_columns(one.series, len(one.steps))}
            parts.append(part | {"mass": dynamics.mass(one.values, mine).ravel()})
    return long_table(parts, ["run", "seed", "step", "example", "method", "layer", "mass", "tokens"])
