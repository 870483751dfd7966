"""What a run's text says of references, signed scores and faithfulness; nothing where nobody asked for them."""

from __future__ import annotations

from collections.abc import Callable

from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.measurement import About

_HTA = (
    "hidden token attribution (Brunner et al. 2020): size of the Jacobian of the row that is read with respect to each "
    "token’s first hidden state"
)
REFERENCES = {
    "integrated gradients": (
        "integrated gradients of {target} (Sundararajan et al. 2017): gradient × difference, averaged on the way from "
        "the mean of the sentence’s first hidden states to these"
    ),
    "HTA": f"{_HTA}, projected into random directions",
    "exact HTA": _HTA,
}
"""Each further reference, in words."""


def choices(
    about: About, target: str, as_code: Callable[[str], str], faithfulness: Faithfulness | None = None
) -> list[tuple[str, str]]:
    """Returns the rows of the table of choices.

    Args:
        about: what the figures are of.
        target: the score that is explained, in words.
        as_code: writes a name as code.
        faithfulness: the newest figures of masked copies, or None where there are none yet.
    """
    rows = [
        (f"compared with {reference}, too", REFERENCES.get(reference, reference).format(target=target))
        for reference in about.references
        if reference != "saliency"
    ]
    if about.signed:
        rows.append(
            (
                "signed scores",
                f"what each token contributes to {target}: DecompX (Modarressi et al. 2023) without biases. Left out "
                "is the score less their sum",
            )
        )
    if about.faithfulness:
        rows.append(("faithfulness", _faithfulness(about, as_code, faithfulness)))
    return rows


def _faithfulness(about: About, as_code: Callable[[str], str], found: Faithfulness | None) -> str:
    share = "first tokens" if found is None else f"first {found.share * 100:.0f} % of the tokens"
    score = "score" if found is not None and found.unit == "value" else "probability of what is decided"
    cost = "" if found is None or not found.passes else f" It takes {found.passes} forward passes beside the analysis."
    return (
        f"of {', '.join(map(as_code, about.faithfulness))}: how much more the {score} falls when a method’s {share} "
        "are masked than when as many random tokens are, as a share of how much it falls when all are "
        "(comprehensiveness, DeYoung et al. 2020, over random). 0 is no better than random, 1 is all that there is to "
        "lose. Special tokens are never masked; an example’s random tokens are the same at every step; examples are "
        f"left out whose score hardly falls, or rises, when all tokens are masked.{cost}"
    )
