"""Loads the packages that a record needs and that the rest of this package does without."""

import importlib
from typing import Any

from globenc_lightning.errors import RecordError

INSTALL = "pip install 'globenc-lightning[record]'"


def load(name: str, purpose: str) -> Any:
    """Returns a package.

    Args:
        name: the package.
        purpose: what it is needed for, in words.

    Raises:
        RecordError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecordError(f"{purpose} needs {name}, which is not installed: {INSTALL}") from error


def load_pyarrow() -> Any:
    """Returns pyarrow, which reads and writes the files of a record."""
    return load("pyarrow", "a record on disk")


def load_pandas() -> Any:
    """Returns pandas, whose tables a study gives."""
    return load("pandas", "a study")
