from typing import Any

import pytest
import torch
from torch import Tensor

from globenc_lightning.task.kinds import Decision, Seen, decision_of, decision_of_squashed
from globenc_lightning.task.watching import LossCall, Squashed

_HOLDS = {"cross_entropy": "classes", "kl_div": "classes", "bce": "labels", "mse_loss": "values"}


def loss(name: str, logits: Tensor, target: Tensor, unscaled: Tensor | None = None) -> LossCall:
    unscaled = logits if unscaled is None else unscaled
    return LossCall(name, _HOLDS[name], logits, target, logits, unscaled, None, {}, logits.sum())


def seen(rows: int = 4, tokens: int = 6, **others: Any) -> Seen:
    return Seen(rows, tokens, **{"vocabulary": 50, "causal": False, "generates": False, "calls": 1, **others})


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


TOLD: list[tuple[str, LossCall, Seen, int | None, str]] = [
    ("classes", loss("cross_entropy", torch.rand(4, 3), ints(4)), seen(), 4, "classification"),
    ("as many classes as examples", loss("cross_entropy", torch.rand(4, 4), ints(4)), seen(), 4, "classification"),
    (
        "as many classes as tokens",
        loss("cross_entropy", torch.rand(4, 6), ints(4)),
        seen(by_column=False),
        4,
        "classification",
    ),
    (
        "as many tokens as classes",
        loss("cross_entropy", torch.rand(36, 6), ints(36)),
        seen(6),
        6,
        "token classification",
    ),
    ("one example", loss("cross_entropy", torch.rand(1, 3), ints(1)), seen(1), 1, "classification"),
    ("one example by token", loss("cross_entropy", torch.rand(6, 3), ints(6)), seen(1), 1, "token classification"),
    (
        "one token per text",
        loss("cross_entropy", torch.rand(4, 3), ints(4)),
        seen(by_token=True),
        4,
        "token classification",
    ),
    ("soft labels", loss("cross_entropy", torch.rand(4, 3), torch.rand(4, 3)), seen(), 4, "classification"),
    ("classes second", loss("cross_entropy", torch.rand(4, 3, 6), ints(4, 6)), seen(), 4, "token classification"),
    ("masked", loss("cross_entropy", torch.rand(24, 50), ints(24)), seen(), 4, "masked token"),
    ("next", loss("cross_entropy", torch.rand(20, 50), ints(20)), seen(causal=True), 4, "next token"),
    ("text to text", loss("cross_entropy", torch.rand(12, 50), ints(12)), seen(generates=True), 4, "text to text"),
    ("choices", loss("cross_entropy", torch.rand(2, 2), ints(2)), seen(chooses=True), 2, "choice"),
    (
        "classes of pairs in one call",
        loss("cross_entropy", torch.rand(2, 2), ints(2)),
        seen(chooses=False),
        2,
        "classification",
    ),
    ("negatives in the batch", loss("cross_entropy", torch.rand(4, 4), ints(4)), seen(mixes=True), 4, "similarity"),
    ("one logit", loss("bce", torch.rand(4), torch.rand(4)), seen(), 4, "binary"),
    ("one logit in a column", loss("bce", torch.rand(4, 1), torch.rand(4, 1)), seen(), 4, "binary"),
    ("several labels", loss("bce", torch.rand(4, 6), torch.rand(4, 6)), seen(by_column=False), 4, "multi-label"),
    (
        "a yes or no per token",
        loss("bce", torch.rand(4, 6), torch.rand(4, 6)),
        seen(by_column=True),
        4,
        "token classification",
    ),
    ("a yes or no per token that counts", loss("bce", torch.rand(9), torch.rand(9)), seen(), 4, "token classification"),
    ("a value", loss("mse_loss", torch.rand(4), torch.rand(4)), seen(), 4, "regression"),
    ("a value of one example", loss("mse_loss", torch.rand(()), torch.rand(())), seen(1), 1, "regression"),
    ("several values", loss("mse_loss", torch.rand(4, 2), torch.rand(4, 2)), seen(), 4, "loss"),
    ("values of tokens", loss("mse_loss", torch.rand(9), torch.rand(9)), seen(), 4, "loss"),
]


