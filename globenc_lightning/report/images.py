"""Which pictures are drawn of a measurement, and what is written on them.

Axes: ``l`` layer, ``q`` token that receives, ``k`` token that is attended to.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.attributions import Attributions
from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.measurement import About, HistoryEntry, Measurement, score_in_words
from globenc_lightning.probe import ProbeSet
from globenc_lightning.report import further_pictures
from globenc_lightning.report.averages import mean_and_interval
from globenc_lightning.report.canvas import Picture
from globenc_lightning.report.curves import correlation_by_layer, correlation_over_training
from globenc_lightning.report.filmstrip import filmstrip
from globenc_lightning.report.heatmap import layers_by_tokens, tokens_by_tokens
from globenc_lightning.report.texts import texts_of
from globenc_lightning.report.verdicts import MARKS, marked, verdicts
from globenc_lightning.settings import Settings

TAG = "globenc"
EXTENSION = {
    "post-LN": "",
    **{rule: f" ({rule}, an extension of the paper)" for rule in ("pre-LN", "sublayer-norm", "parallel")},
}
READOUT_NAMES = {
    "cls": "first token's row",
    "last": "last token's row",
    "mean": "mean of all rows",
    "token": "row of the token that is decided",
    "weighted": "rows weighted by what the decision reads",
}

REFERENCE_WORDS = {
    "saliency": "saliency: L2 gradient × input of {target}",
    "integrated gradients": "integrated gradients of {target}",
    **{
        name: name + ": how far the row that is read depends on each token’s first hidden state (size of the Jacobian)"
        for name in ("HTA", "exact HTA")
    },
}
"""Each reference, in words."""
SIGNED_OF = "signed contributions to {score}, with attention, norms and the activations’ slopes held fixed"


def pictures(
    measurement: Measurement,
    probe: ProbeSet,
    history: Sequence[HistoryEntry],
    missing_steps: Sequence[int],
    settings: Settings,
    class_names: Sequence[str] | None = None,
) -> dict[str, Picture]:
    """Draw what one validation found.

    Args:
        measurement: the newest figures.
        probe: the examples, with their tokens.
        history: all analysed validations, the newest last.
        missing_steps: steps of validations whose analysis failed.
        settings: what was computed.
        class_names: the model's names of its classes, or None.

    Returns:
        Tag -> picture. Attributions are drawn for N-Enc, or the last of the chosen methods.
    """
    method = drawn_method(settings)
    step = history[-1].step
    validations = moments(history, missing_steps)
    score = score_in_words(measurement.task, settings.target_name, measurement.distance)
    explained = target_words(settings.target_name, score)
    drawn: dict[str, Picture] = {}
    # Of a large probe, few are drawn.
    named = measurement.first(1 + max(measurement.last, default=0))
    decided = verdicts(named, probe, class_names)
    shown_text = texts_of(named, probe).shown
    mark_label = MARKS.get(measurement.task, "")
    for example, last in measurement.last.items():
        tokens = measurement.names[example]
        rho = float(measurement.correlation[method][example, -1])
        facts = f"step {step}; {decided[example]}; ρ with saliency {'undefined' if rho != rho else f'{rho:.2f}'}"
        how = f"{method}{EXTENSION[measurement.rule]}, {rollout_name(settings)}"
        read = READOUT_NAMES[measurement.readout] + (f", {shown_text}" if shown_text else "")
        drawn[f"{TAG}/heatmap/layers/example_{example:02d}"] = layers_by_tokens(
            measurement.rows[example][method].numpy(),
            tokens,
            title=f"Example {example}: what each layer's readout is made of",
            subtitle=f"{how}, {read}; {facts}",
            marked=decided[example].marked,
            mark_label=mark_label,
        )
        if method in last:
            # Flows go from one token alone.
            drawn[f"{TAG}/heatmap/last_layer/example_{example:02d}"] = tokens_by_tokens(
                last[method].numpy(),
                tokens,
                title=f"Example {example}: all tokens at the last layer",
                subtitle=f"{how}{f', {shown_text}' if shown_text else ''}; {facts}",
                marked=decided[example].marked,
                mark_label=mark_label,
            )
        rows, steps = timeline(history, missing_steps, method, example)
        others, places = told_apart(history, missing_steps, measurement.task, example)
        drawn[f"{TAG}/filmstrip/example_{example:02d}"] = filmstrip(
            rows,
            tokens,
            steps,
            title=f"Example {example}: the last layer's readout over training",
            subtitle=f"{how}, {read}",
            marked=places,
            mark_label=mark_label,
            others=others,
        )
        told = f"{SIGNED_OF.format(score=explained)}{f'; {shown_text}' if shown_text else ''}"
        of_signed = further_pictures.of_signed(validations, example, tokens, others, told)
        drawn |= {f"{TAG}/{tag}": picture for tag, picture in of_signed.items()}
    besides = f"; {shown_text}" if shown_text else ""

    def with_reference(reference: str = "saliency") -> str:
        return what_is_compared(settings, explained, measurement, reference) + besides

    compared, put_together = with_reference(), aggregate_name(settings)
    drawn[f"{TAG}/correlation/by_layer"] = correlation_by_layer(
        {name: rho.numpy() for name, rho in measurement.correlation.items()},
        title=f"Correlation of {put_together} and saliency by layer, step {step}",
        subtitle=compared,
    )
    steps, means, spread = over_training(history, missing_steps)
    drawn[f"{TAG}/correlation/over_training"] = correlation_over_training(
        steps,
        means,
        spread=spread,
        title=f"Correlation of {put_together} and saliency over training",
        subtitle=compared,
    )
    further = further_pictures.of_references(history[-1], validations, with_reference, put_together)
    if measurement.faithfulness is not None:
        further |= further_pictures.of_faithfulness(validations, what_is_masked(measurement.faithfulness, besides))
    return drawn | {f"{TAG}/{tag}": picture for tag, picture in further.items()}


def drawn_method(chosen: Settings | About) -> str:
    """The method whose attributions are drawn: GlobEnc's own, or the last of the chosen ones."""
    return "N-Enc" if "N-Enc" in chosen.methods else chosen.methods[-1]


