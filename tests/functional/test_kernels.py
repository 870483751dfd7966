from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from globenc_lightning import METHODS, attribute
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.functional import FrozenNorm, gram_kernel
from globenc_lightning.functional.kernels import KernelCache
from globenc_lightning.settings import Settings
from tests import models


def norm(width: int, seed: int) -> FrozenNorm:
    generator = torch.Generator().manual_seed(seed)
    return FrozenNorm(torch.rand(width, generator=generator) + 0.5, torch.ones(1, 1))


def test_a_kernel_is_kept_while_the_weights_stand_still() -> None:
    cache, projection, norms = KernelCache(), torch.randn(8, 6), (norm(8, 0), norm(8, 1))
    first = cache.kernel(0, projection, norms)
    assert torch.equal(first, gram_kernel(projection, norms))
    assert cache.kernel(0, projection.clone(), norms) is first
    assert cache.kernel(0, projection, norms[:1]) is not first
    assert cache.kernel(1, projection, norms) is not first
    cache.clear()
    assert cache.kernel(0, projection, norms) is not first


@pytest.mark.parametrize("part", ["projection", "norm"])
def test_one_changed_weight_is_noticed(part: str) -> None:
    cache, projection, norms = KernelCache(), torch.randn(8, 6), (norm(8, 0),)
    cache.kernel(0, projection, norms)
    if part == "projection":
        projection.data[3, 2] += 1e-5
    else:
        weight = norms[0].weight
        assert weight is not None
        weight.data[3] += 1e-6
    assert torch.equal(cache.kernel(0, projection, norms), gram_kernel(projection, norms))


def test_another_shape_or_precision_is_noticed() -> None:
    cache = KernelCache()
    cache.kernel(0, torch.randn(8, 6), ())
    for projection in (torch.randn(8, 4), torch.randn(8, 6, dtype=torch.float64), torch.randn(5, 6)):
        kernel = cache.kernel(0, projection, ())
        assert torch.equal(kernel, gram_kernel(projection))
        assert kernel.dtype == projection.dtype


def change_by_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def change_by_loading(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.2 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [change_by_data, change_in_place, change_by_loading])
def test_figures_follow_the_weights(change: Callable[[nn.Module], None]) -> None:
    model, inputs = models.build("bert"), models.batch((7, 4))
    attribute(model, inputs, methods=METHODS)
    change(model)
    again: dict[str, Tensor] = attribute(model, inputs, methods=METHODS).local
    fresh = analyze(Reader(model), inputs, Settings(METHODS)).local
    for method in METHODS:
        assert torch.equal(again[method], fresh[method])


def test_nothing_is_kept_where_nothing_is_used_again() -> None:
    cache, projection, norms = KernelCache(keep=False), torch.randn(8, 6), (norm(8, 0),)
    first = cache.kernel(0, projection, norms)
    assert torch.equal(first, gram_kernel(projection, norms))
    assert cache.kernel(0, projection, norms) is not first
