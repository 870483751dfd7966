"""Encoders inside something, changed by something, or of odd sizes: right figures, or a refusal with the reason."""

import copy
import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import scipy.stats
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from globenc_lightning import METHODS, Attributions, attribute
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.errors import GlobEncError, ModelCallError, UnsupportedEncoderError
from globenc_lightning.settings import Settings
from tests import models
from tests.families import (
    FAMILIES,
    SMALL,
    TOKENS,
    VISION,
    Classifier,
    Family,
    build,
    example_inputs,
    redraw,
    without_doubles,
)
from tests.naive_families import assert_same_maps, naive_maps

DOUBLE = torch.float64
EVERYTHING = Settings(METHODS)


def family(name: str, **options: Any) -> Family:
    found = next(one for one in FAMILIES if one.name == name)
    if found.missing:
        pytest.skip(found.missing)
    return dataclasses.replace(found, options={**found.options, **options})


def in_doubles(own: Family) -> Any:
    """A classifier in float64; skips where this transformers cannot run one."""
    if reason := without_doubles(own.name, own.kinds[0]):
        pytest.skip(reason)
    return build(own, dtype=DOUBLE)


def classifier(name: str = "bert", dtype: torch.dtype = DOUBLE, **options: Any) -> Any:
    own = family(name, **options)
    return in_doubles(own) if dtype == DOUBLE else build(own, dtype=dtype)


def with_head(kind: str, dtype: torch.dtype = DOUBLE) -> Any:
    """A classifier of transformers' own; BERT is post-LN, Llama pre-LN."""
    if kind == "bert":
        config: Any = transformers.BertConfig(**{**SMALL, "num_labels": 3})
        model: Any = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.LlamaConfig(**{**SMALL, **TOKENS, "num_key_value_heads": 2, "num_labels": 3})
        model = transformers.LlamaForSequenceClassification(config)
    return redraw(model).to(dtype).eval()


def texts(name: str = "bert", seed: int = 0) -> dict[str, Tensor]:
    return example_inputs(family(name), DOUBLE, seed)


def everything(model: nn.Module, inputs: Mapping[str, Tensor] | None = None, **options: Any) -> Attributions:
    return attribute(model, texts() if inputs is None else inputs, methods=METHODS, **options)


def assert_same(left: Attributions, right: Attributions, tolerance: float = 1e-9) -> None:
    """The same maps, saliency and logits."""
    assert_same_maps(left.local, right.local, tolerance)
    for one, other in ((left.saliency, right.saliency), (left.logits, right.logits)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def assert_different(left: Attributions, right: Attributions) -> None:
    assert float((left.local["N-Enc"] - right.local["N-Enc"]).abs().max()) > 1e-3


# ---- adapters

KINDS = ("bert", "llama")
TARGETS = {
    "projection": {"bert": r".*attention\.output\.dense", "llama": r".*\.o_proj"},
    "values": {"bert": r".*\.value", "llama": r".*\.v_proj"},
    "everything": {"bert": "all-linear", "llama": "all-linear"},
}
HOW = [
    pytest.param(kind, target, dora, id=f"{kind}-{target}-{'dora' if dora else 'lora'}")
    for kind in KINDS
    for target in TARGETS
    for dora in (False, True)
]


def lora(kind: str, target: str, dora: bool = False) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=6, lora_dropout=0.2, use_dora=dora, target_modules=TARGETS[target][kind]
    )


