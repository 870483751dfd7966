"""Attention probabilities and values of every attention call, seen from outside the model.

A ``TorchFunctionMode`` sees each torch function that the forward calls in its own thread. It changes no argument and
no result, so the model's outputs stay bit-identical, and it needs no access to the model, its config or its masks.

Axes: ``b`` example, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``v`` head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from globenc_lightning.encoder import multihead
from globenc_lightning.encoder.tape import Tape
from globenc_lightning.functional.attribution import chunks
from globenc_lightning.functional.devices import chunk_of

_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
_PRODUCT = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__)
# What eager attention code may do to the probabilities, in eval mode, before it multiplies them with the values.
_SAME = frozenset(
    {"bfloat16", "clone", "contiguous", "double", "dropout", "float", "half", "reshape", "to", "type_as", "view"}
)


class AttentionCall(NamedTuple):
    """One attention call of a forward pass.

    Attributes:
        probabilities: (b, h, q, k) detached.
        values: (b, h, k, v), as the model computed them: still in the autograd graph, key-value heads not repeated.
        context: (b, h, q, v) what the model itself made of them, detached.
        projected: what else is known of an attention that projects its output itself; None of any other.
        tape: the torch functions that follow, where they are noted.
    """

    probabilities: Tensor
    values: Tensor
    context: Tensor
    projected: multihead.Projected | None = None
    tape: Tape | None = None

    def repeated_values(self) -> Tensor:
        """The values with one head per query head, (b, h, k, v), detached."""
        groups = self.probabilities.shape[1] // self.values.shape[1]
        values = self.values.detach()
        return values if groups == 1 else values.repeat_interleave(groups, 1)


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    out: Tensor | None = None,
    unseen: Tensor | None = None,
) -> Tensor:
    """The probabilities inside ``F.scaled_dot_product_attention``, outside the autograd graph.

    Args:
        query: (b, h, q, v).
        key: (b, h or fewer, k, v); fewer heads are shared by groups of query heads.
        attn_mask: broadcastable to (b, h, q, k): boolean, or added to the scores.
        is_causal: whether tokens see only what comes before them.
        scale: what the scores are multiplied by; one over the square root of the head width when None.
        out: (b, h, q, k) to write them into; allocated when None, or when it does not fit.
        unseen: the opposite of a boolean ``attn_mask``, where it is known.

    Returns:
        (b, h, q, k).
    """
    with torch.no_grad():
        # Kernels for half precision compute the softmax in float32.
        precision = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(precision), key.to(precision)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key = key.repeat_interleave(groups, 1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        key = key.transpose(-2, -1)
        b, h, q, k = *query.shape[:3], key.shape[-1]
        seen = torch.ones(q, k, dtype=torch.bool, device=query.device).tril() if is_causal else None
        hidden = attn_mask is not None and attn_mask.dtype == torch.bool
        mask = attn_mask if attn_mask is None or not hidden else (~attn_mask if unseen is None else unseen)
        mask = None if mask is None else mask.broadcast_to(b, h, q, k)
        fits = out is not None and (out.shape, out.dtype, out.device) == ((b, h, q, k), query.dtype, query.device)
        probabilities = out if out is not None and fits else query.new_empty(b, h, q, k)
        one = query.device.type == "cpu"
        if not one:
            # Side by side in memory, as the product wants them.
            query = torch.mul(query, scale, out=query.new_empty(query.shape))
        most = chunk_of(query.device)
        room: Tensor | None = None
        # A few heads at a time, so that the scores stay in the cache until they are probabilities.
        for part in chunks(b, h, q * k, min(most, h * q * k) if one else most):
            if one:
                # Of one example: its heads are multiplied where they lie.
                some = query[part].squeeze(0)
                room = some.new_empty(len(some), q, k) if room is None else room
                scores = room[: len(some)].baddbmm_(some, key[part].squeeze(0), beta=0, alpha=scale).unsqueeze(0)
            else:
                scores = torch.matmul(query[part], key[part])
            if seen is not None:
                scores.masked_fill_(~seen, float("-inf"))
            if mask is not None and hidden:
                scores.masked_fill_(mask[part], float("-inf"))
            elif mask is not None:
                scores += mask[part]
            torch.softmax(scores, -1, out=probabilities[part])
        return probabilities


class AttentionTrace(TorchFunctionMode):
    """Reports every attention call of the forward passes that run inside it.

    Args:
        report: called with each :class:`AttentionCall`, in call order.
        inside: whether the attention inside ``F.multi_head_attention_forward`` counts. That of transformers' models
            pools what their layers gave.
        tapes: whether the functions after each attention call are noted, see :class:`~.tape.Tape`.
    """

    def __init__(self, report: Callable[[AttentionCall], None], *, inside: bool = False, tapes: bool = False) -> None:
        super().__init__()
        self._report = report
        self._inside = inside
        self._tapes = tapes
        self._tape: Tape | None = None
        self._heads: int | None = None
        self._ours: Tensor | None = None
        self._spare: Tensor | None = None
        self._pending: tuple[Tensor, list[Tensor]] | None = None
        self._mask: tuple[Tensor, int, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function as it is, then look at what it was."""
        kwargs = kwargs or {}
        if func is multihead.FUNCTION and self._inside:
            return self._multihead(args, kwargs)
        noted = self._tape is not None and self._tape.is_open
        result = self._tape.run(func, args, kwargs) if noted and self._tape is not None else func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._fused(result, *args, **kwargs)
        elif func in _SOFTMAX:
            self._softmax(result, *args, **kwargs)
        elif self._pending is not None and args:
            if func in _PRODUCT:
                self._product(args[0], args[1] if len(args) > 1 else next(iter(kwargs.values())), result)
            elif getattr(func, "__name__", "") in _SAME and self._is_pending(args[0]):
                self._pending[1].append(result)
        return result

    def give_back(self, call: AttentionCall) -> None:
        """Say that nobody looks at a call's probabilities any more: the next call's may take their place in memory.

        Fresh memory costs as much as what is computed in it. Only what was computed here is used again: eager
        probabilities are the model's own.
        """
        if call.probabilities is self._ours:
            self._ours, self._spare = None, call.probabilities

    def _multihead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Report the attention in a call of ``F.multi_head_attention_forward`` with what else this tells."""
        report = self._report
        found: list[AttentionCall] = []
        self._report, self._heads = found.append, multihead.heads_of(args, kwargs)
        try:
            result = multihead.run(self, args, kwargs)
        finally:
            self._report, self._heads, self._pending = report, None, None
        told = multihead.projected(args, kwargs, result)
        for call in found:
            report(call._replace(projected=told))
        return result

    def _fused(
        self,
        result: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.dim() == 4:
            probabilities = attention_probabilities(
                query, key, attn_mask, is_causal, scale, self._spare, self._unseen(attn_mask)
            )
            self._ours, self._spare = probabilities, None
            self._report(AttentionCall(probabilities, value, result.detach(), tape=self._started(result)))

    def _unseen(self, mask: Tensor | None) -> Tensor | None:
        """The opposite of a boolean mask, made once for the layers that are given the same."""
        if mask is None or mask.dtype != torch.bool or mask.is_inference():
            return None
        if self._mask is None or self._mask[0] is not mask or self._mask[1] != mask._version:
            self._mask = (mask, mask._version, ~mask)
        return self._mask[2]

    def _softmax(self, result: Tensor, *args: Any, **kwargs: Any) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        # The tensor is kept, so that nothing else can take its place in memory while we wait for the product.
        if result.dim() in (3, 4) and dim in (-1, result.dim() - 1):
            self._pending = (result.detach(), [result])

    def _is_pending(self, tensor: Any) -> bool:
        if self._pending is None or not isinstance(tensor, Tensor):
            return False
        return any(
            tensor.data_ptr() == same.data_ptr() and tensor.numel() == same.numel() and tensor.dtype == same.dtype
            for same in self._pending[1]
        )

    def _product(self, left: Any, right: Tensor, result: Tensor) -> None:
        if not self._is_pending(left) or self._pending is None:
            return
        # Many models make the softmax in float32 and multiply in what they were given, which may be float64.
        probabilities = self._pending[0].to(torch.promote_types(self._pending[0].dtype, right.dtype))
        # Of probabilities with examples and heads on one axis, a view on the way to the product tells the heads (XGLM).
        heads = self._heads or next((same.shape[1] for same in self._pending[1] if same.dim() == 4), None)
        self._pending = None
        if probabilities.dim() == 3:
            # (b * h, q, k), and the values (b * h, k, v): any other softmax of three axes is no attention.
            fits = isinstance(right, Tensor) and right.dim() == 3 and len(right) == len(probabilities)
            if heads is None or not fits or len(probabilities) % heads:
                return
            probabilities = probabilities.reshape(-1, heads, *probabilities.shape[-2:])
        b, h, q, k = probabilities.shape
        if right.numel() % (b * k) == 0 and right.shape[-2] == k:
            values = right.reshape(b, -1, k, right.shape[-1])
            context = result.detach().reshape(b, h, q, -1)
            self._report(AttentionCall(probabilities, values, context, tape=self._started(result)))

    def _started(self, result: Tensor) -> Tape | None:
        """A tape of what follows an attention call, where one is wanted; it ends the one before."""
        if not self._tapes:
            return None
        if self._tape is not None and self._tape.is_open:
            self._tape.stop()
        self._tape = Tape(result)
        return self._tape
