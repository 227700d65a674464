"""The nearest code of every element in blocks that share a scale, chunk by chunk.

Law: the codes and scales are those of bitsandbytes on a CPU, bit for bit: `x * (1 / absmax)` is
compared with the middles between neighbouring levels, and a tie goes to the lower level. In the
last block, where it is not full, it divides instead, and its scale is 1e-38 at least.

Each level costs one comparison and one addition over the chunk, which is many times faster than
a search of each element's place.

Source: bitsandbytes 0.50, bitsandbytes/backends/default/ops.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import InputError, UsageError
from lorakit.quant.codec import CHUNK, Array, Single, flattened, singles
from lorakit.quant.packing import looked_up

Codes = NDArray[np.uint8]

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LEAST = np.float32(1e-38)
_INF = 0x7F800000
# For so many levels at most, the scales tried, as shares of the absmax, which comes first; each is
# then fitted once to the codes it gave. Fewer levels gain from cutting off more.
_SHARES = {
    4: (1.0, 0.85, 0.7, 0.55, 0.4),
    8: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    16: (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75),
    256: (1.0, 1.05, 0.95),
}


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a block whose scale is 1, rising."""

    levels: Single

    @cached_property
    def middles(self) -> Single:
        """The values above which the next level is nearer."""
        return (self.levels[1:] + self.levels[:-1]) / np.float32(2)


@dataclass(frozen=True, eq=False)
class _Work:
    """The buffers of one call, for chunks of `size` elements."""

    size: int
    wide: Single = field(init=False)
    scaled: Single = field(init=False)
    codes: Codes = field(init=False)
    mask: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        even = self.size + self.size % 2
        for name, dtype in (("wide", "f4"), ("scaled", "f4"), ("codes", "u1"), ("mask", "?")):
            object.__setattr__(self, name, np.empty(even, dtype))


def count(size: int, block: int) -> int:
    """How many blocks there are, the last one perhaps not full.

    Raises:
        UsageError: bitsandbytes has no blocks of this size.
    """
    if block not in BLOCKS:
        known = ", ".join(map(str, BLOCKS))
        raise UsageError(f"there are no blocks of {block} elements.", hint=f"Pass --block {known}.")
    return -(-size // block)


def located(
    w: Array, grid: Grid, block: int, scales: Single, *, search: bool = False
) -> Iterator[tuple[int, Codes]]:
    """The place of each chunk, and its codes: which level of the grid is nearest.

    `scales`, one for each block, are filled on the way. The codes of an odd last chunk are padded
    with that of zero. They are overwritten by the next chunk. `search` looks for the scale of least
    error in place of the largest magnitude.

    Raises:
        InputError: the weight holds NaN or inf.
    """
    flat = flattened(w)
    work = _Work(min(flat.size, CHUNK))
    for start in range(0, flat.size, CHUNK):
        x = singles(flat[start : start + CHUNK], work.wide)
        own = scales[start // block : -(-(start + x.size) // block)]
        scaled = work.scaled[: x.size + x.size % 2]
        scaled[x.size :] = 0
        _largest(x, scaled[: x.size], own, block)
        _divide(x, scaled[: x.size], own, block)
        if search:
            yield start, _searched(scaled, own, grid, block, x.size)
        else:
            yield start, locate(scaled, grid, work.codes, work.mask)


def locate(scaled: Single, grid: Grid, codes: Codes, mask: NDArray[np.bool_]) -> Codes:
    """How many middles of the grid are below each value; in `codes`, `mask` is scratch."""
    found, above = codes[: scaled.size], mask[: scaled.size]
    np.greater(scaled, grid.middles[0], out=above)
    found[:] = above
    for middle in grid.middles[1:]:
        np.greater(scaled, middle, out=above)
        found += above.view(np.uint8)
    return found


def _largest(x: Single, buffer: Single, scales: Single, block: int) -> None:
    """The largest magnitude of each block: of floats without sign, the bits order the values."""
    np.abs(x, out=buffer)
    bits = scales.view(np.int32)
    np.maximum.reduceat(buffer.view(np.int32), np.arange(0, x.size, block), out=bits)
    if bits.max() >= _INF:
        raise InputError("the weight holds NaN or inf, which cannot be quantised")


def _divide(x: Single, out: Single, scales: Single, block: int) -> None:
    full = x.size // block
    rows, last = x[: full * block].reshape(full, block), x[full * block :]
    inverse = 1 / np.maximum(scales[:full], _LEAST)
    np.multiply(rows, inverse[:, None], out=out[: rows.size].reshape(rows.shape))
    if last.size:
        scales[-1] = max(scales[-1], _LEAST)
        np.divide(last, scales[-1], out=out[rows.size :])


def _searched(scaled: Single, scales: Single, grid: Grid, block: int, size: int) -> Codes:
    """Codes whose values, with a scale fitted by least squares, are nearest; `scales` are changed.

    For codes of values c the best scale is <x, c> / <c, c> and takes <x, c>² / <c, c> off the
    error. `scaled` holds x by the present scales; the first share is 1, so nothing gets worse.
    """
    work = _Work(scaled.size)
    best = locate(scaled, grid, np.empty_like(work.codes), work.mask)
    gain, fit = np.zeros_like(scales), np.ones_like(scales)
    for share in next(s for most, s in _SHARES.items() if len(grid.levels) <= most):
        np.multiply(scaled, np.float32(1 / share), out=work.scaled)
        codes = locate(work.scaled, grid, work.codes, work.mask)
        values = looked_up(grid.levels, codes, work.scaled)[:size]
        along, square = (_dots(v[:size], values, block) for v in (scaled, values))
        found = along / np.where(square > 0, square, 1)
        better = (along > 0) & (along * found > gain)
        gain[better], fit[better] = (along * found)[better], found[better]
        _take(best, codes, better, block)
    scales *= fit
    return best


def _dots(x: Single, y: Single, block: int) -> Single:
    """The inner product of each block."""
    full = x.size // block * block
    rows = (v[:full].reshape(-1, block) for v in (x, y))
    sums: Any = np.einsum("ij,ij->i", *rows)
    return np.append(sums, np.dot(x[full:], y[full:])) if full < x.size else sums


def _take(best: Codes, codes: Codes, better: NDArray[np.bool_], block: int) -> None:
    """Replace the codes of the blocks that are better, padding included."""
    full = codes.size // block
    rows = slice(0, full * block)
    best[rows].reshape(-1, block)[better[:full]] = codes[rows].reshape(-1, block)[better[:full]]
    if better[full:].any():
        best[full * block :] = codes[full * block :]
