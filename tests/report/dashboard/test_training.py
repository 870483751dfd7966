"""What trainings leave in their event files, read as TensorBoard reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter
from werkzeug.test import Client

from benchmarks.dashboard import application, reader
from globenc_lightning import METHODS, GlobEncCallback
from globenc_lightning.errors import GlobEncError
from globenc_lightning.report.dashboard import store
from globenc_lightning.report.publish import PublishError
from tests.neutrality import equal
from tests.report.dashboard.runs import CLASS_NAMES, ODD_NAME, real_run
from tests.report.dashboard.serving import ask
from tests.test_checkpoints import SCHEDULES, keeps_all, train
from tests.training import (
    ODD_WORDS,
    Album,
    Memory,
    OwnHead,
    Sentences,
    SpoilsOne,
    Steps,
    build_trainer,
    classifier,
    events,
    final_state,
    fit,
    loader,
    said,
    tokenizer,
)

FEW: dict[str, Any] = {"methods": ["W", "N-Enc"], "num_examples": 4, "heatmap_examples": 1}


def board(folder: Path, name: str = "run") -> TensorBoardLogger:
    return TensorBoardLogger(str(folder), name=None, version=name)


def shown(folder: Path) -> Client:
    return application(reader(folder))


def index(folder: Path, run: str = "run", tag: str = "globenc") -> Any:
    return ask(shown(folder), "index", run=run, tag=tag).content


def ours(folder: Path) -> dict[str, bytes]:
    """Tag -> record, of all that is in one run's files."""
    log = events(folder)
    names = [tag for tag in log.Tags()["tensors"] if store.parsed_tag(tag)]
    assert all(len(log.Tensors(tag)) == 1 for tag in names)
    return {tag: log.Tensors(tag)[0].tensor_proto.string_val[0] for tag in names}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GlobEncCallback]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, real_run(folder, ODD_NAME, heatmap_examples=2)


def test_the_tab_shows_what_the_history_holds(trained: tuple[Path, GlobEncCallback]) -> None:
    folder, callback = trained
    client, where = shown(folder), {"run": ODD_NAME, "tag": "globenc"}
    answer = ask(client, "index", **where).content
    assert answer["class_names"] == list(CLASS_NAMES)
    assert answer["messages"] == []
    assert callback.probe is not None
    assert [one["tokens"] for one in answer["sentences"]] == [list(tokens) for tokens in callback.probe.tokens]
    assert {token for one in answer["sentences"] for token in one["tokens"]} & set(ODD_WORDS)
    assert [one["special"] for one in answer["sentences"]] == [mark.tolist() for mark in callback.probe.special]
    assert [one["label"] for one in answer["sentences"]] == [int(row["labels"]) for row in callback.probe.rows]
    assert answer["settings"]["probe"] == callback.probe.fingerprint()
    assert [one["step"] for one in answer["validations"]] == [entry.step for entry in callback.history]
    assert [one["epoch"] for one in answer["validations"]] == [entry.epoch for entry in callback.history]
    assert len(callback.history) == 9
    for place, entry in enumerate(callback.history):
        assert answer["validations"][place]["predicted"] == entry.predicted.tolist()
        for method in METHODS:
            found = answer["correlation"][method]
            np.testing.assert_allclose(found["mean"][place], entry.correlation[method], atol=1e-5)
            assert found["n"][place] == entry.n[method].tolist()
        for sentence in range(6):
            detail = ask(client, "detail", index=place, sentence=sentence, **where).content
            np.testing.assert_allclose(
                detail["saliency"], entry.saliency[sentence] / entry.saliency[sentence].max(), atol=2e-5
            )
            # Every sentence has its maps, with or without pictures.
            assert set(detail["rollout"]) == set(METHODS)
            for method in METHODS:
                row = entry.rows[method][sentence]
                np.testing.assert_allclose(detail["rows"][method][-1], row / row.max(), atol=2e-5)
                # The first token's row of the last map is the row that is read out.
                np.testing.assert_allclose(detail["rollout"][method][0], row / row.max(), atol=2.5e-3)


def test_pictures_are_drawn_of_few_sentences_still(trained: tuple[Path, GlobEncCallback]) -> None:
    folder, _ = trained
    tags = events(folder / ODD_NAME).Tags()["images"]
    assert {tag for tag in tags if "example" in tag} == {
        f"globenc/{kind}/example_{example:02d}"
        for kind in ("heatmap/layers", "heatmap/last_layer", "filmstrip")
        for example in (0, 1)
    }