def rollout_name(chosen: Settings | About | Attributions) -> str:
    """How the maps were aggregated, in words."""
    return f"{'row-normalised' if chosen.normalize else 'unnormalised'} {aggregate_name(chosen)}"


def aggregate_name(chosen: Settings | About | Attributions) -> str:
    """What aggregates the maps, in a word or two."""
    return "attention flow" if chosen.aggregation == "maxflow" else "rollout"


def what_is_masked(found: Faithfulness, besides: str = "") -> str:
    """What was masked to measure faithfulness, in words."""
    of = "score" if found.unit == "value" else "probability of what is decided"
    return (
        f"{of}; masked: the {found.share * 100:.0f} % of the tokens that the last layer’s readout row ranks first, "
        f"special tokens never{besides}"
    )


def target_words(target: str, score: str = "") -> str:
    """The score that the saliency is taken of, in words; a target that is a callable goes by its name.

    Args:
        target: the name of the target.
        score: the score that it is for the kind of decision, in words; empty in what earlier versions kept.
    """
    if target == "predicted":
        return the(score) if score else "the predicted class"
    return "the logit of the label" if target == "label" else f"the target {target}"


def the(score: str) -> str:
    """A score with its article."""
    return score if score.startswith("the ") else f"the {score}"


def what_is_compared(
    chosen: Settings | About, target: str, read: Measurement | About, reference: str = "saliency"
) -> str:
    """What the correlation is of, in words.

    Args:
        chosen: how the maps were aggregated.
        target: the score that the saliency is taken of, in words.
        read: the rule, and which row was read.
        reference: what it is with.
    """
    return (
        f"{rollout_name(chosen)}{EXTENSION[read.rule]}, {READOUT_NAMES[read.readout]}; "
        f"{REFERENCE_WORDS.get(reference, reference).format(target=target)}"
    )


def timeline(
    history: Sequence[HistoryEntry], missing_steps: Sequence[int], method: str, example: int
) -> tuple[NDArray[np.float64], list[int]]:
    """One row per validation, (n, k), and their steps; one that failed, or shows a longer or shorter text, is NaN.

    Args:
        history: the analysed validations of one training, at least one.
        missing_steps: steps of those that failed.
        method: one of the methods.
        example: the example's number.

    Returns:
        The readout rows of the last layer, and the steps.
    """
    validations = moments(history, missing_steps)
    rows = [None if entry is None else entry.row(method, example).double().numpy() for _, entry in validations]
    nothing = np.full_like(history[-1].row(method, example).double().numpy(), np.nan)
    kept = [nothing if row is None or row.shape != nothing.shape else row for row in rows]
    return np.stack(kept), [step for step, _ in validations]


def told_apart(
    history: Sequence[HistoryEntry], missing_steps: Sequence[int], task: str, example: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Which of a timeline's rows are of another text than the newest, and which tokens each row decides about.

    Args:
        history: the analysed validations of one training.
        missing_steps: steps of those that failed.
        task: the kind of decision.
        example: the example's number.

    Returns:
        The rows of other texts (another choice of several, say), and one sequence of places per row.
    """
    others, places = [], []
    newest = history[-1]
    count = newest.length(example)
    for row, (_, entry) in enumerate(moments(history, missing_steps)):
        decided: tuple[int, ...] = ()
        if entry is not None:
            # Earlier versions kept neither texts nor answers.
            length = entry.length(example)
            same = not entry.texts or not newest.texts or entry.texts[example] == newest.texts[example]
            if length != count or not same:
                others.append(row)
            else:
                answer = entry.answers[example] if entry.answers else ()
                decided = marked(task, answer, entry.position[example] if entry.position else None, length)
        places.append(decided)
    return others, places


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
        found = [[] if entry is None else entry.by_example[method][:, -1].tolist() for _, entry in validations]
        # (b, n): one column per validation, all averaged at once.
        values = np.array(list(zip_longest(*found, fillvalue=np.nan)), dtype=np.float64)
        means[method], spread[method], _, _ = mean_and_interval(values.reshape(-1, len(found)))
    return [step for step, _ in validations], means, spread
