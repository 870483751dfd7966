import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    GraniteConfig,
    GraniteModel,
    XmodConfig,
    XmodModel,
)

from globenc_lightning import attribute
from globenc_lightning.encoder.norms import tolerance
from globenc_lightning.encoder.precision import FullPrecision, exact_products, matmul_coarseness
from globenc_lightning.errors import UnsupportedEncoderError
from tests import families, models

HALF = (torch.bfloat16, torch.float16)


class Headed(nn.Module):
    """An encoder below a linear head that reads one token."""

    def __init__(self, encoder: nn.Module, place: int = 0) -> None:
        super().__init__()
        self.encoder, self.place = encoder, place
        self.head = nn.Linear(encoder.config.hidden_size, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(3)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(states[:, self.place])


def bert(layers: int = 2, outlier: float = 0.0, inner: int = 48, attn: str = "sdpa") -> Any:
    encoder = BertModel._from_config(
        BertConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=160,
        ),
        attn_implementation=attn,
    )
    models.redraw(encoder)
    if outlier:
        with torch.no_grad():
            for norm in (module for module in encoder.modules() if isinstance(module, nn.LayerNorm)):
                norm.bias[3] = outlier
            for layer in encoder.encoder.layer:
                # Trained encoders with such a channel hardly read it.
                for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                    linear.weight[:, 3] = 0.0
                layer.intermediate.dense.weight[:, 3] = 0.0
    return encoder


# ---- what is proven in full precision


def granite(outlier: float) -> GraniteModel:
    encoder = GraniteModel(
        GraniteConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            residual_multiplier=0.22,
            pad_token_id=0,
        )
    )
    models.redraw(encoder)
    with torch.no_grad():
        encoder.embed_tokens.weight[:, 3] = outlier
        for layer in encoder.layers:
            layer.input_layernorm.weight[3] = layer.post_attention_layernorm.weight[3] = 0.02
    return encoder


def parallel(outlier: float) -> GPTNeoXModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = GPTNeoXModel(GPTNeoXConfig(vocab_size=99, max_position_embeddings=64, **sizes))
    models.redraw(encoder)
    with torch.no_grad():
        encoder.embed_in.weight[:, 3] = outlier
        for layer in encoder.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[3] = 0.02
    return encoder


def with_attention_twice(encoder: GPTNeoXModel) -> GPTNeoXModel:
    for layer in encoder.layers:
        layer.attention.register_forward_hook(lambda module, given, output: (2 * output[0], *output[1:]))
    return encoder


def with_network_after(encoder: GPTNeoXModel) -> GPTNeoXModel:
    """The feed-forward network reads a share of the attention's output."""
    for layer in encoder.layers:
        given: list[Tensor] = []
        layer.attention.register_forward_hook(lambda module, args, output, given=given: given.append(output[0]))
        network = layer.mlp.forward
        layer.mlp.forward = lambda x, network=network, given=given: network(x + 0.05 * given.pop())
    return encoder


def with_gates(encoder: GraniteModel) -> GraniteModel:
    """What the attention's output is multiplied by depends on the token."""
    for layer in encoder.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, output: (output[0] * (1 + 0.2 * output[0][..., :1].tanh()), *output[1:])
        )
    return encoder


def xmod(outlier: float) -> XmodModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = XmodConfig(vocab_size=99, max_position_embeddings=64, languages=("a",), default_language="a", **sizes)
    encoder = XmodModel(config)
    models.redraw(encoder)
    with torch.no_grad():
        for norm in (module for module in encoder.modules() if isinstance(module, nn.LayerNorm)):
            norm.bias[3] = outlier
    return encoder


def with_mean_of_all(encoder: BertModel) -> BertModel:
    """Lets tokens mix a second time: a share of their mean is added beside the attention's output."""
    for layer in encoder.encoder.layer:
        out = layer.attention.output
        out.forward = lambda context, x, out=out: out.LayerNorm(x + out.dense(context) + 0.02 * x.mean(1, keepdim=True))
    return encoder


