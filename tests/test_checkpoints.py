import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
    Timer,
)
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.profilers import AdvancedProfiler
from pytorch_lightning.tuner import Tuner
from torch import Tensor
from torch.utils.data import Subset

from globenc_lightning import METHODS, GlobEncCallback, ProbeSet
from globenc_lightning.tokenizers import spelling_of
from tests.averaging import EMAWeightAveraging, EveryStep, averages
from tests.neutrality import equal
from tests.test_callback import MONITORED, OWN_FORMS, TakesOwnForm, assert_same, given_batch, in_form, probed_ids
from tests.training import (
    Album,
    Memory,
    Sentences,
    Snapshots,
    SpoilsOne,
    Steps,
    Stream,
    build_trainer,
    by_hand,
    classifier,
    events,
    fit,
    loader,
    said,
    tokenizer,
)
from tests.vocabulary import byte_level_tokenizer

FILMSTRIP = "globenc/filmstrip/example_00"


def same_batches() -> Any:
    """Four batches of the same rows: Lightning starts an epoch anew that it resumes in the middle."""
    return loader(Subset(Sentences(8, seed=1), [*range(8)] * 4))


def train(
    callbacks: list[pl.Callback],
    logger: Any,
    ckpt_path: Path | None = None,
    make: Callable[[Any], Steps] = Steps,
    **options: Any,
) -> tuple[pl.Trainer, Steps]:
    """Three epochs of four batches, without dropout; resumed from a checkpoint if there is one."""
    pl.seed_everything(3, verbose=False)
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    options = {"max_epochs": 3, "log_every_n_steps": 1, "logger": logger, "enable_checkpointing": saves, **options}
    trainer = build_trainer(callbacks, **options)
    module = make(classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    with warnings.catch_warnings():
        # Lightning's advice on workers, resuming and short loggers.
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, same_batches(), loader(Sentences()), ckpt_path=ckpt_path)
    return trainer, module


