"""How a model is called on the probe, and where its logits are.

A LightningModule says nowhere how its encoder is to be called. In this order: what the user gave as ``forward=``, the
module's own ``forward``, the outermost Hugging Face model with a head. The first that gives logits is taken.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from globenc_lightning.errors import ModelCallError

Call = Callable[[Mapping[str, Any]], Any]

LABELS = ("labels", "label", "targets", "target", "y")
"""Names under which a batch may hold its labels."""

SPAN_LABELS = ("start_positions", "end_positions")
"""Names under which a batch holds the labels of a span."""

_LOGITS = ("logits", "start_logits", "logits_per_text")
"""What outputs call their logits."""


class Way(NamedTuple):
    """A way of calling a model on a batch.

    Attributes:
        name: what it is called in a message.
        call: runs the model on a batch.
        passed: the entries of the batch that the model is given; None if it is given all of them.
        own: whether it is the user's own way: ``forward=``, or the module's own forward.
    """

    name: str
    call: Call
    passed: frozenset[str] | None
    own: bool


def ways_to_call(
    model: nn.Module, batch: Mapping[str, Any], forward: Callable[..., Any] | None = None
) -> Iterator[Way]:
    """The ways in which the model may be called on a batch, the best first.

    Args:
        model: the user's module.
        batch: one batch of inputs.
        forward: the user's own way, ``forward(model, batch)``; nothing else is tried then.

    Yields:
        The ways.

    Raises:
        ModelCallError: the module has no forward of its own and holds several models with a head.
    """
    # torch.compile(model) wraps a module in one of its own.
    model = getattr(model, "_orig_mod", model)
    if forward is not None:
        yield Way("forward=", lambda inputs: forward(model, dict(inputs)), None, True)
        return
    own = has_own_forward(model)
    if own:
        for keys in _selections(model, batch):
            name = f"{type(model).__name__}.forward({', '.join(keys) if keys is not None else 'batch'})"
            if keys is None:
                yield Way(name, _as_one_argument(model), None, True)
            else:
                yield Way(name, _with_keywords(model, keys), frozenset(keys), True)
    headed = headed_models(model)
    if len(headed) > 1:
        raise ModelCallError(
            f"{type(model).__name__} holds several models with a head ({', '.join(name for name, _ in headed)}) and "
            f"{'its own forward gives no logits' if own else 'no forward of its own'}, so nobody can tell which one "
            "to explain"
        )
    for name, module in headed:
        if _makes_decoder_inputs(module, batch) and not any(key in batch for key in LABELS[:1]):
            raise ModelCallError(
                f"{name or type(module).__name__} ({type(module).__name__}) has a decoder: put labels (b, t), the ids "
                "of the text that it writes, or decoder_input_ids into the inputs"
            )
        accepted = parameter_names(module)
        # A decoder needs its labels to make its own inputs of.
        labels = () if _makes_decoder_inputs(module, batch) else LABELS
        keys = [key for key in batch if key in accepted and key not in labels + SPAN_LABELS]
        label = f"{name or type(module).__name__}({', '.join(keys)})"
        yield Way(label, _with_keywords(module, keys), frozenset(keys), False)


def unused_mask(model: nn.Module, way: Way, batch: Mapping[str, Any]) -> str | None:
    """An entry of a batch that looks like a padding mask, where the model is given none and could take one.

    Args:
        model: the user's module.
        way: how the model is called.
        batch: the batch.

    Returns:
        The entry's name, or None.
    """
    if way.passed is None or any(key.endswith("attention_mask") for key in way.passed):
        return None
    if way.own and not _can_take_more(model, way.passed):
        # It attends to padding whatever the batch holds: that is the model.
        return None
    ids = next((batch[key] for key in batch if key.endswith("input_ids")), None)
    for key, value in batch.items():
        if key in way.passed or key in LABELS or key.endswith(("token_type_ids", "special_tokens_mask")):
            continue
        if isinstance(ids, Tensor) and isinstance(value, Tensor) and value.shape == ids.shape:
            numbers = value.bool().to(value.dtype)
            if torch.equal(numbers, value) and bool((numbers == 0).any()):
                return key
    return None


def too_large(model: nn.Module, batch: Mapping[str, Any]) -> str | None:
    """What about a batch a model has no embedding for: the number of tokens, or a token's id.

    For a call that has failed: models without a table of positions take any length.

    Args:
        model: the module that was called.
        batch: the batch.

    Returns:
        The reason and what to write instead, or None.
    """
    words = [module.get_input_embeddings() for _, module in _pretrained(model) if _has_words(module)]
    vocabulary = max((table.num_embeddings for table in words if isinstance(table, nn.Embedding)), default=0)
    ids = [
        (key, value)
        for key, value in batch.items()
        if str(key).endswith("input_ids") and isinstance(value, Tensor) and value.dim() == 2 and value.numel()
    ]
    for key, value in ids:
        for name, module in _pretrained(model):
            limit = _positions(module)
            if limit is not None and value.shape[1] > limit:
                return (
                    f"{key} is {value.shape[1]} tokens long, and {name or 'the model'} ({type(module).__name__}) has "
                    f"positions for {limit} (max_position_embeddings={module.config.max_position_embeddings}): "
                    f"shorten the texts, for example tokenizer(..., truncation=True, max_length={limit})."
                )
        largest, smallest = int(value.max()), int(value.min())
        if vocabulary and (smallest < 0 or largest >= vocabulary):
            return (
                f"{key} holds the token id {smallest if smallest < 0 else largest}, and the model has embeddings for "
                f"0 to {vocabulary - 1}: take the tokenizer that the model was trained with, or "
                "model.resize_token_embeddings(len(tokenizer))."
            )
    return None


def _has_words(module: PreTrainedModel) -> bool:
    try:
        return isinstance(module.get_input_embeddings(), nn.Embedding)
    except (AttributeError, NotImplementedError):
        return False


def _positions(module: PreTrainedModel) -> int | None:
    """How many tokens a model's table of positions holds, or None where it has none."""
    size = getattr(module.config, "max_position_embeddings", None)
    for name, table in module.named_modules():
        if isinstance(table, nn.Embedding) and "position" in name.rpartition(".")[2] and table.num_embeddings == size:
            # RoBERTa counts positions from the one after its padding.
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def _as_one_argument(module: nn.Module) -> Call:
    return lambda inputs: module(dict(inputs))


