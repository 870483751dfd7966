"""The console command ``globenc replay``: what it records, where it goes on, and what it says of bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas.testing
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from globenc_lightning import GlobEncCallback, attribute
from globenc_lightning.record.command import FAILED, main
from globenc_lightning.record.reading import Record
from globenc_lightning.record.replay import Replay
from globenc_lightning.record.writing import RunRecord
from tests.record.modules import NAME, Classifier, Data, NeedsMore
from tests.training import Sentences, classifier, events, fit, tokenizer

CLASSIFIER = f"{NAME}:Classifier"


class Run:
    """A training with a checkpoint after each of its three validations."""

    def __init__(self, folder: Path, module: Any, **settings: Any) -> None:
        self.folder, self.callback = folder, GlobEncCallback(**settings)
        keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_epochs=1, save_last=True)
        torch.manual_seed(0)
        fit(module, self.callback, keep, max_epochs=3, enable_checkpointing=True)
        self.pattern = str(folder / "*.ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("trained") / "a-run", Classifier(), num_examples=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folders of steps 9 and 10, with a tokenizer."""
    out = tmp_path_factory.mktemp("trained") / "out"
    for step in (10, 9):
        model = classifier(num_hidden_layers=2)
        with torch.no_grad():
            model.classifier.weight.mul_(step)
        model.save_pretrained(out / f"checkpoint-{step}")
        tokenizer().save_pretrained(out / f"checkpoint-{step}")
    return out


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.tsv"
    file.write_text("text\tlabel\nword1 word2 word3\t1\nword4 word5\t0\n", "utf-8")
    return file


def replay(*arguments: Any) -> int:
    return main(["replay", *map(str, arguments)])


def test_records_the_figures_of_the_run_in_the_order_of_steps(run: Run, tmp_path: Path) -> None:
    assert replay("--module", CLASSIFIER, run.pattern, "--record", tmp_path / "record", "--events") == 0
    entries = RunRecord(tmp_path / "record", "a-run").entries()
    expected = [one for one in run.callback.history if one.step > 0]
    assert [one.step for one in entries] == [one.step for one in expected] == [1, 3, 5]
    for one, other in zip(entries, expected, strict=True):
        for method in other.by_example:
            torch.testing.assert_close(
                one.by_example[method], other.by_example[method], atol=1e-6, rtol=0, equal_nan=True
            )
    about = Record.open(tmp_path / "record").about("a-run")
    assert about["hyperparameters"] == {"layers": 2, "classes": 3}
    written = events(tmp_path / "record" / "events" / "a-run").Scalars("globenc/spearman/N-Enc")
    assert [one.step for one in written] == [1, 3, 5]
    means = [float(one.correlation["N-Enc"][-1]) for one in expected]
    assert [one.value for one in written] == pytest.approx(means, abs=1e-6)


