"""Scales quantised in turn: bytes of a dynamic map, in blocks of 256, about their mean.

Law: given the offset, the bytes, scales and map are those of bitsandbytes on a CPU, bit for bit.
The offset is the mean of the scales, rounded once; bitsandbytes sums in float32, in an order that
differs from machine to machine, and is a few units of rounding off.

Where a level is nearest is decided on a grid of 65536 values between -1 and 1, as there; so within
1.6e-5 of the middle between two levels the farther of them may be taken.

Sources: Dettmers 2015 ("8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561);
bitsandbytes 0.50, bitsandbytes/functional.py (create_dynamic_map) and its quantize_blockwise on a
CPU, by experiment.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lorakit.quant.codec import Single

BLOCK = 256
_DECADES = 7
_LEAST = np.float32(2.0**-127)  # whose inverse is finite
_REACH = np.float32(1 + 2.0**-8)  # of the outermost level, in terms of it
_CELLS = np.float32(32767.5)  # of the grid, for each unit


@dataclass(frozen=True, eq=False)
class Nested:
    """Scales in bytes."""

    codes: NDArray[np.uint8]
    absmax: Single  # one for each block of 256
    levels: Single  # (256,)
    offset: float  # of float32


def nest(scales: Single, offset: float | None = None, absmax: Single | None = None) -> Nested:
    """The scales in bytes; `offset` left out is their mean. Of the scales that these have in turn,
    those of `absmax` stay that still span their blocks, and more than the lower half is in use.
    """
    if offset is None:
        offset = float(np.float32(scales.astype(np.float64).mean()))
    centred = scales - np.float32(offset)
    starts = np.arange(0, centred.size, BLOCK)
    largest = np.maximum.reduceat(np.abs(centred), starts)
    if absmax is None:
        absmax = largest
    else:
        spans = (largest <= absmax * _REACH) & (2 * largest >= absmax)
        absmax = np.where(spans, absmax, largest)
    inverse = np.repeat(1 / np.maximum(absmax, _LEAST), BLOCK)[: centred.size]
    cells = ((centred * inverse + np.float32(1)) * _CELLS + np.float32(0.5)).astype(np.intp)
    codes = _nearest()[np.clip(cells, 0, 65535)]
    codes[np.repeat(absmax == 0, BLOCK)[: codes.size]] = 0
    return Nested(codes, absmax, dynamic_map(), offset)


def unnest(nested: Nested) -> Single:
    """The scales, float32."""
    blocks = np.repeat(nested.absmax, BLOCK)[: nested.codes.size]
    scales: Single = nested.levels[nested.codes] * blocks + np.float32(nested.offset)
    return scales


@cache
def dynamic_map() -> Single:
    """The 256 levels between -1 and 1: seven decades, each in twice as many steps as the last."""
    found = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for decade in range(_DECADES):
        edges = _spaced(2**decade)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade + 1 - _DECADES)) * middles
        found += [scaled, -scaled]
    levels = np.sort(np.concatenate(found))
    levels.flags.writeable = False
    return levels


def _spaced(steps: int) -> Single:
    """From 0.1 to 1 as torch.linspace does it: from both ends, each value rounded once."""
    low, high = np.float32(0.1), np.float32(1)
    step = np.float64((high - low) / np.float32(steps))
    k = np.arange(steps + 1, dtype=np.float64)
    below = k < (steps + 1) // 2
    return np.where(below, low + step * k, high - step * (steps - k)).astype(np.float32)


@cache
def _nearest() -> NDArray[np.uint8]:
    """The nearest level to each value of the grid."""
    grid = np.arange(65536, dtype=np.float32) / _CELLS - np.float32(1)
    levels = dynamic_map()
    below = np.clip(np.searchsorted(levels, grid, side="right") - 1, 0, 254)
    return (below + (levels[below + 1] - grid < grid - levels[below])).astype(np.uint8)
