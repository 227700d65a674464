"""The laws of lorakit.math.stacked, against dense matrices put together by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.math.decomposed import Decomposed, on_disk
from lorakit.math.lowrank import LowRank, delta, in_columns, rows_of
from lorakit.math.stacked import Part, Stacked, expert_of
from lorakit.math.updates import Added
from tests.strategies import partitions, updates

few = st.integers(1, 5)
seeds = st.integers(0, 2**32)


def low_rank(rng, rows, cols):
    rank = int(rng.integers(1, 4))
    a, b = rng.standard_normal((rank, cols)), rng.standard_normal((rows, rank))
    return LowRank(a, b, float(rng.uniform(-2, 2)))


@st.composite
def stacks(draw):
    """A weight and plain updates of ranges of its rows, which may overlap, touch or leave gaps."""
    rng = np.random.default_rng(draw(seeds))
    rows, cols = draw(st.integers(1, 24)), draw(few)
    ranges = st.tuples(st.integers(0, rows), st.integers(0, rows)).map(sorted)
    parts = []
    for start, stop in sorted(draw(st.lists(ranges, max_size=6))):
        parts.append(Part(start, stop, Added(low_rank(rng, stop - start, cols), draw(few) / 2)))
    return rng.standard_normal((rows, cols)), Stacked(tuple(parts))


def dense(w, stacked, terms=False):
    """The change of every row, part by part."""
    whole = np.zeros_like(w)
    for part in stacked.parts:
        low = part.update.low
        if terms:
            low = LowRank(abs(low.a), abs(low.b), abs(low.scaling))
        whole[part.start : part.stop] += abs(part.update.weight) * delta(low, "float64")
    return whole


@given(st.data(), stacks())
def test_any_blocks_of_rows_change_as_the_dense_matrix(data, case):
    w, stacked = case
    blocks = data.draw(partitions(len(w)))
    got = [stacked.change(w[i:j], i, j) for i, j in blocks]
    np.testing.assert_allclose(np.concatenate(got), dense(w, stacked), rtol=1e-10, atol=1e-10)


@given(st.data(), stacks())
def test_terms_bound_the_change_and_are_those_of_the_parts(data, case):
    w, stacked = case
    blocks = data.draw(partitions(len(w)))
    got = np.concatenate([stacked.terms(w[i:j], i, j) for i, j in blocks])
    np.testing.assert_allclose(got, dense(w, stacked, terms=True), rtol=1e-10, atol=1e-10)
    assert (abs(stacked.change(w, 0, len(w))) <= got + 1e-10).all()


@given(stacks())
def test_rows_of_no_part_stay(case):
    w, stacked = case
    covered = {i for p in stacked.parts for i in range(p.start, p.stop)}
    bare = [i for i in range(len(w)) if i not in covered]
    assert not stacked.change(w, 0, len(w))[bare].any()


@given(stacks())
def test_nothing_has_to_be_surveyed_and_the_depth_is_at_least_that_of_any_part(case):
    _, stacked = case
    assert not stacked.surveys
    assert stacked.depth > max((p.update.low.rank for p in stacked.parts), default=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_change_has_the_dtype_of_the_rows(dtype):
    rng = np.random.default_rng(0)
    stacked = Stacked((Part(1, 3, Added(low_rank(rng, 2, 3))),))
    assert stacked.change(np.zeros((4, 3), dtype), 0, 4).dtype == dtype


@given(st.data(), seeds)
def test_dora_of_some_rows_is_that_of_a_matrix_of_these_rows(data, seed):
    rng = np.random.default_rng(seed)
    w, start, stop = rng.standard_normal((9, 4)), *sorted(rng.integers(0, 10, 2).tolist())
    update = Decomposed(low_rank(rng, stop - start, 4), abs(rng.standard_normal(stop - start)), 0)
    stacked = Stacked((Part(start, stop, update),))
    got = [stacked.change(w[i:j], i, j) for i, j in data.draw(partitions(9))]
    whole = np.zeros_like(w)
    whole[start:stop] = update.change(w[start:stop], 0, stop - start)
    np.testing.assert_allclose(np.concatenate(got), whole, rtol=1e-10, atol=1e-10)


@given(seeds, few, few, few, few, st.sampled_from(["peft", "unsloth"]))
def test_an_expert_has_its_rows_of_a_and_its_columns_of_b(seed, count, rank, out, inner, packing):
    rng = np.random.default_rng(seed)
    downs, ups = rng.standard_normal((count, rank, inner)), rng.standard_normal((count, out, rank))
    # (out, rank, expert) flattened has the experts of one rank together; (out, expert, rank) not.
    order = (1, 2, 0) if packing == "peft" else (1, 0, 2)
    low = LowRank(downs.reshape(-1, inner), ups.transpose(order).reshape(out, -1), 0.75)
    for expert in range(count):
        one = expert_of(low, expert, count, packing)
        assert np.array_equal(one.a, downs[expert])
        assert np.array_equal(one.b, ups[expert])
        assert one.scaling == low.scaling


@given(updates())
def test_one_expert_is_the_update_itself_in_either_packing(parts):
    (low,) = parts
    for packing in ("peft", "unsloth"):
        one = expert_of(low, 0, 1, packing)
        assert np.array_equal(one.a, low.a)
        assert np.array_equal(one.b, low.b)


@given(st.data(), updates())
def test_rows_of_an_update_are_rows_of_its_delta(data, parts):
    (low,) = parts
    for start, stop in data.draw(partitions(len(low.b))):
        got = delta(rows_of(low, start, stop), "float64")
        np.testing.assert_allclose(got, delta(low, "float64")[start:stop], rtol=1e-12, atol=1e-12)


@given(updates(), st.integers(0, 4), st.integers(0, 4))
def test_an_update_in_columns_of_a_wider_one_is_zero_beside_them(parts, before, after):
    (low,) = parts
    width = low.a.shape[1]
    got = delta(in_columns(low, before, before + width + after), "float64")
    whole = np.zeros((len(low.b), before + width + after))
    whole[:, before : before + width] = delta(low, "float64")
    np.testing.assert_allclose(got, whole, rtol=1e-12, atol=1e-12)


def test_parts_that_survey_see_their_own_rows_in_any_blocks():
    """DoRA with norms of inputs on two of three parts, of a weight that is read in two blocks."""
    rng = np.random.default_rng(0)
    w, m = rng.standard_normal((12, 5)), np.abs(rng.standard_normal(5))
    low = LowRank(rng.standard_normal((2, 5)), rng.standard_normal((4, 2)), 0.5)
    norms = on_disk(low, m, transposed=False, inputs=True)
    stack = Stacked((Part(0, 4, Added(low)), Part(4, 8, norms), Part(8, 12, norms)))
    assert stack.surveys
    blocks = [(0, 6), (6, 12)]
    known = stack.settle([stack.survey(w[i:j], i, j) for i, j in blocks])
    assert not known.surveys
    found = np.concatenate([known.change(w[i:j], i, j) for i, j in blocks])
    for start in (4, 8):
        v = w[start : start + 4] + 0.5 * low.b @ low.a
        wanted = m / np.linalg.norm(v, axis=0) * v - w[start : start + 4]
        np.testing.assert_allclose(found[start : start + 4], wanted, atol=1e-12)
    np.testing.assert_allclose(found[:4], 0.5 * low.b @ low.a, atol=1e-12)
