"""Value Zeroing of layers written out by hand; that of real models is in ``tests/test_rivals.py``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from globenc_lightning.functional.alti import alti
from globenc_lightning.functional.value_zeroing import value_zeroing


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_turn_of_each_output_without_a_token() -> None:
    b, h, s, v, d = 2, 3, 5, 4, 6
    mask = torch.arange(s) < torch.tensor([[5], [3]])
    attention = drawn(b, h, s, s).masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    values, projection, x, w = drawn(b, h, s, v, seed=1), drawn(d, h * v, seed=2), drawn(b, s, d, seed=3), drawn(d, d)
    calls = []

    def rest(context: Tensor) -> Tensor:
        calls.append(1)
        stream = F.layer_norm(x + context.transpose(1, 2).flatten(2) @ projection.T, (d,))
        return stream + torch.tanh(stream @ w)

    context = attention @ values
    found = value_zeroing(attention, values, context, rest, mask)
    assert len(calls) == 1 + s
    assert (value_zeroing(attention, values, context, rest, mask, rest(context)) == found).all()
    for example, length in enumerate([5, 3]):
        scores = torch.zeros(length, length, dtype=torch.float64)
        for token in range(length):
            without = values.clone()
            without[:, :, token] = 0
            turned = 1 - F.cosine_similarity(rest(context), rest(attention @ without), dim=-1)
            scores[:, token] = turned[example, :length]
        expected = scores / scores.sum(-1, keepdim=True)
        torch.testing.assert_close(found[example, :length, :length], expected)
        assert (found[example, length:] == 0).all()
        assert (found[example, :, length:] == 0).all()


def test_a_token_that_nobody_attends_to_scores_nothing_at_all() -> None:
    """Not rounding: a causal model's later tokens."""
    attention = drawn(1, 2, 4, 4).float().masked_fill(~torch.ones(4, 4).tril().bool(), float("-inf")).softmax(-1)
    values, mask = drawn(1, 2, 4, 3).float(), torch.ones(1, 4).bool()
    x = drawn(1, 4, 6, seed=2).float()
    found = value_zeroing(attention, values, attention @ values, lambda c: x + c.transpose(1, 2).flatten(2), mask)
    assert (found.triu(1) == 0).all()
    assert (found.tril() > 0).sum() == 10


def test_what_lies_along_the_stream_counts_for_alti_and_does_not_turn_anything() -> None:
    """One head, two tokens: the first one's value is along the residual, the second one's at a right angle to it."""
    attention = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    x = torch.tensor([[[2.0, 0.0], [2.0, 0.0]]], dtype=torch.float64)
    values = torch.tensor([[[[2.0, 0.0], [0.0, 0.4]]]], dtype=torch.float64)
    mask, context = torch.ones(1, 2).bool(), attention @ values
    output = x + context[:, 0]
    by_turn = value_zeroing(attention, values, context, lambda given: x + given[:, 0], mask)
    by_distance = alti(attention, values, torch.eye(2, dtype=torch.float64), x, output, mask)
    # Each output holds more of the first token's vector, and turns more without the second one's.
    assert by_distance[0, 0].argmax() == 0
    assert by_turn[0, 0].argmax() == 1
    assert by_distance[0, 0, 0] > 0.9
    assert by_turn[0, 0, 0] < 0.2
