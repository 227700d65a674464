"""A folded tensor computed again in float64, and whether stored numbers are what they should be.

The bound on a number is half a unit in the last place of its dtype plus what float32 arithmetic may
be off by: (rank + 4) * 2^-24 of the sum of the absolute values of all terms (Higham, Accuracy and
Stability of Numerical Algorithms, 2002, section 3.5).
"""

from collections.abc import Sequence

import numpy as np

from lorakit.adapter.load import LazyRows, load_recipe
from lorakit.engine.fold import blocks_of, steps_of
from lorakit.engine.plan import Fold
from lorakit.math.cast import Array, narrow, storage
from lorakit.math.recipe import Recipe
from lorakit.tensors import Source

EPSILON = 2.0**-24


def prepared(
    fold: Fold, source: Source, adapters: Sequence[Source], dtype: str = "float64"
) -> Recipe:
    """The recipe of a fold in this dtype, with the whole weight surveyed if it has to be."""
    weight = LazyRows(source, fold.origin.name, dtype)
    recipe = load_recipe(fold.recipe, adapters, dtype, weight)
    if recipe.surveys:
        rows = LazyRows(source, fold.origin.name, dtype, fold.leading)
        seen = []
        for start, stop in steps_of(fold) if fold.unit else blocks_of(fold):
            w = rows[start:stop]
            recipe.begin(w, start, stop)
            seen.append(recipe.survey(w, start, stop))
        recipe = recipe.settled(seen)
    return recipe


def check_rows(
    fold: Fold, recipe: Recipe, source: Source, written: Source, rows: tuple[int, int]
) -> tuple[int, int, int]:
    """Of some rows: how many numbers, how many not nearest to the exact result, how many off the
    bound.
    """
    _, exact, slack = exact_rows(fold, recipe, source, rows)
    stored = np.empty(exact.shape, storage(fold.tensor.dtype))
    written.read_rows(fold.tensor.name, *rows, stored.view(np.uint8), leading=fold.leading)
    nearest = np.empty_like(stored)
    narrow(exact, nearest)
    differ = stored.view(_bits(stored)) != nearest.view(_bits(stored))
    off = differ & ~_between(exact, slack, stored)
    return stored.size, int(np.count_nonzero(differ)), int(np.count_nonzero(off))


def exact_rows(
    fold: Fold, recipe: Recipe, source: Source, rows: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Some rows before, the exact result, and what float32 arithmetic may be off by, in float64."""
    w = LazyRows(source, fold.origin.name, "float64", fold.leading)[slice(*rows)]
    steps = sum((r.terms(w, *rows) for r in recipe.rows), start=np.zeros_like(w))
    recipe.begin(w, *rows)
    change = recipe.change(w, *rows)
    slack = _slack(recipe, steps if change is None else steps + np.abs(w), w, rows)
    return w, w if change is None else w + change, slack


def _between(exact: Array, slack: Array, stored: Array) -> Array:
    """Whether stored numbers are the rounding of something within `slack` of the exact result."""
    low, high = np.empty_like(stored), np.empty_like(stored)
    with np.errstate(invalid="ignore"):  # infinite numbers of the base, less an infinite slack
        narrow(exact - slack, low)
        narrow(exact + slack, high)
    value = stored.astype(np.float64)
    same_nan = np.isnan(exact) & np.isnan(value)
    inside: Array = (low.astype(np.float64) <= value) & (value <= high.astype(np.float64))
    return inside | same_nan


def _slack(recipe: Recipe, terms: Array, w: Array, rows: tuple[int, int]) -> Array:
    """What float32 arithmetic may be off by, for every number; `terms` are those before updates."""
    depth = 4
    for update in recipe.updates:
        terms = terms + update.terms(w, *rows)
        depth += update.depth
    slack: Array = depth * EPSILON * terms
    return slack


def _bits(array: Array) -> str:
    return f"u{array.dtype.itemsize}"
