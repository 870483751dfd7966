"""Probes that wait on resume, that do not travel, and whose batches tell the special tokens themselves."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from globenc_lightning import GlobEncCallback
from tests.test_callback import TakesOwnForm, in_form
from tests.test_checkpoints import keeps_all
from tests.training import Sentences, Steps, build_trainer, loader, said, tokenizer

QUIET: dict[str, Any] = {"heatmap_examples": 0, "methods": ["N-Enc"]}


@pytest.mark.parametrize("form", ["dataclass", "named tuple"])
def test_a_validation_that_waits_for_a_batch_is_missing_and_the_next_is_not(form: str, tmp_path: Path) -> None:
    def training(callbacks: list[pl.Callback], path: Path | None = None) -> None:
        torch.manual_seed(0)
        trainer = build_trainer(callbacks, max_epochs=3, enable_checkpointing=len(callbacks) > 1)
        loaders = {f"{name}_dataloaders": one for name, one in in_form(form).items()}
        trainer.fit(TakesOwnForm(form=form), **loaders, ckpt_path=path)

    whole = GlobEncCallback(**QUIET)
    training([whole, keeps_all(tmp_path, every_n_train_steps=2)])
    steps = [entry.step for entry in whole.history]
    waited = 0
    for path in sorted(tmp_path.glob("*.ckpt")):
        due = torch.load(path, weights_only=True)["global_step"] - 1
        resumed = GlobEncCallback(**QUIET)
        with said() as messages:
            training([resumed], path)
        if due in steps[1:]:
            waited += 1
            assert ["are of a class of their own" in message for message in messages] == [True]
            assert resumed.history.missing_steps == [due]
        assert [entry.step for entry in resumed.history] == [step for step in steps if step != due or step == 0]
        if due == steps[-1]:
            # No batch came any more.
            assert resumed.probe is None
            continue
        assert resumed.probe is not None
        assert whole.probe is not None
        assert resumed.probe.fingerprint() == whole.probe.fingerprint()
    assert waited >= 2


FORMS = ("dataclass", "named tuple")


class TakesBoth(TakesOwnForm):
    """Its two validation loaders give batches of different classes."""

    def loss_of(self, batch: Any) -> Tensor:
        self.form = FORMS[isinstance(batch, tuple)]
        return super().loss_of(batch)


def test_a_probe_of_two_loaders_whose_batches_are_of_different_classes_comes_back(tmp_path: Path) -> None:
    def training(callbacks: list[pl.Callback], path: Path | None = None) -> None:
        torch.manual_seed(0)
        trainer = build_trainer(callbacks, max_epochs=3, enable_checkpointing=len(callbacks) > 1)
        data = [in_form(form) for form in FORMS]
        trainer.fit(TakesBoth(form=FORMS[0]), data[0]["train"], [one["val"] for one in data], ckpt_path=path)

    # The first loader has twenty.
    def limited() -> GlobEncCallback:
        return GlobEncCallback(**QUIET, num_examples=24)

    whole = limited()
    training([whole, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)])
    assert whole.probe is not None
    assert {part.loader for part in whole.probe.parts} == {0, 1}
    resumed = limited()
    with said() as messages:
        training([resumed], tmp_path / "epoch=1.ckpt")
    assert messages == []
    assert [entry.step for entry in resumed.history] == [entry.step for entry in whole.history]
    assert resumed.probe is not None
    assert resumed.probe.fingerprint() == whole.probe.fingerprint()
    for one, other in zip(resumed.probe.parts, whole.probe.parts, strict=True):
        assert type(one.batch) is type(other.batch)


class Marked(Steps):
    """Its batches carry something that no checkpoint holds."""

    def loss_of(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
        return loss


def with_entry(make: Callable[[], Any]) -> Callable[[Sequence[Any]], Any]:
    def collate(rows: Sequence[Any]) -> Any:
        return {**dict(torch.utils.data.default_collate(list(rows))), "about": make()}

    return collate


@pytest.mark.parametrize("make", [lambda: {"a set"}, object, lambda: 1j, lambda: b"bytes"])
def test_a_probe_that_does_not_travel_is_told_and_another_one_taken(make: Callable[[], Any], tmp_path: Path) -> None:
    def training(callback: GlobEncCallback, epochs: int, path: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        module = Marked()
        collate = with_entry(make)
        trainer = build_trainer(
            [callback, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)],
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        trainer.fit(
            module,
            loader(Sentences(16, seed=1), collate_fn=collate),
            loader(Sentences(), collate_fn=collate),
            ckpt_path=path,
        )
        return module.state_dict()

    with said() as messages:
        training(GlobEncCallback(**QUIET), 1)
    assert ["the probe does not travel in checkpoints" in message for message in messages] == [True]
    resumed = GlobEncCallback(**QUIET)
    with said() as messages:
        training(resumed, 2, tmp_path / "epoch=0.ckpt")
    assert all("the probe does not travel in checkpoints" in message for message in messages)
    assert len(resumed.history) == 3
    assert resumed.probe is not None


class Special(Steps):
    """Its batches tell the special tokens."""

    def loss_of(self, batch: Any) -> Tensor:
        rest = {key: value for key, value in batch.items() if key != "special_tokens_mask"}
        loss: Tensor = self.model(**rest).loss
        return loss


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("size", [16, 5])
def test_the_batches_own_special_tokens_are_left_out(size: int, padding: int) -> None:
    specials = torch.tensor(tokenizer().all_special_ids)

    def collate(rows: Sequence[Any]) -> Any:
        batch = dict(torch.utils.data.default_collate(list(rows)))
        for key in ("input_ids", "attention_mask"):
            batch[key] = torch.nn.functional.pad(batch[key], (0, padding))
        return {**batch, "special_tokens_mask": torch.isin(batch["input_ids"], specials).long()}

    def trained(**arguments: Any) -> GlobEncCallback:
        torch.manual_seed(0)
        callback = GlobEncCallback(**QUIET, exclude_special_tokens=True, on_error="raise", **arguments)
        trainer = build_trainer([callback], max_epochs=1)
        trainer.fit(
            Special(), loader(Sentences(16, seed=1), collate_fn=collate), loader(Sentences(), size, collate_fn=collate)
        )
        return callback

    own, named = trained(), trained(tokenizer=tokenizer())
    assert own.probe is not None
    assert not own.probe.is_named
    for mine, theirs in zip(own.history, named.history, strict=True):
        assert torch.equal(mine.by_example["N-Enc"], theirs.by_example["N-Enc"])
        assert bool(torch.isfinite(mine.by_example["N-Enc"]).all())
