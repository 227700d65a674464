"""bitsandbytes' four bits on disk: blocks of codes over the elements in their order, across rows.

Law: the values are those of `dequantize_4bit` in float32, bit for bit.

Source: bitsandbytes 0.50, bitsandbytes/functional.py (QuantState.from_dict, dequantize_4bit).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant import bnb, packing
from lorakit.quant.codec import Array, Single
from lorakit.quant.nested import BLOCK as NESTED
from lorakit.quant.nested import Nested, unnest
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
        group, groups = begin // NESTED, -(-end // NESTED)
        count = source.infos[f"{name}.absmax"].numel
        bytewise = taken(source, f"{name}.absmax", group * NESTED, min(groups * NESTED, count))
        absmax = taken(source, f"{name}.nested_absmax", group, groups).reshape(-1)
        levels = whole(source, f"{name}.nested_quant_map").reshape(-1)
        scales = unnest(Nested(bytewise.reshape(-1), absmax, levels, self.offset))
        return scales[begin - group * NESTED :][: end - begin]


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
