"""Products of factors, in pieces that the processor multiplies fastest.

OpenBLAS, which NumPy multiplies with, first copies large matrices into panels. Where the inner
dimension is a rank, that takes as long as the multiplication; small ones it multiplies as they lie,
on processors with AVX-512 in half the time. Elsewhere pieces cost a few percent.

Source: OpenMathLib/OpenBLAS v0.3.31, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c, which
has what small is.
"""

import numpy as np

from lorakit.math.namespace import Array

SMALL = 10**6  # multiplications
WIDTH = 64  # columns that are multiplied together; a piece has a multiple of them


def product(b: Array, a: Array) -> Array:
    """`b @ a`; NumPy's arrays as `multiply` does it."""
    if not isinstance(a, np.ndarray):
        return b @ a
    out = np.empty((b.shape[0], a.shape[1]), a.dtype)
    multiply(b, a, out)
    return out


def multiply(b: Array, a: Array, out: Array) -> None:
    """Put `b @ a` into `out`, all of one dtype. The shapes alone decide what the pieces are."""
    width = width_of_pieces(*b.shape) or max(1, a.shape[1])
    for start in range(0, a.shape[1], width):
        piece = slice(start, start + width)
        np.matmul(b, a[:, piece], out=out[:, piece])


def width_of_pieces(rows: int, rank: int) -> int:
    """How many columns of a product are a small one; 0 where no piece would be small."""
    return SMALL // max(1, rows * rank) // WIDTH * WIDTH
