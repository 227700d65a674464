"""Updates that are too much to hold as dense matrices, evaluated in blocks of rows.

Law: the order of the adapters does not matter, not even to the last bit: they are taken in an order
of their own, and what is drawn for one depends on the seed and on its factors. Nor does the memory
at hand: blocks have a fixed size, and each draws from a generator of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Array, array_namespace, on_cpu
from lorakit.math.rows import row_slices

BLOCK = 1 << 18  # elements

Rows = Callable[[int, int], Array]  # the rows from start to stop of some matrix


@dataclass(frozen=True)
class Task:
    """A weighted update `b @ a`, its weight and scaling multiplied into `b`."""

    a: Array  # (rank, in)
    b: Array  # (out, rank)
    key: tuple[int, ...]  # what is drawn for it depends on this

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the dense update, (out, in)."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def rows(self, start: int, stop: int) -> Array:
        """Rows of the dense update."""
        return self.b[start:stop, :] @ self.a

    def draw(self, seed: int, start: int, stop: int) -> Array:
        """Uniform numbers in [0, 1), float32, one for each element of a block of rows."""
        xp = array_namespace(self.a)
        rng = np.random.default_rng([seed, start, *self.key])
        drawn = rng.random((stop - start, self.shape[1]), dtype=np.float32)
        return xp.asarray(drawn, device=self.a.device)


def tasks(parts: Sequence[LowRank], weights: Sequence[float]) -> list[Task]:
    """The weighted updates, in an order that depends on nothing but themselves."""
    scaled = [
        (_digest(p), w * p.scaling, number)
        for number, (p, w) in enumerate(zip(parts, weights, strict=True))
    ]
    found: list[Task] = []
    for digest, factor, number in sorted(scaled):
        before = sum(t.key[0] == digest for t in found)
        part = parts[number]
        found.append(Task(part.a, factor * part.b, (digest, before)))
    return found


def _digest(part: LowRank) -> int:
    """64 bits that depend on the values of the factors, not on where they lie."""
    found = sha256()
    for factor in (part.a, part.b):
        found.update(np.ascontiguousarray(on_cpu(factor), np.float64).tobytes())
    return int.from_bytes(found.digest()[:8], "little")


def blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The row blocks, (start, stop), of a matrix of this shape."""
    return ((some.start, some.stop) for some in row_slices(*shape, BLOCK))


def filled(rows: Rows, shape: tuple[int, int], like: Array) -> Array:
    """The dense matrix of these rows, of the dtype and on the device of `like`."""
    xp = array_namespace(like)
    whole = xp.empty(shape, dtype=like.dtype, device=like.device)
    for start, stop in blocks(shape):
        whole[start:stop, :] = rows(start, stop)
    return whole


def in_order(rows: Rows, shape: tuple[int, int], like: Array, places: Sequence[int]) -> list[float]:
    """Which elements would stand at these places if all elements were sorted, smallest first."""
    whole = filled(rows, shape, like).reshape(-1)
    if isinstance(whole, np.ndarray):
        end = whole.size
        for place in sorted({*places}, reverse=True):  # one by one: NumPy has fast code for that
            whole[:end].partition(place)
            end = place
    else:
        whole = array_namespace(whole).sort(whole)
    return [float(whole[place]) for place in places]
