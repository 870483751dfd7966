"""Hands scalars, pictures and texts to whatever loggers a Trainer has, by what they can do and not by their class.

Scalars go through ``log_metrics``, which every Lightning logger has. For pictures the first of these that is there is
used, once per picture; ``experiment`` is ``logger.experiment``, ``image`` a Pillow image (some of these loggers stretch
the contrast of an array), and names in brackets are looked for in the signature:

1. ``experiment.add_image(tag, array, step, dataformats="HWC")``, as TensorBoard's ``SummaryWriter`` has it; where that
   method is the writer's own, the picture goes into the event file as a PNG made here, smaller and sooner (`png`);
2. ``logger.log_image(key=tag, images=[image], step=step)`` (`key`, `images`, `step`): the public method of Lightning's
   ``WandbLogger``, and the one to write in a logger of your own;
3. ``experiment.log_image(logger.run_id, image, key=tag, step=step)`` (`run_id`, `image`, `key`, `step`): MLflow;
4. ``experiment.log_image(image, name=tag, step=step)`` (`image_data`, `name`, `step`): Comet;
5. ``experiment.track(aim.Image(image), name=tag, step=step)`` (`value`, `name`, `step`): Aim;
6. ``experiment[tag].append(image, step=step)``, the image made by the package that the experiment is of: LitLogger,
   Neptune;
7. ``experiment.add_figure(tag, figure, step)``: a writer that takes figures and no images.

Texts have a list of their own, see `log_text`. What answers to every name (``fast_dev_run``, other ranks) gets nothing.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from PIL import Image

from globenc_lightning.report import png
from globenc_lightning.report.canvas import Picture
from globenc_lightning.report.dashboard.store import PLUGIN
from globenc_lightning.report.room import require_room

SCALAR_BYTES = 256
"""More than a scalar and its tag take in any log."""
SMALLEST_RATIO = 8
"""So much smaller at least are our pictures in a PNG; 26 times and more were measured."""

WritePicture = Callable[[str, Picture, int], Any]
"""Writes a picture (height, width, 3) of uint8 under a tag, at a step."""

Tables = Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]
"""Tables by name: the names of the columns, and the rows."""


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
    """Tell whether `logger` takes pictures in one of the ways that this module knows.

    Touches `logger.experiment`, which creates files or opens connections: for the process of rank zero alone.

    Args:
        logger: A Lightning logger or anything like one.

    Returns:
        False for a stand-in that answers to every name (`fast_dev_run`, other ranks), and for an experiment that cannot
        be reached.
    """
    try:
        return _image_writer(logger, {}) is not None
    except Exception:
        return False


def _reached(logger: Any) -> tuple[Any, Any]:
    """The logger and its experiment; None and None where one of them only pretends to be one."""
    if not _answers_to_everything(logger):
        experiment = getattr(logger, "experiment", None)
        if not _answers_to_everything(experiment):
            return logger, experiment
    return None, None


def _answers_to_everything(one: Any) -> bool:
    # Stand-ins return a function that does nothing for any name whatsoever, so a name that nobody has unmasks them.
    return hasattr(one, "globenc_lightning_asks_whether_you_have_everything")


def _takes(function: Any, *names: str) -> bool:
    """Whether something can be called with arguments of these names."""
    if not callable(function):
        return False
    try:
        return set(names) <= set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False


def _home(experiment: Any, *packages: str) -> Any:
    """The one of these packages that the class of an experiment comes from, itself or by inheritance."""
    roots = [kind.__module__.partition(".")[0] for kind in type(experiment).__mro__]
    return next((sys.modules.get(root) for root in roots if root in packages), None)


def _image_writer(logger: Any, files: dict[str, bytes]) -> WritePicture | None:
    """The first way of writing a picture that the logger has, in the order that the module names.

    Args:
        logger: A Lightning logger or anything like one.
        files: The PNG of each tag that has been encoded for another logger already.
    """
    logger, experiment = _reached(logger)
    if _adds_images_as_events(experiment) and (found := _event_writer(logger)) is not None:
        return partial(_write_event, *found, files)
    if callable(getattr(experiment, "add_image", None)):
        return lambda tag, picture, step: experiment.add_image(tag, picture, step, dataformats="HWC")
    if _takes(getattr(logger, "log_image", None), "key", "images", "step"):
        return lambda tag, picture, step: logger.log_image(key=tag, images=[Image.fromarray(picture)], step=step)
    log_image = getattr(experiment, "log_image", None)
    if _takes(log_image, "run_id", "image", "key", "step") and hasattr(logger, "run_id"):
        return lambda tag, picture, step: experiment.log_image(
            run_id=logger.run_id, image=Image.fromarray(picture), key=tag, step=step
        )
    if _takes(log_image, "image_data", "name", "step"):
        return lambda tag, picture, step: experiment.log_image(Image.fromarray(picture), name=tag, step=step)
    home = _home(experiment, "aim")
    if home is not None and _takes(getattr(experiment, "track", None), "value", "name", "step"):
        return lambda tag, picture, step: experiment.track(home.Image(Image.fromarray(picture)), name=tag, step=step)
    home = _home(experiment, "litlogger", "neptune")
    if home is not None and hasattr(experiment, "__getitem__"):
        as_image = home.Image if hasattr(home, "Image") else home.types.File.as_image
        return lambda tag, picture, step: experiment[tag].append(as_image(Image.fromarray(picture)), step=step)
    if callable(getattr(experiment, "add_figure", None)):
        return lambda tag, picture, step: experiment.add_figure(tag, _as_figure(picture), step)
    return None


def _adds_images_as_events(experiment: Any) -> bool:
    """Whether a writer's ``add_image`` does no more than write an event: nobody has put another in its place."""
    own = getattr(getattr(experiment, "add_image", None), "__func__", None)
    events = getattr(getattr(experiment, "_get_file_writer", None), "__func__", None)
    if own is None or events is None or own.__module__ != events.__module__:
        return False
    # That of tensorboardX sends pictures to Comet as well, if it is told to.
    return bool((getattr(experiment, "_comet_config", None) or {"disabled": True}).get("disabled"))


