"""``Study``: the figures of one run or many, and the statistics over them, as tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from globenc_lightning.errors import RecordError
from globenc_lightning.record.libraries import load, load_pandas
from globenc_lightning.study import bootstrap, compare, frames
from globenc_lightning.study.groups import groups
from globenc_lightning.study.loading import Run
from globenc_lightning.study.mass import mass

Names = str | Sequence[str] | None
Numbers = int | Sequence[int] | None
KEYS = ("method", "layer", "step")
GROUPS = ("label", "right", "region")


class Study:
    """Runs of one probe, and what can be told of them. :func:`globenc_lightning.study.load` makes one.

    Every table is a pandas DataFrame in long form: one row per figure. A run that is still written is read anew by
    every call. Where runs have recorded different methods or layers, those that all of them have are offered.

    Args:
        loaded: the runs.

    Attributes:
        methods: the methods that all runs have correlations of.
        layers: the number of layers.
    """

    def __init__(self, loaded: Sequence[Run]) -> None:
        self._runs = [*loaded]
        self.methods = frames.methods_of(self._runs)
        self.layers = len(frames.layers_of(self._runs))
        if not self.methods:
            raise RecordError("the runs have no method in common, so there is nothing to compare.")

    def __repr__(self) -> str:
        """Its size, in one line."""
        return f"Study({len(self._runs)} runs, {', '.join(self.methods)}, {self.layers} layers)"

    def __len__(self) -> int:
        """The number of runs."""
        return len(self._runs)

    @property
    def runs(self) -> Any:
        """Returns a row per run, with seed, hyperparameters, number of analyses, first and last step, folder."""
        return frames.about(self._runs)

    @property
    def probe(self) -> Any:
        """Returns a row per example and token of the probe, with token, word, whether it is special, label, text."""
        return frames.probe(self._runs[0])

    def correlations(self, methods: Names = None, layers: Numbers = None) -> Any:
        """Returns Spearman's rho with the saliency: run, seed, step, epoch, example, method, layer, rho."""
        chosen = frames.chosen(methods, self.methods, "method")
        return frames.correlations(self._runs, chosen, frames.chosen(layers, self._layers(), "layer"))

    def examples(self) -> Any:
        """Returns what was decided: a row per run, step and example, with the columns of the record's examples."""
        return frames.examples(self._runs)

    def tokens(self, methods: Names = None, layers: Numbers = None, *, special_tokens: bool = True) -> Any:
        """Returns attributions as ``value``, a row per run, step, example, token, method and layer.

        Args:
            methods: one or several; all that every run has recorded when None.
            layers: one or several, from 1; all that every run has recorded when None.
            special_tokens: whether special tokens are among the rows.
        """
        return frames.tokens(self._runs, *self._recorded(methods, layers), special_tokens)

    def to_xarray(self) -> Any:
        """Returns correlations and decisions as an xarray Dataset.

        ``rho`` (run, step, example, method, layer); ``score``, ``predicted``, ``label``, ``loss`` (run, step, example);
        the coordinate ``seed`` (run). The ``sel`` of xarray has an argument ``method`` of its own: choose a method
        with ``sel({"method": "N-Enc"})``.

        Raises:
            RecordError: xarray is not installed.
        """
        xarray = load("xarray", "Study.to_xarray()")
        rho = self.correlations().set_index(["run", "step", "example", "method", "layer"])["rho"]
        decided = self.examples().set_index(["run", "step", "example"])[["score", "predicted", "label", "loss"]]
        found = xarray.Dataset({"rho": xarray.DataArray.from_series(rho)})
        found = found.reindex(method=self.methods).merge(xarray.Dataset.from_dataframe(decided.astype("float64")))
        seeds = {run.label: run.seed for run in self._runs}
        return found.assign_coords(seed=("run", [seeds[one] for one in found["run"].to_numpy()]))

    def drift(
        self,
        against: str = "previous",
        by: str = "spearman",
        methods: Names = None,
        layers: Numbers = None,
        *,
        special_tokens: bool = False,
    ) -> Any:
        """Returns how far each example's row moved, beside the chance level; see :mod:`.compare`.

        Args:
            against: the row at the ``"previous"``, the ``"first"`` or the ``"last"`` analysis.
            by: ``"spearman"``, or ``"jaccard"`` of the largest quarter of the tokens.
            methods: one or several; all when None.
            layers: one or several, from 1; all when None.
            special_tokens: whether special tokens count.
        """
        return compare.drift(self._runs, *self._recorded(methods, layers), against, by, special_tokens)

    def stabilization(self, threshold: float, **choices: Any) -> Any:
        """Returns the first step after which drift stays low; see :mod:`.compare`.

        Args:
            threshold: of the mean drift over the examples.
            **choices: those of :meth:`drift`.
        """
        return compare.stabilization(self.drift(**choices), threshold)

    def agreement(
        self,
        between: str = "seed",
        by: str = "spearman",
        methods: Names = None,
        layers: Numbers = None,
        *,
        special_tokens: bool = False,
    ) -> Any:
        """Returns how alike rows are in different runs; see :mod:`.compare`.

        Args:
            between: ``"seed"``, ``"run"``, or the name of a hyperparameter.
            by: ``"spearman"``, or ``"jaccard"`` of the largest quarter of the tokens.
            methods: one or several; all when None.
            layers: one or several, from 1; all when None.
            special_tokens: whether special tokens count.
        """
        return compare.agreement(self._runs, *self._recorded(methods, layers), between, by, special_tokens)

    def mass(self, tokens: str | Sequence[str], methods: Names = None, layers: Numbers = None) -> Any:
        """Returns the share of attribution on a set of tokens; see :mod:`.mass`.

        Args:
            tokens: ``"negations"``, ``"punctuation"``, ``"special"``, a token or word, or several of them.
            methods: one or several; all when None.
            layers: one or several, from 1; all when None.
        """
        return mass(self._runs, *self._recorded(methods, layers), tokens)

    def groups(self) -> Any:
        """Returns the groups of each example: label, right or wrong, region; see :mod:`.groups`."""
        return groups(self._runs)

    def summary(
        self,
        frame: Any,
        value: str,
        by: Sequence[str] = KEYS,
        *,
        group: str | None = None,
        level: float = bootstrap.LEVEL,
        draws: int = bootstrap.DRAWS,
        seed: int = 0,
    ) -> Any:
        """Returns the mean of a figure and its interval over runs and examples; see :mod:`.bootstrap`.

        Args:
            frame: a table of this study, such as :meth:`drift` gives.
            value: the column that is averaged: ``"rho"``, ``"drift"``, ``"agreement"``, ``"mass"``.
            by: what is kept apart.
            group: keep apart by ``"label"``, ``"right"`` or ``"region"``, too, as :meth:`groups` has them.
            level: how often the interval holds the true mean.
            draws: how often runs and examples are drawn.
            seed: of the draws.

        Returns:
            The columns of ``by``, the group, ``mean``, ``low``, ``high``, ``runs``, ``examples``, and ``over``, what
            the interval speaks of: with a single run it is over ``"examples alone"`` and says nothing about seeds.

        Raises:
            RecordError: no such column or group.
        """
        pandas = load_pandas()
        wanted = [*by, value, "run", "example"]
        absent = [one for one in wanted if one not in frame.columns]
        if absent:
            raise RecordError(f"the table has no column {absent[0]!r}; it has {', '.join(map(str, frame.columns))}.")
        keys = [*by]
        if group is not None:
            compare.checked(group, GROUPS, "group")
            frame = frame.merge(self.groups()[["run", "example", group]], on=["run", "example"], how="left")
            keys = [group, *keys]
        # A pair of runs has no name of its own, and its runs stand in other pairs, too.
        paired = "other_run" in frame.columns
        units = ["run", "other_run"] if paired else ["run"]
        rows = []
        for place, part in frame.groupby(keys, sort=True, dropna=False):
            table = part.pivot_table(index=units, columns="example", values=value, aggfunc="mean", dropna=False)
            table = table.dropna(how="all")
            pairs = _numbered([*table.index]) if paired else None
            found = bootstrap.interval(table.to_numpy(), level, draws, seed, pairs)
            rows.append(dict(zip(keys, place, strict=True)) | vars(found))
        return pandas.DataFrame(rows, columns=[*keys, "mean", "low", "high", "runs", "examples", "over"])

    def save_ladder(self, path: str | os.PathLike[str], by: str = "layer", **options: Any) -> Path:
        """Saves the correlations of all methods, by layer or over the training, with bands over runs and examples.

        Args:
            path: ends in ``.svg`` or ``.png``.
            by: ``"layer"``, at the last step that all runs have; or ``"training"``, at the last layer.
            **options: ``methods``, ``title``, ``dpi``.

        Returns:
            The path.
        """
        from globenc_lightning.report import study_figures

        return study_figures.save_ladder(self, path, by, **options)

    def save_drift(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Saves drift over the training beside its chance level; options as for :meth:`drift`, ``title``, ``dpi``."""
        from globenc_lightning.report import study_figures

        return study_figures.save_drift(self, path, **options)

    def save_agreement(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Saves agreement over the training; options as for :meth:`agreement`, ``title``, ``dpi``."""
        from globenc_lightning.report import study_figures

        return study_figures.save_agreement(self, path, **options)

    def save_mass(self, path: str | os.PathLike[str], tokens: str | Sequence[str], **options: Any) -> Path:
        """Saves the share of a set of tokens over the training; options ``methods``, ``layer``, ``title``, ``dpi``."""
        from globenc_lightning.report import study_figures

        return study_figures.save_mass(self, path, tokens, **options)

    @property
    def recorded_methods(self) -> list[str]:
        """The methods whose attributions all runs have recorded."""
        return frames.methods_of(self._runs, recorded=True)

    @property
    def recorded_layers(self) -> list[int]:
        """The layers, from 1, whose attributions all runs have recorded."""
        return frames.layers_of(self._runs, recorded=True)

    def _layers(self) -> list[int]:
        return frames.layers_of(self._runs)

    def _recorded(self, methods: Names, layers: Numbers) -> tuple[list[str], list[int]]:
        """The methods and layers whose attributions are read."""
        chosen = frames.chosen(methods, self.recorded_methods, "method")
        return chosen, frames.chosen(layers, self.recorded_layers, "layer")


def _numbered(pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Pairs of names as pairs of numbers."""
    names = {name: number for number, name in enumerate(sorted({one for pair in pairs for one in pair}))}
    return [(names[left], names[right]) for left, right in pairs]
