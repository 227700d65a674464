"""AWQ's four bits on disk (version gemm): words of codes along the outputs, which are shuffled in
each, a scale and a zero for each output in a group of inputs.

Law: as `lorakit.quant.stored.grouped` says.

Sources: Lin et al. 2023 (arXiv 2306.00978); casper-hansen/AutoAWQ v0.2.9,
awq/utils/packing_utils.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Array, Single
from lorakit.quant.packing import fields, words
from lorakit.quant.stored.grouped import Grouped
from lorakit.tensors import Source, TensorInfo

WORDS, ZEROS, SCALES = "qweight", "qzeros", "scales"
BITS, IN_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each output is


class AwqWeight(Grouped):
    """A weight of codes of four bits in words along its outputs."""

    unit = IN_WORD

    def codes(self, source: Source, start: int, stop: int) -> Array:
        """As `Grouped.codes`."""
        return _outputs(self.whole(source, 0), start, stop).T

    def zeros(self, source: Source, start: int, stop: int) -> Single:
        """As `Grouped.zeros`."""
        zeros: Single = _outputs(self.whole(source, 1), start, stop).astype(np.float32).T
        return zeros

    def put(self, codes: Array, out: Array, at: int) -> None:
        """As `Grouped.put`."""
        place = out.reshape(codes.shape[1], -1)[:, at // IN_WORD :]
        place[:, : len(codes) // IN_WORD] = _in_words(codes.T)


def find(source: Source, config: Mapping[str, Any]) -> Iterator[AwqWeight]:
    """Every weight in words along its outputs.

    Raises:
        InputError: its tensors contradict each other, or lie as another version has them.
    """
    for name, codes in source.infos.items():
        front = name.removesuffix(WORDS)
        zeros, scales = (source.infos.get(front + n) for n in (ZEROS, SCALES))
        if front == name or zeros is None or scales is None or not scales.numel:
            continue
        if codes.cols * IN_WORD != scales.cols:
            continue  # of another layout
        if zeros.shape != (scales.rows, codes.cols) or codes.rows % scales.rows:
            raise InputError("its scales and zeros do not fit its codes", tensor=name)
        if (version := str(config.get("version") or "gemm").lower()) != "gemm":
            raise InputError(f"lies as version {version!r} has it, not gemm", tensor=name)
        info = TensorInfo(f"{front}weight", "", (scales.cols, codes.rows))
        yield AwqWeight(info, (name, zeros.name, scales.name), BITS)


def _outputs(packed: Array, start: int, stop: int) -> Array:
    """The codes of some outputs, (rows, stop - start)."""
    first = start // IN_WORD
    found = fields(packed[:, first : -(-stop // IN_WORD)], BITS).reshape(len(packed), -1, IN_WORD)
    ordered = found[:, :, PLACES].reshape(len(packed), -1)
    return ordered[:, start - first * IN_WORD :][:, : stop - start]


def _in_words(codes: Array) -> Array:
    """The inverse, for all outputs of whole words: (inputs, outputs / 8)."""
    ordered = codes.reshape(len(codes), -1, IN_WORD)
    placed = np.empty_like(ordered)
    placed[:, :, PLACES] = ordered
    return words(placed.reshape(codes.shape), BITS)
