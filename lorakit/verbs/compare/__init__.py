"""compare: how alike adapters are, weight by weight and over all, from their factors.

Law: norms, cosines and differences are those of the dense deltas, to the rounding of float64; of an
adapter and itself, the difference is 0.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from math import fsum, isfinite, sqrt
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.configs import model_type
from lorakit.engine.working import swept
from lorakit.errors import DifferenceError, UsageError
from lorakit.store.checkpoint import open_checkpoint
from lorakit.verbs.base.releases import check_stacks
from lorakit.verbs.choices import READING, check_choices
from lorakit.verbs.compare.beyond import Whole, values_of, whole_of
from lorakit.verbs.compare.weight import Row, row_of
from lorakit.verbs.gathering import Source, gathered
from lorakit.verbs.merge import opened_adapters


@dataclass(frozen=True)
class Compared:
    """How alike adapters are.

    rows: every weight that any adapts. whole: every tensor that is no update. norms: of each
    adapter over all its weights. cosines, differences: of each pair of adapters over all weights,
    those that one lacks counting as zero; a difference is relative to the larger norm.
    """

    adapters: tuple[str, ...]
    rows: tuple[Row, ...]
    whole: tuple[Whole, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    differences: tuple[tuple[float, ...], ...]
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def common(self) -> int:
        """How many weights all adapters have."""
        return sum(None not in row.ranks for row in self.rows)

    @property
    def largest(self) -> tuple[float, str]:
        """The largest relative difference of a pair in any weight or tensor, and where that is; 1
        where one of them has nothing.
        """
        found = [(_difference(row), row.name) for row in self.rows]
        found += [(_difference(one), one.name) for one in self.whole]
        return max(found, default=(0.0, ""))

    def beyond(self, tolerance: float) -> list[str]:
        """The names of the weights and tensors that differ by more than this."""
        things: list[Row | Whole] = [*self.rows, *self.whole]
        return [x.name for x in things if _difference(x) > tolerance]

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data."""
        return {**asdict(self), "common": self.common, "largest_difference": self.largest[0]}


class DifferentError(DifferenceError):
    """Adapters differ by more than they may; `compared` is what was found."""

    def __init__(self, compared: Compared, tolerance: float) -> None:
        names = compared.beyond(tolerance)
        size, where = compared.largest
        total = len(compared.rows) + len(compared.whole)
        super().__init__(
            f"{len(names)} of {total} modules differ by more than {tolerance:g} of their norm, "
            f"{where!r} by {size:.3g}.",
            hint="`lorakit compare -v` has all of them.",
            file=compared.adapters[-1] if len(compared.adapters) == 2 else "",
        )
        self.compared = compared

    def to_dict(self) -> dict[str, Any]:
        """The error with everything that was found."""
        return {**super().to_dict(), "compared": self.compared.to_dict()}


