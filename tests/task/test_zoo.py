"""Every module of the zoo: figures with one line, of the decision that is trained, and a training that is the same."""

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import seed_everything
from torch import Tensor, nn

from globenc_lightning import GlobEncCallback, attribute
from tests.task.torch_zoo import TORCH_CASES, TorchModule
from tests.task.torch_zoo import by_hand as by_hand_of_torch
from tests.task.zoo import CASES, TRAINING, VALIDATION, Case
from tests.task.zoo_table import PAGE, told
from tests.test_callback import assert_same
from tests.training import build_trainer, final_state, said

EVERY_CASE = (*CASES, *TORCH_CASES)
BY_NAME = {case.name: case for case in EVERY_CASE}
EVERY = pytest.mark.parametrize("name", list(BY_NAME))
INFORMATIVE = re.compile(r"\(pre-LN\)|calls of an encoder")
"""What is said of figures that are right."""


@dataclass(frozen=True)
class Trained:
    """A module after its training, the callback that watched it, and what it said."""

    module: Any
    callback: GlobEncCallback
    warnings: list[str]
    state: dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What plain gradients say of one batch: one entry per example, without padding."""

    saliency: list[Tensor]
    row: list[Tensor]
    score: Tensor


def train(case: Case, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> tuple[Any, Any]:
    seed_everything(7, verbose=False)
    module = case.module()
    trainer = build_trainer(callbacks, **options)
    loaders = [case.loader(VALIDATION) for _ in range(case.loaders)]
    trainer.fit(module, case.loader(TRAINING), loaders if case.loaders > 1 else loaders[0], ckpt_path=ckpt_path)
    return module, trainer


@cache
def trained(name: str) -> Trained:
    case = BY_NAME[name]
    callback = GlobEncCallback(**case.arguments)
    with said() as messages:
        module, trainer = train(case, callback)
    state = final_state(trainer)
    module.trainer = None
    return Trained(module.eval(), callback, messages, state)


@cache
def expected(name: str) -> list[Expected]:
    """Gradient x input and the weighted row of every batch, by hooks of its own on the encoder."""
    case, module = BY_NAME[name], trained(name).module
    found = [by_hand(case, module, batch) for batch in case.validation()] * case.loaders
    shown, size = [], 16
    for one in found:
        count = min(size, len(one.score))
        shown.append(Expected(one.saliency[:count], one.row[:count], one.score[:count]))
        size -= count
    return shown


def by_hand(case: Case, module: Any, batch: Any) -> Expected:
    if isinstance(module, TorchModule):
        return Expected(*by_hand_of_torch(case, module, batch))
    encoder = case.encoder(module)
    first = next(one for one in encoder.modules() if isinstance(one, nn.ModuleList) and len(one) == 2)[0]
    hidden: list[Tensor] = []
    last: list[Tensor] = []
    given: list[dict[str, Any]] = []

    def entered(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A frozen encoder gives no gradient by itself.
        own = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        hidden.append(own)
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [encoder.main_input_name, "attention_mask"]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        given.append({key: value for key, value in inputs.items() if isinstance(value, Tensor)})

    def left(_: nn.Module, args: Any, output: Any) -> None:
        last.append(output[0])

    handles = [
        first.register_forward_pre_hook(entered, with_kwargs=True),
        encoder.register_forward_pre_hook(called, with_kwargs=True),
        encoder.register_forward_hook(left),
    ]
    with torch.enable_grad():
        score = case.score(module, batch)
    for handle in handles:
        handle.remove()
    inputs, call = given[case.call], case.call
    gradient, head = torch.autograd.grad(score.sum(), [hidden[call], last[call]])
    mask = inputs.get("attention_mask")
    mask = torch.ones(gradient.shape[:2]).bool() if mask is None else mask.bool()
    rows = torch.arange(len(score)) if case.rows is None else case.rows(module, batch)

    def read(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        return model(**tensors)[0].flatten(1)

    maps = attribute(encoder, inputs, methods=("N-Enc",), readout="mean", forward=read).rollout["N-Enc"][:, -1]
    saliency = torch.linalg.vector_norm(gradient * hidden[call].detach(), dim=-1)
    weights = torch.linalg.vector_norm(head, dim=-1)
    found: list[Tensor] = []
    for row in rows.tolist():
        real = mask[row]
        own = weights[row][real] / weights[row][real].sum()
        kept = real[: maps.shape[-1]]
        found.append(own @ maps[row][kept][:, kept])
    return Expected([saliency[row][mask[row]] for row in rows.tolist()], found, score.detach())


@EVERY
def test_figures_without_a_warning(name: str) -> None:
    found, case = trained(name), BY_NAME[name]
    assert [text for text in found.warnings if not INFORMATIVE.search(text)] == []
    assert len(found.callback.history) >= 1
    assert found.callback.history.about.task == case.task
    assert len(found.callback.history[-1].saliency) == sum(len(one.score) for one in expected(name))


@EVERY
def test_saliency_is_gradient_x_input_of_the_score(name: str) -> None:
    entry = trained(name).callback.history[-1]
    own = expected(name)
    for mine, theirs in zip(entry.saliency, [one for batch in own for one in batch.saliency], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.max()))
    # One loss of a whole batch is the sum of its examples' shares.
    scores = [one.score * len(one.score) if BY_NAME[name].shares else one.score for one in own]
    torch.testing.assert_close(entry.score, torch.cat(scores), rtol=1e-4, atol=1e-5)


@EVERY
def test_row_is_that_of_the_tokens_which_the_decision_reads(name: str) -> None:
    rows = trained(name).callback.history[-1].rows["N-Enc"]
    for mine, theirs in zip(rows, [one for batch in expected(name) for one in batch.row], strict=True):
        torch.testing.assert_close(mine / mine.sum(), theirs / theirs.sum(), rtol=1e-4, atol=1e-5)


@EVERY
def test_training_is_the_same(name: str) -> None:
    _, trainer = train(BY_NAME[name])
    assert_same(trained(name).state, final_state(trainer))


@pytest.mark.parametrize(
    "name", ["dataclass", "named_tuple", "nested", "texts", "glue_sst2_distilbert", "tagging", "in_batch_negatives"]
)
def test_a_resumed_training_goes_on_with_the_same_probe(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    path = tmp_path / "last.ckpt"
    first, again = GlobEncCallback(), GlobEncCallback()
    _, trainer = train(case, first)
    trainer.save_checkpoint(path)
    # Other batches are shown from now on.
    module, _ = train(replace(case, batch=lambda seed: case.batch(seed + 2)), again, max_epochs=2, ckpt_path=path)
    assert again.probe is not None
    assert first.probe is not None
    assert again.history.about.probe == first.history.about.probe
    assert [one.step for one in again.history][: len(first.history)] == [one.step for one in first.history]
    assert len(again.history) == len(first.history) + 1
    module.trainer = None
    own = [one for batch in case.validation() for one in by_hand(case, module.eval(), batch).saliency]
    for mine, theirs in zip(again.history[-1].saliency, own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.max()))


def test_the_page_tells_of_every_case() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert told(page) == [(case.what.replace("|", "/"), case.form, case.task) for case in EVERY_CASE]


def test_every_case_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(EVERY_CASE) >= 32
