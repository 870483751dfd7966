"""How far rows move over a training (drift, stabilization), and how alike they are in different runs (agreement)."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from globenc_lightning import dynamics
from globenc_lightning.errors import RecordError
from globenc_lightning.record.libraries import load_pandas
from globenc_lightning.study.frames import examples, hyperparameters
from globenc_lightning.study.loading import Run
from globenc_lightning.study.rows import ExampleRows, example_rows, long_table, remark_unknown_tokens, series_columns


def checked(value: str, values: Sequence[str], name: str) -> str:
    """Returns a choice.

    Raises:
        RecordError: it is none of those that there are.
    """
    if value not in values:
        raise RecordError(f"{name} must be one of {', '.join(map(repr, values))}; got {value!r}.")
    return value


def drift(
    runs: Sequence[Run],
    methods: Sequence[str],
    layers: Sequence[int],
    against: str,
    by: str,
    special_tokens: bool,
) -> Any:
    """Returns how far each example's row moved, and how far rows with shuffled tokens would be from each other.

    ``drift`` is 1 minus the similarity of an example's readout row to its row at another analysis of the same run:
    Spearman's rho over its tokens, or the Jaccard index of its largest quarter of tokens (one at least). ``chance`` is
    the expectation of the same measure where the tokens of a row are shuffled: 1 for Spearman, about .84 for Jaccard.
    Rank measures over a training: Neely et al. (arXiv 2205.04559) for rankings of attributions; the Jaccard index of
    the top tokens: arXiv 2601.11625.

    Columns: run, seed, step, against_step, example, method, layer, drift, chance.
    """
    checked(against, dynamics.AGAINST, "against")
    checked(by, dynamics.MEASURES, "by")
    remark_unknown_tokens(runs, special_tokens)
    parts = []
    for run in runs:
        for one in example_rows(run, methods, layers, special_tokens):
            pairs = dynamics.partners([True] * len(one.steps), against)
            places = [place for place, other in enumerate(pairs) if other is not None]
            others = [other for other in pairs if other is not None]
            parts.append(
                {
                    "run": run.label,
                    "seed": run.seed,
                    "step": np.tile(one.steps[places], len(one.series)),
                    "against_step": np.tile(one.steps[others], len(one.series)),
                    "example": one.example,
                    **series_columns(one.series, len(places)),
                    "drift": dynamics.drift(one.counted, pairs, by)[:, places].ravel(),
                    "chance": _number(dynamics.chance([int(one.counts.sum())], by)),
                }
            )
    columns = ["run", "seed", "step", "against_step", "example", "method", "layer", "drift", "chance"]
    return long_table(parts, columns)


def stabilization(frame: Any, threshold: float) -> Any:
    """Returns the first step after which the mean drift over the examples stays at or below a threshold.

    The Reasoning Stabilization Point of arXiv 2601.11625, for any measure of drift: the first analysis ``t`` such that
    the mean drift over the examples is at most ``threshold`` at ``t`` and at every later analysis of the run. ``step``
    is missing where the last analysis is above the threshold; ``remaining`` counts the analyses from ``t`` on: a point
    that only the last one supports says little.

    Args:
        frame: what :func:`drift` gave.
        threshold: of the mean drift.

    Returns:
        A table with the columns run, seed, method, layer, step, remaining, analyses.
    """
    pandas = load_pandas()
    if not 0 <= threshold <= 2:
        raise RecordError(f"threshold must lie between 0 and 2, as drift does; got {threshold!r}.")
    means = frame.groupby(["run", "method", "layer", "step"], sort=True)["drift"].mean().reset_index()
    seeds = frame.drop_duplicates("run").set_index("run")["seed"]
    rows = []
    for (run, method, layer), part in means.groupby(["run", "method", "layer"], sort=False):
        low = (part["drift"] <= threshold).to_numpy()
        # An undefined drift is not low.
        stays = np.flip(np.logical_and.accumulate(np.flip(low)))
        first = int(stays.argmax()) if stays.any() else None
        rows.append(
            {
                "run": run,
                "seed": seeds[run],
                "method": method,
                "layer": layer,
                "step": None if first is None else int(part["step"].iloc[first]),
                "remaining": 0 if first is None else len(part) - first,
                "analyses": len(part),
            }
        )
    columns = ["run", "seed", "method", "layer", "step", "remaining", "analyses"]
    return pandas.DataFrame(rows, columns=columns).astype({"step": "Int64"})


def agreement(
    runs: Sequence[Run], methods: Sequence[str], layers: Sequence[int], between: str, by: str, special_tokens: bool
) -> Any:
    """Returns how alike an example's rows are in two runs at the same step, for each pair of runs.

    Two runs are a pair if they differ in ``between`` and in nothing else that is known of them: the same
    hyperparameters for ``between="seed"``. Examples are compared where both runs predict the same (Ferrando et al.
    2022, section 5): others are read for another decision. ``agreement`` is Spearman's rho of the two rows, or the
    Jaccard index of their largest quarters of tokens; two identical runs have 1.

    Columns: run, other_run, step, example, method, layer, agreement, chance.

    Raises:
        RecordError: fewer than two runs, no pair, or no such column.
    """
    checked(by, dynamics.MEASURES, "by")
    pairs = [*_pairs(runs, between)]
    remark_unknown_tokens(runs, special_tokens)
    decided = {run.label: _decided(run) for run in runs}
    parts = []
    # One method after another: the rows of many runs with all methods may not fit the memory.
    for method in methods:
        loaded: dict[str, dict[int, ExampleRows]] = {}
        compared: dict[tuple[str, int], Any] = {}
        for run in {run.label: run for pair in pairs for run in pair}.values():
            loaded[run.label] = {one.example: one for one in example_rows(run, [method], layers, special_tokens)}
            for one in loaded[run.label].values():
                compared[run.label, one.example] = dynamics.comparable(one.counted, by)
        for left, right in pairs:
            for example, one in loaded[left.label].items():
                other = loaded[right.label].get(example)
                if other is None or one.values.shape[2] != other.values.shape[2]:
                    continue
                shared = sorted(set(one.steps.tolist()) & set(other.steps.tolist()))
                same = [step for step in shared if _equal(decided, left, right, step, example)]
                places = [np.searchsorted(rows.steps, same) for rows in (one, other)]
                mine = compared[left.label, example][:, places[0]]
                theirs = compared[right.label, example][:, places[1]]
                parts.append(
                    {
                        "run": left.label,
                        "other_run": right.label,
                        "step": np.tile(np.array(same, dtype=np.int64), len(one.series)),
                        "example": example,
                        **series_columns(one.series, len(same)),
                        "agreement": dynamics.similarity(mine, theirs, by).ravel(),
                        "chance": 1 - _number(dynamics.chance([int(one.counts.sum())], by)),
                    }
                )
    columns = ["run", "other_run", "step", "example", "method", "layer", "agreement", "chance"]
    return long_table(parts, columns)


def _pairs(runs: Sequence[Run], between: str) -> Iterator[tuple[Run, Run]]:
    if len(runs) < 2:
        raise RecordError("agreement compares runs, and this study has one: load the records of several.")
    told = [{"run": run.label, "seed": run.seed, **hyperparameters(run)} for run in runs]
    names = sorted(set().union(*told))
    if between not in names:
        raise RecordError(f"nothing is known of {between!r}: agreement between one of {', '.join(names)}.")
    if between == "seed" and all(one["seed"] is None for one in told):
        raise RecordError(
            "the runs' seeds are not known: call seed_everything(seed) before the training, or compare with "
            "agreement(between='run')."
        )
    found = False
    others = [] if between == "run" else [one for one in names if one not in ("run", "seed", between)]
    for (left, mine), (right, theirs) in itertools.combinations(zip(runs, told, strict=True), 2):
        alike = all(mine.get(name) == theirs.get(name) for name in others)
        # Two values of a hyperparameter are compared within one seed, if the seeds are known.
        fixed = between in ("seed", "run") or mine["seed"] == theirs["seed"]
        if alike and fixed and mine.get(between) != theirs.get(between):
            found = True
            yield left, right
    if not found:
        both = [*others, *([] if between in ("seed", "run") else ["seed"])]
        apart = [name for name in both if len({repr(one.get(name)) for one in told}) > 1]
        raise RecordError(
            f"no two runs differ in {between!r} and agree in everything else that is known of them; they differ in "
            f"{', '.join(apart) or 'nothing'}. To compare all of them, write agreement(between='run')."
        )


def _decided(run: Run) -> dict[tuple[int, int], tuple[Any, ...]]:
    """(step, example) -> what was decided, and of which text."""
    table = run.record.examples(run.name, ["answers", "predicted", "text_hash"]).to_pylist()
    return {(one["step"], one["example"]): (tuple(one["answers"]), one["predicted"], one["text_hash"]) for one in table}


def _equal(
    decided: dict[str, dict[tuple[int, int], tuple[Any, ...]]], left: Run, right: Run, step: int, example: int
) -> bool:
    mine, theirs = (decided[run.label].get((step, example)) for run in (left, right))
    return mine is not None and mine == theirs


def right_or_wrong(runs: Sequence[Run]) -> Any:
    """Returns a row per run, step and example: whether what was decided is what the data say; missing where unknown."""
    table = examples(runs)
    known = table["label"].notna() & table["predicted"].notna()
    same = [
        [float(one) for one in answers] == [float(one) for one in truths]
        for answers, truths in zip(table["answers"], table["truths"], strict=True)
    ]
    table["right"] = [one if there else None for one, there in zip(same, known, strict=True)]
    return table[["run", "seed", "step", "example", "right"]]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
