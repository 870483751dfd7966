"""What a user has chosen: the arguments of ``GlobEncCallback``, checked before any training starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from globenc_lightning import state_keys
from globenc_lightning.settings import Settings

ON_ERROR = ("warn", "raise")
LATER: dict[str, Any] = {
    "decision": 0,
    "encoder_call": 0,
    "aggregation": "rollout",
    "references": ["saliency"],
    "signed": False,
    "faithfulness": [],
}
"""Arguments that earlier versions did not have, and their defaults."""


@dataclass
class Choices:
    """The arguments of a callback that say what is computed, when, and what is done when it fails.

    Attributes:
        settings: what is computed.
        num_examples: how many examples are taken from the validation loop.
        every_n_validations: the first validation and every n-th after it are analysed.
        heatmap_examples: how many examples get pictures.
        forward: how the module gives the logits that are explained, or None.
        on_error: ``"warn"`` or ``"raise"``.
        custom_scalars: whether a layout for TensorBoard's Custom Scalars tab is written.
        decision: which decision is explained: the number of the loss, or the path of the head.
        encoder_call: which of several calls of an encoder is shown.
        faithfulness: the methods whose first tokens are masked; True for all of ``settings.methods``, False for none.
        faithfulness_every_n: so often, counted in analysed validations.

    Raises:
        ValueError: an argument that cannot be used, with what to write instead.
    """

    settings: Settings
    num_examples: int = 16
    every_n_validations: int = 1
    heatmap_examples: int = 4
    forward: Callable[..., Any] | None = None
    on_error: str = "warn"
    custom_scalars: bool = False
    decision: int | str = 0
    encoder_call: int = 0
    faithfulness: bool | Sequence[str] = False
    faithfulness_every_n: int = 1
    code: dict[str, str | None] = field(init=False)

    def __post_init__(self) -> None:
        for name, least in (("num_examples", 1), ("every_n_validations", 1), ("heatmap_examples", 0)):
            _check_whole(name, getattr(self, name), least)
        if not isinstance(self.decision, str) and not _is_whole(self.decision):
            raise ValueError(
                "decision must be the number of a loss, from 0, or the path of a head such as 'head'; got "
                f"{self.decision!r}"
            )
        _check_whole("encoder_call", self.encoder_call, 0)
        _check_whole("faithfulness_every_n", self.faithfulness_every_n, 1)
        self._check_faithfulness()
        if self.decision != 0 and self.forward is not None:
            raise ValueError(
                "decision= chooses among the losses of the module's own steps, which forward= takes the place of: give "
                "one of them, and have forward(module, batch) return the logits of the head that is meant"
            )
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error must be 'warn' or 'raise'; got {self.on_error!r}")
        if not isinstance(self.custom_scalars, bool):
            raise ValueError(f"custom_scalars must be True or False; got {self.custom_scalars!r}")
        if self.forward is not None and not callable(self.forward):
            raise ValueError(f"forward must be callable, forward(module, batch); got {type(self.forward).__name__}")
        # As they are now: a function may change what it holds before a checkpoint is written.
        functions = {"target_code": self.settings.target, "forward_code": self.forward}
        self.code = {name: state_keys.code_digest(function) for name, function in functions.items()}

    @property
    def masked_methods(self) -> tuple[str, ...]:
        """The methods whose first tokens are masked."""
        if isinstance(self.faithfulness, bool):
            return tuple(self.settings.methods) if self.faithfulness else ()
        return tuple(self.faithfulness)

    def _check_faithfulness(self) -> None:
        methods = self.settings.methods
        if isinstance(self.faithfulness, bool):
            return
        given = self.faithfulness
        if isinstance(given, str) or not isinstance(given, Sequence) or len(set(given)) < len(given) or not given:
            raise ValueError(f"faithfulness must be True, False or a list of methods, each once; got {given!r}")
        for method in given:
            if method not in methods:
                raise ValueError(
                    f"faithfulness names {method!r}, which is not computed: choose from {', '.join(methods)}, or add "
                    "it to methods="
                )

    def named(self, probe: str) -> dict[str, Any]:
        """Returns what the figures depend on and a new process can know as well, in primitives.

        Args:
            probe: what tells the probe from others before a training: its fingerprint, or ``"validation"``.
        """
        settings = self.settings
        # Arguments that earlier versions did not have are left out where they have their default: keys stay the same.
        now = {
            "decision": self.decision,
            "encoder_call": self.encoder_call,
            "aggregation": settings.aggregation,
            "references": list(settings.references),
            "signed": settings.signed,
            "faithfulness": list(self.masked_methods),
        }
        return {
            "probe": probe,
            "methods": list(settings.methods),
            "target": settings.target_name,
            "readout": settings.readout,
            "normalize": settings.normalize,
            "exclude_special_tokens": settings.exclude_special_tokens,
            **{name: value for name, value in now.items() if value != LATER[name]},
        }

    def made_of(self, probe: str) -> dict[str, Any]:
        """Returns everything that the state's key is made of, in primitives; ``probe`` as for :meth:`named`."""
        return {**self.named(probe), **self.code}


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what differs between two settings as :meth:`Choices.named` gives them, in words."""
    # Arguments that a state does not name have their default.
    was, now = ({**LATER, **one} for one in (was, now))
    return [f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in now if was.get(name) != now[name]]


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_whole(name: str, value: Any, least: int) -> None:
    if not _is_whole(value, least):
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
