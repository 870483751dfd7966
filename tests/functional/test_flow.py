"""Attention flow against the narrowest cut, found by looking at every cut there is."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from globenc_lightning.functional.flow import attention_flow

Array = NDArray[np.float64]


def narrowest_cut(row: Array, below: Array, token: int) -> float:
    """The largest flow to one input token, by the theorem of Ford and Fulkerson: the least that any cut lets through.

    Nodes are the source, each token below each layer of edges, and in the end the one input token.
    """
    layers, width = len(below), len(row)
    inner = [(level, place) for level in range(layers, 0, -1) for place in range(width)]
    least = float("inf")
    for kept in itertools.product([False, True], repeat=len(inner)):
        side = dict(zip(inner, kept, strict=True))
        through = sum(row[place] for place in range(width) if layers and not side[layers, place])
        through += sum(
            below[level - 1][above, place]
            for level in range(layers, 1, -1)
            for above in range(width)
            for place in range(width)
            if side[level, above] and not side[level - 1, place]
        )
        through += sum(below[0][place, token] for place in range(width) if side[1, place])
        least = min(least, float(through))
    return least


def drawn(layers: int, width: int, seed: int, spread: float = 1.0, empty: float = 0.0) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    maps = np.exp(spread * draw.normal(size=(layers, width, width))) * (draw.random((layers, width, width)) >= empty)
    return maps[-1, draw.integers(width)], maps[:-1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("layers", "width"), [(2, 4), (3, 3), (4, 3), (3, 5), (5, 2)])
@pytest.mark.parametrize(("spread", "empty"), [(1.0, 0.0), (3.0, 0.4)], ids=["even", "uneven, with gaps"])
def test_the_flow_is_what_the_narrowest_cut_lets_through(
    layers: int, width: int, seed: int, spread: float, empty: float
) -> None:
    row, below = drawn(layers, width, seed, spread, empty)
    expected = [narrowest_cut(row, below, token) for token in range(width)]
    # Half a part for each edge of the cut.
    off = (layers * width * width) * row.sum() / 2**30
    np.testing.assert_allclose(attention_flow(row, below), expected, rtol=0, atol=max(off, 1e-12 * row.sum()))


def test_a_layer_that_is_not_the_narrowest_does_not_matter() -> None:
    row = np.array([0.25, 0.75])
    wide, narrow = np.full((2, 2), 1e12), np.array([[0.125, 0.5], [0.0, 0.25]])
    # What reaches the tokens in between is at most what the row holds, of which a wide layer may lead any part to each.
    np.testing.assert_allclose(attention_flow(row, np.stack([narrow])), [0.125, 0.5], rtol=0, atol=1e-8)
    for below in ([narrow, wide], [narrow, wide, wide]):
        np.testing.assert_allclose(attention_flow(row, np.stack(below)), [0.125, 0.75], rtol=0, atol=1e-8)
    np.testing.assert_allclose(attention_flow(row, np.stack([wide, wide, wide])), [1, 1], atol=1e-8)


def test_without_a_layer_below_it_is_the_row_and_of_nothing_nothing_flows() -> None:
    row = np.array([0.5, 0.0, 2.0])
    np.testing.assert_array_equal(attention_flow(row, np.zeros((0, 3, 3))), row)
    np.testing.assert_array_equal(attention_flow(np.zeros(3), np.ones((3, 3, 3))), np.zeros(3))
    np.testing.assert_array_equal(attention_flow(row, np.zeros((3, 3, 3))), np.zeros(3))
    assert attention_flow(np.zeros(0), np.zeros((2, 0, 0))).shape == (0,)
    np.testing.assert_allclose(attention_flow(np.array([2.0]), np.full((4, 1, 1), 3.0)), [2.0])


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e6, 1e30])
def test_the_resolution_is_relative_to_what_is_read(scale: float) -> None:
    row, below = drawn(4, 6, 0)
    np.testing.assert_allclose(
        attention_flow(row * scale, below * scale) / scale, attention_flow(row, below), rtol=1e-6
    )


def test_tokens_that_nobody_sees_get_nothing() -> None:
    """Of a causal model, the token that is read sees what comes before it alone."""
    row, below = drawn(4, 5, 1)
    row = row * (np.arange(5) <= 2)
    assert (row > 0).sum() == 3
    found = attention_flow(row, np.tril(below))
    assert (found[:3] > 0).all()
    np.testing.assert_array_equal(found[3:], [0, 0])
