"""Random updates for the laws: small shapes, ranks and weights, float64 arrays."""

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from lorakit.math.lowrank import LowRank

sizes = st.integers(1, 12)
weights = st.floats(-2, 2, allow_nan=False)


@st.composite
def updates(draw, count=1, kernel=()):
    """`count` updates of one weight, ranks of their own, with the shape (out, in, *kernel)."""
    out, inner = draw(sizes), draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = []
    for _ in range(count):
        rank = draw(st.integers(1, 5))
        a = rng.standard_normal((rank, inner, *kernel))
        b = rng.standard_normal((out, rank, *(1 for _ in kernel)))
        found.append(LowRank(a, b, draw(st.floats(-3, 3))))
    return found


@st.composite
def partitions(draw, rows):
    """Cuts of `rows` rows into blocks."""
    cuts = draw(st.sets(st.integers(1, max(1, rows - 1)), max_size=4))
    edges = sorted({0, rows, *(c for c in cuts if c < rows)})
    return list(pairwise(edges))
