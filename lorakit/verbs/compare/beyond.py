"""What adapters have beside low-rank updates, side by side: tensors held whole, rows of tokens,
biases of factors, DoRA magnitudes. Compared number by number, some rows at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import fsum, sqrt
from typing import Protocol

import numpy as np

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.load import LazyRows, read_array
from lorakit.adapter.weights import Adapted
from lorakit.math.cast import Array
from lorakit.math.rows import row_slices
from lorakit.verbs.gathering import Source

CHUNK = 1 << 21  # elements at a time


class Rows(Protocol):
    """Something whose rows can be had: `rows[start:stop]`, (stop - start, cols)."""

    def __getitem__(self, rows: slice) -> Array:
        """Some rows, in float64."""
        ...


@dataclass(frozen=True)
class Values:
    """A tensor of an adapter."""

    shape: tuple[int, ...]
    rows: Rows
    indices: tuple[int, ...] | None = None  # of token rows


@dataclass(frozen=True)
class WholePair:
    """Two adapters (their numbers, from 1) in one tensor: the norm of the difference, and that over
    the larger norm. None where the shapes differ. Of token rows, those that both have.
    """

    first: int
    second: int
    difference: float | None
    relative: float | None


@dataclass(frozen=True)
class Whole:
    """A tensor that is no update: the norm that each adapter has (None: it has none)."""

    name: str
    norms: tuple[float | None, ...]
    pairs: tuple[WholePair, ...]


def values_of(
    adapters: Sequence[Adapter], sources: Mapping[str, Mapping[int, Source]]
) -> dict[str, dict[int, Values]]:
    """All tensors that are no updates, by name and by the number of the adapter, from 1."""
    found: dict[str, dict[int, Values]] = {}
    for number, adapter in enumerate(adapters, 1):
        for name, info in adapter.full.items():
            lazy = LazyRows(adapter.source, info.name, "float64")
            found.setdefault(name, {})[number] = Values(info.shape, lazy)
        for module in adapter.modules.values():
            if tokens := module.roles.get("rows"):
                lazy = LazyRows(adapter.source, tokens.name, "float64")
                indices = tuple(adapter.config.token_rows(module.name) or range(tokens.rows))
                values = Values(tokens.shape, lazy, indices)
                found.setdefault(f"{module.name} (token rows)", {})[number] = values
    for there in sources.values():
        for number, source in there.items():
            for name, array in _vectors(source).items():
                found.setdefault(name, {})[number] = Values(array.shape, array.reshape(-1, 1))
    return found


def whole_of(name: str, values: Mapping[int, Values], count: int) -> Whole:
    """A tensor in all adapters that have it."""
    norms = {n: _norm(v) for n, v in values.items()}
    pairs = [
        _pair(one, other, values[one], values[other])
        for one, other in combinations(sorted(values), 2)
    ]
    return Whole(name, tuple(norms.get(n) for n in range(1, count + 1)), tuple(pairs))


def _vectors(source: Source) -> dict[str, Array]:
    """Bias and magnitude of a weight; a magnitude that is in a delta already is left out."""
    one: Adapted = source.one
    found = {}
    if (bias := one.bias("float64")) is not None:
        found[f"{one.form.module} (bias of B)"] = bias
    if source.against is None and one.dora:
        magnitude = read_array(one.adapter.source, one.tensors["magnitude"].name, "float64")
        found[f"{one.form.module} (magnitudes)"] = magnitude
    return found


def _pair(first: int, second: int, x: Values, y: Values) -> WholePair:
    if x.indices is not None and y.indices is not None:
        x, y = _common(x, y)
    if x.shape != y.shape:
        return WholePair(first, second, None, None)
    squares = [float(np.vdot(a - b, a - b)) for a, b in zip(_blocks(x), _blocks(y), strict=True)]
    difference, largest = sqrt(fsum(squares)), max(_norm(x), _norm(y))
    return WholePair(first, second, difference, difference / largest if largest else 0.0)


def _common(x: Values, y: Values) -> tuple[Values, Values]:
    """The token rows that both have, in one order."""
    both = sorted(set(x.indices or ()) & set(y.indices or ()))
    found = []
    for one in (x, y):
        order = [(one.indices or ()).index(i) for i in both]
        taken = one.rows[0 : one.shape[0]][order]
        found.append(Values(taken.shape, taken))
    return found[0], found[1]


def _norm(x: Values) -> float:
    return sqrt(fsum(float(np.vdot(block, block)) for block in _blocks(x)))


def _blocks(x: Values) -> Iterator[Array]:
    height = x.shape[0] if x.shape else 1
    width = int(np.prod(x.shape[1:]))
    return (x.rows[rows] for rows in row_slices(height, width, CHUNK))
