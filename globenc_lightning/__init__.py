"""GlobEnc during fine-tuning: what a transformer encoder attends to, seen from inside the training loop."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from globenc_lightning.analysis import attribute
    from globenc_lightning.attributions import Attributions
    from globenc_lightning.callback import GlobEncCallback
    from globenc_lightning.functional.attribution import METHODS
    from globenc_lightning.probe import ProbeSet
    from globenc_lightning.record.replay import record_checkpoint

__all__ = ["METHODS", "Attributions", "GlobEncCallback", "ProbeSet", "attribute", "record_checkpoint"]

# TensorBoard imports the plugin from inside this package, where there may be no torch, and must not wait for it where
# there is: so a name is looked up when somebody asks for it.
_HOMES = {
    "METHODS": "globenc_lightning.functional.attribution",
    "Attributions": "globenc_lightning.attributions",
    "GlobEncCallback": "globenc_lightning.callback",
    "ProbeSet": "globenc_lightning.probe",
    "attribute": "globenc_lightning.analysis",
    "record_checkpoint": "globenc_lightning.record.replay",
}

if not TYPE_CHECKING:
    # Hidden from type checkers, for whom a module with this function has every name.
    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