def keeps_all(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


def stored_state(path: Path) -> dict[str, Any]:
    """Ours, as a checkpoint gives it back to those who trust it with nothing but tensors and primitives."""
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    (state,) = (state for key, state in callbacks.items() if key.startswith("GlobEncCallback"))
    return state


def assert_same_history(left: GlobEncCallback, right: GlobEncCallback) -> None:
    assert [entry.step for entry in left.history] == [entry.step for entry in right.history]
    for one, other in zip(left.history, right.history, strict=True):
        assert equal(vars(one), vars(other)), one.step


def test_probe_survives_its_state() -> None:
    batch = {
        **given_batch(),
        "text": ["a", "b", "c", "d", "e"],
        "scores": torch.rand(5, 2).double(),
        "number": [np.float64(1.5)] * 5,
        "nested": [{"pair": (1, None)}] * 5,
        "shared": torch.arange(3),
        "flag": True,
    }
    probe = ProbeSet.from_batch(batch, tokenizer=tokenizer())
    again = ProbeSet.from_state_dict(probe.state_dict())
    assert again.tokens == probe.tokens
    assert again.by_token == probe.by_token
    assert again.padding == probe.padding
    assert_same(list(again.special), list(probe.special))
    for (indices, one), (_, two) in zip(probe.batches(), again.batches(), strict=True):
        assert indices == [0, 1, 2, 3, 4]
        two["number"], two["nested"] = one["number"], one["nested"]
        assert_same(one, two)
    assert again.fingerprint() == ProbeSet.from_state_dict(again.state_dict()).fingerprint()


def test_a_probe_of_texts_survives_its_state_in_a_file(tmp_path: Path) -> None:
    probe = ProbeSet.from_texts(["word0 word1", "word2"], tokenizer(), labels=[1, 2])
    torch.save(probe.state_dict(), tmp_path / "probe.pt")
    again = ProbeSet.from_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    assert again.texts == probe.texts
    assert again.tokens == probe.tokens
    assert_same([dict(row) for row in again.rows], [dict(row) for row in probe.rows])


def test_entries_that_no_checkpoint_can_hold_are_left_out_and_said(tmp_path: Path) -> None:
    probe = ProbeSet.from_batch({**given_batch(), "image": [object()] * 5, "many": object()})
    with said() as messages:
        state = probe.state_dict()
    (message,) = messages
    assert "image, many" in message
    torch.save(state, tmp_path / "probe.pt")
    again = ProbeSet.from_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    assert set(again.rows[0]) == set(given_batch())


SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "after every step": ({"every_n_train_steps": 1}, {"val_check_interval": 0.5}),
    "after every validation": ({"every_n_epochs": 1}, {"val_check_interval": 0.5}),
    "at the end of every epoch": ({"save_on_train_epoch_end": True}, {"val_check_interval": 0.5}),
    "in mid accumulation": ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 3, "val_check_interval": 2}),
    "every second validation": (
        {"every_n_train_steps": 1},
        {"val_check_interval": 0.5, "every": 2},
    ),
    "validations across epochs": (
        {"every_n_train_steps": 1},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_resumed_curves_and_filmstrips_have_no_gap_no_double_point_and_no_step_back(kind: str, tmp_path: Path) -> None:
    checkpoints, options = SCHEDULES[kind]
    options = dict(options)
    settings = {"heatmap_examples": 1, "methods": ["W", "N-Enc"], "every_n_validations": options.pop("every", 1)}
    whole, logger = GlobEncCallback(**settings), Album()
    train([whole, keeps_all(tmp_path, **checkpoints)], logger, **options)
    steps = [entry.step for entry in whole.history]
    assert len(steps) >= 4
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=").split("-")[0]))
    assert len(paths) >= 3
    for path in paths:
        kept = [entry["step"] for entry in stored_state(path)["history"]]
        assert kept == steps[: len(kept)]
        resumed, rest = GlobEncCallback(**settings), Album()
        with said() as messages:
            train([resumed], rest, path, **options)
        assert messages == []
        assert_same_history(resumed, whole)
        assert rest.steps(MONITORED) == steps[len(kept) :]
        values = [value for _, value in logger.series(MONITORED)]
        assert [value for _, value in rest.series(MONITORED)] == pytest.approx(values[len(kept) :], rel=0, abs=1e-6)
        if len(kept) < len(steps):
            assert np.array_equal(rest.pictures(FILMSTRIP)[-1], logger.pictures(FILMSTRIP)[-1])


AVERAGING: dict[str, Callable[[pl.Callback], list[pl.Callback]]] = {
    "averaging before ours": lambda ours: [EveryStep(), ours],
    "averaging after ours": lambda ours: [ours, EveryStep()],
    "EMA": lambda ours: [EMAWeightAveraging(decay=0.5), Timer(), ours],
}


@averages
@pytest.mark.parametrize("kind", AVERAGING)
def test_a_validation_that_is_made_up_sees_averaged_weights_where_others_do(kind: str, tmp_path: Path) -> None:
    settings = {"heatmap_examples": 0, "methods": ["N-Enc"]}
    whole = GlobEncCallback(**settings)
    train([*AVERAGING[kind](whole), keeps_all(tmp_path, every_n_train_steps=4)], False)
    assert [entry.step for entry in whole.history] == [0, 3, 7, 11]
    for path in tmp_path.glob("*.ckpt"):
        assert stored_state(path)["due_epoch"] is not None
        resumed, logger = GlobEncCallback(**settings), Memory()
        with said() as messages:
            trainer, module = train(AVERAGING[kind](resumed), logger, path)
        assert [message for message in messages if "no images" not in message] == []
        assert_same_history(resumed, whole)
        alone, other = train(AVERAGING[kind](pl.Callback()), Memory(), path)
        assert equal(module.state_dict(), other.state_dict())
        assert equal(trainer.optimizers[0].state_dict(), alone.optimizers[0].state_dict())


class AveragesItself(Steps):
    """Puts other weights in as a validation starts."""

    def on_validation_start(self) -> None:
        with torch.no_grad():
            next(self.parameters()).mul_(0.5)

    def on_validation_end(self) -> None:
        with torch.no_grad():
            next(self.parameters()).mul_(2)


def exchanges() -> list[pl.Callback]:
    return [LambdaCallback(on_validation_start=lambda trainer, module: None)]


@pytest.mark.parametrize(("who", "others"), [("AveragesItself", list), ("LambdaCallback", exchanges)])
@pytest.mark.parametrize("every", [1, 2])
def test_a_validation_that_cannot_be_made_up_is_missing(
    who: str, others: Callable[[], list[pl.Callback]], every: int, tmp_path: Path
) -> None:
    settings = {"heatmap_examples": 1, "methods": ["N-Enc"], "every_n_validations": every}
    make = AveragesItself if who == "AveragesItself" else Steps
    whole = GlobEncCallback(**settings)
    train([whole, keeps_all(tmp_path, every_n_train_steps=4), *others()], False, make=make)
    steps = [entry.step for entry in whole.history]
    for path in tmp_path.glob("*.ckpt"):
        (due,) = {torch.load(path, weights_only=True)["global_step"] - 1}
        resumed = GlobEncCallback(**settings)
        with said() as messages:
            train([resumed, *others()], False, path, make=make)
        assert [entry.step for entry in resumed.history] == [step for step in steps if step != due]
        assert resumed.history.missing_steps == [due] * (due in steps)
        assert [who in message and "missing here" in message for message in messages] == [True] * (due in steps)


def test_resumed_into_the_same_tensorboard_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 0.5}

    def tensorboard() -> TensorBoardLogger:
        return TensorBoardLogger(str(tmp_path), name="", version="run")

    train([GlobEncCallback(heatmap_examples=1), keeps_all(tmp_path)], tensorboard(), max_epochs=2, **options)
    path = max(tmp_path.glob("*.ckpt"), key=lambda one: torch.load(one, weights_only=True)["global_step"])
    train([GlobEncCallback(heatmap_examples=1)], tensorboard(), path, **options)
    log = events(tmp_path / "run")
    steps = [0, *(point.step for point in log.Scalars("val_loss"))]
    assert steps == sorted(set(steps))
    assert [point.step for point in log.Scalars(MONITORED)] == steps
    assert [image.step for image in log.Images(FILMSTRIP)] == steps


