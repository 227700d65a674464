"""What kohya's tools for adapters get wrong, beside what is made of the same adapters here.

Source: kohya-ss/sd-scripts, networks/{merge_lora,svd_merge_lora,resize_lora}.py, as their results
come out.
"""

import numpy as np
import pytest

from lorakit.math.combining.methods import combined
from lorakit.math.combining.setting import Setting
from lorakit.math.factored import decompose, recompose
from lorakit.math.lowrank import LowRank, delta
from lorakit.math.ranks import Rule, chosen

RANK, OUT, IN = 4, 24, 20


def drawn(seed, scaling=1.0):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((RANK, IN)), rng.standard_normal((OUT, RANK))
    return LowRank(a, b, scaling)


def ours(parts, weights, method="linear", **setting):
    return delta(combined(method, parts, weights, Setting(**setting)).low, "float64")


def error(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def summed(parts, ratios):
    """merge_lora.py: the factors are summed apart from each other, each times its ratio."""
    down = sum(r * p.a for p, r in zip(parts, ratios, strict=True))
    up = sum(abs(r) * p.b for p, r in zip(parts, ratios, strict=True))
    return up @ down


def concatenated(parts, ratios):
    """merge_lora.py --concat: both factors times their ratio, alpha left as that of one file."""
    down = np.concatenate([r * p.a for p, r in zip(parts, ratios, strict=True)])
    up = np.concatenate([abs(r) * p.b for p, r in zip(parts, ratios, strict=True)], axis=1)
    return up @ down * RANK / down.shape[0]


def test_half_of_an_adapter_is_half_of_it_and_not_a_quarter():
    one = drawn(0)
    np.testing.assert_allclose(summed([one], [0.5]), 0.25 * delta(one, "float64"))
    np.testing.assert_allclose(ours([one], [0.5]), 0.5 * delta(one, "float64"), atol=1e-10)


def test_a_sum_has_no_terms_between_adapters():
    parts, weights = [drawn(0), drawn(1)], [0.6, 0.4]
    exact = sum(w * delta(p, "float64") for p, w in zip(parts, weights, strict=True))
    assert error(summed(parts, weights), exact) > 0.5
    assert error(ours(parts, weights), exact) < 1e-10


def test_a_concatenation_is_the_sum_and_not_half_of_it():
    parts = [drawn(0), drawn(1)]
    exact = delta(parts[0], "float64") + delta(parts[1], "float64")
    np.testing.assert_allclose(concatenated(parts, [1, 1]), 0.5 * exact)
    np.testing.assert_allclose(ours(parts, [1, 1], "cat"), exact, atol=1e-10)


def test_a_rank_above_that_of_the_files_may_differ_between_them():
    one, other = drawn(0), LowRank(drawn(1).a[:2], drawn(1).b[:, :2])
    exact = delta(one, "float64") + delta(other, "float64")
    assert error(ours([one, other], [1, 1]), exact) < 1e-10


def test_a_truncated_sum_is_the_closest_and_nothing_is_clamped():
    parts = [drawn(0), drawn(1)]
    exact = sum(delta(p, "float64") for p in parts)
    s = np.linalg.svd(exact, compute_uv=False)
    optimum = np.linalg.norm(s[RANK:]) / np.linalg.norm(s)
    assert error(ours(parts, [1, 1], rank=RANK), exact) == pytest.approx(optimum, rel=1e-6)
    u, s, vt = np.linalg.svd(exact, full_matrices=False)
    up, down = u[:, :RANK] * s[:RANK], vt[:RANK]
    limit = np.quantile(np.concatenate([up.reshape(-1), down.reshape(-1)]), 0.99)
    clamped = np.clip(up, -limit, limit) @ np.clip(down, -limit, limit)
    assert error(clamped, exact) > 1.01 * optimum


@pytest.mark.parametrize(
    "rule", [Rule("sv_ratio", 2), Rule("sv_cumulative", 0.7), Rule("sv_fro", 0.8)]
)
def test_a_resize_keeps_no_more_than_its_rule_asks_for(rule):
    s = decompose(drawn(0)).s
    assert chosen(s, rule, kohya=True) == chosen(s, rule) + 1


def test_small_updates_keep_their_digits_in_half_precision():
    """All singular values in one factor leave half precision with few digits; a share each does
    not.
    """
    found = decompose(LowRank(1e-3 * drawn(0).a, 1e-3 * drawn(0).b))
    exact = (found.u * found.s) @ found.vt

    def halved(up, down):
        return up.astype("f2").astype("f8") @ down.astype("f2").astype("f8")

    low = recompose(found)
    one_sided = error(halved(found.u * found.s, found.vt), exact)
    assert error(halved(low.b, low.a), exact) < 0.2 * one_sided
