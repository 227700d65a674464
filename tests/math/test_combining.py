"""The combination methods against plain dense references in float64."""

import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from lorakit.math.combining import elementwise
from lorakit.math.combining.methods import METHODS, combined
from lorakit.math.combining.setting import Setting
from lorakit.math.combining.tasks import blocks, tasks
from lorakit.math.lowrank import LowRank, delta
from tests.math.updates import IN, OUT, WEIGHTS, close, dense, three, update, weighted

# The references, of lists of dense matrices.


def largest(x, density):
    order = np.argsort(-np.abs(x), axis=None)
    kept = np.zeros(x.size)
    chosen = order[: int(density * x.size)]
    kept[chosen] = x.reshape(-1)[chosen]
    return kept.reshape(x.shape)


def without_outliers(x, density, gamma):
    order = np.argsort(-np.abs(x), axis=None)[int(gamma * x.size) :]
    kept = np.zeros(x.size)
    chosen = order[: int(density * x.size)]
    kept[chosen] = x.reshape(-1)[chosen]
    return kept.reshape(x.shape)


def elect(xs, majority):
    xs = np.stack(xs)
    votes = xs.sum(0) if majority == "total" else np.sign(xs).sum(0)
    agree = np.sign(xs) == np.where(votes >= 0, 1, -1)
    return (xs * agree).sum(0) / np.maximum(agree.sum(0), 1)


def drawn(parts, ws, seed):
    """The uniform numbers that are drawn for each update, in the order of the updates."""
    order = tasks(parts, ws)
    deltas = weighted(parts, ws)
    match = [next(t for t in order if np.allclose(t.b @ t.a, d)) for d in deltas]
    return [t.draw(seed, 0, OUT) for t in match]


def dare(parts, ws, density, seed):
    masks = [u < density for u in drawn(parts, ws, seed)]
    return [d * m / density for d, m in zip(weighted(parts, ws), masks, strict=True)]


def magprune(parts, ws, density, epsilon, seed):
    found = []
    for d, u in zip(weighted(parts, ws), drawn(parts, ws, seed), strict=True):
        rank = np.argsort(np.argsort(np.abs(d), axis=1), axis=1)
        chance = density + epsilon * ((2 * rank + 1) / IN - 1)
        found.append(np.where(u < chance, d / chance, 0))
    return found


def whole(method, parts, ws, **setting):
    """The combination without truncation."""
    return dense(combined(method, parts, ws, Setting(rank=IN, exact=True, **setting)).low)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "ties_svd"])
def test_ties_is_that_of_the_weighted_updates(method, majority):
    expected = elect([largest(d, 0.3) for d in weighted(three(), WEIGHTS)], majority)
    close(whole(method, three(), WEIGHTS, density=0.3, majority=majority), expected)


def test_ties_at_density_1_elects_among_all_elements():
    close(whole("ties", three(), WEIGHTS), elect(weighted(three(), WEIGHTS), "total"))


