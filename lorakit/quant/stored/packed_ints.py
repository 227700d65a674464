"""compressed-tensors' packed integers: words of codes along the inputs, each stored from zero up,
with a scale for each group of them, and no zero points.

Law: a value is its number, the code less half of what there are, times its scale, in float32. New
values keep the scales of groups that they still fit.

Source: vllm-project/compressed-tensors, compressors/quantized_compressors/pack_quantized.py
(unpack_from_int32,
pack_to_int32).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Array, Single
from lorakit.quant.packing import fields, words
from lorakit.quant.spanning import Codes, Extremes, as_stored, grouped, on_grid, spanning, stacked
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
    groups: int  # in a row

    unit = 1
    span = 0
    coupled = False

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        codes, scales = (taken(source, name, start, stop) for name in self.tensors[:2])
        inputs = out.shape[1]
        np.copyto(out, fields(codes, self.bits)[:, :inputs])
        out -= np.float32(2 ** (self.bits - 1))
        out *= scales.astype(np.float32)[:, self._groups(scales.shape[1])]

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        return self.tensors[:2]

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Extremes:
        """As `Written.survey`."""
        return grouped(w, new, self._groups(self.groups), self.groups)

    def settle(self, source: Source, start: int, seen: list[Extremes]) -> Single:
        """As `Written.settle`."""
        found = stacked(seen)
        old = taken(source, self.tensors[1], start, start + len(found.low)).astype(np.float32)
        return spanning(old, found, self._limits, source.infos[self.tensors[1]].dtype)

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        spread = scales[:, self._groups(self.groups)]
        numbers = np.clip(np.rint(on_grid(new, spread)), *self._limits[:2])
        half = np.float32(2 ** (self.bits - 1))
        packed = words((numbers + half).astype(np.uint8), self.bits).reshape(-1).view(np.uint8)
        width = packed.size // len(new)
        out[at * width :][: packed.size] = packed
        numbers *= spread
        return numbers

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """As `Written.beside`."""
        return as_stored(scales, source.infos[name].dtype)

    @property
    def _limits(self) -> Codes:
        half = 2 ** (self.bits - 1)
        return Codes(-half, half - 1)

    def _groups(self, count: int) -> Array:
        """The group of each input."""
        inputs = self.info.shape[1]
        return np.arange(inputs) * count // inputs


def find(source: Source, config: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """Every weight in words along its inputs, of 2, 4 or 8 bits.

    Raises:
        InputError: its tensors contradict each other.
    """
    for name, codes in source.infos.items():
        front = name.removesuffix(WORDS)
        if front == name or any(front + n in source.infos for n in OTHERS):
            continue
        scales = source.infos.get(front + SCALES)
        if scales is None or front + SHAPE not in source.infos:
            raise InputError("its scales or its shape are missing", tensor=name)
        rows, inputs = (int(n) for n in whole(source, front + SHAPE).reshape(2))
        bits = next((b for b in BITS if -(-inputs * b // 32) == codes.cols), 0)
        fits = {codes.rows, scales.rows} == {rows} and scales.cols and inputs % scales.cols == 0
        if not bits or not fits:
            raise InputError("its scales and its shape do not fit its codes", tensor=name)
        info = TensorInfo(f"{front}weight", "", (rows, inputs))
        yield PackedWeight(info, (name, scales.name, front + SHAPE), bits, scales.cols)
