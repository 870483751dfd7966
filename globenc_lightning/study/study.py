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

    @property
    def references(self) -> list[str]:
        """Returns what all runs have correlations with, the saliency and what ``references=`` named."""
        return frames.references_of(self._runs)

    @property
    def masked_methods(self) -> list[str]:
        """Returns the methods whose faithfulness was measured in all runs."""
        return frames.masked_methods_of(self._runs)

    @property
    def aggregation(self) -> str:
        """Returns how the first run put the layers' maps together, ``"rollout"`` or ``"maxflow"``."""
        return str((self._runs[0].about.get("about") or {}).get("aggregation", "rollout"))

    @property
    def masked_share(self) -> float:
        """Returns which share of the tokens was masked to measure faithfulness; NaN where none was."""
        told = (run.record.masking(run.name).get("share") for run in self._runs)
        return next((float(one) for one in told if one is not None), float("nan"))

    def correlations(self, methods: Names = None, layers: Numbers = None, *, reference: str = frames.SALIENCY) -> Any:
        """Returns Spearman's rho with a reference: run, seed, step, epoch, example, method, layer, rho.

        Args:
            methods: one or several; all when None.
            layers: one or several, from 1; all when None.
            reference: what it is with, one of :attr:`references`.

        Raises:
            RecordError: not every run has such a method, layer or reference.
        """
        [wanted] = frames.chosen([reference], self.references, "reference")
        chosen = frames.chosen(methods, self.methods, "method")
        return frames.correlations(self._runs, chosen, frames.chosen(layers, self._layers(), "layer"), wanted)

    def faithfulness(self, methods: Names = None) -> Any:
        """Returns how much the decisions depend on a method's first tokens, beside random ones.

        Means and intervals over runs and examples: ``study.summary(study.faithfulness(), "gain")``; of two methods
        on the same examples: the difference of their columns, as they are paired.

        Args:
            methods: one or several; all whose first tokens were masked when None.

        Returns:
            A table with the columns run, seed, step, epoch, example, method, ``gain``, ``sufficiency_gain``,
            ``log_odds`` and ``span`` of :class:`~globenc_lightning.faithfulness.Faithfulness`.

        Raises:
            RecordError: faithfulness was not measured in every run, or not of such a method.
        """
        if not self.masked_methods:
            raise RecordError(
                "not every run has measured faithfulness: train with GlobEncCallback(faithfulness=True, record=...)."
            )
        return frames.faithfulness(self._runs, frames.chosen(methods, self.masked_methods, "faithfulness of"))

    def signed(self, *, special_tokens: bool = True) -> Any:
        """Returns each token's ``signed`` contribution to the score: a row per run, step, example and token.

        What an example's contributions leave out of its score is ``left_out`` in :meth:`examples`.

        Args:
            special_tokens: whether special tokens are among the rows.

        Raises:
            RecordError: not every run has signed scores.
        """
        return frames.signed(self._runs, special_tokens)

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
        the coordinate ``seed`` (run). Where all runs have them: ``rho_with`` (reference, run, step, example, method,
        layer) with further references; ``gain``, ``sufficiency_gain``, ``log_odds`` (run, step, example, method; NaN
        for methods whose tokens were not masked) and ``span`` (run, step, example); ``left_out`` (run, step, example).
        The ``sel`` of xarray has an argument ``method`` of its own: choose a method with
        ``sel({"method": "N-Enc"})``.

        Raises:
            RecordError: xarray is not installed.
        """
        xarray = load("xarray", "Study.to_xarray()")
        keys = ["run", "step", "example", "method", "layer"]
        examples = self.examples()
        of_examples = ["score", "predicted", "label", "loss", *(["left_out"] if "left_out" in examples else [])]
        decided = examples.set_index(["run", "step", "example"])[of_examples]
        found = xarray.Dataset({"rho": xarray.DataArray.from_series(self.correlations().set_index(keys)["rho"])})
        further = self.references[1:]
        if further:
            each = [self.correlations(reference=one).set_index(keys)["rho"] for one in further]
            arrays = [xarray.DataArray.from_series(one) for one in each]
            dimension = load_pandas().Index(further, name="reference")
            found["rho_with"] = xarray.concat(arrays, dimension)
        if self.masked_methods:
            masked = self.faithfulness()
            figures = masked.set_index(["run", "step", "example", "method"])[["gain", "sufficiency_gain", "log_odds"]]
            spans = masked.drop_duplicates(["run", "step", "example"]).set_index(["run", "step", "example"])["span"]
            found = found.merge(xarray.Dataset.from_dataframe(figures), join="outer")
            found["span"] = xarray.DataArray.from_series(spans)
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
        by: Sequence[str] | None = None,
        *,
        group: str | None = None,
        level: float = bootstrap.LEVEL,
        draws: int = bootstrap.DRAWS,
        seed: int = 0,
    ) -> Any:
        """Returns the mean of a figure and its interval over runs and examples; see :mod:`.bootstrap`.

        Args:
            frame: a table of this study, such as :meth:`drift` gives.
            value: the column that is averaged: ``"rho"``, ``"drift"``, ``"agreement"``, ``"mass"``, ``"gain"``.
            by: what is kept apart; method, layer and step, as far as the table has them, when None.
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
        by = [one for one in KEYS if one in frame.columns] if by is None else by
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
            **options: ``methods``, ``reference``, ``title``, ``dpi``.

        Returns:
            The path.
        """
        from globenc_lightning.report import study_figures

        return study_figures.save_ladder(self, path, by, **options)

    def save_faithfulness(self, path: str | os.PathLike[str], figure: str = "gain", **options: Any) -> Path:
        """Saves faithfulness over the training, with bands over runs and examples.

        Args:
            path: ends in ``.svg`` or ``.png``.
            figure: ``"gain"``, ``"sufficiency_gain"`` or ``"log_odds"``.
            **options: ``methods``, ``title``, ``dpi``.

        Returns:
            The path.
        """
        from globenc_lightning.report import study_figures

        return study_figures.save_faithfulness(self, path, figure, **options)

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
