import pytest
import torch
from torch import Tensor, nn

from globenc_lightning.encoder.norms import Norm, difference, find_norm, tolerance, working
from globenc_lightning.functional.attribution import linearized


class RootMeanSquare(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


class BiasFirst(nn.Module):
    """A LayerNorm that registers its bias before its weight, under names of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(width))
        self.gamma = nn.Parameter(torch.ones(width))
        self.eps = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.gamma, self.beta, self.eps)


class InFloat32(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.variance_epsilon = 1e-7

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x.float(), x.shape[-1:], eps=self.variance_epsilon).to(x.dtype)
        return self.weight * normed + self.bias


class Affine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def hidden(width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(7, width, generator=generator, dtype=torch.float64) * 3 + 1).to(dtype)


def redrawn(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.3
    return module.to(dtype)


def found(module: nn.Module, entering: Tensor) -> Norm | None:
    with torch.no_grad():
        return find_norm(module, "some.norm", entering, module(entering))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_norm(dtype: torch.dtype) -> None:
    norm = found(redrawn(nn.LayerNorm(16, eps=1e-5), dtype), hidden(dtype=dtype))
    assert norm is not None
    assert (norm.name, norm.weight, norm.bias, norm.centered) == ("some.norm", "weight", "bias", True)


def test_epsilon_is_the_modules_own() -> None:
    module = redrawn(nn.LayerNorm(16, eps=0.25))
    vars(module)["other"] = 1e-12
    norm = found(module, hidden())
    assert norm is not None
    assert norm.epsilon == 0.25


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_without_some_parameters(affine: bool, bias: bool) -> None:
    norm = found(redrawn(nn.LayerNorm(16, elementwise_affine=affine, bias=bias)), hidden())
    assert norm is not None
    assert norm.weight == ("weight" if affine else None)
    assert norm.bias == ("bias" if affine and bias else None)


def test_root_mean_square_norm() -> None:
    norm = found(redrawn(RootMeanSquare(16, 0.125)), hidden())
    assert norm is not None
    assert (norm.weight, norm.bias, norm.centered, norm.epsilon) == ("scale", None, False, 0.125)


def test_torch_rms_norm() -> None:
    norm = found(redrawn(nn.RMSNorm(16, eps=1e-6)), hidden())
    assert norm is not None
    assert not norm.centered


class OnePlusWeight(nn.Module):
    """A norm whose weight says what its factor differs from 1 by, as Gemma's and Nemotron's do."""

    def __init__(self, centered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))
        self.eps, self.centered = 1e-6, centered

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centered else x
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (1 + self.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centered", [False, True])
def test_a_weight_that_is_added_to_one(centered: bool, dtype: torch.dtype) -> None:
    module = redrawn(OnePlusWeight(centered), dtype)
    norm = found(module, hidden(dtype=dtype))
    assert norm is not None
    assert (norm.weight, norm.offset, norm.centered) == ("weight", 1.0, centered)
    torch.testing.assert_close(norm.factor(), 1 + module.weight.detach().to(torch.promote_types(dtype, torch.float32)))
    plain = found(redrawn(nn.LayerNorm(16), dtype), hidden(dtype=dtype))
    assert plain is not None
    assert plain.offset == 0.0


def test_parameters_under_other_names_and_in_another_order() -> None:
    norm = found(redrawn(BiasFirst(16)), hidden())
    assert norm is not None
    assert (norm.weight, norm.bias, norm.epsilon) == ("gamma", "beta", 0.25)


def test_a_norm_that_computes_in_float32() -> None:
    norm = found(redrawn(InFloat32(16)), hidden())
    assert norm is not None
    assert norm.precision == torch.float32
    assert tolerance(torch.float64, norm.precision) == tolerance(torch.float32)


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.GELU(),
        nn.Dropout(0.1).eval(),
        nn.Linear(16, 16),
        Affine(16),
        nn.Softmax(-1),
        nn.GroupNorm(4, 16),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_norm(module: nn.Module) -> None:
    assert found(redrawn(module), hidden()) is None


def test_a_norm_over_more_than_the_last_axis_is_none() -> None:
    entering = hidden()
    assert found(redrawn(nn.LayerNorm((7, 16))), entering) is None


def test_one_value_that_is_off_is_no_norm() -> None:
    module, entering = redrawn(nn.LayerNorm(16)), hidden()
    leaving = module(entering).detach().clone()
    leaving[3, 5] += 1e-3
    assert find_norm(module, "some.norm", entering, leaving) is None


@pytest.mark.parametrize("module", [nn.LayerNorm(16, eps=0.5), nn.RMSNorm(16, eps=0.5), BiasFirst(16)])
def test_frozen_norm_is_the_norm_without_its_bias(module: nn.Module) -> None:
    redrawn(module)
    entering = hidden()
    norm = found(module, entering)
    assert norm is not None
    linear = linearized(entering, (norm.frozen(entering),))
    bias = norm.parameter(norm.bias)
    with torch.no_grad():
        expected = module(entering)
    torch.testing.assert_close(linear if bias is None else linear + bias, expected, rtol=1e-12, atol=1e-12)


def test_parameters_are_read_as_they_stand_now() -> None:
    module = redrawn(nn.LayerNorm(16))
    norm = found(module, hidden())
    assert norm is not None
    with torch.no_grad():
        module.get_parameter("weight").mul_(2)
    weight = norm.parameter(norm.weight)
    assert weight is not None
    assert torch.equal(weight, module.get_parameter("weight").detach())
    assert not weight.requires_grad


def test_difference() -> None:
    right = torch.tensor([[2.0, -4.0]])
    assert difference(right + 1, right) == 0.5, "each channel by its own size"
    assert difference(right + 1, right, 2 * right) == 0.25
    assert difference(right, right) == 0
    assert difference(torch.full((1, 2), float("nan")), right) == float("inf")
    assert difference(right, torch.tensor([[2.0, float("inf")]])) == float("inf")
    assert difference(right[:, :1], right) == float("inf")
    assert difference(torch.zeros(0, 2), torch.zeros(0, 2)) == float("inf")
    assert difference(torch.zeros(1, 2), torch.zeros(1, 2)) == 0


def test_difference_beside_a_large_channel() -> None:
    right = torch.tensor([[1.0, 1000.0], [-1.0, 900.0]])
    wrong = right.clone()
    wrong[:, 0] *= 2
    assert difference(wrong, right) > 100 * tolerance(torch.float32)
    # What rounding in float32 makes of the large channel says nothing of the small one.
    assert difference(right + 1000 * torch.finfo(torch.float32).eps, right) < tolerance(torch.float32)


def test_working_precision() -> None:
    assert working(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert working(torch.ones(1, dtype=torch.float32)).dtype == torch.float32
    assert working(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert not working(torch.ones(1, requires_grad=True)).requires_grad


def test_tolerance_is_that_of_the_coarsest_precision() -> None:
    assert tolerance(torch.float64) < tolerance(torch.float32) < tolerance(torch.bfloat16)
    assert tolerance(torch.float64, torch.float32) == tolerance(torch.float32) == 1e-4
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert tolerance(torch.float32) > 1e-4
        assert tolerance(torch.float64) == 1e-9
    finally:
        torch.set_float32_matmul_precision(before)
