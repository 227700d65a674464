"""Updates of LyCORIS as plain factors, against their definitions."""

import numpy as np
import pytest

from lorakit.errors import MisfitError
from lorakit.math.lycoris import loha, lokr, lokr_kernel, tucker

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.standard_normal(shape)


def dense(a, b):
    return b.reshape(len(b), -1) @ a.reshape(len(a), -1)


def test_loha_is_the_product_of_two():
    t = {"w1_a": drawn(7, 3), "w1_b": drawn(3, 5), "w2_a": drawn(7, 3), "w2_b": drawn(3, 5)}
    a, b = loha(t)
    assert len(a) == 9
    expected = (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    np.testing.assert_allclose(dense(a, b), expected, rtol=1e-12)


def test_loha_of_a_kernel_has_cores():
    t = {f"t{n}": drawn(3, 3, 2, 2) for n in (1, 2)}
    t |= {f"w{n}_a": drawn(3, 7) for n in (1, 2)} | {f"w{n}_b": drawn(3, 5) for n in (1, 2)}
    one, two = (
        np.einsum("mnkl,ni,mo->oikl", t[f"t{n}"], t[f"w{n}_b"], t[f"w{n}_a"]) for n in (1, 2)
    )
    a, b = loha(t)
    np.testing.assert_allclose(dense(a, b), (one * two).reshape(7, -1), rtol=1e-10)


@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("second", ["whole", "factors", "kernel", "core"])
def test_lokr_is_a_kronecker_product(first, second):
    t = {}
    if first == "whole":
        t["w1"] = one = drawn(2, 3)
    else:
        t["w1_a"], t["w1_b"] = drawn(2, 1), drawn(1, 3)
        one = t["w1_a"] @ t["w1_b"]
    if second == "whole":
        t["w2"] = two = drawn(5, 4)
    elif second == "kernel":
        t["w2"] = two = drawn(5, 4, 3, 3)
    elif second == "core":
        t["t2"], t["w2_a"], t["w2_b"] = drawn(2, 2, 3, 3), drawn(2, 5), drawn(2, 4)
        two = np.einsum("mnkl,ni,mo->oikl", t["t2"], t["w2_b"], t["w2_a"])
    else:
        t["w2_a"], t["w2_b"] = drawn(5, 2), drawn(2, 4)
        two = t["w2_a"] @ t["w2_b"]
    a, b = lokr(t)
    expected = np.kron(one.reshape(*one.shape, *(1,) * (two.ndim - 2)), two)
    np.testing.assert_allclose(dense(a, b), expected.reshape(10, -1), rtol=1e-10)
    assert lokr_kernel(t) == two.shape[2:]
    assert len(a) <= 2 * 5


def test_tucker_puts_the_core_into_a():
    t = {"a": drawn(3, 5, 1, 1), "mid": drawn(3, 3, 2, 2), "b": drawn(7, 3, 1, 1)}
    a, b = tucker(t)
    expected = np.einsum("mnkl,ni,om->oikl", t["mid"], t["a"][..., 0, 0], t["b"][..., 0, 0])
    np.testing.assert_allclose(dense(a, b), expected.reshape(7, -1), rtol=1e-12)
    assert a.shape == (3, 5, 2, 2)


def test_what_is_missing_is_named():
    with pytest.raises(MisfitError, match="w1_b"):
        loha({"w1_a": drawn(2, 2)})
