"""One tensor of a stored weight as new values make it: what a fold into it is put on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm, prod
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Array
from lorakit.quant.stored.weight import Written
from lorakit.tensors import Source

HINT = "Merge with --quant keep-touched or dequantize."


@dataclass(frozen=True)
class StoredTensor:
    """A `lorakit.math.grid.Grid`; `source` has the tensors of the weight as they are. The first
    `leading` dimensions make the rows.
    """

    weight: Written
    source: Source
    name: str
    leading: int = 1
    scales: Any = None

    @property
    def codes(self) -> bool:
        """As `Grid.codes`."""
        return self.name == self.weight.remade[0]

    @property
    def coupled(self) -> bool:
        """Whether all rows have to be surveyed before any can be encoded."""
        return self.weight.coupled

    @property
    def unit(self) -> int:
        """Rows that are encoded at once, or several times as many."""
        return self._whole(self.weight.unit)

    @property
    def span(self) -> int:
        """Rows whose part of the tensor is a run of bytes; 0 where that of any unit is."""
        return self._whole(self.weight.span)

    def survey(self, w: Array, new: Array, start: int) -> Any:
        """As `Grid.survey`."""
        first = start * self._each
        try:
            return self.weight.survey(self.source, self._matrix(w), self._matrix(new), first)
        except InputError as error:
            name = self.weight.info.name
            said = f"{name!r}: {error.message.rstrip('.')}."
            raise InputError(said, hint=error.hint or HINT, tensor=name) from error

    def settled(self, seen: Sequence[Any], start: int = 0) -> "StoredTensor":
        """As `Grid.settled`."""
        scales = self.weight.settle(self.source, start * self._each, list(seen))
        return replace(self, scales=scales)

    def encode(self, new: Array, start: int, out: Array, at: int) -> Array:
        """As `Grid.encode`."""
        where = start * self._each, self.scales, out, at * self._each
        return self.weight.encode(self.source, self._matrix(new), *where).reshape(new.shape)

    def held(self, source: Source, start: int, stop: int) -> Array:
        """The values of these rows by what `source` has of the weight: (stop - start, columns)."""
        out = np.empty(((stop - start) * self._each, self.weight.info.shape[-1]), np.float32)
        self.weight.values(source, start * self._each, stop * self._each, out)
        return out.reshape(stop - start, -1)

    def beside(self) -> Array:
        """As `Grid.beside`."""
        return self.weight.beside(self.source, self.name, self.scales)

    @cached_property
    def _each(self) -> int:
        """How many of the weight's rows one is."""
        return prod(self.weight.info.shape[self.leading : -1])

    def _whole(self, rows: int) -> int:
        return lcm(rows, self._each) // self._each if rows else 0

    def _matrix(self, x: Array) -> Array:
        return x.reshape(-1, self.weight.info.shape[-1])