@pytest.mark.parametrize("method", ["magnitude_prune", "magnitude_prune_svd"])
def test_magnitude_prune_is_the_sum_of_the_largest_elements(method):
    expected = sum(largest(d, 0.3) for d in weighted(three(), WEIGHTS))
    close(whole(method, three(), WEIGHTS, density=0.3), expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_linear_svd"])
def test_dare_linear_is_the_sum_of_what_was_drawn_and_enlarged(method):
    expected = sum(dare(three(), WEIGHTS, 0.4, seed=5))
    close(whole(method, three(), WEIGHTS, density=0.4, seed=5), expected)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", ["dare_ties", "dare_ties_svd"])
def test_dare_ties_elects_among_what_was_drawn_and_enlarged(method, majority):
    expected = elect(dare(three(), WEIGHTS, 0.4, seed=5), majority)
    close(whole(method, three(), WEIGHTS, density=0.4, seed=5, majority=majority), expected)


def test_della_keeps_larger_elements_with_larger_chance():
    expected = elect(magprune(three(), WEIGHTS, 0.4, 0.2, seed=5), "total")
    close(whole("della", three(), WEIGHTS, density=0.4, epsilon=0.2, seed=5), expected)


def test_breadcrumbs_drops_the_outliers_and_the_noise():
    expected = sum(without_outliers(d, 0.5, 0.1) for d in weighted(three(), WEIGHTS))
    close(whole("breadcrumbs", three(), WEIGHTS, density=0.5, gamma=0.1), expected)


def test_breadcrumbs_drops_no_more_outliers_than_the_density_leaves():
    expected = sum(without_outliers(d, 0.9, 0.1) for d in weighted(three(), WEIGHTS))
    close(whole("breadcrumbs", three(), WEIGHTS, density=0.9, gamma=0.5), expected)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_sce_selects_calculates_and_erases(density):
    xs = np.stack(weighted(three(), WEIGHTS))
    order = np.argsort(-xs.var(0), axis=None)[: int(density * OUT * IN)]
    selected = np.zeros(OUT * IN)
    selected[order] = 1
    xs = xs * selected.reshape(OUT, IN)
    shares = (xs**2).sum((1, 2)) / (xs**2).sum()
    agree = (np.sign(xs) == np.where(xs.sum(0) >= 0, 1, -1)) * shares[:, None, None]
    held = agree.sum(0)
    expected = (xs * agree).sum(0) / np.where(held > 0, held, 1)
    close(whole("sce", three(), WEIGHTS, density=density), expected)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_knots_elects_in_the_space_of_the_common_svd(density):
    u, s, v = np.linalg.svd(np.concatenate(weighted(three(), WEIGHTS), axis=1))
    rank = sum(p.rank for p in three())
    aligned = np.split(v[:rank], 3, axis=1)
    merged = elect([largest(x, density) for x in aligned], "total")
    close(whole("knots", three(), WEIGHTS, density=density), (u * s[:OUT])[:, :rank] @ merged[:OUT])


@pytest.mark.parametrize("zero", range(3))
def test_in_knots_an_update_of_weight_zero_takes_no_part(zero):
    ws = [0.0 if i == zero else w for i, w in enumerate(WEIGHTS)]
    rest = [[x for i, x in enumerate(xs) if i != zero] for xs in (three(), ws)]
    close(whole("knots", three(), ws), whole("knots", *rest))


def test_tsv_sums_updates_with_orthogonalised_singular_vectors():
    cut = [np.linalg.svd(d, full_matrices=False) for d in weighted(three(), WEIGHTS)]
    ranks = [p.rank for p in three()]
    u = np.concatenate([c[0][:, :r] for c, r in zip(cut, ranks, strict=True)], axis=1)
    s = np.concatenate([c[1][:r] for c, r in zip(cut, ranks, strict=True)])
    v = np.concatenate([c[2][:r] for c, r in zip(cut, ranks, strict=True)])
    (p, _, q), (x, _, y) = (np.linalg.svd(m, full_matrices=False) for m in (u, v))
    close(whole("tsv", three(), WEIGHTS), (p @ q * s) @ (x @ y))


def test_tsv_gives_two_equal_updates_as_one():
    one = update(1)
    close(whole("tsv", [one, one], [1.0, 1.0]), dense(one))


def test_tsv_takes_of_very_large_ranks_only_what_fits():
    parts = [update(1, 20), update(2, 20)]
    assert combined("tsv", parts, [1.0, 1.0], Setting()).low.rank == IN


def test_slerp_of_orthogonal_updates_keeps_the_norm():
    one, other = update(1), update(2)
    other = LowRank(other.a - other.a @ np.linalg.pinv(one.a) @ one.a, other.b)
    parts = [LowRank(p.a, p.b / np.linalg.norm(dense(p)), p.scaling) for p in (one, other)]
    found = combined("slerp", parts, [0.5, 0.5], Setting())
    np.testing.assert_allclose(np.linalg.norm(dense(found.low)), 1)


def test_slerp_of_three_is_at_equal_angles_to_equally_weighted_directions():
    parts = [LowRank(np.eye(IN)[i : i + 1], np.eye(OUT)[:, i : i + 1]) for i in range(3)]
    found = dense(combined("slerp", parts, [1 / 3] * 3, Setting()).low)
    np.testing.assert_allclose([found[i, i] for i in range(3)], 3**-0.5)


def test_slerp_of_opposite_updates_is_the_sum():
    one = update(1)
    other = LowRank(one.a, -one.b, one.scaling)
    close(whole("slerp", [one, other], [0.7, 0.3]), 0.4 * dense(one))


def test_slerp_leaves_out_an_update_that_is_zero():
    one, none = update(1), LowRank(np.zeros((2, IN)), np.zeros((OUT, 2)))
    close(whole("slerp", [one, none], [0.7, 0.3]), 0.7 * dense(one))


@pytest.mark.parametrize("method", METHODS)
def test_updates_that_are_all_zero_combine_to_zero(method):
    none = LowRank(np.zeros((2, IN), np.float32), np.zeros((OUT, 2), np.float32))
    found = combined(method, [none, none], [1.0, 1.0], Setting(density=0.5))
    assert not delta(found.low).any()
    assert found.retained == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_factors_of_files_are_combined_in_float32(method, dtype):
    parts = three(dtype=dtype)
    wide = [replace(p, a=p.a.astype(np.float64), b=p.b.astype(np.float64)) for p in parts]
    found = combined(method, parts, WEIGHTS, Setting())
    expected = combined(method, wide, WEIGHTS, Setting(exact=True))
    assert found.low.a.dtype == found.low.b.dtype == np.float32
    close(dense(found.low), dense(expected.low), 2e-6)


def test_cat_of_one_scaling_leaves_the_factors_untouched():
    parts = [update(1, scaling=0.5), update(2, scaling=1.0)]
    low = combined("cat", parts, [1.0, 0.5], Setting()).low
    np.testing.assert_array_equal(low.a, np.concatenate([p.a for p in parts]))
    np.testing.assert_array_equal(low.b, np.concatenate([p.b for p in parts], axis=1))
    assert low.scaling == 0.5


def test_the_default_rank_of_svd_is_the_largest_of_the_inputs():
    assert combined("svd", three(), WEIGHTS, Setting()).low.rank == 6
    assert combined("ties", three(), WEIGHTS, Setting()).low.rank == 6


def test_linear_to_a_rank_is_the_svd_of_the_float64_sum_within_1e_minus_5():
    parts = [update(i, 16, (256, 192), dtype=np.float32) for i in range(4)]
    ws = [0.5, 0.25, -0.3, 1.0]
    u, s, v = np.linalg.svd(sum(weighted(parts, ws)), full_matrices=False)
    found = combined("linear", parts, ws, Setting(rank=16))
    close(dense(found.low), (u[:, :16] * s[:16]) @ v[:16], 1e-6)
    np.testing.assert_allclose(found.retained, sum(s[:16] ** 2) / sum(s**2))


# What is drawn.


def test_masks_depend_on_the_seed_and_on_nothing_else():
    setting = Setting(density=0.5, rank=IN)
    one = combined("dare_linear", three(), WEIGHTS, setting)
    again = combined("dare_linear", three(), WEIGHTS, setting)
    other = combined("dare_linear", three(), WEIGHTS, replace(setting, seed=1))
    np.testing.assert_array_equal(one.low.b, again.low.b)
    assert np.linalg.norm(dense(one.low) - dense(other.low)) > 1


def test_a_weight_does_not_change_the_masks():
    setting = Setting(density=0.5, rank=IN)
    one = dense(combined("dare_linear", [update(1)], [1.0], setting).low)
    close(2 * one, dense(combined("dare_linear", [update(1)], [2.0], setting).low))


def test_equal_adapters_have_masks_of_their_own():
    first, second = tasks([update(1), update(1)], [1.0, 1.0])
    assert (first.draw(0, 0, OUT) != second.draw(0, 0, OUT)).any()


@pytest.mark.parametrize("rule", [elementwise.DARE_LINEAR, elementwise.DELLA])
def test_what_is_drawn_keeps_the_density_and_the_expectation(rule):
    (task,) = tasks([LowRank(np.ones((1, 500)), np.ones((800, 1)))], [1.0])
    found = rule.sparsify(task, Setting(density=0.3))(0, 800)
    np.testing.assert_allclose((found > 0).mean(), 0.3, atol=0.005)
    np.testing.assert_allclose(found.mean(), 1, atol=0.02)


def test_a_matrix_of_many_blocks_is_pruned_as_a_whole():
    parts = [update(i, 3, (700, 1000)) for i in range(2)]
    assert len(list(blocks((700, 1000)))) > 2
    found = elementwise.joined(tasks(parts, [1.0, 2.0]), Setting(density=0.2), elementwise.TIES)
    close(found, elect([largest(d, 0.2) for d in weighted(parts, [1.0, 2.0])], "total"))


def test_no_more_than_one_dense_matrix_is_held_before_the_svd():
    shape = (4096, 2048)
    line = tasks([update(i, 4, shape, dtype=np.float32) for i in range(4)], [1.0] * 4)
    tracemalloc.start()
    elementwise.joined(line, Setting(density=0.5), elementwise.TIES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 4 * shape[0] * shape[1]
