"""Training steps that are analysed besides the validations."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from globenc_lightning import GlobEncCallback, ProbeSet, attribute
from globenc_lightning.errors import GlobEncWarning
from tests.averaging import EMAWeightAveraging, averages
from tests.training import Memory, Sentences, Steps, fit, loader

TAG = "globenc/spearman/N-Enc"


class Weights(pl.Callback):
    """Keeps the weights after every optimizer step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.after[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


def probe() -> dict[str, Tensor]:
    return Sentences(seed=3).first(4)


def steps(callback: GlobEncCallback, validation: bool) -> list[int]:
    return [entry.step for entry in callback.history if entry.validation is validation]


def train() -> Any:
    return loader(Sentences(40, seed=1), batch_size=4)


def test_the_figures_are_those_of_the_weights_after_so_many_steps() -> None:
    callback, weights = GlobEncCallback(probe(), at_steps=[3, 7]), Weights()
    fit(Steps(), weights, callback, train=train())
    for entry in callback.history:
        if not entry.validation:
            module = Steps()
            module.load_state_dict(weights.after[entry.step])
            found = attribute(module.model, probe())
            torch.testing.assert_close(
                entry.by_example["N-Enc"], found.correlation["N-Enc"].double(), atol=1e-6, rtol=0
            )
    assert steps(callback, validation=False) == [3, 7]
    assert steps(callback, validation=True) == [0, 9]


def test_log_takes_powers_of_two_until_a_validation_has_been() -> None:
    callback = GlobEncCallback(probe(), at_steps="log")
    fit(Steps(), callback, train=train(), max_epochs=2)
    assert steps(callback, validation=False) == [1, 2, 4, 8]


def test_steps_are_those_of_the_optimizer_when_gradients_are_accumulated() -> None:
    callback = GlobEncCallback(probe(), at_steps=[1, 2, 3])
    fit(Steps(), callback, train=train(), accumulate_grad_batches=3)
    assert steps(callback, validation=False) == [1, 2, 3]


class TwoOptimizers(Steps):
    """Steps twice in each batch, by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parameters = [*self.parameters()]
        return [torch.optim.SGD(one, lr=1e-3) for one in (parameters[:-2], parameters[-2:])]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss_of(batch)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss


def test_several_optimizers_pass_no_step_by() -> None:
    callback = GlobEncCallback(probe(), at_steps=[3, 8])
    fit(TwoOptimizers(), callback, train=train())
    assert steps(callback, validation=False) == [4, 8]


def test_a_validation_at_the_same_moment_takes_the_place_of_the_step() -> None:
    callback = GlobEncCallback(probe(), at_steps=[5, 6, 10])
    fit(Steps(), callback, train=train(), val_check_interval=5)
    assert steps(callback, validation=False) == [6]
    assert steps(callback, validation=True) == [0, 4, 9]


def test_a_step_is_analysed_where_the_validation_after_it_is_not() -> None:
    callback = GlobEncCallback(probe(), at_steps=[10], every_n_validations=2)
    fit(Steps(), callback, train=train(), val_check_interval=5)
    assert steps(callback, validation=False) == [10]
    assert steps(callback, validation=True) == [0, 4]


def test_what_is_monitored_and_what_a_checkpoint_is_saved_for_are_validations() -> None:
    seen: list[tuple[int, float]] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if TAG in trainer.callback_metrics:
                seen.append((trainer.global_step, float(trainer.callback_metrics[TAG])))

    callback = GlobEncCallback(probe(), at_steps=[2, 7])
    fit(Steps(), callback, Looks(), train=train(), val_check_interval=5)
    first = next(entry for entry in callback.history if entry.step == 4)
    assert [step for step, _ in seen] == [6, 7, 8, 9, 10]
    expected = pytest.approx(float(first.correlation["N-Enc"][-1]), abs=1e-6)
    assert all(value == expected for _, value in seen)


def test_the_points_are_written_to_the_loggers_at_their_steps() -> None:
    logger, callback = Memory(), GlobEncCallback(probe(), at_steps=[3, 7])
    with pytest.warns(GlobEncWarning, match="can show no images"):
        fit(Steps(), callback, train=train(), logger=logger)
    written = dict(logger.series(TAG))
    assert written == {entry.step: pytest.approx(float(entry.correlation["N-Enc"][-1])) for entry in callback.history}
    assert sorted(written) == [0, 3, 7, 9]


@averages
def test_averaged_weights_are_looked_at_as_in_a_validation() -> None:
    def trained(*others: pl.Callback) -> GlobEncCallback:
        torch.manual_seed(0)
        callback = GlobEncCallback(probe(), at_steps=[6])
        fit(Steps(), callback, *others, train=train())
        return callback

    averaged, plain = trained(EMAWeightAveraging(decay=0.99)), trained()
    entries = [next(entry for entry in one.history if entry.step == 6) for one in (averaged, plain)]
    assert not torch.equal(entries[0].by_example["N-Enc"], entries[1].by_example["N-Enc"])
    baseline = averaged.history[0].by_example["N-Enc"]
    distances = [(entry.by_example["N-Enc"] - baseline).abs().mean() for entry in entries]
    assert distances[0] < distances[1]


def test_without_a_probe_the_reason_is_told_once_and_the_training_goes_on() -> None:
    callback = GlobEncCallback(at_steps=[2, 3])
    with pytest.warns(GlobEncWarning, match=r"at_steps= asks for figures before any validation.*num_sanity_val_steps"):
        fit(Steps(), callback, train=train(), num_sanity_val_steps=0)
    assert steps(callback, validation=False) == []
    assert steps(callback, validation=True) == [9]
    assert [step for step, text in callback.history.reasons if "at_steps" in text] != []


def test_a_step_that_cannot_be_analysed_leaves_a_gap() -> None:
    class Spoils(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            parameter = next(pl_module.parameters())
            if trainer.global_step == 3:
                self.kept = parameter.detach().clone()
                parameter.data.fill_(float("nan"))

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 3:
                next(pl_module.parameters()).data.copy_(self.kept)

    callback = GlobEncCallback(probe(), at_steps=[2, 3, 4])
    with pytest.warns(GlobEncWarning, match="NonFiniteError"):
        fit(Steps(), Spoils(), callback, train=train())
    assert steps(callback, validation=False) == [2, 4]
    assert callback.history.missing_steps == [3]


def test_a_resumed_training_goes_on_with_the_steps(tmp_path: Any) -> None:
    callback = GlobEncCallback(ProbeSet.from_batch(probe()), at_steps=[3, 12, 15])
    fit(Steps(), callback, ModelCheckpoint(tmp_path, save_last=True), train=train(), enable_checkpointing=True)
    resumed = GlobEncCallback(ProbeSet.from_batch(probe()), at_steps=[3, 12, 15])
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[resumed], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Steps(), train(), loader(Sentences()), ckpt_path=tmp_path / "last.ckpt")
    assert steps(resumed, validation=False) == [3, 12, 15]
    assert steps(resumed, validation=True) == [0, 9, 19]
