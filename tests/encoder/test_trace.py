import math
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from globenc_lightning.encoder.trace import AttentionCall, AttentionTrace
from tests import models


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def traced(run: Callable[[], Tensor]) -> tuple[Tensor, list[AttentionCall]]:
    calls: list[AttentionCall] = []
    with AttentionTrace(calls.append):
        output = run()
    return output, calls


def float_mask() -> Tensor:
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.float64)
    mask[0, :, :, 4:] = torch.finfo(torch.float64).min
    mask[1, :, 2] = drawn(1, 7, seed=9)
    return mask


def bool_mask() -> Tensor:
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, :, 4:] = False
    return mask


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        pytest.param({}, lambda s: s / math.sqrt(3), id="plain"),
        pytest.param({"scale": 1.0}, lambda s: s, id="scale"),
        pytest.param(
            {"attn_mask": bool_mask()}, lambda s: (s / math.sqrt(3)).masked_fill(~bool_mask(), -1e300), id="bool"
        ),
        pytest.param({"attn_mask": float_mask()}, lambda s: s / math.sqrt(3) + float_mask(), id="float"),
        pytest.param(
            {"is_causal": True},
            lambda s: (s / math.sqrt(3)).masked_fill(torch.arange(7) > torch.arange(5).unsqueeze(1), -1e300),
            id="causal",
        ),
    ],
)
def test_probabilities_of_the_fused_kernel(options: dict, scores: Callable[[Tensor], Tensor]) -> None:
    query, key, value = drawn(2, 4, 5, 3), drawn(2, 4, 7, 3, seed=1), drawn(2, 4, 7, 6, seed=2)
    output, calls = traced(lambda: F.scaled_dot_product_attention(query, key, value, **options))
    (call,) = calls
    expected = torch.softmax(scores(query @ key.transpose(-1, -2)), -1)
    torch.testing.assert_close(call.probabilities, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(call.probabilities @ call.values, output, rtol=1e-12, atol=1e-12)
    assert torch.equal(call.context, output)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, **options))


def test_arguments_of_the_fused_kernel_by_keyword() -> None:
    query, key, value = drawn(2, 4, 5, 3), drawn(2, 4, 5, 3, seed=1), drawn(2, 4, 5, 3, seed=2)
    _, calls = traced(lambda: F.scaled_dot_product_attention(query=query, key=key, value=value, scale=0.3))
    torch.testing.assert_close(calls[0].probabilities, torch.softmax(query @ key.transpose(-1, -2) * 0.3, -1))
    assert calls[0].values is value


def test_key_value_heads_that_are_shared() -> None:
    query, key, value = drawn(2, 6, 5, 4), drawn(2, 2, 5, 4, seed=1), drawn(2, 2, 5, 4, seed=2)
    output, calls = traced(lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    (call,) = calls
    assert call.probabilities.shape == (2, 6, 5, 5)
    assert call.values.shape == (2, 2, 5, 4)
    torch.testing.assert_close(call.probabilities @ call.repeated_values(), output, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, attn in models.VARIANTS if attn == "sdpa"])
def test_the_fused_kernel_gives_what_eager_code_gives(name: str) -> None:
    batch = models.batch((9, 4, 12), pad=models.FAMILIES[name].pad)
    found = {}
    for attn in ("eager", "sdpa"):
        model = models.build(name, attn, torch.float64)
        calls: list[AttentionCall] = []
        with torch.no_grad(), AttentionTrace(calls.append):
            model(**batch)
        found[attn] = calls
    assert len(found["eager"]) == len(found["sdpa"]) == models.FAMILIES[name].layers
    real = batch["attention_mask"].bool()
    for eager, fused in zip(found["eager"], found["sdpa"], strict=True):
        queries = real[:, None, :, None]
        difference = (eager.probabilities - fused.probabilities).masked_fill(~queries, 0.0)
        assert float(difference.abs().max()) < 1e-12
        keys = real[:, None, :, None]
        assert float((eager.values - fused.values).masked_fill(~keys, 0.0).abs().max()) < 1e-12


@pytest.mark.parametrize(("name", "attn"), models.VARIANTS)
def test_outputs_are_bit_identical(name: str, attn: str) -> None:
    model = models.build(name, attn)
    batch = models.batch((9, 4, 12), pad=models.FAMILIES[name].pad)
    with torch.no_grad():
        before = model(**batch).logits
        calls: list[AttentionCall] = []
        with AttentionTrace(calls.append):
            during = model(**batch).logits
    assert len(calls) == models.FAMILIES[name].layers
    assert torch.equal(before, during)


