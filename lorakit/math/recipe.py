"""What becomes of one weight: rows replaced, updates summed, rounded once.

Law: the result is `round(w + sum of changes)` where `w` is the weight after its replaced rows;
every change is taken of that `w`, so the order of the updates does not matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from lorakit.math.grid import Grid
from lorakit.math.lowrank import cat
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.stacked import Stacked
from lorakit.math.updates import Added, Toward, Update, surveys

Put = Callable[[Array], Array]


@dataclass(frozen=True)
class Rows:
    """New values for some rows of a weight, or with a `weight` a step of that size towards them."""

    indices: Array  # (n,) integers
    values: Array  # (n, cols)
    weight: float = 1.0

    def place(self, w: Array, start: int, stop: int) -> None:
        """Overwrite, in `w`, those of its rows `start` to `stop` that have new values."""
        for index, value in zip(self.indices, self.values, strict=True):
            if start <= index < stop:
                old = w[int(index) - start, ...]
                new = value if self.weight == 1.0 else old + self.weight * (value - old)
                w[int(index) - start, ...] = new

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """The sum of the absolute values of all terms of `place`, 0 where nothing is computed."""
        xp = array_namespace(w)
        found = xp.zeros_like(w)
        if self.weight != 1.0:
            for index, value in zip(self.indices, self.values, strict=True):
                if start <= index < stop:
                    at = int(index) - start
                    old = xp.abs(w[at, ...])
                    found[at, ...] = old + abs(self.weight) * (xp.abs(value) + old)
        return found


@dataclass(frozen=True)
class Recipe:
    """The replaced rows and the updates of one weight, and the grid that the sums are put on, where
    they are not rounded to a dtype.
    """

    rows: Sequence[Rows] = ()
    updates: Sequence[Update] = field(default=())
    grid: Grid | None = None

    @property
    def surveys(self) -> bool:
        """Whether some update has to see the whole weight first."""
        return any(u.surveys for u in self.updates)

    def begin(self, w: Array, start: int, stop: int) -> None:
        """Replace rows of the block `w`, in place."""
        for rows in self.rows:
            rows.place(w, start, stop)

    def survey(self, w: Array, start: int, stop: int) -> list[Array]:
        """What each update needs to know of the block."""
        return [u.survey(w, start, stop) if surveys(u) else None for u in self.updates]

    def settled(self, seen: Sequence[Sequence[Array]]) -> "Recipe":
        """The recipe that knows the whole weight, from the surveys of all blocks in their order."""
        by_update = zip(self.updates, zip(*seen, strict=True), strict=True)
        return replace(self, updates=tuple(u.settle(s) if surveys(u) else u for u, s in by_update))

    def change(self, w: Array, start: int, stop: int) -> Array:
        """The sum of all changes of the block, or None where there is no update."""
        total = None
        for update in self.updates:
            change = update.change(w, start, stop)
            total = change if total is None else total + change
        return total

    def summed(self) -> "Recipe":
        """The same recipe with all plain updates joined into one, whose delta is their sum, and all
        stacks into one stack.
        """
        plain = [u for u in self.updates if isinstance(u, Added)]
        stacks = [u for u in self.updates if isinstance(u, Stacked)]
        others = [u for u in self.updates if not isinstance(u, Added | Stacked)]
        if len(plain) > 1:
            plain = [Added(cat([u.low for u in plain], [u.weight for u in plain]))]
        if len(stacks) > 1:
            parts = sorted((p for s in stacks for p in s.parts), key=lambda p: p.start)
            stacks = [Stacked(tuple(parts))]
        return replace(self, updates=(*plain, *stacks, *others))

    def on(self, put: Put) -> "Recipe":
        """The same recipe with its NumPy arrays as what `put` makes of them.

        Integers stay: they say which rows, and are read one by one. Rows that are read as they are
        sliced are put as they are sliced.
        """
        placed: Recipe = _placed(self, put)
        return placed


@dataclass(frozen=True)
class Brought:
    """Rows, `brought[start:stop]`, that are put elsewhere as they are sliced."""

    values: Any
    put: Put

    def __getitem__(self, rows: slice) -> Array:
        return self.put(self.values[rows])


def _placed(value: Any, put: Put) -> Any:
    if hasattr(value, "__array_namespace__"):
        return value if value.dtype.kind in "iub" else put(value)
    if isinstance(value, tuple | list):
        return tuple(_placed(v, put) for v in value)
    if isinstance(value, Toward):
        return replace(value, values=Brought(value.values, put))
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _placed(getattr(value, f.name), put) for f in fields(value) if f.init}
        return replace(value, **changed)
    return value
