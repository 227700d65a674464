"""Singular values, norms and angles of low-rank updates, found from their factors.

Law: everything here is what the dense `delta` gives, and no dense matrix is formed. Both factors
are decomposed into an orthonormal basis and a small matrix, in float64 and scaled by powers of two
first, so neither tiny nor huge factors lose digits. Signs are fixed, so the same update gives the
same factors.

Sources: the nearest matrix of lower rank, Eckart and Young 1936; principal angles, Björck and Golub
1973 ("Numerical methods for computing angles between linear subspaces").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, isfinite, log, prod, sqrt
from typing import TypeVar

from lorakit.errors import InputError, UsageError
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Array, array_namespace, is_finite
from lorakit.math.orthonormal import basis, exponent, working

# Norms from Gram matrices lose digits where terms cancel; below this share of them QR is taken.
_CANCELLED = 1e-4
# In units of rounding of the largest singular value: what is less is rounding, and no direction.
_SIGNIFICANT = 32


Shaped = TypeVar("Shaped", LowRank, "Spectral")


@dataclass(frozen=True)
class Spectral:
    """The update `(u * s) @ vt`, its singular value decomposition."""

    u: Array  # (out, k), orthonormal columns, the largest element of each positive
    s: Array  # (k,) float64, falling
    vt: Array  # (k, in), orthonormal rows

    @property
    def rank(self) -> int:
        """How many singular values there are, zeros included."""
        return int(self.s.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the dense update, (out, in)."""
        return int(self.u.shape[0]), int(self.vt.shape[1])


def decompose(x: LowRank) -> Spectral:
    """The singular value decomposition, of `min(rank, out, in)` values, the scaling in them.

    `u` and `vt` are float64 if a factor is, else float32.

    Raises:
        InputError: a factor or the scaling is NaN or inf.
    """
    return leading(x, len)[0]


def leading(x: LowRank, rank: Callable[[Array], int]) -> tuple[Spectral, Array]:
    """The part of the decomposition with the first singular values, as many as `rank` says of all;
    and all of them. It costs less than all of the decomposition.

    Raises:
        InputError: as for `decompose`.
    """
    xp, dtype = array_namespace(x.a, x.b), working(x.a, x.b)
    wide, values = _decomposed(x, rank)
    return Spectral(xp.astype(wide.u, dtype), wide.s, xp.astype(wide.vt, dtype)), values


def signed(u: Array, s: Array, vt: Array) -> Spectral:
    """The decomposition with signs fixed: the largest element of each column of `u` is positive.

    Of a column whose largest and smallest element are of one size, the first is meant.
    """
    if not s.shape[0]:
        return Spectral(u, s, vt)
    xp = array_namespace(u)
    signs = xp.where(xp.max(u, axis=0) >= -xp.min(u, axis=0), 1.0, -1.0)
    signs = xp.astype(signs, u.dtype)
    return Spectral(u * signs, s, vt * signs[:, None])


