"""GPTQ's integers on disk: words of codes along the inputs, a scale and a zero for each output in a
group of inputs, and by `g_idx` the group of each input.

Law: a value is its scale times the difference of code and zero, in float32. The first format stores
a zero as one less than it is.

Sources: Frantar et al. 2022 (arXiv 2210.17323); AutoGPTQ/AutoGPTQ v0.7.1,
auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py; ModelCloud/GPTQModel, gptqmodel/utils/model.py
(convert_gptq_v1_to_v2_format).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Single
from lorakit.quant.packing import fields
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
        rows = slice(start, stop)
        words, zeros, scales, *groups = (
            kept(source, name, 0, source.infos[name].rows) for name in self.tensors
        )
        inputs = np.arange(out.shape[1])
        of_input = groups[0].reshape(-1) if groups else inputs * len(scales) // len(inputs)
        points = fields(zeros, self.bits)[:, rows].astype(np.float32) + np.float32(self.lacking)
        np.copyto(out, fields(words[:, rows].T, self.bits))
        out -= points.T[:, of_input]
        out *= scales[:, rows].astype(np.float32).T[:, of_input]


def find(source: Source, config: Mapping[str, Any]) -> Iterator[GptqWeight]:
    """Every weight in words along its inputs, of 2, 4 or 8 bits.

    Raises:
        InputError: its tensors contradict each other.
    """
    lacking = 0 if config.get("checkpoint_format") == V2 else 1
    for name, words in source.infos.items():
        front = name.removesuffix(WORDS)
        zeros, scales, groups = (source.infos.get(front + n) for n in (ZEROS, SCALES, GROUPS))
        if front == name or zeros is None or scales is None or not scales.numel:
            continue
        bits = 32 * zeros.cols // scales.cols
        if words.cols != scales.cols or bits not in BITS:
            continue  # of another layout
        shape = scales.cols, words.rows * 32 // bits
        grouped = groups.numel == shape[1] if groups else shape[1] % scales.rows == 0
        if scales.rows != zeros.rows or not grouped:
            raise InputError("its scales, zeros and groups do not fit its codes", tensor=name)
        names = tuple(t.name for t in (words, zeros, scales, groups) if t)
        yield GptqWeight(TensorInfo(f"{front}weight", "", shape), names, bits, lacking)
