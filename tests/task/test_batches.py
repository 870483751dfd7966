from collections import defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from globenc_lightning.errors import ProbeError
from globenc_lightning.task.batches import (
    columns_of,
    copied,
    leaves,
    needs_template,
    restored,
    rows_of,
    size_of,
    stored,
)
from tests.neutrality import equal

Named = namedtuple("Named", ["ids", "y"])


@dataclass(frozen=True)
class Frozen:
    ids: Tensor
    texts: list[str]
    number: int = 3


def ids() -> Tensor:
    return torch.arange(12).view(4, 3)


@dataclass(slots=True)
class Slots:
    ids: Tensor
    y: Tensor


FORMS: dict[str, Any] = {
    "tensor": ids(),
    "tuple": (ids(), torch.arange(4)),
    "dict": {"input_ids": ids(), "y": torch.arange(4), "name": "train", "weight": 0.5, "flag": True, "none": None},
    "nested": {"a": {"ids": ids()}, "b": [ids(), torch.arange(4)], "texts": ["a", "b", "c", "d"]},
    "encoding": BatchEncoding({"input_ids": ids()}),
    "named": Named(ids(), torch.arange(4)),
    "dataclass": Frozen(ids(), ["a", "b", "c", "d"]),
    "dataclass with slots": Slots(ids(), torch.arange(4)),
    "array": (np.arange(4.0), ids()),
    "list of examples": [{"ids": torch.arange(3), "y": 1}] * 4,
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_copy_shares_nothing_and_is_the_same(form: str) -> None:
    batch = FORMS[form]
    again = copied(batch)
    assert type(again) is type(batch)
    for (path, one), (other_path, other) in zip(leaves(batch), leaves(again), strict=True):
        assert path == other_path
        assert equal(one, other)
        if isinstance(one, Tensor):
            assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("form", list(FORMS))
def test_a_batch_travels_in_a_checkpoint(form: str, tmp_path: Any) -> None:
    batch = FORMS[form]
    torch.save(stored(batch), tmp_path / "batch.pt")
    state = torch.load(tmp_path / "batch.pt", weights_only=True)
    again = restored(state, batch)
    assert type(again) is type(batch)
    assert [path for path, _ in leaves(again)] == [path for path, _ in leaves(batch)]
    assert all(equal(one, other) for (_, one), (_, other) in zip(leaves(batch), leaves(again), strict=True))
    if needs_template(state):
        with pytest.raises(ProbeError, match="no batch has shown"):
            restored(state)


@pytest.mark.parametrize("form", list(FORMS))
def test_rows(form: str) -> None:
    batch = FORMS[form]
    assert size_of(batch) == 4
    part = rows_of(batch, [2, 0])
    assert type(part) is type(batch)
    assert size_of(part) == 2
    first = next(leaf for _, leaf in leaves(part) if isinstance(leaf, Tensor) and leaf.dim())
    if form != "list of examples":
        assert first[:, 0].tolist() == [6, 0] if first.dim() == 2 else first.tolist() == [2, 0]


def test_a_step_that_changes_a_copy_changes_no_batch() -> None:
    batch = {"texts": ["a", "b"], "parts": [ids()], "frozen": Frozen(ids(), ["a"])}
    again = copied(batch)
    again["texts"].pop()
    again["parts"].pop()
    again["frozen"].ids.zero_()
    again["frozen"].texts.pop()
    assert equal(batch["parts"][0], ids())
    assert batch["texts"] == ["a", "b"]
    assert equal(batch["frozen"].ids, ids())
    assert batch["frozen"].texts == ["a"]


def test_a_mapping_stays_what_it_is() -> None:
    batch = defaultdict(list, {"ids": ids()})
    again = copied(batch)
    assert type(again) is defaultdict
    assert again["more"] == []
    assert "more" not in batch


def test_columns() -> None:
    batch = {"ids": ids(), "more": torch.zeros(4, 3, 2), "y": torch.arange(4), "square": torch.zeros(4, 4)}
    cut = columns_of(batch, ids(), slice(0, 2))
    assert {key: tuple(value.shape) for key, value in cut.items()} == {
        "ids": (4, 2),
        "more": (4, 2, 2),
        "y": (4,),
        "square": (4, 4),
    }


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(ProbeError, match="holds a object"):
        stored({"ids": ids(), "other": object()})
