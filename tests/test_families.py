"""Every family that the documentation speaks of: read right, proven, or refused with the reason."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from globenc_lightning import METHODS, Attributions, attribute, rolling
from globenc_lightning.errors import GlobEncError, ModelCallError, UnsupportedEncoderError
from tests.families import (
    AUDIO,
    FAMILIES,
    LENGTH,
    PARALLEL,
    POST,
    PRE,
    RULES,
    SHARED,
    SMALL,
    SUBLAYER,
    TOKENS,
    VISION,
    VOCABULARY,
    Family,
    build,
    example_inputs,
    without_doubles,
)
from tests.family_table import PAGE, page, run, told, written_with
from tests.naive_families import assert_same_maps, naive_maps

SUPPORTED = [family for family in FAMILIES if family.supported]
REFUSED = [family for family in FAMILIES if not family.supported]
WRITTEN_WITH = written_with(PAGE.read_text(encoding="utf-8"))


def present(family: Family) -> pytest.MarkDecorator:
    """Skips what this transformers has no classes for, and says so."""
    return pytest.mark.skipif(bool(family.missing), reason=family.missing or "never")


DECODERS = {
    f"{name}Config"
    for name in (
        *("OPT", "Gemma", "Gemma2", "Gemma3Text", "Nemotron", "Granite", "MiniCPM3", "Olmo2", "Glm4", "Exaone4"),
        *("GPTNeoX", "GPTJ", "CodeGen", "Phi", "Cohere", "Falcon", "XGLM"),
    )
}
VARIANTS = [
    pytest.param(family, *variant, id=f"{family.name}-{variant[0]}-{str(variant[1])[6:]}", marks=present(family))
    for family in SUPPORTED
    for variant in family.variants
]


def names(families: list[Family]) -> list[Any]:
    return [pytest.param(family, id=family.name, marks=present(family)) for family in families]


def test_every_documented_family_is_here() -> None:
    documented = """
        bert roberta xlm_roberta camembert ernie data2vec_text layoutlm electra distilbert albert nomic_bert
        jina_embeddings_v3 bart wav2vec2 hubert mpnet deberta deberta_v2 deberta_v3 rembert squeezebert roformer
        flaubert xlm big_bird xlm_roberta_xl roberta_prelayernorm esm modernbert eurobert vit deit clip siglip t5 beit
        dinov2 megatron_bert gpt2 llama gemma nemotron granite minicpm3 opt gemma2 gemma3 olmo2 glm4 exaone4 gpt_neox
        gptj codegen phi cohere falcon xglm xmod bitnet convbert mobilebert ibert xlnet funnel longformer fnet
    """
    assert {family.name.partition(" ")[0] for family in FAMILIES} == set(documented.split())
    several = {"wav2vec2 (stable)", "clip (text)", "clip (vision)", "siglip (text)", "siglip (vision)"}
    assert several | {"deberta_v2 (convolution)"} <= {family.name for family in FAMILIES}
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version(WRITTEN_WITH),
    reason=f"transformers {transformers.__version__} is older than that of the page, {WRITTEN_WITH}",
)
def test_nothing_is_missing_or_left_out() -> None:
    assert [family.missing for family in (*FAMILIES, *UNNAMED) if family.missing] == []
    assert {family.kinds for family in (*FAMILIES, *UNNAMED) if family.interface} == {("sdpa", "eager")}
    assert len(VARIANTS) == 202
    assert not any(without_doubles(family.name, kind) for family in SUPPORTED for kind in family.doubled)


# ---- supported


@pytest.mark.parametrize(("family", "attention", "dtype"), VARIANTS)
def test_family_is_read_and_agrees_with_every_vector_built(family: Family, attention: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and (reason := without_doubles(family.name, attention)):
        pytest.skip(reason)
    one = run(family.name, attention, dtype)
    assert one.found is not None, one.reason
    assert one.reader is not None
    assert one.found.rule == family.rule
    assert one.found.others == ()
    structure = one.reader.structure
    assert structure is not None
    assert len(structure.layers) == len(one.found.reconstruction_error) == family.layers
    exact = dtype == torch.float64 and family.exact
    assert {layer.tolerance(dtype) for layer in structure.layers[-1:]} == {1e-9 if exact else 1e-4}
    assert one.error < (1e-12 if exact else 1e-5)

    maps = naive_maps(family, one.model, example_inputs(family, dtype))
    # A sub-layer's norm that computes in float32 rounds what enters the next module.
    rounded = family.rule == SUBLAYER and not family.exact
    assert_same_maps(one.found.local, maps, 1e-4 if dtype == torch.float32 else 1e-6 if rounded else 1e-9)


def test_causal_models_are_read_at_their_last_token() -> None:
    readouts: dict[str, str] = {}
    for family in SUPPORTED:
        if family.missing:
            continue  # skipped by name above
        found = run(family.name, family.kinds[0], torch.float32).found
        assert found is not None
        readouts[family.name] = found.readout
    assert set(readouts.values()) == {"cls", "last"}
    bidirectional = {"gemma3 (both directions)"}
    causal = {"gpt2", "llama", "clip (text)", *(family.name for family in SUPPORTED if family.config in DECODERS)}
    causal &= readouts.keys()
    assert {name for name, readout in readouts.items() if readout == "last"} == causal - bidirectional


@pytest.mark.parametrize("family", names(REFUSED))
def test_family_is_refused_with_the_reason(family: Family) -> None:
    for attention, dtype in family.variants:
        one = run(family.name, attention, dtype)
        assert one.found is None
        assert family.rule in one.reason
        assert "encoder" in one.reason


@pytest.mark.parametrize("family", names(REFUSED))
def test_a_refusal_is_no_stack_trace_from_inside(family: Family) -> None:
    with pytest.raises(UnsupportedEncoderError, match=family.rule) as caught:
        attribute(build(family), example_inputs(family), methods=METHODS)
    assert caught.value.__cause__ is None


# ---- families that nobody named

ENCODER_DECODER = {
    **next(family for family in FAMILIES if family.name == "bart (encoder)").options,
    "decoder_layers": 1,
}
UNNAMED = [
    Family("plbart", "PLBartConfig", POST, ENCODER_DECODER),
    Family("mbart", "MBartConfig", PRE, ENCODER_DECODER),
    Family("roc_bert", "RoCBertConfig", POST),
    Family("tapas", "TapasConfig", POST, interface=False),
    Family("data2vec_audio", "Data2VecAudioConfig", POST, {**AUDIO, "num_conv_pos_embeddings": 2}, inputs="audio"),
    Family("dinov3", "DINOv3ViTConfig", PRE, VISION, inputs="image"),
    Family("data2vec_vision", "Data2VecVisionConfig", PRE, VISION, inputs="image"),
    Family(
        "bloom",
        "BloomConfig",
        PRE,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
        interface=False,
    ),
    Family("mistral", "MistralConfig", PRE, {**SMALL, "num_key_value_heads": 2, "sliding_window": 4, **TOKENS}),
    Family("qwen3", "Qwen3Config", PRE, {**SMALL, "num_key_value_heads": 2, "head_dim": 6, **TOKENS}),
    Family("olmo3", "Olmo3Config", SUBLAYER, {**SHARED, "sliding_window": 4}),
    Family("cohere2", "Cohere2Config", PARALLEL, {**SHARED, "sliding_window": 4}),
    Family("stablelm", "StableLmConfig", PARALLEL, {**SHARED, "use_parallel_residual": True}),
    Family(
        "gpt_neox_japanese",
        "GPTNeoXJapaneseConfig",
        "neither a post-LN nor a pre-LN",
        {**SMALL, **TOKENS},
        interface=False,
    ),
    Family(
        "swin",
        "SwinConfig",
        "neither a post-LN nor a pre-LN",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 3, "image_size": 12, "patch_size": 2},
        inputs="image",
    ),
    Family("wavlm", "WavLMConfig", "no attention call was seen", AUDIO, inputs="audio", interface=False),
    Family("canine", "CanineConfig", "only self-attention over one sequence", interface=False),
    Family("mamba", "MambaConfig", "no attention call was seen", {**SMALL, "num_hidden_layers": 2}, interface=False),
]


@pytest.mark.parametrize("family", names(UNNAMED))
def test_a_family_that_nobody_named_is_read_or_refused(family: Family) -> None:
    if not family.supported:
        with pytest.raises(UnsupportedEncoderError, match=family.rule):
            attribute(build(family), example_inputs(family))
        return
    found = [attribute(build(family, kind), example_inputs(family), methods=METHODS) for kind in family.kinds]
    for one in found:
        assert one.rule == family.rule
        assert len(one.reconstruction_error) == family.layers
        assert float(one.reconstruction_error.max()) < 1e-5
    assert_same_maps(found[-1].local, found[0].local, 1e-4)


@pytest.mark.parametrize("length", [LENGTH, 48])
def test_sparse_attention_is_refused_once_it_is_sparse(length: int) -> None:
    options = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    model = build(Family("big_bird", "BigBirdConfig", "", {**SMALL, **options}, interface=False))
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))}
    before = state(model)
    if length == LENGTH:  # too short to be sparse: the forward pass itself exchanges modules of the model
        assert float(attribute(model, inputs).reconstruction_error.max()) < 1e-5
    else:
        with pytest.raises(UnsupportedEncoderError):
            attribute(model, inputs)
    assert_same_state(state(model), before)


# ---- padding

TEXTS = [family for family in SUPPORTED if family.inputs == "text"]
FLOAT32_SCORES = ("gptj", "codegen")
"""Families that compute attention scores in float32, whatever they are given."""


@pytest.mark.parametrize("family", names(TEXTS))
def test_a_padded_batch_is_each_example_alone(family: Family) -> None:
    kind = family.kinds[0]
    dtype = torch.float64 if kind in family.doubled and not without_doubles(family.name, kind) else torch.float32
    one = run(family.name, kind, dtype)
    together, model = one.found, one.model
    assert together is not None
    inputs = example_inputs(family, dtype)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert sorted(lengths) == [5, 8, LENGTH]
    # Norms, and scores, in float32 round by what stands beside them in the batch.
    exact = family.exact and family.name not in FLOAT32_SCORES
    tolerance = 1e-9 if dtype == torch.float64 and exact else 1e-4
    for example, length in enumerate(lengths):
        alone = attribute(
            model, {key: value[example : example + 1, :length] for key, value in inputs.items()}, methods=METHODS
        )
        for method in METHODS:
            padded = together.local[method][example]
            assert padded[:, length:].abs().sum() == padded[:, :, length:].abs().sum() == 0
            expected = alone.local[method][0]
            size = float(expected.abs().max())
            assert float((padded[:, :length, :length] - expected).abs().max()) <= tolerance * size, method


@pytest.mark.parametrize("family", names(TEXTS))
def test_no_mask_is_a_mask_of_ones(family: Family) -> None:
    """Without a mask models call other kernels: causal ones, and key-value heads that are not repeated first."""
    one = run(family.name, family.kinds[0], torch.float32)
    ids = example_inputs(family)["input_ids"][:1]
    masked = attribute(one.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, methods=METHODS)
    assert_same_maps(attribute(one.model, {"input_ids": ids}, methods=METHODS).local, masked.local, 1e-5)
    assert_same_maps(naive_maps(family, one.model, {"input_ids": ids}), masked.local, 1e-4)


# ---- no trace

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def state(model: nn.Module) -> dict[str, Any]:
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    return {
        "hooks": {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "others": {
            name: {key: id(value) for key, value in vars(module).items() if key != "training"}
            for name, module in model.named_modules()
        },
        "children": {name: id(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "configs": copy.deepcopy([config.to_dict() for config in configs]),
        "implementations": [getattr(config, "_attn_implementation", None) for config in configs],
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "versions": {name: parameter._version for name, parameter in model.named_parameters()},
        "random": torch.get_rng_state().tolist(),
    }


def assert_same_state(now: dict[str, Any], before: dict[str, Any]) -> None:
    grads, old = now.pop("grads"), {**before}.pop("grads")
    for name, grad in old.items():
        assert grad_equal(grads[name], grad), name
    for key, value in now.items():
        assert value == before[key], key


def grad_equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right is None or (left is not None and right is not None and torch.equal(left, right))


def pickled(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except Exception:
        return False
    return True


class InjectedError(Exception):
    pass


@pytest.mark.parametrize("family", names(list(FAMILIES)))
def test_no_trace_is_left(family: Family) -> None:
    model, inputs = build(family, seed=1), example_inputs(family)
    model.train()
    modules = list(model.modules())
    for module in modules[::3]:
        module.training = False
    parameters = list(model.parameters())
    for parameter in parameters[::4]:
        parameter.requires_grad_(False)
    for parameter in parameters[1::4]:
        parameter.grad = torch.full_like(parameter, 0.5)
    could_be_pickled = pickled(model)
    before = state(model)

    def broken_target(logits: Tensor, batch: Any) -> Tensor:
        raise InjectedError

    def broken_forward(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        module(**batch)
        raise InjectedError

    if family.supported:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = attribute(model, inputs, methods=METHODS)
        assert isinstance(found, Attributions)
        assert_same_state(state(model), before)
        with pytest.raises(GlobEncError, match="raised InjectedError"):
            attribute(model, inputs, target=broken_target)
    else:
        with pytest.raises(UnsupportedEncoderError):
            attribute(model, inputs)
    assert_same_state(state(model), before)
    with pytest.raises(ModelCallError, match="InjectedError"):
        attribute(model, inputs, forward=broken_forward)
    assert_same_state(state(model), before)
    # Parametrised modules (audio: a convolution with weight norm) are never picklable.
    assert pickled(model) is could_be_pickled is (family.inputs != "audio")


@pytest.mark.parametrize("name", ["bert", "llama", "squeezebert"])
def test_no_trace_is_left_by_a_failure_in_the_middle_of_the_maths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(one for one in FAMILIES if one.name == name)
    model, inputs = build(family, seed=1).train(), example_inputs(family)
    before, calls = state(model), []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(sum(len(module._forward_hooks) for module in model.modules()))
        if len(calls) == 2:
            raise InjectedError
        return original(*args, **kwargs)

    original = rolling.local_maps
    monkeypatch.setattr(rolling, "local_maps", fail)
    with pytest.raises(GlobEncError, match="reading the encoder failed with InjectedError"):
        attribute(model, inputs)
    assert calls[-1] > 0  # inside the forward pass, with the hooks in place
    assert_same_state(state(model), before)
    assert pickled(model)


# ---- the page


@pytest.mark.skipif(
    transformers.__version__ != WRITTEN_WITH,
    reason=f"the page is of transformers {WRITTEN_WITH}, this is {transformers.__version__}",
)
def test_the_page_tells_what_is_found() -> None:
    assert told(PAGE.read_text(encoding="utf-8")) == told(page())
    assert len(told(page())) == len(FAMILIES)


def test_the_page_says_what_is_not_in_the_paper() -> None:
    assert "an extension of the paper" in PAGE.read_text(encoding="utf-8")
    assert {family.rule for family in SUPPORTED} == set(RULES)
