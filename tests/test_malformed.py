"""Malformed inputs and models: each ends in an error of the package that says something, or in figures."""

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from globenc_lightning import Attributions, attribute
from globenc_lightning.errors import GlobEncError
from tests import models
from tests.test_odd_models import Plain, state

IDS, MASK = models.batch((9, 5, 7)).values()
LABELS = torch.tensor([0, 1, 2])
FLOAT = torch.float32


def classifier() -> nn.Module:
    return models.build("bert")


def given(**changes: Any) -> dict[str, Any]:
    """A good batch with some entries exchanged; None leaves one out."""
    batch = {"input_ids": IDS, "attention_mask": MASK, **changes}
    return {key: value for key, value in batch.items() if value is not None}


class Returning(Plain):
    """Runs its encoder and returns something."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__("bert", FLOAT)
        self.what = what

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.what(super().forward(input_ids, attention_mask))


class Raising(Plain):
    """Its forward raises, before or after its encoder."""

    def __init__(self, error: Exception, late: bool = False) -> None:
        super().__init__("bert", FLOAT)
        self.error, self.late = error, late

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.late:
            super().forward(input_ids, attention_mask)
        raise self.error


class NoArguments(Plain):
    def forward(self) -> Tensor:  # type: ignore[override]
        return torch.ones(3, 3)


class OtherNames(Plain):
    def forward(self, words: Tensor, places: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.encoder(words, attention_mask=places).last_hidden_state[:, 0])


class NoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, models.CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.embedding(input_ids).mean(1)


class NotCalled(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder.embeddings(input_ids)[:, 0])


class Unfinished(Plain):
    """The encoder raises in the middle, and the forward goes on."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with suppress(RuntimeError, ValueError):
            self.encoder(input_ids, attention_mask=attention_mask[:, :2])
        return super().forward(input_ids, attention_mask)


class Growing(Plain):
    """Another number of encoder calls each time."""

    times = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.times += 1
        return sum(self.head(self.read(input_ids, attention_mask)) for _ in range(self.times))  # type: ignore[return-value]


def layerless() -> nn.Module:
    config = transformers.BertConfig(**{**models.FAMILIES["bert"].config().to_dict(), "num_hidden_layers": 0})
    return transformers.BertForSequenceClassification(config).eval()


def nan_weights() -> nn.Module:
    model = classifier()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    return model


