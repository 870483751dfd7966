"""How often an analysis waits for a device, and how many kernels it starts."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from globenc_lightning import METHODS, ProbeSet
from globenc_lightning.analysis import Reader
from globenc_lightning.measurement import measure
from globenc_lightning.settings import Settings
from tests import models
from tests.device.python_device import Counts, counted

HEADS = 12
MOST_LOOKS = 4


def model_of(layers: int, device: torch.device) -> Any:
    config = BertConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    model = BertForSequenceClassification(config).eval()
    models.redraw(model)
    return model.to(device)


def bare(layers: int, tokens: int, examples: int, device: torch.device) -> Counts:
    """One forward and one backward of the model itself, as a training step makes them."""
    model = model_of(layers, device)
    batch = {key: value.to(device) for key, value in lengths(tokens, examples).items()}
    with counted() as counts:
        loss = model(**batch).logits.amax(1).sum()
        torch.autograd.grad(loss, list(model.parameters()))
    return counts


def lengths(tokens: int, examples: int) -> dict[str, torch.Tensor]:
    return models.batch([*[tokens] * (examples - 1), tokens - 5])


def ours(layers: int, tokens: int, examples: int, methods: tuple[str, ...], device: torch.device) -> Counts:
    model = model_of(layers, device)
    probe, reader = ProbeSet.from_batch(lengths(tokens, examples)), Reader(model)
    measure(reader, probe, Settings(methods))
    with counted() as counts:
        measure(reader, probe, Settings(methods))
    return counts


@pytest.mark.parametrize(("methods", "most"), [(METHODS, 3.3), (("N-Enc",), 2.0)], ids=["all", "N-Enc"])
@pytest.mark.parametrize(("tokens", "examples"), [(16, 3), (64, 8), (512, 2)])
def test_launches_per_layer(
    tokens: int, examples: int, methods: tuple[str, ...], most: float, device: torch.device
) -> None:
    one, two = (ours(layers, tokens, examples, methods, device) for layers in (1, 2))
    model = bare(2, tokens, examples, device).kernels - bare(1, tokens, examples, device).kernels
    assert 40 < model < 80
    assert model < two.kernels - one.kernels <= most * model
    assert two.looks == one.looks
    assert 0 < sum(two.looks.values()) <= MOST_LOOKS


@pytest.mark.parametrize("examples", [2, 5, 16])
def test_looks_do_not_grow_with_the_examples(examples: int, device: torch.device) -> None:
    counts = ours(2, 12, examples, METHODS, device)
    assert 0 < sum(counts.looks.values()) <= MOST_LOOKS


def test_a_look_is_counted_with_its_line(device: torch.device) -> None:
    from globenc_lightning.encoder.checks import brought_home

    with counted(by_line=True) as counts:
        brought_home([torch.ones(3, device=device)])
        float(torch.ones((), device=device))
        nn.Linear(2, 2).to(device)(torch.ones(1, 2, device=device))
    assert [line.partition(":")[0] for line in counts.looks] == ["encoder/checks.py"]
    assert [line.partition(":")[0] for line in counts.foreign] == ["test_counts.py"]
    assert counts.launches["addmm"] == 1
    assert sum(counts.lines.values()) == counts.kernels


class OwnEncoder(nn.Module):
    """An encoder of torch's own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(models.VOCABULARY, 16), nn.Embedding(64, 16)
        self.kinds = nn.Embedding(2, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        embedded = self.words(input_ids) + self.places(places) + self.kinds(torch.zeros_like(input_ids))
        found: torch.Tensor = self.head(self.encoder(embedded, src_key_padding_mask=attention_mask == 0)[:, 0])
        return found


def with_hidden_states(device: torch.device) -> nn.Module:
    model = models.build("bert")
    model.config.output_hidden_states = True
    return model.to(device)


@pytest.mark.parametrize("kind", ["torch's own", "hidden states"])
def test_looks_of_other_models(kind: str, device: torch.device) -> None:
    own = OwnEncoder().eval()
    models.redraw(own)
    model = own.to(device) if kind == "torch's own" else with_hidden_states(device)
    probe, reader = ProbeSet.from_batch(models.batch([9, 7, 12])), Reader(model)
    measure(reader, probe, Settings(METHODS))
    with counted() as counts:
        found = measure(reader, probe, Settings(METHODS))
    assert 0 < sum(counts.looks.values()) <= MOST_LOOKS, counts.looks
    assert all(type(ids) is torch.Tensor for ids in found.ids)
