"""Factors of a fused projection and of its parts, exactly: rows and ranks are taken, joined,
swapped and put in another order, and no number is computed.

Law: `delta` of the result is that of the input, its rows cut, joined or in the other order, bit for
bit; what cuts undoes what joins.

Factors are a (rank, ...) and b (out, rank, ...): kernels keep their dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorakit.errors import UsageError
from lorakit.math.cast import Array


@dataclass(frozen=True)
class Factors:
    """The factors of one projection, and the alpha that they are read with; None: scaling 1."""

    a: Array
    b: Array
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """The rank as it is stored."""
        return int(self.a.shape[0])

    @property
    def scaling(self) -> float:
        """What b @ a is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def split(fused: Factors, sizes: Sequence[int]) -> list[Factors]:
    """The factors of the parts whose output rows, one after the other, are those of `fused`.

    Raises:
        UsageError: the sizes are not those of its rows.
    """
    if sum(sizes) != len(fused.b):
        raise UsageError(f"parts of {list(sizes)} rows are not {len(fused.b)} rows.")
    ends = np.cumsum(sizes)
    rows = [fused.b[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [Factors(fused.a, b, fused.alpha) for b in rows]


def pruned(part: Factors) -> Factors | None:
    """The same update without the ranks that B has only zeros for; None if that is all of them.

    The scaling stays: alpha goes down with the rank. It undoes `join` by blocks bit for bit.
    """
    others = tuple(i for i in range(part.b.ndim) if i != 1)
    kept = np.flatnonzero((part.b != 0).any(axis=others))
    if len(kept) == part.rank:
        return part
    if not len(kept):
        return None
    alpha = None if part.alpha is None else part.alpha * len(kept) / part.rank
    return Factors(part.a[kept], np.ascontiguousarray(part.b[:, kept]), alpha)


def joined(parts: Sequence[Factors | None], sizes: Sequence[int]) -> tuple[Factors, bool]:
    """One pair of factors for the projection that has these parts below one another, and whether
    it is exact.

    A part that is None was not trained: its rows are zeros. Where all parts share A and scaling,
    ranks do not grow. Else B is block-diagonal, the rank is the sum of the ranks, and where the
    parts' scalings differ they are multiplied into B, in float32, which is the one inexact way.

    Raises:
        UsageError: there is no part, or one has other rows than its size.
    """
    parts = _alike(parts)
    there = [(p, size) for p, size in zip(parts, sizes, strict=True) if p is not None]
    if not there or any(len(p.b) != size for p, size in there):
        raise UsageError(f"the parts are not of {list(sizes)} rows.")
    known = [p for p, _ in there]
    if len(known) == len(parts) and _shared(known):
        b = np.concatenate([p.b for p in known])
        return Factors(known[0].a, b, known[0].alpha), True
    same = len({p.scaling for p in known}) == 1
    rank = sum(p.rank for p in known)
    b = np.zeros((sum(sizes), rank, *known[0].b.shape[2:]), known[0].b.dtype)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            scaled = part.b if same else _times(part.b, part.scaling)
            b[row : row + size, column : column + part.rank] = scaled
            column += part.rank
        row += size
    whole = Factors(np.concatenate([p.a for p in known]), b, _alpha(known, rank, same=same))
    return whole, same


def stacked(blocks: Sequence[Array]) -> Array:
    """Rows below one another, in a dtype that has the numbers of all."""
    dtype = _common([x.dtype for x in blocks])
    return np.concatenate([x.astype(dtype, copy=False) for x in blocks])


def swapped(values: Array) -> Array:
    """Rows whose two halves have changed places (shift and scale of a modulation); its own inverse.

    Raises:
        UsageError: the number of rows is odd.
    """
    if len(values) % 2:
        raise UsageError(f"{len(values)} rows have no halves.")
    half = len(values) // 2
    return np.concatenate([values[half:], values[:half]])


def interleaved(values: Array, heads: int) -> Array:
    """Rows of heads from the rotary order of Hugging Face (two halves) to that of Meta (pairs).

    Raises:
        UsageError: the rows are not those of so many heads.
    """
    return _turned(values, heads, (heads, 2, -1))


def halved(values: Array, heads: int) -> Array:
    """The inverse of `interleaved`."""
    return _turned(values, heads, (heads, -1, 2))


def padded(factors: Factors, rank: int) -> Factors:
    """The same update with ranks of zeros behind its own; its alpha grows with them.

    Raises:
        UsageError: it has more.
    """
    more = rank - factors.rank
    if more < 0:
        raise UsageError(f"rank {factors.rank} cannot be padded to {rank}.")
    a = np.pad(factors.a, [(0, more)] + [(0, 0)] * (factors.a.ndim - 1))
    b = np.pad(factors.b, [(0, 0), (0, more)] + [(0, 0)] * (factors.b.ndim - 2))
    alpha = None if factors.alpha is None else factors.alpha * rank / factors.rank
    return Factors(a, b, alpha)


def _turned(values: Array, heads: int, shape: tuple[int, int, int]) -> Array:
    if heads < 1 or len(values) % (2 * heads):
        raise UsageError(f"{len(values)} rows are not those of {heads} heads.")
    found: Array = values.reshape(*shape, *values.shape[1:]).swapaxes(1, 2)
    return found.reshape(values.shape)


def _common(dtypes: Sequence[Any]) -> Any:
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return np.dtype(np.float64 if np.float64 in dtypes else np.float32)


def _alike(parts: Sequence[Factors | None]) -> list[Factors | None]:
    """The parts with factors of one dtype each, that of all where they have one."""
    a, b = (_common([getattr(p, x).dtype for p in parts if p]) for x in "ab")
    return [
        p and replace(p, a=p.a.astype(a, copy=False), b=p.b.astype(b, copy=False)) for p in parts
    ]


def _shared(parts: Sequence[Factors]) -> bool:
    first = parts[0]
    return all(
        p.alpha == first.alpha and p.a.shape == first.a.shape and p.a.tobytes() == first.a.tobytes()
        for p in parts[1:]
    )


def _times(values: Array, factor: float) -> Array:
    if factor == 1.0:
        return values
    return (values.astype(np.float32) * np.float32(factor)).astype(values.dtype)


def _alpha(parts: Sequence[Factors], rank: int, *, same: bool) -> float | None:
    if same and all(p.alpha is None for p in parts):
        return None
    return parts[0].scaling * rank if same else float(rank)
