"""Integers in words of 32 bits, with a scale and a zero for each output in a group of inputs: what
GPTQ and AWQ have in common.

Law: a value is its scale times the difference of code and zero, in float32. New values keep the
zeros, and the scales of groups that they still fit, and go to the nearest code.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.quant.codec import Array, Single
from lorakit.quant.spanning import Codes, Extremes, as_stored, grouped, on_grid, spanning, stacked
from lorakit.quant.stored.weight import kept
from lorakit.tensors import Source, TensorInfo


@dataclass(frozen=True)
class Grouped(ABC):
    """A weight of codes of `bits`. Its tensors are codes, zeros and scales, and where there is one
    the group of each input.
    """

    info: TensorInfo
    tensors: tuple[str, ...]
    bits: int

    coupled = False

    @property
    @abstractmethod
    def unit(self) -> int:
        """As `Written.unit`."""

    @abstractmethod
    def codes(self, source: Source, start: int, stop: int) -> Array:
        """Those of some rows, (stop - start, columns)."""

    @abstractmethod
    def zeros(self, source: Source, start: int, stop: int) -> Single:
        """Those of some rows, (stop - start, groups)."""

    @abstractmethod
    def put(self, codes: Array, out: Array, at: int) -> None:
        """Pack the codes of some rows into `out`, words in which they are the rows from `at` on."""

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        groups = self._groups(source)
        np.copyto(out, self.codes(source, start, stop))
        out -= self.zeros(source, start, stop)[:, groups]
        out *= self._scales(source, start, stop)[:, groups]

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        return (self.tensors[0], self.tensors[2])

    @property
    def span(self) -> int:
        """As `Written.span`."""
        return self.info.shape[0]

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Extremes:
        """As `Written.survey`."""
        return grouped(w, new, self._groups(source), source.infos[self.tensors[2]].rows)

    def settle(self, source: Source, start: int, seen: list[Extremes]) -> Single:
        """As `Written.settle`, (rows, groups)."""
        found = stacked(seen)
        stop = start + len(found.low)
        old, zeros = self._scales(source, start, stop), self.zeros(source, start, stop)
        limits = Codes(-zeros, np.float32(2**self.bits - 1) - zeros)
        return spanning(old, found, limits, source.infos[self.tensors[2]].dtype)

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        groups = self._groups(source)
        zeros, spread = self.zeros(source, start, start + len(new))[:, groups], scales[:, groups]
        codes = np.clip(np.rint(on_grid(new, spread)) + zeros, 0, 2**self.bits - 1)
        self.put(codes.astype(np.uint8), out.view("<i4"), at)
        values: Single = (codes - zeros) * spread
        return values

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """As `Written.beside`."""
        return as_stored(scales.T, source.infos[name].dtype)

    def whole(self, source: Source, number: int) -> Array:
        """All of one of its tensors."""
        name = self.tensors[number]
        return kept(source, name, 0, source.infos[name].rows)

    def _scales(self, source: Source, start: int, stop: int) -> Single:
        scales: Single = self.whole(source, 2)[:, start:stop].astype(np.float32).T
        return scales

    def _groups(self, source: Source) -> Array:
        """The group of each input."""
        if len(self.tensors) > 3:
            return self.whole(source, 3).reshape(-1)
        inputs = self.info.shape[1]
        return np.arange(inputs) * source.infos[self.tensors[2]].rows // inputs
