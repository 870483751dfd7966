"""A whole training with the callback on another device."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from globenc_lightning import METHODS, GlobEncCallback, measuring
from tests import training
from tests.device.python_device import Counts, DeviceTensor, counted
from tests.device.test_counts import MOST_LOOKS
from tests.device.test_figures import tensors_in


class OnDevice(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pydev"


def options(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {}
    return {"accelerator": "auto", "strategy": SingleDeviceStrategy(device=device, accelerator=OnDevice())}


def module_of(kind: str) -> pl.LightningModule:
    torch.manual_seed(3)
    if kind == "tuples":
        return training.TakesTuples(training.redrawn(training.classifier()))
    return training.Steps(training.redrawn(training.classifier(kind)))


def loaders(kind: str) -> tuple[Any, Any]:
    extra = {"collate_fn": training.as_tuples} if kind == "tuples" else {}
    sentences = (training.Sentences(16, seed=1), training.Sentences())
    return tuple(training.loader(one, **extra) for one in sentences)  # type: ignore[return-value]


def trained(kind: str, device: torch.device, callback: GlobEncCallback | None, **more: Any) -> pl.Trainer:
    train, val = loaders(kind)
    callbacks = [] if callback is None else [callback]
    return training.fit(
        module_of(kind), *callbacks, *more.pop("callbacks", ()), train=train, val=val, **options(device), **more
    )


@pytest.mark.parametrize("kind", ["bert", "albert", "tuples"])
def test_a_training(kind: str, device: torch.device, tmp_path: Path) -> None:
    callbacks = {}
    for place in (torch.device("cpu"), device):
        folder = tmp_path / place.type
        callback = callbacks[place.type] = GlobEncCallback(methods=METHODS, record=True)
        saving = ModelCheckpoint(folder, save_last=True)
        logger = TensorBoardLogger(folder, name="run")
        trained(kind, place, callback, max_epochs=2, logger=logger, enable_checkpointing=True, callbacks=[saving])
    here, there = callbacks["cpu"].history, callbacks[device.type].history
    assert len(here) == len(there) >= 2
    for one, other in zip(here, there, strict=True):
        assert (one.step, one.answers) == (other.step, other.answers)
        for method in METHODS:
            torch.testing.assert_close(one.correlation[method], other.correlation[method], rtol=0.02, atol=0.02)
            for row, same in zip(one.rows[method], other.rows[method], strict=True):
                torch.testing.assert_close(row, same, rtol=5e-3, atol=5e-4)
    assert here.about is not None
    assert here.about == there.about
    saved = torch.load(tmp_path / device.type / "last.ckpt", map_location="cpu", weights_only=False)["callbacks"]
    found = [*tensors_in(list(there)), *tensors_in(callbacks[device.type].state_dict()), *tensors_in(saved)]
    assert len(found) > 10
    assert not any(isinstance(one, DeviceTensor) for one in found)


@pytest.mark.parametrize("kind", ["bert", "tuples"])
def test_training_is_what_it_would_have_been(kind: str, device: torch.device) -> None:
    plain = trained(kind, device, None).lightning_module.state_dict()
    watched = trained(kind, device, GlobEncCallback()).lightning_module.state_dict()
    assert plain.keys() == watched.keys()
    for name, value in plain.items():
        assert torch.equal(value.cpu(), watched[name].cpu()), name


def test_a_validation_waits_for_the_device_a_few_times_per_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_analysis: list[Counts] = []
    original = measuring.measure

    def counting(*args: Any, **kwargs: Any) -> Any:
        with counted() as counts:
            found = original(*args, **kwargs)
        per_analysis.append(counts)
        return found

    monkeypatch.setattr(measuring, "measure", counting)
    for kind in ("bert", "tuples"):
        per_analysis.clear()
        callback = GlobEncCallback(methods=METHODS)
        trained(kind, device, callback, max_epochs=3)
        assert len(per_analysis) >= 3
        # Two batches of eight examples. The first two analyses also prove how the probe is divided into them.
        assert 0 < sum(per_analysis[-1].looks.values()) <= 2 * MOST_LOOKS, per_analysis[-1].looks


def test_a_copy_of_the_probe_holds_nothing_of_the_device(device: torch.device) -> None:
    callback = GlobEncCallback()
    trained("bert", device, callback)
    state = copy.deepcopy(callback.state_dict())
    assert all(type(one) is Tensor for one in tensors_in(state))
