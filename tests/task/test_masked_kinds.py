"""Every kind of decision on masked copies: against the step's own parts, with the encoder's ids exchanged by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from globenc_lightning import GlobEncCallback
from globenc_lightning.faithfulness import Faithfulness
from tests.task.test_zoo import BY_NAME, train
from tests.task.zoo import Case
from tests.training import MASK, said, tokenizer

SPECIAL = (0, 2, 3)
"""Ids of the tokenizer that are never masked: padding, [CLS] and [SEP]."""


@dataclass(frozen=True)
class Kind:
    """How a kind of decision is scored by hand.

    Attributes:
        probability: (b,) of what the whole texts are given, by the module, the batch and what these decided; None where
            the score itself is taken.
        decides: what the whole texts are given, which stays fixed.
    """

    probability: Callable[[Any, Any, Any], Tensor] | None = None
    decides: Callable[[Any, Any], Any] | None = None


def classes(module: Any, batch: Any) -> Tensor:
    return module.logits(batch[0], batch[1])


def of_classes(logits: Callable[[Any, Any], Tensor]) -> Kind:
    return Kind(
        lambda module, batch, chosen: logits(module, batch).softmax(-1).gather(1, chosen).squeeze(1),
        lambda module, batch: logits(module, batch).argmax(-1, keepdim=True),
    )


def choices(module: Any, batch: Any) -> Tensor:
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return module.model(**given).logits


def ends(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    found = module.model(**batch)
    return found.start_logits, found.end_logits


def span(module: Any, batch: Any, chosen: Any) -> Tensor:
    both = [one.softmax(1).gather(1, at).squeeze(1) for one, at in zip(ends(module, batch), chosen, strict=True)]
    return both[0] * both[1]


KINDS: dict[str, Kind] = {
    "tensor_dataset": of_classes(classes),
    "sorted_by_length": of_classes(classes),
    "multiple_choice": of_classes(choices),
    "question_answering": Kind(
        span, lambda module, batch: [one.argmax(1, keepdim=True) for one in ends(module, batch)]
    ),
    "binary": Kind(
        lambda module, batch, sign: torch.sigmoid(sign * module.logits(batch[0], batch[1])[:, 0]),
        lambda module, batch: module.logits(batch[0], batch[1])[:, 0].sign(),
    ),
    "regression_mse": Kind(),
    "mean_pooling": Kind(),
    "dense_passages": Kind(),
    "dense_passages_second": Kind(),
    "in_batch_one_call": Kind(),
    "triplet": Kind(),
    "several_values": Kind(),
}


class Exchanges:
    """Exchanges the ids of one call of an encoder by hand."""

    def __init__(self, case: Case, module: Any, rows: list[int]) -> None:
        self.case, self.rows, self.count = case, rows, 0
        encoder = case.encoder(module)
        self.handle = encoder.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.count += 1
        if self.count - 1 != self.case.call:
            return None
        ids = args[0] if args else kwargs["input_ids"]
        special = torch.isin(ids, torch.tensor(SPECIAL))
        others = torch.ones(len(ids)).bool()
        others[self.rows] = False
        special |= others.unsqueeze(1)
        masked = ids.where(special, MASK)
        return ((masked, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": masked})


@pytest.mark.parametrize("name", KINDS)
def test_the_score_falls_as_it_does_with_ids_exchanged_by_hand(name: str) -> None:
    case, kind = BY_NAME[name], KINDS[name]
    callback = GlobEncCallback(**{**case.arguments, "tokenizer": tokenizer(mask=True)}, faithfulness=["N-Enc"])
    with said():
        module, _ = train(case, callback)
    module.eval()
    entry = callback.history[-1]
    found = entry.faithfulness
    assert isinstance(found, Faithfulness)
    assert (found.masking, found.passes) == ("mask token", 5)
    assert found.unit == ("value" if kind.probability is None else "probability")
    spans: list[Tensor] = []
    with torch.no_grad():
        for batch in case.validation():
            size = len(case.score(module, batch))
            rows = list(range(size)) if case.rows is None else case.rows(module, batch).tolist()
            scores = []
            chosen = None if kind.decides is None else kind.decides(module, batch)
            for masks in (False, True):
                exchange = Exchanges(case, module, rows) if masks else None
                if kind.probability is None:
                    scores.append(case.score(module, batch))
                else:
                    scores.append(kind.probability(module, batch, chosen))
                if exchange is not None:
                    exchange.handle.remove()
            spans.append(scores[0] - scores[1])
    expected = torch.cat(spans)[: len(found.span)]
    assert float(expected.abs().max()) > 1e-3
    # An example with one token that may be masked has no figures.
    known = ~found.span.isnan()
    assert int(known.sum()) >= len(expected) - 3
    torch.testing.assert_close(found.span[known], expected[known], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["images", "audio", "torch_encoder_patches"])
def test_what_is_no_text_is_refused_in_words_and_keeps_its_other_figures(name: str) -> None:
    case = BY_NAME[name]
    callback = GlobEncCallback(**case.arguments, faithfulness=True)
    with said() as messages:
        train(case, callback)
    assert all(entry.faithfulness is None for entry in callback.history)
    assert len(callback.history) > 0
    (told,) = [text for text in messages if "faithfulness" in text]
    assert "given no token ids" in told
    assert [text for _, text in callback.history.reasons] == [told]
