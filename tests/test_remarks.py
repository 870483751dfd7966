"""What somebody is told of a measurement."""

from dataclasses import replace

from globenc_lightning.remarks import without_faithfulness
from tests.further import with_further
from tests.record.made import made


def test_whether_all_figures_of_faithfulness_are_missing_or_some() -> None:
    measurement, *_ = made()
    nothing = replace(measurement, unmasked="the encoder is given no token ids")
    assert without_faithfulness(nothing) == "faithfulness= gives no figures: the encoder is given no token ids."
    some = replace(with_further(measurement), unmasked="the step decides something else")
    assert without_faithfulness(some) == (
        "faithfulness= gives no figures of some examples: the step decides something else."
    )
