"""Sums that look like ties of float16 are rounded by what float32 lost of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorakit.math.cast import narrow
from lorakit.math.ties import settle_ties
from tests.oracles.rounding import rounded


def settled(w, change) -> np.ndarray:
    total = w + change
    settle_ties(total, w, change, np.empty_like(total))
    out = np.empty(total.shape, np.float16)
    narrow(total, out)
    return out


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-2, 1e-3, 1e-4, 1e-6]))
def test_every_normal_sum_is_rounded_as_if_it_were_exact(seed, size) -> None:
    r = np.random.default_rng(seed)
    w = (r.standard_normal((64, 256)) * 0.02).astype(np.float16).astype(np.float32)
    change = (r.standard_normal(w.shape) * size).astype(np.float32)
    exact = w.astype(np.float64) + change
    normal = np.abs(exact) >= 2.0**-14
    assert (settled(w, change) == rounded(exact, "F16"))[normal].all()


def test_a_hidden_side_decides_and_a_true_tie_goes_to_even() -> None:
    base, half = np.float32(1.0), np.float32(2.0**-11)  # half of float16's spacing at 1
    hidden = np.float32(2.0**-30)  # float32 loses it beside 1
    w = np.array([base, base, base, -base, 1 + 2 * half], np.float32)
    change = np.array([half, half + hidden, half - hidden, -half - hidden, half], np.float32)
    spacing = 2 * half
    expected = [1.0, 1 + spacing, 1.0, -1 - spacing, 1 + 2 * spacing]
    assert settled(w, change).tolist() == expected


def test_infinities_and_nans_stay_what_they_are() -> None:
    w = np.array([np.inf, -np.inf, np.nan, 65504], np.float32)
    got = settled(w, np.ones(4, np.float32))
    assert np.array_equal(got, w.astype(np.float16), equal_nan=True)
