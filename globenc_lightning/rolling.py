"""What the layers of one call of an encoder give, put together layer by layer.

Axes: ``b`` example, ``l`` layer, ``h`` head, ``q`` token that receives, ``k`` token that is attended to, ``m`` method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from globenc_lightning.encoder.checks import Checks
from globenc_lightning.encoder.layers import POST_LN, alti_inputs, layer_inputs
from globenc_lightning.encoder.norms import working
from globenc_lightning.encoder.reading import LayerDone
from globenc_lightning.errors import UnsupportedEncoderError
from globenc_lightning.functional import (
    METHODS,
    local_maps,
    normalize_rows,
    padding_of,
    readout_place,
    readout_row,
    rollout_step,
)
from globenc_lightning.functional.alti import alti
from globenc_lightning.functional.flow import attention_flow
from globenc_lightning.functional.value_zeroing import value_zeroing
from globenc_lightning.settings import Settings

MOST_WAITING = 2**24
"""So many entries of rollouts are kept, 64 MB, until it is known which of their rows are read."""

Tell = Callable[[int], None]
"""Is told how many examples of a batch are done."""


@dataclass(eq=False)
class Layers:
    """What the layers of one call of an encoder gave so far.

    Attributes:
        settings: what is computed.
        readout: which row is read.
        depth: how many layers there are.
        keep_maps: whether every layer's maps and rollouts are kept.
        checks: takes what has to hold of what is computed here.
        weights: (b, q) how much of each token's row is read; the row of ``readout`` when None.
        waits: whether the rollouts of all layers are kept until it is known which rows are read, see :meth:`read`.
        local: method -> (b, l, q, k), filled layer by layer.
        rollout: method -> (b, l, q, k), filled layer by layer.
        rows: (b, m, k) for each layer, the methods in the order of ``methods``.
        peaks: (m, b) for each layer: the largest entry of each rollout before it was scaled.
        previous: (m, b, q, k) the last layer's rollouts; None where flows are computed instead.
    """

    settings: Settings
    readout: str
    depth: int
    keep_maps: bool
    checks: Checks
    weights: Tensor | None = None
    waits: bool = False
    local: dict[str, Tensor] = field(default_factory=dict)
    rollout: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    peaks: list[Tensor] = field(default_factory=list)
    previous: Tensor | None = None
    _maps: Tensor | None = None
    _padding: Tensor | None = None
    _waiting: list[Tensor] = field(default_factory=list)
    _capacities: list[Tensor] = field(default_factory=list)
    _place: Tensor | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in the order in which they stand here: GlobEnc and its relatives first."""
        return (*self._own, *(method for method in self.settings.methods if method not in METHODS))

    @property
    def _own(self) -> tuple[str, ...]:
        return tuple(method for method in self.settings.methods if method in METHODS)

    @property
    def flows(self) -> bool:
        """Whether flows through the layers are computed instead of rollouts."""
        return self.settings.aggregation == "maxflow"

    def add(self, done: LayerDone, kernel: Callable[..., Tensor]) -> None:
        """Take one layer more: its maps, one step of the rollout, the row that is read."""
        methods, (b, s) = self.methods, done.mask.shape
        if self.waits and not self.flows and len(methods) * self.depth * b * s * s > MOST_WAITING:
            return
        maps = self._maps_of(done, kernel)
        step = normalize_rows(maps) if self.settings.normalize else maps
        if self.keep_maps:
            self._keep(self.local, maps, done.place)
        if self.flows:
            # On a processor anyway, where the flows are computed; all of them, since a flow goes through all layers.
            self._capacities.append(step.cpu() if step.device.type != "cpu" else step.clone())
            return
        below = None if self.previous is None else self.previous.flatten(0, 1)
        rolled, peak = rollout_step(step.flatten(0, 1), below)
        self.previous = rolled.view_as(step)
        self.peaks.append(peak.view(len(methods), b))
        rollouts = self.previous.transpose(0, 1)
        if self.waits:
            self._waiting.append(rollouts)
        else:
            self.rows.append(self._row(rollouts, done.mask))
        if self.keep_maps:
            self._keep(self.rollout, self.previous, done.place)

    def _maps_of(self, done: LayerDone, kernel: Callable[..., Tensor]) -> Tensor:
        """The maps of one layer, (m, b, q, k)."""
        own, (b, s) = self._own, done.mask.shape
        if self._maps is None:
            # The same memory for every layer: fresh pages would cost more than what is computed in them.
            like = working(done.activations.attention.probabilities[:0])
            self._maps = like.new_empty(len(self.methods), b, s, s)
            self._padding = padding_of(done.mask)
        if own:
            inputs = layer_inputs(done.layer, done.activations, done.weights, mixed="W-Res" in own)
            local_maps(*inputs, done.mask, own, kernel, out=self._maps[: len(own)], padding=self._padding)
        for method, out in zip(self.methods[len(own) :], self._maps[len(own) :], strict=True):
            out.copy_(
                alti(*alti_inputs(done.layer, done.activations, done.weights, done.mask))
                if method == "ALTI"
                else self._zeroed(done)
            )
        return self._maps

    def _zeroed(self, done: LayerDone) -> Tensor:
        """The Value-Zeroing scores of one layer, (b, q, k), with the proof that what follows its attention is known."""
        attention, layer, rest = done.activations.attention, done.layer, done.rest
        if rest is None:
            raise AssertionError("what follows the attention is noted where Value-Zeroing is asked for")
        context = working(attention.context)
        again = rest(context)
        real = done.activations.output if layer.rule == POST_LN else done.activations.stream
        if real is None:
            raise AssertionError("a layer is worked on once all of its activations were seen")
        padding = ~done.mask.unsqueeze(-1)
        size = working(real).masked_fill(padding, 0.0).abs().amax()
        apart = (again - working(real)).masked_fill(padding, 0.0).abs().amax() / size
        allowed = layer.tolerance(done.activations.residual.dtype)

        def judge(found: Tensor) -> None:
            if not float(found) <= allowed:
                raise UnsupportedEncoderError(
                    f"Value-Zeroing is not defined for layer {done.place + 1} ({layer.name}): what follows its attention "
                    f"gives another output when it is computed again, by {float(found):.1e} (allowed: {allowed:.0e}). "
                    "Leave 'Value-Zeroing' out of methods."
                )

        self.checks.add(apart, judge)
        probabilities, values = working(attention.probabilities), working(attention.repeated_values())
        return value_zeroing(probabilities, values, context, rest, done.mask, again)

    def read(self, readout: str, weights: Tensor | None, mask: Tensor) -> bool:
        """Read the rows of rollouts that have waited for it.

        Args:
            readout: which row is read.
            weights: (b, q) how much of each token's row; the row of ``readout`` when None.
            mask: (b, s) true for real tokens.

        Returns:
            Whether they were kept: too many of them are not.
        """
        self.readout, self.weights, self._place = readout, weights, None
        if self.flows:
            return True
        self.rows = [self._row(rollouts, mask) for rollouts in self._waiting]
        self._waiting = []
        return bool(self.rows)

    def flow_rows(self, mask: Tensor, examples: Sequence[int], tell: Tell | None = None) -> Tensor:
        """How much can flow from what is read at each layer to each input token.

        What is read of a layer's map is a row, or a mean of rows, as of a rollout; it is what may flow from the token
        that is read, or from several together.

        Args:
            mask: (b, s) true for real tokens, on the CPU.
            examples: the examples that count, n of them.
            tell: is told after each example how many are done.

        Returns:
            (n, m, l, k) on the CPU; zero at padding.
        """
        weights = None if self.weights is None else self.weights.cpu()
        self._place = None
        on_device, self.weights = self.weights, weights
        rows = [self._row(maps.transpose(0, 1), mask) for maps in self._capacities]
        self.weights, self._place = on_device, None
        found = rows[0].new_zeros(len(examples), len(self.methods), self.depth, mask.shape[1])
        for number, example in enumerate(examples):
            real = mask[example].nonzero().flatten()
            for method in range(len(self.methods)):
                maps = torch.stack([one[method, example][real][:, real] for one in self._capacities]).double().numpy()
                for layer, row in enumerate(rows):
                    flow = attention_flow(row[example, method, real].double().numpy(), maps[:layer])
                    found[number, method, layer, real] = torch.from_numpy(flow).to(found)
            if tell is not None:
                tell(number + 1)
        return found

    def _row(self, rollouts: Tensor, mask: Tensor) -> Tensor:
        """The row (b, m, k) of rollouts (b, m, q, k) that is read."""
        if self.weights is None and self.readout == "mean":
            return readout_row(rollouts, mask, self.readout)
        if self.weights is None:
            if self._place is None:
                self._place = readout_place(mask, self.readout).view(-1, 1, 1, 1)
            # A text without a real token has a row of zeros as it is.
            return rollouts.gather(2, self._place.expand(*rollouts.shape[:2], 1, rollouts.shape[3])).squeeze(2)
        return torch.einsum("bq,bmqk->bmk", self.weights.to(rollouts), rollouts)

    def _keep(self, kept: dict[str, Tensor], maps: Tensor, place: int) -> None:
        _, b, s, _ = maps.shape
        for method, one in zip(self.methods, maps, strict=True):
            if method not in kept:
                kept[method] = one.new_empty(b, self.depth, s, s)
            kept[method][:, place] = one
