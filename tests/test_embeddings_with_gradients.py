"""Embeddings that are made to require a gradient, as checkpointing and adapters have it: figures are what they were."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from globenc_lightning import Attributions, GlobEncCallback, attribute
from tests import families
from tests.task.torch_zoo import TORCH_CASES
from tests.test_references import InARow
from tests.training import Steps, fit, said

ASKED: dict[str, Any] = {
    "methods": ["N-Enc", "ALTI", "Value-Zeroing"],
    "references": ["integrated gradients", "HTA"],
    "signed": True,
}
FAMILIES = ("bert", "electra", "albert", "roberta_prelayernorm", "modernbert", "deberta_v3", "gpt2", "llama")


def required(module: nn.Module, args: Any, output: Tensor) -> None:
    """What ``enable_input_require_grads`` of transformers does."""
    output.requires_grad_(True)


def with_gradients(model: nn.Module) -> nn.Module:
    for one in model.modules():
        if isinstance(one, nn.Embedding):
            one.register_forward_hook(required)
    return model


def assert_same_figures(found: Attributions, expected: Attributions) -> None:
    assert found.signed is not None
    assert expected.signed is not None
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.signed, expected.signed, **close)
    torch.testing.assert_close(found.left_out, expected.left_out, **close)
    torch.testing.assert_close(found.references, expected.references, equal_nan=True, **close)
    torch.testing.assert_close(found.reference_error, expected.reference_error, equal_nan=True, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.rows, expected.rows, **close)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_requires_a_gradient_is_explained_as_if_it_did_not(name: str) -> None:
    family = next(one for one in families.FAMILIES if one.name == name)
    dtype = torch.float64
    inputs = families.example_inputs(family, dtype)
    expected = attribute(families.build(family, None, dtype), inputs, **ASKED)
    found = attribute(with_gradients(families.build(family, None, dtype)), inputs, **ASKED)
    assert_same_figures(found, expected)


def test_states_that_are_made_of_another_call_s_are_told_from_them() -> None:
    """The second call's states depend on the first one's; that both require a gradient does not tell that."""
    torch.manual_seed(0)
    model = InARow()
    inputs = {"input_ids": torch.tensor([[2, 9, 8, 7, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    options: dict[str, Any] = {"references": ["integrated gradients"]}
    expected, found = attribute(model, inputs, **options), attribute(with_gradients(model), inputs, **options)
    torch.testing.assert_close(found.references, expected.references)
    assert found.others[0].references["integrated gradients"].isnan().all()


@pytest.mark.parametrize("name", ["torch_encoder", "torch_encoder_sequence_first"])
def test_an_encoder_of_torch_s_own(name: str) -> None:
    case = next(one for one in TORCH_CASES if one.name == name)

    def trained(hooked: bool) -> Any:
        torch.manual_seed(0)
        module = case.module()
        callback = GlobEncCallback(**{**ASKED, **case.arguments}, num_examples=3)
        fit(with_gradients(module) if hooked else module, callback, train=case.loader((0, 1)), val=case.loader((2,)))
        return callback.history[-1]

    found, expected = trained(True), trained(False)
    for mine, theirs in (
        (found.signed, expected.signed),
        *zip(found.references.values(), expected.references.values(), strict=True),
    ):
        torch.testing.assert_close(list(mine), list(theirs), rtol=1e-3, atol=1e-5)
    assert all(len(one) for one in found.signed)


def test_a_training_with_checkpointing_has_all_figures() -> None:
    module = Steps()
    module.model.gradient_checkpointing_enable()
    callback = GlobEncCallback(**ASKED, num_examples=3)
    with said() as messages:
        fit(module, callback)
    assert [text for text in messages if "GlobEncCallback" in text or "signed" in text] == []
    entry = callback.history[-1]
    assert all(len(one) == len(two) > 0 for one, two in zip(entry.signed, entry.saliency, strict=True))
    assert all(bool((one > 0).any()) for one in entry.references["integrated gradients"])
