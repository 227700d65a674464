"""Updates of one weight, drawn, and their dense deltas in float64."""

import numpy as np

from lorakit.math.lowrank import LowRank, delta

OUT, IN = 30, 20
WEIGHTS = [0.7, -1.3, 1.0]


def update(seed, rank=4, shape=(OUT, IN), scaling=0.5, dtype=np.float64):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rank, shape[1])).astype(dtype)
    return LowRank(a, rng.standard_normal((shape[0], rank)).astype(dtype), scaling)


def three(**options):
    return [update(1, 4, **options), update(2, 3, **options), update(3, 6, **options)]


def dense(x):
    return delta(x, "float64")


def weighted(parts, ws):
    return [w * dense(p) for p, w in zip(parts, ws, strict=True)]


def close(one, other, rtol=1e-9):
    np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.linalg.norm(other))