def draw_adapters(model: nn.Module, seed: int = 0) -> None:
    """Adapters as after a training: neither half of them zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator).to(parameter))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                drawn += 1
    assert drawn > 0


def adapted(kind: str, target: str, dora: bool = False, dtype: torch.dtype = DOUBLE) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(with_head(kind, dtype), lora(kind, target, dora), autocast_adapter_dtype=False)
    draw_adapters(model.to(dtype))
    return model.eval()


def merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize(("kind", "target", "dora"), HOW)
def test_adapters_active_disabled_and_merged(kind: str, target: str, dora: bool) -> None:
    model = adapted(kind, target, dora)
    active, plain = everything(model), everything(merged(model))
    assert_same(active, plain)
    with model.disable_adapter():
        disabled = everything(model)
    assert_same(disabled, everything(with_head(kind)))
    assert_different(active, disabled)
    model.merge_adapter()
    assert_same(everything(model), plain)
    model.unmerge_adapter()
    assert_same(everything(model), plain)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_that_are_trained_afterwards(kind: str, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(with_head(kind), lora(kind, "everything", dora), autocast_adapter_dtype=False)
    model = model.to(DOUBLE).train()
    reader = Reader(model)
    fresh = analyze(reader, texts(), EVERYTHING)
    assert_same(fresh, everything(with_head(kind)))
    structures = reader.structures
    draw_adapters(model)
    trained = analyze(reader, texts(), EVERYTHING)
    assert reader.structures is structures  # read, not found again
    assert_same(trained, everything(merged(model).eval()))
    assert_different(fresh, trained)


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_added_after_the_structure_was_found(kind: str, target: str) -> None:
    peft = pytest.importorskip("peft")
    model = with_head(kind)
    reader = Reader(model)
    before = analyze(reader, texts(), EVERYTHING)
    peft.inject_adapter_in_model(lora(kind, target), model)
    draw_adapters(model.to(DOUBLE))
    after = analyze(reader, texts(), EVERYTHING)
    reference = adapted(kind, target)
    reference.load_state_dict({f"base_model.model.{key}": value for key, value in model.state_dict().items()}, False)
    assert_same(after, everything(merged(reference)))
    assert_different(before, after)


@pytest.mark.parametrize(
    "method", ["IA3Config", "LoHaConfig", "LoKrConfig", "OFTConfig", "VeraConfig", "AdaLoraConfig"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters(kind: str, method: str) -> None:
    peft = pytest.importorskip("peft")
    modules = [TARGETS["projection"][kind], TARGETS["values"][kind]]
    options: dict[str, Any] = {"target_modules": "|".join(modules)}
    if method == "IA3Config":
        options["feedforward_modules"] = []
    elif method == "OFTConfig":
        options |= {"oft_block_size": 4}
    elif method == "AdaLoraConfig":
        options |= {"total_step": 10}
    base = with_head(kind)
    model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, method)(task_type="SEQ_CLS", **options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "classifier" not in name and "score" not in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    model = model.to(DOUBLE).eval()
    found = everything(model)
    assert_same(found, everything(merged(model)))
    assert_different(found, everything(base))


@pytest.mark.parametrize("kind", KINDS)
def test_exchanged_adapters(kind: str) -> None:
    model = adapted(kind, "everything")
    model.add_adapter("second", lora(kind, "projection"))
    draw_adapters(model.to(DOUBLE), seed=1)
    reader = Reader(model)
    found = {}
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        found[name] = analyze(reader, texts(), EVERYTHING)
        reference = copy.deepcopy(model).eval().merge_and_unload(adapter_names=[name])
        assert_same(found[name], everything(reference))
    assert_different(found["default"], found["second"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_dynamically_quantised_encoders_are_refused(kind: str) -> None:
    model = with_head(kind, torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedEncoderError):
        everything(quantised)


def test_virtual_tokens_of_prompt_tuning() -> None:
    peft = pytest.importorskip("peft")
    base = with_head("bert")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = peft.get_peft_model(copy.deepcopy(base), config).to(DOUBLE).eval()
    inputs = texts()
    prompt = model.get_prompt(3).detach()
    found = everything(model, inputs)
    assert found.saliency.shape == (3, 16)

    def by_hand(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
        words = module.get_input_embeddings()(batch["input_ids"])
        mask = torch.cat([torch.ones(3, 4), batch["attention_mask"]], 1)
        return module(inputs_embeds=torch.cat([prompt[: len(words)].to(words), words], 1), attention_mask=mask).logits

    expected = by_hand(base, inputs)
    torch.testing.assert_close(found.logits, expected.detach())
    hooked = Classifier(base.bert).double()
    embeddings = torch.cat([prompt, base.get_input_embeddings()(inputs["input_ids"]).detach()], 1)
    mask = torch.cat([torch.ones(3, 4), inputs["attention_mask"]], 1)
    maps = naive_maps(family("bert"), hooked, {"inputs_embeds": embeddings, "attention_mask": mask})
    assert_same_maps(found.local, maps, 1e-9)


def test_prefix_tuning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(with_head("bert"), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    refusal: tuple[type[Exception], str] = (UnsupportedEncoderError, r"12 tokens attend to 16 .* prefix")
    try:
        model.to(DOUBLE)(**texts())
    except ValueError as error:
        # transformers 5.24 and later: peft runs this model no more.
        refusal = (ModelCallError, re.escape(str(error)))
    with pytest.raises(refusal[0], match=refusal[1]):
        everything(model)


# ---- compilation


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask) * 2


def _wrapped(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def _in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def _inside(model: Any, backend: str) -> nn.Module:
    model.encoder.compile(backend=backend)
    return model


def _outer(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(Outer(model), backend=backend)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("compiled", [_wrapped, _in_place, _inside, _outer])
def test_compiled_before_the_analysis(compiled: Callable[[nn.Module, str], nn.Module], name: str) -> None:
    torch._dynamo.reset()
    plain: nn.Module = classifier(name)
    model = compiled(classifier(name), "eager")
    if compiled is _outer:
        plain = Outer(plain)
    inputs = texts(name)
    with torch.no_grad():
        first = model(**inputs)
    torch._dynamo.utils.counters.clear()
    assert_same(everything(model, inputs), everything(plain, inputs))
    assert not torch._dynamo.utils.counters["stats"]  # nothing was compiled for it
    with torch.no_grad():
        assert torch.equal(model(**inputs), first)
    assert not torch._dynamo.utils.counters["stats"]  # and what was compiled is still used
    assert not torch._dynamo.utils.counters["recompiles"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_to_machine_code() -> None:
    torch._dynamo.reset()
    model = torch.compile(classifier("bert", num_hidden_layers=1), backend="inductor")
    with torch.no_grad():
        first = model(**texts())
        torch._dynamo.utils.counters.clear()
        found = everything(model)  # type: ignore[arg-type]
        assert torch.equal(model(**texts()), first)
    assert not torch._dynamo.utils.counters["stats"]
    assert_same(found, everything(classifier("bert", num_hidden_layers=1)))


# ---- how it is trained


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str) -> None:
    model = with_head(kind)
    expected = everything(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        assert_same(everything(model), expected)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert model.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_below_autocast(kind: str, context: Callable[[], AbstractContextManager]) -> None:
    model = with_head(kind, torch.float32)
    expected = everything(model)
    with torch.autocast("cpu", torch.bfloat16), context():
        found = everything(model)
        assert torch.is_autocast_enabled("cpu")
    assert found.logits.dtype == torch.float32
    assert_same(found, expected, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "deberta_v2", "llama", "vit", "dinov2", "t5 (encoder)"])
def test_half_precision_modules(name: str, dtype: torch.dtype) -> None:
    own = family(name)
    half = build(own, dtype=dtype)
    found = attribute(half, example_inputs(own, dtype), methods=METHODS)
    inputs = {
        key: value.float() if value.is_floating_point() else value for key, value in example_inputs(own, dtype).items()
    }
    expected = attribute(copy.deepcopy(half).float(), inputs, methods=METHODS)
    for method in METHODS:
        local, full = found.local[method], expected.local[method]
        assert local.dtype == torch.float32
        assert torch.isfinite(found.rollout[method]).all()
        assert float((local - full).abs().max()) < 0.1 * float(full.abs().max())
        # The longest example: five tokens have few ranks to exchange.
        row, other = found.rows[method][0, -1], expected.rows[method][0, -1]
        assert scipy.stats.spearmanr(row, other).statistic > 0.95, method


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_encoder(kind: str) -> None:
    model = with_head(kind)
    expected = everything(model)
    model.base_model.requires_grad_(False)
    assert_same(everything(model), expected, 0.0)
    model.requires_grad_(False)
    assert_same(everything(model), expected, 0.0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("wav2vec2", {"layerdrop": 0.9, "hidden_dropout": 0.5}),
        ("wav2vec2 (stable)", {"layerdrop": 0.9}),
        ("bart (encoder)", {"encoder_layerdrop": 0.9, "dropout": 0.5}),
    ],
)
def test_dropout_and_layerdrop_in_train_mode(name: str, options: dict[str, Any]) -> None:
    model, inputs = classifier(name, **options), example_inputs(family(name), DOUBLE)
    expected = everything(model, inputs)
    model.train()
    for _ in range(2):
        assert_same(everything(model, inputs), expected, 0.0)
    assert all(module.training for module in model.modules())


# ---- several calls, several encoders


class BiEncoder(nn.Module):
    def __init__(self, query: nn.Module, document: nn.Module) -> None:
        super().__init__()
        self.query, self.document = query, document
        self.head = nn.Linear(64, 3).double()

    def forward(
        self, query_input_ids: Tensor, query_attention_mask: Tensor, doc_input_ids: Tensor, doc_attention_mask: Tensor
    ) -> Tensor:
        query = self.query(input_ids=query_input_ids, attention_mask=query_attention_mask)[0]
        document = self.document(input_ids=doc_input_ids, attention_mask=doc_attention_mask)[0]
        return self.head(torch.cat([query[:, 0], document[:, 0]], -1))


def pairs() -> dict[str, Tensor]:
    query, document = texts(seed=1), texts(seed=2)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "query_input_ids": query["input_ids"][:, :7] * mask,
        "query_attention_mask": mask,
        "doc_input_ids": document["input_ids"],
        "doc_attention_mask": document["attention_mask"],
    }


def half(inputs: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(prefix)}


def maps_of(encoder: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maps of an encoder alone."""
    return everything(Classifier(encoder).double(), inputs).local


