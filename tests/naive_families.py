"""The maps of every family by another way: module paths written down by hand, plain hooks, every vector built.

Nothing of the package's own reading is used but the attention probabilities of each call.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from globenc_lightning import METHODS
from globenc_lightning.encoder.trace import AttentionCall, AttentionTrace
from tests import naive
from tests.families import POST, Classifier, Family


@dataclass(frozen=True)
class Paths:
    """Where things are in an encoder; ``{}`` stands for the layer.

    Attributes:
        layer: the module whose first hidden states are the layer's input.
        values: the module that makes the value vectors.
        projection: the attention's output projection.
        norms: post-LN: the norms after attention and feed-forward network. pre-LN: the final norm alone, if there is
            one.
        attended: pre-LN: the norm that the residual stream enters after the attention.
        gain: pre-LN: a parameter that scales the attention's output.
        own: sublayer-norm: the norm of the attention's output.
        network: parallel: the feed-forward network.
        number: what the attention's output is multiplied by.
        heads: how the values module's output becomes (b, h, k, v).
        channels_first: whether tensors are (b, d, k).
    """

    layer: str
    values: str
    projection: str
    norms: tuple[str, ...] = ()
    attended: str | None = None
    gain: str | None = None
    own: str | None = None
    network: str | None = None
    number: float = 1.0
    heads: Callable[[Tensor, nn.Module], Tensor] | None = None
    channels_first: bool = False


def thirds(out: Tensor, encoder: nn.Module) -> Tensor:
    """Queries, keys and values of all heads, one after the other: (b, k, 3, h, v)."""
    return out.unflatten(-1, (3, 4, -1))[:, :, 2].transpose(1, 2)


def deberta_heads(out: Tensor, encoder: nn.Module) -> Tensor:
    """Query, key and value of each head, one after the other; the bias is a parameter of its own, added later."""
    return out.unflatten(-1, (4, 3, -1))[:, :, :, 2].transpose(1, 2)


def falcon_heads(out: Tensor, encoder: nn.Module) -> Tensor:
    """Groups of queries, each followed by a key and a value that its group shares."""
    groups = 2 if encoder.config.new_decoder_architecture else 1
    values = out.unflatten(-1, (groups, 4 // groups + 2, -1))[:, :, :, -1].transpose(1, 2)
    return values.repeat_interleave(4 // groups, 1)


def codegen_heads(out: Tensor, encoder: nn.Module) -> Tensor:
    """Four parts, each with the queries, values and keys of one head."""
    return out.unflatten(-1, (4, 3, -1))[:, :, :, 1].transpose(1, 2)


def latent_heads(out: Tensor, encoder: nn.Module) -> Tensor:
    """Of each head four numbers of the key, then the values."""
    return out.squeeze(1).unflatten(-1, (4, -1))[..., 4:].transpose(1, 2)


def decoder(attended: str | None, final: str = "norm", **others: Any) -> Paths:
    """Where things are in the layers of most decoders."""
    layer = "layers.{}"
    paths = {key: f"{layer}.{value}" for key, value in others.items() if isinstance(value, str)}
    numbers = {key: value for key, value in others.items() if not isinstance(value, str)}
    made = Paths(
        layer, f"{layer}.self_attn.v_proj", f"{layer}.self_attn.o_proj", (final,), attended and f"{layer}.{attended}"
    )
    return replace(made, **{**paths, **numbers})


def bert(prefix: str = "encoder.layer.{}") -> Paths:
    return Paths(
        prefix,
        f"{prefix}.attention.self.value",
        f"{prefix}.attention.output.dense",
        (f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"),
    )


def fair(prefix: str, attention: str, first: str, second: str) -> Paths:
    return Paths(
        prefix,
        f"{prefix}.{attention}.v_proj",
        f"{prefix}.{attention}.out_proj",
        (f"{prefix}.{first}", f"{prefix}.{second}"),
    )


def bert_pre(attended: str, final: str) -> Paths:
    layer = "encoder.layer.{}"
    return Paths(
        layer, f"{layer}.attention.self.value", f"{layer}.attention.output.dense", (final,), f"{layer}.{attended}"
    )


def vision(layer: str, attention: str, output: str, attended: str, final: str | None, gain: str | None = None) -> Paths:
    return Paths(
        layer,
        f"{layer}.{attention}.v_proj",
        f"{layer}.{attention}.{output}",
        () if final is None else (final,),
        f"{layer}.{attended}",
        gain and f"{layer}.{gain}",
    )


def bert_vision(final: str | None, gain: str | None = None, attended: str = "layernorm_after") -> Paths:
    """What vision encoders looked like in transformers 5.0 and before: BERT's attention, under other names."""
    layer = "encoder.layer.{}"
    return Paths(
        layer,
        f"{layer}.attention.attention.value",
        f"{layer}.attention.output.dense",
        () if final is None else (final,),
        f"{layer}.{attended}",
        gain and f"{layer}.{gain}",
    )


