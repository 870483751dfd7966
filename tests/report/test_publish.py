from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyExperiment, DummyLogger
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard as torch_tensorboard

from globenc_lightning.report import filmstrip, publish


def events(folder: str | Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def tensorboard(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(folder), name="run", version="0")


class Answers:
    """A logger with some methods, and an experiment with some."""

    def __init__(self, experiment: Any = None, **methods: Any) -> None:
        self.experiment = experiment
        for name, method in methods.items():
            setattr(self, name, method)


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


def shown_in(folder: str | Path, tag: str) -> tuple[str, np.ndarray, Any]:
    """How the newest picture of a tag is encoded, its pixels, and its step, height and width as they were written."""
    (*_, event) = events(folder).Images(tag)
    image = Image.open(io.BytesIO(event.encoded_image_string))
    return image.mode, np.asarray(image.convert("RGB")), (event.step, event.height, event.width)


FEW_COLOURS = (PICTURE // 64 * 64).astype(np.uint8)


def own_writer(package: str, folder: Path) -> Any:
    if package == "torch":
        return torch_tensorboard.SummaryWriter(str(folder))
    return pytest.importorskip("tensorboardX").SummaryWriter(str(folder))


@pytest.mark.parametrize("package", ["torch", "tensorboardX"])
def test_pictures_go_into_event_files_with_a_table_of_colours(package: str, tmp_path: Path) -> None:
    writer = own_writer(package, tmp_path)
    assert publish.log_images([Answers(writer)], {"few": FEW_COLOURS, "many": PICTURE}, 9) == []
    writer.close()
    for tag, expected, mode in (("few", FEW_COLOURS, "P"), ("many", PICTURE, "RGB")):
        found, pixels, written = shown_in(tmp_path, tag)
        assert (found, written) == (mode, (9, *PICTURE.shape[:2]))
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("package", ["torch", "tensorboardX"])
def test_an_event_with_a_picture_is_like_the_one_that_add_image_writes(package: str, tmp_path: Path) -> None:
    theirs, ours = own_writer(package, tmp_path / "theirs"), own_writer(package, tmp_path / "ours")
    theirs.add_image("tag", FEW_COLOURS, 9, dataformats="HWC")
    publish.log_images([Answers(ours)], {"tag": FEW_COLOURS}, 9)
    found = []
    for writer, folder in ((theirs, tmp_path / "theirs"), (ours, tmp_path / "ours")):
        writer.close()
        (file,) = folder.glob("*tfevents*")
        (event,) = [one for one in event_file_loader.LegacyEventFileLoader(str(file)).Load() if one.summary.value]
        (value,) = event.summary.value
        pixels = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)).convert("RGB"))
        value.image.ClearField("encoded_image_string")
        found.append((event.step, str(value), pixels.tobytes()))
    assert found[0] == found[1]


