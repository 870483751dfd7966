import functools
import pickle
import random
import types
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
import transformers
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from transformers import BertModel, DynamicCache

from globenc_lightning import attribute
from globenc_lightning.encoder import undisturbed as undisturbed_module
from globenc_lightning.encoder.undisturbed import as_evaluated, undisturbed
from globenc_lightning.errors import GlobEncError, GlobEncWarning, ModelCallError
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


# ---- what a forward makes once, changes in place or exchanges


class Keeps(nn.Module):
    """A classifier whose forward also does something that stays; ``made`` holds what it needs for that."""

    def __init__(self, make: Callable[["Keeps"], None], act: Callable[["Keeps", Tensor], Any]) -> None:
        super().__init__()
        self.model = models.build("bert")
        self.act = act
        self.asks: dict[str, bool] = {}
        make(self)
        self.train()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = self.model.bert(input_ids=input_ids, attention_mask=attention_mask, **self.asks)
        hidden = output.last_hidden_state[:, 0]
        assert "output_hidden_states" not in self.asks or len(output.hidden_states) == 4
        added = self.act(self, hidden)
        logits: Tensor = self.model.classifier(hidden)
        return logits if added is None else logits + added


@dataclass
class Tally:
    """State that is no module."""

    calls: int = 0
    seen: list[int] = field(default_factory=list)


class Teacher:
    """A module that no state dict shows."""

    def __init__(self) -> None:
        self.module = nn.Linear(32, 3)


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []


# Before 4.54, transformers collects hidden states in the code of each model.
BY_HOOKS = hasattr(BertModel, "_can_record_outputs")


def nothing(model: Any, hidden: Tensor | None = None) -> None:
    pass


def asks_for_hidden_states(model: Any) -> None:
    model.asks["output_hidden_states"] = True


def asks_for_attentions(model: Any) -> None:
    models.set_attention(model.model, "eager")
    model.asks["output_attentions"] = True


def with_containers(model: Any) -> None:
    model.items = [1]
    model.table = {"a": [1], "b": {"c": [2]}}
    model.ordered = OrderedDict(one=1, two=2)
    model.unique = {"x"}
    model.recent = deque([1, 2], maxlen=2)
    model.counter = Counter(a=1)
    model.pair = ([1], {"k": 1})
    model.empty = []
    model.bytes_written = bytearray(b"ab")


def change_containers(model: Any, hidden: Tensor) -> None:
    model.items.append(hidden)
    model.table["a"].append(hidden)
    model.table["b"]["c"][0] = 7
    model.table["new"] = 1
    model.ordered.move_to_end("one")
    model.unique.add("y")
    model.recent.append(3)
    model.counter["a"] += 1
    model.pair[0].clear()
    model.pair[1]["k"] = 2
    model.empty.append(1)
    model.bytes_written.extend(b"c")


def with_generators(model: Any) -> None:
    model.draw = torch.Generator().manual_seed(1)
    model.draws = {"numpy": np.random.default_rng(1), "old": [np.random.RandomState(1)], "python": random.Random(1)}


def use_generators(model: Any, hidden: Tensor) -> None:
    torch.rand(2, generator=model.draw)
    model.draws["numpy"].random()
    model.draws["old"][0].rand()
    model.draws["python"].random()


def with_tensors(model: Any) -> None:
    model.total = torch.zeros(3)
    model.nan = torch.tensor([float("nan"), -0.0])
    model.scalar = torch.tensor(0, dtype=torch.int16)
    model.expanded = torch.zeros(1).expand(3)
    model.parts = {"sum": [torch.zeros(2, 2)], "view": torch.arange(6.0).view(2, 3).t()}
    model.array = np.zeros(3)


def change_tensors(model: Any, hidden: Tensor) -> None:
    model.total += 1
    model.nan[1] = 0.0
    model.scalar += 1
    model.expanded[0] = 1
    model.parts["sum"][0].fill_(3)
    model.parts["view"].mul_(2)
    model.array += 1


def with_buffers(model: Any) -> None:
    model.register_buffer("written", torch.zeros(3))
    model.register_buffer("assigned", torch.zeros(3))
    model.register_buffer("resized", torch.arange(3.0))
    model.register_buffer("exchanged", torch.arange(4.0).view(2, 2).t())
    model.register_buffer("late", None)
    model.norm = nn.BatchNorm1d(32)


def change_buffers(model: Any, hidden: Tensor) -> None:
    model.written += 1
    model.assigned = model.assigned + 1
    model.resized.resize_(1000).fill_(1)
    model.exchanged.data = torch.ones(5)
    model.late = torch.ones(1)
    model.register_buffer("more", torch.ones(1), persistent=False)
    model.norm.train()
    model.norm(hidden)


