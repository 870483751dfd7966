"""Small LightningModules around torch's own attention modules, with no Hugging Face in them, as people write them.

Axes: ``b`` example, ``s`` token, ``d`` hidden.
"""

import copy
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import naive
from tests.task.zoo import (
    CLASSES,
    PAD,
    Batch,
    Case,
    Module,
    at,
    classes,
    drawn,
    images,
    mean_of,
    rarest,
    tags,
    text,
    values,
)
from tests.torch_models import HEADS, LONGEST, VOCABULARY, WIDTH, Block, through


class TorchModule(Module):
    """An encoder of torch's own modules: embeddings, places, layers, and a head.

    Attributes:
        sequence_first: whether its layers take (s, b, d).
        causal: whether no token sees what comes after it.
        outputs: how many the head has.
    """

    sequence_first = False
    causal = False
    outputs = CLASSES

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PAD)
        self.embed_places = nn.Parameter(torch.zeros(1, LONGEST, WIDTH))
        self.body()
        self.head = nn.Linear(WIDTH, self.outputs)
        drawn(self).train()

    def body(self) -> None:
        raise NotImplementedError

    def real(self, inputs: Tensor) -> Tensor:
        """(b, s) true for tokens."""
        return inputs != PAD

    def embedded(self, inputs: Tensor) -> Tensor:
        """(b, s, d) what enters the layers."""
        return self.embed(inputs) + self.embed_places[:, : inputs.shape[1]]

    def layers(self, x: Tensor, real: Tensor) -> Tensor:
        raise NotImplementedError

    def hidden(self, inputs: Tensor) -> Tensor:
        """(b, s, d) what leaves the layers."""
        x = self.embedded(inputs)
        if not self.sequence_first:
            return self.layers(x, self.real(inputs))
        return self.layers(x.transpose(0, 1), self.real(inputs)).transpose(0, 1)

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        return (batch["tokens"], batch["y"]) if isinstance(batch, Mapping) else batch

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(inputs)[:, 0])
        return logits

    def loss(self, batch: Batch) -> Tensor:
        inputs, labels = self.parts(batch)
        return F.cross_entropy(self(inputs), labels)

    def score(self, batch: Batch) -> Tensor:
        """(b,) what is explained."""
        logits: Tensor = self(self.parts(batch)[0])
        return logits.amax(-1)


class Encoded(TorchModule):
    """``nn.TransformerEncoder`` as its documentation has it."""

    encoder: Any

    def body(self) -> None:
        self.stack(batch_first=True)

    def stack(self, *, final: bool = False, **options: Any) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, **options)
        norm = nn.LayerNorm(WIDTH) if final else None
        self.encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)

    def layers(self, x: Tensor, real: Tensor) -> Tensor:
        mask = None
        if self.causal:
            mask = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).triu(1)
        out: Tensor = self.encoder(x, mask=mask, src_key_padding_mask=~real)
        return out


class MeanOfSequenceFirst(Encoded):
    """``batch_first=False``, the default, ``norm_first=True``, a final norm, and the mean of the tokens."""

    sequence_first = True

    def body(self) -> None:
        self.stack(norm_first=True, final=True, activation="gelu")

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(mean_of(self.hidden(inputs), self.real(inputs)))
        return logits


class Tagger(Encoded):
    """A label for each token, of layers that are normalised after, and once more at the end."""

    outputs = 4

    def body(self) -> None:
        self.stack(batch_first=True, final=True)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(inputs))
        return logits

    def loss(self, batch: Batch) -> Tensor:
        inputs, labels = self.parts(batch)
        return F.cross_entropy(self(inputs).transpose(1, 2), labels)

    def score(self, batch: Batch) -> Tensor:
        inputs, labels = self.parts(batch)
        return at(self(inputs), rarest(labels, tags))


class Writer(Encoded):
    """A causal language model."""

    outputs, causal = VOCABULARY, True

    def body(self) -> None:
        self.stack(batch_first=True, norm_first=True, final=True)

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch, batch

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(inputs))
        return logits

    def loss(self, batch: Batch) -> Tensor:
        logits = self(batch)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1), ignore_index=PAD)

    def score(self, batch: Batch) -> Tensor:
        return at(self(batch), self.real(batch).sum(1) - 2)


