"""Hands scalars and pictures to whatever loggers a Trainer has, by what they can do and not by their class."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from globenc_lightning.report.canvas import Picture
from globenc_lightning.report.dashboard.store import PLUGIN


class PublishError(RuntimeError):
    """At least one logger failed; all the others have been written.

    Attributes:
        failures: Class name of each logger that failed, and what it raised.
        without_images: Class names of the loggers that cannot show images, as `log_images` would have returned them.
    """

    def __init__(self, failures: list[tuple[str, Exception]], without_images: list[str] | None = None) -> None:
        self.failures = failures
        self.without_images = without_images or []
        super().__init__("; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failures))


def can_show_images(logger: Any) -> bool:
    """Tell whether `logger` writes pictures the way TensorBoard's `SummaryWriter` does.

    Touches `logger.experiment`, which creates files or opens connections: for the process of rank zero alone.

    Args:
        logger: A Lightning logger or anything like one.

    Returns:
        True if the logger's experiment has a callable `add_image`. False for a stand-in that answers to every name
        (`fast_dev_run`, other ranks), and for an experiment that cannot be reached.
    """
    try:
        return _image_writer(logger) is not None
    except Exception:
        return False


def _image_writer(logger: Any) -> Any:
    experiment = getattr(logger, "experiment", None)
    # Stand-ins return a function that does nothing for any name whatsoever, so a name that nobody has unmasks them.
    if hasattr(experiment, "globenc_lightning_asks_whether_you_have_everything"):
        return None
    add_image = getattr(experiment, "add_image", None)
    return add_image if callable(add_image) else None


def can_keep_records(logger: Any) -> bool:
    """Tell whether `logger` writes TensorBoard's event files, as `SummaryWriter` of torch and of tensorboardX does.

    Touches `logger.experiment`: for the process of rank zero alone.

    Args:
        logger: A Lightning logger or anything like one.

    Returns:
        True if it takes whole events. False for a stand-in that answers to every name, and for an experiment that
        cannot be reached.
    """
    try:
        return _event_writer(logger) is not None
    except Exception:
        return False


def _event_writer(logger: Any) -> tuple[Any, Any] | None:
    """What writes the logger's events, and the class of those that it takes."""
    if _image_writer(logger) is None:
        return None
    # Both have no public way to write an event of one's own; theirs for meshes and texts goes through this one too.
    find = getattr(logger.experiment, "_get_file_writer", None)
    writer = find() if callable(find) else None
    if not callable(getattr(writer, "add_event", None)) or not callable(getattr(writer, "flush", None)):
        return None
    # Each package has the same messages in classes of its own, and a writer's thread ends at another's.
    for home in type(writer).__mro__:
        messages = getattr(sys.modules.get(home.__module__), "event_pb2", None)
        if messages is not None:
            return writer, messages.Event
    return None


def log_scalars(loggers: Iterable[Any], scalars: Mapping[str, Any], step: int) -> None:
    """Write `scalars` to every logger through its `log_metrics`; values that are not finite are left out.

    Args:
        loggers: The Trainer's loggers.
        scalars: Numbers, or arrays or tensors with one element, by tag.
        step: The training step at which they are logged.

    Raises:
        PublishError: After the last logger, if any of them failed; the first failure is its cause.
    """
    numbers = {tag: float(value) for tag, value in scalars.items()}
    finite = {tag: number for tag, number in numbers.items() if math.isfinite(number)}
    failures: list[tuple[str, Exception]] = []
    for logger in loggers if finite else ():
        try:
            logger.log_metrics(dict(finite), step)
        except Exception as error:
            failures.append((type(logger).__name__, error))
    if failures:
        raise PublishError(failures) from failures[0][1]


def log_images(loggers: Iterable[Any], images: Mapping[str, Picture], step: int) -> list[str]:
    """Write `images` to every logger that can show them (see `can_show_images`).

    Touches `logger.experiment`: for the process of rank zero alone.

    Args:
        loggers: The Trainer's loggers.
        images: Pictures (height, width, 3) of uint8 by tag.
        step: The training step at which they are logged.

    Returns:
        Class names of the loggers that cannot show images, so that the caller can say it once.

    Raises:
        PublishError: After the last logger, if any of them failed; the first failure is its cause. A logger's images
            that come after the one at which it failed are not tried.
    """
    unable: list[str] = []
    failures: list[tuple[str, Exception]] = []
    for logger in loggers:
        name = type(logger).__name__
        try:
            add_image = _image_writer(logger)
            if add_image is None:
                unable.append(name)
                continue
            for tag, picture in images.items():
                add_image(tag, picture, step, dataformats="HWC")
        except Exception as error:
            failures.append((name, error))
    if failures:
        raise PublishError(failures, unable) from failures[0][1]
    return unable


def log_records(loggers: Iterable[Any], records: Mapping[str, bytes], step: int) -> None:
    """Write the dashboard's `records` to every logger that keeps event files (see `can_keep_records`).

    Touches `logger.experiment`: for the process of rank zero alone.

    Args:
        loggers: The Trainer's loggers.
        records: What `report.dashboard.store.to_bytes` made, by tag.
        step: The training step at which they are logged.

    Raises:
        PublishError: After the last logger, if any of them failed; the first failure is its cause.
    """
    # Where nothing keeps event files, a training does not wait for this import.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN)
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    failures: list[tuple[str, Exception]] = []
    for logger in loggers:
        try:
            found = _event_writer(logger)
            if found is None:
                continue
            writer, event = found
            for tag, data in records.items():
                tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[data])
                value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
                writer.add_event(event.FromString(Event(summary=Summary(value=[value])).SerializeToString()), step)
            # Who watches a training does not want to wait for a buffer to be full.
            writer.flush()
        except Exception as error:
            failures.append((type(logger).__name__, error))
    if failures:
        raise PublishError(failures) from failures[0][1]
