"""The leading singular subspace of a dense matrix, from products with a few columns at a time.

Law: the basis is orthonormal and every pass adds to the energy that it captures. Each new block is
made orthogonal to all others, twice; the rounding of float32 then costs no accuracy beyond its own.

The matrix is only multiplied, from either side, and is never copied, scaled or transposed in
memory: powers of two go into the columns that it meets.

Sources: block Lanczos with full reorthogonalisation and Rayleigh-Ritz on the whole basis, Golub and
Underwood 1977 ("The block Lanczos method for computing eigenvalues"); its accuracy for low rank,
Musco and Musco 2015 (arXiv 1504.05477).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorakit.math.namespace import Array, array_namespace, on_cpu

Fresh = Callable[[int], Array]  # so many random columns for the left side

MOST = 60  # passes
# A pass is the last one if what is still to be gained, told from the last two gains, is below this
# share of the energy that is left over.
_REST = 3e-4
_SELDOM = 128  # from twice this rank on, asking costs much and is done after every second pass
_FLOOR = 1e-12  # a share of all that is captured: less is gained from rounding alone
_ROUNDING = 1e-7  # of float32, a ratio of lengths


@dataclass(frozen=True)
class Scaled:
    """The matrix `m * 2**-exponent`, (left, right)."""

    m: Array
    exponent: int

    @property
    def turned(self) -> "Scaled":
        """The transposed matrix."""
        return Scaled(self.m.T, self.exponent)

    def times(self, x: Array) -> Array:
        """The product with columns, (right, n)."""
        return self.m @ (x * 2.0**-self.exponent)

    def back(self, x: Array) -> Array:
        """The product of the transposed matrix with columns, (left, n)."""
        return self.m.T @ (x * 2.0**-self.exponent)


@dataclass
class Subspace:
    """Orthonormal columns, and what the transposed matrix makes of them, block by block."""

    left: list[Array] = field(default_factory=list)  # (left, width) each
    right: list[Array] = field(default_factory=list)  # (right, width) each, their images
    gram: Array = field(default_factory=lambda: np.zeros((0, 0)))  # of all images, float64

    @property
    def size(self) -> int:
        """The number of columns."""
        return int(self.gram.shape[0])

    def add(self, left: Array, right: Array) -> None:
        """One more block and its image."""
        self.left.append(left)
        self.right.append(right)
        wide = _wide(right)
        new = np.concatenate([on_cpu(_wide(r).T @ wide) for r in self.right])
        before, size = self.size, len(new)
        gram = np.empty((size, size))
        gram[:before, :before] = self.gram
        gram[:, before:] = new
        gram[before:, :before] = new[:before].T
        self.gram = gram

    def captured(self, rank: int) -> float:
        """The energy that the best `rank` directions within the subspace capture."""
        return float(np.maximum(largest(self.gram, rank, vectors=False), 0).sum())

    def best(self, rank: int) -> tuple[Array, Array]:
        """Those directions, (left, rank), and their images, (right, rank), as sums of blocks."""
        turn = largest(self.gram, rank, vectors=True)
        return _combined(self.left, turn), _combined(self.right, turn)

    def beyond(self, block: Array, fresh: Fresh) -> Array:
        """As many orthonormal columns as a block has that span, with the basis, what it spans.

        Directions of the block that the basis has already give way to random ones.
        """
        width = block.shape[1]
        block = self._apart(block)
        if missing := width - block.shape[1]:
            xp = array_namespace(block)
            block = self._apart(xp.concat([block, fresh(missing)], axis=1))
        return self._apart(block)

    def _apart(self, block: Array) -> Array:
        for left in self.left:
            block = block - left @ (left.T @ block)
        return _independent(block)


@dataclass
class Enough:
    """Says when a subspace is large enough for the best `rank` directions.

    That is after so many `passes`, or if these are None when nearly nothing is to be gained.
    `energy` is the square of the norm of the matrix.
    """

    rank: int
    energy: float
    passes: int | None
    captured: list[float] = field(default_factory=list)  # whenever it was asked

    def __call__(self, found: Subspace) -> bool:
        """Whether to stop after this pass."""
        made = len(found.left) - 1
        if found.size < self.rank:
            return False
        if self.passes is not None:
            return made >= self.passes
        if made % max(1, self.rank // _SELDOM):
            return False
        self.captured.append(found.captured(self.rank))
        return made >= MOST or self._converged()

    def _converged(self) -> bool:
        if len(self.captured) < 3:
            return False
        first, second, third = self.captured[-3:]
        last, left = third - second, max(self.energy - third, 0.0)
        shrinks = min(max(last / max(second - first, last), 0.0), 0.9) if last > 0 else 0.0
        rest = last * shrinks / (1 - shrinks)
        return rest <= max(_REST * left, _FLOOR * third)


def explored(m: Scaled, first: Array, enough: Enough, fresh: Fresh) -> Subspace:
    """A subspace that is large enough for the leading directions of the left side.

    `first`, (left, width), begins it. Every pass multiplies from both sides and adds `width`
    columns. `fresh` gives random ones.
    """
    found = Subspace()
    block = found.beyond(first, fresh)
    while True:
        found.add(block, m.back(block))
        if enough(found) or found.size + block.shape[1] > m.m.shape[0]:
            return found
        block = found.beyond(m.times(found.right[-1]), fresh)


def largest(gram: Array, count: int, *, vectors: bool) -> Array:
    """The largest eigenvalues of a symmetric NumPy matrix, rising, or their vectors, as columns."""
    from scipy.linalg import eigh

    last = gram.shape[0] - 1
    found = eigh(
        gram,
        eigvals_only=not vectors,
        subset_by_index=[max(0, last + 1 - count), last],
        driver="evr",
        check_finite=False,
    )
    return found[1] if vectors else found


def _independent(block: Array) -> Array:
    """Orthonormal columns that span those of a block, but for directions that are rounding."""
    xp = array_namespace(block)
    wide = _wide(block)
    values, vectors = xp.linalg.eigh(wide.T @ wide)
    rounding = xp.astype(values <= _ROUNDING**2 * values[-1], xp.int64)
    first = int(xp.sum(rounding))
    turn = vectors[:, first:] / xp.sqrt(values[first:])
    return xp.astype(wide @ turn, block.dtype)


def _combined(blocks: Sequence[Array], turn: Array) -> Array:
    """The product of blocks side by side with a NumPy matrix."""
    xp = array_namespace(blocks[0])
    total, start = 0.0, 0
    for block in blocks:
        stop = start + block.shape[1]
        part = xp.asarray(turn[start:stop], dtype=block.dtype, device=block.device)
        total, start = total + block @ part, stop
    return total


def _wide(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.astype(x, xp.float64, copy=False)