@pytest.mark.parametrize("name", ["bert", "roberta_prelayernorm", "albert"])
def test_one_encoder_that_is_called_twice(name: str) -> None:
    encoder = classifier(name).encoder
    model, inputs = BiEncoder(encoder, encoder), pairs()
    reader = Reader(model)
    for _ in range(2):
        found = analyze(reader, inputs, EVERYTHING)
        (other,) = found.others
        assert_same_maps(found.local, maps_of(encoder, half(inputs, "query_")), 1e-9)
        assert_same_maps(other.local, maps_of(encoder, half(inputs, "doc_")), 1e-9)
        assert found.saliency.shape == (3, 7)
        assert other.saliency.shape == (3, 12)


def test_two_encoders_in_one_forward_pass() -> None:
    post, pre = classifier("bert").encoder, classifier("roberta_prelayernorm").encoder
    inputs = pairs()
    found = everything(BiEncoder(post, pre), inputs)
    (other,) = found.others
    assert (found.rule, other.rule) == ("post-LN", "pre-LN")
    assert (found.encoder, other.encoder) == ("query", "document")
    assert_same_maps(found.local, maps_of(post, half(inputs, "query_")), 1e-9)
    assert_same_maps(other.local, maps_of(pre, half(inputs, "doc_")), 1e-9)