def test_a_missing_validation_stays_missing_after_a_resume(tmp_path: Path) -> None:
    whole, resumed = Album(), Album()
    with said():
        train([SpoilsOne(1), GlobEncCallback(heatmap_examples=1), keeps_all(tmp_path)], whole)
    path = next(path for path in tmp_path.glob("*.ckpt") if torch.load(path, weights_only=True)["global_step"] == 8)
    assert stored_state(path)["missing_steps"] == [3]
    callback = GlobEncCallback(heatmap_examples=1)
    train([callback], resumed, path)
    assert [entry.step for entry in callback.history] == [0, 7, 11]
    assert np.array_equal(resumed.pictures(FILMSTRIP)[-1], whole.pictures(FILMSTRIP)[-1])


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_epoch")
    train([GlobEncCallback(tokenizer=tokenizer(), heatmap_examples=0), keeps_all(folder)], False, max_epochs=1)
    (path,) = folder.glob("*.ckpt")
    return path


def test_another_number_of_examples_is_told_and_the_stored_probe_kept(one_epoch: Path) -> None:
    resumed = GlobEncCallback(num_examples=5, tokenizer=tokenizer(), heatmap_examples=0)
    with said() as messages:
        train([resumed], False, one_epoch)
    (message,) = messages
    assert "num_examples is 5 now and was 16" in message
    assert probed_ids(resumed) == [Sentences().ids(index) for index in range(16)]
    assert {len(entry.predicted) for entry in resumed.history} == {16}


def other_tokenizer() -> Any:
    """The same ids for other words."""
    other = tokenizer()
    other.convert_ids_to_tokens = lambda index: f"other{index}"
    return other


@pytest.mark.parametrize("where", ["given", "module"])
def test_another_tokenizer_is_told_and_the_stored_tokens_kept(one_epoch: Path, where: str) -> None:
    resumed = GlobEncCallback(tokenizer=other_tokenizer() if where == "given" else None, heatmap_examples=0)
    pl.seed_everything(3, verbose=False)
    module = Steps(tokenizer=other_tokenizer())
    trainer = build_trainer([resumed], max_epochs=2)
    with said() as messages:
        trainer.fit(module, loader(Sentences(32, seed=1)), loader(Sentences()), ckpt_path=one_epoch)
    (message,) = messages
    assert "the tokenizer is not the one" in message
    assert resumed.probe is not None
    assert resumed.probe.tokens[0][0] == "[CLS]"
    assert len(resumed.history) == 3


