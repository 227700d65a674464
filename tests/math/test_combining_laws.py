"""The laws of lorakit.math.combining, for every row of its table, over random updates."""

import pkgutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorakit.math import combining
from lorakit.math.combining.methods import METHODS, combined
from lorakit.math.combining.setting import Setting
from lorakit.math.lowrank import transpose
from tests.math.updates import dense
from tests.strategies import updates, weights

EVERY_RANK = 12  # the largest matrix of `updates` has no more
# Neither weights nor scalings that leave the range of normal numbers when they are multiplied.
WEIGHTS = weights.map(lambda w: round(w, 6))
THREE = st.lists(WEIGHTS, min_size=3, max_size=3)


def some(count):
    """So many updates of one weight."""
    return updates(count=count).map(lambda x: [replace(p, scaling=round(p.scaling, 6)) for p in x])


every_method = pytest.mark.parametrize("method", METHODS)


def same(one, other, scale=1e-6):
    size = max(1.0, float(np.linalg.norm(other)))
    np.testing.assert_allclose(one, other, rtol=0, atol=scale * size)


def summed(parts, ws):
    return sum(w * dense(p) for p, w in zip(parts, ws, strict=True))


def reduced(method, setting):
    """The setting with a rank of 1, but for `cat`, which has no choice."""
    return setting if method == "cat" else replace(setting, rank=1)


@every_method
@given(some(1), WEIGHTS)
def test_a_lone_update_is_only_multiplied_by_its_weight(method, parts, weight):
    found = combined(method, parts, [weight], Setting())
    same(dense(found.low), weight * dense(parts[0]))
    assert found.retained == 1


@every_method
@given(some(3), THREE, st.permutations(range(3)))
def test_permuting_the_inputs_permutes_nothing_else(method, parts, ws, order):
    setting = Setting(density=0.6, rank=None if method == "cat" else EVERY_RANK)
    one = combined(method, parts, ws, setting)
    other = combined(method, [parts[i] for i in order], [ws[i] for i in order], setting)
    same(dense(one.low), dense(other.low))
    if METHODS[method].dense:
        np.testing.assert_array_equal(one.low.a, other.low.a)
        np.testing.assert_array_equal(one.low.b, other.low.b)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"slerp"}))
@given(some(3), THREE)
def test_a_weight_may_as_well_lie_in_the_scaling(method, parts, ws):
    setting = Setting(density=0.6, rank=None if method == "cat" else EVERY_RANK)
    scaled = [replace(p, scaling=w * p.scaling) for p, w in zip(parts, ws, strict=True)]
    one, other = combined(method, parts, ws, setting), combined(method, scaled, [1.0] * 3, setting)
    same(dense(one.low), dense(other.low))


SIDELESS = (
    *("linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"),
    *("slerp", "breadcrumbs", "sce", "tsv"),
)


@pytest.mark.parametrize("method", SIDELESS)
@given(some(3), THREE)
def test_combining_commutes_with_transposing(method, parts, ws):
    setting = Setting(density=0.6, rank=None if method == "cat" else EVERY_RANK)
    turned = combined(method, [transpose(p) for p in parts], ws, setting)
    same(dense(turned.low).T, dense(combined(method, parts, ws, setting).low))


@every_method
@given(some(3), THREE)
def test_the_retained_share_is_that_of_the_energy_of_the_whole_combination(method, parts, ws):
    setting = Setting(density=0.6)
    found = combined(method, parts, ws, reduced(method, setting))
    whole = combined(method, parts, ws, Setting(density=0.6, rank=100))
    energy = np.linalg.norm(dense(whole.low)) ** 2
    lost = np.linalg.norm(dense(whole.low) - dense(found.low)) ** 2
    assert 0 <= found.retained <= 1 + 1e-9
    np.testing.assert_allclose(lost, (1 - found.retained) * energy, atol=1e-6 * max(1, energy))


@every_method
@given(some(3), THREE, st.integers(1, EVERY_RANK))
def test_the_result_has_the_wanted_rank_or_less(method, parts, ws, rank):
    if method == "cat":
        rank = sum(p.rank for p in parts)
    found = combined(method, parts, ws, Setting(rank=rank, density=0.5))
    assert found.wanted_rank == rank
    assert found.low.rank <= rank
    assert found.low.shape == parts[0].shape
    assert method == "cat" or found.low.rank <= min(found.low.shape)


@given(some(3), THREE)
def test_cat_is_exactly_the_weighted_sum(parts, ws):
    same(dense(combined("cat", parts, ws, Setting()).low), summed(parts, ws), 1e-12)


@given(some(3), THREE)
def test_linear_is_exactly_the_weighted_sum(parts, ws):
    found = combined("linear", parts, ws, Setting())
    same(dense(found.low), summed(parts, ws), 1e-12)
    assert found.retained == 1


@given(some(3), THREE)
def test_svd_at_full_rank_is_cat(parts, ws):
    full = combined("svd", parts, ws, Setting(rank=min(parts[0].shape)))
    same(dense(full.low), dense(combined("cat", parts, ws, Setting()).low))


@pytest.mark.parametrize("method", ["linear", "svd"])
@given(some(3), THREE, st.integers(1, 8))
def test_a_sum_cut_to_a_rank_is_as_near_as_the_svd_of_the_dense_sum(method, parts, ws, rank):
    found = combined(method, parts, ws, Setting(rank=rank))
    total = summed(parts, ws)
    best = np.linalg.norm(np.linalg.svd(total, compute_uv=False)[rank:])
    same(np.linalg.norm(total - dense(found.low)), best)


@given(some(2), st.floats(0.1, 2), st.floats(0.1, 2))
def test_slerp_of_two_is_the_sine_formula(parts, first, second):
    one, other = (dense(p) for p in parts)
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    cosine = float(np.sum(one * other) / norms) if norms > 1e-6 else 1.0
    assume(abs(cosine) < 0.999)
    angle, t = np.arccos(cosine), second / (first + second)
    mixed = np.sin((1 - t) * angle) * one + np.sin(t * angle) * other
    found = combined("slerp", parts, [first, second], Setting())
    same(dense(found.low), (first + second) * mixed / np.sin(angle))


def test_every_file_of_methods_has_a_row_in_the_table():
    machinery = {"methods", "compat", "setting", "tasks", "sparse", "election"}
    files = {m.name for m in pkgutil.iter_modules(combining.__path__)} - machinery
    assert files == {m.function.__module__.split(".")[-1] for m in METHODS.values()}


def test_every_field_that_a_method_uses_is_one_of_the_setting():
    assert {f for m in METHODS.values() for f in m.uses} == set(Setting.__dataclass_fields__)
