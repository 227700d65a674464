"""GPTQ's integers on disk: words of codes along the inputs, a scale and a zero for each output in a
group of inputs, and by `g_idx` the group of each input.

Law: as `lorakit.quant.stored.grouped` says. The first format stores a zero as one less than it is.
New values do not take on the errors that GPTQ passes on to later inputs.

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
from lorakit.quant.stored.grouped import Grouped
from lorakit.tensors import Source, TensorInfo

WORDS, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
BITS = (2, 4, 8)
V2 = "gptq_v2"  # the format whose zeros are stored as they are


@dataclass(frozen=True)
class GptqWeight(Grouped):
    """A weight in words along its inputs; `lacking` is what has to be added to its zeros."""

    lacking: int

    unit = 1

    def codes(self, source: Source, start: int, stop: int) -> Array:
        """As `Grouped.codes`."""
        return fields(self.whole(source, 0)[:, start:stop].T, self.bits)

    def zeros(self, source: Source, start: int, stop: int) -> Single:
        """As `Grouped.zeros`: they lie in words along the outputs."""
        first, in_word = start * self.bits // 32, 32 // self.bits
        found = fields(self.whole(source, 1)[:, first : -(-stop // in_word)], self.bits)
        found = found[:, start - first * in_word :][:, : stop - start].astype(np.float32)
        zeros: Single = found.T + np.float32(self.lacking)
        return zeros

    def put(self, codes: Array, out: Array, at: int) -> None:
        """As `Grouped.put`."""
        place = out.reshape(-1, self.info.shape[0])[:, at : at + len(codes)]
        place[:] = words(codes, self.bits).T


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
