"""What an analysis computes, as a user chooses it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from globenc_lightning.functional import METHODS, READOUTS

Target = str | Callable[..., Any]

TARGETS = ("predicted", "label")
AUTO = "auto"
"""The readout that reads the row where the decision reads."""
FURTHER_METHODS = ("ALTI", "Value-Zeroing")
"""Methods beside GlobEnc's own eight, which are computed where they are asked for."""
AGGREGATIONS = ("rollout", "maxflow")
REFERENCES = ("saliency", "integrated gradients", "HTA", "exact HTA")
"""What the rows are compared with; the saliency always is."""


@dataclass(frozen=True)
class Settings:
    """What is to be computed; checked when it is made.

    Attributes:
        methods: any of ``METHODS`` and ``FURTHER_METHODS``.
        target: ``"predicted"``, ``"label"`` or a callable.
        readout: one of ``READOUTS``, or ``"auto"``: where the decision reads.
        normalize: divide rows by their sum before the rollout.
        exclude_special_tokens: leave special tokens out of the correlation.
        aggregation: how the layers' maps are put together: ``"rollout"`` (their product), or ``"maxflow"`` (Abnar &
            Zuidema, ACL 2020).
        references: what the rows are compared with, any of ``REFERENCES``; the saliency always comes first.
        signed: compute signed contributions to the score, too.
    """

    methods: Sequence[str] = ("N-Enc",)
    target: Target = "predicted"
    readout: str = AUTO
    normalize: bool = False
    exclude_special_tokens: bool = False
    aggregation: str = "rollout"
    references: Sequence[str] = ("saliency",)
    signed: bool = False

    def __post_init__(self) -> None:
        """Check the choices, and say what there is to choose from."""
        if not isinstance(self.methods, str | Sequence):
            raise ValueError(f"methods must be a sequence of {', '.join(METHODS)}; got {self.methods!r}")
        for name in ("normalize", "exclude_special_tokens", "signed"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}")
        methods = (self.methods,) if isinstance(self.methods, str) else tuple(self.methods)
        object.__setattr__(self, "methods", methods)
        for method in methods:
            if method not in (*METHODS, *FURTHER_METHODS):
                raise ValueError(f"unknown method {method!r}: choose from {', '.join((*METHODS, *FURTHER_METHODS))}")
        if not methods or len(set(methods)) < len(methods):
            raise ValueError(f"methods must name at least one method, each once; got {methods!r}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"unknown aggregation {self.aggregation!r}: choose from {', '.join(AGGREGATIONS)}")
        if isinstance(self.references, str) or not isinstance(self.references, Sequence):
            raise ValueError(f"references must be a sequence of {', '.join(REFERENCES)}; got {self.references!r}")
        for reference in self.references:
            if reference not in REFERENCES:
                raise ValueError(f"unknown reference {reference!r}: choose from {', '.join(REFERENCES)}")
        if len(set(self.references)) < len(self.references):
            raise ValueError(f"references must name each once; got {tuple(self.references)!r}")
        others = tuple(one for one in self.references if one != REFERENCES[0])
        object.__setattr__(self, "references", (REFERENCES[0], *others))
        if self.readout not in (AUTO, *READOUTS):
            raise ValueError(f"unknown readout {self.readout!r}: choose from {', '.join((AUTO, *READOUTS))}")
        if not callable(self.target) and self.target not in TARGETS:
            raise ValueError(
                f"unknown target {self.target!r}: choose 'predicted' or 'label', or give a callable "
                "target(logits, batch) that returns one class index or one score per example"
            )

    @property
    def further_references(self) -> tuple[str, ...]:
        """What the rows are compared with besides the saliency."""
        return tuple(self.references[1:])

    @property
    def target_name(self) -> str:
        """The target in words."""
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", "callable")
