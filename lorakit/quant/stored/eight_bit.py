"""bitsandbytes' eight bits on disk: a scale for each row, by name beside the weight.

Law: the values are those of `int8_vectorwise_dequant` in float32, bit for bit.

Source: bitsandbytes 0.50, bitsandbytes/functional.py (int8_vectorwise_dequant).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.errors import InputError
from lorakit.quant.codec import Quantised, Single
from lorakit.quant.int8 import Int8
from lorakit.quant.stored.weight import taken, whole
from lorakit.tensors import Source, TensorInfo

SCALES, LAYOUT = "SCB", "weight_format"


@dataclass(frozen=True)
class EightBitWeight:
    """A weight of int8 rows."""

    info: TensorInfo
    tensors: tuple[str, ...]

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        codes, scales = (taken(source, name, start, stop) for name in self.tensors[:2])
        rows = Quantised(codes.shape, {"codes": codes, "scales": scales.reshape(-1)})
        Int8().dequantise(rows, out=out)


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
