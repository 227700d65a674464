"""What is told of an update by its factors is what its dense delta would tell."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorakit.errors import InputError
from lorakit.math.factored import (
    cosines,
    decompose,
    directions,
    effective_rank,
    inner,
    leading,
    norm,
    overlap,
    recompose,
    retained,
    spectrum,
)
from lorakit.math.lowrank import LowRank
from tests.math.updates import dense
from tests.strategies import updates

close = {"rtol": 1e-9, "atol": 1e-9}


@given(updates())
def test_a_decomposition_is_one_of_the_delta(parts):
    (x,) = parts
    assume(abs(x.scaling) > 1e-3)  # else the squares of the dense delta are nothing
    found = decompose(x)
    np.testing.assert_allclose((found.u * found.s) @ found.vt, dense(x), **close)
    expected = np.linalg.svd(dense(x), compute_uv=False)[: len(found.s)]
    np.testing.assert_allclose(found.s, expected, **close)
    size = len(found.s)
    assert size == min(x.rank, *x.shape)
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(size), atol=1e-9)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(size), atol=1e-9)


@given(updates())
def test_recomposing_gives_the_update_back_in_balance(parts):
    (x,) = parts
    low = recompose(decompose(x))
    assert low.scaling == 1.0
    np.testing.assert_allclose(dense(low), dense(x), **close)
    lengths = (np.linalg.norm(low.a, axis=1), np.linalg.norm(low.b, axis=0))
    np.testing.assert_allclose(*lengths, rtol=1e-9, atol=1e-12)


@given(updates(), st.integers(1, 6))
def test_a_truncation_is_the_closest_of_its_rank(parts, rank):
    (x,) = parts
    assume(abs(x.scaling) > 1e-3)  # else the squares of the dense delta are nothing
    found = decompose(x)
    s = np.linalg.svd(dense(x), compute_uv=False)
    left = np.linalg.norm(dense(recompose(found, rank)) - dense(x))
    assert left == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-6, abs=1e-9)
    total = float((s**2).sum())
    share = float((s[:rank] ** 2).sum()) / total if total else 1.0
    assert retained(found.s, rank) == pytest.approx(share, rel=1e-9)


@given(updates(), st.integers(1, 6))
def test_a_leading_part_is_that_of_the_decomposition(parts, rank):
    (x,) = parts
    whole, (found, values) = decompose(x), leading(x, lambda s: min(rank, len(s)))
    np.testing.assert_array_equal(values, whole.s)
    np.testing.assert_array_equal(found.s, whole.s[:rank])
    np.testing.assert_allclose(dense(recompose(found)), dense(recompose(whole, rank)), **close)


@given(updates(count=3))
def test_cosines_of_several_are_those_of_their_deltas(parts):
    found = np.array(cosines(parts))
    np.testing.assert_array_equal(found, found.T)
    flat = [dense(x).ravel() for x in parts]
    for i, x in enumerate(flat):
        assert found[i, i] == float(norm(parts[i]) > 0)
        for j, y in enumerate(flat):
            size = np.linalg.norm(x) * np.linalg.norm(y)
            assert found[i, j] * size == pytest.approx(x @ y, abs=1e-9 * size + 1e-12)


@given(updates(count=2))
def test_norms_and_products_are_those_of_the_deltas(parts):
    x, y = parts
    size = np.linalg.norm(dense(x)) * np.linalg.norm(dense(y))
    assert norm(x) == pytest.approx(np.linalg.norm(dense(x)), rel=1e-9, abs=1e-12)
    assert inner(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), abs=1e-9 * size + 1e-12)
    if size > 1e-6:
        assert cosines([x, y])[0][1] * size == pytest.approx(inner(x, y), abs=1e-9 * size)


@given(updates())
def test_a_spectrum_is_that_of_the_decomposition(parts):
    (x,) = parts
    np.testing.assert_allclose(spectrum(x), decompose(x).s, **close)


@given(updates())
def test_the_sign_of_both_factors_does_not_matter(parts):
    (x,) = parts
    one, other = decompose(x), decompose(LowRank(-x.a, -x.b, x.scaling))
    np.testing.assert_array_equal(one.s, other.s)
    np.testing.assert_allclose(one.u * one.s, other.u * other.s, **close)


@pytest.mark.parametrize("size", [1e-30, 1e-200, 1e25, 1e150])
def test_tiny_and_huge_factors_lose_nothing(size):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 7)), rng.standard_normal((5, 3))
    plain, scaled = decompose(LowRank(a, b)), decompose(LowRank(a * size, b))
    np.testing.assert_allclose(scaled.s, plain.s * size, rtol=1e-12)
    np.testing.assert_allclose(scaled.u, plain.u, rtol=1e-9)


def test_an_update_of_nothing_has_no_directions():
    zero = LowRank(np.zeros((3, 7)), np.zeros((5, 3)))
    found = decompose(zero)
    assert not found.s.any()
    assert not dense(recompose(found)).any()
    assert (norm(zero), effective_rank(found.s)) == (0.0, 0.0)
    assert retained(found.s, 1) == 1.0
    other = LowRank(np.eye(3, 7), np.eye(5, 3))
    assert [len(x) for x in overlap(directions(zero), directions(other))] == [0, 0]


def test_equal_directions_overlap_whole_and_others_not_at_all():
    e = np.eye(8)
    x, y = LowRank(e[:2], e[:, :2]), LowRank(e[2:4], e[:, :2])
    columns, rows = overlap(directions(x), directions(y))
    np.testing.assert_allclose(columns, [1, 1], atol=1e-12)
    np.testing.assert_allclose(rows, [0, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("s", "expected"), [([1, 1, 1, 1], 4.0), ([1, 0, 0], 1.0), ([5, 5, 0], 2.0)]
)
def test_the_effective_rank_of_equal_values_is_their_number(s, expected):
    assert effective_rank(np.array(s, float)) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad):
    a = np.ones((2, 4))
    a[1, 1] = bad
    with pytest.raises(InputError, match="NaN"):
        decompose(LowRank(a, np.ones((3, 2))))


def test_torch_factors_give_the_same():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x = LowRank(rng.standard_normal((4, 9)), rng.standard_normal((6, 4)), 0.7)
    y = LowRank(torch.from_numpy(x.a), torch.from_numpy(x.b), x.scaling)
    one, other = decompose(x), decompose(y)
    np.testing.assert_allclose(other.s.numpy(), one.s, rtol=1e-12)
    np.testing.assert_allclose(other.u.numpy(), one.u, atol=1e-10)
    assert norm(y) == pytest.approx(norm(x), rel=1e-12)
