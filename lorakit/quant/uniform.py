"""uniform: k bits, levels at equal distances between the smallest and largest value of a block.

No library stores these packed; they are for weights written back in 16 bits. `symmetric` puts the
levels between minus and plus the largest magnitude instead, zero among them, one fewer than bits
could tell.

Source: Li et al. 2023 (LoftQ, arXiv 2310.08659), section 2.1, equations 3 and 4; in blocks, as its
appendices do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lorakit.errors import InputError, UsageError
from lorakit.quant.blockwise import Grid, count
from lorakit.quant.codebook import decode, encode
from lorakit.quant.codec import (
    CHUNK,
    Array,
    Quantised,
    Single,
    flattened,
    float_dtype,
    settle,
    singles,
    target,
)


@dataclass(frozen=True)
class Uniform:
    """Blocks of codes of equal steps."""

    name: str = "uniform"
    bits: int = 4
    block: int = 64
    symmetric: bool = False
    search: bool = False  # whether the scale of least error is sought; symmetric only

    def __post_init__(self) -> None:
        if self.search and not self.symmetric:
            raise UsageError(
                "the scale of uniform levels can be sought only where they are symmetric.",
                hint="Leave --absmax search out, or take --quant normal-float.",
            )

    def quantise(self, w: Array) -> Quantised:
        """The code of each element, a byte whatever its bits, and the scales of the blocks.

        Raises:
            InputError: NaN or inf, or no float dtype up to float32.
            UsageError: a size of blocks that there is not.
        """
        if self.symmetric:
            return encode(w, _grid(self.bits), self.block, search=self.search)
        flat, blocks = flattened(w), count(w.size, self.block)
        codes = np.empty(flat.size, np.uint8)
        low, step = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
        buffer = np.empty(min(CHUNK, flat.size), np.float32)
        for part, own in _chunks(flat.size, self.block):
            x = singles(flat[part], buffer)
            _range(x, low[own], step[own], self)
            scaled = (x - _spread(low[own], self, x.size)) / _spread(step[own], self, x.size)
            np.copyto(codes[part], np.rint(scaled, out=scaled), casting="unsafe")
        return Quantised(w.shape, {"codes": codes, "low": low, "step": step}, {"block": self.block})

    def dequantise(self, q: Quantised, dtype: str = "float32", *, out: Any = None) -> Array:
        """The values of the codes, computed in float32 and rounded once to `dtype`.

        `out` is float32 of the shape of the weight and takes the rounded values.
        """
        if self.symmetric:
            return decode(q, _grid(self.bits), dtype, out)
        kind = float_dtype(dtype)
        flat = target(q.shape, kind, out)
        low, step = q.arrays["low"], q.arrays["step"]
        for part, own in _chunks(flat.size, self.block):
            size = flat[part].size
            values = q.arrays["codes"][part] * _spread(step[own], self, size)
            values += _spread(low[own], self, size)
            settle(values, flat[part], kind)
        return flat.reshape(q.shape)


@cache
def _grid(bits: int) -> Grid:
    half = 2 ** (bits - 1) - 1
    return Grid((np.arange(-half, half + 1) / half).astype(np.float32))


def _chunks(size: int, block: int) -> Iterator[tuple[slice, slice]]:
    """The elements of each chunk, and its blocks."""
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        yield slice(start, stop), slice(start // block, -(-stop // block))


def _range(x: Single, low: Single, step: Single, codec: Uniform) -> None:
    starts = np.arange(0, x.size, codec.block)
    np.minimum.reduceat(x, starts, out=low)
    np.maximum.reduceat(x, starts, out=step)
    if not (np.isfinite(low).all() and np.isfinite(step).all()):
        raise InputError("the weight holds NaN or inf, which cannot be quantised")
    step -= low
    step /= np.float32(2**codec.bits - 1)
    step[step == 0] = 1  # a block of one value: its codes are 0


def _spread(each: Single, codec: Uniform, size: int) -> Single:
    """The number of each block, for every element of it."""
    return np.repeat(each, codec.block)[:size]
