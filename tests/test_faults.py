"""Something breaks at every stage of an analysis: the training must not notice, and the validation is missing."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from globenc_lightning import GlobEncCallback, analysis, planning, rolling
from globenc_lightning.encoder import reading
from globenc_lightning.errors import OutOfMemoryError, is_out_of_memory
from globenc_lightning.report import images, publish
from tests.neutrality import COLUMNS, SETTINGS, equal, train
from tests.test_callback import MONITORED
from tests.training import Album, Memory, Sentences, Steps, fit, said

SETTING = SETTINGS["EMA after ours"]
FILMSTRIP = "globenc/filmstrip/example_00"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class InjectedError(Exception):
    """What the tests throw."""


def broken(*args: Any, **kwargs: Any) -> Any:
    torch.rand(3)
    raise InjectedError("broken here")


class BrokenBackward(torch.autograd.Function):
    """Its backward raises."""

    @staticmethod
    def forward(context: Any, score: Tensor) -> Tensor:
        return score.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return broken()


def breaks_backward(logits: Tensor, batch: Any) -> Tensor:
    return BrokenBackward.apply(logits[:, 0])


ANALYSIS: dict[str, tuple[Any, str] | None] = {
    "finding the decision": (planning, "find_decision"),
    "structure pass": (reading, "resolve"),
    "forward": (reading, "layer_weights"),
    "reconstruction": (reading, "distances"),
    "maps": (rolling, "local_maps"),
    "rollout": (rolling, "rollout_step"),
    "backward": None,
    "saliency": (analysis, "gradient_x_input"),
    "correlation": (analysis, "spearman"),
}
REPORT: dict[str, tuple[Any, str]] = {
    "drawing": (images, "pictures"),
    "scalars": (publish, "log_scalars"),
    "images": (publish, "log_images"),
}


def breaking(stage: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Break a stage; the arguments that the callback needs for it."""
    where = {**ANALYSIS, **REPORT}[stage]
    if where is None:
        return {"target": breaks_backward}
    patch.setattr(*where, broken)
    return {}


def traces(module: pl.LightningModule) -> list[Any]:
    """All of a module that an analysis touches."""
    return [
        (
            len(one._forward_hooks) + len(one._forward_pre_hooks) + len(one._backward_hooks),
            one.training,
            sorted(vars(one)),
            [parameter.requires_grad for parameter in one.parameters()],
            getattr(getattr(one, "config", None), "_attn_implementation", None),
        )
        for one in module.model.modules()
    ]


def chain(error: BaseException | None) -> list[type[BaseException]]:
    """The types of an error and its causes."""
    kinds: list[type[BaseException]] = []
    while error is not None:
        kinds.append(type(error))
        error = error.__cause__
    return kinds


@pytest.mark.parametrize("stage", [*ANALYSIS, *REPORT])
def test_a_training_goes_on_undisturbed_whatever_breaks(stage: str) -> None:
    with pytest.MonkeyPatch.context() as patch, said() as messages:
        callback = GlobEncCallback(heatmap_examples=1, **breaking(stage, patch))
        # Its own logger cannot show images, so that of the pictures is asked by hand.
        patch.setattr(publish, "can_show_images", lambda logger: True)
        observed = train(SETTING, [callback])
    about = [message for message in messages if "broken here" in message]
    assert len(about) == 1
    assert "The training goes on without these figures." in about[0]
    reported = stage in REPORT
    assert [entry.step for entry in callback.history] == ([0, 1, 3, 5, 7] if reported else [])
    assert callback.history.missing_steps == ([] if reported else [0, 1, 3, 5, 7])
    undisturbed = train(SETTING, [])
    assert {name: equal(observed[name], undisturbed[name]) for name in COLUMNS} == dict.fromkeys(COLUMNS, True)


@pytest.mark.parametrize("stage", [*ANALYSIS, *REPORT])
def test_an_error_that_is_to_stop_the_training_has_the_user_s_own_in_its_chain(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Steps()
    before = traces(module)
    callback = GlobEncCallback(heatmap_examples=1, on_error="raise", **breaking(stage, monkeypatch))
    with pytest.raises(Exception, match="broken here") as caught:
        fit(module, callback, logger=Album())
    assert InjectedError in chain(caught.value)
    assert [one for one in traces(module) if one not in before] == []


# --- memory ----------------------------------------------------------------------------------------------------------

MESSAGES = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: not enough memory: you tried to"),
    "python": MemoryError(),
}


