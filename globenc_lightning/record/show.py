"""Prints a study in the terminal, and saves its figures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from globenc_lightning.errors import RecordError
from globenc_lightning.record.libraries import load, load_pandas
from globenc_lightning.spelling import hyphenated
from globenc_lightning.study.study import Study

MOST_STEPS = 12
"""So many steps of a long training are printed, the first and the last among them."""


def print_study(
    study: Study, methods: Sequence[str] | None = None, threshold: float = 0.1, console: Any = None
) -> None:
    """Print the runs, rho, faithfulness and drift by method and step, stabilization, and agreement of seeds.

    Args:
        study: the runs.
        methods: those that are printed; all when None.
        threshold: of drift, for stabilization.
        console: where to; the standard output when None.
    """
    load("rich", "globenc show")
    from rich.console import Console

    console = console or Console()
    chosen = [*(methods or study.methods)]
    _print(console, "Runs", _runs(study))
    last = study.layers
    rho = study.summary(study.correlations(chosen, last), "rho", ["step", "method"])
    _print(console, f"Rho with the saliency, layer {last}{_told(rho)}", _by_step(rho, chosen))
    for reference in study.references[1:]:
        rho = study.summary(study.correlations(chosen, last, reference=reference), "rho", ["step", "method"])
        _print(console, f"Rho with {reference}, layer {last}{_told(rho)}", _by_step(rho, chosen))
    masked = [one for one in chosen if one in study.masked_methods]
    if masked:
        gains = study.summary(study.faithfulness(masked), "gain", ["step", "method"])
        share = f"{study.masked_share * 100:.0f} %"
        title = f"Faithfulness: gain of masking a method's top {share} over random tokens, 0 no better than random"
        why = "; left out: examples of whose score masking every token costs too little"
        _print(console, title + _told(gains) + why, _by_step(gains, masked))
    try:
        drift = study.drift(methods=chosen, layers=last)
    except RecordError as error:
        console.print(f"No drift: {error}", style="dim", markup=False)
        return
    if not len(drift):
        console.print("No drift yet: it needs two analyses.", style="dim")
        return
    moved = study.summary(drift, "drift", ["step", "method"])
    title = f"Drift, 1 - Spearman's rho with the row before, layer {last}; chance {drift['chance'].mean():.2f}"
    _print(console, title + _told(moved), _by_step(moved, chosen))
    title = f"First step after which the mean drift stays at or below {threshold:g}, layer {last}"
    _print(console, title, _stabilization(study, chosen, last, threshold))
    if len(study) > 1:
        try:
            shared = study.agreement(methods=chosen, layers=last)
        except RecordError as error:
            console.print(f"No agreement between seeds: {error}", style="dim", markup=False)
            return
        alike = study.summary(shared, "agreement", ["step", "method"])
        title = f"Agreement between seeds, Spearman's rho of their rows, layer {last}{_told(alike)}"
        _print(console, title, _by_step(alike, chosen))


def save_figures(study: Study, folder: Path, kind: str = "svg") -> Iterator[Path]:
    """Save the figures of a study, and yield their paths; what there are no data for is left out.

    Args:
        study: the runs.
        folder: where to; it is made.
        kind: ``"svg"`` or ``"png"``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    yield study.save_ladder(folder / f"ladder_by_layer.{kind}", by="layer")
    yield study.save_ladder(folder / f"ladder_over_training.{kind}", by="training")
    for reference in study.references[1:]:
        for by, ending in (("layer", "by_layer"), ("training", "over_training")):
            path = folder / f"ladder_with_{hyphenated(reference)}_{ending}.{kind}"
            yield study.save_ladder(path, by=by, reference=reference)
    figures = (
        ("drift", study.save_drift),
        ("agreement", study.save_agreement),
        ("faithfulness", study.save_faithfulness),
    )
    for name, save in figures:
        try:
            yield save(folder / f"{name}.{kind}")
        except (RecordError, ValueError):
            # One analysis has not moved, one run agrees with nobody, and not every run has masked tokens.
            continue


def _runs(study: Study) -> Any:
    from rich.table import Table

    table = Table()
    frame = study.runs
    columns = [one for one in frame.columns if one not in ("folder", "created")]
    for column in columns:
        table.add_column(str(column), justify="left" if column == "run" else "right", overflow="fold")
    for row in frame[columns].itertuples(index=False):
        table.add_row(*(_plain(value) for value in row))
    return table


def _print(console: Any, title: str, table: Any) -> None:
    """Print a table below its title, which is often wider."""
    console.print(title, style="bold", markup=False, highlight=False)
    console.print(table)


def _by_step(frame: Any, methods: Sequence[str]) -> Any:
    """Means by step (rows) and method (columns)."""
    from rich.table import Table

    table = Table()
    table.add_column("step", justify="right")
    for method in methods:
        table.add_column(method, justify="right")
    means = frame.pivot(index="step", columns="method", values="mean")
    lows, highs = (frame.pivot(index="step", columns="method", values=one) for one in ("low", "high"))
    for step in _thinned([*means.index]):
        cells = [_with_interval(*(one.loc[step].get(method) for one in (means, lows, highs))) for method in methods]
        table.add_row(str(step), *cells)
    return table


def _thinned(steps: list[int]) -> list[Any]:
    if len(steps) <= MOST_STEPS:
        return steps
    places = sorted({round(place * (len(steps) - 1) / (MOST_STEPS - 1)) for place in range(MOST_STEPS)})
    return [steps[place] for place in places]


def _with_interval(mean: Any, low: Any, high: Any) -> str:
    if mean is None or mean != mean:
        return "undefined"
    return f"{mean:.3f}" if low is None or low != low else f"{mean:.3f} ± {(high - low) / 2:.3f}"


def _told(frame: Any) -> str:
    """What the intervals of a table speak of."""
    if not len(frame):
        return ""
    if not frame["examples"].max():
        return "; no example has such a figure"
    # An example may have a figure at some steps alone, and of some methods.
    fullest = frame.loc[frame["examples"].idxmax()]
    fewest, most = frame["examples"].min(), fullest["examples"]
    examples = f"{most}" if fewest == most else f"{fewest} to {most}"
    runs = "1 run" if fullest["runs"] == 1 else f"{fullest['runs']} runs"
    return f"; mean over {examples} examples and {runs}, ± 95 % interval over {fullest['over']}"


def _stabilization(study: Study, methods: Sequence[str], layer: int, threshold: float) -> Any:
    from rich.table import Table

    pandas = load_pandas()
    found = study.stabilization(threshold, methods=methods, layers=layer)
    table = Table()
    table.add_column("run", overflow="fold")
    for method in methods:
        table.add_column(method, justify="right")
    for run, part in found.groupby("run", sort=False):
        steps = dict(zip(part["method"], part["step"], strict=True))
        table.add_row(_plain(run), *("never" if pandas.isna(steps[one]) else str(steps[one]) for one in methods))
    return table


def _plain(value: Any) -> Any:
    """A value as text, in which nothing is markup."""
    from rich.text import Text

    return Text("" if load_pandas().isna(value) is True else str(value))