def test_two_towers_of_clip() -> None:
    config = transformers.CLIPConfig(text_config={**SMALL, **TOKENS}, vision_config=dict(VISION), projection_dim=16)
    model: Any = redraw(transformers.CLIPModel(config)).double().eval()
    text, image = texts(), example_inputs(family("clip (vision)"), DOUBLE)
    options: dict[str, Any] = {
        "forward": lambda module, batch: module(**batch).logits_per_text[:, :1],
        "target": lambda logits, batch: logits[:, 0],
    }
    if not isinstance(model.text_model, transformers.PreTrainedModel):
        with pytest.raises(UnsupportedEncoderError, match=r"CLIPModel.*one sequence"):
            everything(model.float(), {**text, "pixel_values": image["pixel_values"].float()}, **options)
        pytest.skip(f"transformers {transformers.__version__} has towers that are no models of their own: refused")
    found = everything(model, {**text, **image}, **options)
    (other,) = found.others
    by_tower = {found.encoder: found.local, other.encoder: other.local}
    assert set(by_tower) == {"text_model", "vision_model"}
    assert_same_maps(by_tower["text_model"], maps_of(model.text_model, text), 1e-9)
    assert_same_maps(by_tower["vision_model"], maps_of(model.vision_model, image), 1e-9)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_encoder_of_an_encoder_decoder_model(name: str) -> None:
    if name == "bart":
        options = family("bart (encoder)").options
        model: Any = transformers.BartForSequenceClassification(transformers.BartConfig(**{**options, "num_labels": 3}))
    else:
        in_doubles(family("t5 (encoder)"))
        options = {**family("t5 (encoder)").options, "decoder_start_token_id": 0}
        model = transformers.T5ForSequenceClassification(transformers.T5Config(**{**options, "num_labels": 3}))
    model = redraw(model).double().eval()
    inputs = texts()
    lengths = inputs["attention_mask"].sum(1)
    inputs["input_ids"][torch.arange(3), lengths - 1] = 2  # their heads read the end-of-sentence token
    found = everything(model, inputs)
    assert found.others == ()
    assert "decoder" not in found.encoder
    encoder = model.base_model.get_encoder()
    assert_same_maps(found.local, maps_of(encoder, inputs), 1e-9)
    again = everything(
        model,
        inputs,
        forward=lambda module, batch: module.base_model.get_encoder()(**batch).last_hidden_state[:, 0, :3],
    )
    assert_same_maps(found.local, again.local, 1e-9)