def with_metrics(model: Any) -> None:
    model.accuracy = torchmetrics.MeanMetric()
    model.accuracy.update(torch.ones(2))
    model.several = torchmetrics.MetricCollection({"sum": torchmetrics.SumMetric(), "all": torchmetrics.CatMetric()})


def update_metrics(model: Any, hidden: Tensor) -> None:
    model.accuracy.update(hidden.detach().mean())
    model.accuracy.compute()
    model.several.update(hidden.detach()[:, 0])


def with_hooks(model: Any) -> None:
    model.model.classifier.register_forward_hook(print_nothing)
    model.model.classifier.register_forward_pre_hook(print_nothing)


def print_nothing(*args: Any) -> None:
    pass


def add_nothing(*args: Any) -> None:
    pass


def register_hooks(model: Any, hidden: Tensor) -> None:
    one = model.model.bert.pooler.dense
    one.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    one.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    one.register_full_backward_hook(lambda *_: None)
    one.register_full_backward_pre_hook(lambda *_: None)
    one.register_state_dict_pre_hook(lambda *_: None)
    one.register_state_dict_post_hook(lambda *_: None)
    one.register_load_state_dict_pre_hook(lambda *_: None)
    one.register_load_state_dict_post_hook(lambda *_: None)
    first = next(iter(model.model.classifier._forward_hooks))
    model.model.classifier._forward_hooks[first] = add_nothing
    model.model.classifier._forward_pre_hooks.clear()


def exchange_modules(model: Any, hidden: Tensor) -> None:
    model.made_late = nn.Linear(2, 2)
    model.model.dropout = nn.Identity()
    del model.model.bert.pooler
    model.extra = nn.Parameter(torch.ones(2))
    model.model.classifier.forward = functools.partial(type(model.model.classifier).forward, model.model.classifier)
    model.model.classifier.training = True


def with_lazy_head(model: Any) -> None:
    model.lazy = nn.LazyLinear(3)
    model.lazy_norm = nn.LazyBatchNorm1d()


def use_lazy_head(model: Any, hidden: Tensor) -> Tensor:
    added: Tensor = model.lazy(model.lazy_norm(hidden))
    assert type(model.lazy) is nn.Linear
    return added


def with_objects(model: Any) -> None:
    model.tally = Tally()
    model.space = types.SimpleNamespace(calls=0, inner=Tally())
    model.cache = DynamicCache()
    model.cache.update(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), 0)
    model.teacher = Teacher()
    model.teachers = [nn.Linear(2, 2)]


def change_objects(model: Any, hidden: Tensor) -> None:
    model.tally.calls += 1
    model.tally.seen.append(1)
    model.space.calls += 1
    model.space.inner.seen.append(1)
    model.cache.update(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), 0)
    with torch.no_grad():
        model.teacher.module.weight.mul_(0.9)
    model.teachers[0].note = 1
    model.teachers.append(nn.Linear(3, 3))


def change_config(model: Any, hidden: Tensor) -> None:
    model.model.config.id2label[7] = "new"
    model.model.config.problem_type = "regression"
    model.model.config.something = {"a": 1}


def with_parameters(model: Any) -> None:
    model.bounded = nn.Embedding(4, 8, max_norm=0.5)
    model.teacher = nn.Linear(4, 4).requires_grad_(False)
    model.clamped = nn.Parameter(torch.full((3,), 2.0))
    model.exchanged = nn.Parameter(torch.full((3,), 2.0))


def change_parameters(model: Any, hidden: Tensor) -> None:
    model.bounded(torch.tensor([1, 2]))
    model.teacher.weight.data.mul_(0.9)
    model.clamped.data.clamp_(-1, 1)
    model.exchanged.data = torch.zeros(5)


def with_old_style_norms(model: Any) -> None:
    model.weight_normed = nn.utils.weight_norm(nn.Linear(32, 3))
    model.spectral = nn.utils.spectral_norm(nn.Linear(32, 3))
    model.parametrized = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 3))


def use_old_style_norms(model: Any, hidden: Tensor) -> Tensor:
    for one in (model.spectral, model.parametrized.parametrizations.weight[0], model.parametrized):
        one.train()
    added: Tensor = model.weight_normed(hidden) + model.spectral(hidden)
    with nn.utils.parametrize.cached():
        return added + model.parametrized(hidden)


