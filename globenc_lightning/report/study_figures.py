"""Figures of a study, for papers and notebooks: the ladder of methods, drift, agreement, and the mass of tokens.

The layout is that of the stills of one training; bands are over runs and examples. The same study gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from globenc_lightning.errors import RecordError
from globenc_lightning.report import curves, further_curves, scales, stills
from globenc_lightning.study.bootstrap import EXAMPLES

if TYPE_CHECKING:
    from globenc_lightning.study import Study

DPI = 200
LEVEL = 95
SHOWN_RUNS = 4
CHANCE, UNIFORM = "chance", "uniform row"
MEASURES = {"spearman": "Spearman’s ρ", "jaccard": "Jaccard of the top quarter"}
PLAIN = {"special": "special tokens"}


def save_ladder(
    study: Study,
    path: str | os.PathLike[str],
    by: str = "layer",
    *,
    methods: str | Sequence[str] | None = None,
    reference: str = "saliency",
    title: str | None = None,
    dpi: int = DPI,
) -> Path:
    """Saves the correlation with a reference of all methods, by layer or over the training.

    Args:
        study: the runs.
        path: ends in ``.svg`` or ``.png``.
        by: ``"layer"``, at the last step that all runs have; or ``"training"``, at the last layer.
        methods: one or several; all when None.
        reference: what the methods are compared with, one of ``study.references``.
        title: another title; an empty one leaves it out.
        dpi: of a PNG.

    Returns:
        The path.

    Raises:
        ValueError: a path, a number or a choice that cannot be used.
        RecordError: the runs have no step in common, or a method or reference that is not there was asked for.
    """
    target = stills.checked_path(path, dpi)
    if by not in stills.KINDS:
        raise ValueError(f"by must be one of {', '.join(map(repr, stills.KINDS))}; got {by!r}.")
    aggregate = "attention flow" if study.aggregation == "maxflow" else "rollout"
    if by == "layer":
        step = _shared_step(study)
        found = study.correlations(methods, reference=reference)
        table = study.summary(found[found["step"] == step], "rho", ["method", "layer"])
        heading = f"Correlation of {aggregate} and {reference} by layer, step {step}"
    else:
        found = study.correlations(methods, study.layers, reference=reference)
        table = study.summary(found, "rho", ["method", "step"])
        heading = f"Correlation of {aggregate} and {reference} over training, layer {study.layers}"
    return _saved(study, target, dpi, title, _Figure(heading, table, "ρ", scales.correlation(reference), {}, []))


def save_faithfulness(
    study: Study,
    path: str | os.PathLike[str],
    figure: str = "gain",
    *,
    methods: str | Sequence[str] | None = None,
    title: str | None = None,
    dpi: int = DPI,
) -> Path:
    """Saves how much the decisions depend on the methods' first tokens over the training, beside random ones.

    Args:
        study: the runs.
        path: ends in ``.svg`` or ``.png``.
        figure: ``"gain"``, ``"sufficiency_gain"`` or ``"log_odds"``.
        methods: one or several; all whose first tokens were masked when None.
        title: another title; an empty one leaves it out.
        dpi: of a PNG.

    Returns:
        The path.

    Raises:
        ValueError: a path, a number or a choice that cannot be used.
        RecordError: faithfulness was not measured in every run, or not of such a method.
    """
    target = stills.checked_path(path, dpi)
    if figure not in scales.NAMES:
        raise ValueError(f"figure must be one of {', '.join(map(repr, scales.NAMES))}; got {figure!r}.")
    found = study.faithfulness(methods)
    table = study.summary(found, figure, ["method", "step"])
    random = {} if figure == "log_odds" else {scales.RANDOM: 0.0}
    parts = [part for _, part in table.groupby("method")]
    means = [part["mean"].to_numpy(dtype=np.float64) for part in parts]
    halves = [(part["high"] - part["mean"]).to_numpy(dtype=np.float64) for part in parts]
    scale = scales.faithfulness(figure, study.masked_share, means, halves)
    notes = []
    each = found.drop_duplicates(["run", "step", "example"])[figure]
    if figure != "log_odds" and each.isna().any():
        notes = [
            f"Left out: {int(each.isna().sum())} of {len(each)} analyses of an example, since masking every token "
            "costs too little of its score."
        ]
    drawn = _Figure(further_curves.HEADINGS[figure], table, further_curves.UNITS[figure], scale, random, notes)
    return _saved(study, target, dpi, title, drawn)


def save_drift(
    study: Study,
    path: str | os.PathLike[str],
    *,
    against: str = "previous",
    by: str = "spearman",
    methods: str | Sequence[str] | None = None,
    layer: int | None = None,
    special_tokens: bool = False,
    title: str | None = None,
    dpi: int = DPI,
) -> Path:
    """Saves how far the rows move over the training, beside the drift of rows whose tokens were shuffled.

    Args:
        study: the runs.
        path: ends in ``.svg`` or ``.png``.
        against: the row at the ``"previous"``, the ``"first"`` or the ``"last"`` analysis.
        by: ``"spearman"``, or ``"jaccard"`` of the largest quarter of the tokens.
        methods: one or several; all when None.
        layer: from 1; the last one that is recorded when None.
        special_tokens: whether special tokens count.
        title: another title; an empty one leaves it out.
        dpi: of a PNG.

    Returns:
        The path.

    Raises:
        ValueError: a path or a number that cannot be used.
        RecordError: a choice that is not there, or fewer than two analyses in every run.
    """
    target = stills.checked_path(path, dpi)
    layer = _layer(study, layer)
    found = study.drift(against, by, methods, layer, special_tokens=special_tokens)
    if found.empty:
        raise RecordError("drift compares the analyses of a run, and no run has two of them yet.")
    table = study.summary(found, "drift", ["method", "step"])
    chance = _references({CHANCE: found.loc[found["drift"].notna(), "chance"].mean()})
    other = {"previous": "the analysis before", "first": "the first analysis", "last": "the last analysis"}[against]
    scale = _scale(f"1 − {MEASURES[by]} with the row at {other}", table, chance, 0, 2 if by == "spearman" else 1)
    notes = [_counted(special_tokens), f"{CHANCE.capitalize()}: rows whose tokens were shuffled."]
    heading = f"Drift of the readout rows over training, layer {layer}"
    return _saved(study, target, dpi, title, _Figure(heading, table, "drift", scale, chance, notes))


def save_agreement(
    study: Study,
    path: str | os.PathLike[str],
    *,
    between: str = "seed",
    by: str = "spearman",
    methods: str | Sequence[str] | None = None,
    layer: int | None = None,
    special_tokens: bool = False,
    title: str | None = None,
    dpi: int = DPI,
) -> Path:
    """Saves how alike the rows of different runs are over the training.

    Args:
        study: the runs.
        path: ends in ``.svg`` or ``.png``.
        between: ``"seed"``, ``"run"``, or the name of a hyperparameter.
        by: ``"spearman"``, or ``"jaccard"`` of the largest quarter of the tokens.
        methods: one or several; all when None.
        layer: from 1; the last one that is recorded when None.
        special_tokens: whether special tokens count.
        title: another title; an empty one leaves it out.
        dpi: of a PNG.

    Returns:
        The path.

    Raises:
        ValueError: a path or a number that cannot be used.
        RecordError: a choice that is not there, no pair of runs, or no step at which a pair decides the same.
    """
    target = stills.checked_path(path, dpi)
    layer = _layer(study, layer)
    found = study.agreement(between, by, methods, layer, special_tokens=special_tokens)
    if found.empty:
        raise RecordError("no two runs predict the same of any example at any step: there is nothing to compare.")
    table = study.summary(found, "agreement", ["method", "step"])
    chance = _references({CHANCE: found.loc[found["agreement"].notna(), "chance"].mean()})
    scale = _scale(f"{MEASURES[by]} of the rows of two runs", table, chance, -1 if by == "spearman" else 0, 1)
    left = found.drop_duplicates(["run", "other_run", "step", "example"]).groupby(["run", "other_run", "step"]).size()
    pairs = found.drop_duplicates(["run", "other_run"])
    notes = [
        f"Compared: {_count(len(pairs), 'pair')} of runs that differ in {between}, each on the {_range(left)} of "
        f"{_count(_size(study), 'example')} that both predict the same.",
        _counted(special_tokens),
        f"{CHANCE.capitalize()}: rows whose tokens were shuffled.",
    ]
    heading = f"Agreement between runs over training, layer {layer}"
    return _saved(study, target, dpi, title, _Figure(heading, table, "agreement", scale, chance, notes))


def save_mass(
    study: Study,
    path: str | os.PathLike[str],
    tokens: str | Sequence[str],
    *,
    methods: str | Sequence[str] | None = None,
    layer: int | None = None,
    title: str | None = None,
    dpi: int = DPI,
) -> Path:
    """Saves the share of attribution on a set of tokens over the training, beside that of a row without preferences.

    Args:
        study: the runs.
        path: ends in ``.svg`` or ``.png``.
        tokens: ``"negations"``, ``"punctuation"``, ``"special"``, a token or word, or several of them.
        methods: one or several; all when None.
        layer: from 1; the last one that is recorded when None.
        title: another title; an empty one leaves it out.
        dpi: of a PNG.

    Returns:
        The path.

    Raises:
        ValueError: a path or a number that cannot be used.
        RecordError: a choice that is not there, or no example has such a token.
    """
    target = stills.checked_path(path, dpi)
    layer = _layer(study, layer)
    found = study.mass(tokens, methods, layer)
    # An example without such a token says nothing of how the model treats it.
    found = found[found["tokens"] > 0]
    names = [tokens] if isinstance(tokens, str) else [*tokens]
    told = ", ".join(PLAIN.get(one, one) for one in names[:6]) + (", …" if len(names) > 6 else "")
    if found.empty:
        raise RecordError(f"no example of the probe has a token of {told}: there is no share to draw.")
    table = study.summary(found, "mass", ["method", "step"])
    lengths = study.probe.groupby("example").size()
    held = found.drop_duplicates("example").set_index("example")["tokens"]
    uniform = _references({UNIFORM: float((held / lengths[held.index]).mean())})
    scale = _scale("share of the row’s attribution", table, uniform, 0, 1)
    notes = [
        f"Tokens: {told}; {_count(len(held), 'example')} of {_size(study)} that "
        f"{'has' if len(held) == 1 else 'have'} one.",
        f"{UNIFORM.capitalize()}: every token of an example has the same share.",
    ]
    heading = f"Attribution on {told} over training, layer {layer}"
    return _saved(study, target, dpi, title, _Figure(heading, table, "share", scale, uniform, notes))


class _Figure(NamedTuple):
    """What a figure shows.

    Attributes:
        heading: its title.
        table: a summary by method and step, or by method and layer.
        unit: what is averaged, in a word or a sign.
        scale: the y-axis.
        references: levels to compare the lines with, by their names.
        notes: sentences that stand below, after those on lines and bands.
    """

    heading: str
    table: Any
    unit: str
    scale: curves.Scale
    references: Mapping[str, float]
    notes: Sequence[str]


def _saved(study: Study, target: Path, dpi: int, title: str | None, figure: _Figure) -> Path:
    """Draws a summary, a line per method over steps or layers, and writes it."""
    table = figure.table
    if not table["mean"].notna().any():
        raise RecordError(f"there is nothing to draw: not one {figure.unit} is defined.")
    x, x_name = ("layer", "layer") if "layer" in table.columns else ("step", "training step")
    places = sorted(table[x].unique().tolist())
    by_method = {method: part.set_index(x).reindex(places) for method, part in table.groupby("method", sort=False)}
    shown = curves.Curves(
        np.asarray(places, dtype=np.float64),
        {method: part["mean"].to_numpy(dtype=np.float64) for method, part in by_method.items()},
        {method: (part["high"] - part["mean"]).to_numpy(dtype=np.float64) for method, part in by_method.items()},
        ticks=curves.spaced(places),
        x_name=x_name,
        caption=[*_said(table, figure.unit), *figure.notes],
        scale=figure.scale,
        references=figure.references,
        unit=figure.unit,
    )
    return stills.save_curves(target, dpi, shown, figure.heading if title is None else title, _runs(study))


def _said(table: Any, unit: str) -> list[str]:
    """What the lines and the bands are, and of how many runs and examples."""
    drawn = table[table["mean"].notna()]
    runs, examples = drawn["runs"], drawn["examples"]
    units = f"{_range(runs)} run{'' if runs.max() == 1 else 's'}"
    units = f"the pairs of {units}" if unit == "agreement" else units
    sizes = f"{_range(examples)} example{'' if examples.max() == 1 else 's'}"
    lines = f"Lines: mean {unit} over {units} and {sizes}; numbers: the line’s last point."
    found = sorted({*drawn.loc[drawn["low"].notna(), "over"]}, reverse=True)
    if not found:
        return [lines, "No bands: an interval needs two runs or two examples."]
    bands = f"Bands: {LEVEL} % interval of the mean over {', or over '.join(found)}, by a bootstrap."
    if EXAMPLES not in found:
        return [lines, bands]
    alone = "One pair of runs" if unit == "agreement" else "One run"
    where = "" if len(found) == 1 else ", where there is no other,"
    return [lines, bands, f"{alone}{where} says nothing about other seeds."]


def _runs(study: Study) -> str:
    """The runs by name, with their seeds, and the size of the probe."""
    table = study.runs
    names = [
        str(run) if seed is None or seed != seed else f"{run} (seed {int(seed)})"
        for run, seed in zip(table["run"], table["seed"], strict=True)
    ]
    more = len(names) - SHOWN_RUNS
    listed = ", ".join(names if more <= 0 else names[:SHOWN_RUNS]) + (f" and {more} more" if more > 0 else "")
    return f"{_count(len(names), 'run')}: {listed}; a probe of {_count(_size(study), 'example')}"


def _size(study: Study) -> int:
    return int(study.probe["example"].nunique())


def _layer(study: Study, layer: int | None) -> int:
    """The layer that is drawn: the last one whose attributions all runs have."""
    return study.recorded_layers[-1] if layer is None else layer


def _shared_step(study: Study) -> int:
    """The last step that all runs have.

    Raises:
        RecordError: there is none.
    """
    steps = [{*part["step"]} for _, part in study.examples().groupby("run")]
    shared = set.intersection(*steps)
    if not shared:
        raise RecordError(
            "the runs have no step in common, so there is none at which their layers can be compared: choose runs with "
            "study.load(..., runs=[...]), or draw by='training'."
        )
    return int(max(shared))


def _references(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def _scale(name: str, table: Any, references: Mapping[str, float], least: float, most: float) -> curves.Scale:
    """A y-axis that holds zero, all lines with their bands, and the references."""
    values = np.concatenate([table[one].to_numpy(dtype=np.float64) for one in ("mean", "low", "high")])
    return scales.fitting(name, [*values, *references.values()], least, most)


def _counted(special_tokens: bool) -> str:
    return "Special tokens count." if special_tokens else "Special tokens are left out."


def _range(counts: Any) -> str:
    fewest, most = int(counts.min()), int(counts.max())
    return f"{fewest}" if fewest == most else f"{fewest}–{most}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
