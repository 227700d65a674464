"""Sums that float32 cannot tell from a tie of float16.

A float32 sum that was rounded to exactly half-way between two float16 numbers has lost the side on
which it lay, one in 8,192 does; to nearest even then takes the wrong one for half of these. The
side is in the error of the sum, which float64 has exactly (Knuth, TAOCP 2, section 4.2.2).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_BELOW = np.uint16(0x1FFF)  # the bits of a float32 that a normal float16 has no room for
_HALF = np.uint16(0x1000)


def settle_ties(total: Array, w: Array, change: Array, spare: Array) -> None:
    """Move those of the sums `total = w + change`, float32, that look like ties of float16 to the
    next float32 on their true side. In place; a true tie stays one. `spare` is room for as many
    bytes as `total` has.

    Ties of subnormal float16 numbers are left: their sums are exact in float32 but for very small
    changes.
    """
    low = spare.reshape(-1).view(np.uint16)[: total.size]
    tied = spare.reshape(-1).view(np.bool_)[-total.size :]
    np.copyto(low, total.reshape(-1).view(np.uint32), casting="unsafe")
    low &= _BELOW
    at = np.flatnonzero(np.equal(low, _HALF, out=tied))
    if at.size:
        near = total.reshape(-1)[at]
        error = w.reshape(-1)[at].astype(np.float64) + change.reshape(-1)[at] - near
        side = np.where(error > 0, np.inf, -np.inf).astype(np.float32)
        moved = np.where(error == 0, near, np.nextafter(near, side))
        total.reshape(-1)[at] = np.where(np.isfinite(error), moved, near)