MEMBERS: dict[str, tuple[Callable[[Any], None], Callable[[Any, Tensor], Any]]] = {
    **({"hidden states": (asks_for_hidden_states, nothing)} if BY_HOOKS else {}),
    "attentions": (asks_for_attentions, nothing),
    "containers": (with_containers, change_containers),
    "generators": (with_generators, use_generators),
    "tensors": (with_tensors, change_tensors),
    "buffers": (with_buffers, change_buffers),
    "metrics": (with_metrics, update_metrics),
    "hooks": (with_hooks, register_hooks),
    "modules": (nothing, exchange_modules),
    "lazy modules": (with_lazy_head, use_lazy_head),
    "objects": (with_objects, change_objects),
    "configurations": (nothing, change_config),
    "parameters": (with_parameters, change_parameters),
    "norms of weights": (with_old_style_norms, use_old_style_norms),
}


def picture(value: Any, depth: int = 9, seen: dict[int, int] | None = None) -> Any:
    """All that hangs on a value, by identity, order and content; objects are numbered in the order they are met."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if id(value) in seen or not depth:
        return ("again", id(value))
    seen[id(value)] = len(seen)
    found: list[Any] = [id(value), type(value).__name__]
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        return [*found, value.requires_grad]
    if isinstance(value, Tensor):
        data = value.detach()
        place = value.data_ptr() if isinstance(value, nn.Parameter) else None
        found += [value.shape, value.stride(), value.dtype, value.requires_grad, place]
        # A copy: what numpy has seen can be resized no more.
        content = data.contiguous().clone().numpy().tobytes()
        return [*found, content, id(value.grad) if value.is_leaf and value.grad is not None else None]
    if isinstance(value, np.ndarray):
        return [*found, value.tobytes()]
    if isinstance(value, torch.Generator):
        return [*found, value.get_state().tolist()]
    if isinstance(value, np.random.Generator):
        return [*found, str(value.bit_generator.state)]
    if isinstance(value, np.random.RandomState):
        return [*found, str(value.get_state(legacy=False))]
    if isinstance(value, random.Random):
        return [*found, value.getstate()]
    if isinstance(value, dict):
        found.append([(picture(key, depth - 1, seen), picture(one, depth - 1, seen)) for key, one in value.items()])
    elif isinstance(value, list | tuple | deque | set | bytearray):
        found.append([picture(one, depth - 1, seen) for one in value])
    if hasattr(value, "__dict__") and not isinstance(value, type | types.FunctionType):
        found.append([(key, picture(one, depth - 1, seen)) for key, one in vars(value).items()])
    return found


@pytest.mark.parametrize("analysis", [attributed, attributed_in_vain])
@pytest.mark.parametrize("name", MEMBERS)
def test_whatever_a_forward_makes_or_changes_is_put_back(name: str, analysis: Callable[[nn.Module], None]) -> None:
    model = Keeps(*MEMBERS[name])
    before = picture(model)
    analysis(model)
    assert picture(model) == before
    analysis(model)
    assert picture(model) == before


@pytest.mark.parametrize("name", MEMBERS)
def test_what_these_forwards_do_can_be_seen(name: str) -> None:
    model = Keeps(*MEMBERS[name])
    before = picture(model)
    model(**models.batch((6, 3)))
    assert picture(model) != before


def test_an_encoder_that_is_refused_is_put_back() -> None:
    model = models.build("convbert")
    before = picture(model)
    with pytest.raises(GlobEncError):
        attribute(model, models.batch((6, 3)), forward=lambda module, batch: asked(module, batch))
    assert picture(model) == before


def asked(module: Any, batch: Any) -> Any:
    return module(**batch, output_hidden_states=True)


@pytest.mark.skipif(
    not BY_HOOKS, reason=f"transformers {transformers.__version__} collects hidden states without hooks"
)
def test_hidden_states_are_collected_once_however_often_a_model_is_analysed() -> None:
    model, fresh = Keeps(asks_for_hidden_states, nothing), Keeps(asks_for_hidden_states, nothing)
    for _ in range(3):
        attributed(model)
    for one in (model, fresh):
        one(**models.batch((6, 3)))
    assert hooks(model) == hooks(fresh) > 0


def test_a_lazy_module_trains_on_with_the_parameters_that_its_optimizer_holds() -> None:
    torch.manual_seed(0)
    model = Keeps(with_lazy_head, use_lazy_head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = model.lazy.weight
    attributed(model)
    assert isinstance(held, UninitializedParameter)
    assert model.lazy.weight is held
    model(**models.batch((6, 3))).sum().backward()
    assert any(held is one for one in optimizer.param_groups[0]["params"])
    before = held.detach().clone()
    optimizer.step()
    assert held.shape == (3, 32)
    assert not torch.equal(held, before)


def test_what_libraries_hold_is_not_looked_into() -> None:
    def make(model: Any) -> None:
        model.data = Data()

    def act(model: Any, hidden: Tensor) -> None:
        model.data.asked.append(len(hidden))

    model = Keeps(make, act)
    attributed(model)
    assert model.data.asked


def test_gradients_that_wait_are_not_added_to_by_a_backward_inside_a_forward() -> None:
    def act(model: Any, hidden: Tensor) -> None:
        if hidden.requires_grad and model.model.classifier.weight.requires_grad:
            model.model.classifier(hidden).sum().backward(retain_graph=True)

    model = Keeps(nothing, act)
    model.model(**models.batch((6, 3))).logits.sum().backward()
    before = picture(model)
    gradients = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
    attributed(model)
    assert picture(model) == before
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_what_was_made_below_inference_mode_can_be_used_and_stays_what_it_is() -> None:
    def make(model: Any) -> None:
        model.total = torch.zeros(())
        model.scale = torch.ones(32)
        model.register_buffer("center", torch.zeros(32))

    def act(model: Any, hidden: Tensor) -> Tensor:
        model.total += 1
        return (hidden * model.scale + model.center).mean(1, keepdim=True)

    model = Keeps(make, act)
    with torch.inference_mode():
        model.total, model.scale, model.center = torch.zeros(()), torch.ones(32), torch.zeros(32)
        held = (model.total, model.scale, model.center)
        attributed(model)
    assert all(now is then for now, then in zip((model.total, model.scale, model.center), held, strict=True))
    assert model.total.is_inference()
    assert float(model.total) == 0


def test_a_parameter_that_a_forward_writes_into_for_the_first_time_later_is_told_and_then_put_back() -> None:
    def make(model: Any) -> None:
        model.prototypes = nn.Parameter(torch.ones(3))
        model.renew = False

    def act(model: Any, hidden: Tensor) -> None:
        if model.renew:
            with torch.no_grad():
                model.prototypes.mul_(0.5)

    model = Keeps(make, act)
    attributed(model)
    model.renew = True
    with pytest.warns(GlobEncWarning, match="wrote into prototypes of which there was no copy"):
        attributed(model)
    before = model.prototypes.detach().clone()
    attributed(model)
    assert torch.equal(model.prototypes, before)


class Merges(nn.Linear):
    """A head whose adapter is merged into its weight for an evaluation."""

    def __init__(self, by_data: bool) -> None:
        super().__init__(32, 3)
        self.by_data, self.merged = by_data, False
        self.down, self.up = nn.Parameter(torch.randn(2, 32)), nn.Parameter(torch.randn(3, 2))

    def train(self, mode: bool = True) -> "Merges":
        super().train(mode)
        if mode == self.merged:
            added = (self.up @ self.down).detach() * (-1 if mode else 1)
            if self.by_data:
                self.weight.data += added
            else:
                with torch.no_grad():
                    self.weight += added
            self.merged = not mode
            Tally.calls += 1
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("most", [undisturbed_module.MOST_COPIED, 100])
@pytest.mark.parametrize("by_data", [True, False])
def test_weights_into_which_eval_merges_are_put_back(by_data: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undisturbed_module, "MOST_COPIED", most)
    monkeypatch.setattr(Tally, "calls", 0)
    model = models.build("bert")
    model.classifier = Merges(by_data).to(model.dtype)
    model.train()
    before = picture(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attributed(model)
    assert picture(model) == before
    # Where there is no room for copies, nothing is merged.
    assert (Tally.calls > 0) == (most > 100)


def test_as_evaluated_is_the_users_own_evaluation() -> None:
    model = models.build("bert", attn="eager").train()
    model.config.chunk_size_feed_forward = 2
    before = picture(model)
    with as_evaluated(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert model.config._attn_implementation == "eager"
        assert model.config.chunk_size_feed_forward == 2
        model(**models.batch((4,)), output_hidden_states=True)
        torch.rand(1)
    assert picture(model) == before


def test_a_large_attribute_is_not_copied_and_a_write_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undisturbed_module, "LARGEST", 100)

    def make(model: Any) -> None:
        model.small, model.large = torch.zeros(3), torch.zeros(7, 9)
        model.register_buffer("buffer", torch.zeros(7, 9))

    def act(model: Any, hidden: Tensor) -> None:
        for one in (model.small, model.large, model.buffer):
            one.add_(1)

    model = Keeps(make, act)
    with pytest.warns(GlobEncWarning, match=r"an attribute, a tensor of shape \(7, 9\)"):
        attributed(model)
    assert float(model.small.sum()) == float(model.buffer.sum()) == 0
    assert float(model.large.sum()) > 0
