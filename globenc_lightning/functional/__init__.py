"""The maths of GlobEnc: tensors in, tensors out; no model, no Trainer, no files."""

from globenc_lightning.functional.attribution import METHODS, FrozenNorm, gram_kernel, local_maps, padding_of
from globenc_lightning.functional.correlation import CorrelationSummary, spearman, summarize
from globenc_lightning.functional.rollout import (
    READOUTS,
    normalize_rows,
    readout_place,
    readout_row,
    rollout,
    rollout_step,
)
from globenc_lightning.functional.saliency import gradient_x_input

__all__ = [
    "METHODS",
    "READOUTS",
    "CorrelationSummary",
    "FrozenNorm",
    "gradient_x_input",
    "gram_kernel",
    "local_maps",
    "normalize_rows",
    "padding_of",
    "readout_place",
    "readout_row",
    "rollout",
    "rollout_step",
    "spearman",
    "summarize",
]
