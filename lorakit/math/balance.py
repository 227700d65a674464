"""Factors that share their size, for a dtype that holds few exponents.

Law: the product keeps its bits, for only powers of two move from one factor to the other.
"""

import numpy as np

from lorakit.math.cast import Array

# Where the largest number of a rank lies in float16: below, most of its others lose digits.
LEAST, MOST = 2.0**-10, 2.0**15


def balanced(a: Array, b: Array) -> tuple[Array, Array]:
    """The factors `a` (rank, in) and `b` (out, rank), each rank of which has numbers of like size
    in both where one of them would not do in float16.
    """
    tops = np.stack([np.abs(a).max(axis=1, initial=0.0), np.abs(b).max(axis=0, initial=0.0)])
    known = np.isfinite(tops).all(axis=0) & (tops > 0).all(axis=0)
    moved = known & ((tops < LEAST) | (tops >= MOST)).any(axis=0)
    exponents = np.frexp(np.where(moved, tops, 1.0))[1]
    shift = (exponents[1] - exponents[0]) // 2
    return np.ldexp(a, shift[:, None]), np.ldexp(b, -shift[None, :])
