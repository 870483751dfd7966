"""What a training writes about itself: the page of its choices, the layout of its charts."""

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from globenc_lightning import METHODS, GlobEncCallback
from globenc_lightning.report import page, publish
from tests.neutrality import equal
from tests.report.test_page import custom_scalars, rendered
from tests.training import (
    Album,
    Memory,
    Sentences,
    SpoilsOne,
    Steps,
    build_trainer,
    events,
    final_state,
    fit,
    loader,
    said,
    tokenizer,
)

ABOUT = "globenc/about/text_summary"
FEW: dict[str, Any] = {"methods": ("W", "N-Enc"), "num_examples": 4, "heatmap_examples": 0}


def pages(folder: str | Path | None, tag: str = ABOUT) -> list[tuple[int, str]]:
    return [(one.step, one.tensor_proto.string_val[0].decode()) for one in events(folder).Tensors(tag)]


def run_of(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(folder), name="", version="run")


def checkpoint(folder: Path) -> str:
    return str(next(folder.glob("*.ckpt")))


def keep_last(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(str(folder), save_top_k=1, enable_version_counter=False)


def test_one_page_in_a_run_with_its_choices_and_sentences(tmp_path: Path) -> None:
    callback = GlobEncCallback(**FEW, tokenizer=tokenizer(), readout="mean")
    fit(Steps(), callback, logger=run_of(tmp_path), max_epochs=3)
    ((step, text),) = pages(tmp_path / "run")
    assert step == 0
    shown = rendered(text)
    told = {row[0]: row[1] for row in shown.rows}
    assert told["encoder"] == "model.bert"
    assert told["methods"] == "W, N-Enc"
    assert told["readout"].startswith("mean: ")
    assert callback.probe is not None
    assert told["probe"] == f"{callback.probe.fingerprint()}: the first 4 examples that the validation showed"
    labels = [int(row["labels"]) for row in callback.probe.rows]
    assert [row[:2] for row in shown.rows[-4:]] == [[str(number), str(label)] for number, label in enumerate(labels)]
    assert [len(row) for row in shown.code[-4:]] == [len(tokens) for tokens in callback.probe.tokens]


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        (["word1 word2", "word3"], "texts that were given"),
        (Sentences().first(2), "a batch or a ProbeSet that was given"),
    ],
)
def test_where_the_probe_came_from(given: Any, origin: str, tmp_path: Path) -> None:
    fit(Steps(), GlobEncCallback(given, **FEW, tokenizer=tokenizer()), logger=run_of(tmp_path))
    ((_, text),) = pages(tmp_path / "run")
    assert next(row for row in rendered(text).rows if row[0] == "probe")[1].endswith(f": {origin}")


def test_no_second_page_after_a_resume_into_the_same_run(tmp_path: Path) -> None:
    fit(Steps(), GlobEncCallback(**FEW), keep_last(tmp_path), logger=run_of(tmp_path), enable_checkpointing=True)
    trainer = build_trainer([GlobEncCallback(**FEW)], logger=run_of(tmp_path), max_epochs=2)
    trainer.fit(Steps(), loader(Sentences(16, seed=1)), loader(Sentences()), ckpt_path=checkpoint(tmp_path))
    assert len(pages(tmp_path / "run")) == 1


def test_another_page_after_a_resume_if_something_differs(tmp_path: Path) -> None:
    fit(
        Steps(),
        GlobEncCallback(**FEW, tokenizer=tokenizer()),
        keep_last(tmp_path),
        logger=run_of(tmp_path),
        enable_checkpointing=True,
    )
    stored = torch.load(checkpoint(tmp_path), weights_only=True)
    (key,) = (key for key in stored["callbacks"] if key.startswith("GlobEncCallback"))
    stored["callbacks"][key]["probe"]["tokens"][0][0] = "another"
    torch.save(stored, checkpoint(tmp_path))
    trainer = build_trainer([GlobEncCallback(**FEW, tokenizer=tokenizer())], logger=run_of(tmp_path), max_epochs=2)
    trainer.fit(Steps(), loader(Sentences(16, seed=1)), loader(Sentences()), ckpt_path=checkpoint(tmp_path))
    first, second = pages(tmp_path / "run")
    assert "another" not in first[1]
    assert "another" in second[1]


def test_a_page_in_the_new_run_after_a_resume_into_another(tmp_path: Path) -> None:
    fit(Steps(), GlobEncCallback(**FEW), keep_last(tmp_path), logger=run_of(tmp_path), enable_checkpointing=True)
    new = TensorBoardLogger(str(tmp_path), name="", version="new")
    trainer = build_trainer([GlobEncCallback(**FEW)], logger=new, max_epochs=2)
    trainer.fit(Steps(), loader(Sentences(16, seed=1)), loader(Sentences()), ckpt_path=checkpoint(tmp_path))
    assert [text for _, text in pages(tmp_path / "new")] == [text for _, text in pages(tmp_path / "run")]


