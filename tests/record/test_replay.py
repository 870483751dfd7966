"""Saved checkpoints give the very figures that the run recorded, for Lightning and for Hugging Face."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import Trainer, TrainingArguments

from globenc_lightning import GlobEncCallback, ProbeSet, attribute, record_checkpoint
from globenc_lightning.errors import EmptyProbeError, GlobEncError, GlobEncWarning, ProbeError
from globenc_lightning.measurement import HistoryEntry
from globenc_lightning.record import checkpoints
from globenc_lightning.record.reading import Record
from globenc_lightning.record.replay import Replay
from globenc_lightning.record.writing import RunRecord
from tests.averaging import EMAWeightAveraging, averages
from tests.record.modules import Classifier, OwnHead
from tests.training import Sentences, classifier, fit, loader, tokenizer

CLOSE = {"atol": 1e-6, "rtol": 0.0}


def saved_run(folder: Path, module: Any, callback: GlobEncCallback, *others: Any, **options: Any) -> list[Path]:
    """Train, with a checkpoint after every validation."""
    keep = ModelCheckpoint(folder / "checkpoints", "{step}", save_top_k=-1, every_n_epochs=1)
    torch.manual_seed(0)
    fit(module, callback, *others, keep, **{"max_epochs": 3, "enable_checkpointing": True, **options})
    return sorted((folder / "checkpoints").glob("*.ckpt"))


def replayed(paths: Sequence[Path], kind: Any, folder: Path, **arguments: Any) -> list[HistoryEntry]:
    """Measure checkpoints as the command does: with the probe and the settings in them."""
    found = []
    for one in checkpoints.order_lightning(paths):
        state = checkpoints.callback_state(checkpoints.load_lightning(one.path))
        assert state is not None
        replay = Replay(folder, one.run, choices=checkpoints.choices_of(state))
        replay.restore(state)
        found.append(replay.measure(checkpoints.build(kind, one.path, arguments), one.step, one.epoch))
    return found


def assert_equal(found: Sequence[HistoryEntry], expected: Sequence[HistoryEntry]) -> None:
    assert [one.step for one in found] == [one.step for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.epoch == other.epoch
        assert [*one.by_example] == [*other.by_example]
        for method in one.by_example:
            torch.testing.assert_close(one.by_example[method], other.by_example[method], equal_nan=True, **CLOSE)
            for row, others in zip(one.rows[method], other.rows[method], strict=True):
                torch.testing.assert_close(row, others, **CLOSE)
        for row, others in zip(one.saliency, other.saliency, strict=True):
            torch.testing.assert_close(row, others, **CLOSE)
        torch.testing.assert_close(one.score, other.score, **CLOSE)
        assert one.predicted.tolist() == other.predicted.tolist()
        assert one.position == other.position


def assert_same_files(folder: Path, run: str, other: Path, name: str) -> None:
    """Every number of two runs, as their files hold them."""
    mine, theirs = Record.open(folder), Record.open(other)
    steps = mine.steps(run)
    for table in ("tokens", "examples"):
        left = getattr(mine, table)(run, steps=steps).to_pandas()
        right = getattr(theirs, table)(name, steps=steps).to_pandas()
        assert [*left] == [*right]
        for column in left:
            if column == "validation":
                continue
            if left[column].dtype.kind == "f":
                values = (torch.from_numpy(one[column].to_numpy(copy=True)) for one in (left, right))
                torch.testing.assert_close(*values, equal_nan=True, **CLOSE)
            elif column == "logits":
                for one, another in zip(left[column], right[column], strict=True):
                    assert one == pytest.approx(another, abs=1e-6)
            else:
                assert left[column].map(str).tolist() == right[column].map(str).tolist(), column


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Classifier, {}),
        (OwnHead, {"num_examples": 5}),
        (Classifier, {"target": "label", "normalize": True, "readout": "mean", "methods": ["N-Enc", "W"]}),
        (Classifier, {"probe": ["word1 word2 word3", "word4 word5"], "tokenizer": tokenizer()}),
    ],
    ids=["defaults", "own-head", "settings", "texts"],
)
@pytest.mark.parametrize("records", [False, True], ids=["history", "record"])
def test_checkpoints_of_a_run_give_the_figures_that_it_recorded(
    kind: Any, settings: dict[str, Any], records: bool, tmp_path: Path
) -> None:
    callback = GlobEncCallback(**settings, record=tmp_path / "record" if records else None)
    paths = saved_run(tmp_path / "run", kind(), callback)
    assert len(paths) == 3
    found = replayed(paths, kind, tmp_path / "replayed")
    expected = [one for one in callback.history if one.step > 0]
    assert_equal(found, expected)
    assert not torch.equal(found[0].by_example["N-Enc"], found[2].by_example["N-Enc"])
    if records:
        (run,) = Record.open(tmp_path / "record").runs
        assert_same_files(tmp_path / "replayed", "run", tmp_path / "record", run)


@averages
def test_averaged_weights_are_those_that_the_validation_saw(tmp_path: Path) -> None:
    callback = GlobEncCallback()
    paths = saved_run(tmp_path / "run", Classifier(), callback, EMAWeightAveraging(decay=0.5))
    assert_equal(replayed(paths, Classifier, tmp_path / "replayed"), callback.history[-3:])


@pytest.mark.parametrize("records", [False, True], ids=["history", "record"])
def test_checkpoints_of_training_steps_stand_at_the_steps_that_were_analysed(records: bool, tmp_path: Path) -> None:
    callback = GlobEncCallback(
        Sentences(seed=3).first(4), at_steps=[1, 3, 6], record=tmp_path / "record" if records else None
    )
    keep = ModelCheckpoint(tmp_path / "run", "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(Classifier(), callback, keep, train=loader(Sentences(32, seed=1), 4), enable_checkpointing=True)
    found = replayed(sorted((tmp_path / "run").glob("*.ckpt")), Classifier, tmp_path / "replayed")
    by_step = {one.step: one for one in found}
    expected = [one for one in callback.history if not one.validation]
    assert [one.step for one in expected] == [1, 3, 6]
    assert_equal([by_step[one.step] for one in expected], expected)


def test_a_checkpoint_of_no_callback_stands_at_the_step_at_which_its_validation_was_logged(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "run", "{step}", save_top_k=-1, every_n_epochs=1)
    fit(Classifier(), keep, max_epochs=2, enable_checkpointing=True)
    assert [one.step for one in checkpoints.order_lightning([*(tmp_path / "run").glob("*.ckpt")])] == [1, 3]


def test_folders_of_the_hugging_face_trainer_give_the_figures_of_their_weights(tmp_path: Path) -> None:
    model, probe = classifier(num_hidden_layers=2), Sentences(seed=3).first(5)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    weights = {}

    class Keeps(Trainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super()._save_checkpoint(*args, **kwargs)
            model.eval()
            weights[self.state.global_step] = attribute(model, probe)
            model.train()

    Keeps(model, arguments, train_dataset=Sentences(16, seed=1)).train()
    saved = checkpoints.order_folders([*(tmp_path / "out").glob("checkpoint-*")], "bert")
    assert [one.step for one in saved] == [2, 4]
    for one in saved:
        entry = record_checkpoint(
            checkpoints.build_folder(one.path), probe, step=one.step, folder=tmp_path / "record", run="out"
        )
        expected = weights[one.step]
        for method, rho in expected.correlation.items():
            torch.testing.assert_close(entry.by_example[method], rho.double(), equal_nan=True, **CLOSE)
    assert RunRecord(tmp_path / "record", "out").steps() == [2, 4]


def test_a_hugging_face_run_and_its_folders_have_the_same_record(tmp_path: Path) -> None:
    from pytorch_lightning import Callback

    from tests.training import Steps

    probe = Sentences(seed=3).first(5)
    callback = GlobEncCallback(probe, record=tmp_path / "record")

    class Saves(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                pl_module.model.save_pretrained(tmp_path / f"checkpoint-{callback.history[-1].step}")

    fit(Steps(), callback, Saves(), max_epochs=3)
    for one in checkpoints.order_folders([*tmp_path.glob("checkpoint-*")], "bert"):
        epoch = next(entry.epoch for entry in callback.history if entry.step == one.step)
        record_checkpoint(
            checkpoints.build_folder(one.path), probe, step=one.step, epoch=epoch, folder=tmp_path / "replayed"
        )
    (run,) = Record.open(tmp_path / "record").runs
    assert len(RunRecord(tmp_path / "replayed", "replay").steps()) == 3
    assert_same_files(tmp_path / "replayed", "replay", tmp_path / "record", run)


@pytest.mark.parametrize("form", ["batch", "texts", "probe", "loader"])
def test_a_model_with_a_head_takes_a_probe_in_every_form(form: str, tmp_path: Path) -> None:
    model, texts = classifier(num_hidden_layers=2).eval(), ["word1 word2 word3", "word4 word5"]
    batch = dict(tokenizer()(texts, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    rows = [{name: values[place] for name, values in batch.items()} for place in range(2)]
    given = {
        "batch": batch,
        "texts": texts,
        "probe": ProbeSet.from_texts(texts, tokenizer()),
        "loader": loader(rows, batch_size=2),  # type: ignore[arg-type]
    }[form]
    entry = record_checkpoint(model, given, step=3, folder=tmp_path, tokenizer=tokenizer() if form == "texts" else None)
    for method, rho in attribute(model, batch).correlation.items():
        torch.testing.assert_close(entry.by_example[method], rho.double(), equal_nan=True, **CLOSE)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_loader_gives_as_many_examples_as_are_asked_for_whatever_the_size_of_its_batches(
    size: int, tmp_path: Path
) -> None:
    model, sentences = classifier(num_hidden_layers=2), Sentences(8, empty=[0, 2], labels=False)
    entry = record_checkpoint(model, loader(sentences, size), step=3, folder=tmp_path, num_examples=4)
    rows = [sentences[place] for place in (1, 3, 4, 5)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for method, rho in attribute(model, batch).correlation.items():
        torch.testing.assert_close(entry.by_example[method], rho.double(), equal_nan=True, **CLOSE)


def test_a_loader_whose_batches_do_not_fit_together_says_how_many_examples_were_taken(tmp_path: Path) -> None:
    rows: list[Any] = [Sentences(labels=place < 2)[place] for place in range(4)]
    with pytest.warns(GlobEncWarning, match="2 of 4 examples"):
        entry = record_checkpoint(classifier(), loader(rows, 2), step=3, folder=tmp_path, num_examples=4)  # type: ignore[arg-type]
    assert len(entry.saliency) == 2


@pytest.mark.parametrize("empty", [[0, 1, 2], []], ids=["padding alone", "no rows"])
def test_a_loader_without_a_real_token_is_refused(empty: list[int], tmp_path: Path) -> None:
    given = loader(Sentences(len(empty), empty=empty, labels=False), 2)
    with pytest.raises(EmptyProbeError, match="the probe is empty"):
        record_checkpoint(classifier(), given, step=3, folder=tmp_path)
    assert not [*tmp_path.rglob("*.parquet")]


def test_what_is_measured_is_left_as_it_was(tmp_path: Path) -> None:
    module = Classifier()
    module.eval()
    module.model.encoder = getattr(module.model, "encoder", None) or module.model.bert.encoder
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes, numbers, drawn = [one.training for one in module.modules()], torch.get_rng_state(), random.getstate()
    record_checkpoint(module, Sentences().first(3), step=1, folder=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert modes == [one.training for one in module.modules()]
    assert torch.equal(numbers, torch.get_rng_state())
    assert drawn == random.getstate()
    assert all(one.grad is None for one in module.parameters())


def test_a_step_is_replaced_and_what_is_told_besides_is_kept(tmp_path: Path) -> None:
    first, second = classifier(num_hidden_layers=2), classifier(num_hidden_layers=2)
    with torch.no_grad():
        second.classifier.weight.mul_(-1)
    probe = Sentences().first(3)
    for model in (first, second):
        record_checkpoint(model, probe, step=5, folder=tmp_path, run="a", extra={"seed": 4})
    (entry,) = RunRecord(tmp_path, "a").entries()
    torch.testing.assert_close(entry.by_example["N-Enc"], attribute(second.eval(), probe).correlation["N-Enc"].double())
    about = json.loads((tmp_path / "about" / "a.json").read_text("utf-8"))
    assert about["seed"] == 4


def test_a_probe_of_another_kind_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for given, error in ((["one text"], GlobEncError), ({}, (GlobEncError, ValueError)), (None, ProbeError)):
        with pytest.raises(error):
            record_checkpoint(classifier(), given, step=1, folder=tmp_path / "record")
    assert not [*(tmp_path / "record").rglob("*.parquet")]


def test_the_choices_of_a_callback_come_back_for_a_replay() -> None:
    asked = {"methods": ["N-Enc", "W"], "references": ["saliency", "HTA"], "signed": True, "aggregation": "maxflow"}
    callback = GlobEncCallback(**asked, faithfulness=["W"])
    made_of = callback._choices.made_of("validation")
    choices = checkpoints.choices_of({"made_of": made_of})
    assert (choices.settings.references, choices.settings.signed, choices.settings.aggregation) == (
        ("saliency", "HTA"),
        True,
        "maxflow",
    )
    assert choices.masked_methods == ("W",)
    # Other methods were asked for: nothing is masked for one that is not computed.
    assert checkpoints.choices_of({"made_of": made_of}, methods=["N-Enc"]).masked_methods == ()
    chosen = checkpoints.choices_of({"made_of": made_of}, references=["integrated gradients"], aggregation="rollout")
    assert chosen.settings.further_references == ("integrated gradients",)
    assert chosen.settings.aggregation == "rollout"
    # A callback of an earlier version had none of these.
    plain = checkpoints.choices_of({"made_of": {"methods": ["W"], "target": "predicted"}})
    assert (plain.settings.references, plain.settings.signed, plain.masked_methods) == (("saliency",), False, ())


@pytest.mark.parametrize("given", [["W"], True, False], ids=["one method", "all", "none"])
def test_checkpoints_are_masked_as_in_the_training(given: Any, tmp_path: Path) -> None:
    callback = GlobEncCallback(num_examples=4, methods=["N-Enc", "W"], faithfulness=given, tokenizer=tokenizer())
    paths = saved_run(tmp_path, Classifier(), callback)
    found = replayed(paths, Classifier, tmp_path / "record")
    assert len(found) == 3
    expected = callback.history[-3:]
    assert [one.step for one in found] == [one.step for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.faithfulness is None) == (other.faithfulness is None) == (given is False)
        if one.faithfulness is None or other.faithfulness is None:
            continue
        assert [*one.faithfulness.gain] == (["W"] if given == ["W"] else ["N-Enc", "W"])
        torch.testing.assert_close(one.faithfulness.span, other.faithfulness.span, **CLOSE)
        for figure in ("gain", "log_odds"):
            torch.testing.assert_close(
                getattr(one.faithfulness, figure), getattr(other.faithfulness, figure), equal_nan=True, **CLOSE
            )
    [run] = (tmp_path / "record" / "about").glob("*.json")
    assert ("faithfulness" in json.loads(run.read_text("utf-8"))["recorded"]) == (given is not False)


def test_a_checkpoint_is_recorded_with_faithfulness(tmp_path: Path) -> None:
    probe, model = Sentences().first(3), classifier(num_hidden_layers=2)
    methods = ["N-Enc", "W"]
    entry = record_checkpoint(model, probe, step=1, folder=tmp_path, methods=methods, faithfulness=["W"])
    assert entry.faithfulness is not None
    assert [*entry.faithfulness.gain] == ["W"]
    assert "gain/W" in Record.open(tmp_path).columns("replay", "examples")


def test_a_checkpoint_is_recorded_with_another_aggregation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = classifier()
    texts = ["word1 word2 word3", "word4 word5"]
    probe = ProbeSet.from_texts(texts, tokenizer())
    found = {
        name: record_checkpoint(model, probe, step=1, folder=tmp_path, run=name, methods=["N-Enc"], aggregation=name)
        for name in ("rollout", "maxflow")
    }
    assert Record.open(tmp_path).about("maxflow")["about"]["aggregation"] == "maxflow"
    rows = [entry.rows["N-Enc"][0] for entry in found.values()]
    assert not torch.allclose(rows[0] / rows[0].max(), rows[1] / rows[1].max())


def test_what_was_asked_for_besides_is_replayed(tmp_path: Path) -> None:
    asked = {"references": ["saliency", "HTA"], "signed": True, "faithfulness": ["N-Enc"]}
    callback = GlobEncCallback(num_examples=6, methods=["N-Enc", "N"], tokenizer=tokenizer(), **asked)
    paths = saved_run(tmp_path, Classifier(), callback)
    found = replayed(paths, Classifier, tmp_path / "record")
    expected = [entry for entry in callback.history if entry.step > 0]
    assert_equal(found, expected)
    for one, other in zip(found, expected, strict=True):
        assert one.faithfulness is not None
        assert other.faithfulness is not None
        assert [*one.faithfulness.gain] == ["N-Enc"]
        torch.testing.assert_close(one.faithfulness.gain, other.faithfulness.gain, equal_nan=True, **CLOSE)
        torch.testing.assert_close(one.reference_rho, other.reference_rho, equal_nan=True, **CLOSE)
        torch.testing.assert_close(one.left_out, other.left_out, **CLOSE)
    told = Record.open(tmp_path / "record").about(checkpoints.order_lightning(paths)[0].run)["about"]
    assert (told["references"], told["faithfulness"]) == (["saliency", "HTA"], ["N-Enc"])
