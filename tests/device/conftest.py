"""The tests of this folder need a device that is registered before the process's first backward pass.

So they run in a process of their own: ``tests/test_another_device.py`` starts it, and names the files.
"""

import os
from collections.abc import Iterator

import pytest
import torch

OWN_PROCESS = "GLOBENC_PYTHON_DEVICE"

if os.environ.get(OWN_PROCESS):
    from tests.device.python_device import register

    register()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    from globenc_lightning.encoder import layers
    from tests.device.python_device import DeviceTensor, python_device

    # On a real device a weight is a plain parameter.
    monkeypatch.setattr(layers, "PLAIN", (*layers.PLAIN, DeviceTensor))
    with python_device() as place:
        yield place
