"""AWQ's four bits on disk (version gemm): words of codes along the outputs, which are shuffled in
each, a scale and a zero for each output in a group of inputs.

Law: a value is its scale times the difference of code and zero, in float32. New values keep the
zeros, and the scales of groups that they still fit, and go to the nearest code.

Sources: Lin et al. 2023 (arXiv 2306.00978); casper-hansen/AutoAWQ v0.2.9,
awq/utils/packing_utils.py.
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
        groups, scales, zeros = self._groups(source), *self._beside(source, start, stop)
        np.copyto(out, _outputs(self._all(source, 0), start, stop).T)
        out -= zeros[:, groups]
        out *= scales[:, groups]

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        return (self.tensors[0], self.tensors[2])

    @property
    def unit(self) -> int:
        """As `Written.unit`."""
        return IN_WORD

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
        limits = Codes(-zeros, np.float32(2**BITS - 1) - zeros)
        return spanning(old, found, limits, source.infos[self.tensors[2]].dtype)

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        groups, stop = self._groups(source), start + len(new)
        zeros = self._beside(source, start, stop)[1][:, groups]
        spread = scales[:, groups]
        codes = np.clip(np.rint(on_grid(new, spread)) + zeros, 0, 2**BITS - 1)
        place = out.view("<i4").reshape(new.shape[1], -1)
        place[:, at // IN_WORD :][:, : len(new) // IN_WORD] = _in_words(codes.astype(np.uint8).T)
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
        inputs = self.info.shape[1]
        return np.arange(inputs) * source.infos[self.tensors[2]].rows // inputs

    def _beside(self, source: Source, start: int, stop: int) -> tuple[Single, Single]:
        """The scales and the zeros of some rows, (rows, groups)."""
        zeros = _outputs(self._all(source, 1), start, stop).astype(np.float32)
        scales = self._all(source, 2)[:, start:stop].astype(np.float32)
        return scales.T, zeros.T


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
        yield AwqWeight(info, (name, zeros.name, scales.name))


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
