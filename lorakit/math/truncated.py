"""The leading singular values and vectors of a dense matrix.

Law: what is given is the best of its rank within the subspace that was searched, and how much it
captures and what it leaves of the matrix are told. The same seed gives the same result; another one
gives vectors that are as good, and where singular values lie close together quite different ones.

Sources: the nearest matrix of lower rank, Eckart and Young 1936; see `krylov` for the search.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from math import ldexp, sqrt

import numpy as np

from lorakit.errors import UsageError
from lorakit.math.factored import Spectral, decompose, signed
from lorakit.math.krylov import Enough, Scaled, explored, largest
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.orthonormal import exponent, working
from lorakit.math.rows import row_slices

BLOCK = 1 << 18  # elements in float64 at a time
GRAM = 1 << 22  # the same where each block is added to a large sum
SMALL = 128  # of the shorter side: up to there LAPACK's own decomposition is quick
_SEARCHED = 512  # the shorter side from which, and the rank as a share of it up to which, a search
_SHARE = 1 / 16  # is quicker than all of the Gram matrix
_GUIDED = 1 / 4  # the same share for a given number of passes
_CLOSE = 1e-2  # the share of the energy below which what is left is measured, not subtracted


@dataclass(frozen=True)
class Top:
    """The leading part of a matrix."""

    spectral: Spectral
    captured: float  # the share of the energy, the square of the norm, that is in it
    residual: float  # the Frobenius norm of what is not
    passes: int  # of the search; 0: it was decomposed as a whole


def top(
    w: Array,
    rank: int,
    *,
    seed: int = 0,
    exact: bool = False,
    start: Array | None = None,
    passes: int | None = None,
) -> Top:
    """The best approximation of `w`, (out, in), of at most `rank`, which is lowered to its sides.

    It is searched until what it leaves is larger than need be by about 5e-5 of itself. `start`,
    (in, k), are vectors to begin with, such as `vt.T` of a matrix much like this one; `passes` is
    how many to make, one after a good start. Narrow dtypes are widened to float32; of other
    matrices no copy is made.

    exact: from eigenvectors of the whole Gram matrix in float64, good to 1e-8 of the largest
    singular value whatever the spectrum, and the same for each seed. It is done so, too, where a
    search would not be quicker; a small matrix, or the whole of one, is decomposed by LAPACK.

    Raises:
        UsageError: the rank is below 1, or `w` is no matrix, or `start` is not of its width.
        InputError: `w` or `start` holds NaN or inf.
    """
    _check(w, rank, start)
    xp = array_namespace(w)
    w = xp.astype(w, working(w), copy=False)
    limit = 100 if w.dtype == xp.float32 else 1000  # the multiplier, too, has to be a float
    m = Scaled(w, max(-limit, min(limit, exponent(w))))
    energy = sum(_energy(x) for _, x in _wide_rows(m, BLOCK))
    size, rank = min(w.shape), min(rank, *w.shape)
    if size <= SMALL or rank == size or not energy:
        return _measured(m, _by_lapack(m, rank), energy, 0)
    share = rank / size
    long = share > _GUIDED if passes is not None else share > _SHARE or size < _SEARCHED
    if exact or long:
        return _measured(m, decompose(_by_gram(m, rank)), energy, 0)
    low, made = _searched(m, Enough(rank, energy, passes), start, seed)
    return _measured(m, decompose(low), energy, made)


def seed_of(name: str, seed: int = 0) -> int:
    """A seed for what is drawn for the tensor of this name, the same everywhere and always."""
    return int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def _check(w: Array, rank: int, start: Array | None) -> None:
    if rank < 1 or len(w.shape) != 2 or 0 in w.shape:
        raise UsageError(
            f"rank {rank} of an array of shape {tuple(w.shape)} is no part of a matrix"
        )
    if start is None:
        return
    if len(start.shape) != 2 or start.shape[0] != w.shape[1]:
        raise UsageError(
            f"vectors of shape {tuple(start.shape)} are no start for a matrix of "
            f"{w.shape[1]} columns"
        )
    exponent(start)


def _by_lapack(m: Scaled, rank: int) -> Spectral:
    """The decomposition of the whole matrix, in float64 where it is small."""
    xp = array_namespace(m.m)
    wide = xp.float64 if min(m.m.shape) <= SMALL else m.m.dtype
    x = xp.astype(m.m, wide)
    x *= 2.0**-m.exponent
    u, s, vt = xp.linalg.svd(x, full_matrices=False)
    s = xp.astype(s[:rank], xp.float64) * 2.0**m.exponent
    narrow = [xp.astype(vectors, m.m.dtype) for vectors in (u[:, :rank], vt[:rank, :])]
    return signed(narrow[0], s, narrow[1])


def _by_gram(m: Scaled, rank: int) -> LowRank:
    """The leading part from eigenvectors of the Gram matrix of the shorter side."""
    xp = array_namespace(m.m)
    tall = m if m.m.shape[0] > m.m.shape[1] else m.turned
    gram = sum((x.T @ x for _, x in _wide_rows(tall, GRAM)), start=0.0)
    if isinstance(gram, np.ndarray):
        vectors = largest(gram, rank, vectors=True)
    else:
        vectors = xp.linalg.eigh(gram)[1][:, -rank:]
    images = xp.concat([x @ vectors for _, x in _wide_rows(tall, GRAM)])
    return _low(m, xp.astype(vectors, m.m.dtype), xp.astype(images, m.m.dtype))


def _searched(m: Scaled, enough: Enough, start: Array | None, seed: int) -> tuple[LowRank, int]:
    """The leading part within a subspace of the shorter side, and how many passes it took."""
    rng = np.random.default_rng(seed)
    short = m if m.m.shape[0] <= m.m.shape[1] else m.turned

    def fresh(count: int) -> Array:
        return _drawn(rng, (short.m.shape[0], count), m.m)

    known = 0 if start is None else int(start.shape[1])
    random = _drawn(rng, (short.m.shape[1], _columns(enough.rank, known) - known), m.m)
    found = explored(short, _first(short, start, random), enough, fresh)
    return _low(m, *found.best(enough.rank)), len(found.left) - 1


def _columns(rank: int, known: int) -> int:
    """How many columns are multiplied at a time: as few as is fast, for that finds more for each.

    Products with a multiple of 16 are quickest; `known` columns are there to begin with.
    """
    least = 16 if rank <= 16 else 32 if rank <= 32 else 64
    return max(least, -(-known // 16) * 16)


def _first(short: Scaled, start: Array | None, random: Array) -> Array:
    """The columns to begin with, of the left side: from vectors of either side and random ones."""
    if start is None:
        return short.times(random)
    xp = array_namespace(random)
    start = xp.astype(start, random.dtype, copy=False)
    if start.shape[0] == random.shape[0]:
        return short.times(xp.concat([start, random], axis=1))
    return xp.concat([start, short.times(random)], axis=1)


def _drawn(rng: np.random.Generator, shape: tuple[int, int], like: Array) -> Array:
    """Gaussian numbers, drawn in float32 on the CPU and so the same on every device."""
    drawn = rng.standard_normal(shape, dtype=np.float32)
    return array_namespace(like).asarray(drawn, dtype=like.dtype, device=like.device)


def _low(m: Scaled, vectors: Array, images: Array) -> LowRank:
    """The update of orthonormal vectors of the shorter side and their images."""
    scaling = 2.0**m.exponent
    if m.m.shape[0] <= m.m.shape[1]:
        return LowRank(images.T, vectors, scaling)
    return LowRank(vectors.T, images, scaling)


def _measured(m: Scaled, found: Spectral, energy: float, passes: int) -> Top:
    """What was found, and how much of the matrix it is."""
    values = [ldexp(v, -m.exponent) for v in found.s.tolist()]
    left = max(0.0, energy - sum(v * v for v in values))
    if left < _CLOSE * energy:
        left = _left(m, found)
    captured = max(0.0, 1 - left / energy) if energy else 1.0
    return Top(found, captured, ldexp(sqrt(left), m.exponent), passes)


def _left(m: Scaled, found: Spectral) -> float:
    """The energy of what is left of the scaled matrix."""
    xp, total = array_namespace(m.m), 0.0
    right = (found.s * 2.0**-m.exponent)[:, None] * xp.astype(found.vt, xp.float64)
    for rows, x in _wide_rows(m, BLOCK):
        x -= xp.astype(found.u[rows, :], xp.float64) @ right
        total += _energy(x)
    return total


def _energy(x: Array) -> float:
    xp = array_namespace(x)
    return float(xp.sum(xp.vecdot(x, x)))


def _wide_rows(m: Scaled, block: int) -> Iterator[tuple[slice, Array]]:
    """The scaled matrix in float64, `block` elements at a time."""
    xp = array_namespace(m.m)
    for rows in row_slices(int(m.m.shape[0]), int(m.m.shape[1]), block):
        wide = xp.astype(m.m[rows, :], xp.float64)
        wide *= 2.0**-m.exponent
        yield rows, wide