def test_a_writer_whose_add_image_does_more_gets_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that overrides it, a package that replaces it, and Comet behind tensorboardX."""
    seen: list[Any] = []

    class Watching(torch_tensorboard.SummaryWriter):
        def add_image(self, tag: str, img_tensor: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(("class", img_tensor))
            super().add_image(tag, img_tensor, *args, **kwargs)

    inherited = Watching(str(tmp_path / "class"))
    replaced = torch_tensorboard.SummaryWriter(str(tmp_path / "instance"))
    monkeypatch.setattr(replaced, "add_image", lambda tag, picture, *_, **__: seen.append(("instance", picture)))
    comet = own_writer("tensorboardX", tmp_path / "comet")
    comet._comet_config = {"disabled": False}

    def send(data: bytes, tag: str, step: int) -> None:
        seen.append(("comet", Image.open(io.BytesIO(data))))

    sent = SimpleNamespace(log_image_encoded=send, end=lambda: None)
    monkeypatch.setattr(comet, "_comet_logger", sent)
    writers = [inherited, replaced, comet]
    assert publish.log_images([Answers(writer) for writer in writers], {"tag": FEW_COLOURS}, 9) == []
    for writer in (inherited, comet):
        writer.close()
    assert [name for name, _ in seen] == ["class", "instance", "comet"]
    assert all(np.array_equal(np.asarray(picture), FEW_COLOURS) for _, picture in seen)
    np.testing.assert_array_equal(shown_in(tmp_path / "class", "tag")[1], FEW_COLOURS)


def test_several_event_files_get_one_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, asked = publish.png.encoded, []
    monkeypatch.setattr(publish.png, "encoded", lambda picture: asked.append(1) or encoded(picture))
    loggers = [TensorBoardLogger(str(tmp_path), name=name, version="0") for name in ("a", "b", "c")]
    pictures = {"x": FEW_COLOURS, "y": PICTURE}
    assert (
        publish.log_images([loggers[0], Answers(log_image=lambda key, images, step: None), *loggers[1:]], pictures, 1)
        == []
    )
    for logger in loggers:
        logger.finalize("success")
        for tag, expected in pictures.items():
            np.testing.assert_array_equal(shown_in(logger.log_dir, tag)[1], expected)
    assert len(asked) == 2


def test_only_a_real_image_writer_can_show_images(tmp_path: Path) -> None:
    assert publish.can_show_images(tensorboard(tmp_path))
    assert not publish.can_show_images(CSVLogger(str(tmp_path)))
    # `fast_dev_run` and other ranks get stand-ins that accept any call and drop it.
    assert not publish.can_show_images(DummyLogger())
    assert not publish.can_show_images(Unreachable())
    assert not publish.can_show_images(object())


def test_another_rank_has_nothing_to_draw_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def stand_in(package: str, monkeypatch: pytest.MonkeyPatch, base: type, **classes: Any) -> Any:
    """An object whose class comes from a package of this name, which has these classes."""
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**classes))
    return type("Run", (base,), {"__module__": f"{package}.sdk.run"})()


def same_picture(shown: Any) -> bool:
    return np.array_equal(np.asarray(shown), PICTURE)


def test_a_logger_with_the_public_method_of_lightnings_loggers() -> None:
    """As in WandbLogger: ``log_image(key, images, step=None, **kwargs)``, behind ``rank_zero_only``."""
    seen: list[tuple[str, Any, int]] = []

    @rank_zero_only
    def log_image(key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert isinstance(images, list)
        seen.extend((key, one, step or 0) for one in images)

    assert publish.log_images([Answers(log_image=log_image)], {"a": PICTURE, "b": PICTURE}, 7) == []
    assert [(key, step) for key, _, step in seen] == [("a", 7), ("b", 7)]
    assert all(same_picture(one) for _, one, _ in seen)


def test_another_method_of_that_name_is_not_called() -> None:
    def log_image(name: str, picture: Any) -> None:
        raise AssertionError("called")

    assert publish.log_images([Answers(log_image=log_image)], {"a": PICTURE}, 7) == ["Answers"]


def test_a_logger_with_both_protocols_gets_each_picture_once() -> None:
    seen = []

    def add_image(tag: str, picture: Any, step: int, dataformats: str) -> None:
        seen.append((tag, step, dataformats))

    def log_image(key: str, images: list[Any], step: int) -> None:
        raise AssertionError("twice")

    logger = Answers(SimpleNamespace(add_image=add_image, log_image=log_image), log_image=log_image)
    assert publish.log_images([logger], {"a": PICTURE}, 7) == []
    assert seen == [("a", 7, "HWC")]


def test_mlflow_by_its_signature() -> None:
    """As in mlflow 3.17: ``MlflowClient.log_image`` and ``log_text``."""
    seen: list[Any] = []

    class Client:
        def log_image(
            self, run_id: str, image: Any, artifact_file: Any = None, key: Any = None, step: Any = None,
            timestamp: Any = None, synchronous: Any = None,
        ) -> None:  # fmt: skip
            assert same_picture(image)
            seen.append((run_id, artifact_file, key, step))

        def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
            seen.append((run_id, text, artifact_file))

    logger = Answers(Client(), run_id="r1")
    assert publish.log_images([logger], {"globenc/a": PICTURE}, 7) == []
    assert publish.log_text(logger, "globenc/about", "text", {}, 7)
    assert seen == [("r1", None, "globenc/a", 7), ("r1", "text", "globenc/about.md")]


def test_comet_by_its_signature() -> None:
    """As in comet-ml 3.58: ``BaseExperiment.log_image`` (which stretches the contrast of arrays) and ``log_text``."""
    seen: list[Any] = []

    class Experiment:
        def log_image(
            self, image_data: Any, name: Any = None, overwrite: bool = False, image_format: str = "png",
            step: Any = None, metadata: Any = None,
        ) -> None:  # fmt: skip
            assert isinstance(image_data, Image.Image)
            assert same_picture(image_data)
            seen.append((name, step, overwrite))

        def log_text(self, text: str, step: Any = None, metadata: Any = None) -> None:
            seen.append((text, step, metadata))

    logger = Answers(Experiment())
    assert publish.log_images([logger], {"globenc/a": PICTURE}, 7) == []
    assert publish.log_text(logger, "globenc/about", "text", {}, 7)
    assert seen == [("globenc/a", 7, False), ("text", 7, {"tag": "globenc/about"})]


def test_aim_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in aim 3.29: ``Run.track`` with ``aim.Image`` and ``aim.Text``."""
    seen: list[Any] = []

    class Base:
        def track(
            self, value: Any, name: Any = None, step: Any = None, epoch: Any = None, *, context: Any = None
        ) -> None:
            seen.append((value, name, step))

    logger = Answers(
        stand_in("aim", monkeypatch, Base, Image=lambda one: ("image", one), Text=lambda one: ("text", one))
    )
    assert publish.log_images([logger], {"globenc/a": PICTURE}, 7) == []
    assert publish.log_text(logger, "globenc/about", "words", {}, 8)
    (kind, shown), *rest = seen[0]
    assert (kind, rest) == ("image", ["globenc/a", 7])
    assert same_picture(shown)
    assert seen[1] == (("text", "words"), "globenc/about", 8)


