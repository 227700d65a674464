"""Laws of fused projections: what cuts undoes what joins, and no number changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import UsageError
from lorakit.math.surgery import (
    Factors,
    halved,
    interleaved,
    joined,
    padded,
    pruned,
    split,
    swapped,
)

WIDTH = 6


def factors(seed, rows, rank, alpha=None):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, WIDTH)), rng.standard_normal((rows, rank))
    return Factors(a.astype("f4"), b.astype("f4"), alpha)


def dense(x):
    return x.scaling * x.b.astype("f8").reshape(len(x.b), -1) @ x.a.astype("f8").reshape(x.rank, -1)


def same(x, y):
    return x.a.tobytes() == y.a.tobytes() and x.b.tobytes() == y.b.tobytes() and x.alpha == y.alpha


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=2, max_size=4)
alphas = st.none() | st.sampled_from([1.0, 4.0, 6.0])


@given(shapes, alphas, st.integers(0, 99))
def test_parts_of_any_ranks_are_joined_and_cut_again_bit_for_bit(sizes, scale, seed):
    parts = [
        factors(seed + i, rows, rank, None if scale is None else scale * rank)
        for i, (rows, rank) in enumerate(sizes)
    ]
    heights = [rows for rows, _ in sizes]
    whole, exact = joined(parts, heights)
    assert exact
    expected = np.concatenate([dense(p) for p in parts])
    np.testing.assert_allclose(dense(whole), expected, rtol=1e-12, atol=1e-12)
    for part, again in zip(parts, split(whole, heights), strict=True):
        kept = pruned(again)
        assert kept is not None
        assert same(kept, part)


@given(st.integers(1, 4), alphas, st.integers(0, 99))
def test_a_dense_projection_is_cut_and_joined_again_bit_for_bit(rank, alpha, seed):
    whole = factors(seed, 9, rank, alpha)
    again, exact = joined([pruned(p) for p in split(whole, [3, 2, 4])], [3, 2, 4])
    assert exact
    assert same(again, whole)


def test_a_part_that_is_missing_has_rows_of_zeros():
    one, other = factors(0, 2, 2), factors(1, 4, 1)
    whole, exact = joined([one, None, other], [2, 3, 4])
    assert exact
    np.testing.assert_array_equal(dense(whole)[2:5], 0)
    first, none, last = (pruned(p) for p in split(whole, [2, 3, 4]))
    assert same(first, one)
    assert none is None
    assert same(last, other)


def test_other_scalings_are_multiplied_in_and_said_to_be_inexact():
    one, other = factors(0, 2, 2, 4.0), factors(1, 3, 2, 1.0)
    whole, exact = joined([one, other], [2, 3])
    assert not exact
    expected = np.concatenate([dense(one), dense(other)])
    np.testing.assert_allclose(dense(whole), expected, rtol=1e-6)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_orders_of_rows_undo_each_other(heads, half, columns):
    x = np.arange(heads * 2 * half * columns, dtype="f4").reshape(-1, columns)
    np.testing.assert_array_equal(halved(interleaved(x, heads), heads), x)
    np.testing.assert_array_equal(swapped(swapped(x)), x)
    # the definition: new row h d + 2 t + j is old row h d + j d / 2 + t
    for h in range(heads):
        for t in range(half):
            for j in range(2):
                new, old = h * 2 * half + 2 * t + j, h * 2 * half + j * half + t
                np.testing.assert_array_equal(interleaved(x, heads)[new], x[old])


@given(st.integers(1, 3), st.integers(0, 3), alphas)
def test_ranks_of_zeros_change_nothing(rank, more, alpha):
    x = factors(3, 4, rank, alpha)
    np.testing.assert_allclose(dense(padded(x, rank + more)), dense(x), rtol=1e-12)


def test_what_does_not_fit_is_refused():
    x = factors(0, 5, 2)
    for call in (
        lambda: split(x, [2, 2]),
        lambda: joined([x, None], [4, 1]),
        lambda: joined([None], [1]),
        lambda: swapped(x.b),
        lambda: interleaved(x.b, 2),
        lambda: padded(x, 1),
    ):
        with pytest.raises(UsageError):
            call()
