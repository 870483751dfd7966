"""How much the decisions depend on the tokens that a method ranks first, against tokens drawn at random.

Comprehensiveness and sufficiency: DeYoung et al., ACL 2020, section 4.

Axes: ``b`` example, ``k`` token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """The figures of one analysis, on the CPU.

    Attributes:
        gain: method -> (b,) comprehensiveness less that of random tokens, as a share of ``span``; NaN where left out.
        sufficiency_gain: method -> (b,) how much more of ``span`` is kept by the method's first tokens alone than by
            random ones; empty where it was not asked for.
        log_odds: method -> (b,) log-odds of what is decided on the whole text, less those on the copy without the
            method's first tokens; empty where the score is a value.
        span: (b,) the score of the whole text less that of the text with every token masked.
        masked: method -> one (k,) bool per example: the tokens that were masked; empty in all processes but the first.
        unit: ``"probability"``, or ``"value"`` where the decision has none.
        share: which share of the tokens was masked.
        passes: how many forward passes it took per batch.
    """

    gain: dict[str, Tensor]
    sufficiency_gain: dict[str, Tensor]
    log_odds: dict[str, Tensor]
    span: Tensor
    masked: dict[str, list[Tensor]]
    unit: str = "probability"
    share: float = 0.2
    passes: int = 0

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Faithfulness":
        """Returns what :meth:`state_dict` was called on."""
        return cls(**state)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything in tensors and primitives."""
        return dict(vars(self))
