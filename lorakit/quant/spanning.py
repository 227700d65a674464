"""Scales for new values: those that there are, as long as their grid spans the values.

Law: a value is off by half a step of its grid at most, and where nothing changes no scale does, so
that no value does either. Scales made afresh would shift the grid under every value that is on it,
by as much as a small delta changes anything, however little changes.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lorakit.errors import InputError
from lorakit.math.cast import storage
from lorakit.quant.codec import Array, Single


class Codes(NamedTuple):
    """The lowest and the highest code, for all or for each scale, and how far beyond them a value
    still is theirs: half a step.
    """

    low: Any
    high: Any
    beyond: float = 0.5


class Extremes(NamedTuple):
    """Of each block of some rows: the lowest and the highest new value, of which one may be 0, and
    the largest magnitude before; float32, (blocks of rows, blocks of columns) each.
    """

    first: int  # which of the blocks of rows of the weight comes first
    low: Single
    high: Single
    before: Single


def extremes(w: Single, new: Single, rows: Array, columns: Array, first: int = 0) -> Extremes:
    """Those of blocks that begin at these rows and columns.

    Raises:
        InputError: there is NaN or Inf among the new values.
    """

    def over(ufunc: Any, x: Single) -> Single:
        found: Single = ufunc.reduceat(x, columns, axis=1)
        return ufunc.reduceat(found, rows, axis=0) if len(rows) < len(x) else found

    low, high = over(np.minimum, new), over(np.maximum, new)
    check_finite(low, high)
    before = np.maximum(over(np.maximum, w), -over(np.minimum, w))
    return Extremes(first, np.minimum(low, 0), np.maximum(high, 0), before)


def grouped(w: Single, new: Single, groups: Array, count: int) -> Extremes:
    """Those of each row and group of columns; `groups` has the group, of `count`, of each column.

    Raises:
        InputError: there is NaN or Inf among the new values.
    """
    if (np.diff(groups) < 0).any():
        order = np.argsort(groups, kind="stable")
        w, new, groups = w[:, order], new[:, order], groups[order]
    there, columns = np.unique(groups, return_index=True)
    found = extremes(w, new, np.arange(len(new)), columns)
    if len(there) == count:
        return found
    spread = [np.zeros((len(new), count), np.float32) for _ in found[1:]]
    for some, every in zip(found[1:], spread, strict=True):
        every[:, there] = some
    return Extremes(0, *spread)


def check_finite(*values: Array) -> None:
    """Refuse what has no place on a grid.

    Raises:
        InputError: there is NaN or Inf.
    """
    if not all(np.isfinite(v).all() for v in values):
        raise InputError("the merged weight holds NaN or Inf, which cannot be quantised")


def joined(seen: list[Extremes]) -> Extremes:
    """Those of rows that follow one another; where two surveys saw the same block, of both."""
    first = seen[0].first
    count = max(s.first + len(s.low) for s in seen) - first
    whole = [np.zeros((count, *seen[0].low.shape[1:]), np.float32) for _ in seen[0][1:]]
    for s in seen:
        at = slice(s.first - first, s.first - first + len(s.low))
        for every, some, take in zip(
            whole, s[1:], (np.minimum, np.maximum, np.maximum), strict=True
        ):
            take(every[at], some, out=every[at])
    return Extremes(first, *whole)


def stacked(seen: list[Extremes]) -> Extremes:
    """Those of rows that follow one another and share no block."""
    parts = zip(*(s[1:] for s in seen), strict=True)
    return Extremes(seen[0].first, *map(np.concatenate, parts))


def spanning(old: Single, seen: Extremes, codes: Codes, dtype: str) -> Single:
    """The scales, as a tensor of `dtype` holds them; "U8" are exponents of two.

    An old one stays, unless the values have outgrown its grid, or shrunk to less than half, or were
    all 0. Where a side of the grid has no codes, as a zero at its end has it, no scale helps there.
    """
    after = np.maximum(seen.high, -seen.low)
    with np.errstate(all="ignore"):
        fits = seen.high <= old * (codes.high + codes.beyond)
        fits &= seen.low >= old * (codes.low - codes.beyond)
        fits &= (2 * after >= seen.before) & (seen.before > 0) | (after == 0)
        fresh = np.maximum(_over(seen.high, codes.high), _over(seen.low, codes.low))
    return np.where(fits, old, stored(fresh, dtype))


def _over(values: Single, code: Any) -> Single:
    """The scale at which this code stands for these values; 0 where none does."""
    found: Single = np.where(np.not_equal(code, 0), values / code, np.float32(0))
    return found


def stored(scales: Single, dtype: str) -> Single:
    """Scales as a tensor of this dtype holds them, none of which becomes nothing or infinite."""
    if dtype in ("U8", "F8_E8M0"):
        mantissa, exponent = np.frexp(np.maximum(scales, np.float32(2.0**-126)))
        power: Single = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
        return power
    kind = storage(dtype)
    limits: Any = ml_dtypes.finfo(kind)  # type: ignore[no-untyped-call]
    held = np.minimum(scales, np.float32(limits.max)).astype(kind).astype(np.float32)
    return np.where(scales > 0, np.maximum(held, np.float32(limits.smallest_subnormal)), held)


def as_stored(scales: Single, dtype: str) -> Array:
    """Scales in the dtype of their tensor; exact for what `stored` gave."""
    if dtype == "U8":
        return scales.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    return scales.astype(storage(dtype))


def on_grid(new: Single, scales: Single) -> Single:
    """The values in steps of their scales; 0 where a scale is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Single = np.where(scales != 0, new / scales, np.float32(0))
    return found
