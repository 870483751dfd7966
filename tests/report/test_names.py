from typing import Any

import pytest
from torch import nn

from globenc_lightning.report.names import class_names
from tests import models

OWN, OTHER = ["bad", "good", "odd"], ["x", "y", "z"]


def named(names: list[str] | None, family: str = "bert") -> Any:
    model = models.build(family)
    if names is not None:
        model.config.id2label = dict(enumerate(names))
    return model


class Two(nn.Module):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second


@pytest.mark.parametrize(
    ("module", "encoder", "expected"),
    [
        (lambda: Two(named(OTHER), named(OWN)), "second.bert", OWN),
        (lambda: Two(named(OWN), named(OTHER, "distilbert")), "first.bert", OWN),
        # A head of the user's own on a body: the other model's classes are not its.
        (lambda: Two(named(OTHER), named(None).bert), "second", None),
        (lambda: Two(named(OTHER), nn.ModuleList([named(None)])), "second.0.bert", None),
        (lambda: named(OWN), "bert", OWN),
        (lambda: named(OWN).bert, "BertModel", None),
    ],
)
def test_names_are_those_of_the_model_that_is_shown(module: Any, encoder: str, expected: list[str] | None) -> None:
    assert class_names(module(), encoder) == expected


@pytest.mark.parametrize("task", ["regression", "masked token", "span", "choice", "similarity"])
def test_what_is_no_class_has_no_name(task: str) -> None:
    assert class_names(named(OWN), "bert", task) is None
    assert class_names(named(OWN), "bert", "token classification") == OWN