@pytest.mark.parametrize("package", ["litlogger", "neptune"])
def test_series_by_their_signature(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in litlogger 2026.8 and neptune 1.14: ``experiment[key].append(value, step=...)``."""
    seen: list[Any] = []

    class Base:
        def __getitem__(self, key: str) -> Any:
            return SimpleNamespace(append=lambda value, step=None: seen.append((key, value, step)))

    as_image = lambda one: ("image", one)  # noqa: E731
    kinds: dict[str, Any] = {"types": SimpleNamespace(File=SimpleNamespace(as_image=as_image))}
    if package == "litlogger":
        kinds = {"Image": as_image, "Text": lambda one: ("text", one)}
    logger = Answers(stand_in(package, monkeypatch, Base, **kinds))
    assert publish.log_images([logger], {"globenc/a": PICTURE}, 7) == []
    assert publish.log_text(logger, "globenc/about", "words", {}, 8) == (package == "litlogger")
    key, (kind, shown), step = seen[0]
    assert (key, kind, step) == ("globenc/a", "image", 7)
    assert same_picture(shown)
    assert seen[1:] == ([("globenc/about", ("text", "words"), 8)] if package == "litlogger" else [])


def test_a_class_of_the_same_name_elsewhere_is_no_run_of_aim() -> None:
    class Run:
        def track(self, value: Any, name: str, step: int) -> None:
            raise AssertionError("called")

        def __getitem__(self, key: str) -> Any:
            raise AssertionError("called")

    assert publish.log_images([Answers(Run())], {"a": PICTURE}, 7) == ["Answers"]
    assert not publish.log_text(Answers(Run()), "a", "words", {}, 7)


def test_a_writer_that_takes_figures_alone_gets_the_same_pixels() -> None:
    seen = []

    def add_figure(tag: str, figure: Any, step: int) -> None:
        figure.canvas.draw()
        seen.append((tag, step, np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))

    assert publish.log_images([Answers(SimpleNamespace(add_figure=add_figure))], {"a": PICTURE}, 7) == []
    (tag, step, pixels) = seen[0]
    assert (tag, step) == ("a", 7)
    np.testing.assert_array_equal(pixels, PICTURE)


def test_tables_for_loggers_that_show_tables() -> None:
    """As in WandbLogger: ``log_text(key, columns, data, dataframe, step)``."""
    seen = []

    def log_text(key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: Any = None) -> None:
        seen.append((key, columns, data, step))

    tables = {"choices": (("a", "b"), (("1", "2"),)), "probe": (["c"], [["3"]])}
    assert publish.log_text(Answers(log_text=log_text), "globenc/about", "words", tables, 3)
    assert seen == [("globenc/about/choices", ["a", "b"], [["1", "2"]], 3), ("globenc/about/probe", ["c"], [["3"]], 3)]


def test_stand_ins_and_loggers_without_texts_get_none(tmp_path: Path) -> None:
    for logger in (CSVLogger(str(tmp_path)), DummyLogger(), object()):
        assert not publish.log_text(logger, "a", "words", {}, 0)
        assert not publish.log_layout(logger, {"a": {}})


def test_loggers_on_another_rank_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own loggers have their methods there, too, with an experiment that swallows everything."""

    def log_image(key: str, images: list[Any], step: int) -> None:
        raise AssertionError("called")

    logger = Answers(DummyExperiment(), log_image=log_image)
    assert publish.log_images([logger], {"a": PICTURE}, 0) == ["Answers"]


def test_runs_are_told_apart(tmp_path: Path) -> None:
    runs = [
        publish.run_of(TensorBoardLogger(str(tmp_path / folder), name=name, version=version))
        for folder, name, version in (("a", "n", 0), ("b", "n", 0), ("a", "m", 0), ("a", "n", 1), ("a", "n", 0))
    ]
    assert len(set(runs)) == 4
    assert runs[0] == runs[-1] != publish.run_of(CSVLogger(str(tmp_path / "a"), name="n", version=0))


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
