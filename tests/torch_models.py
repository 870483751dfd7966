"""Models of torch's own attention modules, and their maps by hand: every product written out, no module called.

The forward pass below is written from the modules' weights alone, so that it can only agree with what the package reads
by both being right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import naive
from tests.models import redraw

VOCABULARY, WIDTH, HEADS, CLASSES, LONGEST = 60, 16, 4, 3, 30


class Classifier(nn.Module):
    """Embeddings, positions, an ``nn.TransformerEncoder``, and a head on the first token.

    Args:
        mask: the ``mask=`` of the encoder for a number of tokens, or None.
        padded: whether padding is told to the encoder.
        final: whether it has a final norm.
        nested: ``enable_nested_tensor`` of the encoder.
        options: those of ``nn.TransformerEncoderLayer``.
    """

    def __init__(
        self, *, mask: Any = None, padded: bool = True, final: bool = False, nested: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.mask, self.padded = mask, padded
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.places = nn.Embedding(LONGEST, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, **options)
        norm = nn.LayerNorm(WIDTH) if final else None
        self.encoder = nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=nested)
        self.head = nn.Linear(WIDTH, CLASSES)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.places(torch.arange(ids.shape[1]))

    def encoded(self, ids: Tensor) -> Tensor:
        x, first = self.embedded(ids), self.encoder.layers[0].self_attn.batch_first
        mask = None if self.mask is None else self.mask(ids.shape[1])
        padding = ids == 0 if self.padded else None
        if mask is not None and mask.is_floating_point() and padding is not None:
            padding = torch.zeros_like(padding, dtype=mask.dtype).masked_fill(padding, float("-inf"))
        out = self.encoder(x if first else x.transpose(0, 1), mask=mask, src_key_padding_mask=padding)
        return out if first else out.transpose(0, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoded(input_ids)[:, 0])


class Block(nn.Module):
    """A layer of a user's own around ``nn.MultiheadAttention``.

    Args:
        pre: whether it normalises before its sub-layers.
        first: ``batch_first`` of its attention.
        turns: whether it exchanges examples and tokens around its attention.
        asked: what it asks its attention for: ``need_weights`` and ``average_attn_weights``.
        options: those of ``nn.MultiheadAttention``.
    """

    def __init__(
        self, pre: bool, first: bool = True, turns: bool = False, asked: Sequence[bool] = (True, True), **options: Any
    ) -> None:
        super().__init__()
        self.pre, self.turns, self.asked = pre, turns, asked
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, 0.1, batch_first=first, **options)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def attended(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turns else x
        weights, average = self.asked
        options = {"need_weights": weights, "average_attn_weights": average}
        out: Tensor = self.attention(x, x, x, key_padding_mask=padding, **options)[0]
        return out.transpose(0, 1) if self.turns else out

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attended(self.norm1(x), padding)
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attended(x, padding))
        return self.norm2(x + self.feed(x))


class Blocks(nn.Module):
    """Embeddings, blocks in an ``nn.ModuleList`` that nothing calls as a whole, a norm after them, and a head."""

    def __init__(self, *, pre: bool, final: bool = True, sequence_first: bool = False, **options: Any) -> None:
        super().__init__()
        self.sequence_first = sequence_first
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.places = nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList([Block(pre, **options) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH) if final else None
        self.head = nn.Linear(WIDTH, CLASSES)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.places(torch.arange(ids.shape[1]))

    def encoded(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        x = x.transpose(0, 1) if self.sequence_first else x
        for block in self.blocks:
            x = block(x, ids == 0)
        x = x if self.norm is None else self.norm(x)
        return x.transpose(0, 1) if self.sequence_first else x

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoded(input_ids)[:, 0])


def texts(lengths: Sequence[int] = (8, 5, 1, 6), seed: int = 0) -> Tensor:
    """Token ids (b, s), 0 at padding."""
    drawn = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return drawn.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1), 0)


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """The model in float64 and eval mode, with parameters so that a wrong formula shows."""
    redraw(model, seed)
    return model.double().eval()


@dataclass
class ByHand:
    """What a forward pass by hand gave.

    Attributes:
        maps: of each layer: method -> (b, q, k).
        logits: (b, c).
        saliency: (b, k) of the largest logit.
    """

    maps: list[dict[str, Tensor]] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    saliency: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class _Parts:
    attention: nn.MultiheadAttention
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    feed: tuple[nn.Linear, nn.Linear]
    activation: Any
    pre: bool


def by_hand(model: Any, ids: Tensor) -> ByHand:
    """Maps, logits and saliency of :class:`Classifier` or :class:`Blocks`."""
    real = ids != 0
    seen = torch.ones_like(real) if getattr(model, "padded", True) is False else real
    size = ids.shape[1]
    bias = torch.zeros(size, size, dtype=torch.float64)
    mask = getattr(model, "mask", None)
    if mask is not None:
        given = mask(size)
        bias = given if given.is_floating_point() else bias.masked_fill(given, float("-inf"))
    # (b or 1, h or 1, q, k)
    bias = bias.view(-1, HEADS, size, size) if bias.dim() == 3 else bias
    bias = bias + torch.zeros(len(ids), 1, 1, size, dtype=torch.float64).masked_fill(
        ~seen[:, None, None], float("-inf")
    )
    with torch.no_grad():
        x = model.embed.weight[ids] + model.places.weight[: ids.shape[1]]
    first = x.detach().requires_grad_()
    found = ByHand()
    x, found.maps = through(model, first, bias, seen)
    found.logits = x[:, 0] @ model.head.weight.T + model.head.bias
    (gradient,) = torch.autograd.grad(found.logits.amax(1).sum(), first)
    found.saliency = naive.saliency(gradient, first.detach(), seen)
    found.logits = found.logits.detach()
    return found


def through(model: Any, x: Tensor, bias: Tensor, seen: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The last hidden states of a model's layers, and the maps of each.

    Args:
        model: a module with an ``encoder``, or with ``blocks`` and a ``norm``.
        x: (b, s, d) its first hidden states.
        bias: (b, 1 or h, q, k) what is added to the scores.
        seen: (b, s) true for tokens that are attended to.
    """
    final, layers, maps = model.norm if hasattr(model, "blocks") else model.encoder.norm, _layers(model), []
    for place, parts in enumerate(layers):
        x, own = _layer(parts, x, bias, seen, final if place == len(layers) - 1 else None)
        maps.append(own)
    return x if final is None else _norm(final, x), maps


