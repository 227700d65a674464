"""What several adapters do to one weight, side by side: from their factors, in float64.

Law: norms, cosines and differences are those of the dense deltas; of the same factors the cosine is
1 and the difference 0. Of a delta that depends on the
base, and so is not low-rank, they are computed some rows at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import fsum, sqrt

import numpy as np

from lorakit.math import factored
from lorakit.math.cast import Array
from lorakit.math.factored import Spectral
from lorakit.math.lowrank import LowRank, cat
from lorakit.math.rows import row_slices
from lorakit.verbs.gathering import Source

ROWS = 1 << 21  # elements of a dense delta at a time
# Of the larger square; a difference below this is had from the factors, where nothing cancels.
CLOSE = 1e-4


@dataclass(frozen=True)
class Pair:
    """Two adapters (their numbers, from 1) in one weight.

    `difference` is the norm of the difference of the deltas, `relative` that over the larger norm.
    `columns` and `rows` are the mean squared cosines of the principal angles between what they
    write to and what they read from: 1 for the same space, or one within the other.
    """

    first: int
    second: int
    inner: float
    cosine: float
    difference: float
    relative: float
    columns: float
    rows: float


@dataclass(frozen=True)
class Row:
    """A weight: of each adapter the rank (None where it lacks the weight), the Frobenius norm and
    the effective rank, and the pairs of adapters that have it. `share` is how much of the energy of
    a delta that is not low-rank the ranks and angles are of.
    """

    name: str
    ranks: tuple[int | None, ...]
    norms: tuple[float, ...]
    effective: tuple[float, ...]
    pairs: tuple[Pair, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Delta:
    """The change of a weight: of each expert; `dense` where it is not low-rank."""

    lows: Sequence[LowRank]
    dense: Array | None = None
    share: float = 1.0

    @cached_property
    def spaces(self) -> list[Spectral]:
        """The directions of each expert, with their singular values.

        Raises:
            InputError: a factor holds NaN or Inf.
        """
        return [factored.directions(low) for low in self.lows]

    def rows(self, rows: slice) -> Array:
        """Some rows of it, in float64; of weights without experts."""
        if self.dense is not None:
            return self.dense[rows].astype(np.float64)
        (low,) = self.lows
        found: Array = low.scaling * low.b[rows] @ low.a
        return found


def row_of(key: str, sources: Mapping[int, Source], count: int) -> Row:
    """The row of a weight; `sources` are the adapters that have it, by their numbers from 1.

    Raises:
        InputError: a factor holds NaN or Inf.
    """
    read = {number: _read(source) for number, source in sources.items()}
    norms = {n: _norm(sources[n], d) for n, d in read.items()}
    pairs = [_pair(one, other, read, norms) for one, other in combinations(sorted(read), 2)]
    numbers = range(1, count + 1)
    return Row(
        key,
        tuple(sources[n].one.rank if n in sources else None for n in numbers),
        tuple(norms.get(n, 0.0) for n in numbers),
        tuple(_effective(read[n]) if n in read else 0.0 for n in numbers),
        tuple(pairs),
        min(d.share for d in read.values()),
    )


def _read(source: Source) -> Delta:
    """What an adapter does there."""
    if source.against is None:
        return Delta(source.one.lows("float64"))
    dense = source.against.delta(source.one)
    low, share = source.nearest(dense)
    return Delta([low], dense, share)


def _norm(source: Source, x: Delta) -> float:
    with source.one.naming():
        return sqrt(_energy(x) if x.dense is None else _by_rows(x, x)[0])


def _energy(x: Delta) -> float:
    """The square of the norm."""
    return fsum(float(np.vdot(space.s, space.s)) for space in x.spaces)


def _pair(one: int, other: int, read: Mapping[int, Delta], norms: Mapping[int, float]) -> Pair:
    x, y = read[one], read[other]
    largest = max(norms[one], norms[other])
    product, difference = _related(x, y, largest)
    sizes = norms[one] * norms[other]
    cosine = min(1.0, max(-1.0, product / sizes)) if sizes else 0.0
    columns, rows = _overlap(x, y)
    relative = difference / largest if largest else 0.0
    return Pair(one, other, product, cosine, difference, relative, columns, rows)


def _related(x: Delta, y: Delta, largest: float) -> tuple[float, float]:
    """The inner product, and the norm of the difference."""
    if x.dense is not None or y.dense is not None:
        product, square = _by_rows(x, y)
        return product, sqrt(square)
    lows = list(zip(x.lows, y.lows, strict=True))
    if all(_same(a, b) for a, b in lows):
        return largest**2, 0.0
    product = fsum(factored.inner(a, b) for a, b in lows)
    square = _energy(x) + _energy(y) - 2 * product
    if square > CLOSE * largest**2:
        return product, sqrt(square)
    return product, sqrt(fsum(factored.norm(cat(p, [1.0, -1.0])) ** 2 for p in lows))


def _same(x: LowRank, y: LowRank) -> bool:
    """Whether the factors are the very same numbers."""
    return x.scaling == y.scaling and np.array_equal(x.a, y.a) and np.array_equal(x.b, y.b)


def _by_rows(x: Delta, y: Delta) -> tuple[float, float]:
    """The inner product, and the square of the norm of the difference, some rows at a time."""
    height, width = x.lows[0].shape
    products, squares = [], []
    for rows in row_slices(height, width, ROWS):
        a, b = (d.rows(rows) for d in (x, y))
        products.append(float(np.vdot(a, b)))
        squares.append(float(np.vdot(a - b, a - b)))
    if x is y:
        return fsum(products), 0.0
    return fsum(products), fsum(squares)


def _effective(x: Delta) -> float:
    """The effective rank; of experts, their mean."""
    found = [factored.effective_rank(space.s) for space in x.spaces]
    return fsum(found) / len(found)


def _overlap(x: Delta, y: Delta) -> tuple[float, float]:
    """How much of the smaller space is in the other: of columns and of rows; of experts, the mean.

    Two spaces of which one is empty share nothing.
    """
    columns: list[float] = []
    rows: list[float] = []
    for a, b in zip(x.spaces, y.spaces, strict=True):
        for found, cosines in zip((columns, rows), factored.overlap(a, b), strict=True):
            found.append(float(np.mean(np.square(cosines))) if len(cosines) else 0.0)
    return fsum(columns) / len(columns), fsum(rows) / len(rows)