# ---- kernels that show nothing


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_kernels_are_exchanged_and_put_back(kind: str, name: str) -> None:
    expected = everything(with_head(kind))
    if name == "flex_attention":
        model = with_head(kind)
        models.set_attention(model, name)
        if model.config._attn_implementation != name:
            pytest.skip(f"transformers {transformers.__version__} has no {name} for {type(model).__name__}")
    else:
        model = with_head(kind)
        model.config._attn_implementation_internal = name  # the kernel itself cannot be installed here
    assert model.config._attn_implementation == name
    before = copy.deepcopy(model.config.to_dict())
    seen: list[str] = []
    assert_same(everything(model), expected)

    def broken(logits: Tensor, batch: Any) -> Tensor:
        seen.append(model.config._attn_implementation)
        raise ZeroDivisionError

    with pytest.raises(GlobEncError, match="raised ZeroDivisionError"):
        everything(model, target=broken)
    assert seen == ["sdpa"]
    assert model.config._attn_implementation == name
    assert model.config.to_dict() == before
    with pytest.raises(GlobEncError):
        everything(model, forward=lambda module, batch: 1 / 0)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {name}


# ---- changed modules


def test_modules_and_weights_that_are_shared() -> None:
    model = classifier()
    layers = model.encoder.encoder.layer
    layers[1].attention.output = layers[0].attention.output  # a module in two layers, norm included
    layers[2].output.dense.weight = layers[0].output.dense.weight
    layers[2].attention.output.dense.weight = layers[0].attention.output.dense.weight
    assert_same_maps(everything(copy.deepcopy(model)).local, naive_with(model), 1e-9)
    layers[2] = layers[0]  # a whole layer twice, with another in between
    assert_same_maps(everything(model).local, everything(unshared(model)).local, 1e-9)


def naive_with(model: Classifier) -> dict[str, Tensor]:
    """The maps of a BERT whose layers share modules, from a copy that shares none."""
    return naive_maps(family("bert"), unshared(model), texts())


def unshared(model: Classifier) -> Classifier:
    separate = classifier()
    separate.load_state_dict(model.state_dict())
    return separate


ENDS = {"bert": "encoder.layer.1.attention.output.dense", "llama": "layers.1.self_attn.o_proj"}


@pytest.mark.parametrize("name", list(ENDS))
def test_parametrised_projections(name: str) -> None:
    model, inputs = classifier(name), texts(name)
    projection: Any = model.encoder.get_submodule(ENDS[name])
    parametrizations.weight_norm(projection)
    projection.parametrizations.weight.original0.data.mul_(1.7)
    plain = classifier(name)
    plain.encoder.get_submodule(ENDS[name]).weight.data.copy_(projection.weight)
    assert_same(everything(model, inputs), everything(plain, inputs))


@pytest.mark.parametrize("name", list(ENDS))
@pytest.mark.parametrize("wrapped", ["plain", "parametrised", "adapted"])
def test_hooks_of_the_user_see_real_tensors_alone(name: str, wrapped: str) -> None:
    model: Any = classifier(name) if wrapped != "adapted" else adapted(name, "projection")
    inputs = texts(name)
    shapes: list[tuple[int, ...]] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        shapes.append(tuple(args[0].shape))

    reader = Reader(model)
    modules = [module for path, module in model.named_modules() if path.endswith(ENDS[name])]
    if wrapped == "parametrised":
        parametrizations.weight_norm(modules[0])
    looked_at = [inner for module in modules for inner in module.modules() if not list(inner.children())]
    for module in {*modules, *looked_at}:
        module.register_forward_hook(look)
    for _ in range(2):
        analyze(reader, inputs, EVERYTHING)
    assert shapes
    assert {shape[:2] for shape in shapes if len(shape) == 3} <= {(2, 12), (3, 12)}


