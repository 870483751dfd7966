"""How many full-size passes the analyses of a training take: the first one finds and proves what later ones know."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from globenc_lightning import GlobEncCallback, rolling
from globenc_lightning.encoder.structure import separating_sets
from globenc_lightning.measuring import Measurer
from tests.task.zoo import PAD, HeadInStep, classes, text
from tests.training import build_trainer

SIZE = 12
Passes = list[tuple[str, int, int]]


class Mean(HeadInStep):
    """The mean of the real tokens."""

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
        found: Tensor = self.head(hidden.sum(1) / mask.sum(1, keepdim=True))
        return found


class Pooled(HeadInStep):
    """A weighted mean of the tokens; the weights are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(self.head.in_features, 1)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        weights = self.weights(hidden).squeeze(-1).masked_fill(mask == 0, -1e4).softmax(1)
        found: Tensor = self.head((weights.unsqueeze(-1) * hidden).sum(1))
        return found


def padded(columns: int) -> TensorDataset:
    ids, mask = (F.pad(one, (0, columns), value=PAD) for one in text(10, SIZE))
    return TensorDataset(ids, mask, classes(10, size=SIZE))


def passes_of(
    module: Any, data: TensorDataset, monkeypatch: pytest.MonkeyPatch, **arguments: Any
) -> tuple[list[Counter[Any]], int]:
    """The forwards and backwards through the encoder in each analysis, with rows and tokens, and the text's length."""
    seed_everything(7, verbose=False)
    model, own = module(), Measurer.measure
    found: list[Counter[Any]] = []
    inside: list[bool] = []

    def measured(*given: Any) -> Any:
        found.append(Counter())
        inside.append(True)
        try:
            return own(*given)
        finally:
            inside.pop()

    def left(_: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        shape = tuple(hidden.shape[:2])
        if not inside:
            return
        found[-1][("forward", *shape)] += 1
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: found[-1].update([("backward", *shape)]))

    monkeypatch.setattr(Measurer, "measure", measured)
    model.encoder.encoder.layer[0].register_forward_hook(left)
    trainer = build_trainer([GlobEncCallback(on_error="raise", **arguments)], max_epochs=2)
    trainer.fit(model, DataLoader(data, 4), DataLoader(data, SIZE))
    return found, int(data.tensors[1].any(0).sum())


def whole(passes: Counter[Any]) -> dict[Any, int]:
    """Those of more than the two examples that the structure is found with."""
    return {key: count for key, count in passes.items() if key[1] > 2}


@pytest.mark.parametrize("module", [HeadInStep, Mean, Pooled])
def test_the_first_analysis_takes_one_forward_more(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second, *later), length = passes_of(module, padded(0), monkeypatch)
    once = {("forward", SIZE, length): 1, ("backward", SIZE, length): 1}
    compared = {**once, ("forward", SIZE, length): 2}
    assert first[("forward", 2, length)] == 1
    assert whole(first) == compared
    # Once the weights have moved, what was cut is compared again.
    assert second == compared
    assert later
    assert all(one == once for one in later)


def test_padding_takes_one_whole_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second, *later), length = passes_of(HeadInStep, padded(20), monkeypatch)
    width = length + 20
    once = {("forward", SIZE, length): 1, ("backward", SIZE, length): 1}
    assert first[("forward", 2, length)] == 1
    compared = {**once, ("forward", SIZE, width): 1, ("forward", SIZE, length): 2}
    assert whole(first) == compared
    assert second == compared
    assert all(one == once for one in later)


def test_rows_that_wait_are_the_rows_of_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> GlobEncCallback:
        seed_everything(7, verbose=False)
        callback = GlobEncCallback(on_error="raise")
        data = padded(0)
        build_trainer([callback], max_epochs=1).fit(Pooled(), DataLoader(data, 4), DataLoader(data, SIZE))
        return callback

    one = trained()
    monkeypatch.setattr(rolling, "MOST_WAITING", 0)
    two = trained()
    for mine, other in zip(one.history, two.history, strict=True):
        for method in mine.rows:
            assert all(torch.equal(a, b) for a, b in zip(mine.rows[method], other.rows[method], strict=True))


def test_where_too_much_would_wait_there_is_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "MOST_WAITING", 0)
    (first, *_), length = passes_of(Pooled, padded(0), monkeypatch)
    assert first[("backward", SIZE, length)] == 2


@pytest.mark.parametrize(("width", "most"), [(2, 2), (48, 8), (64, 8), (128, 10), (512, 12)])
def test_a_proof_takes_few_sets(width: int, most: int) -> None:
    assert len(separating_sets(torch.ones(1, width))) <= most