def test_the_same_tokenizer_or_none_is_nothing_to_tell(one_epoch: Path) -> None:
    for same in (tokenizer(), None):
        with said() as messages:
            train([GlobEncCallback(tokenizer=same, heatmap_examples=0)], False, one_epoch)
        assert messages == []


def test_a_state_that_cannot_be_read_does_not_stop_the_training(one_epoch: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(one_epoch, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("GlobEncCallback"))
    del checkpoint["callbacks"][key]["history"][0]["rho"]
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    resumed = GlobEncCallback(heatmap_examples=0)
    with said() as messages:
        train([resumed], False, tmp_path / "broken.ckpt")
    assert len(messages) == 1
    assert [entry.step for entry in resumed.history] == [7, 11]
    with pytest.raises(KeyError):
        train([GlobEncCallback(heatmap_examples=0, on_error="raise")], False, tmp_path / "broken.ckpt")


def test_callbacks_with_different_probes_and_settings_live_side_by_side(tmp_path: Path) -> None:
    def several() -> list[pl.Callback]:
        return [
            GlobEncCallback(heatmap_examples=1),
            GlobEncCallback(given_batch(), heatmap_examples=1),
            GlobEncCallback(["word0 word1 word2"], tokenizer=tokenizer(), heatmap_examples=1),
            GlobEncCallback(["word3 word1 word2"], tokenizer=tokenizer(), heatmap_examples=1),
            GlobEncCallback(given_batch(), readout="mean", heatmap_examples=1),
        ]

    whole, logger = several(), Album()
    train([*whole, keeps_all(tmp_path, every_n_train_steps=5)], logger)
    tags = ["globenc", *(f"globenc_{number}" for number in range(2, 6))]
    for tag in tags:
        assert logger.steps(f"{tag}/spearman/N-Enc") == [0, 3, 7, 11]
        assert len(logger.pictures(f"{tag}/filmstrip/example_00")) == 4
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        resumed = several()
        train(resumed, Album(), path)
        for one, other in zip(resumed, whole, strict=True):
            assert_same_history(one, other)


def last_logit(logits: Tensor, batch: Any) -> Tensor:
    return logits[:, -1]


def logit(logits: Tensor, batch: Any, index: int = 0) -> Tensor:
    return logits[:, index]


def chosen_by(index: Tensor) -> Callable[[Tensor, Any], Tensor]:
    return lambda logits, batch: logits.index_select(1, index)[:, 0]


PAIRS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "lambda targets": lambda: [{"target": lambda x, b: x[:, 1]}, {"target": lambda x, b: x[:, 2]}],
    "forwards": lambda: [
        {"forward": lambda module, batch: module.model(batch["input_ids"], batch["attention_mask"]).logits},
        {"forward": lambda module, batch: -module.model(batch["input_ids"], batch["attention_mask"]).logits},
    ],
    "partials": lambda: [{"target": partial(logit, index=index)} for index in (1, 2)],
    "closures of tensors": lambda: [{"target": chosen_by(torch.tensor([index]))} for index in (1, 2)],
    "sizes": lambda: [{"num_examples": 2}, {"num_examples": 3}],
    "tokenizers": lambda: [{"tokenizer": tokenizer()}, {}],
    "turns": lambda: [{}, {"every_n_validations": 2}],
    "nothing": lambda: [{}, {}],
}
"""What two callbacks of one Trainer differ in."""


@pytest.mark.parametrize("kind", PAIRS)
def test_two_callbacks_of_one_trainer_have_two_keys_and_find_their_states_again(kind: str, tmp_path: Path) -> None:
    def pair() -> list[GlobEncCallback]:
        return [GlobEncCallback(**{"heatmap_examples": 0, "num_examples": 4} | one) for one in PAIRS[kind]()]

    whole, resumed = pair(), pair()
    with said() as messages:
        train([*whole, keeps_all(tmp_path, every_n_train_steps=5)], False)
        assert whole[0].state_key != whole[1].state_key
        before = [one.state_key for one in whole]
        path = max(tmp_path.glob("*.ckpt"))
        states = torch.load(path, weights_only=True)["callbacks"]
        assert set(before) <= set(states)
        train([*resumed], False, path)
    assert messages == []
    assert [one.state_key for one in resumed] == before
    for one, other in zip(resumed, whole, strict=True):
        assert_same_history(one, other)
    assert len(whole[0].history) == 4


