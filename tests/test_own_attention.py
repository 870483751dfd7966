"""A user's own attention function, and models that do something else while they are analysed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from globenc_lightning import attribute
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.encoder.undisturbed import exchanged_attention
from globenc_lightning.errors import UnsupportedEncoderError
from globenc_lightning.settings import Settings
from tests import models

Attention = Callable[..., Any]
by_name = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "set_attn_implementation"),
    reason=f"transformers {transformers.__version__} builds BERT with one attention",
)


def softmax_of(scores: Tensor, mask: Tensor | None) -> Tensor:
    return (scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)).softmax(-1)


def sharp(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Another temperature, in code that can be read."""
    probabilities = softmax_of(query @ key.transpose(-1, -2) * scaling * 4, mask)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def blunt(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Another temperature still."""
    return sharp(module, query, key, value, mask, scaling / 8)


def scaled(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Torch's own kernel with another scale."""
    context = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling * 3)
    return context.transpose(1, 2).contiguous(), None


def opaque(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Nothing that can be read: einsum alone, and a softmax of its own."""
    scores = torch.einsum("bhqv,bhkv->bhqk", query, key) * scaling
    scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhqk,bhkv->bqhv", weights / weights.sum(-1, keepdim=True), value).contiguous(), None


def half_opaque(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """A softmax, and values that are mixed by einsum."""
    probabilities = softmax_of(query @ key.transpose(-1, -2) * scaling, mask)
    return torch.einsum("bhqk,bhkv->bqhv", probabilities, value).contiguous(), probabilities


@pytest.fixture
def register() -> Iterator[Callable[[str, Attention], None]]:
    """Registers attention functions with transformers until the test is over."""
    attention, masks = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)

    def known(name: str, function: Attention) -> None:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)

    yield known
    for mapping, before in ((AttentionInterface, attention), (AttentionMaskInterface, masks)):
        mapping._global_mapping.clear()
        mapping._global_mapping.update(before)


def own_logits(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return getattr(output, "logits", output)


BATCH = models.batch((9, 6))


@by_name
@pytest.mark.parametrize("function", [sharp, blunt, scaled])
@pytest.mark.parametrize("name", ["own", "flash_attention_2", "sdpa"])
def test_an_attention_function_of_the_user_is_read_as_it_stands(
    name: str, function: Attention, register: Callable[[str, Attention], None]
) -> None:
    register(name, function)
    model = models.build("bert")
    usual = own_logits(models.build("bert", attn="eager"), BATCH)
    model.config._attn_implementation_internal = name
    found = attribute(model, BATCH)
    torch.testing.assert_close(found.logits, own_logits(model, BATCH), rtol=0, atol=1e-5)
    assert float((found.logits - usual).abs().max()) > 1e-3
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("function", [opaque, half_opaque])
def test_an_attention_function_that_cannot_be_read_is_refused_by_its_name(
    function: Attention, register: Callable[[str, Attention], None]
) -> None:
    register("mine", function)
    model = models.build("bert")
    models.set_attention(model, "mine")
    with pytest.raises(UnsupportedEncoderError, match=r"no attention call was seen(.|\n)*implementation 'mine'"):
        attribute(model, BATCH)


def test_flex_attention_is_read_as_sdpa_and_compared_with_itself() -> None:
    model = models.build("bert")
    models.set_attention(model, "flex_attention")
    found = attribute(model, BATCH)
    torch.testing.assert_close(found.logits, own_logits(model, BATCH), rtol=0, atol=1e-5)
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "paged|sdpa", "paged|eager"])
def test_a_kernel_that_cannot_run_here_is_exchanged_for_what_is_equal(name: str) -> None:
    model = models.build("bert")
    expected = usual = own_logits(model, BATCH)
    model.config._attn_implementation_internal = name
    try:
        # Some versions run "paged|sdpa" as sdpa without a mask: then that is the model.
        expected = own_logits(model, BATCH)
    except Exception:
        assert exchanged_attention(model)
    if exchanged_attention(model) and not torch.allclose(expected, usual, rtol=0, atol=1e-5):
        # transformers 5.24 runs "paged|eager" without a mask and without the cache that it is made for.
        with pytest.raises(UnsupportedEncoderError, match=r"replaced its attention(.|\n)*and that is another model"):
            attribute(model, BATCH)
        return
    found = attribute(model, BATCH)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", ["eager", "sdpa", "flex_attention", "other"])
def test_an_implementation_that_is_set_later_is_found_anew(
    first: str, register: Callable[[str, Attention], None]
) -> None:
    register("other", scaled)
    register("later", sharp)
    model = models.build("bert")
    models.set_attention(model, first)
    attribute(model, BATCH)
    models.set_attention(model, "later")
    torch.testing.assert_close(attribute(model, BATCH).logits, own_logits(model, BATCH), rtol=0, atol=1e-5)
    register("later", opaque)
    with pytest.raises(UnsupportedEncoderError, match="'later'"):
        attribute(model, BATCH)
    register("later", blunt)
    torch.testing.assert_close(attribute(model, BATCH).logits, own_logits(model, BATCH), rtol=0, atol=1e-5)


class Other(nn.Module):
    """A classifier that gives other logits under a condition."""

    def __init__(self, condition: Callable[["Other"], bool], **options: Any) -> None:
        super().__init__()
        self.model = models.build("bert", **options)
        self.condition = condition
        self.norm = nn.BatchNorm1d(3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits * 2 if self.condition(self) else logits


class Calibrated(Other):
    """A norm goes on with the statistics of each batch in its evaluation."""

    def __init__(self) -> None:
        super().__init__(lambda _: False)

    def train(self, mode: bool = True) -> "Calibrated":
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.norm(super().forward(input_ids, attention_mask))
        return logits


def chunked() -> nn.Module:
    model = Other(lambda one: one.model.bert.encoder.layer[0].chunk_size_feed_forward == 0)
    for layer in model.model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 3  # nine tokens
    return model


def by_implementation() -> nn.Module:
    model = Other(lambda one: one.model.config._attn_implementation == "sdpa")
    models.set_attention(model.model, "flex_attention")
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gradients": (lambda: Other(lambda _: torch.is_grad_enabled()), "another way when it is analysed"),
    "hooks": (lambda: Other(lambda one: len(one.model.bert.pooler._forward_hooks) > 0), "another way"),
    "chunks": (chunked, "another way when it is analysed"),
    "implementation": (by_implementation, "'flex_attention' by 'sdpa'"),
    "own eval()": (Calibrated, "another way when it is analysed"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_is_another_one_while_it_is_analysed_is_refused(name: str) -> None:
    make, reason = OTHERS[name]
    model = make()
    with pytest.raises(UnsupportedEncoderError, match=rf"differ from the model's own in evaluation by(.|\n)*{reason}"):
        attribute(model, BATCH)


def test_a_model_that_is_the_same_under_every_condition_is_read() -> None:
    for condition in (lambda _: False, lambda _: True):
        assert attribute(Other(condition), BATCH).logits.shape == (2, 3)


def test_the_comparison_costs_one_forward_and_is_not_made_again() -> None:
    model = models.build("bert")
    reader, gradients = Reader(model), []
    model.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    for _ in range(3):
        analyze(reader, BATCH, Settings())
    # The structure, the model's own evaluation, then one forward for each analysis.
    assert gradients == [True, False, True, True, True]


def test_the_comparison_disturbs_nothing_and_hears_no_failure() -> None:
    def broken_without_gradients(model: Any) -> bool:
        if not torch.is_grad_enabled():
            torch.rand(3)
            model.made = True
            raise RuntimeError("no kernel")
        return False

    model = Other(broken_without_gradients).train()
    state = torch.get_rng_state()
    attribute(model, BATCH)
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(model, "made")
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta_v3"])
def test_rounding_is_no_difference(name: str, dtype: torch.dtype) -> None:
    assert attribute(models.build(name, dtype=dtype), BATCH).logits.dtype == dtype


def test_an_implementation_that_is_set_later_is_compared_anew() -> None:
    model = Other(lambda one: one.model.config._attn_implementation == "sdpa")
    attribute(model, BATCH)
    models.set_attention(model.model, "flex_attention")
    with pytest.raises(UnsupportedEncoderError, match="'flex_attention' by 'sdpa'"):
        attribute(model, BATCH)
