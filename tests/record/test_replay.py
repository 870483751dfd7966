"""Figures of saved checkpoints are the very ones that their run recorded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from globenc_lightning import METHODS, ProbeSet, attribute, record_checkpoint
from globenc_lightning.errors import GlobEncError, ProbeError
from globenc_lightning.record.command import main
from globenc_lightning.record.replay import Replay
from globenc_lightning.record.writing import RunRecord
from tests.record.replayed import Classifier, Headed, Tuples, tables, train
from tests.training import Sentences, Steps, classifier, events, loader, tokenizer, word

ORDINARY = {"methods": ["W", "N-Enc"]}
SENTENCES = [" ".join(word(index) for index in (20 + one, 30, 25 + 2 * one, 40)[: 2 + one % 3]) for one in range(7)]


def assert_same_figures(left: Path, right: Path, other: str) -> None:
    """Every column of the run ``run`` in a record is that of another's, at 1e-6; which asked for it may differ."""
    for kind in ("tokens", "examples", "probe"):
        one, two = tables(left, "run", kind), tables(right, other, kind)
        assert list(one) == list(two)
        assert one
        for name, table in one.items():
            assert table.column_names == two[name].column_names
            for column in set(table.column_names) - {"validation"}:
                values, others = table[column].to_pylist(), two[name][column].to_pylist()
                if values and isinstance(values[0], float | list):
                    pairs = zip(values, others, strict=True)
                    for value, twin in pairs:
                        found = np.asarray([] if twin is None else twin, dtype=float)
                        np.testing.assert_allclose(
                            np.asarray([] if value is None else value, dtype=float), found, rtol=0, atol=1e-6
                        )
                else:
                    assert values == others, (kind, name, column)


