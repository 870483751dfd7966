"""What follows an attention call, computed again of other numbers; what cannot be is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from globenc_lightning import attribute
from globenc_lightning.encoder.tape import Tape
from globenc_lightning.errors import UnsupportedEncoderError
from tests import models, zeroing
from tests.families import SHARED, Classifier, Family, example_inputs, redraw

BERT = Family("bert", "BertConfig", "post-LN")


class Activation(nn.Module):
    """Stands in for the activation of a feed-forward network."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.calls: list[int] = []
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, given: Tensor) -> Tensor:
        self.calls.append(1)
        self.mean += given.detach().mean().to(self.mean)
        return self.compute(given)


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, given: Tensor) -> Tensor:
        context.save_for_backward(given)
        return given.pow(3).clamp(-9, 9)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 3 * context.saved_tensors[0].square() * gradient


def pieces(given: Tensor) -> Tensor:
    """Written piece by piece into a tensor that is made for it."""
    out = torch.zeros(given.shape, dtype=given.dtype)
    half = given.shape[-1] // 2
    out[..., :half] = given[..., :half].relu()
    view = out[..., half:]
    view += given[..., half:].sigmoid()
    return out


def assigned(given: Tensor) -> Tensor:
    """Nothing but assignments, which return nothing, tell that what was made depends on what was given."""
    out = torch.zeros(given.shape, dtype=given.dtype)
    out[..., ::2] = given[..., ::2].relu()
    out[..., 1::2] = given[..., 1::2].sigmoid()
    return out


def in_place(given: Tensor) -> Tensor:
    # What tanh saves for its backward pass is copied before it is written into.
    return given.clone().mul_(2).tanh().clone().add_(given)


def through_data(given: Tensor) -> Tensor:
    """A view that no function of the graph gives."""
    return given.relu() + 0.3 * given.data.sigmoid()


def sorted_apart(given: Tensor) -> Tensor:
    """Which entries are kept depends on them, by tensors alone."""
    largest = given.topk(10, -1)
    return torch.zeros_like(given).scatter(-1, largest.indices, largest.values)


def with_activation(compute: Callable[[Tensor], Tensor]) -> Any:
    model = models.build("bert", dtype=torch.float64)
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = Activation(compute).double()
    return model


def zeroed(model: Any, inputs: Any) -> Tensor:
    return attribute(model, inputs, methods=("Value-Zeroing",)).local["Value-Zeroing"]


@pytest.mark.parametrize("compute", [Cubed.apply, pieces, assigned, in_place, through_data, sorted_apart])
def test_feed_forward_networks_written_in_any_way(compute: Callable[[Tensor], Tensor]) -> None:
    model, inputs = with_activation(compute), models.batch([6, 4])
    found = zeroed(model, inputs)
    naive = zeroing.scores(model, inputs, model.bert.encoder.layer, inputs["attention_mask"].bool())
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-9)


