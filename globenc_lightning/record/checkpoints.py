"""Loads saved checkpoints: Lightning's ``.ckpt`` files, and folders that Hugging Face's ``save_pretrained`` wrote.

Nothing is unpickled: a ``.ckpt`` is loaded with ``weights_only=True``, a folder's weights are safetensors. Nothing is
downloaded.
"""

import glob
import importlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from globenc_lightning.choices import Choices
from globenc_lightning.errors import GlobEncWarning, RecordError
from globenc_lightning.record.schema import run_name
from globenc_lightning.settings import Settings

CALLBACK = re.compile(r"GlobEncCallback_[0-9a-f]{12}(_[0-9]+)?")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class Saved(NamedTuple):
    """A checkpoint on disk.

    Attributes:
        path: the file or the folder.
        run: a name for the run that it is of.
        step: the step that its figures are of.
        epoch: the epoch.
    """

    path: Path
    run: str
    step: int
    epoch: int


def matching(patterns: Iterable[str]) -> list[Path]:
    """Returns the files and folders that patterns with ``*`` stand for, each once, in order.

    Raises:
        RecordError: nothing matches one of them.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise RecordError(f"no checkpoint matches {pattern!r}.")
        found.update(dict.fromkeys(map(Path, paths)))
    return [*found]


def load_lightning(path: Path) -> dict[str, Any]:
    """Returns what a Lightning checkpoint holds.

    Raises:
        RecordError: it cannot be read, holds classes, or is no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe = "Weights only load failed" in str(error) or "Unsupported" in str(error)
        why = "it holds more than tensors and primitives, which are not unpickled" if unsafe else _in_short(error)
        raise RecordError(f"{path} cannot be loaded with weights_only=True: {why}.") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise RecordError(f"{path} is no Lightning checkpoint: it holds no 'state_dict'.")
    return checkpoint


def order_lightning(paths: Sequence[Path]) -> list[Saved]:
    """Returns Lightning checkpoints in the order of runs and steps, one of each step."""
    found = []
    for path in paths:
        if path.is_dir():
            raise RecordError(
                f"{path} is a folder and no Lightning checkpoint: write a pattern such as '{path}/**/*.ckpt'."
            )
        checkpoint = load_lightning(path)
        folder = path.parent if path.parent.name != "checkpoints" else path.parent.parent
        found.append(Saved(path, _named(folder), step_of(checkpoint), int(checkpoint.get("epoch", 0))))
    return _each_once(found)


def step_of(checkpoint: Mapping[str, Any]) -> int:
    """Returns the step of a checkpoint's figures, which is the one that the training recorded for the same weights.

    A validation stands one step before ``global_step``, where Lightning logs its metrics: ``global_step`` has been
    counted on already. So does every other checkpoint, however it was saved, unless the callback has analysed this very
    training step or the one before it (``at_steps``): such steps stand at the number of optimizer steps taken, and the
    place before is taken.
    """
    steps = int(checkpoint.get("global_step", 0))
    state = callback_state(checkpoint)
    newest, is_validation = (None, True) if state is None else _newest(state)
    if newest == steps or (newest == steps - 1 and not is_validation):
        return steps
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.state_dict", {})
    # At the end of an epoch, Lightning has counted this on, too; several optimizers count global_step alone.
    return max(0, min(int(loop.get("_batches_that_stepped", steps)), steps - 1))


