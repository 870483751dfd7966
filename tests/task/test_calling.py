from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from globenc_lightning import attribute
from globenc_lightning.errors import GlobEncWarning, ModelCallError, UnsupportedEncoderError
from globenc_lightning.task.calling import logits_of, ways_to_call
from tests import models


def classifier() -> Any:
    return models.build("bert", dtype=torch.float64)


def batch(**extra: Any) -> dict[str, Any]:
    return {**models.batch((9, 5, 7)), **extra}


def expected_logits() -> Tensor:
    with torch.no_grad():
        return classifier()(**models.batch((9, 5, 7))).logits


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = classifier()


class WithKeywords(Base):
    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs)


class WithNames(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class WithOptionalNames(Base):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, temperature: float = 1.0, labels: Any = None
    ) -> Any:
        return self.model(input_ids, attention_mask=attention_mask).logits / temperature


class WithBatch(Base):
    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


class WithPositionals(Base):
    def forward(self, *args: Any) -> Any:
        return self.model(input_ids=args[0]["input_ids"], attention_mask=args[0]["attention_mask"])


class WithTuple(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits.sum(), logits


class WithDict(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return {"loss": None, "logits": self.model(input_ids=input_ids, attention_mask=attention_mask).logits}


class WithHiddenStates(Base):
    """Gives no logits itself; its model does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model.bert(input_ids=input_ids, attention_mask=attention_mask)


class WithoutForward(Base):
    """What people write who call ``self.model(**batch)`` in their steps."""

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(**batch).loss


class WithOwnHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        full = classifier()
        self.encoder = full.bert
        self.head = full.classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = classifier().bert

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.encoder(**batch).last_hidden_state.sum()


@pytest.mark.parametrize(
    "module",
    [
        WithKeywords,
        WithNames,
        WithOptionalNames,
        WithBatch,
        WithPositionals,
        WithTuple,
        WithDict,
        WithHiddenStates,
        WithoutForward,
        WithOwnHead,
    ],
)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"labels": torch.tensor([0, 1, 2])},
        {"label": torch.tensor([0, 1, 2]), "text": ["a", "b", "c"], "idx": torch.arange(3)},
    ],
    ids=["inputs alone", "labels", "label and keys that nobody knows"],
)
def test_ways_that_people_write_a_module(module: type[nn.Module], extra: dict[str, Any]) -> None:
    found = attribute(module(), batch(**extra))
    torch.testing.assert_close(found.logits, expected_logits(), rtol=1e-12, atol=1e-12)
    assert found.local["N-Enc"].shape == (3, 3, 9, 9)
    assert torch.isfinite(found.correlation["N-Enc"]).all()


@pytest.mark.parametrize(
    "extra",
    [{}, {"labels": torch.tensor([0, 1, 2])}, {"idx": torch.arange(3), "text": ["a", "b", "c"]}],
    ids=["inputs alone", "labels", "keys that nobody knows"],
)
def test_keywords_that_are_passed_on_to_something_strict(extra: dict[str, Any]) -> None:
    class Strict(WithOwnHead):
        def forward(self, **kwargs: Any) -> Tensor:  # type: ignore[override]
            return self.pooled(**kwargs)

        def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output)

    found = attribute(Strict(), batch(**extra))
    torch.testing.assert_close(found.logits, expected_logits(), rtol=1e-12, atol=1e-12)


def test_keywords_of_the_users_own_are_passed_on_without_the_labels() -> None:
    class Strict(WithOwnHead):
        def forward(self, **kwargs: Any) -> Tensor:  # type: ignore[override]
            return self.scaled(**kwargs)

        def scaled(self, input_ids: Tensor, attention_mask: Tensor, scale: Tensor) -> Tensor:
            return super().forward(input_ids, attention_mask) * scale.unsqueeze(1)

    found = attribute(Strict(), batch(scale=torch.full((3,), 2.0), labels=torch.tensor([0, 1, 2])))
    torch.testing.assert_close(found.logits, 2 * expected_logits(), rtol=1e-12, atol=1e-12)


def test_the_bare_hugging_face_model() -> None:
    found = attribute(classifier(), batch(labels=torch.tensor([0, 1, 2]), idx=torch.arange(3)))
    torch.testing.assert_close(found.logits, expected_logits(), rtol=1e-12, atol=1e-12)


def test_a_module_that_needs_labels_gets_them() -> None:
    class NeedsLabels(Base):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    found = attribute(NeedsLabels(), batch(labels=torch.tensor([0, 1, 2])))
    torch.testing.assert_close(found.logits, expected_logits(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_a_single_logit_that_is_squeezed(size: int) -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = classifier().bert
            self.head = nn.Linear(32, 1).double()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.encoder(input_ids, attention_mask=attention_mask).pooler_output).squeeze(-1)

    found = attribute(Squeezed(), models.batch((6, 4, 5)[:size]))
    assert found.logits.shape == (size, 1)
    assert found.task == "binary"
    assert found.predicted.tolist() == [int(logit > 0) for logit in found.logits[:, 0]]


def test_a_single_example_that_is_squeezed() -> None:
    class Squeezed(Base):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids, attention_mask=attention_mask).logits.squeeze()

    assert attribute(Squeezed(), models.batch((6,))).logits.shape == (1, 3)


def test_the_users_way_comes_first() -> None:
    def forward(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        return -module.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits

    found = attribute(WithKeywords(), batch(), forward=forward)
    torch.testing.assert_close(found.logits, -expected_logits(), rtol=1e-12, atol=1e-12)


def test_the_users_way_makes_a_headless_module_readable() -> None:
    def forward(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        hidden = module.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return hidden.last_hidden_state[:, 0, :2]

    assert attribute(Headless(), batch(), forward=forward).logits.shape == (3, 2)


def test_the_users_way_cannot_change_the_batch_of_the_analysis() -> None:
    def forward(module: Any, inputs: dict[str, Any]) -> Tensor:
        return module.model(inputs.pop("input_ids"), attention_mask=inputs.pop("attention_mask")).logits

    def target(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        assert set(inputs) == {"input_ids", "attention_mask"}
        return logits[:, 0]

    given = batch()
    attribute(WithKeywords(), given, forward=forward, target=target)
    assert set(given) == {"input_ids", "attention_mask"}


def test_what_the_users_way_raises_is_named() -> None:
    def forward(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        raise KeyError("token_ids")

    with pytest.raises(ModelCallError, match=r"forward= raised KeyError: 'token_ids'"):
        attribute(WithKeywords(), batch(), forward=forward)


def test_headless_module_is_told_what_to_give() -> None:
    # No line can be made: where the head is, nobody knows.
    with pytest.raises(ModelCallError, match=r"a callable forward\(module, batch\) that returns the logits") as raised:
        attribute(Headless(), batch())
    assert "Headless holds encoder; its encoder is encoder; the batch holds input_ids" in str(raised.value)
    assert "attribute(...)" in str(raised.value)
    assert "lambda" not in str(raised.value)


def test_bare_encoder_is_told_what_to_give() -> None:
    with pytest.raises(ModelCallError, match=r"a callable forward\(module, batch\)"):
        attribute(classifier().bert, batch())


def test_every_way_that_was_tried_is_named() -> None:
    class Fails(Base):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            raise ZeroDivisionError("no such thing")

    module = Fails()
    module.model = module.model.bert
    with pytest.raises(ModelCallError, match=r"ZeroDivisionError: no such thing") as raised:
        attribute(module, batch())
    assert "Fails.forward(input_ids, attention_mask)" in str(raised.value)
    assert "Give forward=" in str(raised.value)


def test_a_module_that_needs_what_the_batch_has_not() -> None:
    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = classifier().bert

        def forward(self, premise: Tensor, hypothesis: Tensor) -> Tensor:
            return self.encoder(premise).pooler_output + self.encoder(hypothesis).pooler_output

    with pytest.raises(ModelCallError, match=r"no forward of its own that takes input_ids, attention_mask"):
        attribute(Needs(), batch())


def test_no_way_calls_two_models_in_one_another() -> None:
    ways = [way.name for way in ways_to_call(WithoutForward(), batch(labels=torch.zeros(3)))]
    assert ways == ["model(input_ids, attention_mask)"]


def test_logits_without_an_encoder_behind_them() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(models.VOCABULARY, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.embedding(input_ids).mean(1)

    with pytest.raises(UnsupportedEncoderError, match="there is no encoder in Bag"):
        attribute(Bag(), batch())


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(torch.ones(4, 3), id="tensor"),
        pytest.param((torch.tensor(0.5), torch.ones(4, 3)), id="loss and logits"),
        pytest.param([torch.ones(4, 3), torch.tensor(0.5)], id="list"),
        pytest.param({"logits": torch.ones(4, 3), "loss": None}, id="mapping"),
        pytest.param(SequenceClassifierOutput(loss=torch.tensor(1.0), logits=torch.ones(4, 3)), id="output"),
    ],
)
def test_logits_of_what_models_return(output: Any) -> None:
    assert torch.equal(logits_of(output, 4), torch.ones(4, 3))


def test_logits_without_an_axis() -> None:
    assert logits_of(torch.ones(4), 4).shape == (4, 1)
    assert logits_of(torch.ones(3), 1).shape == (1, 3)
    assert logits_of(torch.ones(1), 1).shape == (1, 1)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "a NoneType, which holds no logits"),
        ({"loss": torch.tensor(1.0)}, "dict with loss, which holds no logits"),
        (torch.tensor(1.0), "which holds no logits"),
        (torch.ones(4, 3, dtype=torch.long), "which holds no logits"),
        ((torch.tensor(1.0), torch.tensor(2.0)), "a tuple, which holds no logits"),
        (torch.ones(5, 3), r"logits of shape \(5, 3\) for 4 examples"),
    ],
)
def test_what_holds_no_logits(output: Any, message: str) -> None:
    with pytest.raises(ModelCallError, match=message):
        logits_of(output, 4)


def test_what_could_be_logits_or_something_else_is_refused() -> None:
    with pytest.raises(ModelCallError, match="2 tensors, and nobody can tell"):
        logits_of((torch.ones(4, 32), torch.ones(4, 3)), 4)
    with pytest.raises(ModelCallError, match="features, not logits"):
        logits_of(torch.ones(4, 32), 4, width=32)
    named = SimpleNamespace(logits=torch.ones(4, 32))
    assert logits_of(named, 4, width=32) is named.logits


class TwoModels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = models.build("bert"), models.build("bert", seed=1)


def test_of_two_models_with_a_head_none_is_taken() -> None:
    with pytest.raises(
        ModelCallError, match=r"teacher, student[\s\S]*module\.teacher\(input_ids=[\s\S]*module\.student\(input_ids="
    ):
        attribute(TwoModels(), batch())
    found = attribute(TwoModels(), batch(), forward=lambda module, given: module.student(**given))
    assert torch.equal(found.logits, attribute(TwoModels().student, batch()).logits)


class OwnMaskName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = models.build("bert")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask).logits


def test_a_mask_that_would_not_be_passed_is_noticed() -> None:
    given = batch()
    given["mask"] = given.pop("attention_mask")
    with pytest.raises(ModelCallError, match="'mask' looks like one"):
        attribute(OwnMaskName(), given)
    found = attribute(OwnMaskName(), given, forward=lambda module, one: module(one["input_ids"], one["mask"]))
    assert torch.equal(found.attention_mask, given["mask"].bool())


class HeadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = models.build("bert"), nn.Linear(32, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.model.bert(ids, mask)[0][:, 0])


def test_another_head_than_the_modules_own_is_named() -> None:
    with pytest.warns(GlobEncWarning, match=r"forward of its own[\s\S]*the figures are those of model\("):
        attribute(HeadElsewhere(), batch())
