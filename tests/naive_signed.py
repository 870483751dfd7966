"""DecompX without biases as the paper states it: every vector of the network as a sum over the input tokens.

Modarressi et al., ACL 2023, sections 3.1 to 3.4. A hidden state is kept as ``parts`` (q, k, d): what token k has
contributed to the vector of token q. Each module of the layer is applied to the parts, with what it really computed
held fixed: attention probabilities, the norms' standard deviations, f(z) / z of the activations. No gradient is taken.

Axes: ``q`` token that receives, ``k`` token that contributed, ``d`` hidden, ``h`` head, ``v`` head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Parts = tuple[Tensor, Tensor]
"""A vector (q, d) as it really is, and its parts (q, k, d)."""


def dense(module: nn.Module, state: Parts) -> Parts:
    """A linear layer: its bias belongs to no token."""
    real, parts = state
    return module(real), parts @ module.weight.T  # type: ignore[operator]


def bent(function: Callable[[Tensor], Tensor], state: Parts) -> Parts:
    """An activation with f(0) = 0: every part times f(z) / z."""
    real, parts = state
    after = function(real)
    return after, parts * (after / real).unsqueeze(1)


def norm(module: nn.LayerNorm, state: Parts) -> Parts:
    """A LayerNorm, with the standard deviation of what really enters it."""
    real, parts = state
    deviation = (real.var(-1, correction=0) + module.eps).sqrt()[:, None, None]
    return module(real), (parts - parts.mean(-1, keepdim=True)) / deviation * module.weight


def added(left: Parts, right: Parts) -> Parts:
    return left[0] + right[0], left[1] + right[1]


def attention(module: Any, state: Parts, heads: int) -> Parts:
    """Self-attention up to the output projection, heads one after the other."""
    real, _ = state
    width = real.shape[-1] // heads
    query, key = module.query(real), module.key(real)
    value, values = dense(module.value, state)
    reals, contributed = [], []
    for one in range(heads):
        own = slice(one * width, (one + 1) * width)
        weights = (query[:, own] @ key[:, own].T / width**0.5).softmax(-1)
        reals.append(weights @ value[:, own])
        contributed.append(torch.einsum("qj,jkv->qkv", weights, values[..., own]))
    return torch.cat(reals, -1), torch.cat(contributed, -1)


def post_norm_layer(layer: Any, state: Parts, heads: int, function: Callable[[Tensor], Tensor]) -> Parts:
    """A layer of BERT."""
    mixed = dense(layer.attention.output.dense, attention(layer.attention.self, state, heads))
    state = norm(layer.attention.output.LayerNorm, added(mixed, state))
    inner = bent(function, dense(layer.intermediate.dense, state))
    return norm(layer.output.LayerNorm, added(dense(layer.output.dense, inner), state))


def pre_norm_layer(layer: Any, state: Parts, heads: int, function: Callable[[Tensor], Tensor]) -> Parts:
    """A layer of RoBERTa with norms before its sub-layers."""
    entering = norm(layer.attention.LayerNorm, state)
    state = added(dense(layer.attention.output.dense, attention(layer.attention.self, entering, heads)), state)
    entering = norm(layer.intermediate.LayerNorm, state)
    inner = bent(function, dense(layer.intermediate.dense, entering))
    return added(dense(layer.output.dense, inner), state)


def begin(hidden: Tensor) -> Parts:
    """The first hidden states (q, d): each token's is its own."""
    own = torch.eye(len(hidden), dtype=hidden.dtype)
    return hidden, own.unsqueeze(-1) * hidden.unsqueeze(1)


def of_bert(model: Any, ids: Tensor, function: Callable[[Tensor], Tensor]) -> Parts:
    """The logits (1, c) of a ``BertForSequenceClassification`` for one text (q,), and their parts (1, k, c)."""
    state = begin(model.bert.embeddings(ids.unsqueeze(0))[0])
    for layer in model.bert.encoder.layer:
        state = post_norm_layer(layer, state, model.config.num_attention_heads, function)
    first = (state[0][:1], state[1][:1])
    return dense(model.classifier, bent(torch.tanh, dense(model.bert.pooler.dense, first)))


def of_prenorm_roberta(model: Any, ids: Tensor, function: Callable[[Tensor], Tensor]) -> Parts:
    """The same of a ``RobertaPreLayerNormForSequenceClassification``."""
    encoder = model.roberta_prelayernorm
    state = begin(encoder.embeddings(ids.unsqueeze(0))[0])
    for layer in encoder.encoder.layer:
        state = pre_norm_layer(layer, state, model.config.num_attention_heads, function)
    state = norm(encoder.LayerNorm, state)
    first = (state[0][:1], state[1][:1])
    return dense(model.classifier.out_proj, bent(torch.tanh, dense(model.classifier.dense, first)))