def _write_event(writer: Any, event: Any, files: dict[str, bytes], tag: str, picture: Picture, step: int) -> None:
    """Write a picture into an event file, in the form that ``add_image`` gives it."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width, channels = picture.shape
    if tag not in files:
        files[tag] = png.encoded(picture)
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=files[tag])
    _add_event(writer, event, Event(summary=Summary(value=[Summary.Value(tag=tag, image=image)])), step)


def _add_event(writer: Any, event: Any, message: Any, step: int, wall_time: float | None = None) -> None:
    """Write an event of TensorBoard's own class into an event file, as one of the class that its writer takes."""
    writer.add_event(event.FromString(message.SerializeToString()), step, wall_time)


def _as_figure(picture: Picture) -> Any:
    """A matplotlib figure that shows a picture pixel by pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = picture.shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    FigureCanvasAgg(figure)
    figure.figimage(picture)
    return figure


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
    # Both have no public way to write an event of one's own; theirs for meshes and texts goes through this one too.
    find = getattr(_reached(logger)[1], "_get_file_writer", None)
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
            require_room(logger, SCALAR_BYTES * len(finite))
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
    files: dict[str, bytes] = {}
    for logger in loggers:
        name = type(logger).__name__
        try:
            write = _image_writer(logger, files)
            if write is None:
                unable.append(name)
                continue
            require_room(logger, sum(picture.nbytes for picture in images.values()) // SMALLEST_RATIO)
            for tag, picture in images.items():
                write(tag, picture, step)
        except Exception as error:
            failures.append((name, error))
    if failures:
        raise PublishError(failures, unable) from failures[0][1]
    return unable


def log_text(logger: Any, tag: str, markdown: str, tables: Tables, step: int) -> bool:
    """Write a text to a logger that takes texts; the first of these ways that is there is used.

    1. ``experiment.add_text(tag, markdown, step)``: TensorBoard's Text tab;
    2. ``logger.log_text(key=, columns=, data=, step=)``, once per table: Lightning's ``WandbLogger``;
    3. ``experiment.log_text(logger.run_id, markdown, "<tag>.md")``: MLflow, as an artifact;
    4. ``experiment.log_text(markdown, step=step, metadata={"tag": tag})``: Comet;
    5. ``experiment.track(aim.Text(markdown), name=tag, step=step)``: Aim;
    6. ``experiment[tag].append(litlogger.Text(markdown), step=step)``: LitLogger.

    Touches `logger.experiment`: for the process of rank zero alone.

    Args:
        logger: A Lightning logger or anything like one.
        tag: The text's name.
        markdown: The text.
        tables: The same as tables by name, for loggers that show tables.
        step: The training step at which it is logged.

    Returns:
        Whether the logger takes texts.

    Raises:
        PublishError: The logger failed.
    """
    with _named(logger):
        require_room(logger, 4 * len(markdown.encode()))
        return _write_text(logger, tag, markdown, tables, step)


@contextmanager
def _named(logger: Any) -> Iterator[None]:
    """Say which logger it was that failed."""
    try:
        yield
    except Exception as error:
        raise PublishError([(type(logger).__name__, error)]) from error


def _write_text(logger: Any, tag: str, markdown: str, tables: Tables, step: int) -> bool:
    logger, experiment = _reached(logger)
    if callable(getattr(experiment, "add_text", None)):
        experiment.add_text(tag, markdown, step)
    elif _takes(getattr(logger, "log_text", None), "key", "columns", "data", "step"):
        for name, (columns, rows) in tables.items():
            data = [list(row) for row in rows]
            logger.log_text(key=f"{tag}/{name}", columns=list(columns), data=data, step=step)
    elif _takes(getattr(experiment, "log_text", None), "run_id", "text", "artifact_file") and hasattr(logger, "run_id"):
        experiment.log_text(run_id=logger.run_id, text=markdown, artifact_file=f"{tag}.md")
    elif _takes(getattr(experiment, "log_text", None), "text", "step", "metadata"):
        experiment.log_text(markdown, step=step, metadata={"tag": tag})
    elif (home := _home(experiment, "aim")) is not None and callable(getattr(experiment, "track", None)):
        experiment.track(home.Text(markdown), name=tag, step=step)
    elif (home := _home(experiment, "litlogger")) is not None:
        experiment[tag].append(home.Text(markdown), step=step)
    else:
        return False
    return True


def log_layout(logger: Any, layout: Mapping[str, Any]) -> bool:
    """Write a layout for TensorBoard's Custom Scalars tab, instead of any other that the same run has.

    Args:
        logger: A Lightning logger or anything like one; touches its `experiment`.
        layout: What ``SummaryWriter.add_custom_scalars`` takes.

    Returns:
        Whether the logger takes layouts.

    Raises:
        PublishError: The logger failed.
    """
    with _named(logger):
        require_room(logger, 4 * len(repr(layout)))
        add_custom_scalars = getattr(_reached(logger)[1], "add_custom_scalars", None)
        if not callable(add_custom_scalars):
            return False
        add_custom_scalars(layout)
        return True


def run_of(logger: Any) -> tuple[str, ...]:
    """What tells the run that a logger writes from other runs, as far as the logger says it."""
    return (type(logger).__name__, *(str(getattr(logger, name, "")) for name in ("save_dir", "name", "version")))


def log_records(
    loggers: Iterable[Any], records: Mapping[str, bytes], step: int, wall_time: float | None = None
) -> None:
    """Write the dashboard's `records` to every logger that keeps event files (see `can_keep_records`).

    Touches `logger.experiment`: for the process of rank zero alone.

    Args:
        loggers: The Trainer's loggers.
        records: What `report.dashboard.store.to_bytes` made, by tag.
        step: The training step at which they are logged.
        wall_time: The time at which they are logged, in seconds; that of the machine's clock when None.

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
            if _event_writer(logger) is None:
                continue
            require_room(logger, 2 * sum(len(data) for data in records.values()))
            for tag, data in records.items():
                # Anew each time: a signal's handler may close the writer in between, as Lightning's for SLURM does.
                writer, event = cast(tuple[Any, Any], _event_writer(logger))
                tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[data])
                value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
                _add_event(writer, event, Event(summary=Summary(value=[value])), step, wall_time)
                # Who watches a training does not want to wait for a buffer to be full.
                writer.flush()
        except Exception as error:
            failures.append((type(logger).__name__, error))
    if failures:
        raise PublishError(failures) from failures[0][1]
