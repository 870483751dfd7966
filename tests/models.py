"""Small random models of every family, with parameters drawn so that a wrong formula shows.

Freshly initialised weights hide mistakes: norms with weight 1 and biases at 0 make many wrong formulas right. Here no
norm's weight is near 1, no bias is near 0, and attention is peaked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

VOCABULARY = 99
HEADS = 4
CLASSES = 3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
}
_RELATIVE: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 20}
_V3: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_CONVOLUTION: dict[str, Any] = {"conv_kernel_size": 3}
_LABELS: dict[str, Any] = {"num_labels": CLASSES}


@dataclass(frozen=True)
class Family:
    """How a family's small model is made: its configuration, its class, its padding id, its number of layers."""

    config: Callable[[], Any]
    model: type[PreTrainedModel]
    pad: int = 0
    layers: int = 3


FAMILIES: dict[str, Family] = {
    "bert": Family(lambda: BertConfig(**_SIZES), BertForSequenceClassification),
    "roberta": Family(lambda: RobertaConfig(**_SIZES, pad_token_id=1), RobertaForSequenceClassification, pad=1),
    "xlm_roberta": Family(
        lambda: XLMRobertaConfig(**_SIZES, pad_token_id=1), XLMRobertaForSequenceClassification, pad=1
    ),
    "electra": Family(lambda: ElectraConfig(**_SIZES, embedding_size=16), ElectraForSequenceClassification),
    "distilbert": Family(
        lambda: DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=3,
            n_heads=HEADS,
            hidden_dim=48,
            max_position_embeddings=64,
            **_LABELS,
        ),
        DistilBertForSequenceClassification,
    ),
    "albert": Family(lambda: AlbertConfig(**_SIZES, embedding_size=16), AlbertForSequenceClassification),
    "albert_groups": Family(
        lambda: AlbertConfig(
            **{**_SIZES, "num_hidden_layers": 4}, embedding_size=16, num_hidden_groups=2, inner_group_num=2
        ),
        AlbertForSequenceClassification,
        layers=8,
    ),
    "mpnet": Family(lambda: MPNetConfig(**_SIZES, pad_token_id=1), MPNetForSequenceClassification, pad=1),
    "deberta": Family(lambda: DebertaConfig(**_SIZES, **_RELATIVE), DebertaForSequenceClassification),
    "deberta_v2": Family(lambda: DebertaV2Config(**_SIZES, **_RELATIVE), DebertaV2ForSequenceClassification),
    "deberta_v3": Family(
        lambda: DebertaV2Config(**_SIZES, **_V3),
        DebertaV2ForSequenceClassification,
    ),
}
"""The families that are read."""

REFUSED: dict[str, Family] = {
    "deberta_v2_convolution": Family(
        lambda: DebertaV2Config(**_SIZES, **_RELATIVE, **_CONVOLUTION), DebertaV2ForSequenceClassification
    ),
    "fnet": Family(
        lambda: FNetConfig(**{key: value for key, value in _SIZES.items() if key != "num_attention_heads"}),
        FNetForSequenceClassification,
    ),
    "xlnet": Family(
        lambda: XLNetConfig(
            vocab_size=VOCABULARY, d_model=32, n_layer=3, n_head=HEADS, d_inner=48, **_LABELS, pad_token_id=0
        ),
        XLNetForSequenceClassification,
    ),
    "convbert": Family(lambda: ConvBertConfig(**_SIZES, embedding_size=32), ConvBertForSequenceClassification),
    "mobilebert": Family(
        lambda: MobileBertConfig(**_SIZES, embedding_size=32, intra_bottleneck_size=32),
        MobileBertForSequenceClassification,
    ),
}
"""The families that no rule covers."""

VARIANTS: list[tuple[str, str]] = [
    (name, attn)
    for name, family in FAMILIES.items()
    for attn in ("eager", "sdpa")
    if attn == "eager" or family.model._supports_sdpa
]
"""Each family that is read with each attention implementation that transformers offers for it."""

FLOAT32_NORMS = ("deberta",)
"""Families whose norms are computed in float32 by transformers, whatever the model's own precision is."""


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew: norm weights in 0.3..1.8, biases around 0 with deviation 0.3, matrices large."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "bias" not in name:
                new = torch.rand(parameter.shape, generator=generator) * 1.5 + 0.3
            elif parameter.dim() == 1:
                new = torch.randn(parameter.shape, generator=generator) * 0.3
            else:
                spread = 1.0 if "embed" in name else 2 / parameter.shape[-1] ** 0.5
                new = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(new)


def build(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A family's small classifier of three classes, in eval mode. The same seed gives the same parameters."""
    family = {**FAMILIES, **REFUSED}[name]
    if attn == "sdpa" and not family.model._supports_sdpa:
        attn = "eager"
    model = family.model._from_config(family.config(), attn_implementation=attn)
    redraw(model, seed)
    return model.to(dtype).eval()


def set_attention(model: Any, name: str) -> None:
    """Give a model that is made already another attention; where transformers offers no way, the test is skipped."""
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip(f"transformers {transformers.__version__} sets no other attention on a model that is made")
    model.set_attn_implementation(name)


def batch(lengths: Sequence[int], width: int | None = None, pad: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids from 5 on, padded on the right to ``width`` (the longest example's length when None)."""
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths) if width is None else width
    ids = torch.randint(5, VOCABULARY, (len(lengths), size), generator=generator)
    mask = (torch.arange(size) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}
