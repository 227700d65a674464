"""The leading part of a dense matrix is as good as the best one, and what is told of it is so."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InputError, UsageError
from lorakit.math.truncated import seed_of, top

LARGE = (900, 1100)  # beyond what is decomposed as a whole


def gaussian(seed=0, shape=LARGE):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def decaying(seed=0, shape=LARGE, power=1.0):
    """A matrix whose singular values fall as a power of their number."""
    rng = np.random.default_rng(seed)
    size = min(shape)
    u = np.linalg.qr(rng.standard_normal((shape[0], size)))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], size)))[0]
    s = np.arange(1, size + 1) ** -power
    return ((u * s) @ v.T).astype("f4")


def optimum(w, rank):
    s = np.linalg.svd(w.astype("f8"), compute_uv=False)
    return np.linalg.norm(s[rank:])


def left(w, found):
    spectral = found.spectral
    part = (spectral.u.astype("f8") * spectral.s) @ spectral.vt
    return np.linalg.norm(w - part)


@pytest.mark.parametrize("rank", [1, 16, 40, 80])
@pytest.mark.parametrize(("make", "within"), [(gaussian, 1e-3), (decaying, 1e-5)])
def test_what_is_left_is_next_to_the_least_there_is(make, within, rank):
    w = make()
    found = top(w, rank)
    assert left(w, found) <= (1 + within) * optimum(w, rank)


@pytest.mark.parametrize("make", [gaussian, decaying])
@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1], (60, 40)])
def test_what_is_told_is_what_is_there(make, shape):
    w = make(shape=shape)
    found = top(w, 12)
    norm = np.linalg.norm(w.astype("f8"))
    assert found.residual == pytest.approx(left(w, found), rel=1e-5)
    assert found.captured == pytest.approx(1 - (found.residual / norm) ** 2, abs=1e-9)
    spectral = found.spectral
    np.testing.assert_allclose(spectral.u.T @ spectral.u, np.eye(12), atol=1e-5)
    np.testing.assert_allclose(spectral.vt @ spectral.vt.T, np.eye(12), atol=1e-5)
    assert (np.diff(spectral.s) <= 0).all()


@pytest.mark.parametrize("rank", [4, 60])
def test_the_exact_one_is_exact_whatever_the_spectrum(rank):
    w = gaussian()
    found = top(w, rank, exact=True)
    s = np.linalg.svd(w.astype("f8"), compute_uv=False)[:rank]
    np.testing.assert_allclose(found.spectral.s, s, rtol=1e-6)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 999))
def test_small_matrices_are_decomposed_as_a_whole(height, width, rank, seed):
    w = gaussian(seed, (height, width))
    found = top(w, rank)
    assert len(found.spectral.s) == min(rank, height, width)
    assert left(w, found) <= (1 + 1e-5) * optimum(w, rank) + 1e-5 * np.linalg.norm(w)


def test_the_same_seed_gives_the_same_bits():
    w = gaussian()
    one, other = top(w, 16, seed=3), top(w, 16, seed=3)
    for name in ("u", "s", "vt"):
        np.testing.assert_array_equal(getattr(one.spectral, name), getattr(other.spectral, name))


def test_a_good_start_takes_fewer_passes():
    w = gaussian(0)
    before = top(w, 16)
    moved = w + 0.01 * gaussian(1)
    warm = top(moved, 16, start=before.spectral.vt.T, passes=1)
    cold = top(moved, 16, passes=1)
    assert warm.passes == cold.passes == 1
    assert warm.residual < cold.residual


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_tiny_and_huge_matrices_lose_nothing(size):
    w = decaying()
    found, plain = top(w * np.float32(size), 8), top(w, 8)
    np.testing.assert_allclose(found.spectral.s / size, plain.spectral.s, rtol=1e-4)


def test_of_nothing_nothing_is_left():
    found = top(np.zeros(LARGE, "f4"), 8)
    assert (found.residual, found.captured) == (0.0, 1.0)
    assert not found.spectral.s.any()


def test_a_matrix_of_less_rank_is_captured_whole():
    w = decaying()[:, :5] @ decaying(1, (5, LARGE[1]))
    found = top(w, 16)
    assert found.captured == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad):
    w = gaussian()
    w[5, 5] = bad
    with pytest.raises(InputError, match="NaN"):
        top(w, 4)


@pytest.mark.parametrize(("w", "rank"), [(gaussian(), 0), (np.zeros((3, 0), "f4"), 1)])
def test_what_is_no_part_of_a_matrix_is_refused(w, rank):
    with pytest.raises(UsageError, match="rank"):
        top(w, rank)


def test_torch_gives_as_good_a_part():
    torch = pytest.importorskip("torch")
    w = decaying()
    found = top(torch.from_numpy(w), 16)
    assert found.residual == pytest.approx(optimum(w, 16), rel=1e-4)
    assert isinstance(found.spectral.u, torch.Tensor)


def test_seeds_come_from_names():
    assert seed_of("a") == seed_of("a") != seed_of("b") != seed_of("a", 1)
