import copy
import csv
import gc
import html
import logging
import pickle
import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_utilities.core import rank_zero
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.data.dataloader import default_collate
from transformers import BatchEncoding, BertModel, DataCollatorWithPadding

from globenc_lightning import METHODS, GlobEncCallback, ProbeSet, attribute
from globenc_lightning.errors import GlobEncError, ModelCallError, ProbeError
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.publish import PublishError
from tests.averaging import EveryStep, averages
from tests.training import (
    CLS,
    ODD_WORDS,
    PAD,
    SEP,
    Album,
    Forwards,
    Memory,
    OwnHead,
    PopsLabels,
    Row,
    Sentences,
    Snapshots,
    SpoilsOne,
    Steps,
    Stream,
    TakesTuples,
    as_tuples,
    bert_config,
    build_trainer,
    by_hand,
    classifier,
    events,
    final_state,
    fit,
    loader,
    redrawn,
    said,
    tokenizer,
    word,
)

QUIET: dict[str, Any] = {"heatmap_examples": 0}
MONITORED = "globenc/spearman/N-Enc"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal to the last bit, whatever it is made of."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, np.ndarray):
        assert np.array_equal(left, right), where
    elif isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert left == right, where


def assert_figures(entry: Any, expected: dict[str, Tensor]) -> None:
    """An entry of the history holds these (b, l) correlations and what follows from them."""
    assert list(entry.by_example) == list(expected)
    for method, rho in expected.items():
        torch.testing.assert_close(entry.by_example[method], rho, rtol=0, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(entry.correlation[method], rho.nanmean(0), rtol=0, atol=1e-6, equal_nan=True)
        assert entry.n[method].tolist() == rho.isfinite().sum(0).tolist()
        assert entry.undefined[method].tolist() == rho.isnan().sum(0).tolist()


def probed_ids(callback: GlobEncCallback) -> list[list[int]]:
    assert callback.probe is not None
    return [row["input_ids"].tolist() for row in callback.probe.rows]


def first_ids(data: Sentences, size: int) -> list[list[int]]:
    return [data.ids(index) for index in range(size)]


# --- what is logged, and where ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """``GlobEncCallback()`` in two epochs of four batches, with two validations in each."""
    torch.manual_seed(1)
    module, snapshots, callback = Forwards(), Snapshots(), GlobEncCallback()
    untrained = copy.deepcopy(module.state_dict())
    logger = TensorBoardLogger(str(tmp_path_factory.mktemp("tensorboard")))
    train = loader(Sentences(32, seed=1), shuffle=True)
    trainer = fit(
        module,
        callback,
        snapshots,
        train=train,
        logger=logger,
        max_epochs=2,
        val_check_interval=0.5,
        log_every_n_steps=1,
    )
    expected = [by_hand(Forwards(), one, Sentences().first(16)) for one in (untrained, *snapshots.weights)]
    return SimpleNamespace(trainer=trainer, callback=callback, expected=expected, log=events(logger.log_dir))


def test_probe_is_the_first_rows_of_the_loader_without_their_padding(recorded: SimpleNamespace) -> None:
    assert probed_ids(recorded.callback) == first_ids(Sentences(), 16)


def test_history_holds_what_attribute_finds_for_the_same_weights(recorded: SimpleNamespace) -> None:
    assert len(recorded.callback.history) == len(recorded.expected) == 5
    for entry, expected in zip(recorded.callback.history, recorded.expected, strict=True):
        assert_figures(entry, expected)


def test_history_is_at_the_steps_of_the_validations_metrics(recorded: SimpleNamespace) -> None:
    steps = [point.step for point in recorded.log.Scalars("val_loss")]
    assert steps == [1, 3, 5, 7]
    assert [entry["step"] for entry in recorded.callback.history] == [0, *steps]
    assert [entry.epoch for entry in recorded.callback.history] == [0, 0, 0, 1, 1]


def test_scalars_are_what_attribute_finds_at_the_steps_of_val_loss(recorded: SimpleNamespace) -> None:
    steps = [0, *(point.step for point in recorded.log.Scalars("val_loss"))]
    for method in METHODS:
        points = recorded.log.Scalars(f"globenc/spearman/{method}")
        assert [point.step for point in points] == steps
        means = [float(one[method].nanmean(0)[-1]) for one in recorded.expected]
        assert [point.value for point in points] == pytest.approx(means, rel=0, abs=1e-6)
        for layer in range(3):
            points = recorded.log.Scalars(f"globenc/spearman_by_layer/{method}/layer_{layer + 1:02d}")
            assert [point.step for point in points] == steps
            means = [float(one[method].nanmean(0)[layer]) for one in recorded.expected]
            assert [point.value for point in points] == pytest.approx(means, rel=0, abs=1e-6)


def test_tags_are_these_and_no_others(recorded: SimpleNamespace) -> None:
    scalars = {f"globenc/spearman/{method}" for method in METHODS}
    scalars |= {f"globenc/spearman_by_layer/{m}/layer_{n}" for m in METHODS for n in ("01", "02", "03")}
    assert {tag for tag in recorded.log.Tags()["scalars"] if tag.startswith("globenc")} == scalars
    examples = [f"example_0{index}" for index in range(4)]
    assert set(recorded.log.Tags()["images"]) == {
        "globenc/correlation/by_layer",
        "globenc/correlation/over_training",
        *(
            f"globenc/{kind}/{one}"
            for kind in ("heatmap/layers", "heatmap/last_layer", "filmstrip")
            for one in examples
        ),
    }


def test_images_land_at_the_steps_of_val_loss(recorded: SimpleNamespace) -> None:
    for tag in recorded.log.Tags()["images"]:
        assert [image.step for image in recorded.log.Images(tag)] == [0, 1, 3, 5, 7], tag


# --- how modules are written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Forwards, Steps, OwnHead, PopsLabels])
def test_works_without_arguments_on_modules_of_several_styles(make: Callable[[], Steps]) -> None:
    module, snapshots, callback, logger = make(), Snapshots(), GlobEncCallback(), Memory()
    untrained = copy.deepcopy(module.state_dict())
    with said() as messages:
        fit(module, callback, snapshots, logger=logger)
    assert messages == ["GlobEncCallback: Memory can show no images; it gets the scalars alone."]
    assert [entry.step for entry in callback.history] == [0, 1]
    for entry, weights in zip(callback.history, (untrained, *snapshots.weights), strict=True):
        assert_figures(entry, by_hand(make(), weights, Sentences().first(16)))
    assert all(torch.isfinite(rho).all() for rho in callback.history[-1].correlation.values())
    assert len({step for step, _, _ in logger.ours}) == 2


@pytest.mark.parametrize("family", ["albert", "distilbert"])
@pytest.mark.parametrize("make", [Forwards, PopsLabels])
def test_works_on_other_families_with_rows_padded_to_full_length(family: str, make: Callable[..., Steps]) -> None:
    data = Sentences(width=30)
    snapshots, callback = Snapshots(), GlobEncCallback(heatmap_examples=1)
    with said() as messages:
        fit(
            make(classifier(family)),
            callback,
            snapshots,
            train=loader(Sentences(16, seed=1, width=30)),
            val=loader(data),
            logger=Album(),
        )
    assert messages == []
    assert_figures(callback.history[-1], by_hand(make(classifier(family)), snapshots.weights[-1], data.first(16)))


def batch_encoding(rows: Sequence[Row]) -> BatchEncoding:
    return BatchEncoding(default_collate(list(rows)))


@dataclass
class Batch:
    """A batch of a class of its own."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Triple(NamedTuple):
    """A batch as a named tuple."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def in_another_form(form: Callable[..., Any]) -> Callable[[Sequence[Row]], Any]:
    return lambda rows: form(*as_tuples(rows))


OWN_FORMS: dict[str, tuple[Callable[[Sequence[Row]], Any], Callable[[Any], Sequence[Tensor]]]] = {
    "tuple": (as_tuples, lambda batch: batch),
    "list": (in_another_form(lambda *parts: list(parts)), lambda batch: batch),
    "nested mappings": (
        in_another_form(lambda ids, mask, labels: {"text": {"ids": ids, "real": mask}, "gold": [labels]}),
        lambda batch: (batch["text"]["ids"], batch["text"]["real"], batch["gold"][0]),
    ),
    "dataclass": (in_another_form(Batch), lambda batch: (batch.input_ids, batch.attention_mask, batch.labels)),
    "named tuple": (in_another_form(Triple), lambda batch: batch),
    "pairs": (
        in_another_form(lambda ids, mask, labels: ((ids, mask), labels)),
        lambda batch: (*batch[0], batch[1]),
    ),
}
"""How a collate function makes a batch of rows, and how a step takes it to pieces: ids, mask, labels."""


class TakesOwnForm(Steps):
    """Takes its batches to pieces in its steps."""

    def loss_of(self, batch: Any) -> Tensor:
        ids, mask, labels = OWN_FORMS[self.form][1](batch)
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss


def in_form(form: str) -> dict[str, Any]:
    """Training and validation loaders whose batches have a form."""
    collate = OWN_FORMS[form][0]
    return {
        "train": loader(Sentences(16, seed=1), collate_fn=collate),
        "val": loader(Sentences(), collate_fn=collate),
    }


@pytest.mark.parametrize("form", OWN_FORMS)
def test_batches_in_a_form_that_the_step_alone_knows_have_figures(form: str) -> None:
    snapshots, callback = Snapshots(), GlobEncCallback(**QUIET)
    with said() as messages:
        fit(TakesOwnForm(form=form), callback, snapshots, **in_form(form))
    assert messages == []
    assert [entry.step for entry in callback.history] == [0, 1]
    assert probed_ids(callback) == first_ids(Sentences(), 16)
    assert_figures(callback.history[-1], by_hand(Steps(), snapshots.weights[-1], Sentences().first(16)))


VALIDATION_LOADERS: dict[str, Callable[[Sentences], Any]] = {
    "dict": loader,
    "BatchEncoding": partial(loader, collate_fn=batch_encoding),
    "list of loaders": lambda data: [loader(data), loader(Sentences(9, seed=3))],
    "shuffled": lambda data: loader(data, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "workers": partial(loader, num_workers=1),
    "unknown length": lambda data: loader(Stream(data)),
}


@pytest.mark.parametrize("kind", VALIDATION_LOADERS)
def test_takes_validation_batches_in_many_forms(kind: str) -> None:
    data = Sentences(18)
    snapshots, callback = Snapshots(), GlobEncCallback(**QUIET)
    with said() as messages:
        fit(Steps(), callback, snapshots, val=VALIDATION_LOADERS[kind](data))
    assert messages == []
    assert [entry.step for entry in callback.history] == [0, 1]
    assert callback.probe is not None
    assert len(callback.probe) == 16
    if kind != "shuffled":
        assert probed_ids(callback) == first_ids(data, 16)
    batch = next(iter(callback.probe.batches()))[1]
    assert_figures(callback.history[-1], by_hand(Steps(), snapshots.weights[-1], batch))


class Combined(Steps):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        parts = batch.values() if isinstance(batch, dict) else batch
        self.log("val_loss", sum(self.loss_of(part) for part in parts if part is not None), batch_size=8)


def test_takes_the_first_of_several_loaders_that_are_combined_by_name() -> None:
    data = Sentences(18)
    combined = CombinedLoader({"films": loader(data), "books": loader(Sentences(30, seed=3))}, "max_size")
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        fit(Combined(), callback, val=combined)
    assert messages == []
    assert probed_ids(callback) == first_ids(data, 16)
    assert [entry.step for entry in callback.history] == [0, 1]


def test_says_what_to_write_for_loaders_that_are_combined_in_a_list() -> None:
    combined = CombinedLoader([loader(Sentences(18)), loader(Sentences(30, seed=3))], "max_size")
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        trainer = fit(Combined(), callback, val=combined)
    if not callback.history:
        (message,) = messages
        assert "GlobEncCallback(probe=" in message
    assert trainer.global_step == 2


# --- the probe and the baseline --------------------------------------------------------------------------------------


def test_no_baseline_when_the_sanity_check_shows_too_few_rows() -> None:
    data, logger = Sentences(20), Memory()
    callback = GlobEncCallback(**QUIET, num_examples=10)
    fit(Steps(), callback, val=loader(data, 4), logger=logger, max_epochs=2)
    assert probed_ids(callback) == first_ids(data, 10)
    assert [entry.step for entry in callback.history] == logger.steps("val_loss") == logger.steps(MONITORED) == [1, 3]


@pytest.mark.parametrize("checks", [0, 1, 2, 3, 5, -1])
def test_rows_are_the_first_ones_however_many_the_sanity_check_shows(checks: int) -> None:
    data = Sentences(20)
    callback = GlobEncCallback(**QUIET, num_examples=10)
    fit(Steps(), callback, val=loader(data, 4), num_sanity_val_steps=checks)
    assert probed_ids(callback) == first_ids(data, 10)
    assert [entry.step for entry in callback.history] == ([0, 1] if checks in (3, 5, -1) else [1])


@pytest.mark.parametrize(("checks", "steps"), [(-1, [0, 1]), (2, [1]), (0, [1])])
def test_takes_what_there_is_when_the_loader_has_fewer_rows(checks: int, steps: list[int]) -> None:
    data = Sentences(10)
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        fit(Steps(), callback, val=loader(data, 4), num_sanity_val_steps=checks)
    assert messages == []
    assert probed_ids(callback) == first_ids(data, 10)
    assert [entry.step for entry in callback.history] == steps


def test_a_sanity_check_of_a_loader_without_length_gives_no_short_probe() -> None:
    data = Sentences(18)
    callback = GlobEncCallback(**QUIET)
    fit(Steps(), callback, val=loader(Stream(data), 4))
    assert probed_ids(callback) == first_ids(data, 16)
    assert [entry.step for entry in callback.history] == [1]


def test_baseline_is_the_untrained_model_and_comes_before_the_first_step() -> None:
    module, logger = Steps(), Memory()
    expected = attribute(module, Sentences().first(16), methods=METHODS).correlation
    seen: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(len(callback.history))

    callback = GlobEncCallback(**QUIET)
    fit(module, callback, Watch(), logger=logger)
    assert seen == [1, 1]
    assert_figures(callback.history[0], expected)
    for method, rho in expected.items():
        mean = rho.nanmean(0)
        step, figure = logger.series(f"globenc/spearman/{method}")[0]
        assert step == 0
        assert figure == pytest.approx(float(mean[-1]), rel=0, abs=1e-6)
        for layer in range(3):
            tag = f"globenc/spearman_by_layer/{method}/layer_{layer + 1:02d}"
            step, figure = logger.series(tag)[0]
            assert step == 0
            assert figure == pytest.approx(float(mean[layer]), rel=0, abs=1e-6)


def given_batch() -> dict[str, Tensor]:
    return Sentences(5, seed=7).first(5)


@pytest.mark.parametrize("checks", [0, 2])
@pytest.mark.parametrize("make", [given_batch, lambda: ProbeSet.from_batch(given_batch())], ids=["batch", "ProbeSet"])
def test_a_given_probe_has_a_baseline_with_and_without_sanity_check(make: Callable[[], Any], checks: int) -> None:
    module, callback = Steps(), GlobEncCallback(make(), **QUIET)
    expected = attribute(module, given_batch(), methods=METHODS).correlation
    fit(module, callback, num_sanity_val_steps=checks)
    assert [entry.step for entry in callback.history] == [0, 1]
    assert_figures(callback.history[0], expected)
    assert probed_ids(callback) == first_ids(Sentences(5, seed=7), 5)


def test_changing_a_given_batch_later_does_not_change_the_probe() -> None:
    batch = given_batch()
    callback = GlobEncCallback(batch)
    batch["input_ids"].zero_()
    assert probed_ids(callback) == first_ids(Sentences(5, seed=7), 5)


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2, "limit_train_batches": 1},
        {"val_check_interval": 1},
        {"val_check_interval": 1, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_no_measurement_is_drawn_over_another_at_the_same_step(options: dict[str, Any]) -> None:
    """A validation after the first batch lands at step 0, where the baseline is, and so does one between two steps."""
    logger, callback = Album(), GlobEncCallback(heatmap_examples=1)
    fit(Steps(), callback, logger=logger, **options)
    assert logger.steps("val_loss")[0] == 0
    assert len(callback.history) == 3
    heights = [len(one) for one in logger.pictures("globenc/filmstrip/example_00")]
    assert len(heights) == 3
    assert heights[0] < heights[1]
    assert heights[2] - heights[1] == heights[1] - heights[0]


def test_a_row_that_is_all_padding_is_left_out() -> None:
    data = Sentences(20, empty=(0, 3))
    callback = GlobEncCallback(**QUIET, num_examples=6)
    with said() as messages:
        fit(Steps(), callback, val=loader(data))
    assert messages == []
    assert probed_ids(callback) == [data.ids(index) for index in (1, 2, 4, 5, 6, 7)]
    assert len(callback.history) == 2


def test_a_first_batch_that_is_all_padding_is_passed_over() -> None:
    data = Sentences(20, empty=range(4))
    callback = GlobEncCallback(**QUIET, num_examples=6)
    trainer = fit(Steps(), callback, val=loader(data, 4))
    assert probed_ids(callback) == [data.ids(index) for index in range(4, 10)]
    assert len(callback.history) == 1
    assert trainer.global_step == 2


# --- tokens ----------------------------------------------------------------------------------------------------------

TEXTS = ["word1 word2 word3 word4", "<script> word7", "word5 word6 word9 word8 word11"]


def words_of(data: Sentences, size: int) -> list[tuple[str, ...]]:
    return [tuple(word(index) for index in data.ids(one)) for one in range(size)]


class CollatesRows:
    """A collate function that keeps its tokenizer, called or as a method."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()

    def __call__(self, rows: Sequence[Row]) -> Row:
        collated: Row = default_collate(list(rows))
        return collated

    collate = __call__


def closure() -> Callable[[Sequence[Row]], Row]:
    within = tokenizer()

    def collate(rows: Sequence[Row]) -> Row:
        assert within.pad_token_id == PAD
        collated: Row = default_collate(list(rows))
        return collated

    return collate


def collate_with(tokenizer: Any, rows: Sequence[Row]) -> Row:
    collated: Row = default_collate(list(rows))
    return collated


COLLATES: dict[str, Callable[[], Any]] = {
    "DataCollatorWithPadding": lambda: DataCollatorWithPadding(tokenizer()),
    "object": CollatesRows,
    "bound method": lambda: CollatesRows().collate,
    "closure": closure,
    "partial": lambda: partial(collate_with, tokenizer()),
}


@pytest.mark.parametrize("kind", COLLATES)
def test_finds_the_tokenizer_in_the_collate_function(kind: str) -> None:
    data, callback = Sentences(20), GlobEncCallback(**QUIET)
    with said() as messages:
        fit(Steps(), callback, val=loader(data, collate_fn=COLLATES[kind]()))
    assert messages == []
    assert callback.probe is not None
    assert list(callback.probe.tokens) == words_of(data, 16)


@pytest.mark.parametrize("shape", ["list", "dict", "CombinedLoader", "Subset"])
def test_finds_the_tokenizer_behind_loaders_of_several_shapes(shape: str) -> None:
    data = Sentences(20)
    data.tokenizer = tokenizer()  # type: ignore[attr-defined]
    shapes: dict[str, Any] = {
        "list": [loader(data)],
        "dict": {"films": loader(data)},
        "CombinedLoader": CombinedLoader([loader(data)], "sequential"),
        "Subset": loader(Subset(data, range(18))),
    }
    callback = GlobEncCallback(**QUIET)
    fit(Steps(), callback, val=shapes[shape])
    assert callback.probe is not None
    assert list(callback.probe.tokens) == words_of(data, 16)


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tokenizer()

    def train_dataloader(self) -> DataLoader[Row]:
        return loader(Sentences(16, seed=1))

    def val_dataloader(self) -> DataLoader[Row]:
        return loader(Sentences())


def test_finds_the_tokenizer_in_the_datamodule() -> None:
    callback = GlobEncCallback(**QUIET)
    build_trainer([callback]).fit(Steps(), datamodule=Data())
    assert callback.probe is not None
    assert list(callback.probe.tokens) == words_of(Sentences(), 16)


def test_finds_the_tokenizer_in_the_module() -> None:
    callback = GlobEncCallback(**QUIET)
    fit(Steps(tokenizer=tokenizer()), callback)
    assert callback.probe is not None
    assert list(callback.probe.tokens) == words_of(Sentences(), 16)


def test_a_given_tokenizer_goes_before_any_other() -> None:
    other = tokenizer()
    other.add_tokens(["a word of its own"])
    callback = GlobEncCallback(**QUIET, tokenizer=other)
    data = Sentences(20)
    data.rows[0]["input_ids"][1] = len(other) - 1
    fit(Steps(classifier(vocab_size=90), tokenizer=tokenizer()), callback, val=loader(data))
    assert callback.probe is not None
    assert callback.probe.tokens[0][:2] == ("[CLS]", "a word of its own")


def test_finds_the_tokenizer_in_the_checkpoint_folder(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    module = OwnHead()
    module.model = BertModel.from_pretrained(tmp_path).train()
    callback = GlobEncCallback(**QUIET)
    fit(module, callback)
    assert callback.probe is not None
    assert list(callback.probe.tokens) == words_of(Sentences(), 16)


def test_shows_ids_when_the_checkpoint_folder_has_no_tokenizer(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    module = OwnHead()
    module.model = BertModel.from_pretrained(tmp_path).train()
    callback = GlobEncCallback(**QUIET)
    fit(module, callback)
    assert callback.probe is not None
    assert callback.probe.tokens[0] == tuple(map(str, Sentences().ids(0)))


def test_shows_ids_and_says_so_when_there_is_no_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    # Whichever of Lightning's packages was imported last has put its own logger here.
    told = rank_zero.log
    caplog.set_level(logging.INFO, logger=told.name)
    told.addHandler(caplog.handler)
    try:
        callback = GlobEncCallback(**QUIET)
        with said() as messages:
            fit(Steps(), callback)
    finally:
        told.removeHandler(caplog.handler)
    assert messages == []
    assert {record.levelname for record in caplog.records if "no tokenizer is within reach" in record.message} == {
        "INFO"
    }
    assert callback.probe is not None
    assert [list(map(int, tokens)) for tokens in callback.probe.tokens] == first_ids(Sentences(), 16)


@pytest.mark.parametrize("given", [dict, ProbeSet.from_batch], ids=["batch", "ProbeSet"])
def test_finds_the_tokenizer_for_a_given_probe_too(given: Callable[[Row], Any]) -> None:
    data = Sentences(5, shortest=6)
    callback = GlobEncCallback(given(data.first(5)), **QUIET, exclude_special_tokens=True)
    with said() as messages:
        fit(Steps(tokenizer=tokenizer()), callback)
    assert messages == []
    assert callback.probe is not None
    assert list(callback.probe.tokens) == words_of(data, 5)
    assert len(callback.history) == 2


@pytest.mark.parametrize("how", ["object", "string", "path", "module", "collate function"])
@pytest.mark.parametrize("checks", [0, 2])
def test_a_probe_of_texts(how: str, checks: int, tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    given = {"object": tokenizer(), "string": str(tmp_path), "path": tmp_path}.get(how)
    module = Steps(tokenizer=tokenizer()) if how == "module" else Steps()
    val = loader(Sentences(), collate_fn=CollatesRows()) if how == "collate function" else None
    batch = tokenizer()(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    expected = attribute(module, batch, methods=METHODS).correlation
    callback = GlobEncCallback(TEXTS, tokenizer=given, **QUIET)
    with said() as messages:
        fit(module, callback, val=val, num_sanity_val_steps=checks)
    assert messages == []
    assert callback.probe is not None
    assert callback.probe.texts == tuple(TEXTS)
    assert [tokens[1:-1] for tokens in callback.probe.tokens] == [tuple(text.split()) for text in TEXTS]
    assert [entry.step for entry in callback.history] == [0, 1]
    assert_figures(callback.history[0], expected)


def test_texts_without_a_tokenizer_lead_to_one_warning_with_the_line_to_write() -> None:
    callback = GlobEncCallback(TEXTS, **QUIET)
    with said() as messages:
        trainer = fit(Steps(), callback, max_epochs=2)
    (message,) = messages
    assert "GlobEncCallback(probe=texts, tokenizer=tokenizer)" in message
    assert trainer.global_step == 4
    assert callback.history == []


def test_texts_are_not_read_with_a_tokenizer_that_has_no_words(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    module = OwnHead()
    module.model = BertModel.from_pretrained(tmp_path).train()
    callback = GlobEncCallback(TEXTS, **QUIET)
    with said() as messages:
        fit(module, callback)
    assert callback.history == []
    assert len(messages) == 1


def test_odd_tokens_are_drawn() -> None:
    callback, logger = GlobEncCallback([" ".join(ODD_WORDS)], tokenizer=tokenizer()), Album()
    with said() as messages:
        fit(Steps(), callback, logger=logger)
    assert messages == []
    assert callback.probe is not None
    assert callback.probe.tokens[0] == ("[CLS]", *ODD_WORDS, "[SEP]")
    assert len(logger.pictures("globenc/heatmap/layers/example_00")) == 2


def test_rows_of_the_loader_are_not_given_to_a_tokenizer_that_is_too_small() -> None:
    """Ids that it does not know are shown as numbers."""
    module = Steps(tokenizer=tokenizer(), model=classifier("bert", vocab_size=90))
    data = Sentences(20)
    data.rows[0]["input_ids"][1] = 80
    callback = GlobEncCallback(**QUIET)
    fit(module, callback, val=loader(data))
    assert callback.probe is not None
    assert callback.probe.tokens[0][:2] == ("[CLS]", "80")


# --- settings --------------------------------------------------------------------------------------------------------


def second_class(logits: Tensor, batch: Any) -> Tensor:
    return torch.ones(len(logits), dtype=torch.long)


def margin(logits: Tensor, batch: Any) -> Tensor:
    return logits[:, 0] - logits[:, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"readout": "last"},
        {"readout": "mean"},
        {"normalize": True},
        {"target": "label"},
        {"target": second_class},
        {"target": margin},
        {"methods": ("N", "W-Res")},
        {"methods": "W"},
    ],
    # A function's own text holds an address, which is another one in every process.
    ids=lambda settings: " ".join(f"{name}={getattr(one, '__name__', one)}" for name, one in settings.items()),
)
def test_settings_reach_the_analysis(settings: dict[str, Any]) -> None:
    module, callback = Steps(), GlobEncCallback(**QUIET, **settings)
    expected = attribute(module, Sentences().first(16), **{"methods": METHODS, **settings}).correlation
    with said() as messages:
        fit(module, callback)
    assert messages == []
    assert_figures(callback.history[0], expected)


def test_special_tokens_can_be_left_out() -> None:
    module = Steps(tokenizer=tokenizer())
    batch = Sentences().first(16)
    special = torch.isin(batch["input_ids"], torch.tensor([PAD, CLS, SEP])).long()
    inputs = {**batch, "special_tokens_mask": special}
    expected = attribute(module, inputs, methods=METHODS, exclude_special_tokens=True).correlation
    callback = GlobEncCallback(**QUIET, exclude_special_tokens=True)
    fit(module, callback)
    assert_figures(callback.history[0], expected)


def test_one_method_alone_is_drawn_and_logged() -> None:
    logger, callback = Album(), GlobEncCallback(methods=("W",), heatmap_examples=1)
    with said() as messages:
        fit(Steps(), callback, logger=logger)
    assert messages == []
    assert {tag for _, tag, _ in logger.ours} == {
        "globenc/spearman/W",
        *(f"globenc/spearman_by_layer/W/layer_{one}" for one in ("01", "02", "03")),
    }
    assert len(logger.tags()) == 5


def test_no_heatmaps_but_curves_without_heatmap_examples() -> None:
    logger = Album()
    fit(Steps(), GlobEncCallback(**QUIET), logger=logger)
    assert logger.tags() == {"globenc/correlation/by_layer", "globenc/correlation/over_training"}


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"num_examples": 0}, "num_examples must be a whole number of at least 1"),
        ({"num_examples": 2.0}, "num_examples must be a whole number"),
        ({"num_examples": True}, "num_examples must be a whole number"),
        ({"num_examples": "8"}, "num_examples must be a whole number"),
        ({"every_n_validations": 0}, "every_n_validations must be a whole number of at least 1"),
        ({"every_n_validations": None}, "every_n_validations must be a whole number"),
        ({"heatmap_examples": -1}, "heatmap_examples must be a whole number of at least 0"),
        ({"methods": ()}, "at least one method"),
        ({"methods": ("N", "N")}, "each once"),
        ({"methods": ("N-Env",)}, "choose from W, .*N-Enc"),
        ({"methods": None}, "methods"),
        ({"methods": 3}, "methods"),
        ({"target": "labels"}, "'predicted' or 'label', or give a callable"),
        ({"target": 1}, "'predicted' or 'label', or give a callable"),
        ({"decision": -1}, "the number of a loss, from 0, or the path of a head"),
        ({"decision": True}, "the number of a loss, from 0, or the path of a head"),
        ({"decision": 1.0}, "the number of a loss, from 0, or the path of a head"),
        ({"decision": 1, "forward": len}, "which forward= takes the place of"),
        ({"decision": 1, "probe": {"input_ids": torch.ones(1, 3).long()}}, "leave probe= out"),
        ({"encoder_call": -1}, "a whole number of at least 0"),
        ({"encoder_call": "1"}, "a whole number of at least 0"),
        ({"readout": "first"}, "choose from auto, cls, last, mean"),
        ({"readout": None}, "choose from auto, cls, last, mean"),
        ({"normalize": "no"}, "normalize"),
        ({"exclude_special_tokens": "no"}, "exclude_special_tokens"),
        ({"tokenizer": 3}, "must be a Hugging Face tokenizer or the name of one"),
        ({"tokenizer": "no/such/folder"}, "save_pretrained"),
        ({"forward": "model"}, "forward must be callable"),
        ({"on_error": "ignore"}, "'warn' or 'raise'"),
        ({"probe": []}, "empty"),
        ({"probe": ()}, "empty"),
        ({"probe": {}}, "input_ids"),
        ({"probe": 3}, "ProbeSet.from_texts"),
        ({"probe": ["text", 3]}, "ProbeSet.from_texts"),
        ({"probe": {"ids": torch.ones(2, 3)}}, "under the names that models know"),
        ({"probe": {"input_ids": torch.ones(3, dtype=torch.long)}}, r"shape \(examples, tokens\)"),
        ({"probe": {"input_ids": torch.ones(0, 3, dtype=torch.long)}}, "empty"),
        (
            {"probe": {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}},
            "no example with a real token",
        ),
        (
            {"probe": {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 4)}},
            r"attention_mask must have the shape \(2, 3\)",
        ),
        ({"probe": ProbeSet((), frozenset())}, "empty"),
    ],
    ids=str,
)
def test_bad_arguments_raise_and_say_what_to_write(arguments: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        GlobEncCallback(**arguments)


# --- those who monitor ------------------------------------------------------------------------------------------------


def test_model_checkpoint_keeps_the_best_by_rho(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(str(tmp_path), monitor=MONITORED, mode="max", filename="{step}")
    callback = GlobEncCallback(**QUIET)
    fit(Steps(), callback, checkpoint, max_epochs=3, enable_checkpointing=True)
    rho = {entry.step + 1: float(entry.correlation["N-Enc"][-1]) for entry in callback.history[1:]}
    best = max(rho, key=lambda step: rho[step])
    assert Path(checkpoint.best_model_path).name == f"step={best}.ckpt"
    assert float(checkpoint.best_model_score or 0) == pytest.approx(rho[best], rel=0, abs=1e-6)


def test_early_stopping_stops_on_rho() -> None:
    stopping = EarlyStopping(monitor=MONITORED, mode="max", patience=2, min_delta=10)
    callback = GlobEncCallback(**QUIET)
    trainer = fit(Steps(), callback, stopping, max_epochs=6)
    assert trainer.global_step == 6
    first = float(callback.history[1].correlation["N-Enc"][-1])
    assert float(stopping.best_score) == pytest.approx(first, rel=0, abs=1e-6)


def test_monitoring_works_with_validations_that_are_passed_over(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(str(tmp_path), monitor=MONITORED, mode="max")
    stopping = EarlyStopping(monitor=MONITORED, mode="max", patience=10)
    fit(
        Steps(),
        GlobEncCallback(**QUIET, every_n_validations=2),
        checkpoint,
        stopping,
        max_epochs=3,
        enable_checkpointing=True,
    )
    assert checkpoint.best_model_score is not None


def test_undefined_figures_are_not_logged_and_said_once() -> None:
    stopping = EarlyStopping(monitor=MONITORED, mode="max", strict=False, patience=1)
    logger = Memory()
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        trainer = fit(
            Steps(),
            callback,
            stopping,
            val=loader(Sentences(shortest=1, longest=1)),
            logger=logger,
            max_epochs=3,
        )
    assert trainer.global_step == 6
    assert logger.ours == []
    assert MONITORED not in trainer.callback_metrics
    (message,) = [one for one in messages if "images" not in one]
    assert "16 of 16 probe examples have no rank correlation" in message
    assert len(callback.history) == 4
    for entry in callback.history:
        assert entry.correlation["N-Enc"].isnan().all()
        assert entry.n["N-Enc"].tolist() == [0, 0, 0]
        assert entry.undefined["N-Enc"].tolist() == [16, 16, 16]


def test_a_row_of_one_token_is_left_out_of_the_mean() -> None:
    data = Sentences(20)
    data.rows[2] = Sentences(1, shortest=1, longest=1).rows[0]
    module, callback, logger = Steps(), GlobEncCallback(), Album()
    expected = attribute(module, data.first(16), methods=METHODS).correlation
    with said() as messages:
        fit(module, callback, val=loader(data), logger=logger)
    assert len(messages) == 1
    assert "1 of 16 probe examples" in messages[0]
    assert expected["N-Enc"][2].isnan().all()
    assert_figures(callback.history[0], expected)
    assert callback.history[0].n["N-Enc"].tolist() == [15, 15, 15]
    assert logger.series(MONITORED)[0][1] == pytest.approx(float(expected["N-Enc"].nanmean(0)[-1]), abs=1e-6)
    assert len(logger.tags()) == 14


# --- when it works ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "analysed"),
    [
        ({"max_epochs": 5}, [1, 5, 9]),
        ({"max_epochs": 2, "val_check_interval": 0.5}, [0, 2]),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, [3]),
    ],
    ids=str,
)
def test_every_second_validation_from_the_first_on(options: dict[str, Any], analysed: list[int]) -> None:
    logger, callback = Memory(), GlobEncCallback(**QUIET, every_n_validations=2)
    fit(Steps(), callback, logger=logger, num_sanity_val_steps=0, **options)
    assert logger.steps("val_loss")[::2] == analysed
    assert [entry.step for entry in callback.history] == logger.steps(MONITORED) == analysed


def test_accumulated_gradients_with_validations_in_between() -> None:
    logger, callback, snapshots = Memory(), GlobEncCallback(**QUIET), Snapshots()
    fit(
        Steps(),
        callback,
        snapshots,
        train=loader(Sentences(48, seed=1)),
        logger=logger,
        accumulate_grad_batches=3,
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    assert len(callback.history) == len(snapshots.weights) == 3
    assert [entry.step for entry in callback.history] == logger.steps("val_loss") == logger.steps(MONITORED)
    for entry, weights in zip(callback.history, snapshots.weights, strict=True):
        assert_figures(entry, by_hand(Steps(), weights, Sentences().first(16)))


def test_limited_validation_batches() -> None:
    callback = GlobEncCallback(**QUIET)
    fit(Steps(), callback, val=loader(Sentences(), 4), limit_val_batches=3, max_epochs=2, num_sanity_val_steps=0)
    assert probed_ids(callback) == first_ids(Sentences(), 12)
    assert [entry.step for entry in callback.history] == [1, 3]


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"val": ()}], ids=str)
def test_a_training_without_validation_is_told_once(options: dict[str, Any]) -> None:
    callback = GlobEncCallback(given_batch(), **QUIET)
    with said() as messages:
        trainer = fit(Steps(), callback, max_epochs=2, **options)
    (message,) = messages
    assert "validation loader" in message
    assert "limit_val_batches above 0" in message
    assert trainer.global_step == 4
    assert callback.history == []


@pytest.mark.parametrize("logger", [True, False])
def test_fast_dev_run(logger: bool) -> None:
    callback = GlobEncCallback()
    with said() as messages:
        fit(Steps(), callback, fast_dev_run=True, logger=logger)
    assert messages == []
    assert len(callback.history) == 1
    assert probed_ids(callback) == first_ids(Sentences(), 8)


def test_validate_alone_works_below_inference_mode() -> None:
    module, logger, callback = Steps(), Album(), GlobEncCallback(heatmap_examples=1)
    expected = attribute(module, Sentences().first(16), methods=METHODS).correlation
    with said() as messages:
        build_trainer([callback], logger=logger).validate(module, loader(Sentences()), verbose=False)
    assert messages == []
    assert [entry.step for entry in callback.history] == [0]
    assert_figures(callback.history[0], expected)
    assert logger.steps(MONITORED) == logger.steps("val_loss") == [0]
    assert len(logger.tags()) == 5
    assert callback.probe is not None
    assert not any(value.is_inference() for row in callback.probe.rows for value in row.values())


def test_validate_then_fit_then_validate() -> None:
    module, callback = Steps(), GlobEncCallback(**QUIET)
    trainer = build_trainer([callback])
    trainer.validate(module, loader(Sentences()), verbose=False)
    trainer.fit(module, loader(Sentences(16, seed=1)), loader(Sentences()))
    trainer.validate(module, loader(Sentences()), verbose=False)
    expected = by_hand(Steps(), module.state_dict(), Sentences().first(16))
    assert_figures(callback.history[-1], expected)
    assert probed_ids(callback) == first_ids(Sentences(), 16)


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_without_a_logger_there_is_a_history_and_something_to_monitor() -> None:
    callback = GlobEncCallback()
    with said() as messages:
        trainer = fit(Steps(), callback)
    assert messages == []
    for method in METHODS:
        rho = float(trainer.callback_metrics[f"globenc/spearman/{method}"])
        assert rho == pytest.approx(float(callback.history[-1].correlation[method][-1]), rel=0, abs=1e-6)


def test_csv_alone_gets_the_scalars_and_one_warning(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    with said() as messages:
        fit(Steps(), GlobEncCallback(), logger=logger, max_epochs=2)
    assert messages == ["GlobEncCallback: CSVLogger can show no images; it gets the scalars alone."]
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for tag in (MONITORED, "globenc/spearman_by_layer/N-Enc/layer_01"):
        assert [int(row["step"]) for row in rows if row[tag]] == [0, 1, 3]


def test_several_tensorboards_get_the_same(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(str(tmp_path), name=name) for name in ("a", "b")]
    with said() as messages:
        fit(Steps(), GlobEncCallback(heatmap_examples=1), logger=loggers)
    assert messages == []

    def contents(log: EventAccumulator) -> dict[str, list[tuple[int, Any]]]:
        scalars = {tag: [(p.step, p.value) for p in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
        images = {tag: [(p.step, p.encoded_image_string) for p in log.Images(tag)] for tag in log.Tags()["images"]}
        return {**scalars, **images}

    first, second = (contents(events(logger.log_dir)) for logger in loggers)
    assert first == second
    assert [step for step, _ in first["globenc/filmstrip/example_00"]] == [0, 1]


REFUSALS: dict[str, Callable[[str], bool]] = {
    "scalars": lambda tag: "spearman_by_layer" in tag,
    "images": lambda tag: "heatmap" in tag or "correlation" in tag,
}


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.parametrize("broken_first", [True, False])
def test_a_broken_logger_stops_neither_the_training_nor_other_loggers(what: str, broken_first: bool) -> None:
    broken, sound, alone = Album(REFUSALS[what]), Album(), Album()
    callback = GlobEncCallback(heatmap_examples=1)
    torch.manual_seed(5)
    with said() as messages:
        trainer = fit(Steps(), callback, logger=[broken, sound] if broken_first else [sound, broken])
    torch.manual_seed(5)
    fit(Steps(), GlobEncCallback(heatmap_examples=1), logger=alone)
    assert trainer.global_step == 2
    (message,) = messages
    assert "disk full" in message
    assert [entry.step for entry in callback.history] == [0, 1]
    assert sound.ours == alone.ours
    assert [(tag, step) for tag, step, _ in sound.images] == [(tag, step) for tag, step, _ in alone.images]
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(sound.images, alone.images, strict=True))


def test_a_logger_that_refuses_the_baseline_does_not_take_it_from_the_history() -> None:
    broken, callback = Memory(lambda tag: tag == MONITORED and not stepped), GlobEncCallback(**QUIET)
    stepped: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            stepped.append(1)

    fit(Steps(), callback, Watch(), logger=broken)
    assert [entry.step for entry in callback.history] == [0, 1]


@pytest.mark.parametrize("what", REFUSALS)
def test_a_broken_logger_stops_the_training_if_that_is_wanted(what: str) -> None:
    with pytest.raises(PublishError, match="disk full"):
        fit(Steps(), GlobEncCallback(heatmap_examples=1, on_error="raise"), logger=Album(REFUSALS[what]))


# --- what must not change --------------------------------------------------------------------------------------------


def frozen() -> Steps:
    module = Steps()
    module.model.requires_grad_(False)
    module.model.classifier.requires_grad_(True)
    return module


def part_in_eval() -> Steps:
    module = Steps()
    module.model.bert.embeddings.eval()
    return module


NEUTRALITY: dict[str, tuple[Callable[[], Steps], dict[str, Any]]] = {
    "plain": (Forwards, {}),
    "several validations": (Steps, {"val_check_interval": 0.5}),
    "mid accumulation": (Steps, {"accumulate_grad_batches": 3, "val_check_interval": 2}),
    "frozen layers": (frozen, {}),
    "parts in eval": (part_in_eval, {}),
    "clipped": (OwnHead, {"gradient_clip_val": 0.5}),
    "every batch": (Steps, {"val_check_interval": 1, "limit_val_batches": 1}),
    "bfloat16": (Forwards, {"precision": "bf16-mixed"}),
}


def trained(make: Callable[[], Steps], callbacks: Sequence[pl.Callback], options: dict[str, Any]) -> Any:
    pl.seed_everything(3, verbose=False)
    random.seed(4)
    logger = Memory()
    train = loader(Sentences(32, seed=1), shuffle=True, generator=torch.Generator().manual_seed(9))
    val = loader(Sentences(), shuffle=True, generator=torch.Generator().manual_seed(8))
    options = {"train": train, "val": val, "max_epochs": 2, "log_every_n_steps": 1, **options}
    trainer = fit(make(), *callbacks, logger=logger, **options)
    generators = [one.generator.get_state() for one in (options["train"], options["val"]) if one.generator is not None]
    return {**final_state(trainer), "logged": logger.others, "generators": generators}


@pytest.mark.parametrize("kind", NEUTRALITY)
def test_the_training_is_the_same_to_the_last_bit(kind: str) -> None:
    make, options = NEUTRALITY[kind]
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        observed = trained(make, [callback], options)
    assert [one for one in messages if "images" not in one] == []
    assert len(callback.history) >= 2
    assert_same(observed, trained(make, [], options))


def test_the_training_is_the_same_with_persistent_workers() -> None:
    def options() -> dict[str, Any]:
        workers: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "shuffle": True}
        return {
            "train": loader(Sentences(32, seed=1), **workers),
            "val": loader(Sentences(), **workers),
            "val_check_interval": 0.5,
        }

    callback = GlobEncCallback(**QUIET)
    observed = trained(Steps, [callback], options())
    assert len(callback.history) == 5
    assert_same(observed, trained(Steps, [], options()))


@averages
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("known_length", [True, False])
def test_averaged_weights_are_analysed_in_either_order(first: bool, known_length: bool) -> None:
    callback, snapshots, averaging = GlobEncCallback(given_batch(), **QUIET), Snapshots(), EveryStep()
    callbacks = [callback, averaging] if first else [averaging, callback]
    val = loader(Sentences() if known_length else Stream(Sentences()))
    observed = trained(Steps, [*callbacks, snapshots], {"val": val, "val_check_interval": 0.5})
    assert len(callback.history) == 5
    raw = Snapshots()
    trained(Steps, [raw], {"val_check_interval": 0.5})
    for entry, weights in zip(callback.history[1:], snapshots.weights, strict=True):
        assert_figures(entry, by_hand(Steps(), weights, given_batch()))
    not_averaged = by_hand(Steps(), raw.weights[-1], given_batch())
    assert not torch.equal(not_averaged["N-Enc"], callback.history[-1].by_example["N-Enc"])
    val = loader(Sentences() if known_length else Stream(Sentences()))
    assert_same(observed, trained(Steps, [EveryStep()], {"val": val, "val_check_interval": 0.5}))


def test_the_training_is_the_same_when_every_analysis_fails() -> None:
    def fails(module: Any, batch: Any) -> Tensor:
        torch.rand(3)
        module.model(batch["input_ids"])
        raise ArithmeticError("no")

    with said() as messages:
        observed = trained(Steps, [GlobEncCallback(**QUIET, forward=fails)], {})
    assert len(messages) == 1
    assert "forward= raised ArithmeticError: no" in messages[0]
    assert_same(observed, trained(Steps, [], {}))


# --- when things go wrong --------------------------------------------------------------------------------------------


class NoLogits(Steps):
    """Its forward gives no logits, and its model has no head."""

    def __init__(self) -> None:
        super().__init__(redrawn(BertModel(bert_config())).train())

    def loss_of(self, batch: Any) -> Tensor:
        hidden: Tensor = self.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return hidden.square().mean()


class NoDecision(NoLogits):
    """Its loss depends on no encoder, although its step calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.ones(3))

    def loss_of(self, batch: Any) -> Tensor:
        self.model(batch["input_ids"], batch["attention_mask"])
        return self.free.square().sum()


class TwoEncoders(Steps):
    """Calls two encoders in one forward pass."""

    def __init__(self) -> None:
        super().__init__(redrawn(BertModel(bert_config())).train())
        self.other = redrawn(BertModel(bert_config()), 2).train()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = [one(input_ids, attention_mask).last_hidden_state for one in (self.model, self.other)]
        return torch.cat(hidden, -1)[:, 0, :CLS]

    def loss_of(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"] % CLS)


class NoEncoder(Steps):
    """Has no encoder at all."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(60, 3))

    def forward(self, input_ids: Tensor, **others: Tensor) -> Tensor:
        return self.model(input_ids).mean(1)

    def loss_of(self, batch: Any) -> Tensor:
        return self(**batch).square().mean()


class NanWeights(Steps):
    """Its weights are NaN."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")


class NanHead(Steps):
    """The weights of its head are NaN."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.model.classifier.weight[0, 0] = float("nan")
        # The NaN of its gradients stays out of the encoder.
        self.model.bert.requires_grad_(False)


unlabelled = partial(Sentences, labels=False)

TROUBLE: dict[str, tuple[Callable[[], Steps], dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "decides nothing": (NoDecision, {}, {}, ModelCallError, "no loss that depends on an encoder"),
    "no encoder": (NoEncoder, {}, {}, GlobEncError, "there is no encoder in NoEncoder"),
    "NaN in the encoder": (NanWeights, {}, {}, GlobEncError, "NaN or infinity"),
    "NaN in the head": (NanHead, {}, {}, GlobEncError, "NaN or infinity"),
    "no labels": (
        NoLogits,
        {"target": "label", "forward": lambda module, batch: module.model(batch["input_ids"]).last_hidden_state[:, 0]},
        {"train": loader(unlabelled(16)), "val": loader(unlabelled())},
        ProbeError,
        "use target='predicted'",
    ),
    "labels out of range": (
        Steps,
        {"target": "label", "probe": {**given_batch(), "labels": torch.full((5,), 7)}, "forward": None},
        {},
        GlobEncError,
        "",
    ),
    "a target of the wrong shape": (
        Steps,
        {"target": lambda logits, batch: logits},
        {},
        ModelCallError,
        "must return one class index or one score per example",
    ),
    "special tokens unknown": (Steps, {"exclude_special_tokens": True}, {}, ProbeError, "give a tokenizer"),
    "ids out of range": (
        Steps,
        {"probe": {"input_ids": torch.full((2, 4), 10_000)}},
        {},
        GlobEncError,
        "index out of range",
    ),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_is_one_clear_warning_and_the_training_goes_on(kind: str) -> None:
    make, arguments, options, _, advice = TROUBLE[kind]
    callback = GlobEncCallback(**QUIET, **arguments)
    with said() as messages:
        trainer = fit(make(), callback, **options, max_epochs=2)
    (message,) = messages
    assert advice in message
    assert "The training goes on without these figures." in message
    assert trainer.global_step == 4
    assert callback.history == []
    assert not any("globenc" in name for name in trainer.callback_metrics)


class CastsInItsStep(OwnHead):
    """Opens an autocast of its own in its step."""

    def loss_of(self, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self(batch["input_ids"], batch["attention_mask"])
        # In float32 again, so that nothing tells of the coarser numbers that they were made of.
        return nn.functional.cross_entropy(logits.float(), batch["labels"])


class DetachesInItsStep(OwnHead):
    """Reads the encoder below no_grad in its step."""

    def loss_of(self, batch: Any) -> Tensor:
        with torch.no_grad():
            hidden = self.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return nn.functional.cross_entropy(self.head(hidden[:, 0]), batch["labels"])


@pytest.mark.parametrize("make", [CastsInItsStep, DetachesInItsStep])
def test_contexts_that_a_step_opens_stop_no_figures(make: type[Steps]) -> None:
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        fit(make(), callback, max_epochs=2)
    assert messages == []
    assert len(callback.history) == 3
    assert callback.history.about is not None
    assert callback.history.about.task == "classification"


NOTHING_REAL = Sentences(empty=range(20))

REFUSED: dict[str, tuple[Callable[[], Steps], dict[str, Any], dict[str, Any], str, int]] = {
    "every analysis fails": (NoEncoder, {}, {}, "there is no encoder", 0),
    "a forward raises": (Steps, {"forward": lambda module, batch: batch["absent"]}, {}, "forward= raised KeyError", 0),
    "no validation": (Steps, {}, {"limit_val_batches": 0}, "give the Trainer a validation loader", 0),
    "every analysis fails, without a sanity check": (
        NoEncoder,
        {},
        {"num_sanity_val_steps": 0},
        "there is no encoder",
        1,
    ),
    "no tokenizer": (Steps, {"probe": ["a text"]}, {}, "no tokenizer is within reach", 0),
    "no real token": (Steps, {}, {"val": loader(NOTHING_REAL)}, "no example with a real token", 1),
    "no validation reached": (
        Steps,
        {},
        {"check_val_every_n_epoch": 9, "num_sanity_val_steps": 0},
        "ended before its first validation",
        4,
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_reason_is_seen_where_warnings_are_switched_off(kind: str, tmp_path: Path) -> None:
    make, arguments, options, why, step = REFUSED[kind]
    callback, logger = GlobEncCallback(**QUIET, **arguments), TensorBoardLogger(str(tmp_path), name=None, version="0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(make(), callback, max_epochs=2, logger=logger, **options)
    assert trainer.global_step == 4
    assert callback.history == []
    assert callback.history.reasons[0][0] == step
    assert why in callback.history.reasons[0][1]
    log = events(logger.log_dir)
    texts = log.Tensors("globenc/about/text_summary")
    # Written once, however many validations failed.
    (text,) = (html.unescape(one.tensor_proto.string_val[0].decode()) for one in texts)
    assert "**No figures, and why**" in text
    assert why in text
    note = store.summary_from_bytes(log.Tensors("globenc/dashboard/summary/000000")[-1].tensor_proto.string_val[0])
    assert isinstance(note, store.Missing)
    assert why in str(note.reason)
    assert note.moment.step == step


def test_the_text_is_written_anew_once_there_are_figures(tmp_path: Path) -> None:
    def refuses_at_first(module: Any, batch: Any) -> Any:
        if module.trainer.global_step < 2:
            raise ArithmeticError("not yet")
        return module.model(**batch)

    callback = GlobEncCallback(given_batch(), forward=refuses_at_first, **QUIET)
    logger, memory = TensorBoardLogger(str(tmp_path), name=None, version="0"), Memory()
    with said() as messages:
        fit(Steps(), callback, logger=[logger, memory], max_epochs=2)
    log = events(logger.log_dir)
    first, second = (one.tensor_proto.string_val[0].decode() for one in log.Tensors("globenc/about/text_summary"))
    assert "not yet" in first
    assert "encoder" not in first
    assert "not yet" in second
    assert "| encoder |" in second
    assert callback.history.reasons == [(0, messages[0])]
    state = pickle.loads(pickle.dumps(callback.state_dict()))
    again = GlobEncCallback(given_batch(), forward=refuses_at_first, **QUIET)
    again.load_state_dict(state)
    assert again.history.reasons == [(0, messages[0])]
    del state["reasons"]
    again.load_state_dict(state)
    assert again.history.reasons == []


def test_the_reasons_of_one_training_are_not_those_of_the_next() -> None:
    callback = GlobEncCallback(**QUIET)
    with said():
        fit(NoEncoder(), callback)
    assert [step for step, _ in callback.history.reasons] == [0, 1]
    with said():
        fit(Steps(), callback)
    assert callback.history.reasons == []
    with said():
        fit(NoEncoder(), callback, limit_val_batches=0)
    assert len(callback.history.reasons) == 1


def test_a_huge_reason_is_cut() -> None:
    def fails(module: Any, batch: Any) -> Any:
        raise ArithmeticError("x" * 100_000)

    callback = GlobEncCallback(forward=fails, **QUIET)
    with said():
        fit(Steps(), callback)
    assert {len(text) for _, text in callback.history.reasons} == {4000}


def test_a_broken_logger_that_gets_reasons_stops_nothing_even_if_errors_are_to_be_raised() -> None:
    class Broken(Memory):
        """Takes no text."""

        def log_text(self, key: str, columns: Any, data: Any, step: int) -> None:
            raise OSError("disk full")

    callback = GlobEncCallback(on_error="raise", **QUIET)
    with said() as messages:
        trainer = fit(Steps(), callback, logger=Broken(), limit_val_batches=0)
    assert trainer.global_step == 2
    assert any("disk full" in message for message in messages)


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_stops_the_training_if_that_is_wanted(kind: str) -> None:
    make, arguments, options, error, _ = TROUBLE[kind]
    module = make()
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules()]
    trainable = [parameter.requires_grad for parameter in module.parameters()]
    with pytest.raises(error):
        fit(module, GlobEncCallback(**QUIET, **arguments, on_error="raise"), **options)
    assert [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules()] == hooks
    assert [parameter.requires_grad for parameter in module.parameters()] == trainable


def test_of_two_encoders_the_first_is_looked_at_and_that_is_said_once() -> None:
    module, callback, logger = TwoEncoders(), GlobEncCallback(heatmap_examples=1), Album()
    expected = attribute(module, Sentences().first(16), methods=METHODS).correlation
    with said() as messages:
        fit(module, callback, logger=logger, max_epochs=2)
    (message,) = messages
    assert "depends on 2 calls of an encoder" in message
    assert "write GlobEncCallback(encoder_call=1)" in message
    assert [entry.step for entry in callback.history] == [0, 1, 3]
    assert_figures(callback.history[0], expected)
    assert len(logger.tags()) == 5


class TwoHeads(OwnHead):
    """Two heads on one encoder, and one loss of both."""

    def __init__(self) -> None:
        super().__init__()
        self.other = redrawn(nn.Linear(16, 5), 4)

    def loss_of(self, batch: Any) -> Tensor:
        hidden = self.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
        first = nn.functional.cross_entropy(self.head(hidden), batch["labels"])
        return first + nn.functional.cross_entropy(self.other(hidden), batch["labels"])


def scores_of(module: TwoHeads, head: nn.Module, size: int = 16) -> Tensor:
    """(b,) the largest logit of a head, with no help of ours."""
    batch = Sentences().first(size)
    module.eval()
    with torch.no_grad():
        hidden = module.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
        return head(hidden).amax(1)


@pytest.mark.parametrize("second", [1, "other"])
def test_two_callbacks_show_two_decisions_of_one_module(second: int | str) -> None:
    module, callbacks = TwoHeads(), [GlobEncCallback(**QUIET), GlobEncCallback(**QUIET, decision=second)]
    expected = [scores_of(module, head) for head in (module.head, module.other)]
    with said() as messages:
        fit(module, *callbacks)
    assert messages == []
    assert not torch.allclose(*expected)
    for callback, scores in zip(callbacks, expected, strict=True):
        assert [entry.step for entry in callback.history] == [0, 1]
        torch.testing.assert_close(callback.history[0].score, scores, rtol=0, atol=1e-5)
    assert callbacks[0].state_key != callbacks[1].state_key


class TwoCalls(TwoEncoders):
    """Adds up what two encoders make of a text, and has a loss function."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = [one(input_ids, attention_mask).last_hidden_state for one in (self.model, self.other)]
        return (hidden[0] + hidden[1])[:, 0, :CLS]

    def loss_of(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"] % CLS)


def test_a_further_call_of_an_encoder_can_be_shown() -> None:
    first, second = GlobEncCallback(**QUIET), GlobEncCallback(**QUIET, encoder_call=1)
    with said() as messages:
        fit(TwoCalls(), first, second)
    assert [one.history.about.encoder for one in (first, second)] == ["model", "other"]
    assert first.state_key != second.state_key
    assert not torch.allclose(first.history[0].saliency[0], second.history[0].saliency[0])
    assert any("GlobEncCallback(encoder_call=1)" in message for message in messages)


def test_a_further_call_can_be_shown_where_the_module_is_called_itself() -> None:
    callback = GlobEncCallback(given_batch(), **QUIET, encoder_call=1)
    with said():
        fit(TwoCalls(), callback)
    assert callback.history.about.encoder == "other"


def test_a_decision_that_is_not_there_is_told() -> None:
    for arguments, words in (
        ({"decision": "absent"}, "decision='absent'"),
        ({"encoder_call": 3}, "choose from 0 to 0"),
    ):
        callback = GlobEncCallback(**QUIET, **arguments)
        with said() as messages:
            fit(TwoHeads(), callback)
        (message,) = messages
        assert words in message
        assert callback.history == []


class TakesIterators(Steps):
    """Takes its batches from the loader by itself, so that no hook is shown any of them before the step."""

    def validation_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        self.log("val_loss", self.loss_of(batch), batch_size=8)


@pytest.mark.parametrize("known_length", [True, False])
def test_a_step_that_takes_the_loader_itself(known_length: bool) -> None:
    callback, snapshots = GlobEncCallback(given_batch(), **QUIET), Snapshots()
    val = loader(Sentences() if known_length else Stream(Sentences()))
    module = TakesIterators()
    with said() as messages:
        fit(module, callback, snapshots, val=val, max_epochs=2)
    assert messages == []
    assert [entry.step for entry in callback.history] == [0, 1, 3]
    assert_figures(callback.history[-1], by_hand(Steps(), module.state_dict(), given_batch()))


def test_the_line_that_is_advised_for_tuples_works() -> None:
    ids_and_mask = {key: value for key, value in given_batch().items() if key != "labels"}
    callback = GlobEncCallback(
        **QUIET,
        probe=ids_and_mask,
        forward=lambda module, batch: module.model(batch["input_ids"], batch["attention_mask"]),
    )
    module = TakesTuples()
    expected = attribute(module, ids_and_mask, methods=METHODS, forward=lambda m, b: m.model(**b)).correlation
    data = {
        "train": loader(Sentences(16), collate_fn=as_tuples),
        "val": loader(Sentences(), collate_fn=as_tuples),
    }
    with said() as messages:
        fit(module, callback, **data)
    assert messages == []
    assert_figures(callback.history[0], expected)


def test_a_failed_validation_is_missing_and_the_next_one_is_analysed() -> None:
    logger, callback, spoils = Album(), GlobEncCallback(heatmap_examples=1), SpoilsOne(2)
    with said() as messages:
        trainer = fit(Steps(), spoils, callback, logger=logger, max_epochs=4)
    (message,) = messages
    assert "NonFiniteError" in message
    assert trainer.global_step == 8
    assert [entry.step for entry in callback.history] == [0, 1, 5, 7]
    assert logger.steps("val_loss") == [1, 3, 5, 7]
    assert logger.steps(MONITORED) == [0, 1, 5, 7]
    assert [step for tag, step, _ in logger.images if tag.startswith("globenc/filmstrip")] == [0, 1, 5, 7]
    heights = [len(one) for one in logger.pictures("globenc/filmstrip/example_00")]
    assert heights[3] - heights[2] == heights[1] - heights[0]
    assert heights[2] - heights[1] >= 2 * (heights[1] - heights[0])


def test_a_validation_that_fails_before_any_other_is_missing_too() -> None:
    def refuses_at_first(module: Any, batch: Any) -> Any:
        if module.trainer.global_step == 2:
            raise ArithmeticError("not yet")
        return module.model(**batch)

    logger, sound = Album(), Album()
    callback = GlobEncCallback(heatmap_examples=1, forward=refuses_at_first)
    with said() as messages:
        fit(Steps(), callback, logger=logger, max_epochs=2, num_sanity_val_steps=0)
    assert len(messages) == 1
    assert "not yet" in messages[0]
    assert [entry.step for entry in callback.history] == logger.steps(MONITORED) == [3]
    fit(Steps(), GlobEncCallback(heatmap_examples=1), logger=sound, max_epochs=2, num_sanity_val_steps=0)
    (picture,), (_, complete) = (one.pictures("globenc/filmstrip/example_00") for one in (logger, sound))
    assert len(picture) >= len(complete)


# --- history, copies and several trainings ---------------------------------------------------------------------------


def test_history_entries_can_be_read_both_ways() -> None:
    callback = GlobEncCallback(**QUIET)
    module = Steps()
    untrained = attribute(module, Sentences().first(16))
    fit(module, callback)
    entry = callback.history[0]
    assert (entry.step, entry["step"], entry.epoch, entry["epoch"]) == (0, 0, 0, 0)
    assert tuple(entry["correlation"]) == METHODS
    assert entry["correlation"] is entry.correlation
    assert entry.correlation["W"].shape == entry.n["W"].shape == entry.undefined["W"].shape == (3,)
    assert entry.by_example["W"].shape == (16, 3)
    assert torch.equal(entry.predicted, untrained.predicted)
    lengths = [len(ids) for ids in first_ids(Sentences(), 16)]
    for index, length in enumerate(lengths):
        row, saliency = entry.rows["N-Enc"][index], entry.saliency[index]
        assert row.shape == saliency.shape == (length,)
        expected = untrained.rows["N-Enc"][index, -1, :length]
        # Shares of the largest value, in 16 bits.
        torch.testing.assert_close(row / row.max(), expected / expected.max(), rtol=0, atol=1 / 131_070 + 1e-6)
        largest = float(untrained.saliency[index].max())
        expected = untrained.saliency[index, :length]
        torch.testing.assert_close(saliency, expected, rtol=1e-5, atol=largest * (1 / 131_070 + 1e-6))
    with pytest.raises(AttributeError):
        entry["nothing"]


def test_filmstrip_grows_by_a_row_at_every_validation() -> None:
    logger = Album()
    fit(Steps(), GlobEncCallback(heatmap_examples=1), logger=logger, max_epochs=4)
    heights = [len(one) for one in logger.pictures("globenc/filmstrip/example_00")]
    assert len(heights) == 5
    assert len(set(np.diff(heights))) == 1
    assert heights[1] > heights[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies_before_and_after_a_training_work(copied: Callable[[GlobEncCallback], GlobEncCallback]) -> None:
    torch.manual_seed(3)
    original = GlobEncCallback(given_batch(), **QUIET)
    copy_before = copied(original)
    torch.manual_seed(3)
    fit(Steps(), original)
    torch.manual_seed(3)
    fit(Steps(), copy_before)
    copy_after = copied(original)
    assert len(original.history) == len(copy_before.history) == len(copy_after.history) == 2
    for other in (copy_before, copy_after):
        assert other.history is not original.history
        for mine, its in zip(original.history, other.history, strict=True):
            assert_same(mine.by_example, its.by_example)
    assert probed_ids(copy_after) == probed_ids(original)
    module = Steps()
    fit(module, copy_after, max_epochs=1)
    assert len(original.history) == 2
    assert len(copy_after.history) > 2


class Unmovable(Steps):
    """Cannot be copied, and neither can anything that holds it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AssertionError("the module is copied")


def test_copies_made_during_and_after_a_training_leave_the_module_behind() -> None:
    copies: list[GlobEncCallback] = []

    class Copies(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            copies.append(copy.deepcopy(callback))
            copies.append(pickle.loads(pickle.dumps(callback)))

    callback = GlobEncCallback(**QUIET)
    fit(Unmovable(), callback, Copies(), num_sanity_val_steps=0)
    copies += [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]
    assert [len(one.history) for one in copies] == [1, 1, 1, 1]


def test_one_callback_in_two_trainings() -> None:
    callback, first, second = GlobEncCallback(given_batch(), **QUIET), Steps(), OwnHead()
    fit(first, callback)
    snapshots, logger = Snapshots(), Memory()
    untrained = copy.deepcopy(second.state_dict())
    with said() as messages:
        fit(second, callback, snapshots, logger=logger)
    assert [one for one in messages if "images" not in one] == []
    assert_figures(callback.history[-1], by_hand(OwnHead(), snapshots.weights[-1], given_batch()))
    # The second training's curve starts at its own untrained model.
    assert logger.steps(MONITORED) == [0, 1]
    expected = by_hand(OwnHead(), untrained, given_batch())["N-Enc"]
    assert logger.series(MONITORED)[0][1] == pytest.approx(float(expected.mean(0)[-1]), abs=1e-6)


def test_the_module_is_let_go_after_a_training() -> None:
    callback, module = GlobEncCallback(**QUIET), Steps()
    fit(module, callback)
    held = weakref.ref(module)
    del module
    gc.collect()
    assert held() is None
    assert len(callback.history) == 2


def test_the_module_is_let_go_after_a_training_that_broke() -> None:
    class Breaks(pl.Callback):
        def on_validation_end(self, *args: Any) -> None:
            if callback.history:
                raise KeyError("elsewhere")

    callback, module = GlobEncCallback(**QUIET), Steps()
    try:
        fit(module, callback, Breaks())
    except KeyError:
        broke = True
    held = weakref.ref(module)
    del module
    gc.collect()
    assert broke
    assert held() is None


def test_a_training_that_gave_no_probe_does_not_spoil_the_next() -> None:
    callback = GlobEncCallback(**QUIET)
    with said() as messages:
        fit(Steps(), callback, val=loader(NOTHING_REAL))
        assert callback.history == []
        fit(Steps(), callback)
    assert len(messages) == 1
    assert [entry.step for entry in callback.history] == [0, 1]


class LogsInForward(Steps):
    """A forward that logs when it is given labels, as some people write it."""

    def forward(self, **batch: Any) -> Any:
        output = self.model(**batch)
        self.log("seen_by_forward", output.logits.sum())
        return output

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(**batch).loss)


def test_what_the_modules_forward_logs_is_about_the_users_batches() -> None:
    without, with_us = Memory(), Memory()
    for logger, callbacks in ((without, []), (with_us, [GlobEncCallback(**QUIET)])):
        torch.manual_seed(0)
        fit(LogsInForward(), *callbacks, logger=logger)
    assert with_us.series("seen_by_forward") == without.series("seen_by_forward")
    assert with_us.series("val_loss") == without.series("val_loss")


class MeanPooled(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return self.head((hidden * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True))


class EarlyExit(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: list[Tensor] = []
        layer = self.model.encoder.layer[0]
        handle = layer.register_forward_hook(lambda module, args, output: found.append(output))
        self.model(input_ids, attention_mask)
        handle.remove()
        # Before transformers 5.0 a layer gives a tuple.
        return self.head((found[0][0] if isinstance(found[0], tuple) else found[0])[:, 0])


@pytest.mark.parametrize(
    ("module", "readout", "word"),
    [
        (MeanPooled, "cls", "readout='mean' compares"),
        (MeanPooled, "mean", None),
        (EarlyExit, "cls", "does not read the last hidden states"),
        (OwnHead, "cls", None),
    ],
)
def test_a_head_that_reads_something_else_is_said(module: Any, readout: str, word: str | None) -> None:
    with said() as messages:
        fit(module(), GlobEncCallback(**QUIET, readout=readout))
    assert [word in one for one in messages] == ([True] if word else [])