class Cramped:
    """A forward that has memory for so many tokens at once, where an autograd graph is kept."""

    def __init__(self, tokens: int, error: BaseException) -> None:
        self.tokens = tokens
        self.error = error
        self.sizes: list[int] = []

    def __call__(self, module: Any, batch: Any) -> Any:
        self.sizes.append(batch["input_ids"].numel() if torch.is_grad_enabled() else 0)
        # The batch is one that the loader gave: in an evaluation there is memory for it.
        if torch.is_grad_enabled() and self.sizes[-1] > self.tokens:
            raise self.error
        return module.model(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("kind", MESSAGES)
def test_smaller_batches_when_the_memory_does_not_suffice(kind: str) -> None:
    forward = Cramped(40, MESSAGES[kind])
    callback, expected = GlobEncCallback(heatmap_examples=1, forward=forward), GlobEncCallback(heatmap_examples=1)
    with said() as messages:
        fit(Steps(), callback, max_epochs=2)
    assert messages == []
    torch.manual_seed(0)
    fit(Steps(), expected, max_epochs=2)
    assert max(forward.sizes) > 40
    for one, other in zip(callback.history[:1], expected.history[:1], strict=True):
        for method, rho in one.by_example.items():
            torch.testing.assert_close(rho, other.by_example[method], rtol=0, atol=1e-5)
    assert [entry.step for entry in callback.history] == [0, 1, 3]
    # It is not tried again at every validation.
    tries = [size > 40 for size in forward.sizes]
    assert not any(tries[len(tries) // 2 :])


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_validation_is_left_out_with_one_warning_when_not_even_one_example_fits(kind: str) -> None:
    forward = Cramped(4, MESSAGES[kind])
    callback = GlobEncCallback(heatmap_examples=0, forward=forward)
    with said() as messages:
        trainer = fit(Steps(), callback, max_epochs=3)
    (message,) = messages
    assert "even one example at a time" in message
    assert trainer.global_step == 6
    assert callback.history == []
    assert callback.history.missing_steps == [0, 1, 3, 5]


def test_out_of_memory_keeps_its_cause_if_the_training_is_to_stop() -> None:
    callback = GlobEncCallback(heatmap_examples=0, forward=Cramped(4, MESSAGES["cuda"]), on_error="raise")
    with pytest.raises(OutOfMemoryError) as caught:
        fit(Steps(), callback)
    assert torch.OutOfMemoryError in chain(caught.value)


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory"))


# --- signals ---------------------------------------------------------------------------------------------------------


class Once:
    """A forward that does something in its n-th call."""

    def __init__(self, number: int, job: Any) -> None:
        self.number, self.job, self.calls = number, job, 0

    def __call__(self, module: Any, batch: Any) -> Any:
        self.calls += 1
        found = module.model(batch["input_ids"], batch["attention_mask"])
        if self.calls == self.number:
            self.job()
        return found


def interrupted() -> None:
    raise KeyboardInterrupt


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_keyboard_interrupt_in_mid_analysis_is_lightning_s_to_handle(number: int, on_error: str) -> None:
    module, forward = Steps(), Once(number, interrupted)
    before = traces(module)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(module, GlobEncCallback(heatmap_examples=0, forward=forward, on_error=on_error), max_epochs=2)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert forward.calls == number
    assert [(one[0], *one[2:]) for one in traces(module)] == [(one[0], *one[2:]) for one in before]


@pytest.mark.parametrize("number", [1, 3])
def test_a_sigterm_in_mid_analysis_ends_the_training_as_lightning_wants_it(number: int) -> None:
    module, forward = Steps(), Once(number, terminated)
    before = traces(module)
    with pytest.raises(SIGTERMException):
        fit(module, GlobEncCallback(heatmap_examples=0, forward=forward), max_epochs=4)
    assert [(one[0], *one[2:]) for one in traces(module)] == [(one[0], *one[2:]) for one in before]


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_pictures_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(str(tmp_path))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logger.experiment, "add_image", full)
    callback = GlobEncCallback(heatmap_examples=1)
    with said() as messages:
        trainer = fit(Steps(), callback, logger=logger, max_epochs=2)
    (message,) = messages
    assert "No space left on device" in message
    assert trainer.global_step == 4
    assert [entry.step for entry in callback.history] == [0, 1, 3]
    assert MONITORED in trainer.callback_metrics


def full_disk(tmp_path: Path, **options: int) -> dict[str, Any]:
    """How a training ends on a disk of so many bytes, or where no file gets longer, without us and with us."""
    (tmp_path / "disk").mkdir()
    limits = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tests.full_disk", str(tmp_path / "disk"), str(tmp_path / "result"), *limits]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads((tmp_path / "result").read_text())
    if "impossible" in result:
        pytest.skip(result["impossible"])
    return result


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
@pytest.mark.parametrize("options", [{"disk": 100_000}, {"longest": 60_000}], ids=["disk", "longest file"])
def test_a_disk_with_room_for_the_training_s_own_log_alone_gets_that_alone(
    options: dict[str, int], tmp_path: Path
) -> None:
    found = full_disk(tmp_path, **options)
    assert found["error"] == ["", ""]
    assert found["steps"] == [16, 16]
    assert found["same"]
    assert found["bytes"][0] == found["bytes"][1] < 10_000
    assert found["history"] == [0, 3, 7, 11, 15]
    (message,) = found["messages"]
    assert "left to other logs" in message


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_a_disk_without_room_for_the_training_s_own_log_ends_it_as_it_would_without_us(tmp_path: Path) -> None:
    found = full_disk(tmp_path, longest=700)
    assert found["error"][0] == found["error"][1] != ""
    # TensorBoard tells of it one write later, or two.
    assert abs(found["steps"][0] - found["steps"][1]) <= 2
    assert found["same"] or found["steps"][0] != found["steps"][1]
    assert found["bytes"] == [700, 700]


def test_a_logger_that_raises_at_our_figures_alone_does_not_end_the_training() -> None:
    callback, logger = GlobEncCallback(heatmap_examples=0), Memory(refuses=lambda tag: tag.startswith("globenc"))
    with said() as messages:
        trainer = fit(Steps(), callback, logger=logger, max_epochs=2)
    assert sum("disk full" in message for message in messages) == 1
    assert trainer.global_step == 4
    assert logger.steps("val_loss") == [1, 3]
    assert [entry.step for entry in callback.history] == [0, 1, 3]
    assert MONITORED in trainer.callback_metrics


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_no_figure_behind(value: float) -> None:
    module, logger = Steps(), Album()
    with torch.no_grad():
        module.model.bert.encoder.layer[1].output.dense.weight[0, 0] = value
    callback = GlobEncCallback(Sentences().first(4), heatmap_examples=1)
    with said() as messages:
        trainer = fit(module, callback, logger=logger, max_epochs=2)
    (message,) = messages
    assert "NaN or infinity" in message
    assert trainer.global_step == 4
    assert logger.ours == []
    assert logger.images == []
    assert callback.history.missing_steps == [0, 1, 3]
