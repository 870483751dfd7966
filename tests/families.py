"""Small random encoders of every family that the documentation speaks of, with re-drawn parameters.

Weights are drawn so that a wrong formula shows: norm weights away from 1, biases away from 0, attention that is neither
uniform nor saturated.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 99
LENGTH = 12
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 12,
    "patch_size": 4,
}
AUDIO: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "max_position_embeddings"},
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
POST, PRE, SUBLAYER, PARALLEL = "post-LN", "pre-LN", "sublayer-norm", "parallel"
RULES = (POST, PRE, SUBLAYER, PARALLEL)
SDPA = ("sdpa",)
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHARED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, **TOKENS}
GEMMA: dict[str, Any] = {**SHARED, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4}
OPT: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    **TOKENS,
}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "rotary_dim": 4,
    **TOKENS,
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: the model type.
        config: the name of its configuration class.
        rule: one of :data:`RULES`, or the reason for which it is refused.
        options: what the configuration is made with.
        model: the name of its model class; ``AutoModel`` decides when None.
        inputs: what it takes: ``"text"``, ``"image"`` or ``"audio"``.
        interface: whether its attention can be chosen (sdpa or eager, as far as this transformers offers them).
        layers: how many layers it has.
        doubles: the attention with which it runs in float64. Some eager attention makes its softmax in float32, which
            no product with float64 values takes; some models keep a table in float32.
        exact: whether its norms compute in what they are given, and not in float32.
    """

    name: str
    config: str
    rule: str
    options: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    model: str | None = None
    inputs: str = "text"
    interface: bool = True
    layers: int = 3
    doubles: tuple[str, ...] = ("sdpa", "eager")
    exact: bool = True

    @property
    def supported(self) -> bool:
        """Whether it can be read."""
        return self.rule in RULES

    @property
    def missing(self) -> str:
        """Why this transformers cannot build it, or an empty string."""
        if self.name == "xglm" and int(transformers.__version__.split(".")[0]) < 5:
            return f"transformers {transformers.__version__} computes the attention of XGLM in a way that is not seen"
        if hasattr(transformers, self.config):
            known = (
                vars(getattr(transformers, self.config)()) if "use_bidirectional_attention" in self.options else None
            )
            if known is not None and "use_bidirectional_attention" not in known:
                return f"transformers {transformers.__version__} does not read {self.name.partition(' ')[0]} that way"
            return ""
        return f"transformers {transformers.__version__} has no {self.config.removesuffix('Config')}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that it can be built with here; sdpa alone stands for an attention of its own."""
        if not self.interface:
            return ("sdpa",)
        return ("sdpa", "eager") if self.missing or self.model_class._supports_sdpa else ("eager",)

    @property
    def model_class(self) -> Any:
        """Its model class."""
        if self.model is not None:
            return getattr(transformers, self.model)
        return transformers.AutoModel._model_mapping[getattr(transformers, self.config)]

    @property
    def doubled(self) -> tuple[str, ...]:
        """The kinds of attention with which it runs in float64."""
        return tuple(kind for kind in self.kinds if kind in self.doubles)

    @property
    def variants(self) -> tuple[tuple[str, torch.dtype], ...]:
        """The kinds of attention and the types that it runs in."""
        single = [(kind, torch.float32) for kind in self.kinds]
        return (*single, *((kind, torch.float64) for kind in self.doubled))


