"""bitsandbytes' eight bits on disk: a scale for each row, by name beside the weight.

Law: the values are those of `int8_vectorwise_dequant` in float32, bit for bit, and new values
become the bytes that `int8_vectorwise_quant` makes of them in float16.

Source: bitsandbytes 0.50, bitsandbytes/functional.py (int8_vectorwise_dequant,
int8_vectorwise_quant).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Array, Quantised, Single
from lorakit.quant.int8 import Int8
from lorakit.quant.spanning import check_finite
from lorakit.quant.stored.weight import taken, whole
from lorakit.tensors import Source, TensorInfo

SCALES, LAYOUT = "SCB", "weight_format"


@dataclass(frozen=True)
class EightBitWeight:
    """A weight of int8 rows."""

    info: TensorInfo
    tensors: tuple[str, ...]

    unit = 1
    span = 0
    coupled = False

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        codes, scales = (taken(source, name, start, stop) for name in self.tensors[:2])
        rows = Quantised(codes.shape, {"codes": codes, "scales": scales.reshape(-1)})
        Int8().dequantise(rows, out=out)

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        return self.tensors[:2]

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Single:
        """As `Written.survey`."""
        check_finite(new)
        return Int8().quantise(new).arrays["scales"]

    def settle(self, source: Source, start: int, seen: list[Single]) -> Single:
        """As `Written.settle`."""
        return np.concatenate(seen)

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        found = Int8().quantise(new)
        out[at * new.shape[1] :][: new.size] = found.arrays["codes"].reshape(-1).view(np.uint8)
        return Int8().dequantise(found)

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """As `Written.beside`."""
        found: Array = scales
        return found


def find(source: Source, config: Mapping[str, Any]) -> Iterator[EightBitWeight]:
    """Every weight with scales of rows by the name that bitsandbytes gives them.

    Raises:
        InputError: its tensors contradict each other, or are in another layout than rows.
    """
    for scales in source.infos:
        module, _, leaf = scales.rpartition(".")
        weight, layout = f"{module}.weight", f"{module}.{LAYOUT}"
        if leaf != SCALES or weight not in source.infos:
            continue
        codes, rows = source.infos[weight], source.infos[scales]
        if codes.dtype != "I8" or len(codes.shape) != 2 or rows.shape != codes.shape[:1]:
            raise InputError("bytes and scales of int8 do not fit each other", tensor=weight)
        told = layout in source.infos
        if told and whole(source, layout).any():
            raise InputError("int8 in another layout than rows", tensor=layout)
        names = (weight, scales, layout) if told else (weight, scales)
        yield EightBitWeight(codes.but(dtype="", start=0), names)