def recompose(x: Spectral, rank: int | None = None) -> LowRank:
    """The nearest update of at most `rank` (None: of any), its factors alike in size, scaling 1.

    Each factor has the roots of the singular values, so that both fit a narrow dtype if the update
    does, and the dtype of `u`.

    Raises:
        UsageError: a rank below 1.
        InputError: the factors are too large for the dtype.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"an update of rank {rank} is none; the rank must be 1 or more")
    xp = array_namespace(x.u, x.s, x.vt)
    root, dtype = xp.sqrt(x.s[:rank]), x.u.dtype
    b = xp.astype(xp.astype(x.u[:, :rank], xp.float64) * root, dtype)
    a = xp.astype(root[:, None] * xp.astype(x.vt[:rank, :], xp.float64), dtype)
    if not (is_finite(a) and is_finite(b)):
        raise InputError(f"the update is too large for factors of {dtype}")
    return LowRank(a, b)


def spectrum(x: LowRank) -> Array:
    """The singular values, (min(rank, out, in),) float64, falling; cheaper than `decompose`.

    Raises:
        InputError: a factor or the scaling is NaN or inf.
    """
    scaled = _scaled(x)
    xp = array_namespace(scaled.a)
    return xp.linalg.svdvals(_core(scaled)) * abs(scaled.scaling)


def norm(x: LowRank) -> float:
    """The Frobenius norm.

    Raises:
        InputError: a factor or the scaling is NaN or inf.
    """
    scaled = _scaled(x)
    return abs(scaled.scaling) * _norm(scaled)


def inner(x: LowRank, y: LowRank) -> float:
    """The sum of the products of the elements of both updates.

    Raises:
        InputError: a factor or a scaling is NaN or inf, or the shapes differ.
    """
    one, other = _alike(x, y)
    return one.scaling * other.scaling * _product(one, other)


def cosines(updates: Sequence[LowRank]) -> list[list[float]]:
    """The cosines of the angles between all of these updates as vectors, a row for each: 1 with
    itself, 0 with and of one that is zero.

    Raises:
        InputError: as for `inner`.
    """
    scaled = [_scaled(_same_shape(x, updates[0])[0]) for x in updates]
    norms = [_norm(x) * abs(_sign(x.scaling)) for x in scaled]
    found = [
        [float(i == j and norm > 0) for j in range(len(norms))] for i, norm in enumerate(norms)
    ]
    for i, j in combinations(range(len(norms)), 2):
        if sizes := norms[i] * norms[j]:
            signs = _sign(scaled[i].scaling) * _sign(scaled[j].scaling)
            product = min(1.0, max(-1.0, _product(scaled[i], scaled[j]) / sizes))
            found[i][j] = found[j][i] = signs * product
    return found


def directions(x: LowRank) -> Spectral:
    """The decomposition in float64, without singular values that are rounding of the others.

    Raises:
        InputError: as for `decompose`.
    """
    xp = array_namespace(x.a, x.b)
    rounding = _SIGNIFICANT * float(xp.finfo(working(x.a, x.b)).eps)

    def above(s: Array) -> int:
        values = s.tolist()
        return sum(v > rounding * max(values, default=0.0) for v in values)

    return _decomposed(x, above)[0]


def overlap(one: Spectral, other: Spectral) -> tuple[Array, Array]:
    """The cosines of the principal angles between the column spaces, and between the row spaces, of
    what `directions` gives.

    Each is falling, float64, of as many angles as the smaller space has dimensions: 1 for a common
    direction, 0 for one that is orthogonal to all of the other space. An update that is zero has no
    directions, and gives no angles.

    Raises:
        InputError: the shapes differ.
    """
    _same_shape(one, other)
    return _cosines(one.u.T @ other.u), _cosines(one.vt @ other.vt.T)


def effective_rank(s: Array) -> float:
    """Over how many singular values the energy is spread: `exp(-sum(p log p))`, `p = s² / sum(s²)`.

    It is r for r equal values, 1 for a single one, and 0 for zeros only. `s` is of any order.

    Source: Roy and Vetterli 2007 ("The effective rank"), with energies in place of the singular
    values themselves.
    """
    energies = _energies(s)
    total = sum(energies)
    shares = [e / total for e in energies if e > 0]
    return exp(-sum(p * log(p) for p in shares)) if shares else 0.0


def retained(s: Array, rank: int) -> float:
    """The share of the energy, `sum(s²)`, in the first `rank` of falling values; 1 of zeros."""
    energies = _energies(s)
    total = sum(energies)
    return min(1.0, sum(energies[:rank]) / total) if total else 1.0


def _energies(s: Array) -> list[float]:
    """The squares of values, as multiples of the largest."""
    values = [abs(v) for v in s.tolist()]
    largest = max(values, default=0.0)
    return [(v / largest) ** 2 if largest else 0.0 for v in values]


def _scaled(x: LowRank) -> LowRank:
    """The update with factors in float64 whose largest element is near 1; the rest in the scaling.

    Raises:
        InputError: a factor or the scaling is NaN or inf, or the update is beyond float64.
    """
    xp = array_namespace(x.a, x.b)
    down, up = exponent(x.a), exponent(x.b)
    scaling = x.scaling * 2.0 ** min(down + up, 1000)
    if not isfinite(scaling) or down + up > 1000:
        raise InputError("the update or its scaling is NaN, inf or too large")
    a, b = xp.astype(x.a, xp.float64), xp.astype(x.b, xp.float64)
    a *= 2.0**-down  # in place: fresh memory costs more than the product
    b *= 2.0**-up
    return LowRank(a, b, scaling)


def _alike(x: LowRank, y: LowRank) -> tuple[LowRank, LowRank]:
    x, y = _same_shape(x, y)
    return _scaled(x), _scaled(y)


def _same_shape(x: Shaped, y: Shaped) -> tuple[Shaped, Shaped]:
    if x.shape != y.shape:
        raise InputError(f"updates of shapes {x.shape} and {y.shape} cannot be compared")
    return x, y


def _product(x: LowRank, y: LowRank) -> float:
    """The inner product without the scalings."""
    xp = array_namespace(x.a, y.a)
    return float(xp.sum((x.b.T @ y.b) * (x.a @ y.a.T)))


def _norm(x: LowRank) -> float:
    """The norm without the scaling; by way of QR where the terms cancel."""
    xp = array_namespace(x.a)
    columns, rows = x.b.T @ x.b, x.a @ x.a.T
    square = float(xp.sum(columns * rows))
    terms = float(xp.sum(xp.sqrt(xp.linalg.diagonal(columns) * xp.linalg.diagonal(rows))))
    if square > _CANCELLED * terms * terms:
        return sqrt(square)
    return float(xp.linalg.vector_norm(_core(x)))


def _core(x: LowRank) -> Array:
    """The small matrix between two orthonormal bases, without the scaling."""
    return basis(x.b).r @ basis(x.a.T).r.T


def _decomposed(x: LowRank, rank: Callable[[Array], int]) -> tuple[Spectral, Array]:
    """The leading part of the decomposition in float64, and all singular values."""
    scaled = _scaled(x)
    xp = array_namespace(scaled.a)
    left, right = basis(scaled.b), basis(scaled.a.T)
    u, s, vt = xp.linalg.svd(left.r @ right.r.T, full_matrices=False)
    values, sign = s * abs(scaled.scaling), _sign(scaled.scaling)
    kept = rank(values)
    up, down = left.times(u[:, :kept]), right.times(sign * vt[:kept, :].T).T
    return signed(up, values[:kept], down), values


def _cosines(product: Array) -> Array:
    xp = array_namespace(product)
    if not prod(product.shape):
        return xp.zeros((0,), dtype=product.dtype, device=product.device)
    found = xp.linalg.svdvals(product)
    return xp.where(found < 1, found, xp.ones_like(found))


def _sign(value: float) -> float:
    return float((value > 0) - (value < 0))