FAMILIES = (
    Family("bert", "BertConfig", POST),
    Family("roberta", "RobertaConfig", POST, {**SMALL, "pad_token_id": 1}),
    Family("xlm_roberta", "XLMRobertaConfig", POST, {**SMALL, "pad_token_id": 1}),
    Family("camembert", "CamembertConfig", POST, {**SMALL, "pad_token_id": 1}),
    Family("ernie", "ErnieConfig", POST),
    Family("data2vec_text", "Data2VecTextConfig", POST, {**SMALL, "pad_token_id": 1}),
    Family("layoutlm", "LayoutLMConfig", POST, doubles=SDPA),
    Family("electra", "ElectraConfig", POST, {**SMALL, "embedding_size": 16}),
    Family(
        "distilbert",
        "DistilBertConfig",
        POST,
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    Family("albert", "AlbertConfig", POST, {**SMALL, "embedding_size": 16, "num_hidden_groups": 1}),
    Family("nomic_bert", "NomicBertConfig", POST),
    Family("jina_embeddings_v3", "JinaEmbeddingsV3Config", POST, {**SMALL, "pad_token_id": 1}),
    Family(
        "bart (encoder)",
        "BartConfig",
        POST,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            **TOKENS,
            "decoder_start_token_id": 2,
        },
    ),
    Family("wav2vec2", "Wav2Vec2Config", POST, AUDIO, inputs="audio"),
    Family("hubert", "HubertConfig", POST, AUDIO, inputs="audio"),
    Family("mpnet", "MPNetConfig", POST, interface=False),
    Family(
        "deberta",
        "DebertaConfig",
        POST,
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 20},
        interface=False,
        exact=False,
    ),
    Family(
        "deberta_v2",
        "DebertaV2Config",
        POST,
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        interface=False,
    ),
    Family(
        "deberta_v3",
        "DebertaV2Config",
        POST,
        {
            **SMALL,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        interface=False,
    ),
    Family("rembert", "RemBertConfig", POST, {**SMALL, "input_embedding_size": 16}, interface=False),
    Family("squeezebert", "SqueezeBertConfig", POST, {**SMALL, "embedding_size": 32}, interface=False),
    Family("roformer", "RoFormerConfig", POST, interface=False),
    Family(
        "flaubert",
        "FlaubertConfig",
        POST,
        {
            "vocab_size": VOCABULARY,
            "emb_dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "layerdrop": 0.0,
            "pre_norm": False,
        },
        interface=False,
        doubles=(),
    ),
    Family(
        "xlm",
        "XLMConfig",
        POST,
        {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64},
        interface=False,
        doubles=(),
    ),
    Family(
        "big_bird (full attention)",
        "BigBirdConfig",
        POST,
        {**SMALL, "attention_type": "original_full"},
        interface=False,
    ),
    Family("xlm_roberta_xl", "XLMRobertaXLConfig", PRE, {**SMALL, "pad_token_id": 1}),
    Family("roberta_prelayernorm", "RobertaPreLayerNormConfig", PRE, {**SMALL, "pad_token_id": 1}),
    Family(
        "esm",
        "EsmConfig",
        PRE,
        {**SMALL, "pad_token_id": 1, "mask_token_id": 98, "position_embedding_type": "rotary", "token_dropout": False},
    ),
    Family(
        "modernbert", "ModernBertConfig", PRE, {**SMALL, "cls_token_id": 1, "sep_token_id": 2, **TOKENS}, doubles=SDPA
    ),
    Family("eurobert", "EuroBertConfig", PRE, {**SMALL, "num_key_value_heads": 2, **TOKENS}, doubles=SDPA, exact=False),
    Family("vit", "ViTConfig", PRE, VISION, inputs="image", doubles=SDPA),
    Family("deit", "DeiTConfig", PRE, VISION, inputs="image", doubles=SDPA),
    Family("clip (text)", "CLIPTextConfig", PRE, {**SMALL, **TOKENS}, "CLIPTextModel", doubles=SDPA),
    Family("clip (vision)", "CLIPVisionConfig", PRE, VISION, "CLIPVisionModel", inputs="image", doubles=SDPA),
    Family("siglip (text)", "SiglipTextConfig", PRE, {**SMALL, **TOKENS}, "SiglipTextModel", doubles=SDPA),
    Family("siglip (vision)", "SiglipVisionConfig", PRE, VISION, "SiglipVisionModel", inputs="image", doubles=SDPA),
    Family(
        "wav2vec2 (stable)",
        "Wav2Vec2Config",
        PRE,
        {**AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        inputs="audio",
    ),
    Family(
        "t5 (encoder)",
        "T5Config",
        PRE,
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_heads": 4, **TOKENS},
        "T5EncoderModel",
        exact=False,
    ),
    Family("beit", "BeitConfig", PRE, {**VISION, "layer_scale_init_value": 0.5}, inputs="image", doubles=SDPA),
    Family("dinov2", "Dinov2Config", PRE, VISION, inputs="image"),
    Family("megatron_bert", "MegatronBertConfig", PRE, interface=False),
    Family(
        "gpt2",
        "GPT2Config",
        PRE,
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **TOKENS},
    ),
    Family("llama", "LlamaConfig", PRE, {**SMALL, "num_key_value_heads": 2, **TOKENS}, doubles=SDPA, exact=False),
    Family("opt", "OPTConfig", PRE, OPT),
    Family("opt (norms after)", "OPTConfig", POST, {**OPT, "do_layer_norm_before": False}),
    Family(
        "xglm",
        "XGLMConfig",
        PRE,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "num_layers": 3,
            "attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
            **TOKENS,
        },
        interface=False,
        doubles=(),
    ),
    Family("gemma", "GemmaConfig", PRE, {**SHARED, "num_key_value_heads": 1, "head_dim": 6}, doubles=SDPA, exact=False),
    Family("nemotron", "NemotronConfig", PRE, SHARED, doubles=SDPA),
    Family(
        "granite",
        "GraniteConfig",
        PRE,
        {**SHARED, "residual_multiplier": 0.22, "embedding_multiplier": 3.0},
        exact=False,
    ),
    Family(
        "minicpm3",
        "MiniCPM3Config",
        PRE,
        {
            **SHARED,
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 12,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
        },
        exact=False,
    ),
    Family("gemma2", "Gemma2Config", SUBLAYER, GEMMA, interface=False, doubles=(), exact=False),
    Family("gemma3", "Gemma3TextConfig", SUBLAYER, GEMMA, doubles=SDPA, exact=False),
    Family(
        "gemma3 (both directions)",
        "Gemma3TextConfig",
        SUBLAYER,
        {**GEMMA, "use_bidirectional_attention": True},
        doubles=SDPA,
        exact=False,
    ),
    Family("olmo2", "Olmo2Config", SUBLAYER, SHARED, exact=False),
    Family("glm4", "Glm4Config", SUBLAYER, {**SHARED, "head_dim": 8}, exact=False),
    Family(
        "exaone4",
        "Exaone4Config",
        SUBLAYER,
        {**SHARED, "sliding_window": 4, "sliding_window_pattern": 2},
        doubles=SDPA,
        exact=False,
    ),
    Family("gpt_neox", "GPTNeoXConfig", PARALLEL, {**SMALL, **TOKENS}),
    Family("gptj", "GPTJConfig", PARALLEL, GPT, interface=False),
    Family("codegen", "CodeGenConfig", PARALLEL, GPT, interface=False),
    Family("phi", "PhiConfig", PARALLEL, {**SMALL, **TOKENS}),
    Family("cohere", "CohereConfig", PARALLEL, SHARED, exact=False),
    Family("falcon", "FalconConfig", PARALLEL, {**SMALL, "multi_query": True, "bias": True, **TOKENS}),
    Family(
        "falcon (two norms)",
        "FalconConfig",
        PARALLEL,
        {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, **TOKENS},
    ),
    Family(
        "deberta_v2 (convolution)",
        "DebertaV2Config",
        "something between the two layers changes the hidden states",
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3},
        interface=False,
    ),
    Family(
        "xmod",
        "XmodConfig",
        "something between the two layers",
        {**SMALL, "languages": ("a",), "default_language": "a"},
    ),
    Family(
        "bitnet",
        "BitNetConfig",
        "normalises the heads' context vectors before the output projection",
        SHARED,
        doubles=SDPA,
    ),
    Family(
        "convbert",
        "ConvBertConfig",
        "no module takes the heads' concatenated context vectors",
        {**SMALL, "embedding_size": 32},
        interface=False,
    ),
    Family(
        "mobilebert",
        "MobileBertConfig",
        "neither a post-LN nor a pre-LN layer",
        {**SMALL, "embedding_size": 32, "intra_bottleneck_size": 32},
    ),
    Family(
        "ibert",
        "IBertConfig",
        "no attention call was seen",
        {**SMALL, "pad_token_id": 1, "quant_mode": True},
        interface=False,
    ),
    Family(
        "xlnet",
        "XLNetConfig",
        "no attention call was seen",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
        interface=False,
    ),
    Family(
        "funnel",
        "FunnelConfig",
        "no attention call was seen",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "block_sizes": [1, 1],
            "block_repeats": [1, 1],
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
        },
        model="FunnelModel",
        interface=False,
    ),
    Family(
        "longformer",
        "LongformerConfig",
        "no attention call was seen",
        {**SMALL, "attention_window": 4},
        interface=False,
    ),
    Family(
        "fnet",
        "FNetConfig",
        "no attention call was seen",
        {key: value for key, value in SMALL.items() if key != "num_attention_heads"},
        interface=False,
    ),
)


