import functools
import warnings
from collections.abc import Callable

import pytest
import torch

from globenc_lightning.errors import GlobEncWarning, warn

WHERE = {"__name__": "globenc_lightning.somewhere", "warn": warn}
exec("def inside():\n    warn('a reason')", WHERE)
inside: Callable[[], None] = WHERE["inside"]  # type: ignore[assignment]


@torch.no_grad()
def below_torch() -> None:
    inside()


@pytest.mark.parametrize("call", [inside, below_torch, functools.partial(inside)])
def test_a_warning_points_to_the_users_own_line(call: Callable[[], None]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (one,) = caught
    assert one.filename == __file__
    assert one.category is GlobEncWarning
