"""Rounding to a dtype on disk: once, to nearest and ties to even, straight from float64."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Bits of the significand that are stored, and the exponent of the smallest normal number.
FLOATS = {"F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}
LARGEST = {"F32": 2.0**128 - 2.0**104, "F16": 65504.0, "BF16": 2.0**128 - 2.0**120}


def spacing(values: Array, code: str) -> Array:
    """The distance between the neighbours of each value in a dtype: one unit in the last place."""
    bits, smallest = FLOATS[code]
    _, exponent = np.frexp(values)  # |value| is in [2**(exponent - 1), 2**exponent)
    exponent = np.where(values == 0, smallest, exponent)  # of 0, frexp says 0
    unit: Array = np.ldexp(1.0, np.maximum(exponent - 1, smallest) - bits)
    return unit


def rounded(values: Array, code: str) -> NDArray[Any]:
    """The values in a dtype, rounded once, to nearest and ties to even, straight from float64.

    A cast of float64 to bfloat16 that passes through float32 rounds twice; this does not.
    """
    import ml_dtypes

    unit = spacing(values, code)
    nearest = np.rint(values / unit) * unit  # exact but for rint: units are powers of two
    nearest = np.where(np.abs(nearest) > LARGEST[code], np.copysign(np.inf, values), nearest)
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[code]
    return nearest.astype(dtype)
