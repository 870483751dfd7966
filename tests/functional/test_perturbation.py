"""Which tokens are masked, and what gains are made of."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from globenc_lightning.functional.perturbation import (
    LEAST_SPAN,
    first_tokens,
    gains,
    log_odds,
    number_masked,
    random_row,
    span_of,
)

NAN = float("nan")


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (0, 0.2, 0),
        (1, 0.2, 0),
        (2, 0.2, 1),
        (7, 0.2, 1),
        (8, 0.2, 2),
        (12, 0.2, 2),
        (13, 0.2, 3),
        (5, 0.3, 2),
        (5, 0.5, 3),
        (40, 0.01, 1),
    ],
)
def test_the_nearest_number_of_tokens_is_masked_and_at_least_one(count: int, share: float, expected: int) -> None:
    assert number_masked(torch.tensor([count]), share).tolist() == [expected]


def test_the_largest_tokens_that_may_be_masked_are_the_first() -> None:
    row = tensor(9, 1, 5, 4, 8, 2, 3, 7).repeat(2, 1)
    maskable = torch.ones(2, 8).bool()
    maskable[:, 0] = False
    maskable[1, 4] = False
    assert first_tokens(row, maskable, 0.3).nonzero().tolist() == [[0, 4], [0, 7], [1, 2], [1, 7]]


def test_of_equal_tokens_the_first_is_masked() -> None:
    row, maskable = torch.ones(1, 11), torch.ones(1, 11).bool()
    maskable[0, 0] = False
    assert first_tokens(row, maskable).nonzero().tolist() == [[0, 1], [0, 2]]
    row[0, 6] = 2
    assert first_tokens(row, maskable).nonzero().tolist() == [[0, 1], [0, 6]]


def test_negative_numbers_come_before_tokens_that_may_not_be_masked() -> None:
    maskable = torch.tensor([[False, True, True, False]])
    assert first_tokens(tensor(-1, -3, -2, -1).unsqueeze(0), maskable).tolist() == [[False, False, True, False]]


def test_random_numbers_depend_on_the_text_alone() -> None:
    # As long as these stay, gains of a training that another version goes on with are paired.
    assert random_row([5, 3, 8]) == [0.9774773828469742, 0.22504924915730362, 0.37851520564995256]
    assert random_row([5, 3, 8]) != random_row([5, 8, 3])
    assert random_row([53, 8])[:1] != random_row([5, 38])[:1]
    assert len(set(random_row(list(range(50))))) == 50


def test_random_numbers_leave_the_random_states_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    random_row(range(100))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_random_tokens_are_spread_evenly() -> None:
    counts = torch.zeros(10)
    for text in range(2000):
        row = torch.tensor(random_row([text, *range(9)])).unsqueeze(0)
        counts += first_tokens(row, torch.ones(1, 10).bool())[0]
    # 400 each, with a standard deviation of 18.
    assert float((counts - 400).abs().max()) < 80


def test_gains_by_hand() -> None:
    full, nothing = tensor(0.9, 0.8), tensor(0.4, 0.3)
    found = gains(full, nothing, (tensor(0.5, 0.8), tensor(0.8, 0.7)), (tensor(0.9, 0.2), tensor(0.6, 0.3)))
    # (.9 - .5) - (.9 - .8) of .5; (.8 - .8) - (.8 - .7) of .5
    torch.testing.assert_close(found.comprehensiveness, tensor(0.6, -0.2))
    # (.9 - .6) - (.9 - .9) of .5; (.8 - .3) - (.8 - .2) of .5
    torch.testing.assert_close(found.sufficiency, tensor(0.6, -0.2))
    torch.testing.assert_close(found.log_odds, tensor(float(np.log(9)), 0.0))


def test_examples_whose_score_hardly_falls_are_left_out() -> None:
    full, nothing = tensor(0.5, 0.5, 0.5, NAN), tensor(0.451, 0.449, 0.2, 0.1)
    assert LEAST_SPAN == 0.05
    found = gains(full, nothing, (nothing, full), (full, nothing))
    assert found.comprehensiveness.isnan().tolist() == [True, False, False, True]
    assert found.sufficiency.isnan().tolist() == [True, False, False, True]
    assert found.log_odds.isnan().tolist() == [False, False, False, True]
    torch.testing.assert_close(found.comprehensiveness[1:3], tensor(1, 1))


def test_a_probability_that_rises_when_everything_is_masked_is_left_out() -> None:
    # The first tokens bear the decision, and random ones do not. A share of the rise would be far below chance.
    full, nothing, without_first, without_random = tensor(0.6), tensor(0.7), tensor(0.2), tensor(0.62)
    found = gains(full, nothing, (without_first, without_random), (full, nothing))
    assert found.comprehensiveness.isnan().all()
    assert found.sufficiency.isnan().all()
    assert found.log_odds.isfinite().all()


def test_the_scale_of_a_value_does_not_count() -> None:
    full, nothing, other = tensor(3.0, 3.0, 0.0), tensor(2.8, 2.9, 0.0), tensor(2.9, 3.1, 0.0)
    one, thousand = (
        gains(full * by, nothing * by, (nothing * by, other * by), (full * by, other * by), True) for by in (1, 1000)
    )
    # .2 of 3 is more than .05, and .1 is less; a value that stays 0 has no fall to share in.
    assert one.comprehensiveness.isnan().tolist() == [False, True, True]
    torch.testing.assert_close(one.comprehensiveness, thousand.comprehensiveness, equal_nan=True)
    torch.testing.assert_close(one.sufficiency, thousand.sufficiency, equal_nan=True)
    assert one.log_odds.isnan().all()


def test_a_value_that_rises_has_gains_too() -> None:
    # A distance: what is masked makes it larger.
    span, counts = span_of(tensor(1.0), tensor(3.0), True)
    assert span.tolist() == [-2.0]
    assert counts.tolist() == [True]
    assert gains(tensor(1.0), tensor(3.0), (tensor(3.0), tensor(1.5)), (tensor(1.0), tensor(2.0)), True)[:2] == (
        tensor(0.75),
        tensor(0.5),
    )


def test_log_odds_stay_finite() -> None:
    found = log_odds(tensor(0.0, 0.5, 1.0))
    torch.testing.assert_close(found, tensor(-13.815509557963773, 0.0, 13.815509557963773))