def within(prefix: str, paths: Paths) -> Paths:
    """The same modules, in an encoder that wraps them once more."""
    return replace(
        paths,
        layer=prefix + paths.layer,
        values=prefix + paths.values,
        projection=prefix + paths.projection,
        norms=tuple(prefix + norm for norm in paths.norms),
        attended=paths.attended and prefix + paths.attended,
        gain=paths.gain and prefix + paths.gain,
    )


RMS = {"eurobert", "t5 (encoder)", "llama", "gemma", "granite", "minicpm3", "gemma2", "gemma3"}
RMS |= {"gemma3 (both directions)", "olmo2", "glm4", "exaone4"}
ONE_PLUS_WEIGHT = {"gemma", "gemma2", "gemma3", "gemma3 (both directions)", "nemotron"}
POST_ATTENTION = ("layers.{}.post_attention_layernorm", "layers.{}.post_mlp_layernorm")
CLIP_LAYER = "encoder.layers.{}"
XLM = Paths(
    "attentions.{}", "attentions.{}.v_lin", "attentions.{}.out_lin", ("layer_norm1.{}", "layer_norm2.{}")
)  # its layers are no modules
ALBERT = "encoder.albert_layer_groups.0.albert_layers.0"  # one module for all layers

PATHS: dict[str, Paths] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm_roberta", "camembert", "ernie", "data2vec_text", "layoutlm", "electra", "rembert"),
        bert(),
    ),
    "roformer": bert(),
    "big_bird (full attention)": bert(),
    "distilbert": Paths(
        "transformer.layer.{}",
        "transformer.layer.{}.attention.v_lin",
        "transformer.layer.{}.attention.out_lin",
        ("transformer.layer.{}.sa_layer_norm", "transformer.layer.{}.output_layer_norm"),
    ),
    "albert": Paths(
        ALBERT,
        f"{ALBERT}.attention.value",
        f"{ALBERT}.attention.dense",
        (f"{ALBERT}.attention.LayerNorm", f"{ALBERT}.full_layer_layer_norm"),
    ),
    **dict.fromkeys(
        ("nomic_bert", "jina_embeddings_v3"),
        Paths("layers.{}", "layers.{}.self_attn.v_proj", "layers.{}.self_attn.o_proj", POST_ATTENTION),
    ),
    "bart (encoder)": fair("encoder.layers.{}", "self_attn", "self_attn_layer_norm", "final_layer_norm"),
    "wav2vec2": fair("encoder.layers.{}", "attention", "layer_norm", "final_layer_norm"),
    "hubert": fair("encoder.layers.{}", "attention", "layer_norm", "final_layer_norm"),
    "mpnet": Paths(
        "encoder.layer.{}",
        "encoder.layer.{}.attention.attn.v",
        "encoder.layer.{}.attention.attn.o",
        ("encoder.layer.{}.attention.LayerNorm", "encoder.layer.{}.output.LayerNorm"),
    ),
    "deberta": Paths(
        "encoder.layer.{}",
        "encoder.layer.{}.attention.self.in_proj",
        "encoder.layer.{}.attention.output.dense",
        ("encoder.layer.{}.attention.output.LayerNorm", "encoder.layer.{}.output.LayerNorm"),
        heads=deberta_heads,
    ),
    **dict.fromkeys(
        ("deberta_v2", "deberta_v3"),
        Paths(
            "encoder.layer.{}",
            "encoder.layer.{}.attention.self.value_proj",
            "encoder.layer.{}.attention.output.dense",
            ("encoder.layer.{}.attention.output.LayerNorm", "encoder.layer.{}.output.LayerNorm"),
        ),
    ),
    "squeezebert": Paths(
        "encoder.layers.{}.attention.query",
        "encoder.layers.{}.attention.value",
        "encoder.layers.{}.post_attention.conv1d",
        ("encoder.layers.{}.post_attention.layernorm", "encoder.layers.{}.output.layernorm"),
        channels_first=True,
    ),
    "flaubert": XLM,
    "xlm": XLM,
    "xlm_roberta_xl": bert_pre("LayerNorm", "encoder.LayerNorm"),
    "roberta_prelayernorm": bert_pre("intermediate.LayerNorm", "LayerNorm"),
    "esm": bert_pre("LayerNorm", "encoder.emb_layer_norm_after"),
    "megatron_bert": bert_pre("ln", "encoder.ln"),
    "modernbert": Paths(
        "layers.{}", "layers.{}.attn.Wqkv", "layers.{}.attn.Wo", ("final_norm",), "layers.{}.mlp_norm", heads=thirds
    ),
    **dict.fromkeys(
        ("eurobert", "llama"), vision("layers.{}", "self_attn", "o_proj", "post_attention_layernorm", "norm")
    ),
    **dict.fromkeys(("vit", "deit"), vision("layers.{}", "attention", "o_proj", "layernorm_after", "layernorm")),
    "clip (text)": vision(CLIP_LAYER, "self_attn", "out_proj", "layer_norm2", "final_layer_norm"),
    "clip (vision)": vision(CLIP_LAYER, "self_attn", "out_proj", "layer_norm2", None),  # its last norm sees [CLS] alone
    "siglip (text)": vision(CLIP_LAYER, "self_attn", "out_proj", "layer_norm2", "final_layer_norm"),
    "siglip (vision)": vision(CLIP_LAYER, "self_attn", "out_proj", "layer_norm2", "post_layernorm"),
    "wav2vec2 (stable)": vision(CLIP_LAYER, "attention", "out_proj", "final_layer_norm", "encoder.layer_norm"),
    "t5 (encoder)": Paths(
        "encoder.block.{}",
        "encoder.block.{}.layer.0.SelfAttention.v",
        "encoder.block.{}.layer.0.SelfAttention.o",
        ("encoder.final_layer_norm",),
        "encoder.block.{}.layer.1.layer_norm",
    ),
    "beit": vision("layers.{}", "attention", "o_proj", "layernorm_after", None, "lambda_1"),
    "dinov2": vision("encoder.layer.{}", "attention", "o_proj", "norm2", "layernorm", "layer_scale1.lambda1"),
    "opt": vision("decoder.layers.{}", "self_attn", "out_proj", "final_layer_norm", "decoder.final_layer_norm"),
    "opt (norms after)": fair("decoder.layers.{}", "self_attn", "self_attn_layer_norm", "final_layer_norm"),
    **dict.fromkeys(("gemma", "nemotron"), decoder("post_attention_layernorm")),
    "xglm": decoder("final_layer_norm", "layer_norm", projection="self_attn.out_proj"),
    "granite": decoder("post_attention_layernorm", number=0.22),
    "minicpm3": decoder(
        "post_attention_layernorm", values="self_attn.kv_b_proj", heads=latent_heads, number=1.4 / 3**0.5
    ),
    **dict.fromkeys(
        ("gemma2", "gemma3", "gemma3 (both directions)"),
        decoder("pre_feedforward_layernorm", own="post_attention_layernorm"),
    ),
    **dict.fromkeys(("olmo2", "exaone4"), decoder("mlp", own="post_attention_layernorm")),
    "glm4": decoder("post_attention_layernorm", own="post_self_attn_layernorm"),
    "gpt_neox": decoder(
        None,
        "final_layer_norm",
        network="mlp",
        values="attention.query_key_value",
        projection="attention.dense",
        heads=deberta_heads,
    ),
    "phi": decoder(None, "final_layernorm", network="mlp", projection="self_attn.dense"),
    "cohere": decoder(None, network="mlp"),
    "gptj": Paths("h.{}", "h.{}.attn.v_proj", "h.{}.attn.out_proj", ("ln_f",), network="h.{}.mlp"),
    "codegen": Paths(
        "h.{}", "h.{}.attn.qkv_proj", "h.{}.attn.out_proj", ("ln_f",), network="h.{}.mlp", heads=codegen_heads
    ),
    **dict.fromkeys(
        ("falcon", "falcon (two norms)"),
        Paths(
            "h.{}",
            "h.{}.self_attention.query_key_value",
            "h.{}.self_attention.dense",
            ("ln_f",),
            network="h.{}.mlp",
            heads=falcon_heads,
        ),
    ),
    "gpt2": Paths("h.{}", "h.{}.attn.c_attn", "h.{}.attn.c_proj", ("ln_f",), "h.{}.ln_2", heads=thirds),
}


