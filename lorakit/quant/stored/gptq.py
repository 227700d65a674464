"""GPTQ's integers on disk: words of codes along the inputs, a scale and a zero for each output in a
group of inputs, and by `g_idx` the group of each input.

Law: a value is its scale times the difference of code and zero, in float32. The first format stores
a zero as one less than it is. New values keep the zeros, and the scales of groups that they still
fit; they go to the nearest code, without the errors that GPTQ passes on to later inputs.

Sources: Frantar et al. 2022 (arXiv 2210.17323); AutoGPTQ/AutoGPTQ v0.7.1,
auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py; ModelCloud/GPTQModel, gptqmodel/utils/model.py
(convert_gptq_v1_to_v2_format).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Array, Single
from lorakit.quant.packing import fields, words
from lorakit.quant.spanning import Codes, Extremes, as_stored, grouped, on_grid, spanning, stacked
from lorakit.quant.stored.weight import kept
from lorakit.tensors import Source, TensorInfo

WORDS, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
BITS = (2, 4, 8)
V2 = "gptq_v2"  # the format whose zeros are stored as they are


@dataclass(frozen=True)
class GptqWeight:
    """A weight of codes of `bits`; `lacking` is what has to be added to its zeros."""

    info: TensorInfo
    tensors: tuple[str, ...]
    bits: int
    lacking: int

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        groups, scales, zeros = self._groups(source), *self._beside(source, start, stop)
        np.copyto(out, fields(self._all(source, 0)[:, start:stop].T, self.bits))
        out -= zeros[:, groups]
        out *= scales[:, groups]

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        return (self.tensors[0], self.tensors[2])

    @property
    def unit(self) -> int:
        """As `Written.unit`."""
        return 1

    @property
    def span(self) -> int:
        """As `Written.span`."""
        return self.info.shape[0]

    @property
    def coupled(self) -> bool:
        """As `Written.coupled`."""
        return False

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Extremes:
        """As `Written.survey`."""
        return grouped(w, new, self._groups(source), source.infos[self.tensors[2]].rows)

    def settle(self, source: Source, start: int, seen: list[Extremes]) -> Single:
        """As `Written.settle`, (rows, groups)."""
        found = stacked(seen)
        old, zeros = self._beside(source, start, start + len(found.low))
        limits = Codes(-zeros, np.float32(2**self.bits - 1) - zeros)
        return spanning(old, found, limits, source.infos[self.tensors[2]].dtype)

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        groups, stop = self._groups(source), start + len(new)
        zeros = self._beside(source, start, stop)[1][:, groups]
        spread = scales[:, groups]
        codes = np.clip(np.rint(on_grid(new, spread)) + zeros, 0, 2**self.bits - 1)
        place = out.view("<i4").reshape(-1, self.info.shape[0])[:, at : at + len(new)]
        place[:] = words(codes.astype(np.uint8), self.bits).T
        values: Single = (codes - zeros) * spread
        return values

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """As `Written.beside`."""
        return as_stored(scales.T, source.infos[name].dtype)

    def _all(self, source: Source, number: int) -> Array:
        name = self.tensors[number]
        return kept(source, name, 0, source.infos[name].rows)

    def _groups(self, source: Source) -> Array:
        """The group of each input."""
        if len(self.tensors) > 3:
            return self._all(source, 3).reshape(-1)
        inputs = self.info.shape[1]
        return np.arange(inputs) * source.infos[self.tensors[2]].rows // inputs

    def _beside(self, source: Source, start: int, stop: int) -> tuple[Single, Single]:
        """The scales and the zeros of some rows, (rows, groups)."""
        first, in_word = start * self.bits // 32, 32 // self.bits
        zeros = fields(self._all(source, 1)[:, first : -(-stop // in_word)], self.bits)
        zeros = zeros[:, start - first * in_word :][:, : stop - start].astype(np.float32)
        scales = self._all(source, 2)[:, start:stop].astype(np.float32)
        return scales.T, zeros.T + np.float32(self.lacking)


def find(source: Source, config: Mapping[str, Any]) -> Iterator[GptqWeight]:
    """Every weight in words along its inputs, of 2, 4 or 8 bits.

    Raises:
        InputError: its tensors contradict each other.
    """
    lacking = 0 if config.get("checkpoint_format") == V2 else 1
    for name, codes in source.infos.items():
        front = name.removesuffix(WORDS)
        zeros, scales, groups = (source.infos.get(front + n) for n in (ZEROS, SCALES, GROUPS))
        if front == name or zeros is None or scales is None or not scales.numel:
            continue
        bits = 32 * zeros.cols // scales.cols
        if codes.cols != scales.cols or bits not in BITS:
            continue  # of another layout
        shape = scales.cols, codes.rows * 32 // bits
        grouped = groups.numel == shape[1] if groups else shape[1] % scales.rows == 0
        if scales.rows != zeros.rows or not grouped:
            raise InputError("its scales, zeros and groups do not fit its codes", tensor=name)
        names = tuple(t.name for t in (codes, zeros, scales, groups) if t)
        yield GptqWeight(TensorInfo(f"{front}weight", "", shape), names, bits, lacking)