def compare(
    *adapters: str | Path | Adapter,
    base: str | Path = "",
    base_is_residual: bool = False,
    tolerance: float | None = None,
    allow_pickle: bool = False,
    expert_packing: str = "peft",
    jobs: int | None = None,
) -> Compared:
    """How alike two or more adapters of one model are. No delta of a low-rank update is formed.

    base: what deltas of DoRA, and of adapters whose initialisation changed their base, are computed
    with; without it, of those the factors alone are compared, and a note says so. tolerance: the
    relative difference that no weight or tensor may exceed. Arithmetic is float64 on the factors as
    stored.

    Raises:
        UsageError: there are fewer than two adapters.
        MisfitError: they are not of one model, or one has no module in common with any other.
        InputError: an adapter cannot be had as plain factors, or holds NaN or Inf.
        DifferentError: something differs by more than the tolerance.
    """
    if len(adapters) < 2:
        raise UsageError("compare needs two adapters, or more.")
    if tolerance is not None and not (isfinite(tolerance) and tolerance >= 0):
        raise UsageError(f"--tolerance {tolerance} is no share of a norm.")
    check_choices({"expert_packing": expert_packing}, READING)
    opened = _opened(adapters, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(str(base), allow_pickle=allow_pickle) if base else None
    found = gathered(
        opened,
        [1.0] * len(opened),
        base=checkpoint,
        base_is_residual=base_is_residual,
        packing=expert_packing,
        plain=checkpoint is None,
    )
    kind = model_type(checkpoint.config) if checkpoint else ""
    check_stacks((s.one for there in found.values() for s in there), kind)
    sources = _numbered(opened, found)
    count, keys = len(opened), sorted(sources, key=_natural)
    rows = swept(lambda k: row_of(k, sources[k], count), keys, jobs=jobs)
    values = values_of(opened, sources)
    whole = [whole_of(n, values[n], count) for n in sorted(values, key=_natural)]
    notes = _notes(opened, rows, plain=checkpoint is None)
    names = _names(adapters, opened)
    done = Compared(names, tuple(rows), tuple(whole), *_overall(rows, count), tuple(notes))
    if tolerance is not None and done.beyond(tolerance):
        raise DifferentError(done, tolerance)
    return done


def _opened(adapters: Sequence[Any], *, allow_pickle: bool) -> list[Adapter]:
    """The adapters; one that is given twice is two."""
    found = opened_adapters(adapters, allow_pickle=allow_pickle, factors=True)
    return [replace(a) for a in found]


def _names(given: Sequence[Any], opened: Sequence[Adapter]) -> tuple[str, ...]:
    """The adapters as they were given, or where some were open ones, by their files."""
    as_given = not any(isinstance(a, Adapter) for a in given)
    return tuple(str(a) if as_given else str(b.path) for a, b in zip(given, opened, strict=True))


def _numbered(
    adapters: Sequence[Adapter], found: Mapping[str, Sequence[Source]]
) -> dict[str, dict[int, Source]]:
    """Who does what to each weight, by the number of the adapter, from 1."""
    numbers = {id(adapter): n for n, adapter in enumerate(adapters, 1)}
    return {key: {numbers[id(s.one.adapter)]: s for s in there} for key, there in found.items()}


def _overall(
    rows: Sequence[Row], count: int
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
    """Norms, and the cosines and relative differences of all pairs, over all weights."""
    norms = [sqrt(fsum(row.norms[n] ** 2 for row in rows)) for n in range(count)]
    cosines = [[float(i == j) for j in range(count)] for i in range(count)]
    differences = [[0.0] * count for _ in range(count)]
    for i, j in combinations(range(count), 2):
        pairs = [_found(row, i + 1, j + 1) for row in rows]
        product = fsum(p.inner for p in pairs if p)
        squares = fsum(
            p.difference**2 if p else row.norms[i] ** 2 + row.norms[j] ** 2
            for p, row in zip(pairs, rows, strict=True)
        )
        sizes, largest = norms[i] * norms[j], max(norms[i], norms[j])
        cosine = min(1.0, max(-1.0, product / sizes)) if sizes else 0.0
        cosines[i][j] = cosines[j][i] = cosine
        difference = sqrt(squares) / largest if largest else 0.0
        differences[i][j] = differences[j][i] = difference
    return tuple(norms), tuple(map(tuple, cosines)), tuple(map(tuple, differences))


def _found(row: Row, first: int, second: int) -> Any:
    return next((p for p in row.pairs if (p.first, p.second) == (first, second)), None)


def _difference(one: Row | Whole) -> float:
    """The largest relative difference of two adapters there."""
    lacking = any(norm is None for norm in one.norms)
    if isinstance(one, Row):
        lacking = None in one.ranks and any(one.norms)
    relatives = [1.0 if p.relative is None else p.relative for p in one.pairs]
    return max([*relatives, float(lacking)])


def _notes(adapters: Sequence[Adapter], rows: Sequence[Row], *, plain: bool) -> list[str]:
    notes = []
    for adapter in adapters if plain else ():
        if any("magnitude" in m.roles for m in adapter.modules.values()):
            notes.append(
                f"{adapter.path.parent}: has DoRA magnitudes; its factors are compared, and its "
                "magnitudes apart from them. --base compares the deltas."
            )
        if mutation := adapter.config.mutation:
            notes.append(
                f"{adapter.path.parent}: {mutation!r} changed its base; its factors alone are "
                "compared. --base compares the deltas."
            )
    shares = [row.share for row in rows if row.share < 1.0]
    if shares:
        notes.append(
            f"{len(shares)} weights have deltas that are not low-rank: their effective ranks and "
            f"shared spaces are those of at least {min(shares):.2%} of their energy."
        )
    return notes


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names as numbers."""
    return [(int(s), "") if s.isdigit() else (-1, s) for s in re.split(r"(\d+)", name)]