def test_a_callback_has_its_own_key_again_in_a_trainer_of_its_own() -> None:
    first, second = GlobEncCallback(heatmap_examples=0), GlobEncCallback(heatmap_examples=0)
    train([first, second], False)
    assert second.state_key == f"{first.state_key}_2"
    train([second], False)
    assert second.state_key == first.state_key


def test_a_profiler_can_name_files_after_the_callback(tmp_path: Path) -> None:
    class Mine(GlobEncCallback):
        """Its qualified name holds angle brackets."""

    profiler = AdvancedProfiler(tmp_path, filename="perf", dump_stats=True)
    ours = [GlobEncCallback(heatmap_examples=0), Mine(heatmap_examples=0), GlobEncCallback(heatmap_examples=0)]
    trainer, _ = train([*ours], False, profiler=profiler)
    assert trainer.global_step == 12
    names = [path.name for path in tmp_path.glob("*GlobEnc*.prof")]
    assert any(f"{ours[2].state_key}.on_validation_batch_end" in name for name in names)
    for callback in ours:
        assert re.fullmatch("[A-Za-z0-9_]{1,64}", callback.state_key)


def with_keys(path: Path, rename: Callable[[str, dict[str, Any]], str]) -> Path:
    """The same checkpoint with other keys for our states, and without what only this version writes."""
    checkpoint = torch.load(path, weights_only=True)
    for key in [key for key in checkpoint["callbacks"] if "GlobEnc" in key]:
        state = checkpoint["callbacks"].pop(key)
        renamed = rename(key, state)
        checkpoint["callbacks"][renamed] = state
    torch.save(checkpoint, path.parent / "renamed.ckpt")
    return path.parent / "renamed.ckpt"


def as_earlier_versions_wrote_it(key: str, state: dict[str, Any]) -> str:
    settings = {name: value for name, value in state["made_of"].items() if not name.endswith("_code")}
    for name in ("made_of", "session", "reasons"):
        del state[name]
    return f"GlobEncCallback{settings!r}"


@pytest.mark.parametrize(
    "settings",
    [[{}], [{"probe": given_batch()}, {"readout": "mean"}], [{"target": last_logit}]],
    ids=["usual", "two callbacks", "a target"],
)
def test_a_checkpoint_with_the_long_keys_of_earlier_versions_is_read(
    settings: list[dict[str, Any]], tmp_path: Path
) -> None:
    def several() -> list[pl.Callback]:
        return [GlobEncCallback(heatmap_examples=0, **one) for one in settings]

    whole, resumed = several(), several()
    train([*whole, keeps_all(tmp_path, every_n_train_steps=5)], False)
    path = with_keys(max(tmp_path.glob("*.ckpt")), as_earlier_versions_wrote_it)
    (first, *_) = (key for key in torch.load(path, weights_only=True)["callbacks"] if "GlobEnc" in key)
    assert first.startswith("GlobEncCallback{'probe': '")
    assert "'normalize': False, 'exclude_special_tokens': False}" in first
    with said() as messages:
        train(resumed, False, path)
    assert messages == []
    for one, other in zip(resumed, whole, strict=True):
        assert_same_history(one, other)


@pytest.mark.parametrize("function", ["target", "forward"])
def test_an_edited_function_goes_on_with_its_history_and_says_so(function: str, tmp_path: Path) -> None:
    functions = {
        "target": (lambda logits, batch: logits[:, 0], lambda logits, batch: logits[:, 1]),
        "forward": (
            lambda module, batch: module.model(batch["input_ids"], batch["attention_mask"]).logits,
            lambda module, batch: module.model(batch["input_ids"], batch["attention_mask"]).logits.neg(),
        ),
    }
    before, after = ({function: one, "heatmap_examples": 0} for one in functions[function])
    others = {"readout": "mean", "heatmap_examples": 0}
    train([GlobEncCallback(**before), GlobEncCallback(**others), keeps_all(tmp_path, every_n_train_steps=5)], False)
    path = max(tmp_path.glob("*.ckpt"))
    edited, unedited = GlobEncCallback(**after), GlobEncCallback(**others)
    with said() as messages:
        train([unedited, edited], False, path)
    (message,) = messages
    assert f"{function} is not the code that the checkpoint was written with" in message
    assert len(edited.history) == len(unedited.history) == 4