def test_goes_on_where_it_was_stopped(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = Replay.measure

    def stopped(self: Replay, model: Any, step: int, *others: Any) -> Any:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(step)
        return measure(self, model, step, *others)

    def counted(self: Replay, model: Any, step: int, *others: Any) -> Any:
        measured.append(step)
        return measure(self, model, step, *others)

    command = ("--module", CLASSIFIER, run.pattern, "--record", tmp_path)
    monkeypatch.setattr(Replay, "measure", stopped)
    assert replay(*command) == 130
    assert RunRecord(tmp_path, "a-run").steps() == [1]
    monkeypatch.setattr(Replay, "measure", counted)
    assert replay(*command) == 0
    assert measured == [1, 3, 5]
    assert replay(*command) == 0
    assert measured == [1, 3, 5]
    assert replay(*command, "--again") == 0
    assert measured == [1, 3, 5, 1, 3, 5]


@pytest.mark.slow
def test_goes_on_after_it_was_killed(run: Run, tmp_path: Path) -> None:
    command = ["--module", CLASSIFIER, run.pattern, "--record", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-m", "globenc_lightning.record.replay", *command],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    until = time.monotonic() + 300
    while not RunRecord(tmp_path / "killed", "a-run").steps() and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert replay(*command) == 0
    assert replay(*command[:-1], tmp_path / "whole") == 0
    for table in ("tokens", "examples"):
        one, other = (getattr(Record.open(tmp_path / name), table)("a-run").to_pandas() for name in ("killed", "whole"))
        # Another process may round another way.
        pandas.testing.assert_frame_equal(one, other, rtol=0, atol=1e-6)


def test_folders_of_hugging_face_are_recorded_with_a_file_of_texts(folders: Path, texts: Path, tmp_path: Path) -> None:
    assert (
        replay("--model", "bert", folders / "checkpoint-*", "--probe", texts, "--record", tmp_path / "r", "--run", "x")
        == 0
    )
    entries = RunRecord(tmp_path / "r", "x").entries()
    assert [one.step for one in entries] == [9, 10]
    batch = dict(tokenizer()(["word1 word2 word3", "word4 word5"], padding=True, return_tensors="pt"))
    for entry in entries:
        model = classifier(num_hidden_layers=2).eval()
        with torch.no_grad():
            model.classifier.weight.mul_(entry.step)
        for method, rho in attribute(model, batch).correlation.items():
            torch.testing.assert_close(entry.by_example[method], rho.double(), atol=1e-6, rtol=0, equal_nan=True)
    probe = Record.open(tmp_path / "r").probe("x").to_pandas()
    assert probe.groupby("example")["text"].first().tolist() == ["word1 word2 word3", "word4 word5"]
    assert probe.groupby("example")["label"].first().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.jsonl", '{"sentence": "word1 word2"}\n{"sentence": "word3"}\n', ["--text-column", "sentence"]),
        ("a.csv", 'text,label\n"word1 word2",1\nword3,0\n', []),
        ("a.tsv", "gold\ttext\n1\tword1 word2\n0\tword3\n", ["--label-column", "gold"]),
    ],
)
def test_texts_come_from_files_of_several_forms(
    name: str, content: str, options: list[str], folders: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    folder = folders / "checkpoint-9"
    assert replay("--model", "auto", folder, "--probe", tmp_path / name, "--record", tmp_path / "r", *options) == 0
    probe = Record.open(tmp_path / "r").probe("out").to_pandas()
    assert probe.groupby("example")["token"].agg(list).tolist() == [
        ["[CLS]", "word1", "word2", "[SEP]"],
        ["[CLS]", "word3", "[SEP]"],
    ]


@pytest.mark.parametrize(
    ("options", "seed"), [([], 0), (["--datamodule", f"{NAME}:Data"], 7)], ids=["module", "datamodule"]
)
def test_the_validation_loader_is_the_probe(options: list[str], seed: int, run: Run, tmp_path: Path) -> None:
    path = str(run.folder / "step=2.ckpt")
    command = ["--module", CLASSIFIER, path, "--record", tmp_path, "--probe", "loader", "--num-examples", "3"]
    assert replay(*command, *options, "--methods", "N-Enc") == 0
    (entry,) = RunRecord(tmp_path, "a-run").entries()
    module = Classifier.load_from_checkpoint(path, weights_only=True).eval()
    found = attribute(module.model, Sentences(seed=seed).first(3), methods=["N-Enc"]).correlation
    assert [*entry.by_example] == ["N-Enc"]
    torch.testing.assert_close(entry.by_example["N-Enc"], found["N-Enc"].double(), atol=1e-6, rtol=0)
    assert Data().seed == 7


@pytest.mark.parametrize(
    ("given", "masked"), [([], ["N-Enc", "W"]), (["W"], ["W"])], ids=["every method", "a named method"]
)
def test_masked_copies_are_made_where_they_are_asked_for(
    given: list[str], masked: list[str], run: Run, tmp_path: Path
) -> None:
    command = ["--module", CLASSIFIER, str(run.folder / "step=2.ckpt"), "--record", tmp_path, "--methods", "N-Enc", "W"]
    assert replay(*command, "--faithfulness", *given) == 0
    (entry,) = RunRecord(tmp_path, "a-run").entries()
    assert entry.faithfulness is not None
    assert [*entry.faithfulness.gain] == masked


def test_arguments_that_a_checkpoint_lacks_are_asked_for_and_taken(tmp_path: Path, capsys: Any) -> None:
    trained = Run(tmp_path / "more", NeedsMore(size=3), num_examples=3)
    command = ["--module", f"{NAME}:NeedsMore", trained.pattern, "--record", tmp_path / "record"]
    assert replay(*command) == FAILED
    said = capsys.readouterr().err
    assert "'size'" in said
    assert "--arguments" in said
    assert replay(*command, "--arguments", '{"size": 3}') == 0
    assert RunRecord(tmp_path / "record", "more").steps() == [1, 3, 5]


BAD = {
    "nothing matches": (["--module", CLASSIFIER, "{tmp}/no/*.ckpt"], "no checkpoint matches"),
    "no module": (["--module", "no_such_module:Lit", "{ckpt}"], "cannot be imported"),
    "no class": (["--module", f"{NAME}:NoSuch", "{ckpt}"], "there is no class 'NoSuch'"),
    "no colon": (["--module", NAME, "{ckpt}"], "package.module:Class"),
    "no LightningModule": (["--module", "torch.nn:Linear", "{ckpt}"], "no LightningModule"),
    "another model": (["--module", f"{NAME}:OwnHead", "{ckpt}", "--arguments", '{{"layers": 2}}'], "no checkpoint of"),
    "other sizes": (["--module", CLASSIFIER, "{ckpt}", "--arguments", '{{"classes": 5}}'], "size mismatch"),
    "arguments no JSON": (["--module", CLASSIFIER, "{ckpt}", "--arguments", "size=3"], "a mapping in JSON"),
    "truncated": (["--module", CLASSIFIER, "{truncated}"], "cannot be loaded with weights_only=True"),
    "pickle": (["--module", CLASSIFIER, "{pickle}"], "which are not unpickled"),
    "no Lightning checkpoint": (["--module", CLASSIFIER, "{plain}"], "holds no 'state_dict'"),
    "a folder": (["--module", CLASSIFIER, "{tmp}"], "is a folder"),
    "no probe": (["--module", CLASSIFIER, "{bare}"], "give --probe"),
    "no probe in a folder": (["--model", "bert", "{folder}"], "give --probe"),
    "another type": (["--model", "roberta", "{folder}", "--probe", "{texts}"], "'bert', and 'roberta' was asked for"),
    "no folder of a model": (["--model", "bert", "{tmp}", "--probe", "{texts}"], "config.json"),
    "pickled weights": (["--model", "bert", "{bin}", "--probe", "{texts}"], "has no model.safetensors"),
    "no head": (["--model", "bert", "{headless}", "--probe", "{texts}"], "would be drawn at random"),
    "truncated safetensors": (["--model", "bert", "{torn}", "--probe", "{texts}"], "cannot be loaded"),
    "no file of texts": (["--model", "bert", "{folder}", "--probe", "{tmp}/no.tsv"], "there is no file"),
    "no such column": (
        ["--model", "bert", "{folder}", "--probe", "{texts}", "--text-column", "a"],
        "it has text, label",
    ),
    "no loader": (["--model", "bert", "{folder}", "--probe", "loader"], "has no val_dataloader()"),
    "no tokenizer": (["--module", CLASSIFIER, "{ckpt}", "--probe", "{texts}"], "give --tokenizer"),
}


@pytest.fixture(scope="module")
def places(run: Run, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that cannot be replayed, by what is wrong with them."""
    import shutil

    tmp = tmp_path_factory.mktemp("bad")
    good = run.folder / "step=4.ckpt"
    held = torch.load(good, weights_only=True)
    (tmp / "truncated.ckpt").write_bytes(good.read_bytes()[:5000])
    torch.save({**held, "hyper_parameters": {"path": Path("a"), "run": run}}, tmp / "pickle.ckpt")
    torch.save({"weights": 1}, tmp / "plain.ckpt")
    torch.save({**held, "callbacks": {}}, tmp / "bare.ckpt")
    for name in ("bin-1", "torn-1", "headless-1"):
        shutil.copytree(folders / "checkpoint-9", tmp / name)
    (tmp / "bin-1" / "model.safetensors").rename(tmp / "bin-1" / "pytorch_model.bin")
    torn = tmp / "torn-1" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:3000])
    classifier(num_hidden_layers=2).bert.save_pretrained(tmp / "headless-1")
    config = json.loads((tmp / "headless-1" / "config.json").read_text("utf-8"))
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp / "headless-1" / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp / "texts.tsv").write_text("text\tlabel\nword1 word2\t1\nword3\t0\n", "utf-8")
    named = {name: str(tmp / f"{name}.ckpt") for name in ("truncated", "pickle", "plain", "bare")}
    named |= {name: str(tmp / f"{name}-1") for name in ("bin", "torn", "headless")}
    return {
        "tmp": str(tmp),
        "ckpt": str(good),
        "folder": str(folders / "checkpoint-9"),
        "texts": str(tmp / "texts.tsv"),
    } | named


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_message_and_leaves_the_record_alone(
    case: str, places: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    arguments, message = BAD[case]
    record = tmp_path / "record"
    assert replay(*(one.format(**places) for one in arguments), "--record", record) == FAILED
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("globenc replay: ")]
    assert len(said) == 1
    assert message in said[0]
    assert len(said[0]) < 600
    assert not [*record.rglob("*.parquet")]


def test_figures_of_another_probe_are_not_put_beside_those_of_a_run(run: Run, tmp_path: Path, capsys: Any) -> None:
    command = ["--module", CLASSIFIER, "--record", tmp_path, str(run.folder / "step=2.ckpt")]
    assert replay(*command) == 0
    later = [*command[:-1], str(run.folder / "step=4.ckpt")]
    assert replay(*later, "--probe", "loader", "--num-examples", "3") == FAILED
    assert "is of another probe" in capsys.readouterr().err
    assert RunRecord(tmp_path, "a-run").steps() == [1]
    assert len(Record.open(tmp_path).probe("a-run").to_pandas()["example"].unique()) == 4
    assert replay(*later) == 0


def test_checkpoints_of_two_trainings_in_one_folder_are_told_apart(run: Run, tmp_path: Path, capsys: Any) -> None:
    other = Run(tmp_path / "other", Classifier(), num_examples=2)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, path in (("a.ckpt", run.folder / "step=2.ckpt"), ("b.ckpt", other.folder / "step=4.ckpt")):
        (mixed / name).write_bytes(path.read_bytes())
    assert replay("--module", CLASSIFIER, mixed / "*.ckpt", "--record", tmp_path / "r") == FAILED
    assert "was saved with another probe" in capsys.readouterr().err
    assert RunRecord(tmp_path / "r", "mixed").steps() == [1]
    (mixed / "c.ckpt").write_bytes((mixed / "a.ckpt").read_bytes())
    (mixed / "b.ckpt").unlink()
    assert replay("--module", CLASSIFIER, mixed / "*.ckpt", "--record", tmp_path / "r") == 0
    assert "c.ckpt is left out" in capsys.readouterr().err
