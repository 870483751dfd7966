"""Every line that a message offers is run as it stands."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTModel,
)

from globenc_lightning import attribute
from globenc_lightning.callback import GlobEncCallback
from globenc_lightning.errors import GlobEncError, ModelCallError
from globenc_lightning.task.advice import advice
from tests import models

CALL = re.compile(r"GlobEncCallback\((forward=lambda module, batch: .*)\)$", re.M)
TARGET = re.compile(r"(target=lambda logits, batch: \S.*)$", re.M)


def batch(**extra: Any) -> dict[str, Any]:
    return {**models.batch((9, 5, 7)), **extra}


def arguments(line: str) -> dict[str, Any]:
    """The arguments that an offered line gives, by running it as it stands."""
    made: dict[str, Any] = eval(f"dict({line})", {})
    return made


def body() -> BertModel:
    encoder = BertModel(BertConfig(**models._SIZES)).eval()
    models.redraw(encoder)
    return encoder


class Distillation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = models.build("bert"), models.build("distilbert", seed=1)


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([models.build("bert"), models.build("electra")])


class HeadInTheStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.out_proj = body(), nn.Linear(32, 3)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"text": body()})
        self.old = nn.Linear(32, 3).requires_grad_(False)
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3)), nn.Linear(32, 2)])


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        self.vit = ViTModel(ViTConfig(**size, image_size=16, patch_size=8, num_channels=3)).eval()
        self.fc = nn.Linear(32, 3)


class OwnMask(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.name = models.build("bert"), name


class TakesAttentionMask(OwnMask):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask).logits


class TakesMask(OwnMask):
    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, mask, token_type_ids).logits


class TakesPaddingMask(OwnMask):
    def forward(self, input_ids: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, padding_mask).logits


def own_mask(name: str) -> dict[str, Any]:
    given = batch()
    given[name] = given.pop("attention_mask")
    return given


@pytest.mark.parametrize(
    ("module", "given", "lines"),
    [
        (Distillation, batch(labels=torch.tensor([0, 1, 2])), 2),
        (InAList, batch(idx=torch.arange(3)), 2),
        (HeadInTheStep, batch(), 1),
        (TwoHeads, batch(text=["a", "b", "c"]), 3),
        (Images, {"pixel_values": torch.rand(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}, 1),
        (lambda: TakesAttentionMask("mask"), own_mask("mask"), 1),
        (lambda: TakesMask("padding"), own_mask("padding"), 1),
        (lambda: TakesPaddingMask("mask"), own_mask("mask"), 1),
    ],
    ids=["distillation", "list", "head in the step", "two heads", "images", "mask 1", "mask 2", "mask 3"],
)
def test_every_line_that_is_offered_runs(module: Any, given: Mapping[str, Any], lines: int) -> None:
    model = module()
    with pytest.raises(ModelCallError) as raised:
        attribute(model, given)
    offered = CALL.findall(str(raised.value))
    assert len(offered) == str(raised.value).count("lambda") == lines
    for line in offered:
        GlobEncCallback(**arguments(line))
        found = attribute(model, given, **arguments(line))
        assert torch.isfinite(found.correlation["N-Enc"][:, -1]).all()
    assert ("input_ids" in str(raised.value)) == ("input_ids" in given)


def test_the_head_that_is_trained_is_offered_first() -> None:
    offered = CALL.findall(advice(TwoHeads(), batch()))
    assert "module.old(" in offered[-1]
    assert "get_submodule('heads.0')" in offered[0]


def test_a_line_that_does_not_run_is_not_offered() -> None:
    class Wants(BertModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, domain: Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids + domain, attention_mask)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Wants(BertConfig(**models._SIZES)), nn.Linear(32, 3)

    told = advice(Module(), batch())
    assert "lambda" not in told
    assert "Module holds encoder, head; its encoder is encoder; the batch holds input_ids, attention_mask" in told
    assert "lambda" in advice(Module(), batch(domain=torch.tensor(1)))


def test_a_single_model_that_is_trained_beside_a_frozen_teacher_is_taken() -> None:
    for frozen, own in (("teacher", "student"), ("student", "teacher")):
        module = Distillation()
        getattr(module, frozen).requires_grad_(False)
        found = attribute(module, batch())
        assert found.encoder.startswith(f"{own}.")
        assert torch.equal(found.logits, attribute(getattr(module, own), batch()).logits)


def per_token(kind: str) -> Any:
    sizes = dict(models._SIZES)
    made = {
        "tags": lambda: BertForTokenClassification(BertConfig(**sizes)),
        "masked": lambda: BertForMaskedLM(BertConfig(**sizes)),
        "causal": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)),
        "grid": lambda: Grid(),
        "one score per token": lambda: OnePerToken(),
    }[kind]()
    models.redraw(made)
    return made.eval()


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = body(), nn.Linear(32, 12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids, attention_mask).last_hidden_state).unflatten(2, (4, 3))


class OnePerToken(Grid):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids, attention_mask).last_hidden_state)[..., 0]


@pytest.mark.parametrize("kind", ["tags", "masked", "causal", "grid", "one score per token"])
def test_a_target_that_is_offered_runs(kind: str) -> None:
    model = per_token(kind)
    given = batch(labels=torch.zeros(3, 9, dtype=torch.long)) if kind == "one score per token" else batch()
    with pytest.raises(GlobEncError) as raised:
        attribute(model, given)
    (line,) = TARGET.findall(str(raised.value))
    assert type(model).__name__ in str(raised.value)
    found = attribute(model, given, **arguments(line))
    assert found.saliency.isfinite().all()
    if found.logits.dim() == 3:
        # The class of the token that is read, and no number out of tokens x classes.
        assert torch.equal(found.predicted, found.logits[:, 0].argmax(-1))
        assert found.position.tolist() == [0] * 3
        assert torch.equal(found.rows["N-Enc"], found.rollout["N-Enc"][:, :, 0])


def test_a_forward_that_takes_no_mask_at_all_is_the_model() -> None:
    class Unmasked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = models.build("bert")

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids).logits

    model, given = Unmasked().eval(), batch()
    found = attribute(model, given)
    torch.testing.assert_close(found.logits, model(given["input_ids"]).detach())
    # Its encoder attends to the padding, which is text to it.
    assert bool(found.attention_mask.all())
