"""The laws of lorakit.math.experts."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.math.experts import alpha_for, packed, scaled, supports, unpacked
from lorakit.math.lowrank import LowRank
from lorakit.math.stacked import expert_of

sizes = st.integers(1, 4)
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


@given(sizes, sizes, sizes, sizes, st.sampled_from(DTYPES))
def test_a_stack_that_is_taken_apart_and_packed_is_the_same_bytes(count, rank, out, inner, dtype):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((count * rank, inner)).astype(dtype)
    b = rng.standard_normal((out, rank * count)).astype(dtype)
    again = packed(*unpacked(a, b, count))
    assert [x.tobytes() for x in again] == [a.tobytes(), b.tobytes()]


@given(sizes, sizes, sizes, sizes, st.sampled_from(["peft", "unsloth"]))
def test_each_expert_is_the_one_that_a_merge_takes(count, rank, out, inner, packing):
    a = np.arange(count * rank * inner).reshape(-1, inner)
    b = np.arange(out * rank * count).reshape(out, -1)
    downs, ups = unpacked(a, b, count, packing)
    for number in range(count):
        one = expert_of(LowRank(a, b), number, count, packing)
        np.testing.assert_array_equal(downs[number], one.a)
        np.testing.assert_array_equal(ups[number], one.b)


def test_ranks_that_are_zero_in_one_range_alone_matter_to_the_others_only():
    b = np.array([[[1, 0, 0, 2], [0, 0, 3, 4]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    assert supports(b, [(0, 1), (1, 2)]) == [[0, 1, 3], [1, 2, 3]]


def test_a_range_of_zeros_keeps_all_ranks():
    assert supports(np.array([[0, 0], [1, 2]]), [(0, 1), (1, 2)]) == [[0, 1], [0, 1]]


@given(st.floats(0.01, 100), st.integers(1, 512), st.booleans())
def test_an_alpha_gives_back_the_scaling(scaling, rank, rslora):
    alpha, exact = alpha_for(scaling, rank, rslora=rslora)
    again = alpha / (math.sqrt(rank) if rslora else rank)
    assert (again == scaling) is exact
    assert abs(again - scaling) <= math.ulp(scaling)


@given(st.integers(1, 256), st.integers(1, 64))
def test_an_alpha_that_can_be_whole_is(alpha, rank):
    assert alpha_for(alpha / rank, 2 * rank, rslora=False) == (2 * alpha, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_power_of_two_is_exact_and_another_factor_is_counted(dtype):
    x = np.array([1, 1.25, -3], dtype)
    twice, lost = scaled(x, 2.0)
    assert (twice.tolist(), lost, twice.dtype) == ([2, 2.5, -6], 0, x.dtype)
    assert scaled(x, 0.1)[1] > 0
    assert scaled(x, 1.0)[0] is x
