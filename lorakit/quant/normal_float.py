"""normal-float: k bits, the levels that a normal distribution fills evenly, with one for zero.

No library stores these packed; they are for weights written back in 16 bits. At 4 bits the levels
are those of nf4 to 1e-6, and nf4 has a layout that loads.

Sources: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3; Li et al. 2023 (LoftQ, arXiv
2310.08659), section 3.2, whose NF2 and NF4 these are.
"""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from lorakit.quant.blockwise import Grid
from lorakit.quant.codebook import decode, encode
from lorakit.quant.codec import Array, Quantised

_OFFSET = 0.9677083  # the probability below the outermost level, QLoRA's


@dataclass(frozen=True)
class NormalFloat:
    """Blocks of codes of the quantiles of a normal distribution."""

    name: str = "normal-float"
    bits: int = 4
    block: int = 64
    search: bool = False  # whether the scale of least error is sought in place of the absmax

    def quantise(self, w: Array) -> Quantised:
        """The code of each element, a byte whatever its bits, and the scales of the blocks.

        Raises:
            InputError: NaN or inf, or no float dtype up to float32.
            UsageError: a size of blocks that there is not.
        """
        return encode(w, _grid(self.bits), self.block, search=self.search)

    def dequantise(self, q: Quantised, dtype: str = "float32", *, out: Any = None) -> Array:
        """The values of the codes, computed in float32 and rounded once to `dtype`.

        `out` is float32 of the shape of the weight and takes the rounded values.
        """
        return decode(q, _grid(self.bits), dtype, out)


@cache
def _grid(bits: int) -> Grid:
    """One level more above zero than below, and zero."""
    half = 2 ** (bits - 1)
    above = _quantiles(half + 1)
    below = [-x for x in _quantiles(half)]
    levels = np.sort(np.array([*below, 0.0, *above]))
    return Grid((levels / levels[-1]).astype(np.float32))


def _quantiles(count: int) -> list[float]:
    """Of evenly spaced probabilities from the offset down to a half, which is left out."""
    normal = NormalDist()
    return [normal.inv_cdf(p) for p in np.linspace(_OFFSET, 0.5, count)[:-1].tolist()]
