"""What an initialisation took out of a base weight, recomputed from that weight.

Law: each part is a projection of the weight, `u @ u.T @ w` or `w @ v @ v.T` with orthonormal
columns, in float64. A rank as large as the weight gives back the weight itself, exactly. The part
is a subtrahend: the weight that such an adapter was trained on is `w - delta(part.low)`.

Singular vectors are eigenvectors of the Gram matrix of the smaller side, which is all they are
needed for: squaring loses those of singular values below 1e-8 of the largest, and so at most about
that much of the weight, less than the float32 decomposition that the adapter was trained with.

Sources: PiSSA (Meng et al. 2024, arXiv 2404.02948), OLoRA (Büyükakyüz 2024, arXiv 2406.01775), KaSA
(Wang et al. 2024, arXiv 2412.06071), each as huggingface/peft v0.21.2 does it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import InputError
from lorakit.math.cast import Array
from lorakit.math.lowrank import LowRank
from lorakit.math.rows import row_slices

Doubles = NDArray[np.float64]
BLOCK = 1 << 23  # elements of a weight in float64 at a time: 64 MiB


@dataclass(frozen=True)
class Part:
    """A part of a weight and how well the weight defines it.

    `gap` is between 0 (any of several parts would do) and 1. Two computations that each err by a
    share `e` of the largest singular value agree up to about `e / gap` of the part's smallest one.
    """

    low: LowRank
    gap: float


def principal(w: Array, rank: int) -> Part:
    """The part of the `rank` largest singular values, which PiSSA moves into the adapter.

    `w` is (out, in), of any float dtype. The adapter's scaling does not matter: PiSSA divides it
    out of the factors. The gap is `1 - s[rank] / s[rank - 1]` of the falling singular values.

    Raises:
        InputError: the weight holds NaN or inf, or is no matrix, or the rank is not positive.
    """
    size = _checked(w, rank)
    if rank >= size:
        return _whole(w)
    roots, vectors = _singular(w, size - rank - 1, size - 1)
    return Part(_projected(w, vectors[:, 1:]), _gap(roots[0], roots[1]))


def olora(w: Array, rank: int, *, scaling: float = 1.0) -> Part:
    """The part in the span of the first `rank` columns, which OLoRA moves into the adapter.

    That is `q[:, :rank] @ r[:rank]` of the QR decomposition of `w` (out, in). OLoRA takes it out
    `scaling` times, with the scaling of the adapter. The gap is the least distance of one of
    these columns from the span of those before it, as a share of its norm.

    Raises:
        InputError: as for `principal`.
    """
    size = _checked(w, rank)
    if rank >= size:
        return _whole(w, scaling)
    first = np.ldexp(w[:, :rank].astype(np.float64), -_exponent(w))
    q, r = np.linalg.qr(first)
    norms = np.linalg.norm(r, axis=0)
    independent = np.abs(np.diagonal(r)) / np.where(norms > 0, norms, 1)
    low = LowRank(_multiplied(q, w), q, scaling)
    return Part(low, float(independent.min()))


def tail(w: Array, rank: int) -> Part:
    """The part of the `rank` smallest singular values, which KaSA cuts off the base.

    `w` is (out, in), and there are `min(out, in)` singular values. The gap is between the smallest
    that is kept and the largest that is cut off.

    Raises:
        InputError: as for `principal`, or nothing would be left of the weight.
    """
    size = _checked(w, rank)
    if rank >= size:
        raise InputError(f"KaSA of rank {rank} leaves nothing of a weight of rank {size}")
    roots, vectors = _singular(w, 0, rank)
    return Part(_projected(w, vectors[:, :-1]), _gap(roots[-2], roots[-1]))


def _checked(w: Array, rank: int) -> int:
    """How many singular values `w` has."""
    if w.ndim != 2 or 0 in w.shape or rank < 1:
        raise InputError(f"rank {rank} of a weight of shape {w.shape} is not a part of a matrix")
    return int(min(w.shape))


def _whole(w: Array, scaling: float = 1.0) -> Part:
    _exponent(w)
    wide = w.astype(np.float64)
    out, inner = w.shape
    if out <= inner:
        return Part(LowRank(wide, np.eye(out), scaling), 1.0)
    return Part(LowRank(np.eye(inner), wide, scaling), 1.0)


def _singular(w: Array, first: int, last: int) -> tuple[Doubles, Doubles]:
    """The `first` to `last` singular values from the smallest, and vectors of the smaller side."""
    from scipy.linalg import eigh

    gram = _gram(w)
    floor = np.finfo(np.float64).eps * np.trace(gram)
    squares, vectors = eigh(
        gram, subset_by_index=[first, last], driver="evr", overwrite_a=True, check_finite=False
    )
    return np.sqrt(np.where(squares > floor, squares, 0.0)), vectors


def _gap(below: float, above: float) -> float:
    return 1 - below / above if below else 1.0  # of zeros it does not matter which are taken


def _gram(w: Array) -> Doubles:
    """`w @ w.T` or `w.T @ w`, the smaller, of `w` times a power of two that brings it near 1."""
    out, inner = w.shape
    smaller, exponent = min(out, inner), _exponent(w)
    total = np.zeros((smaller, smaller))
    for some in row_slices(max(out, inner), smaller, BLOCK):
        block = w[:, some] if out <= inner else w[some].T
        wide = np.ldexp(block.astype(np.float64), -exponent)
        total += wide @ wide.T
    return total


def _projected(w: Array, vectors: Doubles) -> LowRank:
    """The projection of `w` to the span of these vectors of its smaller side."""
    if w.shape[0] <= w.shape[1]:
        return LowRank(_multiplied(vectors, w), vectors)
    b = np.empty((w.shape[0], vectors.shape[1]))
    for some in row_slices(len(w), w.shape[1], BLOCK):
        b[some] = w[some].astype(np.float64) @ vectors
    return LowRank(vectors.T, b)


def _multiplied(q: Doubles, w: Array) -> Doubles:
    """`q.T @ w`."""
    total = np.zeros((q.shape[1], w.shape[1]))
    for some in row_slices(len(w), w.shape[1], BLOCK):
        total += q[some].T @ w[some].astype(np.float64)
    return total


def _exponent(w: Array) -> int:
    """The power of two just above the largest magnitude in `w`."""
    largest = max(float(np.abs(w[some]).max()) for some in row_slices(len(w), w.shape[1], BLOCK))
    if not np.isfinite(largest):
        raise InputError("the weight holds NaN or inf, which has no singular values")
    return int(np.frexp(largest)[1])
