"""Encoders built of torch's own modules: where they are in a model, and when the forward pass is inside one of them.

Three kinds: ``nn.TransformerEncoder``; the blocks of an ``nn.ModuleList`` or ``nn.Sequential`` that hold an
``nn.MultiheadAttention`` each, called one after the other, which together are an encoder that may have no call of its
own; and any other module around an ``nn.MultiheadAttention``.

Axes: ``b`` example, ``s`` token, ``d`` hidden.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from globenc_lightning.encoder import multihead
from globenc_lightning.encoder.checks import brought_home
from globenc_lightning.encoder.recording import tensors_in

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_DECODERS = (nn.TransformerDecoder, nn.TransformerDecoderLayer)


def torch_encoders(model: nn.Module) -> list[dict[str, nn.Module]]:
    """What may be meant by the encoders of a module that holds none of transformers' models, the likeliest first.

    Args:
        model: the module.

    Returns:
        The choices, each by path; none where no attention of torch's own modules is in it, but for decoders'.
    """
    named = dict(model.named_modules())
    whole = _outermost({path: one for path, one in named.items() if isinstance(one, nn.TransformerEncoder)})
    if whole:
        return [whole]
    foreign = [path for path, one in named.items() if isinstance(one, (PreTrainedModel, *_DECODERS))]
    paths = [
        path
        for path, one in named.items()
        if isinstance(one, nn.MultiheadAttention) and not any(_is_within(path, other) for other in foreign)
    ]
    # One block of a list is no encoder of its own.
    lists = {path: next((above for above in _above(path) if _blocks(named[above])), path) for path in paths}
    whole = {found: named[found] for path, found in lists.items() if found != path}
    choices = [_outermost(whole)] if whole else []
    # From the module that holds the attention to the model itself.
    levels = list(dict.fromkeys(tuple(_above(found)) for found in lists.values()))
    for level in range(max(map(len, levels), default=0)):
        around = {above[level]: named[above[level]] for above in levels if level < len(above)}
        around = _outermost({path: one for path, one in around.items() if not isinstance(one, _CONTAINERS)})
        if around and all(list(around) != list(other) for other in choices):
            choices.append(around)
    return choices


def holder_of(weight: Tensor, encoder: nn.Module) -> tuple[str, nn.Module] | None:
    """The module in an encoder whose weight is a certain one, with its path; None where there is none."""
    same = []
    for path, module in encoder.named_modules():
        own = getattr(module, "weight", None)
        if own is weight:
            return path, module
        # A weight that is computed is a new tensor each time.
        if isinstance(own, Tensor) and own.shape == weight.shape and torch.equal(own, weight):
            same.append((path, module))
    return next(iter(same), None)


def parts_called(encoder: nn.Module) -> list[nn.Module]:
    """The modules whose calls are an encoder's: itself, or the blocks of a list that nothing calls as a whole."""
    return _distinct(_blocks(encoder)) or [encoder]


def is_torch_encoder(encoder: nn.Module) -> bool:
    """Whether an encoder is of torch's own attention modules."""
    inside = list(encoder.modules())
    return any(isinstance(one, nn.MultiheadAttention) for one in inside) and not any(
        isinstance(one, PreTrainedModel) for one in inside
    )


def why_none(model: nn.Module) -> str:
    """Why a model has no encoder that is known here, as the end of a sentence; empty if nothing is known."""
    if any(isinstance(one, _DECODERS) for one in model.modules()):
        return (
            " Its nn.TransformerDecoder attends to another sequence beside its own (cross-attention), which the "
            "decomposition does not know; a model without a second sequence is an nn.TransformerEncoder with a causal "
            "mask."
        )
    return ""


def advice_on(encoders: Mapping[str, nn.Module]) -> str:
    """What to write where encoders of torch's own modules could not be read; empty where they have a usual form."""
    usual = all(isinstance(one, nn.TransformerEncoder) or _blocks(one) for one in encoders.values())
    if usual or not all(is_torch_encoder(one) for one in encoders.values()):
        return ""
    return (
        "Attention of torch's own modules is read in an nn.TransformerEncoder, in the blocks of an nn.ModuleList, or "
        "in a module of its own that takes hidden states and returns those of its last layer."
    )


def zeros_at_padding(encoder: nn.Module) -> bool:
    """Whether an encoder may give zeros at padding in evaluation, and something else where it is trained."""
    return isinstance(encoder, nn.TransformerEncoder) and bool(getattr(encoder, "use_nested_tensor", False))