@pytest.mark.parametrize("name", list(ENDS))
def test_a_hook_that_changes_the_projection_is_no_wrong_map(name: str) -> None:
    model, inputs = classifier(name), texts(name)
    reader = Reader(model)
    analyze(reader, inputs, EVERYTHING)
    model.encoder.get_submodule(ENDS[name]).register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(UnsupportedEncoderError):
        analyze(reader, inputs, EVERYTHING)


# ---- sizes


@pytest.mark.parametrize("name", ["bert", "roberta_prelayernorm", "squeezebert", "deberta_v2", "t5 (encoder)"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"num_attention_heads": 1}, id="one head"),
        pytest.param({"num_attention_heads": 32}, id="head width 1"),
        pytest.param({"num_hidden_layers": 1}, id="one layer"),
        pytest.param({"num_hidden_layers": 24}, id="24 layers"),
        pytest.param({"hidden_size": 12, "intermediate_size": 12}, id="all sizes the sequence length"),
    ],
)
def test_odd_sizes(name: str, sizes: dict[str, int]) -> None:
    ambiguous = name == "squeezebert" and "hidden_size" in sizes
    if name == "squeezebert":
        sizes = {**sizes, "embedding_size": sizes.get("hidden_size", 32)}
        groups = ("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups")
        sizes = {**sizes, **dict.fromkeys(groups, 2)}
    if name == "t5 (encoder)":
        other = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "hidden_size": "d_model"}
        sizes = {other.get(key, "d_ff"): value for key, value in sizes.items()}
    layers = sizes.get("num_hidden_layers", sizes.get("num_layers", 3))
    own = dataclasses.replace(family(name, **sizes), layers=layers)
    model = in_doubles(own)
    if "hidden_size" in sizes or "d_model" in sizes:
        model.head = nn.Linear(12, 3).double()
    inputs = example_inputs(own, DOUBLE)
    reader = Reader(model)
    if ambiguous:
        # (b, d, q) cannot be told from (b, q, d), unless the structure was found with sentences of another length.
        with pytest.raises(UnsupportedEncoderError):
            everything(model, inputs)
        analyze(reader, {key: value[1:, :8] for key, value in inputs.items()}, EVERYTHING)
    found = analyze(reader, inputs, EVERYTHING)
    assert found.rollout["N-Enc"].shape == (3, layers, 12, 12)
    assert all(torch.isfinite(found.rollout[method]).all() for method in METHODS)
    assert_same_maps(found.local, naive_maps(own, model, inputs), 1e-9)


@pytest.mark.parametrize(
    "name", [one.name for one in FAMILIES if one.supported and one.inputs == "text" and one.doubled]
)
def test_single_tokens_and_single_examples(name: str) -> None:
    own, model = family(name), in_doubles(family(name))
    inputs = example_inputs(own, DOUBLE)
    tolerance = 1e-9 if own.exact else 1e-6
    reader = Reader(model)
    for rows, columns in ((slice(0, 3), 1), (slice(0, 1), 1), (slice(0, 1), 12), (slice(0, 3), 12), (slice(2, 3), 5)):
        some = {key: value[rows, :columns] for key, value in inputs.items()}
        if columns == 1 and own.name == "gemma3 (both directions)":
            # Of one token, transformers puts the query heads that share a key in place of tokens.
            with pytest.raises(UnsupportedEncoderError, match="2 tokens attend to 1"):
                analyze(reader, some, EVERYTHING)
            continue
        found = analyze(reader, some, EVERYTHING)
        assert found.local["N-Enc"].shape[2:] == (columns, columns)
        assert_same_maps(found.local, naive_maps(own, model, some), tolerance)
        if columns == 1:
            assert found.correlation["N-Enc"].isnan().all()
