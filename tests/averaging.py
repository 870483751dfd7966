"""Lightning's callbacks that average the weights, for the tests; and why there are none, where Lightning has none."""

import pytest
import pytorch_lightning as pl
from pytorch_lightning import callbacks

NO_AVERAGING = (
    "" if hasattr(callbacks, "EMAWeightAveraging") else f"pytorch-lightning {pl.__version__} averages no weights"
)
averages = pytest.mark.skipif(bool(NO_AVERAGING), reason=NO_AVERAGING)

# Tests that are skipped make none of them.
WeightAveraging = getattr(callbacks, "WeightAveraging", pl.Callback)
EMAWeightAveraging = getattr(callbacks, "EMAWeightAveraging", pl.Callback)


class EveryStep(WeightAveraging):
    """Averages the weights after every step."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None
