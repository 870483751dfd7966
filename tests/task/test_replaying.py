from collections import Counter

import pytest
import torch
from torch import Tensor

from globenc_lightning.errors import CutGraphError, GlobEncError
from globenc_lightning.task.kinds import Decision
from globenc_lightning.task.replaying import (
    Chunk,
    Part,
    Replay,
    Step,
    _mixes_texts,
    digits_read,
    find_layout,
    rows_by_digits,
    same,
)

ROWS, TOKENS, WIDTH, CLASSES = 4, 5, 3, 2


def hidden() -> Tensor:
    return torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


def head(last: Tensor) -> Tensor:
    return last @ torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(1))


def chunk(*kept: int) -> Chunk:
    return Chunk(None, Part(None, 0, 0, len(kept)), kept, kept)


def replay(**counts: int) -> Replay:
    found = Replay(Step("a step", lambda *_: None))
    found.counts = Counter({int(name[1:]): count for name, count in counts.items()})
    return found


def test_rows_of_examples_that_were_sorted() -> None:
    last = hidden()
    order = torch.tensor([2, 0, 3, 1])
    decision = Decision("classification", head(last[:, 0])[order])
    assert find_layout(replay(), decision, chunk(0, 1, 3), last).rows.tolist() == [2, 0, 1]


def test_similarities_are_told_from_classes_although_a_text_is_not_compared_with_itself() -> None:
    last = hidden()
    vectors = last.mean(1)
    compared = vectors @ vectors.T
    masked = compared.masked_fill(torch.eye(ROWS, dtype=torch.bool), -1e9)
    pairs = torch.cat([vectors[:2], vectors[2:]], -1) @ torch.ones(2 * WIDTH, ROWS)
    assert _mixes_texts(compared, [[last]])
    assert _mixes_texts(masked, [[last]])
    assert not _mixes_texts(head(last[:, 0]), [[last]])
    assert not _mixes_texts(pairs, [[last]])


def test_rows_of_choices() -> None:
    last = hidden()
    decision = Decision("choice", head(last[:, 0])[:, 0].view(2, 2))
    assert find_layout(replay(), decision, chunk(0, 1), last).rows.tolist() == [[0, 1], [2, 3]]


def test_two_examples_of_one_row_are_refused() -> None:
    last = hidden()
    decision = Decision("classification", head(last[[0, 0, 1, 2], 0]))
    with pytest.raises(GlobEncError, match="two examples are decided from the same text"):
        find_layout(replay(), decision, chunk(0, 1), last)


def test_a_decision_of_nothing_is_refused() -> None:
    last = hidden()
    with pytest.raises(CutGraphError):
        find_layout(replay(), Decision("classification", torch.rand(4, 2)), chunk(0), last)
    cut = Decision("classification", torch.cat([head(last[:3, 0]), torch.rand(1, 2)]))
    with pytest.raises(CutGraphError):
        find_layout(replay(), cut, chunk(0, 3), last)


def test_the_token_whose_label_is_rarest() -> None:
    last = hidden()
    labels = torch.full((ROWS, TOKENS), -100)
    labels[:, 1], labels[:, 2], labels[2, 4] = 0, 0, 1
    decision = Decision("token classification", head(last).flatten(0, 1), labels.flatten(), width=TOKENS)
    layout = find_layout(replay(_0=8, _1=1), decision, chunk(0, 2), last)
    assert layout.units.tolist() == [1, 2 * TOKENS + 4]
    assert layout.rows.tolist() == [0, 2]


def test_tokens_that_a_mask_has_chosen() -> None:
    last = hidden()
    # Ten tokens of four texts, and eight, which would be two of each.
    for chosen in (
        [(0, 1), (0, 2), (0, 3), (1, 4), (2, 0), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)],
        [(0, 1), (0, 2), (0, 3), (1, 4), (2, 0), (2, 1), (2, 2), (3, 1)],
    ):
        rows, tokens = (torch.tensor(one) for one in zip(*chosen, strict=True))
        logits = head(last[rows, tokens])
        labels = torch.zeros(len(chosen), dtype=torch.long)
        width = len(chosen) // ROWS if len(chosen) % ROWS == 0 else None
        layout = find_layout(
            replay(_0=9), Decision("token classification", logits, labels, width=width), chunk(0, 1, 2, 3), last
        )
        assert layout.rows.tolist() == [0, 1, 2, 3]
        assert [chosen[unit] for unit in layout.units.tolist()] == [(0, 1), (1, 4), (2, 0), (3, 1)]


def test_a_text_without_a_label_keeps_its_row() -> None:
    last = hidden()
    labels = torch.full((ROWS, TOKENS), -100)
    labels[0, 1], labels[2, 2], labels[3, 0] = 1, 1, 1
    decision = Decision("masked token", head(last).flatten(0, 1), labels.flatten(), width=TOKENS)
    layout = find_layout(replay(), decision, chunk(0, 1, 2, 3), last)
    assert layout.labelled is not None
    assert layout.labelled.tolist() == [True, False, True, True]
    assert layout.rows.tolist() == [0, 1, 2, 3]
    rows, tokens = torch.tensor([0, 0, 2, 3]), torch.tensor([1, 2, 0, 1])
    chosen = Decision("token classification", head(last[rows, tokens]), torch.zeros(4).long(), width=None)
    layout = find_layout(replay(_0=4), chosen, chunk(0, 1, 2, 3), last)
    assert layout.labelled is not None
    assert layout.labelled.tolist() == [True, False, True, True]
    assert layout.rows.tolist() == [0, 1, 2, 3]


def test_no_label_at_all_is_refused() -> None:
    last = hidden()
    labels = torch.full((ROWS * TOKENS,), -100)
    decision = Decision("masked token", head(last).flatten(0, 1), labels, width=TOKENS)
    with pytest.raises(GlobEncError, match="no example of the batch has a label that counts"):
        find_layout(replay(), decision, chunk(0, 1), last)


def test_rows_by_digits() -> None:
    last = hidden()
    order = [3, 0, 2, 1]
    assert rows_by_digits(head(last[order, 0])[:, 0], last) == order


@pytest.mark.parametrize("units", [1, 2, 3, 8, 35, 36])
def test_tokens_that_one_score_alone_reads(units: int) -> None:
    last = torch.randn(units, 3, 4, requires_grad=True)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(units))
    scores = (last[order, 1] * torch.arange(1.0, 5.0)).sum(1)
    read = digits_read(scores, last)
    expected = torch.full((units, 3), -1)
    expected[order, 1] = torch.arange(units)
    assert torch.equal(read, expected)
    for one in range(units):
        other = (one + 1) % units
        # This token is read by two scores, if there are two.
        both = digits_read(scores + torch.eye(units)[one] * last[order[other], 1].sum(), last)
        expected_both = expected.clone()
        expected_both[order[other], 1] = -1 if units > 1 else 0
        assert torch.equal(both, expected_both)


def test_decisions_that_are_the_same() -> None:
    logits = torch.randn(4, 3)
    one = Decision("classification", logits)
    assert same(one, Decision("classification", logits + 1e-7))
    assert not same(one, Decision("classification", logits + 1e-2))
    assert not same(one, Decision("multi-label", logits))
    assert not same(one, Decision("classification", logits[:2]))
    assert not same(one, Decision("classification", logits.flip(0)))