@pytest.mark.parametrize(("call", "how", "size", "kind"), [one[1:] for one in TOLD], ids=[one[0] for one in TOLD])
def test_kinds(call: LossCall, how: Seen, size: int | None, kind: str) -> None:
    assert decision_of([call], how, size).kind == kind


def test_a_span_is_two_losses_over_tokens() -> None:
    two = [loss("cross_entropy", torch.rand(4, 6), ints(4)) for _ in range(2)]
    assert decision_of(two, seen(by_column=True), 4).kind == "span"
    assert decision_of(two, seen(by_column=False), 4).kind == "classification"


def test_a_students_logits_are_not_divided_by_the_temperature() -> None:
    logits = torch.rand(4, 3)
    call = loss("kl_div", logits / 2, torch.rand(4, 3), logits)
    assert torch.equal(decision_of([call], seen(), 4).logits, logits)
    scaled = loss("cross_entropy", logits * 20, ints(4), logits)
    assert torch.equal(decision_of([scaled], seen(), 4).logits, logits * 20)
    assert torch.equal(decision_of([scaled], seen(mixes=True), 4).logits, logits)


def test_written_out_losses() -> None:
    classes = Squashed("softmax", "classes", torch.rand(4, 3), 1)
    assert decision_of_squashed(classes, None, seen(), 4).kind == "classification"
    by_token = Squashed("softmax", "classes", torch.rand(4, 3, 6), 1, ints(4, 6))
    found = decision_of_squashed(by_token, None, seen(), 4)
    assert (found.kind, found.width, tuple(found.logits.shape)) == ("token classification", 6, (24, 3))
    assert decision_of_squashed(Squashed("softmax", "classes", torch.rand(4, 6, 3), 2), None, seen(), 4) is None
    labels = Squashed("sigmoid", "labels", torch.rand(4, 1), None)
    assert decision_of_squashed(labels, None, seen(), 4).kind == "binary"


def test_a_yes_or_no_per_token_is_one_above_zero() -> None:
    decision = Decision("token classification", torch.tensor([[-1.0], [2.0]]), ints(2))
    units = torch.arange(2)
    assert decision.predicted(units).tolist() == [0, 1]
    torch.testing.assert_close(decision.probability(units), torch.tensor([-1.0, 2.0]).sigmoid())


def test_losses_are_those_of_torch_one_unit_at_a_time() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, ends = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    labels, units = torch.tensor([0, 3, -100, 2, 1]), torch.tensor([4, 0, 2])
    soft = torch.rand(5, 4, generator=draw).softmax(1)
    several = (torch.rand(5, 4, generator=draw) > 0.5).float()
    one, entropy = logits[:, :1], torch.nn.functional.cross_entropy
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    nan = float("nan")
    expected: list[tuple[Decision, list[float]]] = [
        (Decision("classification", logits, labels), [entropy(logits[[u]], labels[[u]]).item() for u in units]),
        (Decision("classification", logits, soft), [entropy(logits[[u]], soft[[u]]).item() for u in units]),
        (Decision("classification", logits), [nan] * 3),
        (Decision("token classification", logits, labels), [entropy(logits[[u]], labels[[u]]).item() for u in units]),
        (Decision("binary", one, several[:, 0]), [binary(one[u, 0], several[u, 0]).item() for u in units]),
        (Decision("multi-label", logits, several), [binary(logits[u], several[u]).item() for u in units]),
        (Decision("regression", one, soft[:, 0]), [(one[u, 0] - soft[u, 0]).item() ** 2 for u in units]),
        (Decision("loss", one), [one[u, 0].item() for u in units]),
        (Decision("similarity", logits, labels), [nan] * 3),
        (
            Decision("span", logits, labels.clamp(0), ends, labels.clamp(0).flip(0)),
            [
                (entropy(logits[[u]], labels.clamp(0)[[u]]) + entropy(ends[[u]], labels.clamp(0).flip(0)[[u]])).item()
                for u in units
            ],
        ),
    ]
    for decision, losses in expected:
        torch.testing.assert_close(decision.losses(units), torch.tensor(losses), equal_nan=True)
    ignored = Decision("classification", logits, labels).losses(torch.tensor([2]))
    assert ignored.isnan().all()
