"""Updates of one weight, evaluated in blocks of rows of the weight as it lies on disk.

An update answers one question: by how much do rows `start` to `stop` change, given those rows? Some
need to have seen every row before (norms over columns); they are shown the weight once beforehand:
`survey` of each block, then `settle` with all of these in the order of the rows.

All of it is computed in the dtype of the rows that are passed in: float32, or float64 for a check.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import frexp
from typing import Any, Protocol, Self, TypeGuard

from lorakit.math.lowrank import LowRank, absolute
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.product import product


class Update(Protocol):
    """The change of a weight of shape (rows, cols)."""

    @property
    def depth(self) -> int:
        """How many terms an element of the change sums: the rank, or 1."""
        ...

    @property
    def surveys(self) -> bool:
        """Whether the whole weight has to be surveyed before `change` is asked."""
        ...

    def change(self, w: Array, start: int, stop: int) -> Array:
        """By how much rows `start` to `stop`, which are `w`, change: (stop - start, cols)."""
        ...

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """The sum of the absolute values of all terms of `change`, which bounds its rounding."""
        ...


class Surveyed(Update, Protocol):
    """One that has to see the whole weight first."""

    def survey(self, w: Array, start: int, stop: int) -> Any:
        """What `settle` needs to know of rows `start` to `stop`, which are `w`."""
        ...

    def settle(self, seen: Sequence[Any]) -> Self:
        """The update that knows the whole weight."""
        ...


def surveys(update: Update) -> TypeGuard[Surveyed]:
    """Whether an update has to see the whole weight first."""
    return update.surveys


@dataclass(frozen=True)
class Added:
    """`weight * scaling * b @ a`, the plain LoRA update (Hu et al. 2021)."""

    low: LowRank
    weight: float = 1.0
    surveys = False

    @property
    def depth(self) -> int:
        """The rank."""
        return self.low.rank

    @cached_property
    def factors(self) -> tuple[Array, Array, float]:
        """`a`, `b` and the factor still to be multiplied in after the product.

        A power of two is multiplied into `b`, where it is exact; anything else after the product,
        which is what rounds least (and as PEFT does).
        """
        factor = self.low.scaling * self.weight
        if abs(frexp(factor)[0]) == 0.5:
            return self.low.a, self.low.b * factor, 1.0
        return self.low.a, self.low.b, factor

    def change(self, w: Array, start: int, stop: int) -> Array:
        """`weight * scaling * b[start:stop] @ a`."""
        xp = array_namespace(w)
        a, b, factor = self.factors
        delta = product(xp.astype(b[start:stop], w.dtype), xp.astype(a, w.dtype))
        return delta if factor == 1.0 else factor * delta

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """`|weight * scaling| * |b[start:stop]| @ |a|`."""
        return Added(absolute(self.low), abs(self.weight)).change(w, start, stop)


@dataclass(frozen=True)
class Dense:
    """`weight * values`: a change that is there as it is."""

    values: Array  # (rows, cols)
    weight: float
    surveys = False
    depth = 1

    def change(self, w: Array, start: int, stop: int) -> Array:
        """`weight * values[start:stop]`."""
        return self.weight * array_namespace(w).astype(self.values[start:stop, :], w.dtype)

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """The absolute value of the change."""
        return array_namespace(w).abs(self.change(w, start, stop))


@dataclass(frozen=True)
class Toward:
    """A step towards another weight: the change is `weight * (values - w)`, but 0 in rows that are
    `replaced`, and so no longer those that the step is taken from.
    """

    values: Array  # (rows, cols), or anything that gives rows of it when sliced
    weight: float
    replaced: frozenset[int] = frozenset()
    surveys = False
    depth = 1

    def change(self, w: Array, start: int, stop: int) -> Array:
        """`weight * (values[start:stop] - w)`."""
        xp = array_namespace(w)
        found = self.weight * (xp.astype(self.values[start:stop], w.dtype) - w)
        for row in self.replaced:
            if start <= row < stop:
                found[row - start, ...] = 0.0
        return found

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """`|weight| * (|values| + |w|)`."""
        xp = array_namespace(w)
        values = xp.astype(self.values[start:stop], w.dtype)
        return abs(self.weight) * (xp.abs(values) + xp.abs(w))
