from collections.abc import Callable
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from globenc_lightning import attribute
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.encoder.structure import drawn_sets, separating_sets
from globenc_lightning.errors import UnsupportedEncoderError
from globenc_lightning.settings import Settings
from tests import models
from tests.encoder.test_precision import Headed, bert


def shifted(x: Tensor, distance: int) -> Tensor:
    """Each token's vector, ``distance`` tokens later."""
    return F.pad(x, (0, 0, distance, 0))[:, : x.shape[1]]


def with_token(x: Tensor, place: int, new: Tensor) -> Tensor:
    places = torch.arange(x.shape[1]) == place % x.shape[1]
    return torch.where(places.unsqueeze(-1), new, x)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "the neighbour": lambda x: x + x.roll(1, 1),
    "the first takes the mean": lambda x: with_token(x, 0, x.mean(1, keepdim=True)),
    "the last takes the mean": lambda x: with_token(x, -1, x.mean(1, keepdim=True)),
    "40 tokens before": lambda x: x + shifted(x, 40),
    "one pair alone": lambda x: with_token(x, 17, x[:, 17:18] + x[:, 5:6]),
    "one pair, faintly": lambda x: with_token(x, 3, x[:, 3:4] + 1e-4 * x[:, 44:45]),
    "the mean is taken off": lambda x: x - x.mean(1, keepdim=True),
    "a window of eight": lambda x: (
        x + x.unflatten(1, (-1, 8)).mean(2, keepdim=True).expand(-1, -1, 8, -1).flatten(1, 2)
    ),
}
PARTS = {"values": "attention.self.value", "feed-forward network": "intermediate.dense"}


def hooked(model: nn.Module, part: str, mix: Callable[[Tensor], Tensor], layer: int = 0) -> nn.Module:
    module = model.encoder.encoder.layer[layer].get_submodule(PARTS[part])
    module.register_forward_hook(lambda m, args, output: mix(output))
    return model


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mix", MIXES)
def test_mixing_beside_attention_is_refused(mix: str, part: str) -> None:
    model = hooked(Headed(bert()).eval(), part, MIXES[mix], layer=1)
    with pytest.raises(UnsupportedEncoderError, match=rf"layer 2 .*: the {part} of one token depends on other tokens"):
        attribute(model, models.batch((48, 48)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mixing_in_other_precisions(dtype: torch.dtype) -> None:
    model = hooked(Headed(bert()).to(dtype).eval(), "values", MIXES["one pair alone"])
    with pytest.raises(UnsupportedEncoderError, match="depends on other tokens"):
        attribute(model, models.batch((48,)))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("distance", [70, 100, 129])
def test_mixing_beyond_the_beginning_of_a_text(distance: int, part: str) -> None:
    model = hooked(Headed(bert()).eval(), part, lambda x: x + shifted(x, distance))
    attribute(model, models.batch((60,)))
    with pytest.raises(UnsupportedEncoderError, match=f"the {part} of one token depends on other tokens"):
        attribute(model, models.batch((130, 20)))


def test_longer_texts_are_shown_once() -> None:
    model = Headed(bert()).eval()
    reader = Reader(model)
    analyze(reader, models.batch((20,)), Settings())
    assert reader.structures[0].span == 20
    analyze(reader, models.batch((130, 90)), Settings())
    longer = reader.structures
    assert longer[0].span == 130
    analyze(reader, models.batch((100,)), Settings())
    assert reader.structures is longer


class Flagged(nn.Module):
    """A linear layer that takes in the neighbour once its flag is set."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.mixes = linear, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x + x.roll(1, 1) if self.mixes else x


def changed_hook(model: nn.Module) -> None:
    hooked(model, "values", MIXES["the neighbour"])


def changed_flag(model: nn.Module) -> None:
    model.encoder.encoder.layer[0].intermediate.dense.mixes = True


def changed_module(model: nn.Module) -> None:
    flagged = Flagged(model.encoder.encoder.layer[1].attention.self.value)
    flagged.mixes = True
    model.encoder.encoder.layer[1].attention.self.value = flagged


def changed_forward(model: nn.Module) -> None:
    value = model.encoder.encoder.layer[1].attention.self.value
    old = value.forward
    value.forward = lambda x: MIXES["the neighbour"](old(x))


def changed_class(model: nn.Module) -> None:
    class Rolls(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return MIXES["the neighbour"](super().forward(x))

    model.encoder.encoder.layer[0].attention.self.value.__class__ = Rolls


@pytest.mark.parametrize("change", [changed_hook, changed_flag, changed_module, changed_forward, changed_class])
def test_what_changes_after_a_first_analysis(change: Callable[[nn.Module], None]) -> None:
    model = Headed(bert()).eval()
    dense = model.encoder.encoder.layer[0].intermediate
    dense.dense = Flagged(dense.dense)
    attribute(model, models.batch((20, 9)))
    change(model)
    with pytest.raises(UnsupportedEncoderError, match="depends on other tokens"):
        attribute(model, models.batch((20, 9)))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 64])
def test_sets_tell_every_token_from_every_other(width: int) -> None:
    sets = separating_sets(torch.ones(2, width))
    assert all(any(one[a] and not one[b] for one in sets) for a, b in permutations(range(width), 2))


def test_drawn_sets_are_two_halves() -> None:
    half, other = drawn_sets(torch.ones(1, 200))
    assert torch.equal(half, ~other)
    assert 70 < int(half.sum()) < 130
