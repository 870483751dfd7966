"""What a step computes its loss from: loss functions and the logits behind probabilities, seen from outside.

A ``TorchFunctionMode`` sees each loss function that a step calls, those inside Hugging Face models too, since they end
in the same functions. It changes no argument and no result.

Axes: ``b`` example, ``c`` class, ``s`` token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOSSES: dict[str, str] = {
    "cross_entropy": "classes",
    "nll_loss": "classes",
    "kl_div": "classes",
    "multi_margin_loss": "classes",
    "binary_cross_entropy": "labels",
    "binary_cross_entropy_with_logits": "labels",
    "multilabel_soft_margin_loss": "labels",
    "multilabel_margin_loss": "labels",
    "soft_margin_loss": "labels",
    "mse_loss": "values",
    "l1_loss": "values",
    "smooth_l1_loss": "values",
    "huber_loss": "values",
    "poisson_nll_loss": "values",
    "gaussian_nll_loss": "values",
    "cosine_similarity": "similarity",
    "pairwise_distance": "distance",
    "triplet_margin_loss": "triplet",
    "triplet_margin_with_distance_loss": "triplet",
    "cosine_embedding_loss": "pair",
    "margin_ranking_loss": "other",
    "hinge_embedding_loss": "other",
    "ctc_loss": "other",
}
"""The loss functions of ``torch.nn.functional``, and what their first argument holds."""

_LOSS_OF = {getattr(F, name): kind for name, kind in _LOSSES.items()}
_SQUASHING = {
    F.softmax: "classes",
    torch.softmax: "classes",
    torch.Tensor.softmax: "classes",
    F.log_softmax: "classes",
    torch.log_softmax: "classes",
    torch.Tensor.log_softmax: "classes",
    torch.sigmoid: "labels",
    torch.Tensor.sigmoid: "labels",
    F.sigmoid: "labels",
    F.logsigmoid: "labels",
    torch.special.expit: "labels",
    torch.special.softmax: "classes",
    torch.special.log_softmax: "classes",
}
"""Functions that make probabilities of logits, and whether those are of one of several classes or of each label."""
_SUMMING = {torch.logsumexp, torch.Tensor.logsumexp, torch.special.logsumexp}
"""Functions that make of logits what they are normalised by."""
# What moves entries about, or keeps their order, and is done to the logits as it is done to the probabilities.
_SHAPING = frozenset(
    {"view", "reshape", "squeeze", "unsqueeze", "flatten", "transpose", "permute", "__getitem__", "select"}
    | {"index_select", "contiguous", "float", "double", "to", "type", "clone", "expand", "t", "narrow", "unflatten"}
    | {"movedim", "masked_select"}
)
_KEEPING = frozenset({"log", "clamp", "clip", "clamp_min", "clamp_max"})
_ADDING = frozenset({"add", "__add__", "__radd__"})
_SCALING = {"mul": False, "__mul__": False, "__rmul__": False, "div": True, "true_divide": True, "__truediv__": True}
"""Functions that multiply by their second argument, and whether they divide by it."""
_SMALL = 1e-3
"""What is added to a probability, so that its logarithm is finite, is no larger."""
ARGUMENTS = {"input": 0, "x1": 0, "anchor": 0, "input1": 0, "target": 1, "x2": 1, "positive": 1, "input2": 1}


class LossSeen(BaseException):
    """Ends a step at its loss: what a step does afterwards (metrics, lists, files) must not happen.

    No ``Exception``, so that no ``except Exception`` of a step catches it.
    """


@dataclass(frozen=True, eq=False)
class LossCall:
    """One call of a loss function.

    Attributes:
        name: the function's name.
        holds: what its first argument holds, see ``_LOSSES``.
        input: its first argument.
        target: its second argument.
        logits: the logits behind the first argument, where that holds probabilities that were made of logits; else the
            first argument itself.
        unscaled: the logits before they were multiplied or divided by a positive number (a temperature), if they were.
        squashed: ``"classes"`` or ``"labels"`` where the first argument holds probabilities, or None.
        options: its keyword arguments.
        result: what it returned.
    """

    name: str
    holds: str
    input: Tensor
    target: Any
    logits: Tensor
    unscaled: Tensor
    squashed: str | None
    options: Mapping[str, Any]
    result: Tensor

    @property
    def ignored(self) -> int:
        """The label that does not count."""
        return int(self.options.get("ignore_index", -100))


@dataclass(eq=False)
class Squashed:
    """Logits that a step made probabilities, or a logarithm of their sum, of.

    Attributes:
        name: the function's name.
        holds: ``"classes"`` or ``"labels"``, as ``LossCall.holds``.
        logits: what it was called on.
        axis: the axis of the classes; None of labels.
        target: (units) the index that a probability was gathered by, a label that is; None where none was.
    """

    name: str
    holds: str
    logits: Tensor
    axis: int | None
    target: Tensor | None = None


class _MadeOf:
    """What tensors were made of, for as long as they live: those of every layer's attention pass by, too."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[ref[Tensor], Any]] = {}

    def keep(self, made: Tensor, source: Any) -> None:
        place = id(made)

        def forget(gone: ref[Tensor]) -> None:
            # Another tensor may have taken its place in memory since.
            if place in self._kept and self._kept[place][0] is gone:
                del self._kept[place]

        self._kept[place] = (ref(made, forget), source)

    def get(self, made: Tensor) -> Any:
        kept = self._kept.get(id(made))
        return None if kept is None or kept[0]() is not made else kept[1]