def test_probabilities_and_values_of_eager_code() -> None:
    scores, value = drawn(2, 4, 5, 7), drawn(2, 4, 7, 3, seed=1)
    output, calls = traced(lambda: F.softmax(scores, dim=-1) @ value)
    (call,) = calls
    assert torch.equal(call.probabilities, scores.softmax(-1))
    assert torch.equal(call.values, value)
    assert torch.equal(call.context, output)


@pytest.mark.parametrize(
    "product",
    [
        torch.matmul,
        torch.Tensor.matmul,
        lambda left, right: left @ right,
        lambda left, right: torch.matmul(left, other=right),
    ],
    ids=["function", "method", "operator", "keyword"],
)
@pytest.mark.parametrize(
    "softmax",
    [
        lambda scores: F.softmax(scores, dim=-1),
        lambda scores: F.softmax(scores, -1),
        lambda scores: torch.softmax(scores, dim=3),
        lambda scores: scores.softmax(-1),
        lambda scores: F.dropout(scores.softmax(dim=-1), p=0.5, training=False),
    ],
    ids=["functional", "positional", "torch", "method", "dropout"],
)
def test_forms_of_eager_code(softmax: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor], Tensor]) -> None:
    scores, value = drawn(2, 4, 5, 7), drawn(2, 4, 7, 3, seed=1)
    _, calls = traced(lambda: product(softmax(scores), value))
    assert len(calls) == 1
    assert torch.equal(calls[0].probabilities, scores.softmax(-1))
    assert torch.equal(calls[0].values, value)


def test_batched_product_over_examples_and_heads() -> None:
    scores, value = drawn(2, 4, 5, 7), drawn(2, 4, 7, 3, seed=1)
    output, calls = traced(lambda: torch.bmm(scores.softmax(-1).view(8, 5, 7), value.reshape(8, 7, 3)))
    (call,) = calls
    assert call.probabilities.shape == (2, 4, 5, 7)
    assert torch.equal(call.values, value)
    assert torch.equal(call.context, output.view(2, 4, 5, 3))


def test_softmax_in_higher_precision() -> None:
    scores, value = drawn(2, 4, 5, 7).bfloat16(), drawn(2, 4, 7, 3, seed=1).bfloat16()

    def attention() -> Tensor:
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32)
        return torch.matmul(F.dropout(probabilities.to(scores.dtype), p=0.1, training=False), value)

    output, calls = traced(attention)
    (call,) = calls
    assert call.probabilities.dtype == torch.float32
    assert torch.equal(call.probabilities, scores.float().softmax(-1))
    assert torch.equal(call.context, output)


def test_casts_in_a_row() -> None:
    scores, value = drawn(2, 4, 5, 7, dtype=torch.float32), drawn(2, 4, 7, 3, seed=1, dtype=torch.float32)
    _, calls = traced(lambda: torch.matmul(scores.softmax(-1).double().to(torch.float64).type_as(value), value))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda: F.softmax(drawn(2, 4, 5, 7), dim=1) @ drawn(2, 4, 7, 3), id="over heads"),
        pytest.param(lambda: F.softmax(drawn(2, 4, 5, 7), dim=-2) @ drawn(2, 4, 7, 3), id="over queries"),
        pytest.param(lambda: F.softmax(drawn(5, 7), dim=-1) @ drawn(7, 3), id="class probabilities"),
        pytest.param(lambda: F.softmax(drawn(2, 5, 7), dim=-1) @ drawn(2, 7, 3), id="pooling"),
        pytest.param(lambda: F.softmax(drawn(2, 4, 5, 7), dim=-1) * 2, id="no product"),
        pytest.param(lambda: drawn(2, 4, 3, 5) @ F.softmax(drawn(2, 4, 5, 7), dim=-1), id="right operand"),
        pytest.param(lambda: drawn(2, 4, 5, 7) @ drawn(2, 4, 7, 3), id="no softmax"),
    ],
)
def test_what_is_no_attention_is_not_reported(run: Callable[[], Tensor]) -> None:
    _, calls = traced(run)
    assert calls == []


