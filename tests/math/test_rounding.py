"""Sums land in float16 as if they had been exact, and what the result holds is told."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorakit.math.cast import CHUNK, Scratch, narrow, storage
from lorakit.math.rounding import round_sum
from tests.oracles.rounding import rounded


@np.errstate(invalid="ignore")
def landed(w, change, code: str = "F16") -> np.ndarray:
    out, held = np.empty(w.shape, storage(code)), np.empty(w.shape, (w + change).dtype)
    round_sum(w, change, out, held, Scratch())
    assert np.array_equal(held, out.astype(held.dtype), equal_nan=True)
    assert np.array_equal(np.signbit(held), np.signbit(out)) or np.isnan(out).any()
    return out


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 3e-5, 300.0]), st.sampled_from([1, 1e-3]))
def test_every_sum_is_rounded_as_if_it_were_exact(seed, size, part) -> None:
    r = np.random.default_rng(seed)
    w = (r.standard_normal((64, 256)) * size).astype(np.float16).astype(np.float32)
    change = (r.standard_normal(w.shape) * size * part).astype(np.float32)
    w[r.random(w.shape) < 0.1] = 0
    change[r.random(w.shape) < 0.1] = 0
    exact = w.astype(np.float64) + change
    assert (landed(w, change) == rounded(exact, "F16")).all()


def test_a_hidden_side_decides_and_a_true_tie_goes_to_even() -> None:
    hidden = np.float32(2.0**-30)  # float32 loses it beside 1
    for base in np.float32(1.0), np.float32(2.0**-14):  # also where ties are among subnormals
        half = base * np.float32(2.0**-11)  # of the spacing of float16 there
        w = np.array([base, base, base, -base, base + 2 * half], np.float32)
        side = hidden * base
        change = np.array([half, half + side, half - side, -half - side, half], np.float32)
        spacing = 2 * half
        expected = [base, base + spacing, base, -base - spacing, base + 2 * spacing]
        assert landed(w, change).tolist() == expected


@np.errstate(over="ignore")
def test_overflow_infinities_and_nans_are_those_of_one_rounding() -> None:
    every_bit = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    w = np.array([np.inf, -np.inf, np.nan, *every_bit, 65504, -65504, 1, -0.0], np.float32)
    change = np.zeros_like(w)
    change[5:8] = 16, -15.99, 2.0**-30
    got = landed(w, change)
    assert np.array_equal(got, (w + change).astype(np.float16), equal_nan=True)
    assert np.isinf(got[5])
    assert got[6] == -65504


def test_every_number_stays_when_nothing_changes() -> None:
    stored = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    finite = stored[np.isfinite(stored)]
    for part in (stored, finite):  # with what needs care, and without
        got = landed(part.astype(np.float32), np.full(part.shape, -0.0, np.float32))
        assert np.array_equal(got, part, equal_nan=True)
    assert np.array_equal(got.view(np.uint16), finite.view(np.uint16))


def test_more_than_a_chunk_none_at_all_and_other_dtypes_land_alike() -> None:
    r = np.random.default_rng(0)
    w = r.standard_normal((3, CHUNK // 2 + 7)).astype(np.float32)
    change = (r.standard_normal(w.shape) * 1e-3).astype(np.float32)
    exact = w.astype(np.float64) + change
    assert (landed(w, change) == rounded(exact, "F16")).all()
    assert (landed(w, change.astype(np.float64)) == rounded(exact, "F16")).all()
    assert landed(w[:, :0], change[:, :0]).shape == (3, 0)
    for code in ("F32", "BF16", "F8_E4M3"):
        right = np.empty(w.shape, storage(code))
        narrow(w + change, right)
        assert (landed(w, change, code) == right).all()