def replayed(kind: str, folder: Path, *options: str) -> int:
    pattern = str(folder / "checkpoints" / "*.ckpt")
    module = f"tests.record.replayed:{kind}"
    return main(["replay", "--module", module, pattern, "--record", str(folder / "new"), "--run", "again", *options])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Classifier, {}),
        (Classifier, {"target": "label", "readout": "mean", "normalize": True, "methods": ["N-ResOut", "N-Enc"]}),
        (Classifier, {"exclude_special_tokens": True, "probe": SENTENCES, "tokenizer": tokenizer(), **ORDINARY}),
        (Classifier, {"probe": ProbeSet.from_batch(Sentences(9, seed=3).first(7)), **ORDINARY}),
        (Headed, ORDINARY),
        (Tuples, ORDINARY),
    ],
    ids=["all methods", "other settings", "texts", "rows", "a head of one's own", "tuples"],
)
def test_lightning_checkpoints_give_the_figures_of_their_run(
    tmp_path: Path, kind: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    history = train(kind(), tmp_path, **options)
    assert [entry.step for entry in history] == [1, 3, 5]

    assert replayed(kind.__name__, tmp_path) == 0, capsys.readouterr().err

    assert_same_figures(tmp_path / "own", tmp_path / "new", "again")
    entries = RunRecord(tmp_path / "new", "again").entries()
    assert [(entry.step, entry.epoch) for entry in entries] == [(entry.step, entry.epoch) for entry in history]
    for entry, own in zip(entries, history, strict=True):
        assert list(entry.correlation) == list(own.correlation)
        for method, values in own.correlation.items():
            torch.testing.assert_close(entry.correlation[method], values, rtol=0, atol=1e-6, equal_nan=True)
    for table in tables(tmp_path / "new", "again", "examples").values():
        assert not any(table["validation"].to_pylist())
    moved = [entry.correlation[method] for entry in (history[0], history[-1]) for method in ["N-Enc"]]
    assert not torch.allclose(*moved), "the training changed nothing, so that any checkpoint would do"


def test_a_loader_in_place_of_the_checkpoints_own_probe(tmp_path: Path) -> None:
    train(Classifier(), tmp_path, **ORDINARY)
    loaders = [[], ["--datamodule", "tests.record.replayed:Data"]]
    for number, options in enumerate(loaders):
        run = f"loader-{number}"
        told = ["replay", "--module", "tests.record.replayed:Classifier", str(tmp_path / "checkpoints/*.ckpt")]
        told += ["--record", str(tmp_path / "new"), "--run", run, "--probe", "loader"]
        assert main([*told, *options]) == 0
        assert_same_figures(tmp_path / "own", tmp_path / "new", run)


class SavesFolders(pl.Callback):
    """Saves the Hugging Face model after each validation, as its Trainer names folders."""

    def __init__(self, folder: Path, *, state: bool) -> None:
        self.folder, self.state = folder, state

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        # Numbers in the names do not sort as text does: 9 before 10.
        step = trainer.global_step + 7
        name = f"checkpoint-{step}" if not self.state else f"saved-{'cba'[trainer.current_epoch]}"
        pl_module.model.save_pretrained(self.folder / name)
        tokenizer().save_pretrained(self.folder / name)
        if self.state:
            told = {"global_step": step, "epoch": trainer.current_epoch + 0.5}
            (self.folder / name / "trainer_state.json").write_text(json.dumps(told))


@pytest.mark.parametrize(("family", "state"), [("bert", False), ("distilbert", True), ("albert", False)])
def test_hugging_face_folders_give_the_figures_of_their_run(tmp_path: Path, family: str, state: bool) -> None:
    labels = [0, 2, 1, 1, 0, 2]
    module = Steps(classifier(family))
    module.model.config.architectures = None
    probe = ProbeSet.from_texts(SENTENCES[:6], tokenizer(), labels)
    history = train(
        module, tmp_path, SavesFolders(tmp_path / "out", state=state), probe=probe, tokenizer=tokenizer(), **ORDINARY
    )
    file = tmp_path / "probe.jsonl"
    rows = zip(SENTENCES, [*labels, 1], strict=True)
    file.write_text("\n".join(json.dumps({"sentence": text, "class": label}) for text, label in rows))

    told = ["--text-column", "sentence", "--label-column", "class", "--num-examples", "6", "--methods", "W", "N-Enc"]
    pattern = str(tmp_path / "out" / ("saved-*" if state else "checkpoint-*"))
    assert main(["replay", "--model", family, pattern, "--record", str(tmp_path / "new"), "--probe", str(file), *told]) == 0

    entries = RunRecord(tmp_path / "new", "out").entries()
    assert [entry.step for entry in entries] == [9, 11, 13]
    for name in ("saliency", "score", "predicted", "label", "loss", *(f"rho/{m}/0{n}" for m in ("W", "N-Enc") for n in (1, 2, 3))):
        kind = "tokens" if name == "saliency" else "examples"
        own, new = tables(tmp_path / "own", "run", kind), tables(tmp_path / "new", "out", kind)
        for one, two in zip(own.values(), new.values(), strict=True):
            np.testing.assert_allclose(
                np.asarray(one[name].to_pylist(), float), np.asarray(two[name].to_pylist(), float), rtol=0, atol=1e-6
            )
    for entry, own_entry in zip(entries, history, strict=True):
        for method in ("W", "N-Enc"):
            torch.testing.assert_close(entry.correlation[method], own_entry.correlation[method], rtol=0, atol=1e-6)


def test_folders_of_hugging_faces_own_trainer(tmp_path: Path) -> None:
    found: dict[int, Any] = {}
    batch = tokenizer()(SENTENCES, padding=True, return_tensors="pt")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}

    class Watches(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
            was = model.training
            found[state.global_step] = attribute(model.eval(), given, methods=["N-Enc"]).correlation["N-Enc"]
            model.train(was)

    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        learning_rate=3e-3, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(classifier(), arguments, train_dataset=Sentences(16), callbacks=[Watches()]).train()
    tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "probe.tsv").write_text("text\n" + "\n".join(SENTENCES))

    told = ["replay", "--model", "bert", str(tmp_path / "out" / "checkpoint-*"), "--record", str(tmp_path / "new")]
    assert main([*told, "--probe", str(tmp_path / "probe.tsv"), "--tokenizer", str(tmp_path / "words")]) == 0

    entries = RunRecord(tmp_path / "new", "out").entries()
    assert [entry.step for entry in entries] == [*found] == [2, 4]
    for entry in entries:
        # (b, l) of the figures of each example; the entry holds their mean over examples.
        torch.testing.assert_close(
            entry.correlation["N-Enc"], found[entry.step].nanmean(0).to(entry.correlation["N-Enc"]), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["bert", "distilbert", "albert"])
