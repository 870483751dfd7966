import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from globenc_lightning import METHODS, ProbeSet, attribute
from globenc_lightning.analysis import Reader
from globenc_lightning.encoder.checks import Checks, brought_home
from globenc_lightning.errors import UnsupportedEncoderError
from globenc_lightning.functional import devices
from globenc_lightning.measurement import measure
from globenc_lightning.settings import Settings
from tests import families, models
from tests.device.python_device import DeviceTensor, counted, restricted

LENGTHS = (9, 5, 12)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from tensors_in(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name))


def moved(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    there = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return copy.deepcopy(model).to(device), there


def assert_same_figures(there: Any, here: Any) -> None:
    for method in here.methods:
        torch.testing.assert_close(there.rows[method].cpu(), here.rows[method], rtol=2e-4, atol=2e-6)
        torch.testing.assert_close(there.log_scale[method].cpu(), here.log_scale[method])
        # Ranks of neighbours that are equal but for rounding may be exchanged.
        assert float((there.correlation[method].cpu() - here.correlation[method]).abs().nan_to_num().max()) < 0.05
    torch.testing.assert_close(there.saliency.cpu(), here.saliency, rtol=2e-4, atol=2e-6)
    for name in ("predicted", "attention_mask", "position"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name
    assert (there.answers, there.truths, there.task, there.readout) == (
        here.answers,
        here.truths,
        here.task,
        here.readout,
    )


@pytest.mark.parametrize(
    ("name", "attention"), [one for one in models.VARIANTS if one[1] == "eager" or one[0] in ("bert", "albert_groups")]
)
def test_figures_are_those_of_the_cpu(name: str, attention: str, device: torch.device) -> None:
    model, batch = models.build(name, attention), models.batch(LENGTHS, pad=models.FAMILIES[name].pad)
    here = attribute(model, batch, methods=METHODS)
    other, given = moved(model, batch, device)
    assert_same_figures(attribute(other, given, methods=METHODS), here)
    with counted() as counts:
        # Inputs of the CPU are taken to the model.
        found = attribute(other, batch, methods=METHODS)
    assert_same_figures(found, here)
    assert all(isinstance(one, DeviceTensor) for one in tensors_in(found.rows))
    assert 0 < sum(counts.looks.values()) <= 4, counts.looks


@pytest.mark.parametrize(
    "family",
    [one for one in families.FAMILIES if one.supported],
    ids=lambda one: one.name,
)
def test_every_family_of_the_table(family: families.Family, device: torch.device) -> None:
    if family.missing:
        pytest.skip(family.missing)
    model, inputs = families.build(family), families.example_inputs(family)
    here = attribute(model, inputs, methods=METHODS)
    other, given = moved(model, inputs, device)
    assert_same_figures(attribute(other, given, methods=METHODS), here)


@pytest.mark.parametrize("name", ["bert", "albert", "deberta_v3"])
def test_a_measurement_holds_nothing_of_the_device(name: str, device: torch.device) -> None:
    model, batch = models.build(name), models.batch(LENGTHS)
    probe = ProbeSet.from_batch(batch)
    settings = Settings(METHODS)
    here = measure(Reader(model), probe, settings, {1: ("N-Enc",)})
    reader = Reader(copy.deepcopy(model).to(device))
    there = measure(reader, probe, settings, {1: ("N-Enc",)})
    found = list(tensors_in(there))
    assert len(found) > 10
    assert not any(isinstance(one, DeviceTensor) for one in found)
    for index in range(len(LENGTHS)):
        for method in METHODS:
            torch.testing.assert_close(there.rows[index][method], here.rows[index][method], rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(there.last[1]["N-Enc"], here.last[1]["N-Enc"], rtol=2e-4, atol=2e-6)
    with counted() as counts:
        measure(reader, probe, settings, {1: ("N-Enc",)})
    assert 0 < sum(counts.looks.values()) <= 4, counts.looks


def test_without_float64_and_frexp_the_figures_are_the_same(device: torch.device) -> None:
    model, batch = models.build("bert"), models.batch(LENGTHS)
    here = attribute(model, batch, methods=METHODS)
    other, given = moved(model, batch, device)
    with restricted():
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, device=device).double()
        there = attribute(other, given, methods=METHODS)
        probe = ProbeSet.from_batch(batch)
        measured = measure(Reader(other), probe, Settings(METHODS))
    assert_same_figures(there, here)
    assert there.correlation["N-Enc"].dtype == torch.float64
    torch.testing.assert_close(measured.correlation["N-Enc"], here.correlation["N-Enc"], rtol=1e-3, atol=1e-3)


def test_a_model_that_was_analysed_and_then_moved(device: torch.device) -> None:
    model, batch = models.build("bert"), models.batch(LENGTHS)
    here = attribute(model, batch, methods=METHODS)
    there = attribute(model.to(device), batch, methods=METHODS)
    back = attribute(model.to("cpu"), batch, methods=METHODS)
    assert_same_figures(there, here)
    assert_same_figures(back, here)
    doubled = attribute(model.double(), batch, methods=METHODS)
    torch.testing.assert_close(doubled.rows["N-Enc"].float(), here.rows["N-Enc"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["in place", "behind the counter", "not at all"])
def test_weights_that_moved_since_the_kernels_were_kept(how: str, device: torch.device) -> None:
    model, batch = models.build("bert"), models.batch(LENGTHS)
    other, given = moved(model, batch, device)
    attribute(other, given, methods=METHODS)
    for module in (model, other):
        with torch.no_grad():
            for parameter in module.parameters():
                if how == "in place":
                    parameter.mul_(1.25)
                elif how == "behind the counter":
                    parameter.data.mul_(1.25)
    assert_same_figures(attribute(other, given, methods=METHODS), attribute(model, batch, methods=METHODS))


def test_an_encoder_on_two_devices_is_refused_in_words(device: torch.device) -> None:
    model, batch = models.build("bert"), models.batch(LENGTHS)
    model.bert.encoder.layer[1:].to(device)
    with pytest.raises(UnsupportedEncoderError, match=r"on several devices \(cpu, pydev:0\)"):
        attribute(model, batch)
    model.to(device)
    attribute(model, batch)


def test_a_layer_that_is_not_what_it_was_found_to_be_is_refused_before_anything_is_handed_out(
    device: torch.device,
) -> None:
    model, batch = models.build("bert"), models.batch(LENGTHS)
    other, given = moved(model, batch, device)
    attribute(other, given)
    handle = other.bert.encoder.layer[1].attention.output.dense.register_forward_hook(lambda _, __, out: out * 1.1)
    with pytest.raises(UnsupportedEncoderError, match="layer 2"):
        attribute(other, given)
    handle.remove()
    attribute(other, given)


def test_tensors_of_every_type_come_home_in_one_copy(device: torch.device) -> None:
    drawn = torch.Generator().manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    shapes = ((), (3,), (0,), (2, 3), (1, 5, 2))
    here = [(torch.rand(shape, generator=drawn) * 9 - 3).to(kind) for kind in kinds for shape in shapes]
    here.append(torch.arange(12).view(3, 4).T)
    there = [one.to(device) for one in here]
    with counted() as counts:
        found = brought_home([*there[:7], here[7], *there[8:]])
    assert sum(counts.looks.values()) == 1
    for one, other in zip(found, here, strict=True):
        assert type(one) is Tensor
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_checks_are_judged_in_their_order(device: torch.device) -> None:
    seen: list[float] = []
    checks = Checks()
    for number in (3.0, 1.0, 2.0):
        checks.add(torch.tensor(number, device=device), lambda value: seen.append(float(value)))
    (other,) = checks.settle(torch.ones(2, device=device))
    assert seen == [3.0, 1.0, 2.0]
    assert torch.equal(other, torch.ones(2))
    assert checks.settle() == []
    assert seen == [3.0, 1.0, 2.0]


def test_what_a_device_can_do(device: torch.device) -> None:
    assert devices.has_float64(device)
    assert devices.chunk_of(device) > devices.chunk_of(torch.device("cpu"))
    with restricted():
        assert not devices.has_float64(device)
        assert devices.with_float64(torch.ones(2, device=device)).device.type == "cpu"