def _with_keywords(module: nn.Module, keys: list[str]) -> Call:
    return lambda inputs: module(**{key: inputs[key] for key in keys})


def logits_of(output: Any, size: int | None, width: int | None = None) -> Tensor:
    """The logits in what a model returned.

    Args:
        output: a Hugging Face output, a mapping with ``logits``, a tensor, or a tuple with one tensor of logits in it.
        size: the number of examples ``b``; any when None.
        width: the size of the encoder's hidden states: a tensor without a name that is so wide holds features.

    Returns:
        (b, c), or more axes for models that decide per token.

    Raises:
        ModelCallError: there are none, or it cannot be told which they are.
    """
    named = next((found for name in _LOGITS if (found := named_in(output, name)) is not None), None)
    candidate = output if named is None and isinstance(output, Tensor) else named
    if candidate is None and isinstance(output, tuple | list):
        parts = [part for part in output if isinstance(part, Tensor) and part.dim() >= 2]
        if len(parts) > 1:
            raise ModelCallError(f"it returned {len(parts)} tensors, and nobody can tell which one holds the logits")
        candidate = parts[0] if parts else None
    if not isinstance(candidate, Tensor) or not candidate.is_floating_point() or candidate.dim() == 0:
        raise ModelCallError(f"it returned {_described(output)}, which holds no logits")
    if candidate.dim() == 1:
        # A squeezed single logit (b,), or a squeezed single example (c,).
        candidate = candidate.unsqueeze(1) if len(candidate) == size else candidate.unsqueeze(0)
    if candidate.shape[-1] == 0:
        raise ModelCallError(f"it returned {_described(candidate)}, which holds no logits")
    if len(candidate) != size:
        raise ModelCallError(f"it returned logits of shape {tuple(candidate.shape)} for {size} examples")
    if named is None and candidate.shape[-1] == width:
        raise ModelCallError(
            f"it returned {_described(candidate)}, as wide as the encoder's hidden states: features, not logits"
        )
    return candidate


