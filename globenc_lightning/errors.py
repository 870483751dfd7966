"""What can go wrong in an analysis, in words that say what to write instead."""

import sys
import sysconfig
import warnings
from pathlib import PurePath
from types import FrameType

import torch

NOT_ENOUGH_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory did not suffice; on the CPU, torch raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NOT_ENOUGH_MEMORY)


class GlobEncError(RuntimeError):
    """An analysis that cannot be done; the message says why and what would help."""


class UnsupportedEncoderError(GlobEncError):
    """The encoder was not read, or what was read did not reproduce the model's own activations."""


class ModelCallError(GlobEncError):
    """The model could not be called on the probe, or what it gave holds no logits."""


class CollectiveError(ModelCallError):
    """A step of one process waits for the others, and may not be run in an analysis."""


class CutGraphError(ModelCallError):
    """The autograd graph does not lead from the score to the encoder's hidden states."""


class MaskingError(ModelCallError):
    """Tokens cannot be masked where the encoder is called."""


class NonFiniteError(GlobEncError):
    """The model's own activations hold NaN or infinity: there is nothing to attribute."""


class ProbeError(GlobEncError, ValueError):
    """The probe set, or what it was to be made of, cannot be used."""


class EmptyProbeError(ProbeError):
    """There is no example with a real token."""


class RecordError(GlobEncError):
    """A record on disk that cannot be written or read."""


class OutOfMemoryError(GlobEncError):
    """The memory does not suffice, however small the batches."""


class GlobEncWarning(UserWarning):
    """Something about an analysis that a user should know, and that stops nothing."""


LIBRARIES = ("globenc_lightning", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torch")
"""Packages whose lines a warning of ours does not point to."""


def warn(message: str) -> None:
    """Warn, and point to the user's own line: the one that called the Trainer, or us."""
    frame, level = sys._getframe(1), 2
    while _is_of_a_library(frame):
        if frame.f_back is None:
            # A process that a library started.
            level = 2
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GlobEncWarning, stacklevel=level)


def _is_of_a_library(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if package in LIBRARIES:
        return True
    # What stands between: contextlib, functools.
    file = PurePath(frame.f_code.co_filename)
    return package in sys.stdlib_module_names and file.is_relative_to(sysconfig.get_path("stdlib"))
