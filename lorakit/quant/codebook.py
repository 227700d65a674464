"""Codes of k bits on a grid of levels, in blocks with a float32 scale: for grids nobody packs.

Law: each value is the level, times the scale of its block, that is nearest to it.
"""

from typing import Any

import numpy as np

from lorakit.quant.blockwise import Grid, count, located
from lorakit.quant.codec import CHUNK, Array, Quantised, float_dtype, settle, target
from lorakit.quant.packing import looked_up


def encode(w: Array, grid: Grid, block: int, *, search: bool = False) -> Quantised:
    """A byte for the code of each element, whatever its bits, and the scales of the blocks.

    Raises:
        InputError: NaN or inf, or no float dtype up to float32.
        UsageError: a size of blocks that there is not.
    """
    codes = np.empty(w.size, np.uint8)
    scales = np.empty(count(w.size, block), np.float32)
    for start, found in located(w, grid, block, scales, search=search):
        codes[start : start + found.size] = found[: w.size - start]
    return Quantised(w.shape, {"codes": codes, "absmax": scales}, {"block": block})


def decode(q: Quantised, grid: Grid, dtype: str, out: Any) -> Array:
    """The values of the codes, computed in float32 and rounded once to `dtype`."""
    kind, block = float_dtype(dtype), q.meta["block"]
    codes, scales = q.arrays["codes"], q.arrays["absmax"]
    flat = target(q.shape, kind, out)
    buffer = np.empty(min(CHUNK, flat.size), np.float32)
    for start in range(0, flat.size, CHUNK):
        part = codes[start : start + CHUNK]
        values = looked_up(grid.levels, part, buffer[: part.size])
        own = scales[start // block : -(-(start + part.size) // block)]
        full = part.size // block
        rows = values[: full * block].reshape(full, block)
        rows *= own[:full, None]
        values[rows.size :] *= own[-1]
        settle(values, flat[start : start + part.size], kind)
    return flat.reshape(q.shape)
