"""``F.multi_head_attention_forward``, run so that the functions it calls are seen, and what its arguments tell.

``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` compute in it. A ``TorchFunctionMode`` sees the function as
a whole, but not what happens inside it; and its output projection is no module's call, so that no hook sees that.

Axes: ``b`` example, ``q`` token that receives, ``k`` token that is attended to, ``d`` hidden.
"""

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FUNCTION: Callable[..., Any] = F.multi_head_attention_forward
_ASKS = "has_torch_function"
"""The name by which the function asks whether somebody wants to see it instead of what it calls."""
MASKED = -1e3
"""What is added to a score that is to count nothing is smaller."""


class Projected(NamedTuple):
    """What the function tells of its attention beside probabilities and values.

    Attributes:
        weight: the output projection's, the very tensor that it was called with.
        output: (b, q, d) what it returned, in the autograd graph.
        real: (b, k) true for tokens that its masks leave to be attended to; None where they do not tell it.
        refusal: why the attention cannot be decomposed; empty where it can.
    """

    weight: Tensor
    output: Tensor
    real: Tensor | None
    refusal: str


def run(mode: TorchFunctionMode, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the function's own code, so that a mode sees the functions that it calls.

    Args:
        mode: the mode.
        args: the function's positional arguments.
        kwargs: its keyword arguments.

    Returns:
        What it returned; the same to the bit as without.
    """
    code = getattr(FUNCTION, "__code__", None)
    if not isinstance(FUNCTION, FunctionType) or code is None or _ASKS not in code.co_names:
        return FUNCTION(*args, **kwargs)
    # Asked whether a mode wants the whole function, it is to go on to what it calls.
    own = FunctionType(
        code,
        {**FUNCTION.__globals__, _ASKS: lambda *_: False},
        FUNCTION.__name__,
        FUNCTION.__defaults__,
        FUNCTION.__closure__,
    )
    own.__kwdefaults__ = FUNCTION.__kwdefaults__
    with mode:
        return own(*args, **kwargs)


def heads_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of heads that the function is called for."""
    return int(_arguments(args, kwargs)["num_heads"])


def projected(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Projected:
    """What a call of the function tells.

    Args:
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: what it returned.
    """
    given = _arguments(args, kwargs)
    query, output = given["query"], result[0]
    tokens_first = output if output.dim() == 3 else output.unsqueeze(1)
    real = real_tokens(given["key_padding_mask"], given["attn_mask"], given["key"], tokens_first.shape[1])
    reason = ""
    if query.dim() != 3:
        reason = "it is called with one sequence and no axis of examples; give it tensors of three axes"
    elif given["use_separate_proj_weight"]:
        reason = "its keys or values are of another width than its queries (kdim, vdim): it attends to something else"
    elif given["bias_k"] is not None:
        reason = "it attends to a learned token beside those of the sequence (add_bias_kv)"
    elif given["add_zero_attn"]:
        reason = "it attends to a token of zeros beside those of the sequence (add_zero_attn)"
    elif given["static_k"] is not None or given["static_v"] is not None:
        reason = "its keys or values are given (static_k, static_v), not computed from the sequence"
    elif given["key"].shape[0] != query.shape[0]:
        reason = f"{query.shape[0]} tokens attend to {given['key'].shape[0]} of another sequence (cross-attention)"
    return Projected(given["out_proj_weight"], tokens_first.transpose(0, 1), real, reason)


def real_tokens(padding: Tensor | None, mask: Tensor | None, keys: Tensor, examples: int) -> Tensor | None:
    """Which tokens the masks of a multi-head attention leave to be attended to.

    Args:
        padding: its ``key_padding_mask`` (b, k), true or minus infinity at padding; (k,) of one sequence; or None.
        mask: its ``attn_mask``, (q, k), or (b * h, q, k) with one for each example and head; or None.
        keys: (k, ...) what is attended to.
        examples: how many examples there are.

    Returns:
        (b, k); None where only a mask of three axes tells it.
    """
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
        return padding > MASKED if padding.is_floating_point() else ~padding.bool()
    return None if mask is not None and mask.dim() == 3 else keys.new_ones(examples, len(keys)).bool()


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    bound = inspect.signature(FUNCTION).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
