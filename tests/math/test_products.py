"""Products that are evaluated row by row are what LyCORIS multiplies out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.math.decomposed import on_disk
from lorakit.math.lowrank import LowRank, delta
from lorakit.math.products import Hadamard, Kronecker, Multiplied
from tests.strategies import partitions

sides = st.integers(1, 5)
KINDS = ("number by number", "Kronecker's")


@st.composite
def products(draw):
    """A product of each kind, with what it is multiplied out."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    p, q, c, d = (draw(sides) for _ in range(4))
    left, right = rng.standard_normal((p, q)), rng.standard_normal((c, d))
    pairs = [
        LowRank(rng.standard_normal((r, q * d)), rng.standard_normal((p * c, r)), draw(sides))
        for r in (draw(sides), draw(sides))
    ]
    one, two = (delta(x, "float64") for x in pairs)
    return {
        "number by number": (Hadamard(*pairs), one * two),
        "Kronecker's": (Kronecker(left, right), np.kron(left, right)),
    }


def changes(update, rows, blocks):
    w = np.zeros(rows)
    if update.surveys:
        update = update.settle([update.survey(w[i:j], i, j) for i, j in blocks])
    return np.concatenate([update.change(w[i:j], i, j) for i, j in blocks])


@pytest.mark.parametrize("kind", KINDS)
@given(case=products(), data=st.data(), weight=st.floats(-2, 2))
def test_the_rows_of_a_product_are_those_of_the_whole(kind, case, data, weight):
    product, whole = case[kind]
    blocks = data.draw(partitions(len(whole)))
    assert product.shape == whole.shape
    found = changes(Multiplied(product, weight), whole.shape, blocks)
    np.testing.assert_allclose(found, weight * whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(case=products(), data=st.data())
def test_a_product_that_is_cut_is_its_rows(kind, case, data):
    product, whole = case[kind]
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    inner = data.draw(st.integers(0, stop - start - 1))
    once = product.rows(start, stop)
    twice = once.rows(inner, stop - start)
    for cut, rows in ((once, whole[start:stop]), (twice, whole[start + inner : stop])):
        assert cut.shape == rows.shape
        found = changes(Multiplied(cut), rows.shape, [(0, len(rows))])
        np.testing.assert_allclose(found, rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(case=products())
def test_a_product_that_is_turned_is_the_transpose(kind, case):
    product, whole = case[kind]
    update = on_disk(product, None, transposed=True)
    found = changes(update, whole.T.shape, [(0, whole.shape[1])])
    np.testing.assert_allclose(found, whole.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(case=products(), weight=st.floats(-2, 2))
def test_a_change_is_never_larger_than_its_terms(kind, case, weight):
    product, whole = case[kind]
    update, w = Multiplied(product, weight), np.zeros(whole.shape)
    change, terms = update.change(w, 0, len(w)), update.terms(w, 0, len(w))
    assert (np.abs(change) <= terms * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@given(case=products(), inputs=st.booleans(), transposed=st.booleans(), data=st.data())
def test_dora_of_a_product_has_the_norms_of_the_whole(kind, case, inputs, transposed, data):
    product, whole = case[kind]
    rng = np.random.default_rng(1)
    w, axis = rng.standard_normal(whole.shape), int(not inputs)
    magnitude = rng.random(whole.shape[inputs]) + 0.1
    v = w + whole
    scale = magnitude / np.linalg.norm(v, axis=axis)
    wanted = v * (scale[None, :] if inputs else scale[:, None]) - w
    update = on_disk(product, magnitude, transposed=transposed, inputs=inputs)
    lying, wanted = (w.T, wanted.T) if transposed else (w, wanted)
    blocks = data.draw(partitions(len(lying)))
    if update.surveys:
        update = update.settle([update.survey(lying[i:j], i, j) for i, j in blocks])
    found = np.concatenate([update.change(lying[i:j], i, j) for i, j in blocks])
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-7)


def test_a_product_of_torch_is_that_of_numpy():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    left, right, w = (rng.standard_normal(s) for s in ((3, 2), (4, 5), (12, 10)))
    there = Multiplied(Kronecker(torch.tensor(left), torch.tensor(right)), 0.5)
    here = Multiplied(Kronecker(left, right), 0.5)
    found = there.change(torch.tensor(w)[5:11], 5, 11).numpy()
    np.testing.assert_array_equal(found, here.change(w[5:11], 5, 11))