@pytest.mark.parametrize("outlier", [0.0, 30.0, 300.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", ["gates", "attention twice", "network after", "xmod", "mean of all"])
def test_a_wrong_structure_hides_behind_no_rounding(kind: str, dtype: torch.dtype, outlier: float) -> None:
    made = {
        "gates": lambda: with_gates(granite(outlier)),
        "attention twice": lambda: with_attention_twice(parallel(outlier)),
        "network after": lambda: with_network_after(parallel(outlier)),
        "xmod": lambda: xmod(outlier),
        "mean of all": lambda: with_mean_of_all(bert(outlier=outlier)),
    }[kind]
    model = Headed(made()).to(dtype).eval()
    with pytest.raises(UnsupportedEncoderError):
        attribute(model, models.batch((11, 11)))


@pytest.mark.parametrize("outlier", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["bert", "granite", "parallel"])
def test_a_right_structure_is_read_beside_a_large_channel(kind: str, dtype: torch.dtype, outlier: float) -> None:
    made = {
        "bert": lambda: bert(outlier=outlier),
        "granite": lambda: granite(outlier),
        "parallel": lambda: parallel(outlier),
    }
    model = Headed(made[kind]()).to(dtype).eval()
    found = attribute(model, models.batch((11, 8)))
    expected = attribute(copy.deepcopy(model).float(), models.batch((11, 8)))
    assert found.rule == expected.rule == {"bert": "post-LN", "granite": "pre-LN", "parallel": "parallel"}[kind]
    torch.testing.assert_close(found.local["N-Enc"][:, 0], expected.local["N-Enc"][:, 0], rtol=0.1, atol=0.05)


NEWER_SWITCHES = hasattr(torch.backends, "fp32_precision")
needs_newer_switches = pytest.mark.skipif(not NEWER_SWITCHES, reason=f"torch {torch.__version__} has the older switch")


@pytest.fixture(
    params=["medium", "high", *(pytest.param(one, marks=needs_newer_switches) for one in ("tf32", "bf16 on CPUs"))]
)
def coarse_products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Float32 products that need not be float32, by torch's older and newer switches."""
    matmuls = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if NEWER_SWITCHES else []
    before = [one.fp32_precision for one in matmuls]
    if request.param in ("medium", "high"):
        torch.set_float32_matmul_precision(request.param)
    elif request.param == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for one, was in zip(matmuls, before, strict=True):
        one.fp32_precision = was


def test_a_wrong_structure_hides_behind_no_faster_product(coarse_products: str) -> None:
    with pytest.raises(UnsupportedEncoderError):
        attribute(Headed(with_mean_of_all(bert())).eval(), models.batch((11,)))
    assert attribute(Headed(bert()).eval(), models.batch((11,))).rule == "post-LN"


def switches() -> tuple[str, ...]:
    backends = torch.backends
    if not NEWER_SWITCHES:
        return (torch.get_float32_matmul_precision(),)
    return backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


def test_switches_are_put_back(coarse_products: str) -> None:
    before = switches()
    assert matmul_coarseness() > 1e-3
    assert tolerance(torch.float32) > 1e-3
    with exact_products():
        assert matmul_coarseness() == 0
        assert tolerance(torch.float32) == 1e-4
    assert switches() == before
    with pytest.raises(ZeroDivisionError), exact_products():
        raise ZeroDivisionError
    assert switches() == before


@needs_newer_switches
def test_a_switch_goes_on_following_the_general_one() -> None:
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with exact_products():
            assert matmul_coarseness() == 0
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


# ---- how: every operation in float32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "name", ["bert", "bert (eager)", "albert", "deberta_v2", "llama", "vit", "dinov2", "t5 (encoder)"]
)
def test_half_precision_gives_what_a_copy_in_float32_gives(name: str, dtype: torch.dtype) -> None:
    own = next(one for one in families.FAMILIES if one.name == name.removesuffix(" (eager)"))
    model = families.build(own, "eager" if "eager" in name else None, dtype=dtype)
    inputs = families.example_inputs(own, dtype)
    full = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    with FullPrecision():
        found = model(**inputs)
    torch.testing.assert_close(found, copy.deepcopy(model).float()(**full), rtol=1e-5, atol=1e-5)


class Casts(nn.Module):
    """Every way of going to half precision that a forward may take."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.linear(x)
        x = x.half().float() + x.to(torch.bfloat16).to(x.dtype) + x.type_as(torch.ones(1, dtype=torch.float16))
        x = x + torch.zeros(4, dtype=torch.bfloat16) + torch.softmax(x, -1, dtype=torch.bfloat16) + self.table
        kept = torch.empty(x.shape, dtype=torch.bfloat16)
        kept[:] = x
        kept += 1
        return torch.stack([kept, F.gelu(x.bfloat16())]).sum(0)


def test_no_cast_to_half_precision_is_left() -> None:
    model = Casts()
    x = torch.randn(3, 4)
    with FullPrecision():
        found = model(x)
    assert found.dtype == torch.float32
    y = F.linear(x, model.linear.weight, model.linear.bias)
    y = 3 * y
    y = y + y.softmax(-1) + model.table.float()
    torch.testing.assert_close(found, y + 1 + F.gelu(y), rtol=1e-6, atol=1e-6)


WRITES = {
    "setitem by number": lambda table, rows: table.__setitem__(torch.tensor([0, 1]), rows),
    "setitem by mask": lambda table, rows: table.__setitem__(torch.tensor([True, True, False]), rows),
    "index_copy_": lambda table, rows: table.index_copy_(0, torch.tensor([0, 1]), rows),
    "index_add_": lambda table, rows: table.index_add_(dim=0, index=torch.tensor([0, 2]), source=rows),
    "scatter_": lambda table, rows: table.scatter_(0, torch.zeros(1, 32).long(), rows[:1]),
    "masked_scatter_": lambda table, rows: table.masked_scatter_(
        torch.ones(3, 32, dtype=torch.bool), rows.repeat(2, 1)
    ),
    "lerp_": lambda table, rows: table.lerp_(rows[0], 0.1),
    "mul_ and add_": lambda table, rows: table.mul_(0.9).add_(rows[1], alpha=0.1),
    "out": lambda table, rows: torch.add(rows[:1], rows[1:], out=table[:1]),
    "initialisation": lambda table, rows: nn.init.kaiming_uniform_(tensor=table),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", WRITES)
def test_what_is_written_into_tables_in_half_precision_is_rounded_to_it(kind: str, dtype: torch.dtype) -> None:
    class Keeps(Headed):
        def __init__(self) -> None:
            super().__init__(bert())
            self.register_buffer("table", torch.zeros(3, 32))

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            with torch.no_grad():
                WRITES[kind](self.table, states[:2, 0])
            return self.head(states[:, 0] + self.table.mean(0))

    model = Keeps().to(dtype).eval()
    found = attribute(model, models.batch((9, 5)))
    assert not model.table.any()
    plain = attribute(Headed(model.encoder).to(dtype).eval(), models.batch((9, 5)))
    assert not torch.equal(found.logits, plain.logits)
    torch.testing.assert_close(found.rows, plain.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_stay_bit_for_bit(dtype: torch.dtype) -> None:
    model = models.build("bert", dtype=dtype)
    expected = model(**models.batch((9, 5))).logits
    with FullPrecision():
        found = model(**models.batch((9, 5))).logits
    assert torch.equal(found, expected)


def test_gradients_go_through_weights_that_are_kept_in_their_own_precision() -> None:
    encoder = bert().to(torch.bfloat16).eval()
    ids = models.batch((9,))["input_ids"]
    gradients = []
    for model in (encoder, copy.deepcopy(encoder).float()):
        embedded = model.embeddings.word_embeddings(ids).float().detach().requires_grad_()
        with FullPrecision():
            states = model(inputs_embeds=embedded).last_hidden_state
            gradients.append(torch.autograd.grad(states[:, 0, 0].sum(), embedded)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_no_copy_of_the_weights_is_held() -> None:
    # A size that no other test has: what their models hold does not count.
    encoder = bert(inner=57).to(torch.bfloat16).eval()
    shape = encoder.encoder.layer[0].intermediate.dense.weight.shape
    with FullPrecision():
        states = encoder(**models.batch((9,))).last_hidden_state
        gc.collect()
        held = [one for one in gc.get_objects() if type(one) is Tensor and one.shape in (shape, shape[::-1])]
        assert states.requires_grad
        assert not [one for one in held if one.dtype == torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_nothing_of_the_structure_pass_outlives_it(dtype: torch.dtype) -> None:
    # A size that no other test has, as above.
    model = Headed(bert(inner=59)).to(dtype).eval()
    attribute(model, models.batch((9, 5)))
    gc.collect()
    widths = [one.shape[-1] for one in gc.get_objects() if type(one) is Tensor and one.dim() == 3]
    assert 59 not in widths


def test_modes_end_with_an_error() -> None:
    with FullPrecision():
        assert (torch.ones(2).bfloat16() * 2).dtype == torch.float32
    with pytest.raises(ZeroDivisionError), FullPrecision():
        raise ZeroDivisionError
    assert (torch.ones(2).bfloat16() * 2).dtype == torch.bfloat16
