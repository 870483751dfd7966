"""Gram kernels, kept from one batch to the next for as long as the weights stand still."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from globenc_lightning.functional.attribution import FrozenNorm, gram_kernel


@dataclass(eq=False)
class KernelCache:
    """What :func:`~globenc_lightning.functional.gram_kernel` gave for each layer and chain of norms.

    A kernel takes one product of the size of the projection to build. It is used again only if the weights give, to the
    last digit, what they gave when it was built: a product with a fixed vector for the projection, the weights
    themselves for the norms. Version counters would not do, since ``parameter.data`` passes them by.

    Attributes:
        keep: whether kernels are kept at all; where each is used once, that would be memory for nothing.
        doubt: called with a (), true where a kernel that is used again is still the right one. Whoever looks at it has
            to do without the figures where it is not. On a processor nobody is called: there the kernel is built anew
            at once.
        counters: whatever tells its owner that the weights have moved, without a look at them.
    """

    keep: bool = True
    doubt: Callable[[Tensor], None] | None = None
    counters: Hashable = None
    _kept: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _vectors: dict[Hashable, Tensor] = field(default_factory=dict)

    def kernel(
        self, layer: Hashable, projection: Tensor, norms: Sequence[FrozenNorm], *, heads: int | None = None
    ) -> Tensor:
        """The kernel of a layer, kept or built.

        Args:
            layer: tells the layers apart.
            projection: (d, h * v) the attention's output projection.
            norms: the norms that its vectors pass through.
            heads: how many heads the layer has, see :func:`~globenc_lightning.functional.gram_kernel`.

        Returns:
            (h * v, h * v).
        """
        if not self.keep:
            return gram_kernel(projection, norms, heads)
        key = (layer, heads, tuple((norm.centered, norm.weight is None) for norm in norms))
        mark = torch.cat([projection @ self._vector(projection), *[n.weight for n in norms if n.weight is not None]])
        kept = self._kept.get(key)
        # A model that has been moved since has its weights elsewhere, or in another type.
        if kept is not None and all(getattr(kept[0], x) == getattr(mark, x) for x in ("device", "dtype", "shape")):
            same = kept[0] == mark
            if projection.device.type != "cpu" and self.doubt is not None:
                self.doubt(same.all())
                return kept[1]
            if bool(same.all()):
                return kept[1]
        # Without its graph, which may lead to whatever made the weights.
        kernel = gram_kernel(projection, norms, heads).detach()
        self._kept[key] = (mark.detach(), kernel)
        return kernel

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()

    def _vector(self, projection: Tensor) -> Tensor:
        width = projection.shape[1]
        key = (width, projection.dtype, projection.device)
        if key not in self._vectors:
            generator = torch.Generator().manual_seed(width)
            self._vectors[key] = torch.randn(width, generator=generator, dtype=torch.float64).to(projection)
        return self._vectors[key]
