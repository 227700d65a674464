"""What factors or a product add to a weight, with DoRA's norms or without.

The change of DoRA is float64 in any case, since it is a difference that takes the weight out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.math.lowrank import LowRank, transpose
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.products import Product, plain
from lorakit.math.updates import Update


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

    low: LowRank | Product
    magnitude: Array  # (rows or columns,)
    axis: int
    weight: float = 1.0
    kernel: int = 1
    squares: Array = None  # (columns,), sums over all rows, once settled

    @property
    def depth(self) -> int:
        """How many terms an element of what is added sums."""
        return plain(self.low).depth

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
        inner = xp.abs(w) + plain(self.low).terms(w, start, stop)
        return abs(self.weight) * (ratio * inner + xp.abs(w))

    def _direction(self, w: Array, start: int, stop: int) -> Array:
        return w + plain(self.low).change(w, start, stop)

    def _ratio(self, v: Array, start: int, stop: int) -> Array:
        """Magnitude over norm for the rows `v`, from float64 sums, shaped to multiply them."""
        xp = array_namespace(v)
        rows = slice(start, stop) if self.axis == 0 else slice(None)
        squares = self.squares
        if self.axis == 0:
            squares = xp.sum(xp.astype(v, xp.float64) ** 2, axis=1)
        ratio = xp.astype(self.magnitude[rows], xp.float64) / xp.sqrt(squares)
        return xp.expand_dims(xp.astype(ratio, v.dtype), axis=1 - self.axis)


def on_disk(
    low: LowRank | Product,
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
        low = transpose(low) if isinstance(low, LowRank) else low.turned()
    if magnitude is None:
        return plain(low, weight)
    magnitude = array_namespace(magnitude).reshape(magnitude, (-1,))
    kernel = low.shape[1] // magnitude.shape[0] if inputs and not transposed else 1
    axis = int(transposed != inputs)
    return Decomposed(low, _each(magnitude, kernel), axis, weight, kernel)


def _each(values: Array, times: int) -> Array:
    """Every value so many times, one after the other."""
    xp = array_namespace(values)
    shape = (values.shape[0], times)
    return xp.reshape(xp.broadcast_to(xp.expand_dims(values, axis=1), shape), (-1,))
