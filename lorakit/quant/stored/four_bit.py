"""bitsandbytes' four bits on disk: blocks of codes over the elements in their order, across rows.

Law: the values are those of `dequantize_4bit` in float32, bit for bit, and new values become the
bytes that `quantize_4bit` makes of them; where scales are quantised in turn, these keep their
offset, which is no longer exactly their mean, and the scales that they have in turn if they can.

Source: bitsandbytes 0.50, bitsandbytes/functional.py (QuantState.from_dict, dequantize_4bit,
quantize_4bit).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant import bnb, packing
from lorakit.quant.codec import Array, Quantised, Single
from lorakit.quant.fourbit import FourBit
from lorakit.quant.fp4 import FP4
from lorakit.quant.nested import BLOCK as NESTED
from lorakit.quant.nested import Nested, nest, unnest
from lorakit.quant.nf4 import NF4
from lorakit.quant.spanning import check_finite
from lorakit.quant.stored.weight import taken, whole
from lorakit.tensors import CODES, Source, TensorInfo


@dataclass(frozen=True)
class FourBitWeight:
    """A weight of nf4 or fp4; `offset` is that of scales quantised in turn, None where they are
    not.
    """

    info: TensorInfo
    tensors: tuple[str, ...]
    block: int
    offset: float | None

    span = 0

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        cols = self.info.shape[-1]
        first, last = start * cols, stop * cols
        begin, end = first // self.block, -(-last // self.block)  # blocks
        codes = self._codes(source, begin * self.block, min(end * self.block, self.info.numel))
        levels = whole(source, f"{self.info.name}.quant_map").reshape(-1)
        found = np.empty(2 * codes.size, np.float32)
        packing.values(codes, packing.pairs(levels), found)
        scales = np.repeat(self._scales(source, begin, end), self.block)
        found[: scales.size] *= scales[: found.size]
        out.reshape(-1)[:] = found[first - begin * self.block :][: last - first]

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        scales = ("absmax",) if self.offset is None else ("absmax", "nested_absmax")
        return (self.info.name, *(f"{self.info.name}.{s}" for s in scales))

    @property
    def unit(self) -> int:
        """As `Written.unit`."""
        return self.block // gcd(self.info.shape[-1], self.block)

    @property
    def coupled(self) -> bool:
        """As `Written.coupled`."""
        return self.offset is not None

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Single:
        """As `Written.survey`."""
        flat = np.abs(new).reshape(-1)
        found: Single = np.maximum.reduceat(flat, np.arange(0, flat.size, self.block))
        check_finite(found)
        return found

    def settle(
        self, source: Source, start: int, seen: list[Single]
    ) -> tuple[Single, Nested | None]:
        """As `Written.settle`: those of all blocks, and what they are in turn."""
        scales = np.concatenate(seen)
        if self.offset is None:
            return scales, None
        old = self._nested(source, 0, len(scales))
        nested = nest(scales, self.offset, old.absmax)
        # Levels next to 0 are closer than `nest` tells apart: what is the same keeps its byte.
        stays = (unnest(old) == scales) & np.repeat(nested.absmax == old.absmax, NESTED)[
            : len(scales)
        ]
        nested.codes[stays] = old.codes[stays]
        return unnest(nested), nested

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        cols = new.shape[1]
        codec = self._codec(source)
        found = codec.quantise(new)
        packed = found.arrays["packed"]
        out[at * cols // 2 :][: packed.size] = packed
        if self.offset is None:
            return codec.dequantise(found)
        first = start * cols // self.block
        held = {"packed": packed, "absmax": scales[0][first : first + -(-new.size // self.block)]}
        return codec.dequantise(Quantised(new.shape, held, {"block": self.block}))

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """As `Written.beside`."""
        plain, nested = scales
        found: Array = plain if nested is None else nested.codes
        return nested.absmax if name.endswith("nested_absmax") else found

    def _codec(self, source: Source) -> FourBit:
        """The codec of its levels."""
        levels = whole(source, f"{self.info.name}.quant_map").reshape(-1)
        for codec in (NF4, FP4):
            if np.allclose(levels, codec.levels, rtol=0, atol=1e-6):
                return replace(codec, block=self.block)
        raise InputError("its levels are neither those of nf4 nor of fp4", tensor=self.info.name)

    def _codes(self, source: Source, first: int, last: int) -> Array:
        """The bytes of elements from an even one on."""
        name = self.info.name
        size = source.infos[name].nbytes // max(1, source.infos[name].rows)
        rows = first // 2 // size, -(-last // 2 // size)
        return taken(source, name, *rows).reshape(-1).view(np.uint8)[: -(-last // 2) - first // 2]

    def _scales(self, source: Source, begin: int, end: int) -> Single:
        """The scales of these blocks."""
        name = self.info.name
        if self.offset is None:
            return taken(source, f"{name}.absmax", begin, end).reshape(-1)
        first = begin // NESTED * NESTED
        return unnest(self._nested(source, first, end))[begin - first :]

    def _nested(self, source: Source, begin: int, end: int) -> Nested:
        """What the scales of these blocks are in turn; a whole group begins with the first."""
        name = self.info.name
        assert self.offset is not None
        codes = taken(source, f"{name}.absmax", begin, end).reshape(-1)
        groups = begin // NESTED, -(-end // NESTED)
        absmax = taken(source, f"{name}.nested_absmax", *groups).reshape(-1)
        levels = whole(source, f"{name}.nested_quant_map").reshape(-1)
        return Nested(codes, absmax, levels, self.offset)


def find(source: Source, config: Mapping[str, Any]) -> Iterator[FourBitWeight]:
    """Every weight of four bits.

    Raises:
        InputError: tensors of one are missing, or contradict each other.
    """
    for name in source.infos:
        weight, mark, _ = name.partition(bnb.STATE)
        if mark:
            yield _weight(source, weight, name)


def _weight(source: Source, weight: str, state_name: str) -> FourBitWeight:
    state = bnb.read_state(weight, whole(source, state_name))
    shape, block, offset = tuple(state["shape"]), state["blocksize"], state.get("nested_offset")
    blocks = -(-prod(shape) // block)
    expected = {
        weight: -(-prod(shape) // 2),
        f"{weight}.absmax": blocks * (1 if offset is not None else 4),
        f"{weight}.quant_map": 16 * 4,
    }
    if offset is not None:
        expected[f"{weight}.nested_absmax"] = -(-blocks // NESTED) * 4
        expected[f"{weight}.nested_quant_map"] = 256 * 4
    for name, nbytes in expected.items():
        if name not in source.infos:
            raise InputError("a tensor of a pre-quantised weight is missing", tensor=name)
        if source.infos[name].nbytes != nbytes:
            raise InputError(f"its size is not that of a weight of shape {shape}", tensor=name)
    info = TensorInfo(weight, CODES.get(state["dtype"], ""), shape)
    return FourBitWeight(info, (*expected, state_name), block, offset)
