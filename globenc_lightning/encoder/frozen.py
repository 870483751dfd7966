"""A network made linear at what it is given: attention, norms' statistics and the slopes of activations held fixed.

DecompX (Modarressi et al., ACL 2023) splits each vector of a network into what the input tokens contribute to it. Its
rules make of the network, for one input, a linear one plus biases: gradient x input through it gives the same numbers,
without the vectors. The mode here runs the model's own code. Every value is the model's own, to the last bit; what it
changes is where gradients go:

- attention probabilities are held fixed, so the gradient goes to the values alone;
- a norm divides by the standard deviation that it really had, as do quotients of any kind;
- an activation ``f`` is ``f(0) + slope * z`` with its slope held fixed;
- where two vectors are multiplied, the one that comes from an activation (a gate) is held fixed. That covers norms,
  attention and activations that are written out, and gated feed-forward networks.

So every function becomes affine in what depends on the hidden states. What it adds that does not (biases, constants)
is noted, with the gradient that comes back to it: of a network that really is affine,

    score = sum of gradient x hidden states + sum of gradient x what was added

holds to rounding, and it fails where something was not made linear.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from globenc_lightning.encoder import multihead
from globenc_lightning.encoder.contexts import writes_in_place
from globenc_lightning.encoder.slopes import at_zero, group_normed, normed, sloped
from globenc_lightning.functional.devices import has_float64

VECTOR, ACTIVATION, GATE, STATISTIC = range(4)
"""What a tensor is, in a product of two: the one that is further behind in this list is held fixed."""

_SPACES = (torch, torch.Tensor, F, torch.special, torch.linalg)


def _functions(*names: str) -> frozenset[Any]:
    """The functions of torch of these names, wherever they stand."""
    return frozenset(getattr(space, name) for name in names for space in _SPACES if hasattr(space, name))


def _with_writing(*names: str) -> frozenset[Any]:
    return _functions(*names, *(f"{name}_" for name in names))


_GATES = _with_writing("sigmoid", "hardsigmoid", "expit", "erf", "erfc", "cos", "exp", "exp2")
_ACTIVATIONS = _with_writing(
    *("relu", "relu6", "leaky_relu", "rrelu", "gelu", "silu", "mish", "elu", "selu", "celu", "tanh", "hardtanh"),
    *("hardswish", "softplus", "softsign", "tanhshrink", "hardshrink", "softshrink", "logsigmoid", "threshold"),
    *("expm1", "log1p", "sin", "sinh", "atan", "arctan", "asinh", "arcsinh", "square", "log_sigmoid"),
)
_CLAMPS = _with_writing("clamp", "clip", "clamp_min", "clamp_max")
_POWERS = _with_writing("pow", "__pow__", "__ipow__", "float_power")
_STATISTICS = _with_writing("rsqrt", "sqrt", "reciprocal", "softmax", "softmin") | _functions(
    *("var", "std", "var_mean", "std_mean", "norm", "vector_norm", "matrix_norm")
)
_QUOTIENTS = _with_writing("div", "divide", "true_divide", "__truediv__", "__rtruediv__", "__itruediv__", "__div__")
_FROM_RIGHT = _functions("__rtruediv__")
_ENTRYWISE = _with_writing("mul", "multiply", "__mul__", "__rmul__", "__imul__")
_MIXING = _functions(
    *("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot", "inner", "outer", "einsum", "tensordot"),
    *("baddbmm", "addmm", "addbmm", "linear", "bilinear", "kron", "vecdot", "multi_dot"),
)
"""Products that make new vectors of vectors: nothing of what came before tells what they are."""
_NEW = _functions("conv1d", "conv2d", "conv3d", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
_SUMS = _with_writing("add", "sub", "subtract", "__add__", "__radd__", "__iadd__", "__sub__", "__isub__")
_FROM_CONSTANT = _functions("__rsub__", "rsub")
_DIFFERENCES = _with_writing("sub", "subtract", "__sub__", "__isub__") | _FROM_CONSTANT
_JOINS = _functions("cat", "concat", "concatenate", "stack", "hstack", "vstack")
_NOTHING_ADDED = _functions(
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "swapaxes", "t", "contiguous"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "broadcast_to", "chunk", "split"),
    *("unbind", "narrow", "select", "__getitem__", "gather", "index_select", "take_along_dim", "masked_select"),
    *("sum", "mean", "cumsum", "neg", "__neg__", "clone", "to", "type", "type_as", "float", "double", "half"),
    *("bfloat16", "dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout", "amax", "amin", "max"),
    *("min", "abs", "__abs__", "diff", "flip", "roll", "view_as", "reshape_as", "tensor_split", "triu", "tril"),
    *("relu_", "detach", "requires_grad_", "register_hook", "retain_grad", "unfold", "pixel_shuffle", "topk", "sort"),
    *("diagonal", "swapdims", "moveaxis", "ravel", "cpu", "cuda", "avg_pool1d", "max_pool1d", "unsafe_chunk"),
    *("as_strided", "moveaxis", "unsafe_split", "split_with_sizes", "tile", "backward", "cosine_similarity"),
)
_LAYER_NORMS = frozenset({F.layer_norm, torch.layer_norm})
_NORMS = _LAYER_NORMS | _functions("rms_norm")
_GROUP_NORMS = frozenset({F.group_norm, torch.group_norm, F.instance_norm})
_NORMALISED = _functions("normalize")
_HALVED = _functions("glu")
_SECOND = ("other", "exponent", "mat2")
"""What functions of two tensors, or of a tensor and a number, call the second."""


class FrozenNetwork(TorchFunctionMode):
    """Makes the functions of a forward pass linear in what requires a gradient; see the module.

    Parameters must not require gradients: what does is what depends on the hidden states.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: Any = WeakIdKeyDictionary()
        self._notes: Any = WeakIdKeyDictionary()
        self._zeros: dict[Any, tuple[Tensor, Tensor]] = {}
        self._counting = False
        self._added: list[Tensor] = []
        self._odd: dict[str, None] = {}
        self._types: set[torch.dtype] = set()
        self._precise: dict[torch.device, torch.dtype] = {}

    @contextmanager
    def counting(self, sources: Sequence[Tensor]) -> Iterator[None]:
        """Count, in the backward pass inside, what is added on the way to the score and does not depend on tokens.

        Args:
            sources: the first hidden states. What was added to make them is no part of that way, though it was noted
                where the embeddings require a gradient already.
        """
        for source in sources:
            for handle in self._notes.pop(source, ()):
                handle.remove()
        self._counting, self._added = True, []
        self._odd.clear()
        try:
            yield
        finally:
            self._counting = False

    @property
    def added(self) -> list[Tensor]:
        """What biases and constants contribute to the score, () each, once a backward pass was counted."""
        return self._added

    @property
    def types(self) -> set[torch.dtype]:
        """The types that hidden states were computed in."""
        return self._types

    @property
    def odd(self) -> list[str]:
        """Functions on the way to the score that are known to be linear in nothing."""
        return list(self._odd)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, linear in what depends on the hidden states."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and args and isinstance(args[0], Tensor):
                # Transposed, for one.
                self._is(result, self._kind(args[0]))
            return result
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is multihead.FUNCTION:
            return multihead.run(self, args, kwargs)
        live = [one for one in _tensors(args, kwargs) if _is_live(one)]
        if not live:
            if any(one.requires_grad for one in _tensors(args, kwargs)):
                # What is made of parameters alone is a constant.
                with torch.no_grad():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        self._types.update(one.dtype for one in live)
        return self._run(func, name, args, kwargs, live)

    def _run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], live: Sequence[Tensor]) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {key: one for key, one in kwargs.items() if key != "input"}
        if len(args) == 1 and not kwargs.keys().isdisjoint(_SECOND):
            second = next(key for key in _SECOND if key in kwargs)
            args, kwargs = (*args, kwargs[second]), {key: one for key, one in kwargs.items() if key != second}
        if func in _NORMS:
            return self._norm(func, *args, **kwargs)
        if func in _GROUP_NORMS:
            return self._group_norm(func, args, kwargs)
        if func in _HALVED:
            return self._halved(*args, **kwargs)
        if func in _NORMALISED:
            return self._normalised(*args, **kwargs)
        first = args[0] if args else None
        alone = len(live) == 1 and live[0] is first
        if alone and (func in _ACTIVATIONS or func in _GATES or func in _CLAMPS):
            own = GATE if func in _GATES else VECTOR if func in _CLAMPS else ACTIVATION
            return self._activation(func, args, kwargs, max(own, self._kind(live[0])))
        if alone and func in _POWERS and len(args) > 1 and isinstance(args[1], int | float):
            if args[1] > 1:
                return self._activation(func, args, kwargs, max(ACTIVATION, self._kind(live[0])))
            kind = self._kind(live[0]) if args[1] == 1 else STATISTIC
            return self._is(func(*args, **kwargs), kind)
        if func in _STATISTICS:
            return self._statistic(func, args, kwargs)
        if func in _QUOTIENTS:
            return self._quotient(func, args, kwargs)
        if func in _ENTRYWISE or func in _MIXING:
            return self._product(func, args, kwargs, live)
        return self._affine(func, name, args, kwargs, live)

    # ---- the rules

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _is_live(value):
            query, key = query.detach(), key.detach()
            args = tuple(one.detach() if isinstance(one, Tensor) else one for one in args)
            kwargs = {name: one.detach() if isinstance(one, Tensor) else one for name, one in kwargs.items()}
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def _norm(
        self,
        func: Any,
        input: Tensor,  # noqa: A002
        normalized_shape: Any,
        weight: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        centered = func in _LAYER_NORMS
        bias = kwargs.get("bias", args[0] if args and centered else None)
        place = 1 if centered else 0
        given = kwargs.get("eps", args[place] if len(args) > place else (1e-5 if centered else None))
        eps = torch.finfo(input.dtype).eps if given is None else float(given)
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)

        def function(x: Tensor) -> Tensor:
            found: Tensor = func(x, normalized_shape, weight, *args, **kwargs)
            return found

        result = normed(input, function, shape, weight, eps, centered=centered)
        self._note(result, bias)
        return result

    def _group_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names: tuple[str, ...] = ("input", "num_groups", "weight", "bias", "eps")
        if func is F.instance_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = given["input"]
        with torch.no_grad():
            value = func(*args, **kwargs)
        result = group_normed(
            x, value, given.get("num_groups", x.shape[1]), given.get("weight"), given.get("eps", 1e-5)
        )
        bias = given.get("bias")
        self._note(result, None if bias is None else bias.view(1, -1, *[1] * (x.dim() - 2)))
        return result

    def _halved(self, input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002
        content, gate = input.chunk(2, dim)
        return self._is(content * gate.detach().sigmoid(), ACTIVATION)

    def _normalised(self, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:  # noqa: A002
        return input / torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True).clamp_min(eps).expand_as(input)

    def _activation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: int) -> Tensor:
        z, rest = args[0], args[1:]
        # What writes into its argument gets a copy, and its result is written there.
        writes = writes_in_place(func) or any(one is True for one in (*rest, *kwargs.values()))

        def function(x: Tensor) -> Tensor:
            found: Tensor = func(x.clone() if writes else x, *rest, **kwargs)
            return found

        entering = z.clone() if writes else z
        shared = any(isinstance(one, Tensor) for one in (*rest, *kwargs.values()))
        key = None if shared else (func, rest, tuple(sorted(kwargs.items(), key=str)), z.dtype, z.device)
        found = None if key is None else self._zeros.get(key)
        if found is None:
            found = at_zero(function, z if shared else z.new_zeros(()))
            if key is not None:
                self._zeros[key] = found
        result = sloped(entering, function, *found)
        result = z.copy_(result) if writes else result
        self._note(result, found[0])
        return self._is(result, kind)

    def _statistic(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if isinstance(result, tuple):
            # The variance, and the mean, which is linear.
            self._is(result[0], STATISTIC)
            return result
        return self._is(result, STATISTIC)

    def _quotient(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of two vectors the one below is held fixed; of a number and a vector, it is what is taken of that vector."""
        place = 0 if func in _FROM_RIGHT else 1
        if len(args) < 2 or not _is_live(args[place]):
            return self._is(func(*args, **kwargs), self._kind(args[1 - place]) if len(args) > 1 else VECTOR)
        if not _is_live(args[1 - place]):
            return self._is(func(*args, **kwargs), STATISTIC)
        kind = self._kind(args[1 - place])
        return self._is(func(*_with(args, place, args[place].detach()), **kwargs), kind)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], live: Sequence[Tensor]) -> Any:
        entrywise = func in _ENTRYWISE
        factors = live
        added = None
        if func in _ADDING_PRODUCTS:
            # What the product is added to is no factor of it.
            added = kwargs.get("input", args[0] if args else None)
            factors = [one for one in live if one is not added]
        kinds = [self._kind(one) for one in factors]
        if len(factors) == 2 and factors[0] is factors[1] and entrywise:
            # A square, as an activation has it.
            args = (args[0], args[1].detach())
            return self._is(func(*args, **kwargs), max(ACTIVATION, kinds[0]))
        kind = max(kinds, default=VECTOR) if entrywise else VECTOR
        odd = False
        if len(factors) > 1:
            held = kinds.index(max(kinds))
            if sorted(kinds)[-2] < kinds[held]:
                args, kwargs = _held_fixed((args, kwargs), factors[held])
                passed = sorted(kinds)[-2]
                # A vector times a gate is what an activation gives; times a statistic, it stays what it was.
                kind = max(passed, ACTIVATION) if kinds[held] in (ACTIVATION, GATE) else passed
                kind = kind if entrywise else VECTOR
            else:
                odd = True
        result = func(*args, **kwargs)
        if odd and isinstance(result, Tensor):
            self._watch(result, f"{getattr(func, '__name__', 'a product')} of two vectors of hidden states")
        if func is F.linear:
            self._note(result, kwargs.get("bias", args[2] if len(args) > 2 else None))
        elif added is not None and not _is_live(added) and isinstance(added, Tensor):
            self._note(result, added * kwargs["beta"] if "beta" in kwargs else added)
        elif func in _BIASED and not entrywise:
            self._note_generic(func, args, kwargs, result)
        return self._is(result, kind)

    def _affine(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], live: Sequence[Tensor]
    ) -> Any:
        """A function that keeps vectors apart: sums, joins, and whatever moves entries about."""
        # What follows the first argument may be there for its type or shape alone.
        of = args[:1] if func in _NOTHING_ADDED and args and _is_live(args[0]) else live
        kind = VECTOR if func in _NEW else min(self._kind(one) for one in of)
        if func in _SUMS or func in _FROM_CONSTANT:
            result = func(*args, **kwargs)
            added = self._added_by(func, args, kwargs)
            if added is not None and kind == ACTIVATION:
                # 1 + tanh, say.
                kind = GATE
            self._note(result, added)
            return self._is(result, kind)
        plain = func in _NOTHING_ADDED or (func in _JOINS and len(live) == len(list(_tensors(args, kwargs))))
        fills_nothing = name.startswith("masked_fill") and _is_zero((*args, *kwargs.values())[-1])
        if plain or fills_nothing:
            return self._is(func(*args, **kwargs), kind)
        before = _copied(args, kwargs) if args and _writes(func, name, kwargs) else None
        result = func(*args, **kwargs)
        written = result if before is None else args[0]
        for one in written if isinstance(written, tuple | list) else (written,):
            self._is(one, kind)
        self._note_generic(func, *(before or (args, kwargs)), written, into=before is not None)
        return result

    # ---- what is added

    def _added_by(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a sum adds to vectors of hidden states that is none; None where both are, or it is zero."""
        if len(args) < 2:
            return None
        left, right = args[:2]
        if func in _FROM_CONSTANT:
            left, right = right, left
        alpha = kwargs.get("alpha", 1)
        if not _is_live(left):
            return None if _is_zero(left) else left
        if _is_live(right) or _is_zero(right):
            return None
        right = right if alpha == 1 else right * alpha
        return -right if func in _DIFFERENCES else right

    def _note_generic(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, *, into: bool = False
    ) -> None:
        """Note what a function gives where all hidden states are zero."""
        several = list(result) if isinstance(result, tuple | list) else [result]
        if not any(isinstance(one, Tensor) and one.requires_grad for one in several):
            return
        name = getattr(func, "__name__", str(func))
        try:
            with torch.no_grad():
                given, named = _zeroed(args), _zeroed(kwargs)
                found = func(*given, **named)
        except (RuntimeError, TypeError, ValueError, IndexError):
            for one in several:
                self._watch(one, name)
            return
        found = given[0] if into else found
        constants = list(found) if isinstance(found, tuple | list) else [found]
        for one, constant in zip(several, constants, strict=False):
            if isinstance(one, Tensor) and isinstance(constant, Tensor):
                self._note(one, constant)
            if func not in _KNOWN:
                self._watch(one, name)

    def _note(self, result: Any, constant: Any) -> None:
        """Note what was added to ``result``: of any shape that broadcasts to it, or a number."""
        if constant is None or not isinstance(result, Tensor) or not result.requires_grad:
            return
        if isinstance(constant, Tensor):
            constant = constant.detach()
        precise = self._precise.get(result.device)
        if precise is None:
            precise = torch.float64 if has_float64(result.device) else torch.float32
            self._precise[result.device] = precise

        def count(gradient: Tensor) -> None:
            if self._counting:
                self._added.append(_sum(gradient * constant, precise))

        self._notes.setdefault(result, []).append(result.register_hook(count))

    def _watch(self, result: Any, name: str) -> None:
        """Note that a function lies on the way to the score, if it does."""

        def seen(gradient: Tensor) -> None:
            if self._counting:
                self._odd[name] = None

        if isinstance(result, Tensor) and result.requires_grad:
            result.register_hook(seen)

    # ---- what tensors are

    def _kind(self, tensor: Any) -> int:
        if not isinstance(tensor, Tensor):
            return VECTOR
        found: int = self._kinds.get(tensor, VECTOR)
        return found

    def _is(self, result: Any, kind: int) -> Any:
        for one in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(one, Tensor) or not one.requires_grad:
                continue
            if kind != VECTOR:
                self._kinds[one] = kind
            elif one in self._kinds:
                # Written into.
                del self._kinds[one]
        return result


_ADDING_PRODUCTS = _functions("addmm", "baddbmm", "addbmm")
_BIASED = _functions("bilinear")
_KNOWN = (
    _NEW
    | _JOINS
    | _functions(
        *(
            "masked_fill",
            "masked_fill_",
            "where",
            "__setitem__",
            "pad",
            "index_put",
            "index_put_",
            "scatter",
            "scatter_",
        ),
        *(
            "index_add",
            "index_add_",
            "scatter_add",
            "scatter_add_",
            "masked_scatter",
            "masked_scatter_",
            "copy_",
            "lerp",
        ),
        *("addcmul", "index_copy", "index_copy_", "maximum", "minimum", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        *(
            "avg_pool2d",
            "interpolate",
            "prelu",
            "bilinear",
            "nan_to_num",
            "index_fill",
            "index_fill_",
            "zero_",
            "fill_",
        ),
    )
)


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for one in (*args, *kwargs.values()):
        if isinstance(one, Tensor):
            yield one
        elif type(one) in (tuple, list):
            yield from _tensors(one, {})


def _is_live(value: Any) -> bool:
    """Whether a value depends on hidden states, and is no parameter of a module that the forward has just made."""
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _with(args: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*args[:place], value, *args[place + 1 :])


def _held_fixed(value: Any, tensor: Tensor) -> Any:
    """The value with one tensor in it out of the autograd graph."""
    if value is tensor:
        return tensor.detach()
    if type(value) in (tuple, list):
        return type(value)(_held_fixed(one, tensor) for one in value)
    if type(value) is dict:
        return {name: _held_fixed(one, tensor) for name, one in value.items()}
    return value


def _zeroed(value: Any) -> Any:
    """The value with zeros for all that depends on hidden states."""
    if _is_live(value):
        return torch.zeros_like(value)
    if type(value) in (tuple, list):
        return type(value)(_zeroed(one) for one in value)
    if type(value) is dict:
        return {name: _zeroed(one) for name, one in value.items()}
    return value


def _writes(func: Any, name: str, kwargs: Mapping[str, Any]) -> bool:
    return writes_in_place(func) or name == "__setitem__" or kwargs.get("inplace") is True


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a function that writes into its first one, before it does."""
    first = args[0]
    if not isinstance(first, Tensor) or first.requires_grad:
        return args, kwargs
    return (first.clone(), *args[1:]), kwargs


def _sum(products: Tensor, precise: torch.dtype) -> Tensor:
    # Rows without a real token may hold NaN, and are nobody's; what is lost elsewhere is missing in the sum.
    return products.to(precise).nansum()