def test_a_softmax_that_is_never_used_does_not_hide_the_next() -> None:
    scores, value = drawn(2, 4, 5, 7), drawn(2, 4, 7, 3, seed=1)

    def run() -> Tensor:
        drawn(2, 4, 5, 7, seed=5).softmax(-1)
        probabilities = scores.softmax(-1)
        # An unrelated product in between, of the same shape.
        torch.matmul(torch.ones(2, 4, 5, 7, dtype=torch.float64), value)
        return probabilities @ value

    output, calls = traced(run)
    assert len(calls) == 1
    assert torch.equal(calls[0].probabilities, scores.softmax(-1))
    assert torch.equal(calls[0].context, output)


def test_probabilities_are_reported_once() -> None:
    scores, value = drawn(2, 4, 5, 7), drawn(2, 4, 7, 3, seed=1)

    def run() -> Tensor:
        probabilities = scores.softmax(-1)
        return probabilities @ value + probabilities @ value

    assert len(traced(run)[1]) == 1


def test_another_thread_is_not_seen() -> None:
    scores, value = drawn(2, 4, 5, 5), drawn(2, 4, 5, 3, seed=1)
    calls: list[AttentionCall] = []

    def elsewhere() -> None:
        scores.softmax(-1) @ value
        F.scaled_dot_product_attention(value, value, value)

    with AttentionTrace(calls.append):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert calls == []


def test_nothing_is_seen_afterwards() -> None:
    value = drawn(2, 4, 5, 3)
    _, calls = traced(lambda: F.scaled_dot_product_attention(value, value, value))
    F.scaled_dot_product_attention(value, value, value)
    assert len(calls) == 1


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gradients_are_the_same(attn: str) -> None:
    model = models.build("bert", attn, torch.float64)
    batch = models.batch((9, 4))
    model(**batch).logits.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    calls: list[AttentionCall] = []
    with AttentionTrace(calls.append):
        loss = model(**batch).logits.square().sum()
    assert not any(call.probabilities.requires_grad or call.context.requires_grad for call in calls)
    assert all(call.values.requires_grad for call in calls)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_softmax_in_float32_before_a_product_in_float64() -> None:
    scores, values = drawn(2, 4, 5, 5), drawn(2, 4, 5, 3, seed=1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)
    output, (call,) = traced(lambda: F.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values)
    assert call.probabilities.dtype == torch.float64
    assert torch.equal(call.probabilities, weights.double())
    torch.testing.assert_close(call.probabilities @ call.repeated_values(), output, rtol=0, atol=0)


def test_memory_is_used_again_once_it_was_given_back_and_never_the_model_s_own() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3))
    calls: list[AttentionCall] = []
    with AttentionTrace(calls.append) as trace:
        for _ in range(2):
            F.scaled_dot_product_attention(query, key, value)
        assert calls[0].probabilities.data_ptr() != calls[1].probabilities.data_ptr()
        # Only the latest is nobody else's.
        trace.give_back(calls[0])
        F.scaled_dot_product_attention(key, query, value)
        assert calls[2].probabilities.data_ptr() not in [one.probabilities.data_ptr() for one in calls[:2]]
        trace.give_back(calls[2])
        F.scaled_dot_product_attention(query, key, value)
        assert calls[3].probabilities.data_ptr() == calls[2].probabilities.data_ptr()
        assert torch.equal(calls[3].probabilities, calls[0].probabilities)
        # Another size does not fit.
        trace.give_back(calls[3])
        F.scaled_dot_product_attention(query[:, :, :4], key, value)
        assert calls[4].probabilities.shape == (2, 3, 4, 5)
        torch.testing.assert_close(calls[4].probabilities, calls[0].probabilities[:, :, :4])

        eager = (query @ key.transpose(-2, -1)).softmax(-1)
        torch.matmul(eager, value)
        before = eager.clone()
        trace.give_back(calls[5])
        F.scaled_dot_product_attention(key, query, value)
        assert torch.equal(eager, before)


def test_a_mask_that_is_written_into_between_layers_is_read_anew() -> None:
    query, key, value = (torch.randn(1, 2, 4, 3) for _ in range(3))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    found: list[AttentionCall] = []
    with AttentionTrace(found.append):
        for hidden in (None, 3, 1):
            if hidden is not None:
                mask[..., hidden] = False
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert [(one.probabilities[0, 0, 0] == 0).nonzero().flatten().tolist() for one in found] == [[], [3], [1, 3]]
    for one in found:
        torch.testing.assert_close(one.probabilities @ one.values, one.context)
