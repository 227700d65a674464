"""Four bits an element, two to a byte, a float32 scale for each block: what QLoRA loads.

Law: bytes, scales and values are those of bitsandbytes on a CPU, bit for bit (without `search`).

Sources: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), sections 3 and B; bitsandbytes 0.50,
bitsandbytes/functional.py (quantize_4bit, dequantize_4bit).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.quant import bnb, packing
from lorakit.quant.blockwise import Grid, count, located
from lorakit.quant.codec import CHUNK, Array, Quantised, Single, float_dtype, settle, target
from lorakit.quant.nested import Nested, nest, unnest
from lorakit.tensors import TensorInfo


@dataclass(frozen=True)
class FourBit:
    """Blocks of codes of four bits."""

    name: str
    levels: tuple[float, ...]  # of each code, at scale 1
    block: int = 64
    double: bool = False  # whether the scales are quantised too
    search: bool = False  # whether the scale of least error is sought in place of the absmax
    bits: int = 4

    def quantise(self, w: Array) -> Quantised:
        """The packed codes, (ceil(size / 2),), and the scales of the blocks.

        The blocks run over the elements in their order on disk, across rows. With `double` the
        scales are bytes with scales of their own.

        Raises:
            InputError: NaN or inf, or no float dtype up to float32.
            UsageError: a size of blocks that there is not.
        """
        packed = np.empty(-(-w.size // 2), np.uint8)
        scales = np.empty(count(w.size, self.block), np.float32)
        for start, codes in located(w, self._grid, self.block, scales, search=self.search):
            part = packed[start // 2 : start // 2 + codes.size // 2]
            packing.pack(codes, part)
            if self._order is not None:
                np.take(self._order, part, out=part, mode="clip")
        if not self.double:
            return Quantised(w.shape, {"packed": packed, "absmax": scales}, {"block": self.block})
        found = nest(scales)
        arrays: dict[str, Array] = {"packed": packed, "absmax": found.codes}
        arrays |= {"nested_absmax": found.absmax, "nested_quant_map": found.levels}
        return Quantised(w.shape, arrays, {"block": self.block, "offset": found.offset})

    def dequantise(self, q: Quantised, dtype: str = "float32", *, out: Any = None) -> Array:
        """The values of the codes, computed in float32 and rounded once to `dtype`.

        `out` is float32 of the shape of the weight and takes the rounded values.
        """
        kind = float_dtype(dtype)
        flat, packed, scales = target(q.shape, kind, out), q.arrays["packed"], _scales(q)
        buffer = np.empty(min(CHUNK, 2 * packed.size), np.float32)
        for start in range(0, flat.size, CHUNK):
            place = flat[start : start + CHUNK]
            part = packed[start // 2 : (start + CHUNK) // 2]
            fits = place.dtype == np.float32 and place.size == 2 * part.size
            values = place if fits else buffer[: 2 * part.size]
            packing.values(part, self._pairs, values)
            values = values[: place.size]
            _scale(values, scales[start // q.meta["block"] :], q.meta["block"])
            settle(values, place, kind)
        return flat.reshape(q.shape)

    def tensors(
        self, name: str, q: Quantised, *, dtype: str = "bfloat16", padded: bool = False
    ) -> dict[str, Array]:
        """The tensors of a pre-quantised checkpoint, for a weight in a model of `dtype`.

        `padded` gives the JSON of double quantisation the length that `infos` says, with spaces at
        its end.
        """
        return bnb.tensors(name, q, self, dtype, padded=padded)

    def infos(
        self, name: str, shape: tuple[int, ...], *, dtype: str = "bfloat16"
    ) -> list[TensorInfo]:
        """What `tensors` will give for a weight of this shape, padded, in its order."""
        return bnb.infos(name, shape, self, dtype)

    @cached_property
    def _table(self) -> Single:
        return np.array(self.levels, np.float32)

    @cached_property
    def _grid(self) -> Grid:
        return Grid(np.sort(self._table, kind="stable"))

    @cached_property
    def _order(self) -> NDArray[np.uint8] | None:
        """For each packed byte of places in the rising grid, the byte of codes; None: the same."""
        order = np.argsort(self._table, kind="stable").astype(np.uint8)
        return None if (order == np.arange(16)).all() else packing.permuted(order)

    @cached_property
    def _pairs(self) -> packing.Pairs:
        return packing.pairs(self._table)


def _scales(q: Quantised) -> Single:
    if "offset" not in q.meta:
        return q.arrays["absmax"]
    absmax, levels = q.arrays["nested_absmax"], q.arrays["nested_quant_map"]
    return unnest(Nested(q.arrays["absmax"], absmax, levels, q.meta["offset"]))


def _scale(values: Single, scales: Single, block: int) -> None:
    full = values.size // block
    rows = values[: full * block].reshape(full, block)
    rows *= scales[:full, None]
    if rows.size < values.size:
        values[rows.size :] *= scales[full]
