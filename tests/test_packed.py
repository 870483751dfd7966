from collections.abc import Sequence

import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor

from globenc_lightning.packed import LEVELS, Packed


def drawn(lengths: Sequence[int], kinds: int = 3, seed: int = 0) -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [[torch.rand(length, generator=draw) ** 3 * 7 for length in lengths] for _ in range(kinds)]


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [3, 0, 40, 1], [512] * 2, []])
def test_rows_come_back_to_their_precision_and_the_largest_exactly(lengths: list[int]) -> None:
    rows = drawn(lengths)
    packed = Packed.from_rows(rows)
    for kind, expected in enumerate(rows):
        found = packed.rows(kind)
        assert [len(one) for one in found] == lengths
        for example, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert one.dtype == torch.float32
            assert torch.equal(packed.row(kind, example), one)
            if len(other):
                # A half step, and half a unit in the last place of float32.
                assert (one.double() - other.double()).abs().max() <= other.max() * (0.5 / LEVELS + 6e-8)
                assert one.max() == other.max()
                assert one.argmax() == other.argmax()


def test_values_that_differ_by_more_than_a_step_keep_their_order() -> None:
    values = torch.arange(1, 400).double().square()
    values = (values / values[-1]).float()[torch.randperm(399, generator=torch.Generator().manual_seed(0))]
    row = Packed.from_rows([[values * 0.3]]).row(0, 0)
    assert rankdata(row.numpy()).tolist() == rankdata(values.numpy()).tolist()


def test_what_is_packed_packs_again_to_the_same_bits() -> None:
    once = Packed.from_rows(drawn([4, 9]))
    again = Packed.from_rows([once.rows(kind) for kind in range(3)])
    assert torch.equal(once.values, again.values)
    assert once.peaks is not None
    assert again.peaks is not None
    assert torch.equal(once.peaks, again.peaks)


def test_a_row_of_zeros_stays_one() -> None:
    assert Packed.from_rows([[torch.zeros(3), torch.ones(2)]]).rows(0)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -0.5])
def test_rows_that_are_no_shares_are_kept_as_they_are(odd: float) -> None:
    rows = [[torch.tensor([0.25, odd]), torch.tensor([0.1])]]
    packed = Packed.from_state_dict(Packed.from_rows(rows).state_dict())
    for example, expected in enumerate(rows[0]):
        assert torch.equal(packed.row(0, example).nan_to_num(9), expected.nan_to_num(9))
        assert torch.equal(packed.rows(0)[example].nan_to_num(9), expected.nan_to_num(9))


def test_a_row_that_is_read_holds_no_other_s_memory() -> None:
    packed = Packed.from_rows(drawn([4, 900]))
    for row in (packed.row(0, 0), packed.rows(0)[0]):
        assert row.untyped_storage().nbytes() == row.nbytes


def test_two_bytes_a_value_and_four_a_row() -> None:
    packed = Packed.from_rows(drawn([20] * 50, kinds=9))
    assert packed.peaks is not None
    assert packed.values.nbytes + packed.peaks.nbytes == 9 * 50 * (20 * 2 + 4)
