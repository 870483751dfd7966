"""The score of what was decided on the whole text, in another decision."""

import pytest
import torch
from torch import Tensor

from globenc_lightning.task.fixed import FIXED_SCORES, fixed_score
from globenc_lightning.task.kinds import BY_TOKEN, SCORES, VALUES, Decision

EVERY = torch.arange(6)


def decisions(kind: str, width: int = 4) -> tuple[Decision, Decision]:
    draw = torch.Generator().manual_seed(0)
    one, other, ends, more = (torch.randn(6, width, generator=draw) * 2 for _ in range(4))
    spans = (ends, more) if kind == "span" else (None, None)
    return Decision(kind, one, ends=spans[0]), Decision(kind, other, ends=spans[1])


def test_every_kind_says_what_its_score_is() -> None:
    assert FIXED_SCORES.keys() == SCORES.keys()
    assert [kind for kind, text in FIXED_SCORES.items() if "probability" not in text] == [
        "regression",
        "similarity",
        "loss",
    ]


@pytest.mark.parametrize("kind", [kind for kind in SCORES if kind not in VALUES])
@pytest.mark.parametrize("width", [1, 4])
def test_on_the_whole_text_it_is_the_probability_of_what_is_decided(kind: str, width: int) -> None:
    if (width == 1) != (kind == "binary") and not (width == 1 and kind in BY_TOKEN):
        width = 4 if kind != "binary" else 1
    whole, _ = decisions(kind, width)
    found, told = fixed_score(whole, whole), whole.probability(EVERY).double()
    if width == 1:
        # What is told there is the probability of yes.
        told = torch.where(told > 0.5, told, 1 - told)
        assert bool((told > 0.5).all())
    torch.testing.assert_close(found, told, rtol=1e-5, atol=1e-6)


def by_hand(kind: str, logits: Tensor, chosen: int) -> float:
    return float(torch.sigmoid(logits[chosen]) if kind == "multi-label" else logits.softmax(0)[chosen])


@pytest.mark.parametrize("kind", ["classification", "multi-label", "choice", "token classification", "span"])
def test_what_the_whole_text_was_given_stays_fixed(kind: str) -> None:
    whole, masked = decisions(kind)
    assert not torch.equal(whole.predicted(EVERY), masked.predicted(EVERY))
    expected = []
    for example in range(6):
        score = by_hand(kind, masked.logits[example], int(whole.logits[example].argmax()))
        if whole.ends is not None and masked.ends is not None:
            score *= by_hand(kind, masked.ends[example], int(whole.ends[example].argmax()))
        expected.append(score)
    torch.testing.assert_close(fixed_score(masked, whole).float(), torch.tensor(expected))


def test_a_no_stays_a_no() -> None:
    whole, masked = Decision("binary", torch.tensor([[-1.0], [2.0]])), Decision("binary", torch.tensor([[1.5], [-3.0]]))
    expected = torch.sigmoid(torch.tensor([-1.5, -3.0])).double()
    torch.testing.assert_close(fixed_score(masked, whole), expected, rtol=1e-6, atol=0)


def test_values_are_taken_as_they_are() -> None:
    whole, masked = decisions("regression", 1)
    assert torch.equal(fixed_score(masked, whole), masked.logits[:, 0].double())
    pairs = Decision("similarity", torch.arange(12.0).view(3, 4), torch.tensor([2, 0, 3]))
    assert fixed_score(pairs, pairs).tolist() == [2.0, 4.0, 11.0]
