"""Interpolation of updates along the sphere, which keeps the norm where a mean would shrink it.

Law: the result is a linear combination of the updates. For two of weights `w_1` and `w_2` it is
`(w_1 + w_2) * (sin((1 - t) * x) * D_1 + sin(t * x) * D_2) / sin(x)`, with `t = w_2 / (w_1 + w_2)`
and the angle x between the updates; weights below 0 turn their update round. More than two meet in
the weighted spherical mean of their directions, whatever their order. The coefficients follow from
inner products of factors, so no dense matrix is formed.

Sources: Shoemake 1985, "Animating rotation with quaternion curves"; for more than two
Buss and Fillmore 2001, "Spherical averages and applications to spherical splines", algorithm A1.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from lorakit.math.cast import Array
from lorakit.math.combining.factors import concatenated, cut
from lorakit.math.combining.setting import Combined, Setting
from lorakit.math.factored import cosines
from lorakit.math.lowrank import LowRank

_ROUNDS = 100  # it takes one for two updates, and about five for more
_CLOSE = 1e-14  # radians
_OPPOSITE = -0.9995  # the cosine of directions between which the way round is as good as undefined
_NOWHERE = 1e-6  # the length of a mean of directions that cancel


def slerp(parts: Sequence[LowRank], weights: Sequence[float], setting: Setting) -> Combined:
    """The spherical interpolation, exact unless a rank is asked for.

    An update that is zero has no direction and takes no part. Where two directions are opposite, or
    all of them cancel, it is the weighted sum.
    """
    return cut(concatenated(parts, coefficients(parts, weights)), setting.rank)


def coefficients(parts: Sequence[LowRank], weights: Sequence[float]) -> list[float]:
    """What each update is multiplied by, in place of its weight."""
    angles = np.array(cosines(parts))
    signed = np.asarray(weights, np.float64)
    on = np.flatnonzero((np.diag(angles) > 0) & (signed != 0))
    if on.size < 2:
        return list(map(float, weights))
    sizes, signs = np.abs(signed[on]), np.sign(signed[on])
    mean = _mean(signs[:, None] * angles[np.ix_(on, on)] * signs, sizes / sizes.sum())
    found = signed.copy()
    found[on] = signs * sizes.sum() * mean
    return [float(f) for f in found]


def _mean(cosines: Array, shares: Array) -> Array:
    """The spherical mean of unit vectors with these `cosines`, as coefficients of them.

    Each round moves the estimate by the mean of the arcs from it to the vectors.
    """
    length = sqrt(max(0.0, float(shares @ cosines @ shares)))
    if length < _NOWHERE or cosines.min() < _OPPOSITE:
        return shares
    mean = shares / length
    for _ in range(_ROUNDS):
        along = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(along)
        step = shares * _over_sine(angles)
        arc = step - (step @ along) * mean
        move = sqrt(max(0.0, float(arc @ cosines @ arc)))
        if move < _CLOSE:
            break
        mean = np.cos(move) * mean + np.sin(move) / move * arc
        mean = mean / np.sqrt(mean @ cosines @ mean)
    return np.asarray(mean)


def _over_sine(angles: Array) -> Array:
    """`x / sin(x)`, 1 at 0."""
    sines = np.sin(angles)
    return np.divide(angles, sines, out=np.ones_like(angles), where=sines > 1e-7)
