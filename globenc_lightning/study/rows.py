"""Readout rows of a run as arrays, one per example, over all of its analyses.

Axes: ``t`` analysis, ``k`` token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.record import schema
from globenc_lightning.study.frames import probe
from globenc_lightning.study.loading import Run


@dataclass(frozen=True, eq=False)
class ExampleRows:
    """One example's readout rows over a training.

    Attributes:
        example: its number.
        method: of the rollout.
        layer: from 1.
        steps: (t) of the analyses.
        values: (t, k) the rows; NaN where an analysis has another text.
        counts: (k) true for the tokens that count.
    """

    example: int
    method: str
    layer: int
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    counts: NDArray[np.bool_]

    @property
    def counted(self) -> NDArray[np.float64]:
        """The rows (t, n) of the tokens that count."""
        return self.values[:, self.counts]


def example_rows(
    run: Run, methods: Sequence[str], layers: Sequence[int], special_tokens: bool
) -> Iterator[ExampleRows]:
    """Yields the rows of every example, method and layer of a run.

    Args:
        run: the run.
        methods: those that are read.
        layers: those that are read, from 1.
        special_tokens: whether special tokens count.
    """
    told = probe(run)
    columns = [schema.attribution_column(method, layer) for method in methods for layer in layers]
    table = run.record.tokens(run.name, columns)
    hashes = (
        run.record.examples(run.name, ["text_hash"])
        .to_pandas()
        .pivot(index="step", columns="example", values="text_hash")
    )
    steps = np.array(sorted(set(table["step"].to_pylist())))
    place = np.searchsorted(steps, table["step"].to_numpy())
    owner, position = table["example"].to_numpy(), table["position"].to_numpy()
    values = {name: table[name].to_numpy().astype(np.float64) for name in columns}
    by_example: dict[int, Any] = dict(iter(told.groupby("example")))
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(int(owner.max()) + 2)) if len(owner) else np.zeros(1, int)
    for example, part in by_example.items():
        mine = order[bounds[example] : bounds[example + 1]] if example + 1 < len(bounds) else order[:0]
        counts = np.ones(len(part), bool) if special_tokens else ~(part["special"] == True).to_numpy()  # noqa: E712
        # The probe's file has the newest text: of several texts that can be chosen, an earlier one may have been.
        same = np.array([hashes[example].get(step) == hashes[example].iloc[-1] for step in steps])
        kept = mine[same[place[mine]] & (position[mine] < len(part))]
        for method in methods:
            for layer in layers:
                rows = np.full((len(steps), len(part)), np.nan)
                name = schema.attribution_column(method, layer)
                rows[place[kept], position[kept]] = values[name][kept]
                yield ExampleRows(example, method, layer, steps, rows, counts)