OLDER_PATHS: dict[str, Paths] = {
    **dict.fromkeys(("vit", "deit"), bert_vision("layernorm")),
    "beit": bert_vision(None, "lambda_1"),
    "dinov2": bert_vision("layernorm", "layer_scale1.lambda1", "norm2"),
    **{name: within("text_model.", PATHS[name]) for name in ("clip (text)", "siglip (text)")},
    **{name: within("vision_model.", PATHS[name]) for name in ("clip (vision)", "siglip (vision)")},
}
"""Where the same things are in older versions of transformers."""


def paths_of(name: str, encoder: nn.Module) -> Paths:
    """The first of a family's paths that lead somewhere in this encoder."""
    modules = {path for path, _ in encoder.named_modules()}
    for paths in (PATHS[name], OLDER_PATHS.get(name)):
        if paths and {path.format(0) for path in (paths.layer, paths.values, paths.projection)} <= modules:
            return paths
    raise LookupError(f"none of the paths written down for {name} is in {type(encoder).__name__}")


class Hooked:
    """Plain hooks on an encoder: what its modules were given and gave, in call order.

    Attributes:
        attention: the attention probabilities of every call.
    """

    def __init__(self, model: Classifier, inputs: dict[str, Tensor], paths: set[str]) -> None:
        self.attention: list[Tensor] = []
        self._given: dict[str, list[Tensor]] = {path: [] for path in paths}
        self._gave: dict[str, list[Tensor]] = {path: [] for path in paths}
        handles = []
        for path in paths:
            module = model.encoder.get_submodule(path)
            handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(path)))
        with torch.no_grad(), AttentionTrace(self._attended):
            model(**inputs)
        for handle in handles:
            handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._given[path].append(next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)))

        return hook

    def _after(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Falcon writes into what its feed-forward network returned.
            self._gave[path].append((output[0] if isinstance(output, tuple) else output).clone())

        return hook

    def _attended(self, call: AttentionCall) -> None:
        self.attention.append(call.probabilities)

    def given(self, path: str, layer: int) -> Tensor:
        """What a module was given: in its only call, or in the call for that layer if it is shared."""
        return self._given[path][layer if len(self._given[path]) > 1 else 0]

    def gave(self, path: str, layer: int) -> Tensor:
        return self._gave[path][layer if len(self._gave[path]) > 1 else 0]


def naive_norm(module: Any, centered: bool, real: Tensor | None, one_plus: bool = False) -> naive.Norm:
    eps = getattr(module, "variance_epsilon", None)
    weight = module.weight.detach() + 1 if one_plus else module.weight.detach()
    return naive.Norm(weight, module.eps if eps is None else eps, centered, real)


def naive_maps(
    family: Family,
    model: Classifier,
    inputs: dict[str, Tensor],
    numbers: tuple[float, float, float] | None = None,
    own_centered: bool = False,
) -> dict[str, Tensor]:
    """The eight maps of every layer (b, l, q, k), from the paths above and every vector.

    ``numbers`` are what the attention's output, the residual and what leaves the first norm are multiplied by.
    ``own_centered`` says that the attention's own norm takes off the mean, whatever the family's norms do.
    """
    paths = paths_of(family.name, model.encoder)
    numbers = numbers or (paths.number, 1.0, 1.0)
    templates = [
        paths.layer,
        paths.values,
        paths.projection,
        *paths.norms,
        *[path for path in (paths.attended, paths.own, paths.network) if path],
    ]
    seen = Hooked(model, inputs, {path.format(layer) for path in templates for layer in range(family.layers)})
    assert len(seen.attention) >= family.layers  # BART's decoder attends too
    collected: dict[str, list[Tensor]] = {method: [] for method in METHODS}
    for layer in range(family.layers):

        def turned(tensor: Tensor) -> Tensor:
            return tensor.transpose(1, 2) if paths.channels_first else tensor

        def module(path: str, layer: int = layer) -> Any:
            return model.encoder.get_submodule(path.format(layer))

        attention = seen.attention[layer]
        b, h, s, _ = attention.shape
        mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones(b, s)
        out = turned(seen.gave(paths.values.format(layer), layer))
        if paths.heads is None:
            heads = family.options.get("num_key_value_heads", h)
            values = out.unflatten(-1, (heads, -1)).transpose(1, 2).repeat_interleave(h // heads, 1)
        else:
            values = paths.heads(out, model.encoder)
        if family.name == "deberta":
            values = values + model.encoder.get_parameter(f"encoder.layer.{layer}.attention.self.v_bias").detach().view(
                1, h, 1, -1
            )
        projection = module(paths.projection)
        weight = projection.weight.detach()
        weight = weight.T if family.name == "gpt2" else weight.squeeze(-1) if paths.channels_first else weight
        bias = getattr(projection, "bias", None)
        bias = None if bias is None else bias.detach()
        x = turned(seen.given(paths.layer.format(layer), layer))

        if family.rule == POST:
            second = turned(seen.given(paths.norms[1].format(layer), layer))
            norms = [naive_norm(module(paths.norms[0]), True, None), naive_norm(module(paths.norms[1]), True, second)]
            maps = naive.local_maps(attention, values, weight, bias, x, norms, mask, numbers=numbers)
            entering = turned(seen.given(paths.norms[0].format(layer), layer))
        else:
            if paths.gain is not None:
                gain = model.encoder.get_parameter(paths.gain.format(layer)).detach()
                weight, bias = gain.unsqueeze(-1) * weight, None if bias is None else gain * bias
            norms, kind = [], (family.name not in RMS, family.name in ONE_PLUS_WEIGHT)
            if paths.norms and layer == family.layers - 1:
                norms = [naive_norm(module(paths.norms[0]), kind[0], seen.given(paths.norms[0], 0), kind[1])]
            own_norm = None
            if paths.own is not None:
                entered = seen.given(paths.own.format(layer), layer)
                own_norm = naive_norm(module(paths.own), kind[0] or own_centered, entered, kind[1])
            maps = naive.local_maps(attention, values, weight, bias, x, norms, mask, len(norms), own_norm, numbers)
            maps["N-Res"] = maps["N-Enc"]
            if paths.network is not None:
                last = layer == family.layers - 1
                entering = (
                    seen.given(paths.norms[0], 0) if last else seen.given(paths.layer.format(layer + 1), layer + 1)
                )
                entering = entering - seen.gave(paths.network.format(layer), layer)
            else:
                # OPT joins the texts before this norm.
                entering = seen.given(str(paths.attended).format(layer), layer).view_as(x)

        # What was written down above is what the model does.
        context = torch.einsum("bhqk,bhkv->bqhv", attention, values).flatten(2)
        real = mask.bool()
        added = context @ weight.T + (0 if bias is None else bias)
        added = added if paths.own is None else module(paths.own)(added).detach()
        own = numbers[1] * x + numbers[0] * added
        tolerance = 1e-10 if x.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            own[real], entering[real], rtol=tolerance, atol=tolerance * float(entering.abs().max())
        )
        for method in METHODS:
            collected[method].append(maps[method])
    return {method: torch.stack(parts, 1) for method, parts in collected.items()}


def assert_same_maps(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for method in METHODS:
        size = float(expected[method].abs().max())
        difference = float((found[method] - expected[method]).abs().max())
        assert difference <= tolerance * size, f"{method}: {difference / size:.1e}"
