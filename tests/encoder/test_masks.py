from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, PreTrainedModel

from globenc_lightning import attribute
from globenc_lightning.encoder.reading import ToldMask, real_tokens, seen_tokens
from tests import models
from tests.encoder.test_precision import bert


def block(mask: Tensor) -> Tensor:
    """(b, 1, q, k): the real tokens see the real tokens; padding sees nothing."""
    return (mask[:, None, :, None] * mask[:, None, None, :]).bool()


def added(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


class Masked(nn.Module):
    def __init__(self, encoder: nn.Module, kind: str, place: int = 0) -> None:
        super().__init__()
        self.encoder, self.kind, self.place = encoder, kind, place
        self.head = nn.Linear(encoder.config.hidden_size, 3)
        models.redraw(self.head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        blocks = block(attention_mask)
        mask: Any = {
            "two axes": attention_mask,
            "added": added(blocks),
            "boolean": blocks,
            "keys alone": blocks.any(2, keepdim=True).expand_as(blocks),
            "added, keys alone": added(blocks.any(2, keepdim=True).expand_as(blocks)),
        }[self.kind]
        return self.head(self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state[:, self.place])


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "set_attn_implementation"),
    reason=f"BERT of transformers {transformers.__version__} takes no mask of four axes",
)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["added", "boolean", "keys alone", "added, keys alone"])
def test_masks_of_four_axes(kind: str, attn: str) -> None:
    encoder = bert(attn=attn).eval()
    expected = attribute(Masked(encoder, "two axes").eval(), models.batch((11, 6)))
    if attn == "eager" and kind in ("boolean", "keys alone"):
        pytest.skip("transformers adds whatever it is given to the scores")
    found = attribute(Masked(encoder, kind).eval(), models.batch((11, 6)))
    assert torch.equal(found.attention_mask, expected.attention_mask)
    assert found.attention_mask.sum(1).tolist() == [11, 6]
    torch.testing.assert_close(found.local["N-Enc"], expected.local["N-Enc"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.correlation["N-Enc"], expected.correlation["N-Enc"])


class Unmasked(nn.Module):
    """A causal model that is called without a mask: padding at the right changes nothing that comes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = GPT2Model(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32))
        self.head = nn.Linear(32, 3)
        models.redraw(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids).last_hidden_state
        last = attention_mask.sum(1) - 1
        return self.head(states[torch.arange(len(last)), last])


def test_the_batch_tells_what_the_encoder_is_not_told() -> None:
    model = Unmasked().eval()
    found = attribute(model, models.batch((9, 4)), readout="last")
    assert found.attention_mask.sum(1).tolist() == [9, 4]
    alone = attribute(model, models.batch((9, 4), width=9) | {}, readout="last")
    short = {key: value[1:, :4] for key, value in models.batch((9, 4)).items()}
    expected = attribute(model, short, readout="last")
    torch.testing.assert_close(alone.rows["N-Enc"][1, :, :4], expected.rows["N-Enc"][0], rtol=1e-3, atol=1e-4)


CAUSAL = torch.ones(5, 5).tril().bool()


class Deaf(nn.Module):
    """An encoder that attends to whatever it is given: it is never told the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert()
        self.head = nn.Linear(32, 3)
        models.redraw(self.head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=input_ids).last_hidden_state[:, 0])


def test_padding_that_the_encoder_attends_to_is_text() -> None:
    model, batch = Deaf().eval(), models.batch((9, 4))
    found = attribute(model, batch)
    assert found.attention_mask.sum(1).tolist() == [9, 9]
    expected = attribute(model, {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})
    assert torch.equal(found.rows["N-Enc"], expected.rows["N-Enc"])
    assert bool((found.rows["N-Enc"][1, :, 4:] > 0).all())


def opened(allowed: Tensor) -> Tensor:
    """Rows that see nothing are opened, so that the softmax has something to divide by."""
    return allowed | ~allowed.any(-1, keepdim=True)


@pytest.mark.parametrize(
    ("allowed", "real"),
    [
        pytest.param(torch.ones(5, 5).bool(), [1, 1, 1, 1, 1], id="everything"),
        pytest.param(CAUSAL, [1, 1, 1, 1, 1], id="causal"),
        pytest.param(CAUSAL & torch.tensor([0, 0, 1, 1, 1]).bool(), [0, 0, 1, 1, 1], id="causal, padding at the left"),
        pytest.param(
            opened(CAUSAL & torch.tensor([0, 0, 1, 1, 1]).bool()), [0, 0, 1, 1, 1], id="causal, left, rows opened"
        ),
        pytest.param(CAUSAL & torch.tensor([1, 1, 1, 0, 0]).bool(), [1, 1, 1, 0, 0], id="causal, padding at the right"),
        pytest.param(
            torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool(), [1, 1, 1, 1, 1], id="two texts in one row"
        ),
        pytest.param(
            torch.block_diag(torch.ones(3, 3), torch.eye(2)).bool(), [1, 1, 1, 0, 0], id="padding sees itself alone"
        ),
        pytest.param(
            torch.block_diag(torch.ones(1, 1), torch.zeros(4, 4)).bool(), [1, 0, 0, 0, 0], id="a text of one token"
        ),
    ],
)
def test_tokens_that_a_mask_lets_others_see(allowed: Tensor, real: list[int]) -> None:
    for mask in (allowed, allowed.long(), allowed.float(), added(allowed), -1e4 * (~allowed).float()):
        if not mask.is_floating_point() or bool((mask > 0).any()) or bool((mask < 0).any()):
            assert seen_tokens(mask[None, None]).long().tolist() == [real]
            assert seen_tokens(mask[None]).long().tolist() == [real]


def test_rows_that_see_everything_alike_do_not_tell() -> None:
    scores = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    hidden = torch.tensor([False, False, True, True])
    scores[..., hidden] = torch.finfo(torch.float32).min
    scores[:, :, hidden] = torch.finfo(torch.float32).min
    assert real_tokens(None, scores.softmax(-1)).tolist() == [[True, True, False, False]]
    assert real_tokens(None, torch.full((1, 2, 3, 3), 1 / 3)).tolist() == [[True] * 3]
    told = torch.tensor([[True, False, True, True]])
    heard = ToldMask(told, True)
    assert real_tokens(heard, scores.softmax(-1)) is told
    assert real_tokens(ToldMask(told[:, :3], True), scores.softmax(-1)).tolist() == [[True, True, False, False]]