def test_other_settings_begin_a_new_history_and_say_what_differs(one_epoch: Path) -> None:
    callback = GlobEncCallback(heatmap_examples=0, readout="mean")
    with said() as messages:
        train([callback], False, one_epoch)
    (message,) = messages
    assert "readout was 'auto' and is 'mean'" in message
    assert "methods" not in message
    assert [entry.step for entry in callback.history] == [7, 11]


def test_a_state_of_the_earlier_default_readout_goes_on_without_a_word(one_epoch: Path, tmp_path: Path) -> None:
    before, callback = GlobEncCallback(heatmap_examples=0, readout="cls"), GlobEncCallback(heatmap_examples=0)
    checkpoint = torch.load(one_epoch, weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if key.startswith("GlobEncCallback")]
    state = checkpoint["callbacks"].pop(key)
    state["made_of"]["readout"] = "cls"
    checkpoint["callbacks"][before.state_key] = state
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    with said() as messages:
        train([callback], False, tmp_path / "earlier.ckpt")
    assert messages == []
    assert [entry.step for entry in callback.history] == [0, 3, 7, 11]


@pytest.mark.parametrize("form", OWN_FORMS)
def test_a_training_on_batches_of_any_form_goes_on(form: str, tmp_path: Path) -> None:
    def training(callbacks: list[pl.Callback], path: Path | None = None, epochs: int = 2) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = TakesOwnForm(form=form)
        trainer = build_trainer(callbacks, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(module, **{f"{name}_dataloaders": one for name, one in in_form(form).items()}, ckpt_path=path)
        return module.state_dict()

    whole, resumed = GlobEncCallback(heatmap_examples=0), GlobEncCallback(heatmap_examples=0)
    training([whole, ModelCheckpoint(tmp_path / "whole")])
    training([GlobEncCallback(heatmap_examples=0), ModelCheckpoint(tmp_path / "half", filename="half")], epochs=1)
    with said() as messages:
        weights = training([resumed, ModelCheckpoint(tmp_path / "rest")], tmp_path / "half" / "half.ckpt")
    assert messages == []
    assert [entry.step for entry in resumed.history] == [entry.step for entry in whole.history] == [0, 1, 3]
    assert whole.probe is not None
    assert resumed.probe is not None
    assert resumed.probe.fingerprint() == whole.probe.fingerprint()
    for method, rho in by_hand(Steps(), weights, Sentences().first(16), methods=METHODS).items():
        assert torch.equal(whole.history[1].by_example[method], resumed.history[1].by_example[method])
        torch.testing.assert_close(resumed.history[-1].by_example[method], rho, rtol=0, atol=1e-6)


class HasRate(Steps):
    """Steps with a learning rate and a batch size that finders can set."""

    def __init__(self, model: Any = None) -> None:
        super().__init__(model)
        self.lr = 1e-3
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return loader(Subset(Sentences(8, seed=1), [*range(8)] * 4), self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(Sentences())


FINDERS: dict[str, Callable[[Path], list[pl.Callback]]] = {
    "learning rate": lambda folder: [LearningRateFinder(num_training_steps=3)],
    "batch size": lambda folder: [BatchSizeFinder(max_trials=2, steps_per_trial=1)],
    "both": lambda folder: [
        BatchSizeFinder(max_trials=2, steps_per_trial=1),
        LearningRateFinder(num_training_steps=3),
    ],
    "at the first epoch": lambda folder: [FindsAtEpoch()],
}


class FindsAtEpoch(LearningRateFinder):
    """The example of Lightning's documentation: it finds a learning rate at the start of some epochs."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=3)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        return

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in (0, 1):
            self.lr_find(trainer, pl_module)


class Validations(pl.Callback):
    """Keeps the steps at which something was validated: pytorch-lightning 2.5 trains an epoch less after a finder."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step - 1)


def steps_with(finder: str, folder: Path, **settings: Any) -> tuple[list[int], list[int], int, list[int]]:
    """The steps of the history, those missing, the number of validations, and where they were, after three epochs."""
    pl.seed_everything(3, verbose=False)
    callback, others = GlobEncCallback(heatmap_examples=0, **settings), Validations()
    trainer = build_trainer(
        [callback, others, *FINDERS.get(finder, lambda folder: [])(folder)], max_epochs=3, default_root_dir=folder
    )
    module = HasRate()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        if finder == "tuner":
            Tuner(trainer).lr_find(module, num_training=3)
            Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1)
            assert not callback.history
        module.batch_size = 4
        others.steps.clear()
        trainer.fit(module)
    steps = [entry.step for entry in callback.history]
    return steps, callback.history.missing_steps, callback._schedule.validations, others.steps


@pytest.mark.parametrize("probe", [None, given_batch()], ids=["taken", "given"])
@pytest.mark.parametrize("finder", ["learning rate", "at the first epoch", "tuner"])
def test_a_finder_leaves_nothing_behind_in_the_history(finder: str, probe: Any, tmp_path: Path) -> None:
    assert steps_with("none", tmp_path, probe=probe, every_n_validations=2) == ([0, 7, 23], [], 3, [7, 15, 23])
    steps, missing, validations, seen = steps_with(finder, tmp_path, probe=probe, every_n_validations=2)
    assert (steps, missing, validations) == ([0, *seen[::2]], [], len(seen))
    assert len(seen) in (2, 3)


@pytest.mark.parametrize("finder", ["batch size", "both"])
def test_a_finder_of_the_batch_size_leaves_the_baseline(finder: str, tmp_path: Path) -> None:
    steps, missing, validations, seen = steps_with(finder, tmp_path, every_n_validations=2)
    assert (steps, missing, validations) == ([0, *seen[::2]], [], len(seen))
    steps, missing, validations, seen = steps_with(finder, tmp_path, probe=given_batch())
    assert (steps, missing, validations) == ([0, *seen], [], len(seen))
    assert len(seen) in (2, 3)


class GoesBack(pl.Callback):
    """Trains two epochs with all callbacks, and then begins again from where it started."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "start.ckpt"
        self.seen: list[list[int]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (ours,) = (one for one in trainer.callbacks if isinstance(one, GlobEncCallback))
        self.seen.append([entry.step for entry in ours.history])
        if trainer.current_epoch == 1 and len(self.seen) == 2:
            trainer._checkpoint_connector.restore(self.path)
            self.seen.append([entry.step for entry in ours.history])


def test_a_training_that_goes_back_to_its_start_forgets_what_came_after(tmp_path: Path) -> None:
    callback, goes_back = GlobEncCallback(given_batch(), heatmap_examples=0), GoesBack(tmp_path)
    train([callback, goes_back], False, max_epochs=2)
    assert goes_back.seen[:3] == [[0, 3], [0, 3, 7], [0]]


def test_a_state_restored_by_validate_does_not_make_the_next_fit_a_resumed_one(one_epoch: Path) -> None:
    callback = GlobEncCallback(heatmap_examples=0)
    trainer = build_trainer([callback], max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.validate(Steps(), loader(Sentences()), ckpt_path=one_epoch, verbose=False)
        trainer.fit(Steps(), same_batches(), loader(Sentences()))
    assert [entry.step for entry in callback.history.latest] == [0, 3]


def test_a_state_key_is_the_same_in_another_process_and_before_and_after_a_training() -> None:
    callback = GlobEncCallback(given_batch())
    before = callback.state_key
    assert before == GlobEncCallback(given_batch(), num_examples=3, heatmap_examples=2).state_key
    fit(Steps(), callback)
    assert callback.state_key == before == copy.deepcopy(callback).state_key
    assert before == GlobEncCallback(ProbeSet.from_batch(given_batch())).state_key
    assert "0x" not in before


def test_a_training_without_ours_goes_on_from_a_checkpoint_with_ours_and_the_other_way_round(
    one_epoch: Path, tmp_path: Path
) -> None:
    trainer, _ = train([keeps_all(tmp_path)], False, one_epoch)
    assert trainer.global_step == 12
    late = GlobEncCallback(heatmap_examples=0)
    path = next(path for path in tmp_path.glob("*.ckpt") if torch.load(path, weights_only=True)["global_step"] == 8)
    train([late], False, path)
    assert [entry.step for entry in late.history] == [11]


# --- what others monitor ---------------------------------------------------------------------------------------------


class Monitors(ModelCheckpoint):
    """Remembers which figure each validation was judged by."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, monitor=MONITORED, mode="max", save_top_k=-1)
        self.seen: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen.append(float(trainer.callback_metrics.get(MONITORED, torch.tensor(float("nan")))))
        super().on_validation_end(trainer, pl_module)


def test_those_who_monitor_a_missing_figure_see_the_last_one_again(tmp_path: Path) -> None:
    callback, monitors = GlobEncCallback(heatmap_examples=0), Monitors(tmp_path)
    patient = EarlyStopping(MONITORED, mode="max", patience=10)
    with said():
        trainer, _ = train([SpoilsOne(2), callback, patient, monitors], False)
    assert trainer.global_step == 12
    rhos = [float(entry.correlation["N-Enc"][-1]) for entry in callback.history[1:]]
    assert monitors.seen == pytest.approx([rhos[0], rhos[0], rhos[1]])


def refuses(module: Any, batch: Any) -> Tensor:
    raise ArithmeticError("never")


def test_early_stopping_that_is_not_strict_outlives_a_training_without_figures() -> None:
    with said() as messages:
        trainer, _ = train(
            [GlobEncCallback(heatmap_examples=0, forward=refuses), EarlyStopping(MONITORED, strict=False)], False
        )
    assert len(messages) == 1
    assert trainer.global_step == 12


def test_unknown_length_and_snapshots_on_resume(tmp_path: Path) -> None:
    """A loader that does not know its end: what is analysed after a resume are the weights of that validation."""
    pl.seed_everything(3, verbose=False)
    fit(
        Steps(),
        GlobEncCallback(heatmap_examples=0),
        keeps_all(tmp_path),
        val=loader(Stream(Sentences())),
        enable_checkpointing=True,
    )
    (path,) = tmp_path.glob("*.ckpt")
    callback, snapshots = GlobEncCallback(heatmap_examples=0), Snapshots()
    trainer = build_trainer([callback, snapshots], max_epochs=2)
    trainer.fit(Steps(), loader(Sentences(16, seed=1)), loader(Stream(Sentences())), ckpt_path=path)
    assert [entry.step for entry in callback.history] == [0, 1, 3]
    assert len(snapshots.weights) == 1


@pytest.mark.parametrize("stored", ["now", "earlier"])
def test_tokens_in_the_spelling_of_earlier_versions_are_the_same_tokenizers(tmp_path: Path, stored: str) -> None:
    bytewise = byte_level_tokenizer(["café naïve"], 258)
    texts = ["é a", "ï"]
    callback = GlobEncCallback(texts, tokenizer=bytewise, heatmap_examples=0)
    fit(Steps(classifier(vocab_size=260)), callback, max_epochs=1)
    probe = callback.probe
    assert probe is not None
    assert probe.tokens == (("é", "⋯", "▁", "a"), ("ï", "⋯"))
    earlier = tuple(tuple(spelling_of(row["input_ids"], bytewise)) for row in probe.rows)
    assert earlier == (("Ã", "©", "Ġ", "a"), ("Ã", "¯"))
    state = callback.state_dict()
    if stored == "earlier":
        state["probe"]["tokens"] = [list(tokens) for tokens in earlier]
    for given, told in ((bytewise, False), (byte_level_tokenizer(["other"], 262), False), (tokenizer(), True)):
        resumed = GlobEncCallback(texts, tokenizer=given, heatmap_examples=0)
        resumed.load_state_dict(copy.deepcopy(state))
        with said() as messages:
            fit(Steps(classifier(vocab_size=260)), resumed, max_epochs=1)
        assert any("the tokenizer is not the one" in message for message in messages) == told
        assert resumed.probe is not None
        # Text takes the place of the spelling, where the tokenizer is known to be the same.
        assert resumed.probe.tokens == (earlier if told and stored == "earlier" else probe.tokens)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_training_after_a_resumed_one_begins_anew(epochs: int) -> None:
    first, resumed = GlobEncCallback(heatmap_examples=0), GlobEncCallback(heatmap_examples=0)
    fit(Steps(), first, max_epochs=1)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    fit(Steps(), resumed, max_epochs=epochs)
    assert resumed.history.start == 0
    earlier = len(resumed.history)
    assert (earlier > len(first.history)) == (epochs > 0)
    fit(Steps(), resumed, max_epochs=1)
    assert resumed.history.start == earlier
