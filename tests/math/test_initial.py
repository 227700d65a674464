"""What an adapter starts from: distributions, identities, and parts of the weight."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InputError, UsageError
from lorakit.math.initial import DAMPING, METHODS, Start

OUT, IN, RANK = 600, 400, 8
CHANGING = [name for name, method in METHODS.items() if method.changes_base]
KEEPING = [name for name in METHODS if name not in (*CHANGING, "random")]
SHAPES = [(40, 40), (60, 30), (30, 60)]


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def decaying(shape, power=0.7, seed=0):
    """A weight whose singular values fall as a power of their number."""
    size = min(shape)
    u, v = (np.linalg.qr(drawn(seed + i, n, size))[0] for i, n in enumerate(shape))
    return ((u * np.arange(1, size + 1) ** -power) @ v.T).astype("f4")


def moments(width, seed=5):
    x = drawn(seed, 3 * width, width) * np.linspace(0.2, 3, width)
    return x.T @ x / len(x)


def begun(name, shape=(OUT, IN), rank=RANK, scaling=2.0, seed=3, **options):
    w, m = options.pop("w", None), options.pop("moments", None)
    return METHODS[name].function(
        Start(
            shape if w is None else w.shape,
            rank,
            scaling,
            seed,
            weight=lambda: decaying(shape) if w is None else w,
            moments=lambda: moments((shape if w is None else w.shape)[1]) if m is None else m,
            **options,
        )
    )


def taken(low):
    """What the factors do to the weight, float64."""
    return low.scaling * low.b.astype("f8") @ low.a.astype("f8")


def close(found, expected, within):
    assert np.linalg.norm(found - expected) <= within * np.linalg.norm(expected)


def is_uniform(x, bound):
    assert abs(x).max() <= bound
    assert abs(x).max() > 0.99 * bound
    assert abs(x.mean()) < 4 * bound / sqrt(3 * x.size)
    assert x.std() == pytest.approx(bound / sqrt(3), rel=0.05)
    # as much in each tenth
    counts, _ = np.histogram(x, 10, (-bound, bound))
    assert counts.min() > 0.8 * x.size / 10


def is_normal(x, deviation):
    assert abs(x.mean()) < 4 * deviation / sqrt(x.size)
    assert x.std() == pytest.approx(deviation, rel=0.05)
    assert ((x / deviation) ** 4).mean() == pytest.approx(3, rel=0.2)


# Distributions.


def test_kaiming_is_uniform_within_one_over_the_root_of_the_inputs():
    low = begun("kaiming")
    is_uniform(low.a, 1 / sqrt(IN))
    assert not low.b.any()


def test_gaussian_has_a_deviation_of_one_over_the_rank():
    low = begun("gaussian")
    is_normal(low.a, 1 / RANK)
    assert not low.b.any()


def test_random_is_uniform_on_both_sides():
    low = begun("random")
    is_uniform(low.a, 1 / sqrt(IN))
    is_uniform(low.b, 1 / sqrt(RANK))


def test_orthogonal_factors_are_normal_and_cancel():
    low = begun("orthogonal")
    for x in (low.a, low.b):
        assert abs(x.mean()) < 4 * x.std() / sqrt(x.size)
        assert x.std() == pytest.approx(0.1 * sqrt(0.5), rel=0.1)
    largest = np.linalg.norm(low.a) * np.linalg.norm(low.b)
    assert np.linalg.norm(taken(low)) < 1e-6 * largest


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "orthogonal"])
def test_an_embedding_has_nothing_in_a_and_normal_numbers_in_b(name):
    low = begun(name, embedding=True)
    assert not low.a.any()
    is_normal(low.b, 1.0)


def test_a_random_embedding_is_normal_on_both_sides():
    low = begun("random", embedding=True)
    is_normal(low.a, 1.0)
    is_normal(low.b, 1.0)


@pytest.mark.parametrize("name", KEEPING)
def test_these_change_nothing_yet(name):
    low = begun(name, shape=(40, 30))
    assert np.linalg.norm(taken(low)) <= 1e-6 * (np.linalg.norm(low.a) * np.linalg.norm(low.b) or 1)
    assert low.a.any() or low.b.any()


@pytest.mark.parametrize("name", METHODS)
def test_factors_are_float32_and_the_same_from_the_same_seed(name):
    one, other = (begun(name, shape=(40, 30)) for _ in range(2))
    assert (one.a.shape, one.b.shape) == ((RANK, 30), (40, RANK))
    assert one.a.dtype == one.b.dtype == np.float32
    assert one.a.tobytes() == other.a.tobytes()
    assert one.b.tobytes() == other.b.tobytes()


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "random", "orthogonal"])
def test_another_seed_draws_other_numbers(name):
    assert not np.array_equal(begun(name).a, begun(name, seed=4).a)


# Parts of the weight.


def best(w, rank):
    u, s, vt = np.linalg.svd(w.astype("f8"), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("name", ["pissa", "pissa-fast"])
@pytest.mark.parametrize("shape", [*SHAPES, (700, 900), (900, 600)])
def test_pissa_is_the_leading_part(name, shape):
    w, (far, more) = decaying(shape), (1e-2, 1e-4) if name == "pissa-fast" else (1e-5, 1e-5)
    low, exact = begun(name, w=w), best(w, RANK)
    close(taken(low), exact, far)
    assert np.linalg.norm(w - taken(low)) <= (1 + more) * np.linalg.norm(w - exact)
    np.testing.assert_allclose(  # the root of the spectrum in either factor
        np.linalg.norm(low.a, axis=1), np.linalg.norm(low.b, axis=0), rtol=1e-4
    )


def test_pissa_is_exact_where_singular_values_lie_close():
    w = drawn(1, 700, 900).astype("f4")
    optimum = np.linalg.norm(w - best(w, 40))
    for name, within in (("pissa", 1e-6), ("pissa-fast", 1e-3)):
        assert np.linalg.norm(w - taken(begun(name, w=w, rank=40))) <= (1 + within) * optimum


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_first_part_of_a_qr_decomposition(shape):
    w = decaying(shape)
    low = begun("olora", w=w, scaling=2.0)
    q, r = np.linalg.qr(w.astype("f8"))
    close(taken(low), 2 * q[:, :RANK] @ r[:RANK], 1e-5)
    signs = np.sign(np.diagonal(r)[:RANK])
    close(low.b, q[:, :RANK] * signs, 1e-5)
    close(low.a, r[:RANK] * signs[:, None], 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_mica_has_the_singular_vectors_of_the_least_values(shape):
    w = decaying(shape)
    u = np.linalg.svd(w.astype("f8"), full_matrices=False)[0][:, -RANK:]
    b = begun("mica", w=w).b
    np.testing.assert_allclose(abs((u * b).sum(axis=0)), 1, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_mica_finds_orthonormal_vectors_of_a_weight_that_lacks_ranks(shape):
    w = (drawn(1, shape[0], 5) @ drawn(2, 5, shape[1])).astype("f4")
    b = begun("mica", w=w).b
    np.testing.assert_allclose(b.T @ b, np.eye(RANK), atol=1e-5)
    assert np.linalg.norm(b.T @ w) < 1e-5 * np.linalg.norm(w)


def test_mica_of_all_ranks_spans_the_whole():
    b = begun("mica", w=decaying((12, 20)), rank=12).b
    np.testing.assert_allclose(b @ b.T, np.eye(12), atol=1e-5)


@pytest.mark.parametrize("name", CHANGING)
@given(st.floats(0.1, 20), st.sampled_from(SHAPES), st.integers(1, 30))
def test_whatever_the_scaling_as_much_is_taken_out(name, scaling, shape, rank):
    if name == "olora":
        return  # takes it out as often as the scaling says
    one, other = (begun(name, shape=shape, rank=rank, scaling=s) for s in (1.0, scaling))
    close(taken(other), taken(one), 1e-4)


# From statistics.


def test_eva_has_the_directions_in_which_inputs_are_largest():
    m = moments(IN)
    values, vectors = np.linalg.eigh(m)
    a = begun("eva", moments=m).a
    np.testing.assert_allclose(abs((vectors[:, ::-1][:, :RANK].T * a).sum(axis=1)), 1, atol=1e-5)
    np.testing.assert_allclose(np.diagonal(a @ m @ a.T), values[::-1][:RANK], rtol=1e-5)


def test_eva_of_a_diagonal_picks_the_largest_inputs():
    m = np.linspace(1, 2, 30)
    a = begun("eva", shape=(40, 30), moments=m, rank=3).a
    np.testing.assert_allclose(a, np.eye(30)[::-1][:3], atol=1e-6)


def test_corda_is_the_leading_part_of_the_weight_times_the_moments():
    w, m = decaying((60, 40)), moments(40)
    damped = m + DAMPING * np.diagonal(m).mean() * np.eye(40)
    part = best(w @ damped, RANK) @ np.linalg.inv(damped)
    close(taken(begun("corda", w=w, moments=m)), part, 1e-5)


def test_the_unit_of_the_statistics_does_not_matter():
    one, other = (begun("corda", shape=(60, 40), moments=c * moments(40)) for c in (1, 1e6))
    close(other.a, one.a, 1e-5)
    close(other.b, one.b, 1e-5)


def test_corda_of_equal_inputs_is_pissa():
    one = begun("corda", shape=(60, 40), moments=np.ones(40))
    close(taken(one), taken(begun("pissa", shape=(60, 40))), 1e-5)


# What is refused.


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "weight" in m.needs])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(name, value):
    w = decaying((40, 30))
    w[3, 4] = value
    with pytest.raises(InputError, match="NaN or Inf"):
        begun(name, w=w)


@pytest.mark.parametrize("name", ["eva", "corda"])
@pytest.mark.parametrize(
    ("m", "said"),
    [(np.ones(29), "29"), (np.full((30, 30), np.nan), "NaN"), (np.zeros(30), "zero|fewer")],
)
def test_statistics_that_are_none_are_refused(name, m, said):
    with pytest.raises(InputError, match=said):
        begun(name, shape=(40, 30), moments=m)


def test_eva_of_inputs_with_fewer_directions_is_refused():
    x = drawn(1, 4, 30)
    with pytest.raises(InputError, match="fewer than 8 directions"):
        begun("eva", shape=(40, 30), moments=x.T @ x)


def test_orthogonal_factors_of_an_odd_rank_are_refused():
    with pytest.raises(UsageError, match="rank is 3, not even"):
        begun("orthogonal", rank=3)
