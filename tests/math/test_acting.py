"""Updates made of the weight itself, by their definitions in float64, in any blocks of rows."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.math.acting import Generalised, Rescaled, Rotated, rotations
from lorakit.math.lowrank import LowRank
from lorakit.math.recipe import Recipe

ROWS, INPUTS, KERNEL, RANK = 12, 6, 4, 2


def drawn(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape)


def whole(update, w, cuts):
    """The change of a weight, seen and asked for in these pieces."""
    edges = [0, *sorted(cuts), len(w)]
    pieces = list(pairwise(edges))
    recipe = Recipe(updates=(update,))
    if recipe.surveys:
        recipe = recipe.settled([recipe.survey(w[a:b], a, b) for a, b in pieces])
    return np.concatenate([recipe.change(w[a:b], a, b) for a, b in pieces])


cuts = st.sets(st.integers(1, ROWS - 1), max_size=4)


@given(cuts, st.floats(-2, 2))
def test_ia3_scales_rows_or_inputs(cut, weight):
    w = drawn(ROWS, INPUTS * KERNEL)
    rows, inputs = drawn(ROWS), drawn(INPUTS)
    found = whole(Rescaled(rows, 0, weight), w, cut)
    np.testing.assert_allclose(found, weight * np.diag(rows) @ w, atol=1e-12)
    found = whole(Rescaled(inputs, 1, weight), w, cut)
    expected = weight * w @ np.kron(np.diag(inputs), np.eye(KERNEL))
    np.testing.assert_allclose(found, expected, atol=1e-300)  # below, numbers have few bits


@given(cuts, st.floats(-2, 2))
def test_glora_goes_through_the_weight_and_beside_it(cut, weight):
    w = drawn(ROWS, INPUTS * KERNEL)
    low = LowRank(drawn(RANK, INPUTS * KERNEL), drawn(ROWS, RANK), 0.5)
    inner = LowRank(drawn(RANK, INPUTS), drawn(INPUTS, RANK), 1.0)
    found = whole(Generalised(low, inner, weight), w, cut)
    through = w @ np.kron(inner.b @ inner.a, np.eye(KERNEL))
    np.testing.assert_allclose(found, weight * 0.5 * (through + low.b @ low.a), atol=1e-12)


@given(cuts, st.floats(-2, 2), st.sampled_from([2, 3, 4]))
def test_oft_rotates_blocks_of_rows_and_scales_them(cut, weight, size):
    w, rescale = drawn(ROWS, INPUTS), drawn(ROWS)
    turns = rotations(drawn(ROWS // size, size, size), 0.0)
    dense = np.zeros((ROWS, ROWS))
    for i, turn in enumerate(turns):
        np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-12)
        at = slice(i * size, (i + 1) * size)
        dense[at, at] = weight * turn + (1 - weight) * np.eye(size)
    wanted = np.diag(rescale) @ dense.T @ w - w
    np.testing.assert_allclose(whole(Rotated(turns, rescale, weight), w, cut), wanted, atol=1e-12)
    found = whole(Rotated(turns, None, weight), w, cut)
    np.testing.assert_allclose(found, dense.T @ w - w, atol=1e-12)


def test_the_constraint_of_oft_is_on_the_norm_of_all_blocks():
    blocks = drawn(3, 4, 4)
    skew = blocks - blocks.transpose(0, 2, 1)
    one = np.eye(4)
    short = skew * (0.5 / np.linalg.norm(skew))
    wanted = (one + short) @ np.linalg.inv(one - short)
    np.testing.assert_allclose(rotations(blocks, 0.5), wanted, atol=1e-7)
    free = (one + skew) @ np.linalg.inv(one - skew)
    np.testing.assert_allclose(rotations(blocks, 1e3), free, atol=1e-9)


@pytest.mark.parametrize(
    "update",
    [
        Rescaled(drawn(ROWS), 0, -0.5),
        Generalised(
            LowRank(drawn(RANK, INPUTS), drawn(ROWS, RANK), 0.5),
            LowRank(drawn(RANK, INPUTS), drawn(INPUTS, RANK), 1.0),
            -0.5,
        ),
        Rotated(rotations(drawn(4, 3, 3), 0.0), drawn(ROWS), -0.5),
    ],
)
def test_terms_bound_the_change(update):
    w = drawn(ROWS, INPUTS)
    if update.surveys:
        update = update.settle([update.survey(w, 0, ROWS)])
    assert (update.terms(w, 0, ROWS) + 1e-12 >= np.abs(update.change(w, 0, ROWS))).all()
    assert update.depth > 0
