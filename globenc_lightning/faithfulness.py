"""How much the decisions depend on the tokens that a method ranks first, against tokens drawn at random.

Comprehensiveness and sufficiency: DeYoung et al., ACL 2020, section 4.

Axes: ``b`` example, ``k`` token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.errors import CollectiveError, MaskingError, is_out_of_memory
from globenc_lightning.explained import Explained
from globenc_lightning.functional.perturbation import SHARE
from globenc_lightning.perturbing import Masked, masked_again
from globenc_lightning.task.fixed import FIXED_SCORES

BY_METHOD = ("gain", "sufficiency_gain", "log_odds")


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """The figures of one analysis, on the CPU.

    Attributes:
        gain: method -> (b,) comprehensiveness less that of random tokens, as a share of ``span``; NaN where left out.
        sufficiency_gain: method -> (b,) how much more of ``span`` is kept by the method's first tokens alone than by
            random ones.
        log_odds: method -> (b,) log-odds of what is decided on the whole text, less those on the copy without the
            method's first tokens; empty where the score is a value.
        span: (b,) the score of the whole text less that of the text with every token masked.
        masked: method -> one (k,) bool per example: the tokens that were masked; empty in all processes but the first.
        unit: ``"probability"``, or ``"value"`` where the decision has none.
        share: which share of the tokens was masked.
        passes: how many forward passes it took per batch.
        score: which score the copies are compared by, in words.
        masking: how tokens were masked: ``"mask token"``, or ``"attention mask"`` where no tokenizer has one.
    """

    gain: dict[str, Tensor]
    sufficiency_gain: dict[str, Tensor]
    log_odds: dict[str, Tensor]
    span: Tensor
    masked: dict[str, list[Tensor]]
    unit: str = "probability"
    share: float = SHARE
    passes: int = 0
    score: str = ""
    masking: str = "mask token"

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Faithfulness":
        """Returns what :meth:`state_dict` was called on."""
        state = dict(state)
        for name in BY_METHOD:
            values = state[name]
            state[name] = dict(zip(values, torch.stack([*values.values()]).unbind(0), strict=True)) if values else {}
        lengths, flags = state.pop("lengths", None), state["masked"]
        if lengths is not None:
            state["masked"] = {method: list(one.split(lengths)) for method, one in flags.items()}
        return cls(**state)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything in few tensors and primitives: a checkpoint pays for every tensor, however small."""
        flags = {method: torch.cat(one) for method, one in self.masked.items() if one}
        lengths = [len(one) for one in next(iter(self.masked.values()), ())]
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**parts, "masked": flags, **({"lengths": lengths} if flags else {})}

    def first(self, most: int) -> "Faithfulness":
        """Returns the figures of so many of the first examples."""
        parts: dict[str, Any] = {
            name: {method: values[:most] for method, values in getattr(self, name).items()}
            for name in (*BY_METHOD, "masked")
        }
        return replace(self, span=self.span[:most], **parts)


class Gathering:
    """Gathers the figures of a probe's batches, and why there are none.

    Args:
        methods: the methods whose first tokens are masked.
        size: the number of examples of the probe.

    Attributes:
        reason: why there are no figures, or none of some examples, in words; empty where nothing is missing.
    """

    def __init__(self, methods: Sequence[str], size: int) -> None:
        self.reason = ""
        self._methods = methods
        self._size = size
        self._found: Faithfulness | None = None

    def add(
        self,
        indices: Sequence[int],
        explained: Explained,
        rows: Mapping[str, Tensor],
        real: Tensor,
        special: Sequence[Tensor | None],
        mask_id: int | None,
        may_be_smaller: Callable[[], bool],
    ) -> None:
        """Run the masked copies of a batch; whatever goes wrong is a reason, and loses no other figure.

        Args:
            indices: the numbers of its examples, n.
            explained: what was explained.
            rows: method -> (n, s) the row of the last layer, on the CPU.
            real: (n, s) true for real tokens.
            special: as for :func:`~globenc_lightning.perturbing.masked_again`.
            mask_id: the tokenizer's mask token, or None.
            may_be_smaller: whether smaller batches may need less memory; then what says that it does not suffice is
                raised, and nothing else is.
        """
        try:
            chosen = {method: rows[method] for method in self._methods}
            self._take(indices, masked_again(explained, chosen, real, special, mask_id), explained.decision.kind, real)
        except Exception as error:
            if isinstance(error, CollectiveError) or (is_out_of_memory(error) and may_be_smaller()):
                raise
            what = str(error) if isinstance(error, MaskingError) else f"{type(error).__name__}: {error}"
            self.reason = self.reason or what

    def result(self) -> Faithfulness | None:
        """Returns the figures; None where no batch gave any."""
        return self._found

    def _take(self, indices: Sequence[int], one: Masked, kind: str, real: Tensor) -> None:
        if self._found is None:
            values = one.unit == "value"
            self._found = Faithfulness(
                gain={method: _nothing(self._size) for method in one.gains},
                sufficiency_gain={method: _nothing(self._size) for method in one.gains},
                log_odds={} if values else {method: _nothing(self._size) for method in one.gains},
                span=_nothing(self._size),
                masked={method: [torch.empty(0, dtype=torch.bool)] * self._size for method in one.gains},
                unit=one.unit,
                passes=one.passes,
                score=FIXED_SCORES[kind],
                masking="mask token" if one.by_id else "attention mask",
            )
        found = self._found
        if found.unit != one.unit:
            raise MaskingError("the batches of the probe are decided in different ways")
        places = list(indices)
        found.span[places] = one.span.float()
        for method, gained in one.gains.items():
            found.gain[method][places] = gained.comprehensiveness.float()
            found.sufficiency_gain[method][places] = gained.sufficiency.float()
            if found.log_odds:
                found.log_odds[method][places] = gained.log_odds.float()
            for place, index in enumerate(places):
                found.masked[method][index] = one.tokens[method][place][real[place]].clone()


def put_together(shares: Sequence[tuple[Sequence[int], Faithfulness | None]]) -> Faithfulness | None:
    """Returns the figures of several processes; None where none of them has any.

    Args:
        shares: the examples that each of them has analysed, and their figures; NaN where a process has none.
    """
    known = [(list(chosen), one) for chosen, one in shares if one is not None]
    if not known:
        return None
    first = known[0][1]
    parts: dict[str, dict[str, Tensor]] = {
        name: {method: torch.full_like(values, float("nan")) for method, values in getattr(first, name).items()}
        for name in BY_METHOD
    }
    span = torch.full_like(first.span, float("nan"))
    masked = {method: list(one) for method, one in first.masked.items()}
    for chosen, share in known:
        span[chosen] = share.span[chosen]
        for name, by_method in parts.items():
            for method, values in by_method.items():
                values[chosen] = getattr(share, name)[method][chosen]
        for method, tokens in masked.items():
            for index in chosen:
                tokens[index] = share.masked[method][index]
    return replace(
        first,
        gain=parts["gain"],
        sufficiency_gain=parts["sufficiency_gain"],
        log_odds=parts["log_odds"],
        span=span,
        masked=masked,
    )


def _nothing(size: int) -> Tensor:
    return torch.full((size,), float("nan"))
