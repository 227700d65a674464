"""Updates of one weight, evaluated in blocks of rows of the weight as it lies on disk.

An update answers one question: by how much do rows `start` to `stop` change, given those rows? Some
need to have seen every row before (norms over columns); they are shown the weight once beforehand:
`survey` of each block, then `settle` with all of these in the order of the rows.

All of it is computed in the dtype of the rows that are passed in: float32, or float64 for a check.
Only DoRA's change is float64 in any case, since it is a difference that takes the weight out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import frexp
from typing import Any, Protocol, Self, TypeGuard

from lorakit.math.lowrank import LowRank, transpose
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
        xp = array_namespace(w)
        low = LowRank(xp.abs(self.low.a), xp.abs(self.low.b), abs(self.low.scaling))
        return Added(low, abs(self.weight)).change(w, start, stop)


@dataclass(frozen=True)
class Decomposed:
    """DoRA: every output unit of `V = w + scaling * b @ a` is given the norm `magnitude`.

    The change is `weight * (magnitude / norm(V) * V - w)`, with the norms of the original weight,
    however many updates there are. `axis` says where output units lie on disk: 0 where each is a
    row (Linear, convolutions), 1 where each is a column (GPT-2's Conv1D, embeddings): then norms
    run over all rows, and the weight has to be surveyed. LyCORIS has norms of inputs instead, with
    `kernel` columns each.

    Source: Liu et al. 2024 (DoRA, arXiv 2402.09353), equation 5; KohakuBlueleaf/LyCORIS,
    lycoris/modules/locon.py (wd_on_output).
    """

    low: LowRank
    magnitude: Array  # (rows or columns,)
    axis: int
    weight: float = 1.0
    kernel: int = 1
    squares: Array = None  # (columns,), sums over all rows, once settled

    @property
    def depth(self) -> int:
        """The rank."""
        return self.low.rank

    @property
    def surveys(self) -> bool:
        """Whether the norms are still to be found."""
        return self.axis == 1 and self.squares is None

    def survey(self, w: Array, start: int, stop: int) -> Array:
        """The sums of squares over these rows, by column, in float64."""
        xp = array_namespace(w)
        return xp.sum(xp.astype(self._direction(w, start, stop), xp.float64) ** 2, axis=0)

    def settle(self, seen: Sequence[Array]) -> "Decomposed":
        """The update with its norms, added up in the order of the rows."""
        squares = sum(seen[1:], start=seen[0])
        if self.kernel > 1:
            xp = array_namespace(squares)
            units = xp.sum(xp.reshape(squares, (-1, self.kernel)), axis=1)
            squares = _each(units, self.kernel)
        return replace(self, squares=squares)

    def change(self, w: Array, start: int, stop: int) -> Array:
        """`weight * (magnitude / norm(V) * V - w)` for these rows."""
        xp = array_namespace(w)
        v = xp.astype(self._direction(w, start, stop), xp.float64)
        return self.weight * (self._ratio(v, start, stop) * v - xp.astype(w, xp.float64))

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """`|weight| * (magnitude / norm(V) * (|w| + |scaling| * |b| @ |a|) + |w|)`."""
        xp = array_namespace(w)
        ratio = xp.abs(self._ratio(self._direction(w, start, stop), start, stop))
        inner = xp.abs(w) + Added(self.low).terms(w, start, stop)
        return abs(self.weight) * (ratio * inner + xp.abs(w))

    def _direction(self, w: Array, start: int, stop: int) -> Array:
        return w + Added(self.low).change(w, start, stop)

    def _ratio(self, v: Array, start: int, stop: int) -> Array:
        """Magnitude over norm for the rows `v`, from float64 sums, shaped to multiply them."""
        xp = array_namespace(v)
        rows = slice(start, stop) if self.axis == 0 else slice(None)
        squares = self.squares
        if self.axis == 0:
            squares = xp.sum(xp.astype(v, xp.float64) ** 2, axis=1)
        ratio = xp.astype(self.magnitude[rows], xp.float64) / xp.sqrt(squares)
        return xp.expand_dims(xp.astype(ratio, v.dtype), axis=1 - self.axis)


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


def on_disk(
    low: LowRank,
    magnitude: Array,
    *,
    transposed: bool,
    weight: float = 1.0,
    inputs: bool = False,
) -> Update:
    """The update for a weight on disk that is (out, in), or (in, out) if `transposed`.

    With a `magnitude` (any shape with one element an output unit, or if `inputs` an input) it is
    DoRA, without (None) plain.
    """
    if transposed:
        low = transpose(low)
    if magnitude is None:
        return Added(low, weight)
    magnitude = array_namespace(magnitude).reshape(magnitude, (-1,))
    kernel = low.shape[1] // magnitude.shape[0] if inputs and not transposed else 1
    axis = int(transposed != inputs)
    return Decomposed(low, _each(magnitude, kernel), axis, weight, kernel)


def _each(values: Array, times: int) -> Array:
    """Every value so many times, one after the other."""
    xp = array_namespace(values)
    shape = (values.shape[0], times)
    return xp.reshape(xp.broadcast_to(xp.expand_dims(values, axis=1), shape), (-1,))
