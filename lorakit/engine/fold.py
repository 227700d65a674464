"""The hot loop: one block of rows, read, widened, folded, rounded once, written.

Arithmetic goes in steps small enough for the cache. The plain case, one low-rank update, multiplies
into a kept buffer; everything else goes through the recipe. Tests hold the two equal.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lorakit.engine.figures import Figures, total
from lorakit.engine.plan import Fold
from lorakit.math.arena import Arena
from lorakit.math.cast import Array, Scratch, narrow, storage, widen, working
from lorakit.math.product import multiply
from lorakit.math.recipe import Recipe
from lorakit.math.rounding import round_sum
from lorakit.math.updates import Added
from lorakit.tensors import Source


class Slab:
    """The buffers of one worker: a block as read and as written, and the rows of one step, widened.

    They grow to the largest block that comes by and are used again for every other. `finished` is
    where finished rows are to lie, of bytes enough for all blocks, if it matters.
    """

    def __init__(self, finished: Array | None = None) -> None:
        self._arena = Arena()
        self._buffers: dict[str, Array] = {} if finished is None else {"finished": finished}
        self._taken: dict[str, Array] = {}  # as they were last asked for
        self.scratch = Scratch(self._arena)

    def take(self, purpose: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
        """An array of this shape and dtype; its contents are whatever was there."""
        taken = self._taken.get(purpose)
        if taken is None or taken.shape != shape or taken.dtype != dtype:
            taken = self._taken[purpose] = self._part(purpose, shape, dtype)
        return taken

    def _part(self, purpose: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[purpose] = self._arena.take(nbytes)
        return buffer[:nbytes].view(dtype).reshape(shape)


def read_block(fold: Fold, source: Source, start: int, stop: int, slab: Slab) -> Array:
    """Rows of the fold's origin, in the storage dtype; where finished rows lie, if they keep it."""
    shape = (stop - start, fold.origin.matrix(fold.leading)[1])
    purpose = "finished" if fold.tensor.dtype == fold.origin.dtype else "read"
    raw = slab.take(purpose, shape, storage(fold.origin.dtype))
    source.read_rows(fold.origin.name, start, stop, raw.view(np.uint8), leading=fold.leading)
    return raw


def survey_block(
    fold: Fold, recipe: Recipe, source: Source, rows: tuple[int, int], slab: Slab
) -> list[Any]:
    """What the recipe has to know of these rows before any can be folded."""
    raw = read_block(fold, source, *rows, slab)
    w = slab.take("w", raw.shape, working(fold.origin.dtype, fold.tensor.dtype))
    widen(raw, w)
    return survey_rows(recipe, w, rows)


def survey_rows(recipe: Recipe, w: Array, rows: tuple[int, int]) -> list[Any]:
    """The same of rows that are read and widened; those that the recipe replaces are changed."""
    with np.errstate(all="ignore"):
        recipe.begin(w, *rows)
        return recipe.survey(w, *rows)


def fold_block(
    fold: Fold, recipe: Recipe, source: Source, rows: tuple[int, int], slab: Slab
) -> tuple[Array, Figures]:
    """The finished rows in the storage dtype of the output, and their figures.

    The array is the slab's: write it before the next call. Where nothing is to be done, it has
    the very bytes that were read. What overflows is counted, not warned of.
    """
    raw = read_block(fold, source, *rows, slab)
    if fold.tensor.dtype == fold.origin.dtype and not (recipe.rows or recipe.updates):
        return raw, Figures()
    out = slab.take("finished", raw.shape, storage(fold.tensor.dtype))  # raw, if that has its dtype
    wide = working(fold.origin.dtype, fold.tensor.dtype)
    parts, height = [], fold.step_rows
    with np.errstate(all="ignore"):
        for start in range(0, raw.shape[0], height):
            part, target = raw[start : start + height], out[start : start + height]
            w = slab.take("w", part.shape, wide)
            widen(part, w)
            at = rows[0] + start, rows[0] + start + part.shape[0]
            parts.append(fold_step(recipe, w, at, target, slab))
    return out, total(parts)