def test_where_gradients_are_switched_off_in_the_forward() -> None:
    """There, the analysis itself replaces ``.data``, so that a tensor is known by its memory alone."""
    model, inputs = with_activation(through_data), models.batch([6, 4])

    def without_gradients(module: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(**batch).logits
        return logits

    found = attribute(model, inputs, methods=("Value-Zeroing",), forward=without_gradients)
    naive = zeroing.scores(model, inputs, model.bert.encoder.layer, inputs["attention_mask"].bool())
    torch.testing.assert_close(found.local["Value-Zeroing"], naive, rtol=0, atol=1e-9)


def test_no_module_is_called_again_and_nothing_is_written() -> None:
    """Beside N-Enc alone: as many calls of modules and hooks, and buffers as they were."""
    counts = []
    for methods in (("N-Enc",), ("N-Enc", "ALTI", "Value-Zeroing")):
        model, inputs = with_activation(torch.tanh), models.batch([6, 4])
        calls: list[int] = []
        model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        before = {name: one.clone() for name, one in model.state_dict().items()}
        attribute(model, inputs, methods=methods)
        counts.append(len(calls))
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(layer.intermediate.intermediate_act_fn.calls == [] for layer in model.bert.encoder.layer)
    assert counts[0] == counts[1] > 0


def drawing(given: Tensor) -> Tensor:
    return given.relu() + 0.1 * torch.randn_like(given)


def deciding(given: Tensor) -> Tensor:
    return given.relu() if given.max() > 1 else given


def in_numbers(given: Tensor) -> Tensor:
    return given.relu() * float(given.detach().abs().max())


def in_numpy(given: Tensor) -> Tensor:
    return given.relu() + torch.from_numpy(given.detach().numpy()).tanh()


REASONS = {
    drawing: "gives another output when it is computed again",
    deciding: "looks at the numbers",
    in_numbers: "looks at the numbers",
    in_numpy: "looks at the numbers",
}


@pytest.mark.parametrize("compute", REASONS)
def test_what_cannot_be_computed_again_is_refused_in_words(compute: Callable[[Tensor], Tensor]) -> None:
    model, inputs = with_activation(compute), models.batch([6, 4])
    with pytest.raises(UnsupportedEncoderError, match=rf"Value-Zeroing is not defined for layer 1.*{REASONS[compute]}"):
        attribute(model, inputs, methods=("N-Enc", "Value-Zeroing"))
    # The others are, for every one of them that can be read without it.
    if compute is not drawing:
        assert attribute(model, inputs, methods=("N-Enc", "ALTI")).rows["ALTI"].isfinite().all()


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_a_mixture_of_experts_is_exact_or_refused(experts: str) -> None:
    if not hasattr(transformers, "MixtralConfig") or int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers computes its experts in one way alone")
    config = transformers.MixtralConfig(**{**SHARED, "num_local_experts": 4})
    config._experts_implementation = experts
    encoder = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
    model: Any = redraw(Classifier(encoder)).eval()
    inputs = example_inputs(Family("mixtral", "MixtralConfig", "pre-LN", SHARED))
    if experts == "eager":
        with pytest.raises(UnsupportedEncoderError, match="mixture of experts"):
            zeroed(model, inputs)
        return
    naive = zeroing.scores(model, inputs, model.encoder.layers, inputs["attention_mask"].bool())
    torch.testing.assert_close(zeroed(model, inputs).double(), naive, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_half_precision_are_computed_again_in_float32(dtype: torch.dtype) -> None:
    """As far from the same weights in float32 as their attention is; rounding at every replay would be all there is."""
    model, inputs = models.build("bert").to(dtype), models.batch([6, 4])
    found = attribute(model, inputs, methods=("Value-Zeroing", "W"))
    exact = attribute(models.build("bert").to(dtype).float(), inputs, methods=("Value-Zeroing", "W"))
    assert found.local["Value-Zeroing"].dtype == torch.float32
    off = (found.local["Value-Zeroing"] - exact.local["Value-Zeroing"]).abs().max()
    assert off < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_change_that_half_precision_would_round_off_is_seen(dtype: torch.dtype) -> None:
    source, weight = torch.full((1, 1, 2, 4), 1.5, dtype=dtype), torch.full((4,), 3.0, dtype=dtype)
    tape = Tape(source)
    tape.close(tape.run(torch.mul, (source, weight), {}), set())
    found = tape.replay(torch.full((1, 1, 2, 4), 1.5 * (1 + 1e-5)), "a layer")
    torch.testing.assert_close(found, torch.full((1, 1, 2, 4), 4.5 * (1 + 1e-5)), rtol=1e-6, atol=0)


def test_what_the_forward_writes_into_is_as_it_was_at_every_replay() -> None:
    """The residual stream itself, to which the output is added in place: it is no result of anything that was seen."""
    source, stream = torch.ones(1, 1, 2, 4), torch.full((1, 1, 2, 4), 2.0)
    tape = Tape(source)
    out = tape.run(Tensor.add_, (stream, source), {})
    tape.close(tape.run(torch.mul, (out, 10.0), {}), set())
    for given in (1.0, 5.0, 5.0):
        found = tape.replay(torch.full((1, 1, 2, 4), given), "a layer")
        torch.testing.assert_close(found, torch.full((1, 1, 2, 4), 10 * (2 + given)))
    assert (stream == 3).all()


def test_what_no_function_made_is_refused() -> None:
    """A kernel of one's own, say, of whose result the graph alone tells where it comes from."""
    source = torch.ones(1, 1, 2, 4, requires_grad=True) * 1.0
    unseen = source * 2.0
    tape = Tape(source)
    tape.close(tape.run(torch.add, (source, unseen), {}), set())
    with pytest.raises(UnsupportedEncoderError, match="no torch function"):
        tape.refuse("layer 1")
    other = Tape(source)
    other.close(unseen.sin(), set())
    with pytest.raises(UnsupportedEncoderError, match="comes from something that is no torch function"):
        other.refuse("layer 1")


def test_a_single_token_is_all_that_its_own_output_depends_on() -> None:
    found = zeroed(models.build("bert", dtype=torch.float64), models.batch([1]))
    torch.testing.assert_close(found, torch.ones_like(found))
