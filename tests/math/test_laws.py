"""The laws of lorakit.math, over random shapes, ranks, weights and cuts into blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.math.decomposed import Decomposed, on_disk
from lorakit.math.lowrank import cat, flatten, transpose, ungroup
from lorakit.math.recipe import Recipe, Rows
from lorakit.math.updates import Added, Toward
from tests.math.updates import dense
from tests.strategies import partitions, updates, weights

exactly = {"rtol": 1e-12, "atol": 1e-12}  # float64 throughout


def same(one, other):
    np.testing.assert_allclose(one, other, **exactly)


@given(updates())
def test_transposing_the_factors_transposes_the_delta(case):
    (x,) = case
    same(dense(transpose(x)), dense(x).T)


@given(updates(kernel=(3, 2)))
def test_flattened_factors_give_the_flattened_convolution(case):
    (x,) = case
    kernels = x.scaling * np.einsum("orxy,rikl->oikl", x.b, x.a)
    same(dense(flatten(x.a, x.b, x.scaling)), kernels.reshape(kernels.shape[0], -1))


@given(updates(count=3), st.lists(weights, min_size=3, max_size=3))
def test_cat_is_exactly_the_weighted_sum(parts, ws):
    expected = sum(w * dense(p) for p, w in zip(parts, ws, strict=True))
    same(dense(cat(parts, ws)), expected)


@given(updates(), st.lists(st.booleans(), min_size=1, max_size=4).filter(any))
def test_an_ungrouped_update_is_that_of_each_enabled_block(case, enabled):
    (x,) = case
    groups = sum(enabled)
    rng = np.random.default_rng(0)
    a = rng.standard_normal((groups * x.rank, x.shape[1]))
    b = np.concatenate([x.b * (g + 1) for g in range(groups)])
    grouped = type(x)(a, b, x.scaling)
    expected, g = [], 0
    for on in enabled:
        block = x.scaling * (g + 1) * x.b @ a[g * x.rank : (g + 1) * x.rank] if on else 0
        expected.append(np.broadcast_to(block, x.shape))
        g += on
    same(dense(ungroup(grouped, enabled)), np.concatenate(expected))


KINDS = ("added", "decomposed by rows", "decomposed by columns", "toward", "toward but for rows")


def every_update(x, rows, weight):
    """One update of each kind for a weight of the shape of x."""
    rng = np.random.default_rng(7)
    values = rng.standard_normal(x.shape)
    return {
        "added": Added(x, weight),
        "decomposed by rows": Decomposed(x, rng.random(x.shape[0]), 0, weight),
        "decomposed by columns": Decomposed(x, rng.random(x.shape[1]), 1, weight),
        "toward": Toward(values, weight),
        "toward but for rows": Toward(values, weight, frozenset({0, x.shape[0] - 1})),
    }


def whole(update, w, blocks):
    """The change of all rows, asked for block by block."""
    if update.surveys:
        update = update.settle([update.survey(w[i:j], i, j) for i, j in blocks])
    return np.concatenate([update.change(w[i:j], i, j) for i, j in blocks])


@pytest.mark.parametrize("kind", KINDS)
@given(case=updates(), weight=weights, data=st.data())
def test_a_change_does_not_depend_on_the_cut_into_blocks(kind, case, weight, data):
    (x,) = case
    w = np.random.default_rng(1).standard_normal(x.shape)
    update = every_update(x, w, weight)[kind]
    blocks = data.draw(partitions(x.shape[0]))
    same(whole(update, w, blocks), whole(update, w, [(0, x.shape[0])]))


@pytest.mark.parametrize("kind", KINDS)
@given(case=updates(), weight=weights)
def test_a_change_is_never_larger_than_its_terms(kind, case, weight):
    (x,) = case
    w = np.random.default_rng(1).standard_normal(x.shape)
    update = every_update(x, w, weight)[kind]
    if update.surveys:
        update = update.settle([update.survey(w, 0, len(w))])
    change, terms = update.change(w, 0, len(w)), update.terms(w, 0, len(w))
    assert (np.abs(change) <= terms * (1 + 1e-9) + 1e-12).all()


@given(updates(), weights)
def test_dora_gives_every_output_unit_the_norm_of_its_magnitude(case, weight):
    (x,) = case
    rng = np.random.default_rng(2)
    w, magnitude = rng.standard_normal(x.shape), rng.random(x.shape[0]) + 0.1
    plain = on_disk(x, magnitude, transposed=False)
    turned = on_disk(x, magnitude, transposed=True)
    changed = w + whole(plain, w, [(0, len(w))])
    same(np.linalg.norm(changed, axis=1), magnitude)
    same((w.T + whole(turned, w.T, [(0, w.shape[1])])).T, changed)
    weighted = on_disk(x, magnitude, transposed=False, weight=weight)
    same(whole(weighted, w, [(0, len(w))]), weight * (changed - w))


@given(updates(count=3), st.lists(weights, min_size=3, max_size=3))
def test_summed_updates_change_as_much_as_one_by_one(parts, ws):
    w = np.random.default_rng(3).standard_normal(parts[0].shape)
    recipe = Recipe(updates=[Added(p, v) for p, v in zip(parts, ws, strict=True)])
    summed = recipe.summed()
    assert len(summed.updates) == 1
    same(summed.change(w, 0, len(w)), recipe.change(w, 0, len(w)))


@given(st.data(), weights)
def test_placed_rows_are_the_only_ones_that_change(data, weight):
    rows = data.draw(st.integers(1, 9))
    w = np.random.default_rng(4).standard_normal((rows, 3))
    picked = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1)))), dtype=int)
    values = np.random.default_rng(5).standard_normal((len(picked), 3))
    placed = w.copy()
    for i, j in data.draw(partitions(rows)):
        Recipe(rows=[Rows(picked, values, weight)]).begin(placed[i:j], i, j)
    expected = w.copy()
    expected[picked] += weight * (values - w[picked])
    same(placed, expected)


@given(updates())
def test_numpy_arrays_and_torch_tensors_give_the_same(case):
    torch = pytest.importorskip("torch")
    (x,) = case
    rng = np.random.default_rng(6)
    w, magnitude = rng.standard_normal(x.shape), rng.random(x.shape[1])
    there = type(x)(torch.tensor(x.a), torch.tensor(x.b), x.scaling)
    same(dense(there).numpy(), dense(x))
    ours = on_disk(transpose(x), magnitude, transposed=True)
    theirs = on_disk(transpose(there), torch.tensor(magnitude), transposed=True)
    got = whole_torch(theirs, torch.tensor(w))
    same(got, whole(ours, w, [(0, len(w))]))


def whole_torch(update, w):
    update = update.settle([update.survey(w, 0, len(w))])
    return update.change(w, 0, len(w)).numpy()