class Patches(Encoded):
    """Patches of an image, and a first token of their own, as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_patches = drawn(nn.Conv2d(3, WIDTH, 4, stride=4))
        self.first = drawn(nn.ParameterList([torch.zeros(1, 1, WIDTH)]))

    def body(self) -> None:
        self.stack(batch_first=True, norm_first=True, final=True)

    def real(self, inputs: Tensor) -> Tensor:
        return torch.ones(len(inputs), 5).bool()

    def embedded(self, inputs: Tensor) -> Tensor:
        patches = self.embed_patches(inputs).flatten(2).transpose(1, 2)
        return torch.cat([self.first[0].expand(len(inputs), -1, -1), patches], 1) + self.embed_places[:, :5]

    def layers(self, x: Tensor, real: Tensor) -> Tensor:
        out: Tensor = self.encoder(x)
        return out


class OwnBlocks(TorchModule):
    """Blocks around ``nn.MultiheadAttention`` in an ``nn.ModuleList``, and a norm after them."""

    blocks: Any
    norm: Any

    def body(self) -> None:
        self.blocks, self.norm = nn.ModuleList([Block(True) for _ in range(2)]), nn.LayerNorm(WIDTH)

    def layers(self, x: Tensor, real: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, ~real)
        return x if self.norm is None else self.norm(x)


class ValueOfBlocks(OwnBlocks):
    """Normalised after, with the sequence first; one value."""

    outputs, sequence_first = 1, True

    def body(self) -> None:
        blocks = [Block(False, first=False, asked=(False, False)) for _ in range(2)]
        self.blocks, self.norm = nn.ModuleList(blocks), None

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(inputs)[:, 0]).squeeze(-1)
        return logits

    def loss(self, batch: Batch) -> Tensor:
        inputs, labels = self.parts(batch)
        return F.mse_loss(self(inputs), labels)

    def score(self, batch: Batch) -> Tensor:
        return self(self.parts(batch)[0])


def by_hand(case: Case, module: TorchModule, batch: Batch) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Saliency, row and score of each example: the layers are run by hand, from the weights, in float64."""
    own = copy.deepcopy(module).double().eval()
    states: list[Tensor] = []
    maps: list[Tensor] = []

    def layers(x: Tensor, real: Tensor) -> Tensor:
        x = (x.transpose(0, 1) if own.sequence_first else x).detach().requires_grad_()
        bias = torch.zeros(len(x), 1, 1, x.shape[1], dtype=x.dtype).masked_fill(~real[:, None, None], float("-inf"))
        if own.causal:
            bias = bias + torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        out, found = through(own, x, bias, real)
        # A copy, so that what the head reads is this tensor.
        out = out.clone()
        states.extend([x, out, real])
        maps.append(naive.rollout(torch.stack([one["N-Enc"] for one in found], 1))[:, -1])
        return out.transpose(0, 1) if own.sequence_first else out

    own.layers = layers  # type: ignore[method-assign]
    inputs = tuple(one.double() if one.is_floating_point() else one for one in batch) if type(batch) is tuple else batch
    with torch.enable_grad():
        score = case.score(own, inputs)
    first, last, real = states
    gradient, head = torch.autograd.grad(score.sum(), [first, last])
    saliency = torch.linalg.vector_norm(gradient * first.detach(), dim=-1)
    weights = torch.linalg.vector_norm(head, dim=-1)
    kept = [one.nonzero().flatten() for one in real]
    rows = [weights[row][at] / weights[row][at].sum() @ maps[0][row][at][:, at] for row, at in enumerate(kept)]
    shown = [saliency[row][at].float() for row, at in enumerate(kept)]
    return shown, [row.float() for row in rows], score.detach().float()


def ids_and_classes(seed: int) -> tuple[Tensor, Tensor]:
    return text(seed)[0], classes(seed)


def ids_and_values(seed: int) -> tuple[Tensor, Tensor]:
    return text(seed)[0], values(seed)


def ids_and_tags(seed: int) -> tuple[Tensor, Tensor]:
    return text(seed)[0], tags(seed)


def named(seed: int) -> dict[str, Tensor]:
    return {"tokens": text(seed)[0], "y": classes(seed)}


def _case(name: str, what: str, form: str, task: str, module: Any, batch: Any) -> Case:
    return Case(name, what, form, task, module, batch, lambda own, given: own.score(given))


_IDS = "tuple (ids, y)"

TORCH_CASES: tuple[Case, ...] = (
    _case(
        "torch_encoder",
        "classes, nn.TransformerEncoder, no Hugging Face",
        _IDS,
        "classification",
        Encoded,
        ids_and_classes,
    ),
    _case(
        "torch_encoder_sequence_first",
        "classes, nn.TransformerEncoder with norm_first and the sequence first, mean pooling",
        "dict of tokens, y",
        "classification",
        MeanOfSequenceFirst,
        named,
    ),
    _case(
        "torch_encoder_tagging",
        "a label per token, nn.TransformerEncoder",
        _IDS,
        "token classification",
        Tagger,
        ids_and_tags,
    ),
    _case(
        "torch_encoder_causal",
        "causal language model, nn.TransformerEncoder with a causal mask",
        "ids",
        "next token",
        Writer,
        lambda seed: text(seed)[0],
    ),
    _case(
        "torch_encoder_patches",
        "images, patches and nn.TransformerEncoder",
        "tuple (images, y)",
        "classification",
        Patches,
        images,
    ),
    _case(
        "torch_blocks",
        "classes, own blocks around nn.MultiheadAttention",
        _IDS,
        "classification",
        OwnBlocks,
        ids_and_classes,
    ),
    _case(
        "torch_blocks_sequence_first",
        "one value, own blocks around nn.MultiheadAttention, the sequence first",
        _IDS,
        "regression",
        ValueOfBlocks,
        ids_and_values,
    ),
)
