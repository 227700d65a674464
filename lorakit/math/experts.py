"""The factors of a stack of experts, taken apart and put together; and what that does to a scaling.

Law: `packed(*unpacked(a, b, n, packing))` is (a, b) for "peft", and only moves numbers for any.
`scale` rounds once, to nearest even; by a power of two that is exact unless a number leaves the
range of its dtype.

Source: the packing is that of huggingface/peft v0.21.2, ParamWrapper; see lorakit.math.stacked.
"""

import math
from collections.abc import Sequence

import numpy as np

from lorakit.math.cast import Array, narrow
from lorakit.math.stacked import by_expert


def unpacked(a: Array, b: Array, count: int, packing: str = "peft") -> tuple[Array, Array]:
    """The factors of each expert, (count, rank, in) and (count, out, rank). Copies, in any dtype.

    `a` is (count * rank, in); `b` is packed as `lorakit.math.stacked.by_expert` says.
    """
    ups = by_expert(b, count, packing)
    return a.reshape(count, a.shape[0] // count, -1), np.ascontiguousarray(ups)


def packed(a: Array, b: Array) -> tuple[Array, Array]:
    """The factors of a stack as PEFT has them, from those of each expert."""
    count, out, rank = b.shape
    ups = np.ascontiguousarray(b.transpose(1, 2, 0)).reshape(out, rank * count)
    return a.reshape(count * rank, -1), ups


def supports(b: Array, ranges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The ranks that matter to each of some ranges of rows of `b`, (..., out, rank).

    A rank that is zero in a range, and not zero in another, adds nothing to the first: so the
    factors of gate and up that share a stack come apart as they were. A range that would be left
    with no rank keeps all.
    """
    used = [
        np.any(b[..., start:stop, :] != 0, axis=tuple(range(b.ndim - 1))) for start, stop in ranges
    ]
    nowhere = ~np.any(used, axis=0)
    found = [np.flatnonzero(u | nowhere).tolist() for u in used]
    return [ranks or list(range(b.shape[-1])) for ranks in found]


def scaled(x: Array, factor: float) -> tuple[Array, int]:
    """`factor * x` in the dtype of `x`, and how many numbers had to be rounded for it."""
    if factor == 1.0:
        return x, 0
    wide = x.astype(np.float64) * factor
    out = np.empty(x.shape, x.dtype)
    narrow(wide, out)
    return out, int(np.count_nonzero(out.astype(np.float64) != wide))


def alpha_for(scaling: float, rank: int, *, rslora: bool) -> tuple[float, bool]:
    """The alpha whose scaling at this rank is `scaling`, and whether it is to the last bit.

    It is alpha / rank, or alpha / sqrt(rank) for rsLoRA; of several alphas a whole number is
    chosen. The quotient of a root can miss a float64 by one unit in the last place.
    """
    divisor = math.sqrt(rank) if rslora else float(rank)
    guess = scaling * divisor
    step = math.ulp(guess)
    near = [float(round(guess)), *(guess + n * step for n in (0, -1, 1, -2, 2, -3, 3))]
    exact = next((x for x in near if x / divisor == scaling), None)
    return (guess, False) if exact is None else (exact, True)