def returning(what: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Returning(what).eval()


def raising(error: Exception, late: bool = False) -> Callable[[], nn.Module]:
    return lambda: Raising(error, late).eval()


def plain(kind: Any) -> Callable[[], nn.Module]:
    return lambda: kind("bert", FLOAT).eval()


def raises(*args: Any) -> Any:
    raise IndexError("in the user's own code")


INPUTS: dict[str, Any] = {
    "None": None,
    "a string": "a text",
    "a list": [1, 2, 3],
    "a tensor": IDS,
    "a number": 3,
    "nothing": {},
    "a mapping without tensors": {"input_ids": "a text"},
    "lists of numbers": {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()},
    "arrays": {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()},
    "keys that are no strings": {1: IDS, 2: MASK},
    "keys of both kinds": {"input_ids": IDS, 2: MASK},
    "no ids": given(input_ids=None),
    "ids None": {"input_ids": None, "attention_mask": MASK},
    "no rows": given(input_ids=IDS[:0], attention_mask=MASK[:0]),
    "no columns": given(input_ids=IDS[:, :0], attention_mask=MASK[:, :0]),
    "one axis": given(input_ids=IDS[0], attention_mask=MASK[0]),
    "one axis, no mask": {"input_ids": IDS[0]},
    "a scalar": given(input_ids=IDS[0, 0]),
    "three axes": given(input_ids=IDS[None], attention_mask=MASK[None]),
    "four axes": given(input_ids=IDS[None, None]),
    "ids of floats": given(input_ids=IDS.float()),
    "ids of halves": given(input_ids=IDS.half()),
    "ids of booleans": given(input_ids=IDS.bool()),
    "ids of complex numbers": given(input_ids=IDS.to(torch.complex64)),
    "ids of eight bits": given(input_ids=IDS.to(torch.int8)),
    "ids too large": given(input_ids=IDS + 1000),
    "ids negative": given(input_ids=-IDS),
    "ids far too large": given(input_ids=IDS + 2**40),
    "ids sparse": given(input_ids=IDS.to_sparse()),
    "ids on the meta device": given(input_ids=IDS.to("meta")),
    "ids too long": given(input_ids=IDS.repeat(1, 10), attention_mask=MASK.repeat(1, 10)),
    "mask too short": given(attention_mask=MASK[:, :4]),
    "mask of other rows": given(attention_mask=MASK[:2]),
    "mask of one axis": given(attention_mask=MASK[0]),
    "mask of three axes": given(attention_mask=MASK[:, None]),
    "mask of four axes": given(attention_mask=MASK[:, None, None].bool()),
    "mask all zero": given(attention_mask=MASK * 0),
    "mask negative": given(attention_mask=-MASK),
    "mask of floats": given(attention_mask=MASK.float()),
    "mask of additive floats": given(attention_mask=(1 - MASK.float()) * -1e4),
    "mask NaN": given(attention_mask=MASK * float("nan")),
    "mask a string": given(attention_mask="a mask"),
    "mask a list": given(attention_mask=MASK.tolist()),
    "one row all padding": given(attention_mask=MASK * torch.tensor([[1], [0], [1]])),
    "labels of other rows": given(labels=LABELS[:2]),
    "labels of two axes": given(labels=LABELS[:, None]),
    "labels of three axes": given(labels=LABELS[:, None, None]),
    "labels of floats": given(labels=LABELS.float()),
    "labels too large": given(labels=LABELS + 7),
    "labels negative": given(labels=LABELS - 100),
    "labels a scalar": given(labels=LABELS[0]),
    "labels strings": given(labels=["a", "b", "c"]),
    "token types out of range": given(token_type_ids=IDS * 0 + 9),
    "token types of another shape": given(token_type_ids=IDS[:, :3] * 0),
    "positions out of range": given(position_ids=IDS * 0 + 500),
    "embeddings and ids": given(inputs_embeds=torch.zeros(3, 9, 32)),
    "embeddings of another width": given(input_ids=None, inputs_embeds=torch.zeros(3, 9, 31)),
    "embeddings NaN": given(input_ids=None, inputs_embeds=torch.full((3, 9, 32), float("nan"))),
    "images": {"pixel_values": torch.zeros(3, 3, 8, 8)},
    "an object": given(labels=object()),
}

MODELS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a string": lambda: "bert",
    "a function": lambda: raises,
    "a class": lambda: Plain,
    "an empty module": nn.Module,
    "an identity": nn.Identity,
    "a list of modules": lambda: nn.ModuleList([classifier()]),
    "no encoder": NoEncoder,
    "an encoder that is not called": plain(NotCalled),
    "an encoder without layers": layerless,
    "an encoder without a head": lambda: models.build("bert").base_model,
    "a forward without arguments": plain(NoArguments),
    "a forward with other names": plain(OtherNames),
    "an encoder call that fails in between": plain(Unfinished),
    "another number of calls each time": plain(Growing),
    "an embedding beyond the layers": lambda: models.build("fnet"),
    "on the meta device": lambda: classifier().to("meta"),
    "in halves": lambda: classifier().half(),
    "in doubles": lambda: classifier().double(),
    "in mixed precisions": lambda: _half_head(),
    "with weights NaN": nan_weights,
    "that returns None": returning(lambda logits: None),
    "that returns a string": returning(lambda logits: "positive"),
    "that returns a number": returning(lambda logits: 1.0),
    "that returns an integer tensor": returning(lambda logits: logits.argmax(1)),
    "that returns no tuple entries": returning(lambda logits: ()),
    "that returns an empty mapping": returning(lambda logits: {}),
    "that returns two tensors": returning(lambda logits: (logits, logits)),
    "that returns a mapping of strings": returning(lambda logits: {"logits": "none"}),
    "that returns an empty tensor": returning(lambda logits: logits[:, :0]),
    "that returns no rows": returning(lambda logits: logits[:0]),
    "that returns a scalar": returning(lambda logits: logits.sum()),
    "that returns NaN": returning(lambda logits: logits * float("nan")),
    "that returns infinity": returning(lambda logits: logits / 0),
    "that returns complex numbers": returning(lambda logits: logits.to(torch.complex64)),
    "that returns what depends on nothing": returning(lambda logits: torch.ones(3, 3)),
    "that returns an array": returning(lambda logits: logits.detach().numpy()),
    "that returns three axes": returning(lambda logits: logits[:, None]),
    "that returns itself": returning(lambda logits: nn.Identity()),
    "that raises a ValueError": raising(ValueError("own words")),
    "that raises an IndexError late": raising(IndexError("own words"), late=True),
    "that raises a KeyError": raising(KeyError("own words")),
    "that raises without a word": raising(RuntimeError()),
    "that raises NotImplementedError": raising(NotImplementedError()),
    "that raises an AssertionError": raising(AssertionError()),
    "that raises StopIteration": raising(StopIteration(), late=True),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "an unknown target": {"target": "loss"},
    "a target None": {"target": None},
    "a target that raises": {"target": raises},
    "a target that returns None": {"target": lambda logits, batch: None},
    "a target that returns a number": {"target": lambda logits, batch: 1},
    "a target of a wrong shape": {"target": lambda logits, batch: logits},
    "a target out of range": {"target": lambda logits, batch: logits.argmax(1) + 50},
    "a target that depends on nothing": {"target": lambda logits, batch: torch.ones(3)},
    "a target that is detached": {"target": lambda logits, batch: logits[:, 0].detach()},
    "a target NaN": {"target": lambda logits, batch: logits[:, 0] * float("nan")},
    "a target without arguments": {"target": lambda: 1},
    "labels that are not there": {"target": "label"},
    "an unknown method": {"methods": ("N-Encoder",)},
    "no method": {"methods": ()},
    "a method twice": {"methods": ("N-Enc", "N-Enc")},
    "a method None": {"methods": None},
    "methods that are numbers": {"methods": [1]},
    "an unknown readout": {"readout": "max"},
    "a readout None": {"readout": None},
    "normalize a number": {"normalize": 1},
    "special tokens without a mask": {"exclude_special_tokens": True},
    "a forward that raises": {"forward": raises},
    "a forward without arguments": {"forward": lambda: 1},
    "a forward that returns None": {"forward": lambda module, batch: None},
    "a forward that is no function": {"forward": "model"},
    "a forward that calls nothing": {"forward": lambda module, batch: torch.ones(3, 3)},
    "a forward of other rows": {"forward": lambda module, batch: module(**batch).logits[:1]},
}

