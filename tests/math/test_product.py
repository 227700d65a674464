"""Products in pieces are the product."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorakit.math.product import SMALL, WIDTH, multiply, product, width_of_pieces

SIZES = st.integers(0, 300)


@example(115, 136, 0, "f4", 0)  # no piece is small, and there is no column
@given(SIZES, SIZES, SIZES, st.sampled_from(["f4", "f8"]), st.integers(0, 2**32 - 1))
def test_it_is_the_product(rows, rank, cols, dtype, seed):
    draw = np.random.default_rng(seed)
    b = draw.standard_normal((rows, rank)).astype(dtype)
    a = draw.standard_normal((rank, cols)).astype(dtype)
    exact = b.astype("f8") @ a.astype("f8")
    most = np.abs(b).astype("f8") @ np.abs(a).astype("f8")  # each product and each sum rounds
    got = product(b, a)
    assert got.dtype == dtype
    assert np.all(np.abs(got - exact) <= (rank + 1) * np.finfo(dtype).eps * most)


@pytest.mark.parametrize(
    ("rows", "rank", "cols"),
    [(64, 16, 2048), (9, 16, 14336), (1, 1, 3 * SMALL), (64, 256, 1000), (23, 32, 5633)],
)
def test_every_column_is_in_one_piece(rows, rank, cols):
    b, a = np.ones((rows, rank), "f4"), np.ones((rank, cols), "f4")
    a *= np.arange(cols) % 7
    out = np.full((rows, 2 * cols), np.nan, "f4")[:, ::2]  # wherever it lies
    multiply(b, a, out)
    np.testing.assert_array_equal(out, np.broadcast_to(rank * (np.arange(cols) % 7), out.shape))


@given(st.integers(1, 10**4), st.integers(1, 10**4))
def test_a_piece_is_what_a_processor_takes_for_small(rows, rank):
    width = width_of_pieces(rows, rank)
    assert rows * rank * width <= SMALL < rows * rank * (width + WIDTH)
    assert width % WIDTH == 0