def test_record_checkpoint_takes_texts_a_probe_a_batch_and_a_loader_and_leaves_the_model_as_it_was(
    tmp_path: Path, kind: str
) -> None:
    model = classifier(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [one.training for one in model.modules()]
    drawn = torch.get_rng_state()
    batch = Sentences(labels=False).first(5)
    texts = SENTENCES[:5]
    probes: dict[str, Any] = {
        "batch": batch,
        "loader": loader(Sentences(5, labels=False), batch_size=3),
        "probe": ProbeSet.from_batch(batch),
    }
    expected = attribute(model, batch, methods=METHODS)
    for run, probe in probes.items():
        entry = record_checkpoint(model, probe, step=3, folder=tmp_path, run=run, num_examples=5)
        for method in METHODS:
            mean = expected.correlation[method].nanmean(0).to(entry.correlation[method])
            torch.testing.assert_close(entry.correlation[method], mean, rtol=0, atol=1e-6)
        (table,) = tables(tmp_path, run, "examples").values()
        assert table["example"].to_pylist() == [0, 1, 2, 3, 4]
    record_checkpoint(model, texts, step=4, folder=tmp_path, run="texts", tokenizer=tokenizer())
    (probe_table,) = tables(tmp_path, "texts", "probe").values()
    assert probe_table["text"].to_pylist()[0] == texts[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [one.training for one in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(one.grad is None for one in model.parameters())


def test_an_analysis_of_the_same_step_is_replaced_and_others_stay(tmp_path: Path) -> None:
    batch = Sentences().first(3)
    first, second = Classifier(), Classifier()
    with torch.no_grad():
        for one in second.parameters():
            one.mul_(1.1)
    for step, module in ((1, first), (2, first), (2, second)):
        record_checkpoint(module, batch, step=step, folder=tmp_path, methods=["N-Enc"])
    one, two = RunRecord(tmp_path, "replay").entries()
    assert (one.step, two.step) == (1, 2)
    assert not torch.allclose(one.correlation["N-Enc"], two.correlation["N-Enc"])


@pytest.mark.parametrize(
    ("probe", "error"),
    [([], ProbeError), ([""], GlobEncError), ("one sentence", (ProbeError, ValueError)), (3, (GlobEncError, TypeError))],
    ids=["nothing", "an empty text", "texts without a tokenizer", "a number"],
)
def test_a_probe_that_cannot_be_used_is_refused_in_words(tmp_path: Path, probe: Any, error: Any) -> None:
    with pytest.raises(error, match=r"[a-z]+ [a-z]+"):
        record_checkpoint(Classifier(), probe, step=1, folder=tmp_path)
    assert not [*tmp_path.rglob("*.parquet")]


def test_a_model_that_gives_no_decision_is_refused_and_what_was_recorded_stays(tmp_path: Path) -> None:
    batch = Sentences().first(3)
    replay = Replay(tmp_path, "run", batch)
    replay.measure(Classifier(), 1)
    with pytest.raises(GlobEncError):
        replay.measure(nn.Linear(3, 3), 2)
    assert RunRecord(tmp_path, "run").steps() == [1]
    assert [entry.step for entry in replay.history] == [1]


def test_event_files_hold_the_figures_in_the_order_of_steps(tmp_path: Path) -> None:
    history = train(Classifier(), tmp_path, methods=["W", "N-Enc"])
    assert replayed("Classifier", tmp_path, "--events") == 0
    (folder,) = {file.parent for file in (tmp_path / "new" / "events").rglob("*tfevents*")}
    found = events(folder)
    points = found.Scalars("globenc/spearman/N-Enc")
    assert [one.step for one in points] == [entry.step for entry in history]
    for one, entry in zip(points, history, strict=True):
        assert one.value == pytest.approx(float(entry.correlation["N-Enc"][-1]), abs=1e-6)