def named_in(output: Any, name: str) -> Any:
    """What a model's output holds under a name, or None."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def ends_of(output: Any, batch: Mapping[str, Any], tokens: int) -> tuple[Tensor, Tensor] | None:
    """The logits of a span's starts and ends in what a model returned.

    Args:
        output: what it returned: an output with names; or the two, where the batch holds the labels of a span.
        batch: the batch.
        tokens: how many tokens ``s`` its texts have.

    Returns:
        (b, s) each, or None where there are none.
    """
    found = [named_in(output, "start_logits"), named_in(output, "end_logits")]
    if isinstance(output, tuple | list) and all(name in batch for name in SPAN_LABELS):
        found = [one for one in output if isinstance(one, Tensor) and one.dim() == 2 and one.shape[1] == tokens]
    if len(found) != 2 or not all(isinstance(one, Tensor) and one.is_floating_point() for one in found):
        return None
    return found[0], found[1]


def size_of_batch(batch: Mapping[str, Any]) -> int:
    """The number of examples: the length of the ids, else of the first tensor of several axes."""
    tensors = {key: one for key, one in batch.items() if isinstance(one, Tensor) and one.dim() >= 2}
    return len(next((one for key, one in tensors.items() if key.endswith("input_ids")), next(iter(tensors.values()))))


def has_own_forward(model: nn.Module) -> bool:
    """Whether a user wrote the module's forward: neither torch's placeholder, nor Lightning's, nor Hugging Face's."""
    owner = next((base for base in type(model).__mro__ if "forward" in vars(base)), nn.Module)
    return owner.__module__.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning", "transformers", "peft")


def _selections(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[list[str] | None]:
    """Which entries of the batch a module's own forward may want; None stands for the batch as one argument."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p for p in named if p.default is p.empty and p.name not in batch]
    if missing:
        if len(missing) == 1 and missing[0] is named[0]:
            yield None
        return
    unnamed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    if len(unnamed) == 1 and not named:
        yield None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        # Without labels first: with them, Hugging Face models compute a loss and write into their configuration.
        unlabeled = [key for key in batch if key not in LABELS + SPAN_LABELS]
        yield unlabeled
        if len(unlabeled) < len(batch):
            yield list(batch)
        accepted = {name for _, module in _pretrained(model) for name in parameter_names(module)}
        known = [key for key in unlabeled if key in accepted]
        if known and len(known) < len(unlabeled):
            yield known
    elif named:
        yield [p.name for p in named if p.name in batch]


def _pretrained(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]


def headed_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost Hugging Face models with a head in a module, by their paths; of several the one that is trained."""
    headed: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in _pretrained(model) if module.base_model is not module or _is_own_head(module)
    ]
    # A PEFT model must be called itself: prompts are added in its own forward.
    headed += [(name, module) for name, module in model.named_modules() if _peft_base(module) is not None]
    outermost = [
        (name, module)
        for name, module in headed
        if not any(name != other and (other == "" or name.startswith(other + ".")) for other, _ in headed)
    ]
    # A teacher is frozen.
    trained = [one for one in outermost if any(parameter.requires_grad for parameter in one[1].parameters())]
    return trained if len(trained) == 1 else outermost


def _makes_decoder_inputs(module: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a model makes the inputs of its decoder of the labels, and is given no others."""
    generates = isinstance(module, PreTrainedModel) and _writes(module)
    given = any(key in batch for key in ("decoder_input_ids", "decoder_inputs_embeds"))
    return generates and not given and bool(getattr(module.config, "is_encoder_decoder", False))


def _writes(module: PreTrainedModel) -> bool:
    """Whether a model ends in logits of words."""
    try:
        return isinstance(module.get_output_embeddings(), nn.Module)
    except (AttributeError, NotImplementedError):
        return False


def _can_take_more(model: nn.Module, passed: frozenset[str]) -> bool:
    """Whether a forward has parameters that it was not given."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters.values()
    return any(p.kind is not p.KEYWORD_ONLY and p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters) or any(
        p.name not in passed and p.name not in LABELS for p in parameters
    )


def _is_own_head(module: PreTrainedModel) -> bool:
    """Whether a model has a head though its class calls none of its parts the base.

    Those that write words, those that compare two towers, and users' classes that hold a Hugging Face model.
    """
    if _writes(module) or hasattr(module, "logit_scale"):
        return True
    return not type(module).__module__.startswith("transformers.") and len(_pretrained(module)) > 1


def _peft_base(module: nn.Module) -> nn.Module | None:
    """The model inside a PEFT model, if it has a head."""
    get_base_model = getattr(module, "get_base_model", None)
    if type(module).__module__.partition(".")[0] != "peft" or not callable(get_base_model):
        return None
    base = get_base_model()
    return base if isinstance(base, PreTrainedModel) and base.base_model is not base else None


def parameter_names(module: nn.Module) -> set[str]:
    """The names of what a module's forward takes."""
    module = _peft_base(module) or module
    return {p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD}


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)} and type {output.dtype}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output)) or 'nothing in it'}"
    return f"a {type(output).__name__}"
