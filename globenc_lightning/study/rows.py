"""Readout rows of a run as arrays, one per example, over all of its analyses.

Axes: ``m`` method and layer, ``t`` analysis, ``k`` token.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.errors import GlobEncWarning
from globenc_lightning.record import schema
from globenc_lightning.record.libraries import load_pandas
from globenc_lightning.study.frames import probe
from globenc_lightning.study.loading import Run


@dataclass(frozen=True, eq=False)
class ExampleRows:
    """One example's readout rows over a training.

    Attributes:
        example: its number.
        series: (m) methods and layers, from 1.
        steps: (t) of the analyses.
        values: (m, t, k) the rows; NaN where an analysis has another text.
        counts: (k) true for the tokens that count.
    """

    example: int
    series: Sequence[tuple[str, int]]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    counts: NDArray[np.bool_]

    @property
    def counted(self) -> NDArray[np.float64]:
        """The rows (m, t, n) of the tokens that count."""
        return self.values[..., self.counts]


def example_rows(
    run: Run, methods: Sequence[str], layers: Sequence[int], special_tokens: bool
) -> Iterator[ExampleRows]:
    """Yields the rows of every example of a run.

    Args:
        run: the run.
        methods: those that are read.
        layers: those that are read, from 1.
        special_tokens: whether special tokens count.
    """
    told = probe(run)
    series = [(method, layer) for method in methods for layer in layers]
    columns = [schema.attribution_column(*one) for one in series]
    table = run.record.tokens(run.name, columns)
    hashes = run.record.examples(run.name, ["text_hash"]).to_pandas()
    hashes = hashes.pivot(index="step", columns="example", values="text_hash")
    steps, place = np.unique(table["step"].to_numpy(), return_inverse=True)
    # An analysis whose file of examples cannot be read has no text.
    hashes = hashes.reindex(np.union1d(steps, hashes.index))
    owner, position = table["example"].to_numpy(), table["position"].to_numpy()
    values = [table[name].to_numpy() for name in columns]
    order = np.argsort(owner, kind="stable")
    for example, part in told.groupby("example"):
        mine = order[slice(*np.searchsorted(owner, [example, example + 1], sorter=order))]
        # The probe's file has the newest text: of several texts that can be chosen, an earlier one may have been.
        texts = hashes[example] if example in hashes else hashes.iloc[:, 0].map(lambda _: None)
        newest = texts.dropna().iloc[-1:].tolist()
        same = texts.reindex(steps).isin(newest).to_numpy()
        kept = mine[same[place[mine]] & (position[mine] < len(part))]
        rows = np.full((len(series), len(steps), len(part)), np.nan)
        for number, column in enumerate(values):
            rows[number, place[kept], position[kept]] = column[kept]
        counts = np.ones(len(part), bool) if special_tokens else ~(part["special"] == True).to_numpy()  # noqa: E712
        yield ExampleRows(int(example), series, steps, rows, counts)


def remark_unknown_tokens(runs: Sequence[Run], special_tokens: bool) -> None:
    """Warn that special tokens were to be left out, and are not known."""
    unknown = [] if special_tokens else [run.label for run in runs if probe(run)["special"].isna().any()]
    if unknown:
        warnings.warn(
            f"the probe of {', '.join(unknown[:5])} does not tell which tokens are special: there, all of them count. "
            "A callback that knows the tokenizer records it: GlobEncCallback(tokenizer=...).",
            GlobEncWarning,
            stacklevel=4,
        )


def long_table(parts: Sequence[dict[str, Any]], columns: Sequence[str]) -> Any:
    """Returns one table of many: each part has arrays of one length, and single values that hold for all of them."""
    sizes = [max((len(value) for value in part.values() if _is_array(value)), default=1) for part in parts]
    if not sum(sizes):
        return load_pandas().DataFrame(columns=[*columns])
    joined = {}
    for name in columns:
        if _is_array(parts[0][name]):
            joined[name] = np.concatenate([part[name] for part in parts])
        else:
            # pandas finds the type of single values, of which some may be missing.
            single = load_pandas().Series([part[name] for part in parts])
            joined[name] = single.repeat(sizes).array
    return load_pandas().DataFrame(joined)


def series_columns(series: Sequence[tuple[str, int]], each: int) -> dict[str, Any]:
    """Returns the columns ``method`` and ``layer`` of figures (m, n) in one line, ``n`` of each series."""
    methods, layers = zip(*series, strict=True)
    return {"method": np.repeat(np.array(methods, dtype=object), each), "layer": np.repeat(np.array(layers), each)}


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)
