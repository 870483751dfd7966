"""The matrix of ``python -m tests.neutrality``, and that it can tell a difference."""

import random
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from globenc_lightning import GlobEncCallback
from tests.neutrality import COLUMNS, SETTINGS, Setting, compare, equal


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_with_us_is_the_same_to_the_last_bit(name: str) -> None:
    if SETTINGS[name].impossible():
        pytest.skip(SETTINGS[name].impossible())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    same, analysed = compare(SETTINGS[name])
    torch.set_num_threads(threads)
    assert same == dict.fromkeys(COLUMNS, True)
    assert analysed >= SETTINGS[name].analysed


class Disturbs(GlobEncCallback):
    """Does one thing to the training at every validation."""

    def __init__(self, what: str) -> None:
        super().__init__(heatmap_examples=0)
        self.what = what

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        parameter: Any = next(pl_module.parameters())
        with torch.no_grad():
            if self.what == "torch":
                torch.rand(())
            elif self.what == "numpy":
                np.random.rand()
            elif self.what == "python":
                random.random()
            elif self.what == "parameters":
                parameter.mul_(1 + 1e-6)
            elif self.what == "gradients":
                parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad * 2
            elif self.what == "requires_grad":
                parameter.requires_grad_(False)


@pytest.mark.parametrize("what", ["torch", "numpy", "python", "parameters", "gradients", "requires_grad"])
def test_the_comparison_sees_every_kind_of_disturbance(what: str) -> None:
    same, _ = compare(Setting(options={"accumulate_grad_batches": 3, "val_check_interval": 1}), lambda: Disturbs(what))
    assert not all(same.values())


def test_equal_is_about_bits() -> None:
    assert equal([torch.tensor([float("nan")])], [torch.tensor([float("nan")])])
    assert not equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not equal(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))
    assert not equal({"a": 1}, {"a": 1, "b": 2})