def blocks_of(fold: Fold) -> Iterator[tuple[int, int]]:
    """The blocks of rows that a fold is done in."""
    if fold.tensor.numel:
        for start in range(0, fold.rows, fold.block_rows):
            yield start, min(start + fold.block_rows, fold.rows)


def steps_of(fold: Fold, rows: tuple[int, int] | None = None) -> Iterator[tuple[int, int]]:
    """The arithmetic steps of these rows, which are whole spans, or of all."""
    start, stop = rows or (0, fold.rows)
    for span in range(start, stop, fold.span or max(1, stop - start)):
        end = min(stop, span + (fold.span or stop - start))
        for first in range(span, end, fold.step_rows):
            yield first, min(first + fold.step_rows, end)


def fold_step(recipe: Recipe, w: Array, rows: tuple[int, int], out: Array, slab: Slab) -> Figures:
    """Fold rows `w`, widened, into `out`; `w` is overwritten."""
    recipe.begin(w, *rows)
    delta = change_of(recipe, w, rows, slab)
    if delta is None:
        narrow(w, out, slab.scratch)
        return _cast_figures(w, out)
    landed = slab.take("landed", w.shape, delta.dtype)
    round_sum(w, delta, out, landed, slab.scratch)
    high = _highest(out if out.dtype.itemsize == 2 else landed)
    landed -= w
    return _figures(w, delta, landed, high)


def change_of(recipe: Recipe, w: Array, rows: tuple[int, int], slab: Slab) -> Array | None:
    """The change of rows `w`, which may lie in the slab; None where there is none."""
    if (
        len(recipe.updates) != 1
        or not isinstance(recipe.updates[0], Added)
        or w.dtype != np.float32
    ):
        change: Array | None = recipe.change(w, *rows)
        return change
    a, b, factor = recipe.updates[0].factors
    delta = slab.take("delta", w.shape, w.dtype)
    multiply(b[rows[0] : rows[1]], a, delta)
    if factor != 1.0:
        delta *= np.float32(factor)
    return delta


def _highest(stored: Array) -> float:
    """The largest absolute value; inf or NaN if there is one.

    Floats of two bytes are compared as integers, which their order of magnitude is: half the bytes.
    """
    if not stored.size:
        return 0.0
    if stored.dtype.itemsize != 2:
        return max(float(stored.max()), -float(stored.min()))
    positive, any_sign = int(stored.view(np.int16).max()), int(stored.view(np.uint16).max())
    negative = any_sign & 0x7FFF if any_sign > 0x7FFF else 0
    return float(np.array([max(positive, negative)], np.uint16).view(stored.dtype)[0])


def _figures(w: Array, delta: Array, landed: Array, high: float) -> Figures:
    overflowed = 0
    if not math.isfinite(high):
        lost = ~np.isfinite(landed)
        overflowed = int(np.count_nonzero(lost & np.isfinite(w)))
        high = _largest_of(landed + w, lost)
        landed[lost] = 0
    change = max(float(landed.max()), -float(landed.min())) if landed.size else 0.0
    kept, whole = float(np.vdot(landed, delta)), float(np.vdot(delta, delta))
    if not math.isfinite(kept + whole):  # squares beyond float32
        delta = np.where(np.isfinite(delta), delta, 0).astype(np.float64)
        kept, whole = float(np.vdot(landed, delta)), float(np.vdot(delta, delta))
    return Figures(kept, whole, change, high, overflowed)


def _cast_figures(w: Array, out: Array) -> Figures:
    high = max(float(w.max()), -float(w.min())) if w.size else 0.0
    if high <= _largest(out.dtype):
        return Figures(max_value=high)
    stored = out.astype(w.dtype)
    lost = ~np.isfinite(stored)
    overflowed = int(np.count_nonzero(lost & np.isfinite(w)))
    return Figures(max_value=_largest_of(stored, lost), overflowed=overflowed)


def _largest_of(stored: Array, lost: Array) -> float:
    return float(np.abs(np.where(lost, 0, stored)).max())


def _largest(dtype: np.dtype[Any]) -> float:
    from ml_dtypes import finfo

    return float(finfo(dtype).max)  # type: ignore[no-untyped-call]
