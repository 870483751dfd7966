"""Tables in long form out of records: one row per figure, one column per thing that tells figures apart."""

from collections.abc import Sequence
from typing import Any

from globenc_lightning.errors import RecordError
from globenc_lightning.record import schema
from globenc_lightning.record.libraries import load_pandas
from globenc_lightning.study.loading import Run

SALIENCY = "saliency"


def methods_of(runs: Sequence[Run], recorded: bool = False) -> list[str]:
    """Returns the methods that all runs have: of their correlations, or whose attributions are recorded."""
    told = [run.about["recorded"]["methods"] if recorded else run.about["methods"] for run in runs]
    return [one for one in told[0] if all(one in other for other in told)]


def layers_of(runs: Sequence[Run], recorded: bool = False) -> list[int]:
    """Returns the layers, from 1, that all runs have."""
    told = [run.about["recorded"]["layers"] if recorded else [*range(1, int(run.about["layers"]) + 1)] for run in runs]
    return [one for one in told[0] if all(one in other for other in told)]


def chosen(wanted: Sequence[Any] | Any | None, there: Sequence[Any], things: str) -> list[Any]:
    """Returns those that are asked for, one or several; all of them when None.

    Raises:
        RecordError: one is not there in every run.
    """
    if wanted is None:
        return [*there]
    asked = [wanted] if isinstance(wanted, str | int) else [*wanted]
    for one in asked:
        if one not in there:
            raise RecordError(
                f"not every run has the {things} {one!r} recorded; all have {', '.join(map(str, there))}."
            )
    return asked


def references_of(runs: Sequence[Run]) -> list[str]:
    """Returns what all runs have correlations with, the saliency first."""
    told = [run.about["recorded"].get("references", []) for run in runs]
    return [SALIENCY, *(one for one in told[0] if all(one in other for other in told))]


def masked_methods_of(runs: Sequence[Run]) -> list[str]:
    """Returns the methods whose faithfulness was measured in all runs."""
    told = [run.about["recorded"].get("faithfulness", []) for run in runs]
    return [one for one in told[0] if all(one in other for other in told)]


def correlations(runs: Sequence[Run], methods: Sequence[str], layers: Sequence[int], reference: str = SALIENCY) -> Any:
    """Returns a row per run, step, example, method and layer, with Spearman's ``rho`` with a reference."""
    pandas = load_pandas()

    def column(method: str, layer: int) -> str:
        if reference == SALIENCY:
            return schema.rho_column(method, layer)
        return schema.rho_with_column(reference, method, layer)

    names = {column(method, layer): (method, layer) for method in methods for layer in layers}
    keys = ["step", "epoch", "example"]
    frames = []
    for run in runs:
        table = run.record.examples(run.name, ["epoch", *names]).to_pandas()
        frames.append(_long(_labelled(table, run), ["run", "seed", *keys], names, "rho"))
    return pandas.concat(frames, ignore_index=True)


def faithfulness(runs: Sequence[Run], methods: Sequence[str]) -> Any:
    """Returns a row per run, step, example and method with ``gain``, ``sufficiency_gain``, ``log_odds`` and ``span``.

    Analyses that masked no tokens have no rows; a figure that an example does not have is missing.
    """
    pandas = load_pandas()
    frames = []
    for run in runs:
        there = run.record.columns(run.name, schema.EXAMPLES)
        names = {
            figure: {schema.faithfulness_column(figure, method): method for method in methods}
            for figure in schema.FAITHFULNESS_COLUMNS
        }
        wanted = [one for columns in names.values() for one in columns if one in there]
        table = run.record.examples(run.name, ["epoch", schema.SPAN[0], *wanted]).to_pandas()
        table = _labelled(table[_measured(table)], run)
        keys = ["run", "seed", "step", "epoch", "example"]
        for method in methods:
            figures = {figure: table.get(schema.faithfulness_column(figure, method)) for figure in names}
            part = table[keys].assign(method=method)
            frames.append(
                part.assign(**{name: _numbers(one, part) for name, one in figures.items()}, span=table["span"])
            )
    return pandas.concat(frames, ignore_index=True)


def _measured(table: Any) -> Any:
    """The rows of analyses that masked tokens: at others, all examples are without a span."""
    return table.groupby("step")[schema.SPAN[0]].transform("count") > 0


