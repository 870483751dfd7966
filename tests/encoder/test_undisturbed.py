import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from globenc_lightning import attribute
from globenc_lightning.encoder.undisturbed import undisturbed
from globenc_lightning.errors import ModelCallError
from tests import models


class Stubborn(nn.Module):
    """Part of it stays in eval mode: train() is overridden, as people do to freeze dropout or statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.calls = 0

    def train(self, mode: bool = True) -> "Stubborn":
        self.calls += 1
        super().train(mode)
        self.frozen.training = False
        return self


def mixed() -> Any:
    """A classifier half in training, half frozen."""
    model = models.build("bert")
    model.train()
    model.bert.embeddings.eval()
    model.bert.encoder.layer[1].attention.eval()
    model.bert.encoder.layer[1].training = False
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    model.bert.encoder.layer[2].output.dense.weight.requires_grad_(False)
    return model


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": hooks(model),
        "grad": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "leaf": all(parameter.is_leaf for parameter in model.parameters()),
    }


def assert_same_random_state(before: tuple[Any, Any, Tensor]) -> None:
    python, numpy_state, torch_state = before
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("parameters_require_grad", [True, False])
def test_inside_everything_is_in_eval_mode(parameters_require_grad: bool) -> None:
    model = mixed()
    before = state(model)
    with undisturbed(model, parameters_require_grad=parameters_require_grad):
        assert not any(module.training for module in model.modules())
        assert {parameter.requires_grad for parameter in model.parameters()} == {parameters_require_grad}
        assert torch.is_grad_enabled()
    assert state(model) == before


def test_after_an_exception_everything_is_put_back() -> None:
    model = mixed()
    before = state(model)
    random_before = (random.getstate(), np.random.get_state(), torch.get_rng_state())

    def analysis() -> None:
        with undisturbed(model, parameters_require_grad=False) as handles:
            handles.append(model.register_forward_hook(lambda *_: None))
            random.random()
            np.random.random()
            torch.rand(1)
            raise KeyError("something of the user's")

    with pytest.raises(KeyError, match="something of the user's"):
        analysis()
    assert state(model) == before
    assert_same_random_state(random_before)
    assert torch.is_grad_enabled()


def test_only_own_hooks_are_removed() -> None:
    model = models.build("bert")
    seen = []
    model.bert.register_forward_hook(lambda *_: seen.append("the user's"))
    with undisturbed(model, parameters_require_grad=False) as handles:
        handles.append(model.bert.register_forward_hook(lambda *_: seen.append("ours")))
        model(**models.batch((4,)))
    model(**models.batch((4,)))
    assert seen == ["the user's", "ours", "the user's"]


def test_a_handle_that_is_already_removed_does_no_harm() -> None:
    model = nn.Linear(3, 3)
    with undisturbed(model, parameters_require_grad=False) as handles:
        handles.append(model.register_forward_hook(lambda *_: None))
        handles[0].remove()
    assert hooks(model) == 0


def test_random_states_are_what_they_were() -> None:
    model = nn.Linear(3, 3)
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    with undisturbed(model, parameters_require_grad=False):
        random.random()
        np.random.random()
        torch.rand(5)
    assert_same_random_state(before)


def test_train_of_the_user_is_not_called() -> None:
    model = Stubborn().train()
    calls = model.calls
    with undisturbed(model, parameters_require_grad=False):
        assert not any(module.training for module in model.modules())
    assert model.calls == calls
    assert [name for name, module in model.named_modules() if module.training] == ["", "head"]


def test_gradients_can_be_taken_below_inference_mode() -> None:
    model = nn.Linear(3, 3)
    with torch.inference_mode():
        with undisturbed(model, parameters_require_grad=False):
            given = torch.ones(1, 3, requires_grad=True)
            (gradient,) = torch.autograd.grad(model(given).sum(), given)
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    assert gradient.shape == (1, 3)


def test_gradients_can_be_taken_below_no_grad() -> None:
    with torch.no_grad():
        with undisturbed(nn.Linear(3, 3), parameters_require_grad=False):
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_autocast_is_off_inside_and_on_again_outside() -> None:
    model = nn.Linear(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with undisturbed(model, parameters_require_grad=False):
            assert model(torch.ones(1, 3)).dtype == torch.float32
        assert model(torch.ones(1, 3)).dtype == torch.bfloat16


def test_parameters_that_can_have_no_gradient() -> None:
    model = nn.Linear(3, 3)
    model.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with undisturbed(model, parameters_require_grad=True):
        assert model.weight.requires_grad
    assert not model.codes.requires_grad


def test_a_module_without_parameters() -> None:
    model = nn.Dropout()
    with undisturbed(model, parameters_require_grad=True):
        assert not model.training
    assert model.training


def attributed(model: nn.Module) -> None:
    attribute(model, models.batch((6, 3)))


def attributed_in_vain(model: nn.Module) -> None:
    def target(logits: Tensor, batch: Any) -> Tensor:
        raise KeyError("in the user's target")

    with pytest.raises(ModelCallError, match="in the user's target") as caught:
        attribute(model, models.batch((6, 3)), target=target)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("analysis", [attributed, attributed_in_vain])
def test_an_analysis_leaves_no_trace(analysis: Callable[[nn.Module], None]) -> None:
    model = mixed()
    before = state(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    analysis(model)
    assert state(model) == before
    assert_same_random_state(random_before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("analysis", [attributed, attributed_in_vain])
def test_pending_gradients_are_untouched(analysis: Callable[[nn.Module], None]) -> None:
    model = mixed()
    model(**models.batch((6, 3))).logits.sum().backward()
    pending = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    values = {name: gradient.clone() for name, gradient in pending.items()}
    assert pending
    analysis(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is pending.get(name)
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])


def test_the_next_training_step_is_the_same_with_and_without_an_analysis() -> None:
    losses = []
    for analysed in (False, True):
        torch.manual_seed(3)
        model = mixed()
        steps = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            if analysed:
                attributed(model)
            loss = model(**models.batch((6, 3)), labels=torch.tensor([0, 2])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0] == losses[1]


class Writes(nn.Module):
    """A forward that writes into buffers, attributes and its encoder's configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.build("bert")
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("seen", torch.tensor(0))
        self.center: Tensor
        self.seen: Tensor
        self.calls = 0

    def forward(self, **batch: Any) -> Any:
        self.center.mul_(0.9).add_(0.1)
        self.seen += 1
        self.calls += 1
        return self.model(**batch, labels=torch.tensor([0] * len(batch["input_ids"])))


def test_what_a_forward_writes_is_taken_back() -> None:
    model = Writes()
    attribute(model, models.batch((5, 3)))
    assert model.center.tolist() == [0.0, 0.0, 0.0]
    assert int(model.seen) == 0
    assert model.calls == 0
    assert model.model.config.problem_type is None
