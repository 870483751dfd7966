"""Value Zeroing as its paper states it: the layer is run once more for each token, with that token's values at zero."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class WithoutValues(TorchFunctionMode):
    """Sets the value vectors of one token to zero in one attention call of a forward pass.

    The values are the third argument of sdpa, or what a matrix is multiplied with whose rows are probabilities.

    Args:
        call: which attention call, counted from 0.
        token: which token; None to leave everything as it is.
    """

    def __init__(self, call: int, token: int | None) -> None:
        super().__init__()
        self.call, self.token, self.seen = call, token, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        fused = func is F.scaled_dot_product_attention
        product = func in (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
        if fused or (product and _are_probabilities(args[0])):
            if self.seen == self.call and self.token is not None:
                if fused and len(args) < 3:
                    kwargs["value"] = self.without(kwargs["value"])
                else:
                    place = 2 if fused else 1
                    args = (*args[:place], self.without(args[place]), *args[place + 1 :])
            self.seen += 1
        return func(*args, **kwargs)

    def without(self, values: Tensor) -> Tensor:
        values = values.clone()
        values[..., self.token, :] = 0
        return values


def _are_probabilities(matrix: Any) -> bool:
    if not isinstance(matrix, Tensor) or matrix.dim() < 3 or matrix.shape[-1] != matrix.shape[-2]:
        return False
    rows = matrix.detach().sum(-1)
    return bool((matrix >= 0).all()) and torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


def run(model: nn.Module, inputs: Mapping[str, Tensor], layer: int, token: int | None, at: nn.Module) -> list[Tensor]:
    """What a module is given and gives, (b, q, d) each, without the values of one token in one layer."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim() == 3)
        gave = output if isinstance(output, Tensor) else next(one for one in output if isinstance(one, Tensor))
        seen[:] = [given.clone(), gave.clone()]

    handle = at.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad(), WithoutValues(layer, token):
        model(**inputs)
    handle.remove()
    return seen


def scores(model: nn.Module, inputs: Mapping[str, Tensor], layers: Sequence[nn.Module], mask: Tensor) -> Tensor:
    """Value-Zeroing of every layer by running it again and again, (b, l, q, k)."""
    found = []
    for index, layer in enumerate(layers):
        whole = run(model, inputs, index, None, layer)[1].double()
        outputs = [run(model, inputs, index, token, layer)[1].double() for token in range(mask.shape[1])]
        found.append(torch.stack([1 - F.cosine_similarity(whole, one, dim=-1) for one in outputs], -1))
    return shares(torch.stack(found, 1), mask)


def shares(maps: Tensor, mask: Tensor) -> Tensor:
    """Maps (b, l, q, k) with rows of real tokens divided by their sum, zero elsewhere."""
    real = (mask.unsqueeze(1) & mask.unsqueeze(2)).unsqueeze(1)
    maps = maps.masked_fill(~real, 0.0)
    total = maps.sum(-1, keepdim=True)
    return maps / total.masked_fill(total == 0, 1.0)
