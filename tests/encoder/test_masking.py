"""Tokens that are masked inside a call of an encoder, against the encoder called with masked tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from globenc_lightning.encoder.masking import CallOfEncoder, by_token_id, tokens_masked, without_tokens
from globenc_lightning.errors import MaskingError
from tests import torch_models
from tests.training import MASK, Sentences, classifier

BATCH = Sentences(5, seed=4).first(5)
IDS, REAL = BATCH["input_ids"], BATCH["attention_mask"]
WHERE = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) > 0.7
WHERE &= REAL.bool()
WHERE[:, 0] = False
MASKED = IDS.masked_fill(WHERE, MASK)
SEEN = REAL.masked_fill(WHERE, 0)


def bert() -> Any:
    return classifier().bert.eval()


def call_of(model: nn.Module, encoder: nn.Module, number: int = 0, ids: Tensor = IDS) -> CallOfEncoder:
    return CallOfEncoder(model, encoder, number, ids)


def additive(mask: Tensor) -> Tensor:
    return (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min


FORMS: dict[str, Callable[[Any], Any]] = {
    "by name": lambda encoder: encoder(input_ids=IDS, attention_mask=REAL),
    "by position": lambda encoder: encoder(IDS, REAL),
    "forward itself": lambda encoder: encoder.forward(IDS, attention_mask=REAL),
    "a mask of booleans": lambda encoder: encoder(IDS, REAL.bool()),
    "a mask of four axes": lambda encoder: encoder(IDS, attention_mask=additive(REAL)),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_it_gives_what_masked_tokens_give(form: str) -> None:
    encoder = bert()
    before = dict(vars(encoder))
    plain = FORMS[form](encoder).last_hidden_state
    with tokens_masked(call_of(encoder, encoder), WHERE, MASK):
        by_id = FORMS[form](encoder).last_hidden_state
    with tokens_masked(call_of(encoder, encoder), WHERE, None):
        by_mask = FORMS[form](encoder).last_hidden_state
    assert vars(encoder) == before
    assert torch.equal(FORMS[form](encoder).last_hidden_state, plain)
    kept = REAL.bool()
    torch.testing.assert_close(by_id[kept], encoder(MASKED, REAL).last_hidden_state[kept])
    torch.testing.assert_close(by_mask[kept], encoder(IDS, SEEN).last_hidden_state[kept])
    assert not torch.allclose(by_id, plain)
    assert not torch.allclose(by_mask[:, 0], plain[:, 0])


@torch.no_grad()
def test_one_of_several_calls_is_masked() -> None:
    encoder, other = bert(), IDS.flip(0)
    with tokens_masked(call_of(encoder, encoder, 1), WHERE, MASK):
        found = [encoder(one).last_hidden_state for one in (IDS, IDS, other)]
    assert torch.equal(found[0], encoder(IDS).last_hidden_state)
    torch.testing.assert_close(found[1], encoder(MASKED).last_hidden_state)
    assert torch.equal(found[2], encoder(other).last_hidden_state)


@torch.no_grad()
def test_without_a_mask_everything_else_is_attended_to() -> None:
    encoder = bert()
    with tokens_masked(call_of(encoder, encoder), WHERE, None):
        found = encoder(IDS).last_hidden_state
    torch.testing.assert_close(found, encoder(IDS, (~WHERE).long()).last_hidden_state)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda encoder: encoder(IDS.flip(0)), "other token ids"),
        (lambda encoder: encoder(inputs_embeds=torch.zeros(5, 14, 16)), "other token ids"),
        (lambda encoder: None, "in another way"),
        (lambda encoder: encoder(IDS, torch.ones(5, 3)), "a form in which no token"),
    ],
    ids=["other ids", "embeddings", "no call", "another mask"],
)
@torch.no_grad()
def test_another_call_is_refused_and_leaves_nothing_behind(run: Any, expected: str) -> None:
    encoder = bert()
    before = dict(vars(encoder))
    with pytest.raises(MaskingError, match=expected), tokens_masked(call_of(encoder, encoder), WHERE, None):
        run(encoder)
    assert vars(encoder) == before


class TakesNoMask(nn.Module):
    """An encoder without an attention mask."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_an_encoder_that_takes_no_mask_needs_a_mask_token() -> None:
    encoder = TakesNoMask()
    with (
        pytest.raises(MaskingError, match="takes no attention mask"),
        tokens_masked(call_of(encoder, encoder), WHERE, None),
    ):
        encoder(IDS)
    with tokens_masked(call_of(encoder, encoder), WHERE, MASK):
        assert torch.equal(encoder(IDS), MASKED)