def _numbers(values: Any, part: Any) -> Any:
    """A column of numbers; missing where it is not recorded, since the score is a value, say."""
    return load_pandas().Series(float("nan"), index=part.index) if values is None else values.astype("float64")


def signed(runs: Sequence[Run], special_tokens: bool) -> Any:
    """Returns a row per run, step, example and token, with its ``signed`` contribution to the score.

    Raises:
        RecordError: a run has none.
    """
    without = [run.label for run in runs if not run.about["recorded"].get("signed")]
    if without:
        raise RecordError(
            f"the run {without[0]} has no signed scores recorded: train with GlobEncCallback(signed=True, record=...)."
        )
    frames = []
    for run in runs:
        table = _with_words(run, run.record.tokens(run.name, [schema.SIGNED[0]]).to_pandas(), special_tokens)
        frames.append(table[["run", "seed", "step", "example", "position", "token", "word", "special", "signed"]])
    return load_pandas().concat(frames, ignore_index=True)


def examples(runs: Sequence[Run]) -> Any:
    """Returns a row per run, step and example, with what was decided; without the correlations."""
    pandas = load_pandas()
    columns = [one for one in schema.EXAMPLE_COLUMNS if one not in ("step", "example")]
    if all(run.about["recorded"].get("signed") for run in runs):
        columns.append(schema.LEFT_OUT[0])
    frames = [_labelled(run.record.examples(run.name, columns).to_pandas(), run) for run in runs]
    return pandas.concat(frames, ignore_index=True)


def probe(run: Run) -> Any:
    """Returns a row per example and token of the probe."""
    return run.record.probe(run.name).to_pandas()


def tokens(runs: Sequence[Run], methods: Sequence[str], layers: Sequence[int], special_tokens: bool) -> Any:
    """Returns a row per run, step, example, token, method and layer, with the attribution as ``value``."""
    pandas = load_pandas()
    names = {schema.attribution_column(method, layer): (method, layer) for method in methods for layer in layers}
    keys = ["step", "example", "position"]
    frames = []
    for run in runs:
        table = _with_words(run, run.record.tokens(run.name, ["saliency", *names]).to_pandas(), special_tokens)
        held = ["run", "seed", *keys, "token", "word", "special", "saliency"]
        frames.append(_long(table, held, names, "value"))
    return pandas.concat(frames, ignore_index=True)


def _with_words(run: Run, table: Any, special_tokens: bool) -> Any:
    """A table of a run's tokens with what stands at their positions."""
    told = probe(run)[["example", "position", "token", "word", "special"]]
    table = table.merge(told, on=["example", "position"], how="left")
    if not special_tokens:
        table = table[table["special"] != True]  # noqa: E712, it may be unknown
    return _labelled(table, run)


def about(runs: Sequence[Run]) -> Any:
    """Returns a row per run: its seed, its hyperparameters, how many analyses it has, and where its record is."""
    rows = []
    for run in runs:
        steps = run.record.steps(run.name)
        row: dict[str, Any] = {"run": run.label, "seed": run.seed, **hyperparameters(run)}
        row |= {"analyses": len(steps), "first_step": steps[0], "last_step": steps[-1]}
        rows.append(row | {"created": run.about.get("created"), "folder": str(run.record.folder)})
    return load_pandas().DataFrame(rows)


def hyperparameters(run: Run) -> dict[str, Any]:
    """Returns a run's hyperparameters by name; those of a mapping by the mapping's name, a dot and theirs."""
    found: dict[str, Any] = {}

    def flatten(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = tuple(value) if isinstance(value, list) else value

    flatten(run.about.get("hyperparameters") or {}, "")
    return found


def _labelled(table: Any, run: Run) -> Any:
    return table.assign(run=run.label, seed=run.seed)


def _long(table: Any, keys: list[str], names: dict[str, tuple[str, int]], value: str) -> Any:
    """A table with one row per key and column: the columns' names become a method and a layer."""
    long = table.melt(keys, list(names), "_column", value)
    long.insert(len(keys), "method", long["_column"].map({name: method for name, (method, _) in names.items()}))
    long.insert(len(keys) + 1, "layer", long["_column"].map({name: layer for name, (_, layer) in names.items()}))
    return long.drop(columns="_column")