def _layers(model: Any) -> list[_Parts]:
    if hasattr(model, "blocks"):
        return [
            _Parts(one.attention, (one.norm1, one.norm2), (one.feed[0], one.feed[2]), F.gelu, one.pre)
            for one in model.blocks
        ]
    return [
        _Parts(one.self_attn, (one.norm1, one.norm2), (one.linear1, one.linear2), one.activation, one.norm_first)
        for one in model.encoder.layers
    ]


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    out = deviation / (deviation.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return out if norm.bias is None else out + norm.bias


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _layer(
    parts: _Parts, x: Tensor, bias: Tensor, seen: Tensor, final: nn.LayerNorm | None
) -> tuple[Tensor, dict[str, Tensor]]:
    attention, (norm1, norm2), (up, down) = parts.attention, parts.norms, parts.feed
    entering = _norm(norm1, x) if parts.pre else x
    weights, width = attention.in_proj_weight, WIDTH // HEADS
    made = _plus(entering @ weights.T, attention.in_proj_bias)
    heads = [part.unflatten(-1, (HEADS, width)).transpose(1, 2) for part in made.split(WIDTH, -1)]
    scores = heads[0] @ heads[1].transpose(2, 3) / width**0.5 + bias
    probabilities = scores.softmax(-1)

    def after(context: Tensor) -> tuple[Tensor, Tensor]:
        attended = x + _plus(context.transpose(1, 2).flatten(2) @ attention.out_proj.weight.T, attention.out_proj.bias)
        normed = _norm(norm2 if parts.pre else norm1, attended)
        fed = _plus(parts.activation(_plus(normed @ up.weight.T, up.bias)) @ down.weight.T, down.bias)
        stream = (attended if parts.pre else normed) + fed
        return stream, stream if parts.pre else _norm(norm2, stream)

    stream, out = after(probabilities @ heads[2])
    norms = [] if parts.pre else [_frozen(norm1), _frozen(norm2, stream)]
    norms += [] if final is None else [_frozen(final, out)]
    with torch.no_grad():
        maps = naive.local_maps(
            probabilities,
            heads[2],
            attention.out_proj.weight,
            attention.out_proj.bias,
            x,
            norms,
            seen,
            # Before the sub-layers' norms nothing but the final norm acts, for all three methods.
            first_norms=len(norms) if parts.pre else 1,
        )
        maps["Value-Zeroing"] = _zeroed(lambda values: after(probabilities @ values)[1], heads[2], out, seen)
    if parts.pre:
        maps["N-Res"] = maps["N-ResLN"]
    return out, maps


def _zeroed(outputs_of: Any, values: Tensor, out: Tensor, seen: Tensor) -> Tensor:
    """1 less the cosine of each output and that with a token's values at zero, rows divided by their sum, (b, q, k)."""
    turned = []
    for token in range(values.shape[2]):
        without = values.clone()
        without[:, :, token] = 0
        turned.append(1 - F.cosine_similarity(outputs_of(without), out, dim=-1))
    scores = torch.stack(turned, -1).masked_fill(~(seen.unsqueeze(1) & seen.unsqueeze(2)), 0.0)
    return scores / scores.sum(-1, keepdim=True).masked_fill(~seen.unsqueeze(-1), 1.0)


def _frozen(norm: nn.LayerNorm, real: Tensor | None = None) -> naive.Norm:
    return naive.Norm(norm.weight, norm.eps, real=None if real is None else real.detach())
