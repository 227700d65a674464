"""Updates of some rows of a weight each: experts that lie one below the other, queries in a fused
projection.

Law: the change of the rows of a part is the change that its update makes of these rows alone; the
changes of parts that overlap add up; rows of no part stay.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.updates import Update, surveys


@dataclass(frozen=True)
class Part:
    """An update of the rows `start` to `stop` of a weight."""

    start: int
    stop: int
    update: Update


@dataclass(frozen=True)
class Stacked:
    """Updates of several ranges of rows, in the order of their starts."""

    parts: Sequence[Part]

    @cached_property
    def surveys(self) -> bool:
        """Whether some part has to see all of its rows first."""
        return any(p.update.surveys for p in self.parts)

    def survey(self, w: Array, start: int, stop: int) -> dict[int, Array]:
        """What parts need to know of these rows, by the number of the part."""
        found = {}
        for number, part in enumerate(self.parts):
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last and surveys(part.update):
                rows = w[first - start : last - start, :]
                found[number] = part.update.survey(rows, first - part.start, last - part.start)
        return found

    def settle(self, seen: Sequence[Mapping[int, Array]]) -> "Stacked":
        """The updates that know their rows."""
        parts = [
            replace(p, update=p.update.settle([s[n] for s in seen if n in s]))
            if surveys(p.update)
            else p
            for n, p in enumerate(self.parts)
        ]
        return Stacked(tuple(parts))

    @property
    def depth(self) -> int:
        """The largest depth of any of its parts, and 2 for sums where some overlap."""
        return max((p.update.depth for p in self.parts), default=0) + 2

    def change(self, w: Array, start: int, stop: int) -> Array:
        """The changes of the parts, zero between them."""
        return self._assembled("change", w, start, stop)

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """The terms of the parts, added up."""
        return self._assembled("terms", w, start, stop)

    def _assembled(self, what: str, w: Array, start: int, stop: int) -> Array:
        xp = array_namespace(w)
        total = xp.zeros_like(w)
        for part in self._touching(start, stop):
            first, last = max(start, part.start), min(stop, part.stop)
            rows = slice(first - start, last - start)
            value = getattr(part.update, what)(w[rows, :], first - part.start, last - part.start)
            total[rows, :] += xp.astype(value, w.dtype)
        return total

    def _touching(self, start: int, stop: int) -> Iterator[Part]:
        """The parts with rows in a range."""
        end = bisect_left(self._starts, stop)
        longest = self._longest
        for part in self.parts[bisect_left(self._starts, start - longest) : end]:
            if part.stop > start:
                yield part

    @cached_property
    def _starts(self) -> list[int]:
        return [p.start for p in self.parts]

    @cached_property
    def _longest(self) -> int:
        return max((p.stop - p.start for p in self.parts), default=0)


def by_expert(b: Array, count: int, packing: str) -> Array:
    """The `b` of each expert, (count, out, rank), of one that holds all of them.

    That is (out, rank * count), rank by rank with all experts of one rank together ("peft"), or
    (out, count * rank), expert by expert ("unsloth").

    Source: huggingface/peft v0.21.2, ParamWrapper; unslothai/unsloth-zoo PR 1269 for the other.
    """
    xp = array_namespace(b)
    rank, out = b.shape[1] // count, b.shape[0]
    if packing == "unsloth":
        return xp.permute_dims(xp.reshape(b, (out, count, rank)), (1, 0, 2))
    return xp.permute_dims(xp.reshape(b, (out, rank, count)), (2, 0, 1))


def expert_of(low: LowRank, expert: int, count: int, packing: str) -> LowRank:
    """The update of one of `count` experts, from factors that hold all of them. Exact.

    `a` is (experts * rank, in), expert by expert; `b` is packed as `by_expert` says.
    """
    xp = array_namespace(low.a, low.b)
    rank, b = low.a.shape[0] // count, by_expert(low.b, count, packing)[expert, ...]
    b = xp.reshape(xp.reshape(b, (-1,)), b.shape)  # copied: a product of slices is slow
    return LowRank(low.a[expert * rank : (expert + 1) * rank, :], b, low.scaling)
