"""compressed-tensors' packed integers: words of codes along the inputs, each stored from zero up,
with a scale for each group of them, and no zero points.

Law: a value is its number, the code less half of what there are, times its scale, in float32.

Source: vllm-project/compressed-tensors, compressors/quantized_compressors/pack_quantized.py
(unpack_from_int32).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Single
from lorakit.quant.packing import fields
from lorakit.quant.stored.weight import OTHERS, taken, whole
from lorakit.tensors import Source, TensorInfo

WORDS, SCALES, SHAPE = "weight_packed", "weight_scale", "weight_shape"
BITS = (2, 4, 8)


@dataclass(frozen=True)
class PackedWeight:
    """A weight of codes of `bits`."""

    info: TensorInfo
    tensors: tuple[str, ...]
    bits: int

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        words, scales = (taken(source, name, start, stop) for name in self.tensors[:2])
        inputs = out.shape[1]
        np.copyto(out, fields(words, self.bits)[:, :inputs])
        out -= np.float32(2 ** (self.bits - 1))
        of_input = np.arange(inputs) * scales.shape[1] // inputs
        out *= scales.astype(np.float32)[:, of_input]


def find(source: Source, config: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """Every weight in words along its inputs, of 2, 4 or 8 bits.

    Raises:
        InputError: its tensors contradict each other.
    """
    for name, words in source.infos.items():
        front = name.removesuffix(WORDS)
        if front == name or any(front + n in source.infos for n in OTHERS):
            continue
        scales = source.infos.get(front + SCALES)
        if scales is None or front + SHAPE not in source.infos:
            raise InputError("its scales or its shape are missing", tensor=name)
        rows, inputs = (int(n) for n in whole(source, front + SHAPE).reshape(2))
        bits = next((b for b in BITS if -(-inputs * b // 32) == words.cols), 0)
        fits = {words.rows, scales.rows} == {rows} and scales.cols and inputs % scales.cols == 0
        if not bits or not fits:
            raise InputError("its scales and its shape do not fit its codes", tensor=name)
        info = TensorInfo(f"{front}weight", "", (rows, inputs))
        yield PackedWeight(info, (name, scales.name, front + SHAPE), bits)