def _newest(state: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The step of the last analysis that a callback's state remembers or points to, and whether it is a validation."""
    known = [(int(one["step"]), bool(one.get("validation", True))) for one in state.get("history", ())]
    if state.get("record") is not None:
        until = int(state["record"]["until"])
        known.append((until, until == state.get("latest")))
    # Of two at one step, a validation is the later one.
    return max(known, default=(None, True))


def callback_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the state of the first GlobEncCallback in a Lightning checkpoint, or None."""
    states = checkpoint.get("callbacks") or {}
    keys = [key for key in states if isinstance(key, str) and CALLBACK.fullmatch(key)]
    return states[keys[0]] if keys else None


def choices_of(state: Mapping[str, Any], num_examples: int | None = None, **changes: Any) -> Choices:
    """Returns what a callback computed, as its state in a checkpoint says.

    Args:
        state: the callback's state.
        num_examples: how many examples are taken from batches; as many as the callback took when None.
        **changes: what is chosen in place of it: ``methods``, ``target``, ``readout``, ``faithfulness``, ...

    Raises:
        RecordError: its target or forward was a function, which a checkpoint does not hold.
    """
    made_of = state.get("made_of") or {}
    if made_of.get("forward_code") is not None:
        raise RecordError(
            "the callback had forward=, a function, which a checkpoint does not hold: call record_checkpoint(..., "
            "forward=...) in Python."
        )
    if made_of.get("target_code") is not None and "target" not in changes:
        raise RecordError(
            "the callback's target= was a function, which a checkpoint does not hold: choose --target, or call "
            "record_checkpoint(..., target=...) in Python."
        )
    names = [one.name for one in fields(Settings)]
    given = {name: value for name, value in changes.items() if name in names}
    settings = Settings(**{**{name: made_of[name] for name in names if name in made_of}, **given})
    others = {name: made_of[name] for name in ("decision", "encoder_call") if name in made_of}
    # Other methods may be chosen than those whose tokens the callback masked.
    masked = changes.get("faithfulness", [one for one in made_of.get("faithfulness", ()) if one in settings.methods])
    return Choices(settings, num_examples or state.get("num_examples", 16), **others, faithfulness=masked or False)


def module_class(name: str) -> type[nn.Module]:
    """Returns a class by its name, ``package.module:Class``; modules in the working folder are found, too.

    Raises:
        RecordError: there is no such module or class.
    """
    where, colon, attribute = name.partition(":")
    if not colon or not where or not attribute:
        raise RecordError(f"write the class as package.module:Class; got {name!r}.")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(where)
    except ImportError as error:
        raise RecordError(f"the module {where!r} of {name!r} cannot be imported: {error}") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise RecordError(f"there is no class {attribute!r} in {where!r}.")
    return found


def build(kind: type[nn.Module], path: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """Returns a LightningModule with a checkpoint's hyperparameters and weights, in evaluation mode.

    Args:
        kind: its class.
        path: the checkpoint.
        arguments: of the class, in place of those in the checkpoint.

    Raises:
        RecordError: the class needs other arguments, or the weights are of another model.
    """
    loader: Any = getattr(kind, "load_from_checkpoint", None)
    if loader is None:
        raise RecordError(f"{kind.__qualname__} is no LightningModule: it has no load_from_checkpoint.")
    options: dict[str, Any] = {"map_location": "cpu", **arguments}
    if "weights_only" in inspect.signature(loader).parameters:
        options["weights_only"] = True
    try:
        model: nn.Module = loader(path, **options)
    except TypeError as error:
        raise RecordError(
            f"{kind.__qualname__} cannot be made from {path}: {error}. Call save_hyperparameters() in its __init__, or "
            "give the arguments with --arguments '{\"name\": value}'."
        ) from error
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise RecordError(f"{path} is no checkpoint of {kind.__qualname__}: {_in_short(error)}") from error
    return model.eval()


def order_folders(paths: Sequence[Path], kind: str) -> list[Saved]:
    """Returns folders of Hugging Face models in the order of runs and steps, one of each step.

    Args:
        paths: the folders.
        kind: the type of model that they are to be, such as ``"bert"``, or ``"auto"`` for any.

    Raises:
        RecordError: one is no such folder, or of another type of model.
    """
    found = []
    for path in paths:
        config = _json(path / "config.json", "a folder that save_pretrained wrote has one")
        if kind not in ("auto", config.get("model_type")):
            raise RecordError(
                f"{path} holds a model of the type {config.get('model_type')!r}, and {kind!r} was asked for."
            )
        state = path / "trainer_state.json"
        told = _json(state, "") if state.exists() else {}
        digits = re.findall(r"\d+", path.name)
        if "global_step" not in told and not digits:
            raise RecordError(
                f"{path} tells no step: it has no trainer_state.json, and no number in its name, as checkpoint-500 has."
            )
        step = int(told.get("global_step", digits[-1] if digits else 0))
        found.append(Saved(path, _named(path.resolve().parent), step, int(told.get("epoch") or 0)))
    return _each_once(found)


def build_folder(path: Path) -> nn.Module:
    """Returns the Hugging Face model in a folder, in evaluation mode.

    Raises:
        RecordError: it names no class of transformers, has no safetensors, or cannot be loaded.
    """
    import transformers

    config = _json(path / "config.json", "a folder that save_pretrained wrote has one")
    names = config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise RecordError(f"{path}/config.json names no class of transformers in 'architectures': {names!r}.")
    if not any((path / name).exists() for name in WEIGHTS):
        raise RecordError(
            f"{path} has no model.safetensors: other files of weights are pickles, which are not loaded. Save the "
            "model anew with a current version of transformers."
        )
    try:
        model, told = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except Exception as error:
        raise RecordError(f"{path} cannot be loaded: {_in_short(error)}") from error
    missing = sorted(map(str, told.get("missing_keys", ())))
    if missing:
        raise RecordError(
            f"{path} holds no weights for {_some(missing)} of {names[0]}, which would be drawn at random: it is of "
            "another model, or was saved without its head."
        )
    loaded: nn.Module = model.eval()
    return loaded


def _in_short(error: Exception) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _json(path: Path, hint: str) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RecordError(f"there is no {path}{f': {hint}' if hint else ''}.") from error
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(told, dict):
        raise RecordError(f"{path} holds no mapping.")
    return told


def _named(folder: Path) -> str:
    """A name for the run that a folder is of: version_0 alone tells no run from others."""
    resolved = folder.resolve()
    plain = re.fullmatch(r"version_\d+", resolved.name)
    return run_name(f"{resolved.parent.name}-{resolved.name}" if plain else resolved.name)


def _each_once(found: Sequence[Saved]) -> list[Saved]:
    """In the order of runs and steps; of several checkpoints of one step the first, ``last.ckpt`` behind others."""
    ordered = sorted(found, key=lambda one: (one.run, one.step, _is_last(one), one.path))
    kept: dict[tuple[str, int], Saved] = {}
    for one in ordered:
        taken = kept.setdefault((one.run, one.step), one)
        if taken is not one and not _is_last(one):
            warnings.warn(
                f"{one.path} is left out: {taken.path} is of the same step {one.step}, and in the same folder. If they "
                "are of two trainings, replay each with its own --run NAME.",
                GlobEncWarning,
                stacklevel=2,
            )
    return [*kept.values()]


def _is_last(one: Saved) -> bool:
    """Whether Lightning wrote a checkpoint besides the one of the same step."""
    return one.path.name.startswith("last")