def test_both_records_of_a_validation_lie_at_its_step(trained: tuple[Path, GlobEncCallback]) -> None:
    folder, callback = trained
    log = events(folder / ODD_NAME)
    for ordinal, entry in enumerate(callback.history):
        for kind in ("summary", "detail"):
            (point,) = log.Tensors(store.tag("globenc", kind, ordinal))
            assert point.step == entry.step
            metadata = log.SummaryMetadata(store.tag("globenc", kind, ordinal))
            assert (metadata.plugin_data.plugin_name, metadata.data_class) == ("globenc", 2)


def test_a_failed_validation_is_missing_and_does_not_shift_the_others(tmp_path: Path) -> None:
    with said():
        callback = real_run(tmp_path, "run", spoiled=3, **FEW)
    answer = index(tmp_path)
    assert [one["missing"] for one in answer["validations"]] == [place == 3 for place in range(9)]
    assert [one["ordinal"] for one in answer["validations"]] == [*range(9)]
    steps = [one["step"] for one in answer["validations"]]
    missing, kept = callback.history.missing_steps, [entry.step for entry in callback.history]
    assert (steps[3], steps[:3] + steps[4:]) == (missing[0], kept)


def test_a_baseline_that_fails_is_missing(tmp_path: Path) -> None:
    module = Steps()
    kept = {name: value.clone() for name, value in module.state_dict().items()}

    class Repairs(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.load_state_dict(kept)

    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    with said():
        fit(module, GlobEncCallback(Sentences().first(3), **FEW), Repairs(), logger=board(tmp_path))
    answer = index(tmp_path)
    assert [(one["missing"], one["step"]) for one in answer["validations"]] == [(True, 0), (False, 1)]


def test_every_second_validation_has_no_gaps_between(tmp_path: Path) -> None:
    callback = real_run(tmp_path, "run", every_n_validations=2, **FEW)
    answer = index(tmp_path)
    assert [one["ordinal"] for one in answer["validations"]] == [*range(len(callback.history))]
    assert not any(one["missing"] for one in answer["validations"])


def test_two_callbacks_have_two_tags(tmp_path: Path) -> None:
    first, second = GlobEncCallback(**FEW), GlobEncCallback(**{**FEW, "methods": ["N"]}, readout="mean")
    fit(Steps(), first, second, logger=board(tmp_path), max_epochs=2)
    (run,) = ask(shown(tmp_path), "runs").content["runs"]
    assert [(one["tag"], one["validations"]) for one in run["callbacks"]] == [("globenc", 3), ("globenc_2", 3)]
    assert index(tmp_path)["methods"] == ["W", "N-Enc"]
    other = index(tmp_path, tag="globenc_2")
    assert (other["methods"], other["drawn_method"], other["settings"]["readout"]) == (["N"], "N", "mean")


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_resumed_training_goes_on_without_doubling_a_validation(kind: str, tmp_path: Path) -> None:
    checkpoints, options = SCHEDULES[kind]
    options = dict(options)
    settings = {**FEW, "every_n_validations": options.pop("every", 1)}
    train([GlobEncCallback(**settings), keeps_all(tmp_path, **checkpoints)], board(tmp_path, "whole"), **options)
    whole = ours(tmp_path / "whole")
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=").split("-")[0]))
    for path in (paths[0], paths[len(paths) // 2]):
        train([GlobEncCallback(**settings)], board(tmp_path, path.stem), path, **options)
        rest = ours(tmp_path / path.stem)
        # What the checkpoint holds is not written again, and what follows has the names that it would have had.
        count = len(torch.load(path, weights_only=True)["callbacks"][GlobEncCallback(**settings).state_key]["history"])
        assert set(rest) == {tag for tag in whole if (store.parsed_tag(tag) or ("", "", 0))[2] >= count}
        for tag, data in rest.items():
            if "/summary/" in tag:
                one, other = store.summary_from_bytes(data), store.summary_from_bytes(whole[tag])
                assert (one.moment.ordinal, one.moment.step) == (other.moment.ordinal, other.moment.step)


def test_resumed_into_the_same_folder_what_was_done_again_replaces_what_was_there(tmp_path: Path) -> None:
    callbacks = [GlobEncCallback(**FEW), keeps_all(tmp_path, every_n_epochs=1)]
    train(callbacks, board(tmp_path), max_epochs=3)
    before = index(tmp_path)["validations"]
    assert len(before) == 4
    path = sorted(tmp_path.glob("*.ckpt"), key=lambda one: torch.load(one, weights_only=True)["global_step"])[0]
    train([GlobEncCallback(**FEW)], board(tmp_path), path, max_epochs=2)
    after = index(tmp_path)
    assert [one["ordinal"] for one in after["validations"]] == [0, 1, 2]
    assert [one["step"] for one in after["validations"]] == [one["step"] for one in before[:3]]
    assert [one["wall_time"] > before[-1]["wall_time"] for one in after["validations"]] == [False, False, True]
    assert "resumed" in after["messages"][0]
    assert all(
        ask(shown(tmp_path), "detail", index=i, sentence=0, run="run", tag="globenc").code == 200 for i in (1, 2)
    )


def test_a_validation_on_its_own_after_the_training_is_added(tmp_path: Path) -> None:
    callback, logger = GlobEncCallback(**FEW), board(tmp_path)
    trainer = fit(Steps(), callback, logger=logger)
    trainer.validate(trainer.lightning_module, loader(Sentences()), verbose=False)
    answer = index(tmp_path)
    assert [one["ordinal"] for one in answer["validations"]] == [0, 1, 2]
    assert [one["step"] for one in answer["validations"]] == [entry.step for entry in callback.history]


def test_another_training_with_the_same_callback_starts_anew(tmp_path: Path) -> None:
    callback = GlobEncCallback(**FEW)
    for name in ("first", "second"):
        fit(Steps(), callback, logger=board(tmp_path, name))
    for name in ("first", "second"):
        assert [one["ordinal"] for one in index(tmp_path, name)["validations"]] == [0, 1]


def test_loggers_without_event_files_get_no_records(tmp_path: Path) -> None:
    loggers = [CSVLogger(str(tmp_path)), Memory(), Album(), board(tmp_path, "a"), board(tmp_path, "b")]
    with said() as messages:
        fit(Steps(), GlobEncCallback(**FEW), logger=loggers)
    assert [message for message in messages if "images" not in message] == []
    assert len(loggers[2].images) > 0
    runs = ask(shown(tmp_path), "runs").content["runs"]
    assert [one["run"] for one in runs] == ["a", "b"]
    assert [list(ours(tmp_path / name)) for name in "ab"] == [[*ours(tmp_path / "a")]] * 2


class Board(Memory):
    """A logger of somebody's own around a writer, which nobody knows by its class."""

    def __init__(self, writer: Any) -> None:
        super().__init__()
        self.writer = writer

    @property
    def experiment(self) -> Any:
        return self.writer


@pytest.mark.parametrize("package", ["torch.utils.tensorboard", "tensorboardX"])
def test_a_writer_is_known_by_what_it_can_do(package: str, tmp_path: Path) -> None:
    writer = pytest.importorskip(package).SummaryWriter(str(tmp_path / "run"))
    fit(Steps(), GlobEncCallback(**FEW), logger=Board(writer))
    writer.close()
    answer = index(tmp_path)
    assert [one["step"] for one in answer["validations"]] == [0, 1]
    assert ask(shown(tmp_path), "detail", index=1, sentence=3, run="run", tag="globenc").code == 200
    assert {len(events(tmp_path / "run").Tensors(tag)) for tag in ours(tmp_path / "run")} == {1}


def test_a_training_cut_short_writes_nothing(tmp_path: Path) -> None:
    fit(Steps(), GlobEncCallback(**FEW), logger=board(tmp_path), fast_dev_run=True)
    assert list(tmp_path.rglob("*tfevents*")) == []


def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file writer refuse whole events, and nothing else."""
    real = FileWriter.add_event

    def full(self: FileWriter, event: Any, *args: Any, **kwargs: Any) -> None:
        if any(value.metadata.plugin_data.plugin_name == "globenc" for value in event.summary.value):
            raise OSError("no space left")
        real(self, event, *args, **kwargs)

    monkeypatch.setattr(FileWriter, "add_event", full)


def test_a_full_disk_costs_the_tab_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch)
    callback = GlobEncCallback(**FEW)
    with said() as messages:
        trainer = fit(Steps(), callback, logger=board(tmp_path), max_epochs=2)
    (message,) = messages
    assert "no space left" in message
    assert trainer.global_step == 4
    assert [entry.step for entry in callback.history] == [0, 1, 3]
    # The figures are there, though the tab does not show them.
    assert callback.history.missing_steps == []
    assert events(tmp_path / "run").Tags()["images"]
    assert ours(tmp_path / "run") == {}


def test_a_full_disk_ends_the_training_if_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch)
    with pytest.raises(PublishError, match="no space left"):
        fit(Steps(), GlobEncCallback(**FEW, on_error="raise"), logger=board(tmp_path))


def test_a_failed_analysis_that_is_to_end_the_training_does_so(tmp_path: Path) -> None:
    with pytest.raises(GlobEncError, match="NaN"):
        fit(Steps(), GlobEncCallback(**FEW, on_error="raise"), SpoilsOne(1), logger=board(tmp_path))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({0: "bad", 1: "good", 2: "odd"}, ["bad", "good", "odd"]),
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, None),
        ({0: "a", 1: "b", 5: "c"}, None),
    ],
)
def test_class_names_are_the_model_s_own_or_none(
    names: dict[int, str], expected: list[str] | None, tmp_path: Path
) -> None:
    model = classifier()
    model.config.id2label = names
    fit(Steps(model), GlobEncCallback(**FEW), logger=board(tmp_path))
    assert index(tmp_path)["class_names"] == expected


def test_class_names_of_a_head_that_the_body_once_had_are_nobody_s(tmp_path: Path) -> None:
    module = OwnHead()
    module.model.config.id2label = {0: "negative", 1: "positive"}
    fit(module, GlobEncCallback(**FEW), logger=board(tmp_path))
    assert index(tmp_path)["class_names"] is None


@pytest.mark.parametrize(("package", "late"), [("torch.utils.tensorboard", 0), ("tensorboardX", 1)])
def test_records_are_on_the_disk_while_the_training_runs(package: str, late: int, tmp_path: Path) -> None:
    seen: list[int] = []

    class Looks(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(len(index(tmp_path)["validations"]))

    # Lightning's own logger would empty the buffers by itself.
    writer = pytest.importorskip(package).SummaryWriter(str(tmp_path / "run"), max_queue=1000)
    fit(Steps(), GlobEncCallback(**FEW), Looks(), logger=Board(writer), max_epochs=3)
    # tensorboardX does not wait for what its thread has not taken up yet.
    assert len(seen) == 3
    assert all(wanted - late <= found <= wanted for found, wanted in zip(seen, [2, 3, 4], strict=True))


def test_the_callback_leaves_the_users_writer_open(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    fit(Steps(), GlobEncCallback(**FEW), logger=Board(writer))
    writer.add_scalar("afterwards", 1.0, 7)
    writer.close()
    assert [point.step for point in events(tmp_path / "run").Scalars("afterwards")] == [7]


def test_a_probe_of_odd_words_and_its_labels(tmp_path: Path) -> None:
    text = " ".join(ODD_WORDS)
    callback = GlobEncCallback([text, "word0"], tokenizer=tokenizer(), methods=["N"], heatmap_examples=0)
    trainer = build_trainer([callback], logger=board(tmp_path))
    trainer.fit(Steps(), loader(Sentences(8, seed=1)), loader(Sentences()))
    first, second = index(tmp_path)["sentences"]
    assert first["tokens"] == ["[CLS]", *ODD_WORDS, "[SEP]"]
    assert (second["tokens"], second["special"]) == (["[CLS]", "word0", "[SEP]"], [True, False, True])
    assert (first["label"], second["label"]) == (None, None)


def test_a_training_that_writes_records_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    states = []
    for name, callbacks in (("without", []), ("with", [GlobEncCallback()])):
        pl.seed_everything(5, verbose=False)
        data = {"train": loader(Sentences(16, seed=1), shuffle=True), "val": loader(Sentences(), shuffle=True)}
        trainer = fit(Steps(), *callbacks, logger=board(tmp_path, name), max_epochs=2, **data)
        states.append(final_state(trainer))
    assert len(index(tmp_path, "with")["validations"]) == 3
    assert equal(*states)
    states[1]["weights"][next(iter(states[1]["weights"]))].view(-1)[0] += 1e-6
    assert not equal(*states)
