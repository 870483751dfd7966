"""Signed scores on another device: the same figures, and a count of looks that no example and no layer adds to."""

import copy
from contextlib import nullcontext

import pytest
import torch

from globenc_lightning import ProbeSet, attribute
from globenc_lightning.analysis import Reader
from globenc_lightning.measurement import measure
from globenc_lightning.settings import Settings
from tests import families
from tests.device.python_device import DeviceTensor, counted, restricted
from tests.device.test_counts import MOST_LOOKS, bare, lengths, model_of, ours


@pytest.mark.parametrize(
    ("name", "double"), [("bert", True), ("bert", False), ("llama", True), ("modernbert", True), ("deberta", True)]
)
def test_signed_scores_are_those_of_the_cpu(name: str, double: bool, device: torch.device) -> None:
    family = next(one for one in families.FAMILIES if one.name == name)
    model, inputs = families.build(family, family.kinds[0]), families.example_inputs(family)
    here = attribute(model, inputs, readout="cls", signed=True)
    other, given = copy.deepcopy(model).to(device), {key: one.to(device) for key, one in inputs.items()}
    with nullcontext() if double else restricted():
        there = attribute(other, given, readout="cls", signed=True)
    assert here.signed is not None
    assert isinstance(there.signed, DeviceTensor)
    torch.testing.assert_close(there.signed.cpu(), here.signed, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(there.left_out.cpu(), here.left_out, rtol=2e-4, atol=2e-5)


def counts_with_signed(layers: int, examples: int, device: torch.device) -> tuple[int, int]:
    """Looks and kernels of a second measurement."""
    probe, reader = ProbeSet.from_batch(lengths(16, examples)), Reader(model_of(layers, device))
    settings = Settings(("N-Enc",), signed=True)
    measure(reader, probe, settings)
    with counted() as counts:
        found = measure(reader, probe, settings)
    assert all(type(one) is torch.Tensor for one in found.signed)
    return sum(counts.looks.values()), counts.kernels


def test_looks_and_launches(device: torch.device) -> None:
    without = [ours(layers, 16, 3, ("N-Enc",), device) for layers in (1, 2)]
    found = [counts_with_signed(layers, 3, device) for layers in (1, 2)]
    assert found[0][0] == found[1][0] == counts_with_signed(1, 8, device)[0]
    assert found[0][0] <= 2 * MOST_LOOKS
    model = bare(2, 16, 3, device).kernels - bare(1, 16, 3, device).kernels
    added = (found[1][1] - found[0][1]) - (without[1].kernels - without[0].kernels)
    assert 0 < added <= 3.0 * model