def test_the_page_comes_with_the_first_reason_and_the_first_figures(tmp_path: Path) -> None:
    callback = GlobEncCallback(**FEW)
    fit(Steps(), callback, SpoilsOne(1), logger=run_of(tmp_path), max_epochs=2, num_sanity_val_steps=0)
    assert [entry.step for entry in callback.history] == [3]
    (failed, why), (succeeded, what) = pages(tmp_path / "run")
    assert (failed, succeeded) == (1, 3)
    assert "this run has no figures so far" in why
    assert "The probe" in what


def test_a_logger_that_refuses_the_page_keeps_it_from_nobody_else(tmp_path: Path) -> None:
    class Refuses(Album):
        def add_text(self, tag: str, text: str, step: int) -> None:
            raise OSError("disk full")

    callback = GlobEncCallback(**FEW)
    with said() as messages:
        trainer = fit(Steps(), callback, logger=[Refuses(), run_of(tmp_path)], max_epochs=2)
    assert trainer.global_step == 4
    assert len(messages) == 1
    assert "disk full" in messages[0]
    assert len(callback.history) == 3
    assert len(pages(tmp_path / "run")) == 1


class Restless(Memory):
    """Slow, draws random numbers, and fails every other time; takes pictures as Lightning's own loggers do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self._disturb()

    def log_text(self, key: str, columns: Any, data: Any, step: int) -> None:
        self._disturb()

    def _disturb(self) -> None:
        self.calls += 1
        time.sleep(0.05)
        random.random(), np.random.rand(), torch.rand(3)
        if self.calls % 2:
            raise OSError("no server")


def test_a_slow_and_failing_logger_does_not_change_the_training() -> None:
    torch.manual_seed(5)
    logger = Restless()
    with said() as messages:
        trainer = fit(Steps(), GlobEncCallback(heatmap_examples=1, num_examples=4), logger=logger, max_epochs=2)
    with_us = final_state(trainer)
    torch.manual_seed(5)
    without_us = final_state(fit(Steps(), logger=Memory(), max_epochs=2))
    assert logger.calls > 3
    assert all("no server" in message for message in messages)
    assert {key: equal(with_us[key], without_us[key]) for key in without_us} == dict.fromkeys(without_us, True)


def test_no_layout_unless_it_is_asked_for(tmp_path: Path) -> None:
    fit(Steps(), GlobEncCallback(**FEW), logger=run_of(tmp_path))
    assert "custom_scalars__config__" not in events(tmp_path / "run").Tags()["tensors"]


def test_one_layout_for_all_callbacks_that_ask_for_it(tmp_path: Path) -> None:
    callbacks = [
        GlobEncCallback(**FEW, custom_scalars=True),
        GlobEncCallback(**{**FEW, "methods": ("N",)}),
        GlobEncCallback(**{**FEW, "methods": ("N", "N-Res")}, custom_scalars=True),
    ]
    fit(Steps(), *callbacks, logger=run_of(tmp_path), max_epochs=2)
    charts, read = custom_scalars(tmp_path / "run")
    assert list(charts) == ["globenc", "globenc_3"]
    assert read(charts["globenc"]["last layer, all methods"]) == {"globenc/spearman/W", "globenc/spearman/N-Enc"}
    assert read(charts["globenc_3"]["N, all layers"]) == {
        f"globenc_3/spearman_by_layer/N/layer_{layer:02d}" for layer in (1, 2, 3)
    }
    for tag in ("globenc", "globenc_2", "globenc_3"):
        assert len(pages(tmp_path / "run", f"{tag}/about/text_summary")) == 1


def test_a_users_own_layout_stays_where_ours_is_not_asked_for(tmp_path: Path) -> None:
    logger = run_of(tmp_path)
    logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["val_loss"]]}})
    fit(Steps(), GlobEncCallback(**FEW), logger=logger)
    assert list(custom_scalars(tmp_path / "run")[0]) == ["mine"]


def test_fast_dev_run_and_csv_get_no_page(tmp_path: Path) -> None:
    fit(Steps(), GlobEncCallback(**FEW, custom_scalars=True), fast_dev_run=True, logger=run_of(tmp_path))
    assert not (tmp_path / "run").exists()
    fit(Steps(), GlobEncCallback(**FEW, custom_scalars=True), logger=CSVLogger(str(tmp_path)))


def test_a_wrong_custom_scalars_is_told() -> None:
    with pytest.raises(ValueError, match="custom_scalars must be True or False; got 'yes'"):
        GlobEncCallback(custom_scalars="yes")


def test_the_layout_names_every_method() -> None:
    assert len(page.layout({"globenc": page.Charted(METHODS)})["globenc"]) == 9
    assert not publish.log_layout(Album(), {"globenc": {}})
