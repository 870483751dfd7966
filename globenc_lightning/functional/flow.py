"""Attention flow: how much can flow from the token that is read to each input token, through the layers' maps.

Axes: ``l`` layer, ``q`` token that receives, ``k`` token that is attended to. Source: Abnar & Zuidema, ACL 2020,
section 3. Every map is one layer of edges: its entry (q, k) is how much may flow from token ``q`` above it to token
``k`` below it.
"""

import numpy as np
from numpy.typing import NDArray

RESOLUTION = 2**30
"""Into so many parts what leaves the token that is read is cut: scipy computes with integers of 32 bits."""

Array = NDArray[np.float64]


def attention_flow(row: Array, below: Array) -> Array:
    """Returns the largest flow from one token of a layer to each input token, (k,).

    With one layer it is that layer's row, with two the sum over the tokens between them of the smaller capacity: both
    are exact. With more, scipy finds it with capacities rounded to :data:`RESOLUTION` parts of what the row holds
    together, so that a flow is off by less than one such part for each two edges of its narrowest cut.

    Args:
        row: (k,) not negative: how much may flow from the token, or from the tokens together, that are read to each
            token of the layer below.
        below: (l, q, k) the maps of the layers below, the lowest first.
    """
    layers, width = len(below), len(row)
    total = float(row.sum())
    if not layers or not width or not total > 0:
        return row.astype(np.float64)
    if layers == 1:
        return np.minimum(row[:, None], below[0]).sum(0)
    # No edge can carry more than leaves the token that is read.
    scale = RESOLUTION / total
    source, inner = _whole(row * scale), _whole(np.minimum(below[1:], total) * scale)
    lowest = _whole(np.minimum(below[0], total) * scale)
    return _flows(source, inner[::-1], lowest) / scale


def _whole(values: Array) -> NDArray[np.int32]:
    return np.rint(values).astype(np.int32)


def _flows(source: NDArray[np.int32], inner: NDArray[np.int32], lowest: NDArray[np.int32]) -> Array:
    """Flows from the source to each input token.

    Node 0 is the source, then come the tokens below each layer of edges from the top down, and last the one input token
    that is asked for: its edges alone change from one to the next.

    Args:
        source: (k,) capacities of the edges from the source.
        inner: (l, q, k) those of the layers in between, the highest first.
        lowest: (q, k) those of the lowest layer.

    Returns:
        (k,) whole numbers.
    """
    # Importing it takes longer than most analyses, and few ask for it.
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    width, levels = len(source), len(inner) + 1
    sink = 1 + levels * width
    tokens = np.arange(width, dtype=np.int32)
    columns = [1 + tokens, *(np.tile(1 + (level + 1) * width + tokens, width) for level in range(levels - 1))]
    columns.append(np.full(width, sink, dtype=np.int32))
    counts = [0, width, *[width] * (width * (levels - 1)), *[1] * width, 0]
    pointers, indices = np.cumsum(counts, dtype=np.int32), np.concatenate(columns).astype(np.int32)
    above = np.concatenate([source, inner.reshape(-1)])
    found = np.zeros(width)
    for token in range(width):
        capacities = np.concatenate([above, lowest[:, token]])
        graph = csr_array((capacities, indices, pointers), shape=(sink + 1, sink + 1))
        # An edge without capacity is none.
        graph.eliminate_zeros()
        found[token] = maximum_flow(graph, 0, sink, method="dinic").flow_value
    return found
