"""ALTI against its definition: every vector is built."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from globenc_lightning.functional import FrozenNorm, devices
from globenc_lightning.functional.alti import alti
from tests import naive


def layer(b: int = 2, h: int = 3, s: int = 6, v: int = 4, d: int = 10, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mask = torch.arange(s) < torch.tensor([s, s - 2, 1])[:b].unsqueeze(1)
    attention = (2 * normal(b, h, s, s)).masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    return {
        "attention": attention,
        "values": normal(b, h, s, v),
        "projection": normal(d, h * v),
        "residual": normal(b, s, d),
        "mask": mask,
    }


def by_definition(
    attention: Tensor,
    values: Tensor,
    projection: Tensor,
    residual: Tensor,
    mask: Tensor,
    output: Tensor,
    norm: naive.Norm | None = None,
    real: Tensor | None = None,
    own: naive.Norm | None = None,
) -> Tensor:
    """(b, q, k), one vector after the other; ``own`` is a norm of the attention's vectors alone."""
    b, h, s, v = values.shape
    found = torch.zeros(b, s, s, dtype=torch.float64)
    for example in range(b):
        vectors = torch.zeros(s, s, projection.shape[0], dtype=torch.float64)
        for head in range(h):
            transformed = values[example, head] @ projection[:, head * v : (head + 1) * v].T
            vectors += attention[example, head].unsqueeze(-1) * transformed
        if own is not None and own.real is not None:
            vectors = own.linear(vectors, own.real[example])
        vectors += torch.eye(s, dtype=torch.float64).unsqueeze(-1) * residual[example].unsqueeze(1)
        if norm is not None and real is not None:
            vectors = norm.linear(vectors, real[example])
        for q in range(int(mask[example].sum())):
            scores = [
                max(0.0, float(output[example, q].abs().sum() - (output[example, q] - vectors[q, k]).abs().sum()))
                for k in range(int(mask[example].sum()))
            ]
            found[example, q, : len(scores)] = torch.tensor(scores, dtype=torch.float64) / (sum(scores) or 1.0)
    return found


def contributions(given: dict[str, Any]) -> Tensor:
    context = (given["attention"] @ given["values"]).transpose(1, 2).flatten(2)
    return context @ given["projection"].T


@pytest.fixture(params=[1 << 18, 150, 1], ids=["at once", "in parts", "one by one"])
def in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "CHUNK", request.param)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("centered", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("b", [1, 3])
def test_post_ln(b: int, centered: bool) -> None:
    given = layer(b)
    bias = torch.linspace(-1, 1, 10, dtype=torch.float64)
    real = contributions(given) + given["residual"] + bias
    norm = naive.Norm(torch.linspace(0.3, 2, 10, dtype=torch.float64), 1e-5, centered)
    output = norm.linear(real.flatten(0, 1).unsqueeze(1), real.flatten(0, 1)).view_as(real) + 0.5 * bias
    frozen = FrozenNorm(norm.weight, norm.deviation(real).squeeze(-1), centered)
    found = alti(**given, output=output, norm=frozen)
    expected = by_definition(**given, output=output, norm=norm, real=real)
    torch.testing.assert_close(found, expected)
    assert (expected > 0.05).sum() > 5


@pytest.mark.usefixtures("in_parts")
def test_pre_ln() -> None:
    given = layer(3)
    output = contributions(given) + given["residual"] + torch.linspace(-1, 1, 10, dtype=torch.float64)
    torch.testing.assert_close(alti(**given, output=output), by_definition(**given, output=output))


def test_a_norm_on_the_attentions_output() -> None:
    given = layer(3)
    real = contributions(given) + 0.3
    own = naive.Norm(torch.linspace(0.3, 2, 10, dtype=torch.float64), 1e-5, real=real)
    output = own.linear(real.flatten(0, 1).unsqueeze(1), real.flatten(0, 1)).view_as(real) + given["residual"]
    expected = by_definition(**given, output=output, own=own)
    # As the reader gives them: centring and weight in the projection, what is divided by beside it.
    projection = (given["projection"] - given["projection"].mean(0)) * own.weight.unsqueeze(-1)
    found = alti(**{**given, "projection": projection}, output=output, divided=own.deviation(real).squeeze(-1))
    torch.testing.assert_close(found, expected)


def test_it_is_the_l1_distance_that_is_published() -> None:
    """The L2 form ranks otherwise and is another method."""
    given = layer(1)
    output = contributions(given) + given["residual"]
    vectors = torch.einsum(
        "bhqk,bhkv,dhv->bqkd", given["attention"], given["values"], given["projection"].view(10, 3, 4)
    )
    vectors += torch.eye(6, dtype=torch.float64).view(1, 6, 6, 1) * given["residual"].unsqueeze(2)
    euclidean = (output.norm(dim=-1, keepdim=True) - (output.unsqueeze(2) - vectors).norm(dim=-1)).clamp(min=0)
    euclidean = euclidean / euclidean.sum(-1, keepdim=True)
    assert (alti(**given, output=output) - euclidean).abs().max() > 0.02


def test_what_stands_at_padding_does_not_matter() -> None:
    given = layer(3)
    output = contributions(given) + given["residual"]
    expected = alti(**given, output=output)
    padding = ~given["mask"]
    spoiled = {**given, "residual": given["residual"].masked_fill(padding.unsqueeze(-1), float("nan"))}
    found = alti(**spoiled, output=output.masked_fill(padding.unsqueeze(-1), float("nan")))
    torch.testing.assert_close(found, expected)
    sums = found.sum(-1)
    torch.testing.assert_close(sums, given["mask"].to(sums))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_never_more_vectors_at_once_than_a_part_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "CHUNK", 8000)
    given = layer(2, h=4, s=40, v=8, d=32)
    output = contributions(given) + given["residual"]
    with Largest() as largest:
        alti(**given, output=output)
    # The attention itself: (b, h, q, k); all vectors at once would be (b, q, k, d), eight times as many.
    assert largest.size <= 2 * 4 * 40 * 40
