import functools
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from globenc_lightning import state_keys

MADE_OF: dict[str, Any] = {"probe": "validation", "methods": ["N"], "target": "<lambda>", "target_code": "0123"}


class Logit:
    """A target that knows its class."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.myself = self

    def __call__(self, logits: Any, batch: Any) -> Any:
        return logits[:, self.index]

    def first(self, logits: Any, batch: Any) -> Any:
        return logits[:, 0]

    def second(self, logits: Any, batch: Any) -> Any:
        return logits[:, 1]


class Other(Logit):
    """Does the same with other code."""

    def __call__(self, logits: Any, batch: Any) -> Any:
        return logits.select(1, self.index)


class Head(nn.Module):
    """A module that is a target."""

    def forward(self, logits: Any, batch: Any) -> Any:
        return logits[:, 0]


def logit(logits: Any, batch: Any, index: int = 0) -> Any:
    return logits[:, index]


def holding(index: Any) -> Callable[..., Any]:
    return lambda logits, batch: logits[:, index]


def nested(index: int) -> Callable[..., Any]:
    inner = holding(index)
    return lambda logits, batch: inner(logits, batch)


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "lambdas of other constants": (lambda logits, batch: logits[:, 1], lambda logits, batch: logits[:, 2]),
    "lambdas of other names": (lambda logits, batch: logits.amax(-1), lambda logits, batch: logits.amin(-1)),
    "lambdas in lambdas": (lambda x, b: (lambda y: y + 1)(x), lambda x, b: (lambda y: y + 2)(x)),
    "other defaults": (lambda x, b, i=1: x[:, i], lambda x, b, i=2: x[:, i]),
    "other keyword defaults": (lambda x, b, *, i=1: x[:, i], lambda x, b, *, i=2: x[:, i]),
    "partials": (functools.partial(logit, index=1), functools.partial(logit, index=2)),
    "closures": (holding(1), holding(2)),
    "closures of names": (holding("a"), holding("b")),
    "closures of closures": (nested(1), nested(2)),
    "instances": (Logit(1), Logit(2)),
    "instances of two classes": (Logit(1), Other(1)),
    "bound methods": (Logit(1).first, Logit(1).second),
    "methods of two instances": (Logit(1).first, Logit(2).first),
    "item getters": (operator.itemgetter(1), operator.itemgetter(2)),
    "built-in functions": (torch.amax, torch.amin),
    "one and none": (logit, None),
}
SAME: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda logits, batch: logits[:, 1],
    "a set of texts": lambda: lambda logits, batch: "a" in {"a", "b", "c", "d"},
    "partial": lambda: functools.partial(logit, index=1),
    "closure": lambda: holding(1),
    "a set in a closure": lambda: holding({"a", "b", "c", "d"}),
    "an object in a closure": lambda: holding(object()),
    "instance": lambda: Logit(1),
    "bound method": lambda: Logit(1).first,
    "module": lambda: Head(),
    "a tensor in a closure": lambda: holding(torch.rand(3)),
    "a circle": lambda: holding([Logit(1)]),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_functions_have_different_digests(kind: str) -> None:
    one, other = DIFFERENT[kind]
    assert state_keys.code_digest(one) != state_keys.code_digest(other)


@pytest.mark.parametrize("kind", SAME)
def test_the_same_function_made_again_has_the_same_digest(kind: str) -> None:
    # Both are alive, so that no address is used again.
    one, other = SAME[kind](), SAME[kind]()
    digest = state_keys.code_digest(one)
    assert digest == state_keys.code_digest(other)
    assert re.fullmatch("[0-9a-f]{12}", str(digest))


def test_a_function_without_a_value_for_its_closure_has_a_digest() -> None:
    def outer() -> str | None:
        def inner() -> Any:
            return later

        digest = state_keys.code_digest(inner)
        later = 1
        assert inner() == later
        return digest

    assert outer() is not None


def test_digests_are_the_same_in_other_processes() -> None:
    program = (
        "from tests import test_state_keys as t; "
        "print([t.state_keys.code_digest(make()) for make in t.SAME.values()], "
        "[[t.state_keys.code_digest(one) for one in pair] for pair in t.DIFFERENT.values()])"
    )
    root = Path(__file__).parents[1]
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert str([state_keys.code_digest(make()) for make in SAME.values()]) in said.pop()


@pytest.mark.parametrize("name", ["GlobEncCallback", "test.<locals>.Mine: a|b", "Ünïcode", "x" * 300, ".."])
def test_keys_are_short_names_for_files(name: str) -> None:
    for place in (1, 2, 12):
        key = state_keys.state_key(name, {**MADE_OF, "probe": "\ud800"}, place)
        assert re.fullmatch("[A-Za-z0-9_]{13,70}", key)


def test_keys_tell_classes_settings_and_places_apart() -> None:
    keys = [
        state_keys.state_key("A", MADE_OF),
        state_keys.state_key("B", MADE_OF),
        state_keys.state_key("A", {**MADE_OF, "methods": ["W"]}),
        state_keys.state_key("A", {**MADE_OF, "target_code": "4567"}),
        state_keys.state_key("A", MADE_OF, 2),
        state_keys.state_key("x" * 100 + "A", MADE_OF),
        state_keys.state_key("y" * 100 + "A", MADE_OF),
    ]
    assert len(set(keys)) == len(keys)
    assert state_keys.state_key("A", dict(reversed(MADE_OF.items()))) == keys[0]


def test_an_older_state_is_the_old_key_s_then_that_of_the_same_settings() -> None:
    edited, other = {**MADE_OF, "target_code": "4567"}, {**MADE_OF, "methods": ["W"]}

    def key(name: str, number: int) -> str:
        return f"{state_keys.prefix(name)}{number:012x}"

    states = {
        key("A B", 1): {"made_of": edited},
        key("B", 1): {"made_of": edited},
        key("A", 1): {"made_of": other},
        key("A", 2): {"made_of": edited},
        key("A", 3): {"made_of": edited},
        key("A", 4): "broken",
        key("A", 5): {"made_of": None},
        3: {},
    }

    def found(taken: list[str], old_key: str = "A{}") -> str | None:
        return state_keys.older_state(states, "A", MADE_OF, taken, old_key)

    assert found([]) == key("A", 2)
    assert found([key("A", 2)]) == key("A", 3)
    assert found([key("A", 2), key("A", 3)]) is None
    assert list(state_keys.made_before(states, "A", [key("A", 2), key("A", 3)])) == [key("A", 1)]
    assert state_keys.older_state({**states, "A{}": {}}, "A", MADE_OF, [], "A{}") == "A{}"
    assert state_keys.older_state({**states, "A{}": {}}, "A", MADE_OF, ["A{}"], "A{}") == key("A", 2)
