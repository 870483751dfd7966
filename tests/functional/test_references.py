"""The maths of integrated gradients and of projected Jacobians, against other ways to compute them."""

import pytest
import torch

from globenc_lightning.functional.references import (
    completeness_error,
    directions,
    largest_deviation,
    mean_state,
    midpoints,
)


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_midpoints_integrate_a_line_exactly_and_a_square_as_they_should(count: int) -> None:
    points, weight = midpoints(count)
    assert len(points) == count
    assert weight * count == pytest.approx(1.0)
    assert weight * sum(points) == pytest.approx(0.5)
    # The error of the rule for x^2 is h^2 / 12.
    assert 1 / 3 - weight * sum(one**2 for one in points) == pytest.approx(1 / (12 * count**2))


def test_the_mean_state_is_of_real_tokens_and_leaves_padding_alone() -> None:
    hidden = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    hidden[1, 3] = float("nan")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    found = mean_state(hidden, mask)
    for example, length in enumerate((4, 2, 0)):
        for token in range(4):
            expected = hidden[example, :length].mean(0) if token < length else hidden[example, token]
            torch.testing.assert_close(found[example, token], expected, equal_nan=True)


@pytest.mark.parametrize(("width", "count"), [(24, 5), (24, 23), (7, 1)])
def test_directions_are_orthogonal_and_as_long_as_they_have_to_be(width: int, count: int) -> None:
    found = directions(width, count)
    torch.testing.assert_close(found @ found.T, torch.eye(count, dtype=torch.float64) * width / count)


def test_directions_are_the_same_each_time_and_draw_from_no_other_generator() -> None:
    before = torch.get_rng_state()
    found = directions(24, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(directions(24, 5), found)
    assert not torch.equal(directions(24, 5, seed=1), found)


@pytest.mark.parametrize("count", [12, 13, 99])
def test_as_many_directions_as_there_are_axes_leave_nothing_out(count: int) -> None:
    assert torch.equal(directions(12, count), torch.eye(12, dtype=torch.float64))
    assert largest_deviation(12, count) == 0


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_squared_lengths_are_without_bias_and_no_further_off_than_stated(rank: int, count: int) -> None:
    """The bound is reached by a matrix of rank one, and by none else; 3,000 draws tell both within a few per cent."""
    draw = torch.Generator().manual_seed(rank)
    matrix = torch.randn(12, rank, generator=draw, dtype=torch.float64) @ torch.randn(
        rank, 9, generator=draw, dtype=torch.float64
    )
    drawn = torch.stack([directions(12, count, seed) for seed in range(3000)])
    squares = (drawn @ matrix).square().sum((1, 2)) / matrix.square().sum()
    stated = (2 * (12 - count) / (count * 14)) ** 0.5
    assert abs(float(squares.mean()) - 1) < 4 * stated / 3000**0.5
    assert float(squares.std()) < 1.05 * stated
    if rank == 1:
        assert float(squares.std()) > 0.95 * stated
    else:
        assert float(squares.std()) < 0.9 * stated
    assert largest_deviation(12, count) == pytest.approx(stated / 2)


def test_completeness_is_relative_to_what_is_summed_up() -> None:
    contributions = torch.tensor([[1.0, -1.0, 0.5], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    difference = torch.tensor([0.0, 4.0, 0.0, 3.0])
    torch.testing.assert_close(completeness_error(contributions, difference), torch.tensor([0.2, 0.0, 0.0, 1.0]))