class LossWatch(TorchFunctionMode):
    """Notes the loss functions that are called inside it.

    Args:
        wanted: asked after each loss whether the step has computed all that is needed; then it is ended by
            :class:`LossSeen`. Never when None.
        notes: whether logits that probabilities are made of are kept, see ``squashed``.

    Attributes:
        losses: the calls of loss functions, in order.
        squashed: logits that probabilities were made of, in order, for losses that are written out.
        inside: how many encoders the step is in. Their attention is made of softmaxes, too, and would be kept in memory
            layer by layer.
    """

    def __init__(self, wanted: Callable[[list[LossCall]], bool] | None = None, *, notes: bool = False) -> None:
        super().__init__()
        self._notes = notes
        self.losses: list[LossCall] = []
        self.squashed: list[Squashed] = []
        self.inside = 0
        self._wanted = wanted
        self._behind = _MadeOf()
        self._scaled = _MadeOf()

    def behind(self, value: Tensor) -> tuple[Tensor, str | None]:
        """The logits that a tensor of probabilities was made of.

        Args:
            value: any tensor.

        Returns:
            The logits, and ``"classes"`` or ``"labels"``; the tensor itself and None where it was not made of any.
        """
        return self._behind.get(value) or (value, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function as it is, then look at what it was."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in _LOSS_OF:
            self._note(name, _LOSS_OF[func], args, kwargs, result)
        elif self.inside:
            return result
        elif func in _SQUASHING or func in _SUMMING:
            source = args[0] if args else kwargs.get("input")
            if isinstance(source, Tensor) and source.is_floating_point() and source.dim():
                self._squash(func, name, source, args, kwargs, result)
        elif args and isinstance(result, Tensor):
            self._follow(func, name, args, kwargs, result)
        return result

    def _squash(
        self,
        func: Callable[..., Any],
        name: str,
        source: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> None:
        kind = _SQUASHING.get(func, "classes")
        axis = args[1] if len(args) > 1 else kwargs.get("dim")
        axis = source.dim() - 1 if not isinstance(axis, int) else axis % source.dim()
        if self._notes:
            self.squashed.append(Squashed(name, kind, source, axis if kind == "classes" else None))
        if func in _SQUASHING:
            self._behind.keep(result, (source, kind))

    def _follow(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> None:
        """Keep in mind what a tensor was made of: probabilities of logits, scaled logits of logits."""
        first = args[0] if isinstance(args[0], Tensor) else None
        if name in _SCALING and len(args) > 1:
            value, scale = (args[0], args[1]) if first is not None and not _is_scale(first) else (args[1], args[0])
            if isinstance(value, Tensor) and _is_positive(scale) and not (_SCALING[name] and value is args[1]):
                self._scaled.keep(result, self._unscaled(value))
            return
        if first is None:
            return
        unscaled = self._scaled.get(first)
        if unscaled is not None and name in _SHAPING:
            self._scaled.keep(result, _shaped(func, unscaled, args, kwargs))
        made_of = self._behind.get(first)
        if made_of is None:
            return
        source, kind = made_of
        if name in _SHAPING:
            self._behind.keep(result, (_shaped(func, source, args, kwargs), kind))
        elif name in _KEEPING or (name in _ADDING and len(args) > 1 and _is_small(args[1])):
            self._behind.keep(result, (source, kind))
        elif name == "gather":
            self._label(source, args, kwargs)

    def _label(self, source: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Probabilities that are gathered by an index: it says the classes."""
        axis = args[1] if len(args) > 1 else kwargs.get("dim")
        index = args[2] if len(args) > 2 else kwargs.get("index")
        squashed = next((one for one in self.squashed if one.logits is source), None)
        if squashed is None or squashed.axis is None or not isinstance(index, Tensor) or not isinstance(axis, int):
            return
        axis %= source.dim()
        if axis == squashed.axis and index.shape[axis] == 1:
            squashed.target = index.squeeze(axis)

    def _unscaled(self, tensor: Tensor) -> Tensor:
        found: Tensor | None = self._scaled.get(tensor)
        return tensor if found is None else found

    def _note(self, name: str, holds: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        first, second = _argument(args, kwargs, 0), _argument(args, kwargs, 1)
        if not isinstance(first, Tensor) or not isinstance(result, Tensor):
            return
        logits, squashed = self.behind(first)
        options = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
        unscaled = self._unscaled(logits)
        self.losses.append(LossCall(name, holds, first, second, logits, unscaled, squashed, options, result))
        if self._wanted is not None and self._wanted(self.losses):
            raise LossSeen


def _is_scale(value: Any) -> bool:
    """Whether something is one number."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dim() == 0
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    if not _is_scale(value) or (isinstance(value, Tensor) and value.is_meta):
        return False
    with torch.no_grad():
        return 0 < float(value) < float("inf")


def _is_small(value: Any) -> bool:
    return _is_scale(value) and not isinstance(value, Tensor) and abs(value) <= _SMALL


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int) -> Any:
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name, where in ARGUMENTS.items() if where == place and name in kwargs), None)


def _shaped(func: Callable[..., Any], source: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    shaped: Tensor = func(source, *args[1:], **kwargs)
    return shaped
