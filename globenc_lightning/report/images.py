"""Which pictures are drawn of a measurement, and what is written on them.

Axes: ``l`` layer, ``q`` token that receives, ``k`` token that is attended to.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.analysis import TARGETS, Attributions, Settings
from globenc_lightning.measurement import About, HistoryEntry, Measurement, class_of
from globenc_lightning.probe import ProbeSet
from globenc_lightning.report.canvas import Picture
from globenc_lightning.report.curves import correlation_by_layer, correlation_over_training, mean_and_interval
from globenc_lightning.report.filmstrip import filmstrip
from globenc_lightning.report.heatmap import layers_by_tokens, tokens_by_tokens

TAG = "globenc"
EXTENSION = {"post-LN": "", "pre-LN": " (pre-LN, an extension of the paper)"}
READOUT_NAMES = {
    "cls": "first token's row",
    "last": "last token's row",
    "mean": "mean of all rows",
    "token": "row of the token that is decided",
    "weighted": "rows weighted by what the decision reads",
}


def pictures(
    measurement: Measurement,
    probe: ProbeSet,
    history: Sequence[HistoryEntry],
    missing_steps: Sequence[int],
    settings: Settings,
) -> dict[str, Picture]:
    """Draw what one validation found.

    Args:
        measurement: the newest figures.
        probe: the examples, with their tokens.
        history: all analysed validations, the newest last.
        missing_steps: steps of validations whose analysis failed.
        settings: what was computed.

    Returns:
        Tag -> picture. Attributions are drawn for N-Enc, or the last of the chosen methods.
    """
    method = drawn_method(settings)
    step = history[-1].step
    drawn: dict[str, Picture] = {}
    for example, last in measurement.last.items():
        tokens = measurement.names[example]
        rho = float(measurement.correlation[method][example, -1])
        label = class_of(probe.rows[example])
        facts = (
            f"step {step}, predicted class {int(measurement.predicted[example])}"
            f"{'' if label is None else f' (label {label})'}, "
            f"ρ with saliency {'undefined' if rho != rho else f'{rho:.2f}'}"
        )
        how = f"{method}{EXTENSION[measurement.rule]}, {rollout_name(settings)}"
        drawn[f"{TAG}/heatmap/layers/example_{example:02d}"] = layers_by_tokens(
            measurement.rows[example][method].numpy(),
            tokens,
            title=f"Example {example}: what each layer's readout is made of",
            subtitle=f"{how}, {READOUT_NAMES[measurement.readout]}; {facts}",
        )
        drawn[f"{TAG}/heatmap/last_layer/example_{example:02d}"] = tokens_by_tokens(
            last[method].numpy(),
            tokens,
            title=f"Example {example}: all tokens at the last layer",
            subtitle=f"{how}; {facts}",
        )
        rows, steps = timeline(history, missing_steps, method, example)
        drawn[f"{TAG}/filmstrip/example_{example:02d}"] = filmstrip(
            rows,
            tokens,
            steps,
            title=f"Example {example}: the last layer's readout over training",
            subtitle=f"{how}, {READOUT_NAMES[measurement.readout]}",
        )
    compared = what_is_compared(settings, settings.target_name, measurement.rule, measurement.readout)
    drawn[f"{TAG}/correlation/by_layer"] = correlation_by_layer(
        {name: rho.numpy() for name, rho in measurement.correlation.items()},
        title=f"Correlation of rollout and saliency by layer, step {step}",
        subtitle=compared,
    )
    steps, means, spread = over_training(history, missing_steps)
    drawn[f"{TAG}/correlation/over_training"] = correlation_over_training(
        steps, means, spread=spread, title="Correlation of rollout and saliency over training", subtitle=compared
    )
    return drawn


def drawn_method(chosen: Settings | About) -> str:
    """The method whose attributions are drawn: GlobEnc's own, or the last of the chosen ones."""
    return "N-Enc" if "N-Enc" in chosen.methods else chosen.methods[-1]


def rollout_name(chosen: Settings | About | Attributions) -> str:
    """How the maps were aggregated, in words."""
    return "row-normalised rollout" if chosen.normalize else "unnormalised rollout"


def target_words(target: str) -> str:
    """The score that the saliency is taken of, in words; a target that is a callable goes by its name."""
    return f"{target} class" if target in TARGETS else f"target {target}"


def what_is_compared(chosen: Settings | About, target: str, rule: str, readout: str) -> str:
    """What the correlation is of, in words."""
    return (
        f"{rollout_name(chosen)}{EXTENSION[rule]}, {READOUT_NAMES[readout]}; "
        f"saliency: L2 gradient × input of the {target_words(target)}"
    )


def timeline(
    history: Sequence[HistoryEntry], missing_steps: Sequence[int], method: str, example: int
) -> tuple[NDArray[np.float64], list[int]]:
    """One row per validation, (n, k), and their steps; a failed one is a row of NaN.

    Args:
        history: the analysed validations of one training, at least one.
        missing_steps: steps of those that failed.
        method: one of the methods.
        example: the example's number.

    Returns:
        The readout rows of the last layer, and the steps.
    """
    validations = moments(history, missing_steps)
    rows = [None if entry is None else entry.rows[method][example].double().numpy() for _, entry in validations]
    nothing = np.full_like(history[-1].rows[method][example].double().numpy(), np.nan)
    return np.stack([nothing if row is None else row for row in rows]), [step for step, _ in validations]


def moments(history: Sequence[HistoryEntry], missing_steps: Sequence[int]) -> list[tuple[int, HistoryEntry | None]]:
    """All validations in their order; two may share a step (before the first one, and within an accumulation)."""
    failed: list[tuple[int, HistoryEntry | None]] = [(step, None) for step in missing_steps]
    return sorted([*((entry.step, entry) for entry in history), *failed], key=lambda moment: moment[0])


def over_training(
    history: Sequence[HistoryEntry], missing_steps: Sequence[int]
) -> tuple[list[int], Mapping[str, NDArray[np.float64]], Mapping[str, NDArray[np.float64]]]:
    """The steps, and by method the last layer's mean rho and half its confidence interval; NaN where one failed."""
    validations = moments(history, missing_steps)
    means, spread = {}, {}
    for method in history[-1].correlation:
        found = [
            None if entry is None else mean_and_interval(entry.by_example[method][:, -1:].numpy())
            for _, entry in validations
        ]
        means[method] = np.array([np.nan if one is None else one[0][0] for one in found])
        spread[method] = np.array([np.nan if one is None else one[1][0] for one in found])
    return [step for step, _ in validations], means, spread
