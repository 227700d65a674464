"""The hot loop on a device: rows that lie there, folded with tensors of torch.

The twin of `lorakit.engine.fold`, and tested equal to it. Products are made tile by tile: how many
rows a tile has is fixed by the shape of the weight, and every tile begins at a multiple of 256
bytes, so that the linear algebra library has no reason to add the terms of one in another order
when it comes in other company. All else is done number by number, to all rows at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.engine.figures import Figures
from lorakit.engine.plan import Fold
from lorakit.engine.rounding import narrowed, sum_to_odd
from lorakit.math.recipe import Recipe
from lorakit.math.updates import Added

Tensor = Any  # of torch
TILE = 1 << 22  # elements
ALIGNED = 64  # rows of a tile are a multiple of this: of 256 bytes, in float32
EXTREMES = 5  # numbers of a chunk before those of its tiles


def tile_rows(fold: Fold) -> int:
    """Rows that are multiplied at once."""
    return max(ALIGNED, TILE // max(1, fold.cols) // ALIGNED * ALIGNED)


@dataclass(frozen=True)
class Chunk:
    """Some whole tiles of a weight, as they are stored; `start` is the first row.

    `wide` is the dtype of the arithmetic, `dtype` that of the result.
    """

    raw: Tensor  # (rows, cols)
    start: int
    tile: int
    wide: Any
    dtype: Any

    @property
    def tiles(self) -> list[slice]:
        """The rows of each tile within the chunk."""
        rows = self.raw.shape[0]
        return [slice(i, min(i + self.tile, rows)) for i in range(0, rows, self.tile)]

    def begun(self, recipe: Recipe) -> Tensor:
        """The rows, widened, with those that the recipe replaces."""
        w = self.raw.to(self.wide, copy=True)
        recipe.begin(w, self.start, self.start + w.shape[0])
        return w

    def at(self, rows: slice) -> tuple[int, int]:
        """Where rows of the chunk are in the weight."""
        return self.start + rows.start, self.start + rows.stop


def survey(chunk: Chunk, recipe: Recipe) -> list[list[Any]]:
    """What the recipe has to know of these rows before any can be folded, tile by tile."""
    w = chunk.begun(recipe)
    return [recipe.survey(w[rows], *chunk.at(rows)) for rows in chunk.tiles]


def fold(chunk: Chunk, recipe: Recipe, *, careful: bool = False) -> tuple[Tensor, Tensor]:
    """The finished rows, and the numbers that `figures_of` reads.

    Where something is not finite, the sums are not either: then `careful` leaves it out of them.
    """
    w = chunk.begun(recipe)
    delta = _change(chunk, recipe, w)
    if delta is None:
        out = narrowed(w, chunk.dtype)
        stored = out.to(w.dtype) if careful else w
        return out, _numbers(chunk, (w, stored, None, None), careful=careful)
    landed = w + delta
    if landed.itemsize == 4 and _is_half(chunk.dtype):
        sum_to_odd(landed, w, delta)
    out = narrowed(landed, chunk.dtype)
    stored = out.to(landed.dtype)
    landed = stored - w  # not in place: it may be what was narrowed to its own dtype
    return out, _numbers(chunk, (w, stored, landed, delta), careful=careful)


def _change(chunk: Chunk, recipe: Recipe, w: Tensor) -> Tensor | None:
    import torch

    alone = recipe.updates[0] if len(recipe.updates) == 1 else None
    if not isinstance(alone, Added) or w.itemsize != 4:
        parts = [recipe.change(w[rows], *chunk.at(rows)) for rows in chunk.tiles]
        return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)
    a, b, factor = alone.factors
    delta = torch.empty_like(w)
    for rows in chunk.tiles:
        part = delta[rows]
        torch.addmm(part, b[slice(*chunk.at(rows))], a, beta=0, alpha=factor, out=part)
    return delta


def _is_half(dtype: Any) -> bool:
    return str(dtype) == "torch.float16"


def _numbers(
    chunk: Chunk, values: tuple[Tensor, Tensor, Tensor | None, Tensor | None], *, careful: bool
) -> Tensor:
    """(EXTREMES + 2 * tiles,) float64: of the change, of what is stored, and the sums by tile."""
    import torch

    w, stored, landed, delta = values
    overflowed = torch.zeros(1, dtype=torch.float64, device=w.device)
    if careful:
        lost = ~torch.isfinite(stored if landed is None else landed)
        overflowed = (lost & torch.isfinite(w)).sum(dtype=torch.float64).reshape(1)
        stored = torch.where(lost, 0, stored)
    if landed is None or delta is None:
        return torch.cat([torch.zeros_like(overflowed).expand(2), *_ends(stored), overflowed])
    if careful:
        landed = torch.where(lost, 0, landed).double()
        delta = torch.where(torch.isfinite(delta), delta, 0).double()
    same = delta.dtype
    pairs = [(landed[t].reshape(-1).to(same), delta[t].reshape(-1)) for t in chunk.tiles]
    kept, whole = ([torch.dot(x, d) for x, d in p] for p in (pairs, [(d, d) for _, d in pairs]))
    sums = torch.stack([*kept, *whole]).double()
    return torch.cat([*_ends(landed), *_ends(stored), overflowed, sums])


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number and the largest of opposite sign, (1,) float64 each."""
    low, high = x.aminmax()
    return high.double().reshape(1), low.neg().double().reshape(1)


def is_doubtful(numbers: NDArray[np.float64], largest: float) -> bool:
    """Whether something is not finite, or is larger than what the dtype of the result can hold."""
    return not (np.isfinite(numbers).all() and numbers[2:4].max() <= largest)


def figures_of(numbers: NDArray[np.float64]) -> tuple[Figures, ...]:
    """The figures of a chunk, tile by tile; the extremes stand with the first."""
    change, value, overflowed = numbers[:2].max(), numbers[2:4].max(), numbers[4]
    first = Figures(0.0, 0.0, float(change), float(value), int(overflowed))
    kept, whole = numbers[EXTREMES:].reshape(2, -1)
    sums = (Figures(float(k), float(d)) for k, d in zip(kept, whole, strict=True))
    return first, *sums
