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
}
"""Functions that make probabilities of logits, and whether those are of one of several classes or of each label."""
# What moves entries about, or keeps their order, and is done to the logits as it is done to the probabilities.
_SHAPING = frozenset(
    {"view", "reshape", "squeeze", "unsqueeze", "flatten", "transpose", "permute", "__getitem__", "select"}
    | {"index_select", "contiguous", "float", "double", "to", "type", "clone", "expand", "t", "narrow", "unflatten"}
    | {"movedim", "masked_select"}
)
_KEEPING = frozenset({"log", "clamp", "clip", "clamp_min", "clamp_max"})
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
        squashed: ``"classes"`` or ``"labels"`` where the first argument holds probabilities, or None.
        options: its keyword arguments.
        result: what it returned.
    """

    name: str
    holds: str
    input: Tensor
    target: Any
    logits: Tensor
    squashed: str | None
    options: Mapping[str, Any]
    result: Tensor

    @property
    def ignored(self) -> int:
        """The label that does not count."""
        return int(self.options.get("ignore_index", -100))


class LossWatch(TorchFunctionMode):
    """Notes the loss functions that are called inside it.

    Args:
        wanted: asked after each loss whether the step has computed all that is needed; then it is ended by
            :class:`LossSeen`. Never when None.
    """

    def __init__(self, wanted: Callable[[list[LossCall]], bool] | None = None) -> None:
        super().__init__()
        self.losses: list[LossCall] = []
        self._wanted = wanted
        # Weak references: the probabilities of every layer's attention pass by, too, and must not be held.
        self._behind: dict[int, tuple[ref[Tensor], Tensor, str]] = {}

    def behind(self, value: Tensor) -> tuple[Tensor, str | None]:
        """The logits that a tensor of probabilities was made of.

        Args:
            value: any tensor.

        Returns:
            The logits, and ``"classes"`` or ``"labels"``; the tensor itself and None where it was not made of any.
        """
        kept = self._behind.get(id(value))
        return (value, None) if kept is None or kept[0]() is not value else kept[1:]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function as it is, then look at what it was."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in _LOSS_OF:
            self._note(name, _LOSS_OF[func], args, kwargs, result)
        elif func in _SQUASHING:
            source = args[0] if args else kwargs.get("input")
            if isinstance(source, Tensor) and source.is_floating_point():
                self._keep(result, source, _SQUASHING[func])
        elif args and isinstance(args[0], Tensor) and isinstance(result, Tensor) and name in _SHAPING | _KEEPING:
            source, kind_ = self.behind(args[0])
            if kind_ is not None:
                self._keep(result, _shaped(func, source, args, kwargs) if name in _SHAPING else source, kind_)
        return result

    def _keep(self, result: Tensor, source: Tensor, kind: str) -> None:
        place = id(result)

        def forget(gone: ref[Tensor]) -> None:
            # Another tensor may have taken its place in memory since.
            if place in self._behind and self._behind[place][0] is gone:
                del self._behind[place]

        self._behind[place] = (ref(result, forget), source, kind)

    def _note(self, name: str, holds: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        first, second = _argument(args, kwargs, 0), _argument(args, kwargs, 1)
        if not isinstance(first, Tensor) or not isinstance(result, Tensor):
            return
        logits, squashed = self.behind(first)
        options = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
        self.losses.append(LossCall(name, holds, first, second, logits, squashed, options, result))
        if self._wanted is not None and self._wanted(self.losses):
            raise LossSeen


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int) -> Any:
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name, where in ARGUMENTS.items() if where == place and name in kwargs), None)


def _shaped(func: Callable[..., Any], source: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    shaped: Tensor = func(source, *args[1:], **kwargs)
    return shaped