@pytest.mark.parametrize("shape", ["two axes", "three axes", "four axes", "one for all texts"])
@pytest.mark.parametrize("adds", [False, True], ids=["true and false", "added to the scores"])
def test_masks_of_every_form(shape: str, adds: bool) -> None:
    seen = torch.ones(5, 14).bool() if shape == "one for all texts" else REAL.bool()
    square = (seen[:, None] & torch.ones(14, 14).bool()).tril()
    told = {"two axes": seen, "three axes": square, "four axes": square[:, None]}.get(shape, square[:1, None])
    lowest = torch.finfo(torch.float32).min
    if adds and told.dim() > 2:
        found = without_tokens(torch.zeros(told.shape).masked_fill(~told, lowest), WHERE) == 0
    else:
        found = without_tokens(told.float() if adds else told, WHERE).bool()
    hidden = WHERE.view(5, *(1,) * (told.dim() - 2), 14)
    assert torch.equal(found, (told & ~hidden).expand(found.shape))


@pytest.mark.parametrize(("mask_id", "known"), [(None, False), (MASK, True), (59, True), (60, False), (-1, False)])
def test_a_mask_token_has_to_be_in_the_vocabulary(mask_id: int | None, known: bool) -> None:
    encoder = bert()
    assert by_token_id(call_of(encoder, encoder), mask_id) is known


# ---- torch's own modules

TORCH: dict[str, Callable[[], Any]] = {
    "nn.TransformerEncoder": lambda: torch_models.Classifier(batch_first=True),
    "sequence first": lambda: torch_models.Classifier(),
    "pre-LN with a final norm": lambda: torch_models.Classifier(batch_first=True, norm_first=True, final=True),
    "blocks of a list": lambda: torch_models.Blocks(pre=False),
    "blocks of a list, sequence first": lambda: torch_models.Blocks(pre=True, sequence_first=True, first=False),
}


@pytest.mark.parametrize("name", TORCH)
@torch.no_grad()
def test_torch_encoders_are_masked_where_ids_are_looked_up(name: str) -> None:
    model = torch_models.drawn(TORCH[name]()).eval()
    ids = torch_models.texts((8, 5, 6))
    where = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) > 0.6) & (ids != 0)
    call = CallOfEncoder(model, encoder_of(model), 0, ids)
    assert by_token_id(call, MASK)
    plain = model(ids)
    with tokens_masked(call, where, MASK):
        found = model(ids)
    torch.testing.assert_close(found, model(ids.masked_fill(where, MASK)))
    assert not torch.allclose(found, plain)
    assert torch.equal(model(ids), plain)


@pytest.mark.parametrize("name", TORCH)
@torch.no_grad()
def test_torch_encoders_are_masked_in_their_attention(name: str) -> None:
    model = torch_models.drawn(TORCH[name]()).eval()
    ids = torch_models.texts((8, 5, 6))
    where = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) > 0.6) & (ids != 0)
    where[:, 0] = False
    with tokens_masked(CallOfEncoder(model, encoder_of(model), 0, ids), where, None):
        found = model(ids)
    x, padding = model.embedded(ids), (ids == 0) | where
    if isinstance(model, torch_models.Blocks):
        turned = x.transpose(0, 1) if model.sequence_first else x
        for block in model.blocks:
            turned = block(turned, padding)
        expected = model.norm(turned.transpose(0, 1) if model.sequence_first else turned)[:, 0]
    else:
        first = model.encoder.layers[0].self_attn.batch_first
        hidden = model.encoder(x if first else x.transpose(0, 1), src_key_padding_mask=padding)
        expected = hidden[:, 0] if first else hidden[0]
    torch.testing.assert_close(found, model.head(expected))
    assert not torch.allclose(found, model(ids))


def encoder_of(model: Any) -> nn.Module:
    encoder: nn.Module = model.encoder if isinstance(model, torch_models.Classifier) else model.blocks
    return encoder