class Classifier(nn.Module):
    """An encoder with a head of its own: the mean of its output through a linear map.

    Args:
        encoder: a Hugging Face model without a head.
        width: the size of its hidden states.
    """

    def __init__(self, encoder: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 3)

    def forward(self, **inputs: Tensor) -> Tensor:
        output = self.encoder(**inputs)
        hidden = getattr(output, "encoder_last_hidden_state", None)
        return self.head((output[0] if hidden is None else hidden).tanh().mean(1))


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters anew, in place."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("bias"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 1.5 + 0.3)
            elif parameter.dim() < 2 or "embed" in name or "token" in name:
                parameter.copy_(normal(parameter.shape) * (0.3 if parameter.dim() < 2 else 1.0))
            else:
                fan = parameter[0].numel()
                parameter.copy_(normal(parameter.shape) * 1.5 / fan**0.5)
    return model


def build(
    family: Family, attention: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Classifier:
    """A small random classifier of a family, in eval mode; with its first kind of attention unless told."""
    attention = attention or family.kinds[0]
    config = getattr(transformers, family.config)(**family.options)
    kwargs: dict[str, Any] = {"attn_implementation": attention} if family.interface else {}
    factory: Callable[..., nn.Module] = (
        transformers.AutoModel.from_config if family.model is None else getattr(transformers, family.model)._from_config
    )
    return redraw(Classifier(factory(config, **kwargs)), seed).to(dtype).eval()  # type: ignore[return-value]


def example_inputs(family: Family, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Three examples; texts of 12, 8 and 5 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    if family.inputs == "image":
        return {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator).to(dtype)}
    if family.inputs == "audio":
        return {"input_values": torch.randn(3, 64, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCABULARY - 1, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    mask[2, 5:] = 0
    padding = family.options.get("pad_token_id", 0)
    inputs = {"input_ids": torch.where(mask.bool(), ids, torch.full_like(ids, padding)), "attention_mask": mask}
    if family.name == "fnet" and "attention_mask" not in inspect.signature(family.model_class.forward).parameters:
        del inputs["attention_mask"]  # transformers before 5.0: it attends to nothing
    return inputs


@cache
def without_doubles(name: str, attention: str) -> str:
    """Why a family that runs in float64 elsewhere does not with this transformers, or an empty string.

    The model is asked alone: nothing of the package is in the way.
    """
    family = next(one for one in FAMILIES if one.name == name)
    try:
        with torch.no_grad():
            build(family, attention, torch.float64)(**example_inputs(family, torch.float64))
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        return f"transformers {transformers.__version__} does not run {name} in float64 with {attention}: {first}"
    return ""
