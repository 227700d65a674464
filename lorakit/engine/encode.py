"""The hot loop where sums are put on a grid of codes: read, fold, survey, encode, step by step.

The twin of `lorakit.engine.fold`. Every tensor of a weight is encoded by itself, from the same
steps, so codes and scales belong to each other wherever they lie and whoever computes them.
"""

from dataclasses import replace

import numpy as np

from lorakit.engine.figures import Figures, total
from lorakit.engine.fold import Slab, change_of, steps_of, survey_rows
from lorakit.engine.plan import Fold
from lorakit.math.cast import Array
from lorakit.math.grid import Grid
from lorakit.math.recipe import Recipe
from lorakit.tensors import Source

Rows = tuple[int, int]


def settled(fold: Fold, recipe: Recipe, source: Source, slab: Slab) -> Recipe:
    """The recipe, and its grid, that know the whole weight, as far as they need to.

    Raises:
        InputError: there is NaN or Inf among the new values.
    """
    steps = list(steps_of(fold))
    if recipe.surveys:
        recipe = recipe.settled(
            [survey_rows(recipe, _read(fold, source, s, slab), s) for s in steps]
        )
    if not _grid(recipe).coupled:
        return recipe
    return replace(recipe, grid=_settled(fold, recipe, source, (0, fold.rows), slab))


def encode_block(
    fold: Fold, recipe: Recipe, source: Source, rows: Rows, slab: Slab
) -> tuple[Array, Figures]:
    """The finished bytes of some rows, and of codes the figures.

    The array is the slab's: write it before the next call.
    """
    start, stop = fold.extent(rows)
    out = slab.take("finished", (1, stop - start), np.dtype(np.uint8)).reshape(-1)
    grid = _grid(recipe)
    if not grid.codes:
        known = grid if grid.coupled else _settled(fold, recipe, source, rows, slab)
        out[:] = np.ascontiguousarray(known.beside()).reshape(-1).view(np.uint8)
        return out, Figures()
    parts = []
    for step in steps_of(fold, rows):
        w, delta, new = _summed(fold, recipe, source, step, slab)
        known = grid if grid.coupled else grid.settled([grid.survey(w, new, step[0])], step[0])
        values = known.encode(new, step[0], out, step[0] - rows[0])
        parts.append(_figures(w, delta, values))
    return out, total(parts)


def _grid(recipe: Recipe) -> Grid:
    assert recipe.grid is not None
    return recipe.grid


def _settled(fold: Fold, recipe: Recipe, source: Source, rows: Rows, slab: Slab) -> Grid:
    """The grid that knows the scales of these rows."""
    grid, seen = _grid(recipe), []
    for step in steps_of(fold, rows):
        w, _, new = _summed(fold, recipe, source, step, slab)
        seen.append(grid.survey(w, new, step[0]))
    return grid.settled(seen, rows[0])


def _read(fold: Fold, source: Source, rows: Rows, slab: Slab) -> Array:
    w = slab.take("w", (rows[1] - rows[0], fold.cols), np.dtype(np.float32))
    source.read_rows(fold.origin.name, *rows, w.view(np.uint8), leading=fold.leading)
    return w


def _summed(
    fold: Fold, recipe: Recipe, source: Source, rows: Rows, slab: Slab
) -> tuple[Array, Array, Array]:
    """Some rows as they are, their change, and the sum of both."""
    w = _read(fold, source, rows, slab)
    with np.errstate(all="ignore"):
        recipe.begin(w, *rows)
        delta = change_of(recipe, w, rows, slab)
        if delta is None:
            delta = np.zeros_like(w)
        return w, delta, np.add(w, delta, out=slab.take("new", w.shape, w.dtype))


def _figures(w: Array, delta: Array, values: Array) -> Figures:
    landed = values.astype(np.float64) - w
    exact = delta.astype(np.float64)
    kept, whole, change = np.vdot(landed, exact), np.vdot(exact, exact), np.abs(landed).max()
    error = np.subtract(landed, exact, out=landed)
    return Figures(
        float(kept),
        float(whole),
        float(change),
        float(np.abs(values).max()),
        0,
        float(np.vdot(error, error)),
        float(np.abs(error).max()),
        values.size,
    )