def _blocks(container: nn.Module) -> list[nn.Module]:
    """The modules of a list that hold an attention each, if all that do not stand before or after them."""
    if not isinstance(container, _CONTAINERS):
        return []
    children = list(container)
    holds = [any(isinstance(one, nn.MultiheadAttention) for one in child.modules()) for child in children]
    chosen = [place for place, held in enumerate(holds) if held]
    if not chosen or chosen != list(range(chosen[0], chosen[-1] + 1)):
        return []
    blocks = [children[place] for place in chosen]
    # An attention itself is a part of a block, and a list has no call of its own.
    return [] if any(isinstance(one, (nn.MultiheadAttention, nn.ModuleList)) for one in blocks) else blocks


def _above(path: str) -> Iterable[str]:
    """The paths of the modules around a module, the innermost first, the model itself last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _is_within(path: str, other: str) -> bool:
    return other == "" or path == other or path.startswith(other + ".")


def _outermost(found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        path: one
        for path, one in found.items()
        if not any(path != other and _is_within(path, other) for other in found)
    }


# ---- calls of an encoder


class Chain:
    """Reports each run through the blocks of an encoder that nothing calls as a whole.

    Args:
        encoder: the list of blocks.
        entered: called with the encoder and the arguments of the first block.
        left: called with the encoder, the arguments of the last block and what this returned; may return what the
            forward is to go on with instead.
        closing: the norm that follows the blocks and belongs to the encoder: its output is the encoder's.

    Attributes:
        is_open: whether a run has begun and not ended.
    """

    def __init__(
        self,
        encoder: nn.Module,
        entered: Callable[..., Any],
        left: Callable[..., Any],
        closing: nn.Module | None = None,
    ) -> None:
        self.is_open = False
        self._encoder = encoder
        self._blocks = _blocks(encoder)
        self._entered = entered
        self._left = left
        self._closing = closing
        self._count = 0

    @staticmethod
    def fits(encoder: nn.Module) -> bool:
        """Whether an encoder is a list of blocks."""
        return bool(_blocks(encoder))

    def watch_entry(self) -> list[RemovableHandle]:
        """Register what sees a run begin, before other hooks of the blocks."""
        return [one.register_forward_pre_hook(self._enter, with_kwargs=True) for one in _distinct(self._blocks)]

    def watch_exit(self) -> list[RemovableHandle]:
        """Register what sees a run end, after other hooks of the blocks."""
        handles = [one.register_forward_hook(self._leave, with_kwargs=True) for one in _distinct(self._blocks)]
        if self._closing is not None:
            handles.append(self._closing.register_forward_hook(self._close, with_kwargs=True))
        return handles

    def unfinished(self) -> str:
        """What is to be said of a run that never ended; empty where all did."""
        if not self.is_open:
            return ""
        return f"its forward pass calls {self._count} of its {len(self._blocks)} blocks"

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_open:
            return None
        self.is_open, self._count = True, 0
        return self._entered(self._encoder, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._count += 1
        if self._count < len(self._blocks) or self._closing is not None:
            return None
        self.is_open = False
        return self._left(self._encoder, args, kwargs, output)

    def _close(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.is_open or self._count < len(self._blocks):
            return None
        self.is_open = False
        return self._left(self._encoder, args, kwargs, output)


def final_norms(model: nn.Module, encoder: nn.Module) -> dict[str, nn.Module]:
    """The modules outside of an encoder that may be a norm over its hidden states, by path."""
    inside = {id(one) for one in encoder.modules()}
    return {
        path: one
        for path, one in model.named_modules()
        if id(one) not in inside
        and not any(True for _ in one.children())
        and any(True for _ in one.parameters(recurse=False))
        and all(parameter.dim() == 1 for parameter in one.parameters(recurse=False))
    }


def is_sequence_first(encoder: nn.Module) -> bool:
    """Whether the attention modules of an encoder take (s, b, d)."""
    return any(isinstance(one, nn.MultiheadAttention) and not one.batch_first for one in encoder.modules())


def by_example(value: Any, changed: Callable[[Tensor], bool]) -> tuple[Any, Any]:
    """What a module returned with (b, s, d) in place of (s, b, d), and what the forward is to go on with.

    The latter has the same numbers at the same places in memory, and the former lies between it and what came before
    in the autograd graph, so that there is a gradient with respect to it.

    Args:
        value: a tensor, or tensors in tuples, lists and mappings.
        changed: which tensors are (s, b, d).

    Returns:
        Both, of the form of ``value``; None for the latter where nothing is to change.
    """
    if not any(changed(tensor) for tensor in tensors_in(value)):
        return value, None
    return _turned(value, changed)


def _turned(value: Any, changed: Callable[[Tensor], bool]) -> tuple[Any, Any]:
    if isinstance(value, Tensor):
        if not changed(value):
            return value, value
        turned = value.transpose(0, 1)
        return turned, turned.transpose(0, 1)
    if type(value) in (tuple, list):
        parts = [_turned(one, changed) for one in value]
        return type(value)(one for one, _ in parts), type(value)(one for _, one in parts)
    if type(value) is dict:
        both = {key: _turned(one, changed) for key, one in value.items()}
        return {key: one for key, (one, _) in both.items()}, {key: one for key, (_, one) in both.items()}
    return value, value


# ---- what an encoder is called with


class _Looked(NamedTuple):
    """A call of an embedding: the ids, how many it knows, and the embedding."""

    ids: Tensor
    size: int
    table: nn.Module


class GivenTokens:
    """Notes the ids and the padding that reach encoders of torch's own modules, which are given neither by name.

    Args:
        model: the module that is called.
        encoders: its encoders.
    """

    def __init__(self, model: nn.Module, encoders: Iterable[nn.Module]) -> None:
        self._model = model
        self._encoders = [one for one in encoders if is_torch_encoder(one)]
        self._looked: list[_Looked] = []
        self._real: list[Tensor | None] = []

    def watch(self, hook: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None) -> list[RemovableHandle]:
        """Register the hooks.

        Args:
            hook: what is made of each before it is registered, if anything.
        """
        if not self._encoders:
            return []
        hook = hook or _as_it_is
        tables = [one for one in self._model.modules() if isinstance(one, nn.Embedding)]
        attention = [
            one for encoder in self._encoders for one in encoder.modules() if isinstance(one, nn.MultiheadAttention)
        ]
        return [
            *(one.register_forward_hook(hook(self._look), with_kwargs=True) for one in _distinct(tables)),
            *(one.register_forward_pre_hook(hook(self._attend), with_kwargs=True) for one in _distinct(attention)),
        ]

    def take(self, shape: tuple[int, int], sequence_first: bool) -> tuple[Tensor | None, Tensor | None]:
        """The ids (b, s) that led to an encoder's call, on the CPU, and which are real; None where that is not told.

        To be called after each call of an encoder.

        Args:
            shape: b and s.
            sequence_first: whether the encoder takes (s, b, d).
        """
        looked, self._looked = self._looked, []
        reals, self._real = self._real, []
        real = reals[0] if reals else None
        real = real if real is not None and tuple(real.shape) == shape else None
        return _ids(looked, shape, sequence_first), real

    def _look(self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else kwargs.get("input")
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            # A copy: what follows may write into it.
            self._looked.append(_Looked(ids.detach().clone(), module.num_embeddings, module))

    def _attend(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value", "padding", "weights", "mask"), args, strict=False))
        query = given.get("query", kwargs.get("query"))
        keys = given.get("key", kwargs.get("key"))
        if not isinstance(query, Tensor) or not isinstance(keys, Tensor) or query.dim() != 3:
            return
        padding = given.get("padding", kwargs.get("key_padding_mask"))
        mask = given.get("mask", kwargs.get("attn_mask"))
        keys = keys.transpose(0, 1) if module.batch_first else keys
        real = multihead.real_tokens(padding, mask, keys, query.shape[0 if module.batch_first else 1])
        self._real.append(None if real is None else real.clone())


def _ids(looked: list[_Looked], shape: tuple[int, int], sequence_first: bool) -> Tensor | None:
    """The token ids (b, s) among what embeddings were given, or None where several may be meant."""
    b, s = shape
    if b == s and sequence_first:
        # Which axis is which cannot be told.
        return None
    # They are compared on the CPU: one look at a device, however many tables there are.
    home = brought_home([one.ids for one in looked])
    turned = [ids.t() if tuple(ids.shape) != shape else ids for ids in home]
    found = [one._replace(ids=ids) for one, ids in zip(looked, turned, strict=True) if tuple(ids.shape) == shape]
    found = [one for one in found if not _are_places(one.ids)] or found
    largest = max((one.size for one in found), default=0)
    found = [one for one in found if one.size == largest]
    if not found or any(one.table is not found[0].table or not torch.equal(one.ids, found[0].ids) for one in found):
        return None
    return found[0].ids


def _as_it_is(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


def _are_places(ids: Tensor) -> bool:
    """Whether ids are the places of tokens, one after the other in every row."""
    return bool((ids.diff(dim=1) == 1).all()) and bool((ids == ids[:1]).all())


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(one): one for one in modules}.values())