CASES = {
    **{f"inputs: {name}": (classifier, inputs, {}) for name, inputs in INPUTS.items()},
    **{f"labelled inputs: {name}": (classifier, inputs, {"target": "label"}) for name, inputs in INPUTS.items()},
    **{f"own forward, inputs: {name}": (plain(Plain), inputs, {}) for name, inputs in INPUTS.items()},
    **{f"a model {name}": (model, given(), {}) for name, model in MODELS.items()},
    **{f"{name}": (classifier, given(), options) for name, options in OPTIONS.items()},
}
FIGURES = ("in doubles", "mask of floats", "one row all padding", "a forward without arguments")
"""Some that are no mistake at all, or one that is answered with figures and a warning."""


def _half_head() -> nn.Module:
    model = Plain("bert", FLOAT)
    model.head.half()
    return model.eval()


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def outcome(model: Any, inputs: Any, options: dict[str, Any]) -> tuple[Attributions | None, Exception | None]:
    try:
        return attribute(model, inputs, **options), None
    except Exception as error:
        return None, error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_nothing_raw_comes_out_and_the_model_stays_as_it_was(case: str) -> None:
    build, inputs, options = CASES[case]
    model = build()
    given = {key: copied(value) for key, value in inputs.items()} if isinstance(inputs, dict) else inputs
    before = state(model) if isinstance(model, nn.Module) and not isinstance(model, type) else None
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[union-attr]
    found, error = outcome(model, given, options)
    if found is None:
        # ValueError is for arguments that are wrong whatever the model is.
        assert isinstance(error, GlobEncError) or (isinstance(error, ValueError) and case in OPTIONS), repr(error)
        assert len(str(error)) > 20
        assert "the analysis failed" not in str(error)
        assert "reading the encoder failed" not in str(error)
    else:
        mask = found.attention_mask
        assert torch.isfinite(found.rows["N-Enc"].masked_fill(~mask[:, None], 0.0)).all()
        assert torch.isfinite(found.saliency).all()
    if before is not None:
        assert state(model) == before
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), states[2])
    if isinstance(given, dict):
        for key, value in inputs.items():
            same = value is given[key] or not isinstance(value, Tensor) or value.is_meta or value.is_sparse
            assert same or torch.equal(value.nan_to_num(), given[key].nan_to_num())


def test_there_are_enough_cases_and_most_are_refused() -> None:
    assert len(CASES) > 150
    assert all(any(name in case for case in CASES) for name in FIGURES)
