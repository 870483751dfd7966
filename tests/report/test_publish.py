from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from globenc_lightning.report import filmstrip, publish


def events(folder: str | Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def tensorboard(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(folder), name="run", version="0")


class Failing:
    """A logger whose disk is full."""

    class experiment:  # noqa: N801
        @staticmethod
        def add_image(*args: Any, **kwargs: Any) -> None:
            raise OSError("disk full")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        raise OSError("disk full")


class Unreachable:
    """A logger whose server does not answer."""

    @property
    def experiment(self) -> Any:
        raise ConnectionError("no server")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        raise ConnectionError("no server")


PICTURE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_scalars_arrive_at_their_step_and_those_not_finite_are_left_out(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    values = {
        "a": 0.5, "tensor": torch.tensor(0.25), "array": np.float32(0.125), "nan": float("nan"),
        "inf": float("inf"), "none": torch.tensor(float("-inf")),
    }  # fmt: skip
    publish.log_scalars([logger], values, 17)
    logger.finalize("success")
    written = events(logger.log_dir)
    scalars = {tag: [(e.step, e.value) for e in written.Scalars(tag)] for tag in written.Tags()["scalars"]}
    scalars.pop("epoch", None)
    assert scalars == {"a": [(17, 0.5)], "tensor": [(17, 0.25)], "array": [(17, 0.125)]}


def test_nothing_finite_writes_nothing() -> None:
    publish.log_scalars([Failing()], {"a": float("nan")}, 0)
    publish.log_scalars([], {"a": 1.0}, 0)


def test_images_arrive_pixel_by_pixel(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    strip = filmstrip.filmstrip(np.eye(3), ["a", "b", "c"], [0, 5, 9], title="t")
    assert publish.log_images([logger], {"globenc/filmstrip/0": strip, "globenc/other": PICTURE}, 9) == []
    publish.log_images([logger], {"globenc/other": PICTURE}, 12)
    logger.finalize("success")
    written = events(logger.log_dir)
    assert sorted(written.Tags()["images"]) == ["globenc/filmstrip/0", "globenc/other"]
    assert [event.step for event in written.Images("globenc/other")] == [9, 12]
    for tag, expected in (("globenc/filmstrip/0", strip), ("globenc/other", PICTURE)):
        decoded = np.asarray(Image.open(io.BytesIO(written.Images(tag)[0].encoded_image_string)).convert("RGB"))
        np.testing.assert_array_equal(decoded, expected)


def test_only_a_real_image_writer_can_show_images(tmp_path: Path) -> None:
    assert publish.can_show_images(tensorboard(tmp_path))
    assert not publish.can_show_images(CSVLogger(str(tmp_path)))
    # `fast_dev_run` and other ranks get stand-ins that accept any call and drop it.
    assert not publish.can_show_images(DummyLogger())
    assert not publish.can_show_images(Unreachable())
    assert not publish.can_show_images(object())


def test_another_rank_has_nothing_to_draw_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not publish.can_show_images(tensorboard(tmp_path))


def test_loggers_without_images_are_named_and_the_others_written(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    unable = publish.log_images([CSVLogger(str(tmp_path)), logger, DummyLogger()], {"picture": PICTURE}, 3)
    assert unable == ["CSVLogger", "DummyLogger"]
    logger.finalize("success")
    assert [event.step for event in events(logger.log_dir).Images("picture")] == [3]


def test_a_failing_logger_does_not_keep_the_others_from_being_written(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    with pytest.raises(publish.PublishError, match="Failing: OSError: disk full; Unreachable: Conn") as caught:
        publish.log_images([Failing(), CSVLogger(str(tmp_path)), Unreachable(), logger], {"picture": PICTURE}, 1)
    assert [name for name, _ in caught.value.failures] == ["Failing", "Unreachable"]
    assert caught.value.without_images == ["CSVLogger"]
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(publish.PublishError, match="disk full"):
        publish.log_scalars([Failing(), logger], {"a": 1.0}, 1)
    logger.finalize("success")
    written = events(logger.log_dir)
    assert "a" in written.Tags()["scalars"]
    assert written.Tags()["images"] == ["picture"]


def test_one_logger_cannot_change_what_the_next_one_gets() -> None:
    class Keeping:
        def __init__(self) -> None:
            self.seen: dict[str, float] = {}

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.seen = dict(metrics)
            metrics["epoch"] = 1.0

    first, second = Keeping(), Keeping()
    publish.log_scalars([first, second], {"a": 1.0}, 0)
    assert second.seen == first.seen == {"a": 1.0}


def test_who_keeps_records(tmp_path: Path) -> None:
    class ImagesAlone:
        """Shows images, and has no event file."""

        class experiment:  # noqa: N801
            add_image = print

    class NoFile(ImagesAlone):
        """A writer whose file nobody can write to."""

        class experiment:  # noqa: N801
            add_image = print
            _get_file_writer = dict

    able = tensorboard(tmp_path)
    others = [CSVLogger(str(tmp_path)), DummyLogger(), ImagesAlone(), NoFile(), Unreachable(), object()]
    assert publish.can_keep_records(able)
    assert [publish.can_keep_records(other) for other in others] == [False] * len(others)
    publish.log_records([*others[:4], able], {"a": b"one", "b": b"two"}, 9)
    log = events(Path(able.log_dir))
    for tag, data in (("a", b"one"), ("b", b"two")):
        (point,) = log.Tensors(tag)
        assert (point.step, point.tensor_proto.string_val[0]) == (9, data)


def test_a_record_that_one_logger_refuses_reaches_the_others(tmp_path: Path) -> None:
    able = tensorboard(tmp_path)
    with pytest.raises(publish.PublishError, match="Unreachable: ConnectionError: no server"):
        publish.log_records([Unreachable(), able], {"a": b"one"}, 1)
    assert events(Path(able.log_dir)).Tags()["tensors"] == ["a"]
