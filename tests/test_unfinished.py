import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from globenc_lightning import GlobEncCallback
from globenc_lightning.record.reading import read_run
from globenc_lightning.report.dashboard import store
from tests.interrupted_training import CASES, Case, train
from tests.neutrality import equal
from tests.test_callback import MONITORED
from tests.test_checkpoints import assert_same_history
from tests.training import events, said

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is interrupted in the middle of its work")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per case, with what its training left behind when it was interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.interrupted_training", str(folder), *CASES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-3000:]
    return folder


print(json.dumps([]), time, Iterator, Any, Case, pl, torch, GlobEncCallback, read_run, store, equal, said, events)
