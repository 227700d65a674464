"""TSV-Merge: the singular vectors of all updates are made orthogonal to each other, then summed.

Law: with `D_i = U_i S_i V_i^T`, the result is `U S V^T` where S has all singular values and U and V
are the matrices with orthonormal columns that are nearest to `[U_1 ... U_n]` and `[V_1 ... V_n]`.
It is found from the factors, and is symmetric in the updates and in the two sides.

Source: Gargiulo et al. 2024 (Task Singular Vectors, arXiv 2412.00081), TSV-M; the nearest
orthogonal matrix, Schönemann 1966.
"""

from collections.abc import Sequence

from lorakit.math.combining.factors import concatenated, cut
from lorakit.math.combining.setting import Combined, Setting
from lorakit.math.factored import Spectral, decompose
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Array, array_namespace

# Singular values below this share of the largest are rounding, and their vectors are arbitrary.
_NOTHING = 1e-7


def tsv(parts: Sequence[LowRank], weights: Sequence[float], setting: Setting) -> Combined:
    """The sum of decorrelated updates, exact unless a rank is asked for.

    Of n updates each keeps the n-th part of the full rank of the matrix, as in the paper; only
    very large ranks are cut by that. Vectors that several updates share are shared out.
    """
    each = [decompose(concatenated([p], [w])) for p, w in zip(parts, weights, strict=True)]
    each = [e for e in each if float(e.s[0]) > 0]
    if not each:
        return cut(concatenated(parts, weights), setting.rank)
    share = max(1, min(parts[0].shape) // len(each))
    each = [_leading(e, share) for e in each]
    xp = array_namespace(each[0].s)
    root = xp.sqrt(xp.astype(xp.concat([e.s for e in each]), xp.float64))
    left = _orthogonal(xp.concat([e.u for e in each], axis=1)) * root
    right = _orthogonal(xp.concat([e.vt for e in each]).T) * root
    return cut(LowRank(right.T, left), setting.rank)


def _leading(x: Spectral, most: int) -> Spectral:
    """At most the first `most` singular values, and none that is as good as zero."""
    xp = array_namespace(x.s)
    on = min(most, int(xp.sum(xp.astype(x.s > _NOTHING * x.s[0], xp.int64))))
    return Spectral(x.u[:, :on], x.s[:on], x.vt[:on, :])


def _orthogonal(x: Array) -> Array:
    """The nearest matrix with orthonormal columns, or as many of them as `x` has rank, in float64.

    `x (x^T x)^(-1/2)`, on the directions that are there.
    """
    xp = array_namespace(x)
    wide = xp.astype(x, xp.float64)
    values, vectors = xp.linalg.eigh(wide.T @ wide)
    there = values > 1e-10 * values[-1]
    inverse = xp.where(there, xp.abs(values), xp.ones_like(values)) ** -0.5
    inverse = xp.where(there, inverse, xp.zeros_like(values))
    return wide @ ((vectors * inverse) @ vectors.T)
