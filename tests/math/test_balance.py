"""Factors balanced for float16: the very same product, and numbers that fit."""

import numpy as np
import pytest

from lorakit.math.balance import balanced


def factors(rank, sizes):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((rank, 30)).astype("float32")
    return a, rng.standard_normal((20, rank)).astype("float32") * np.float32(sizes)


@pytest.mark.parametrize("size", [2.0**-20, 2.0**-12, 1.0, 2.0**17, 2.0**24])
def test_the_product_keeps_its_bits_and_the_factors_their_digits(size):
    a, b = factors(5, size)
    found = balanced(a, b)
    np.testing.assert_array_equal(found[1] @ found[0], b @ a)
    narrow = [x.astype("float16").astype("float32") for x in found]
    assert np.linalg.norm(narrow[1] @ narrow[0] - b @ a) < 5e-4 * np.linalg.norm(b @ a)


def test_each_rank_is_balanced_alone_and_only_where_it_has_to_be():
    a, b = factors(3, [1.0, 0.0, 1e-7])
    new_a, new_b = balanced(a, b)
    np.testing.assert_array_equal(new_a[:2], a[:2])
    np.testing.assert_array_equal(new_b[:, :2], b[:, :2])
    assert abs(new_b[:, 2]).max() > 1e-4
