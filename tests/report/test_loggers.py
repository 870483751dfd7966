"""The real packages behind loggers, without a network: ``make loggers`` installs them, elsewhere these are skipped."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from globenc_lightning import GlobEncCallback
from tests.training import Album, Memory, Sentences, Steps, final_state, fit, loader, tokenizer

MONITORED = "globenc/spearman/N-Enc"
ADVICE = "is not installed: `make loggers` has an environment with it"


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A logger that writes into a folder, and the client that reads it."""
    _installed("mlflow")
    from pytorch_lightning.loggers import MLFlowLogger

    # MLflow 3 still has its file store, but wants to be asked for it.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    monkeypatch.chdir(tmp_path)
    return MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A logger that writes offline, into a folder."""
    package = _installed("wandb")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield WandbLogger(save_dir=str(tmp_path), offline=True)
    package.finish()


def _installed(name: str) -> Any:
    """The package; under ``GLOBENC_LOGGERS=required`` it may not be missing."""
    if os.environ.get("GLOBENC_LOGGERS") == "required":
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} {ADVICE}")


def train(*loggers: Any, **options: Any) -> tuple[GlobEncCallback, Any]:
    """Two epochs with a validation in each, and one before; the same every time."""
    torch.manual_seed(5)
    callback = GlobEncCallback(heatmap_examples=1, num_examples=4, tokenizer=tokenizer())
    trainer = fit(Steps(), callback, logger=list(loggers), max_epochs=2, train=loader(Sentences(16, seed=1)), **options)
    return callback, trainer


def album() -> Album:
    """What a TensorBoard would have got."""
    kept = Album()
    train(kept)
    return kept


def test_mlflow_gets_pictures_scalars_and_the_page(mlflow: Any, tmp_path: Path) -> None:
    callback, _ = train(mlflow)
    client, expected = mlflow.experiment, album()
    points = client.get_metric_history(mlflow.run_id, MONITORED)
    assert [point.step for point in points] == [0, 1, 3]
    means = [float(entry.correlation["N-Enc"][-1]) for entry in callback.history]
    assert [point.value for point in points] == pytest.approx(means)
    (folder,) = tmp_path.glob("mlruns/*/*/artifacts/images")
    pictures: dict[tuple[str, int], np.ndarray] = {}
    for path in folder.glob("*.png"):
        key, _, step, *_ = path.name.replace("%", "+").split("+")
        assert (key, int(step)) not in pictures
        pictures[key.replace("~", "/").replace("#", "/"), int(step)] = np.asarray(Image.open(path).convert("RGB"))
    assert set(pictures) == {(tag, step) for tag, step, _ in expected.images}
    for tag, step, picture in expected.images:
        np.testing.assert_array_equal(pictures[tag, step], picture)
    (about,) = tmp_path.glob("mlruns/*/*/artifacts/globenc/about.md")
    assert "| encoder | `model.bert` |" in about.read_text(encoding="utf-8")


def test_wandb_offline_gets_pictures_scalars_and_the_tables(wandb: Any, tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    callback, _ = train(wandb)
    wandb.experiment.finish()
    expected = album()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows: list[dict[str, Any]] = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    points = {int(row["trainer/global_step"]): row[MONITORED] for row in rows if MONITORED in row}
    means = {entry.step: float(entry.correlation["N-Enc"][-1]) for entry in callback.history}
    assert points == pytest.approx(means)
    folder = file.parent / "files"
    found: dict[tuple[str, int], np.ndarray] = {}
    for row in rows:
        step = int(row["trainer/global_step"])
        for key in [key.removesuffix("/_type") for key, value in row.items() if value == "images/separated"]:
            (name,) = row[f"{key}/filenames"]
            assert (key, step) not in found
            found[key, step] = np.asarray(Image.open(folder / name).convert("RGB"))
    assert set(found) == {(tag, step) for tag, step, _ in expected.images}
    for tag, step, picture in expected.images:
        np.testing.assert_array_equal(found[tag, step], picture)
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.rglob("*.table.json")}
    assert set(tables) == {"choices", "probe"}
    assert ["encoder", "model.bert"] in tables["choices"]["data"]
    assert len(tables["probe"]["data"]) == 4


def records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run's file: LevelDB's log format, blocks of 32 KB, after a header of seven bytes."""
    place, whole = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_training_with_us_is_the_same_with_each_logger(name: str, request: pytest.FixtureRequest) -> None:
    logger = request.getfixturevalue(name)
    _, trainer = train(logger)
    with_us = final_state(trainer)
    torch.manual_seed(5)
    tokenizer()
    trainer = fit(Steps(), logger=[logger], max_epochs=2, train=loader(Sentences(16, seed=1)))
    assert_same(with_us, final_state(trainer))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_fast_dev_run_leaves_nothing(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    train(request.getfixturevalue(name), fast_dev_run=True)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".wandb", ".md")]


def test_csv_gets_the_scalars_beside_others(tmp_path: Path) -> None:
    memory, logger = Memory(), CSVLogger(str(tmp_path))
    with pytest.warns(UserWarning, match="CSVLogger, Memory can show no images; it gets the scalars alone"):
        train(logger, memory)
    assert MONITORED in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert memory.steps(MONITORED) == [0, 1, 3]


def assert_same(left: Any, right: Any) -> None:
    from tests.neutrality import equal

    assert left.keys() == right.keys()
    for key in left:
        assert equal(left[key], right[key]), key
