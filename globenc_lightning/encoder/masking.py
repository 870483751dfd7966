"""Masks tokens inside one call of an encoder: what a step does with its batch around that call stays as it is.

Axes: ``b`` text of the encoder's call, ``s`` token.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from globenc_lightning.encoder.torch_modules import Chain, is_torch_encoder
from globenc_lightning.errors import MaskingError


@dataclass(frozen=True, eq=False)
class CallOfEncoder:
    """Which call of an encoder is meant, and what it was seen to be given.

    Attributes:
        model: the model that is run.
        encoder: the encoder in it.
        number: which of this encoder's calls in a forward pass, from 0.
        ids: (b, s) the token ids of that call.
    """

    model: nn.Module
    encoder: nn.Module
    number: int
    ids: Tensor


def by_token_id(call: CallOfEncoder, mask_id: int | None) -> bool:
    """Returns whether tokens can be masked by another id: the encoder has an embedding for it."""
    return mask_id is not None and 0 <= mask_id < max(_sizes(call), default=mask_id + 1)


@contextmanager
def tokens_masked(call: CallOfEncoder, where: Tensor, mask_id: int | None) -> Iterator[None]:
    """Mask tokens in a call of an encoder, in each forward pass inside: one at a time.

    Args:
        call: the call.
        where: (b, s) which tokens are masked.
        mask_id: the id that stands in their place; when None, no token may attend to them.

    Raises:
        MaskingError: the call is given other ids than it was seen to be given, or nothing that can be masked.
    """
    kind: type[_InTorch | _InCall] = _InTorch if is_torch_encoder(call.encoder) else _InCall
    masked = kind(call, where, mask_id)
    undo = masked.begin()
    try:
        yield
        if not masked.is_done:
            raise MaskingError("the forward pass calls the encoder in another way than when it was analysed")
    finally:
        for one in undo:
            one()


class _InCall:
    """Masks tokens among the arguments of an encoder's call.

    Attributes:
        is_done: whether the call has come.
    """

    def __init__(self, call: CallOfEncoder, where: Tensor, mask_id: int | None) -> None:
        self.is_done = False
        self._call = call
        self._where = where
        self._mask_id = mask_id
        self._count = 0

    def begin(self) -> list[Callable[[], None]]:
        """Put a forward in the place of the encoder's own; returns what takes it back.

        It is called as ``encoder(...)`` and as ``encoder.forward(...)``. A hook would not see the latter.
        """
        forward, attributes = self._call.encoder.forward, vars(self._call.encoder)
        before = attributes.get("forward")

        @wraps(forward)
        def instead(*args: Any, **kwargs: Any) -> Any:
            return self._run(forward, args, kwargs)

        def restore() -> None:
            if before is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = before

        attributes["forward"] = instead
        return [restore]

    def _run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, self._count = self._count, self._count + 1
        if number != self._call.number:
            return forward(*args, **kwargs)
        names = inspect.signature(forward).parameters
        ids = _argument(names, "input_ids", args, kwargs)
        if not isinstance(ids, Tensor) or not _are_same(ids, self._call.ids):
            raise MaskingError("the encoder is called with other token ids than when it was analysed")
        where = self._where.to(ids.device)
        if self._mask_id is not None:
            args, kwargs = _with(names, "input_ids", ids.masked_fill(where, self._mask_id), args, kwargs)
        else:
            if "attention_mask" not in names:
                raise MaskingError("the encoder takes no attention mask, and no tokenizer with a mask token is known")
            told = _argument(names, "attention_mask", args, kwargs)
            args, kwargs = _with(names, "attention_mask", without_tokens(told, where), args, kwargs)
        self.is_done = True
        return forward(*args, **kwargs)


class _InTorch:
    """Masks tokens where they reach an encoder of torch's own modules: in embeddings, or in its attention.

    Attributes:
        is_done: whether they have come.
    """

    def __init__(self, call: CallOfEncoder, where: Tensor, mask_id: int | None) -> None:
        self.is_done = False
        self._call = call
        self._where = where
        self._mask_id = mask_id
        self._ended = 0

    def begin(self) -> list[Callable[[], None]]:
        """Register the hooks; returns what takes them back."""
        return [handle.remove for handle in self._watch()]

    def _watch(self) -> list[RemovableHandle]:
        encoder = self._call.encoder
        if Chain.fits(encoder):
            chain = Chain(encoder, _nothing, self._leave)
            handles = [*chain.watch_entry(), *chain.watch_exit()]
        else:
            handles = [encoder.register_forward_hook(self._leave, with_kwargs=True)]
        if self._mask_id is not None:
            tables = {id(one): one for one in self._call.model.modules() if isinstance(one, nn.Embedding)}
            return handles + [one.register_forward_pre_hook(self._look, with_kwargs=True) for one in tables.values()]
        inside = {id(one): one for one in encoder.modules() if isinstance(one, nn.MultiheadAttention)}
        return handles + [one.register_forward_pre_hook(self._attend, with_kwargs=True) for one in inside.values()]

    def _leave(self, *_: Any) -> None:
        self._ended += 1

    def _look(self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs.get("input")
        if self._ended != self._call.number or not isinstance(ids, Tensor) or self._mask_id is None:
            return None
        if ids.dim() != 2 or ids.is_floating_point() or module.num_embeddings <= self._mask_id:
            return None
        where = self._where.to(ids.device)
        if _are_same(ids, self._call.ids):
            masked = ids.masked_fill(where, self._mask_id)
        elif _are_same(ids.t(), self._call.ids):
            masked = ids.masked_fill(where.t(), self._mask_id)
        else:
            return None
        self.is_done = True
        return ((masked, *args[1:]), kwargs) if args else (args, {**kwargs, "input": masked})

    def _attend(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = inspect.signature(module.forward).parameters
        query = _argument(names, "query", args, kwargs)
        if self._ended != self._call.number or not isinstance(query, Tensor):
            return None
        shape = tuple(query.shape[:2] if module.batch_first else query.shape[1::-1])
        if query.dim() != 3 or shape != tuple(self._where.shape):
            raise MaskingError("the encoder's attention is given something else than its texts")
        where, told = self._where.to(query.device), _argument(names, "key_padding_mask", args, kwargs)
        if told is None:
            padding = where
        elif told.dtype == torch.bool:
            padding = told | where
        else:
            padding = told.masked_fill(where, float("-inf"))
        self.is_done = True
        return _with(names, "key_padding_mask", padding, args, kwargs)


def without_tokens(told: Any, where: Tensor) -> Tensor:
    """Returns an attention mask in which no token may attend to some.

    Args:
        told: (b, s) 1 or true for tokens that are attended to; (b, q, k) or (b, h or 1, q, k) the same, or what is
            added to the scores; everything is attended to when None.
        where: (b, s) the tokens.

    Raises:
        MaskingError: the mask has another form.
    """
    if told is None:
        return (~where).long()
    if not isinstance(told, Tensor) or not 2 <= told.dim() <= 4 or told.shape[-1] != where.shape[1]:
        raise MaskingError("the encoder's attention mask has a form in which no token can be masked")
    additive = told.is_floating_point() and told.dim() > 2 and not bool((told > 0).any())
    hidden = where.view(len(where), *(1,) * (told.dim() - 2), -1)
    value = torch.finfo(told.dtype).min if additive else 0
    return told.masked_fill(hidden, value) if len(told) == len(where) else torch.where(hidden, value, told)


def _argument(names: Mapping[str, Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An argument of a call by its name, or None."""
    if name in kwargs:
        return kwargs[name]
    place = list(names).index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def _with(
    names: Mapping[str, Any], name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with another value for one."""
    place = list(names).index(name) if name in names else len(args)
    if name not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _are_same(given: Tensor, seen: Tensor) -> bool:
    return given.shape == seen.shape and bool(torch.equal(given, seen.to(given)))


def _sizes(call: CallOfEncoder) -> Iterator[int]:
    """How many ids the embeddings know that an encoder's ids may be looked up in."""
    if is_torch_encoder(call.encoder):
        yield from (one.num_embeddings for one in call.model.modules() if isinstance(one, nn.Embedding))
        return
    try:
        table = call.encoder.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    number = getattr(table, "num_embeddings", None)
    if isinstance(number, int):
        yield number


def _nothing(*_: Any) -> None:
    """Where there is nothing to do."""
