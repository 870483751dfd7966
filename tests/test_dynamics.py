"""The numbers behind the tab's view of many runs, each against a loop or scipy, one sentence at a time."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from globenc_lightning import dynamics


def draw(validations: int, tokens: int, seed: int = 0, steps: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).random((validations, tokens))
    return np.round(rows * steps) / steps if steps else rows


@pytest.mark.parametrize("steps", [0, 4])
def test_ranks_are_scipys_with_and_without_ties(steps: int) -> None:
    rows = draw(6, 9, steps=steps)
    assert dynamics.ranks(rows).tolist() == [rankdata(row).tolist() for row in rows]


def test_each_validation_is_compared_with_the_one_before_that_has_figures() -> None:
    known = [False, True, True, False, True]
    assert dynamics.partners(known, "previous") == [None, None, 1, None, 2]
    assert dynamics.partners(known, "first") == [None, None, 1, None, 1]
    assert dynamics.partners(known, "last") == [None, 4, 4, None, None]
    assert dynamics.partners([], "last") == []
    assert dynamics.partners([False, True], "previous") == [None, None]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("against", dynamics.AGAINST)
def test_spearman_drift_is_scipys(against: str, steps: int) -> None:
    rows = draw(5, 8, seed=1, steps=steps)
    pairs = dynamics.partners([True] * 5, against)
    found = dynamics.drift(rows, pairs, "spearman")
    for place, other in enumerate(pairs):
        if other is None:
            assert math.isnan(found[place])
        else:
            assert found[place] == pytest.approx(1 - spearmanr(rows[place], rows[other]).statistic, abs=1e-12)


@pytest.mark.parametrize(("tokens", "most"), [(2, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (40, 10)])
def test_jaccard_drift_is_that_of_the_sets_of_largest_tokens(tokens: int, most: int) -> None:
    assert dynamics.top_count(tokens) == most
    rows = draw(4, tokens, seed=2)
    pairs = dynamics.partners([True] * 4, "previous")
    found = dynamics.drift(rows, pairs, "jaccard")
    for place, other in enumerate(pairs):
        if other is not None:
            old, new = (set(sorted(range(tokens), key=lambda k, at=at: -rows[at, k])[:most]) for at in (other, place))
            assert found[place] == pytest.approx(1 - len(old & new) / len(old | new), abs=1e-12)


@pytest.mark.parametrize("by", dynamics.MEASURES)
@pytest.mark.parametrize("tokens", [0, 1])
def test_fewer_than_two_tokens_have_no_drift(tokens: int, by: str) -> None:
    # A single token is always the largest: that it still is says nothing.
    found = dynamics.drift(draw(3, tokens), dynamics.partners([True] * 3, "previous"), by)
    assert np.isnan(found).all()


@pytest.mark.parametrize("by", dynamics.MEASURES)
def test_equal_rows_have_not_moved_and_missing_ones_are_unknown(by: str) -> None:
    rows = np.repeat(draw(1, 6), 4, axis=0)
    rows[2] = np.nan
    found = dynamics.drift(rows, [None, 0, 1, 2], by)
    assert found[1] == pytest.approx(0)
    assert np.isnan(found[[0, 2, 3]]).all()


@pytest.mark.parametrize("by", dynamics.MEASURES)
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_row_of_one_token_cannot_move(tokens: int, by: str) -> None:
    assert np.isnan(dynamics.drift(draw(3, tokens), [None, 0, 1], by)).all()


def test_a_constant_row_has_no_spearman_drift() -> None:
    rows = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    assert np.isnan(dynamics.drift(rows, [None, 0], "spearman")).all()
    assert np.isnan(dynamics.drift(rows[:, :0], [None, 0], "spearman")).all()


@pytest.mark.parametrize("tokens", [2, 5, 8, 13])
def test_the_chance_level_is_the_mean_over_all_shuffles(tokens: int) -> None:
    most = dynamics.top_count(tokens)
    first = set(range(most))
    sets = [set(one) for one in itertools.combinations(range(tokens), most)]
    exact = 1 - sum(len(first & one) / len(first | one) for one in sets) / len(sets)
    assert dynamics.chance([tokens], "jaccard") == pytest.approx(exact, abs=1e-12)
    shuffled = np.random.default_rng(3)
    row = draw(1, tokens, seed=4)[0]
    rows = np.stack([one for _ in range(4000) for one in (row, shuffled.permutation(row))])
    pairs = [None if place % 2 == 0 else place - 1 for place in range(len(rows))]
    for by in dynamics.MEASURES:
        moved = dynamics.drift(rows, pairs, by)[1::2]
        assert moved.mean() == pytest.approx(dynamics.chance([tokens], by), abs=4 * moved.std() / math.sqrt(4000))


def test_the_chance_level_is_a_mean_over_sentences_with_two_tokens_or_more() -> None:
    each = [dynamics.chance([one], "jaccard") for one in (4, 9)]
    assert dynamics.chance([4, 9, 1, 0], "jaccard") == pytest.approx(sum(filter(None, each)) / 2)
    assert dynamics.chance([0, 1], "jaccard") is None
    assert dynamics.chance([7, 3], "spearman") == 1


TOKENS = ("[CLS]", "The", "film", "##s", "▁not", "n't", "!", "…", "[SEP]")
SPECIAL = (True, *[False] * 7, True)


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        (["THE"], [1]),
        (["film", "s"], [2, 3]),
        (["##s"], [3]),
        (["not", "n't"], [4, 5]),
        (["[punctuation]"], [6, 7]),
        (["[special]"], [0, 8]),
        (["[sep]"], [8]),
        (["!", "[special]"], [0, 6, 8]),
        (["fil", "<script>", ".*"], []),
        ([], []),
    ],
)
def test_tokens_are_found_by_their_text_and_by_kind(wanted: list[str], places: list[int]) -> None:
    found = dynamics.marked(TOKENS, SPECIAL, wanted)
    assert [place for place, one in enumerate(found) if one] == places


def test_mass_is_a_share_of_the_whole_row() -> None:
    rows = draw(3, 5, seed=5)
    rows[1] = np.nan
    rows[2] = 0
    found = dynamics.mass(rows, [True, False, False, True, False])
    assert found[0] == pytest.approx((rows[0, 0] + rows[0, 3]) / sum(rows[0]))
    assert np.isnan(found[1:]).all()


def test_means_leave_out_what_is_unknown() -> None:
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    assert dynamics.mean(values) == [2.0, 5.0, None]
