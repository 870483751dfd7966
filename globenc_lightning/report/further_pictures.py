"""Which pictures are drawn of what was asked for besides: references, signed scores, faithfulness; else none."""

from collections.abc import Callable, Collection, Sequence

from globenc_lightning.measurement import HistoryEntry
from globenc_lightning.report import curves, further_curves, signed
from globenc_lightning.report.canvas import Picture
from globenc_lightning.report.further_curves import Moments
from globenc_lightning.spelling import hyphenated

NAMES = {
    "gain": "over_training",
    "sufficiency_gain": "sufficiency_over_training",
    "log_odds": "log_odds_over_training",
}
"""Figure of faithfulness -> the end of its picture's tag."""


def of_references(
    newest: HistoryEntry, moments: Moments, compared: Callable[[str], str], aggregate: str
) -> dict[str, Picture]:
    """Draw the correlations with each further reference: below ``correlation/<reference>/``.

    Args:
        newest: the newest validation.
        moments: all of them.
        compared: says what is compared with a reference, in words.
        aggregate: what puts the layers' maps together, in a word.

    Returns:
        Tag, without what all of them begin with -> picture.
    """
    drawn: dict[str, Picture] = {}
    for reference, by_method in newest.reference_rho.items():
        methods, below = [*by_method], f"correlation/{hyphenated(reference)}"
        told = compared(reference)
        drawn[f"{below}/by_layer"] = curves.picture(
            further_curves.correlation_by_layer(newest, reference, methods),
            f"Correlation of {aggregate} and {reference} by layer, step {newest.step}",
            told,
        )
        drawn[f"{below}/over_training"] = curves.picture(
            further_curves.correlation_over_training(moments, reference, methods),
            f"Correlation of {aggregate} and {reference} over training",
            told,
        )
    return drawn


def of_faithfulness(moments: Moments, told: str) -> dict[str, Picture]:
    """Draw what masking the methods' first tokens costs over the training, if it was measured at the newest moment.

    Args:
        moments: the validations.
        told: what was masked, in words.

    Returns:
        Tag, without what all of them begin with -> picture.
    """
    newest = moments[-1][1] if moments else None
    if newest is None or newest.faithfulness is None:
        return {}
    drawn = {}
    for figure, name in NAMES.items():
        methods = [*getattr(newest.faithfulness, figure)]
        if methods:
            shown = further_curves.faithfulness_over_training(moments, figure, methods)
            drawn[f"faithfulness/{name}"] = curves.picture(shown, further_curves.HEADINGS[figure], told)
    return drawn


def of_signed(
    moments: Moments, example: int, tokens: Sequence[str], others: Collection[int], told: str
) -> dict[str, Picture]:
    """Draw an example's signed contributions over the training: ``signed/example_<NN>``.

    Args:
        moments: the validations.
        example: the example's number.
        tokens: its tokens.
        others: the validations that another text was shown of.
        told: what the score is, in words.
    """
    found = signed.timeline(moments, example)
    if found is None or not len(tokens) or found.rows.shape[1] != len(tokens):
        return {}
    title = signed.TITLE.format(example=example)
    picture = signed.contributions(found, tokens, title=title, subtitle=told, others=others)
    return {f"signed/example_{example:02d}": picture}
