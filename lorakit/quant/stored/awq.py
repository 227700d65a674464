"""AWQ's four bits on disk (version gemm): words of codes along the outputs, which are shuffled in
each, a scale and a zero for each output in a group of inputs.

Law: a value is its scale times the difference of code and zero, in float32.

Sources: Lin et al. 2023 (arXiv 2306.00978); casper-hansen/AutoAWQ v0.2.9,
awq/utils/packing_utils.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Array, Single
from lorakit.quant.packing import fields
from lorakit.quant.stored.weight import kept
from lorakit.tensors import Source, TensorInfo

WORDS, ZEROS, SCALES = "qweight", "qzeros", "scales"
BITS, IN_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each output is


@dataclass(frozen=True)
class AwqWeight:
    """A weight of codes of four bits."""

    info: TensorInfo
    tensors: tuple[str, ...]

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        codes, zeros, scales = (
            kept(source, name, 0, source.infos[name].rows) for name in self.tensors
        )
        inputs = len(codes)
        of_input = np.arange(inputs) * len(scales) // inputs
        np.copyto(out, _outputs(codes, start, stop).T)
        out -= _outputs(zeros, start, stop)[of_input].T
        out *= scales[:, start:stop].astype(np.float32)[of_input].T


def find(source: Source, config: Mapping[str, Any]) -> Iterator[AwqWeight]:
    """Every weight in words along its outputs.

    Raises:
        InputError: its tensors contradict each other, or lie as another version has them.
    """
    for name, words in source.infos.items():
        front = name.removesuffix(WORDS)
        zeros, scales = (source.infos.get(front + n) for n in (ZEROS, SCALES))
        if front == name or zeros is None or scales is None or not scales.numel:
            continue
        if words.cols * IN_WORD != scales.cols:
            continue  # of another layout
        if zeros.shape != (scales.rows, words.cols) or words.rows % scales.rows:
            raise InputError("its scales and zeros do not fit its codes", tensor=name)
        if (version := str(config.get("version") or "gemm").lower()) != "gemm":
            raise InputError(f"lies as version {version!r} has it, not gemm", tensor=name)
        info = TensorInfo(f"{front}weight", "", (scales.cols, words.rows))
        yield AwqWeight(info, (name, zeros.name, scales.name))


def _outputs(words: Array, start: int, stop: int) -> Array:
    """The codes of some outputs, (rows, stop - start)."""
    first = start // IN_WORD
    found = fields(words[:, first : -(-stop // IN_WORD)], BITS).reshape(len(words), -1, IN_WORD)
    ordered = found[:, :, PLACES].reshape(len(words), -1)
    return ordered[:, start - first * IN_WORD :][:, : stop - start]
