"""What somebody who reads the figures of a measurement has to know, in words."""

from collections.abc import Iterator

from globenc_lightning.measurement import Measurement
from globenc_lightning.settings import Settings

_BUILT = {
    "pre-LN": "normalises before its sub-layers (pre-LN)",
    "sublayer-norm": "normalises what its sub-layers give before it is added to the residual stream (sublayer-norm)",
    "parallel": "adds attention and feed-forward network to the same input (parallel)",
}


def remarks(measurement: Measurement, settings: Settings, encoder_call: int = 0) -> Iterator[tuple[str, str | None]]:
    """Everything that is special about a measurement.

    Args:
        measurement: the figures.
        settings: what was computed.
        encoder_call: which call of an encoder is shown.

    Yields:
        A text, and a name for its kind where texts of one kind differ by their numbers.
    """
    for method, summary in measurement.summary().items():
        undefined = int(summary.undefined[-1])
        if undefined:
            yield (
                f"GlobEncCallback: {undefined} of {len(measurement.predicted)} probe examples have no rank "
                f"correlation with {method} (a single token, or the same value everywhere); they are left out of "
                "its mean.",
                "undefined",
            )
            break
    if measurement.rule in _BUILT:
        yield (
            f"GlobEncCallback: {measurement.encoder} {_BUILT[measurement.rule]}. The paper treats "
            "post-LN encoders alone; the figures follow an extension of it.",
            None,
        )
    if settings.readout == "cls" and measurement.readout == "last":
        yield (
            f"GlobEncCallback: in {measurement.encoder} no token sees what comes after it, so the first token's "
            "row tells nothing: the last token's is read (readout='last').",
            None,
        )
    if measurement.head_reads == "other tokens" and measurement.readout == "cls":
        yield (
            "GlobEncCallback: the head reads other tokens than the one whose row is compared (mean pooling, say); "
            "readout='mean' compares the mean of all rows.",
            None,
        )
    if measurement.head_reads == "elsewhere":
        yield (
            f"GlobEncCallback: the head does not read the last hidden states of {measurement.encoder}; the figures "
            "of its last layer are not those that the decision is made of.",
            None,
        )
    if measurement.calls > 1:
        yield (
            f"GlobEncCallback: the decision depends on {measurement.calls} calls of an encoder; the figures are "
            f"those of call {encoder_call} ({measurement.encoder}). To look at another, write "
            f"GlobEncCallback(encoder_call={(encoder_call + 1) % measurement.calls}).",
            None,
        )


def without_faithfulness(measurement: Measurement) -> str:
    """Returns why figures of faithfulness are missing that were asked for, and whether all are or those of some."""
    none = measurement.faithfulness is None
    return f"faithfulness= gives no figures{'' if none else ' of some examples'}: {measurement.unmasked}."
