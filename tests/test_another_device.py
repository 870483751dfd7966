"""Runs the tests of ``tests/device`` in a process of their own, see its ``conftest.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from tests.device.conftest import OWN_PROCESS

FOLDER = Path(__file__).parent / "device"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} lets Python make no device",
)
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_on_another_device(name: str) -> None:
    arguments = [str(FOLDER / name), "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env={**os.environ, OWN_PROCESS: "1"},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
