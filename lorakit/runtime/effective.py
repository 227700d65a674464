"""A weight with changes in it: all of them summed wide, rounded once to the dtype of the weight, as
in a merge of files.
"""

from math import prod

import torch
from torch import Tensor

from lorakit.math.recipe import Recipe, Rows
from lorakit.math.rows import row_slices
from lorakit.runtime.change import Changes
from lorakit.runtime.exact import exactly, wide

BLOCK = {"cpu": 1 << 20}  # elements that are computed at once, by the device
LARGE = 1 << 26  # on any other


@exactly
def effective(weight: Tensor, changes: Changes) -> Tensor:
    """A weight with changes in it, each so many times: computed wide, rounded once to its dtype."""
    value = _whole(weight, changes)
    recipe, leading = _recipe(value, changes)
    if not (recipe.rows or recipe.updates):
        return value
    matrix = value.to(wide(value.dtype), copy=bool(recipe.rows))
    matrix = matrix.reshape(prod(value.shape[:leading]), -1)
    recipe.begin(matrix, 0, len(matrix))
    if recipe.surveys:
        recipe = recipe.settled([recipe.survey(matrix, 0, len(matrix))])
    change = recipe.change(matrix, 0, len(matrix))
    matrix = matrix if change is None else matrix + change
    return matrix.reshape(value.shape).to(weight.dtype)


@exactly
def rounded(old: Tensor, changes: Changes, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A weight with changes in it in a dtype, and the share of the change that this kept. It is
    computed row block by row block, which saves memory and (in the caches) time.
    """
    value = _whole(old, changes)
    if value.shape != old.shape:
        return effective(old, changes).to(dtype), 1.0
    recipe, leading = _recipe(value, changes)
    new = torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)
    before, start, after = (x.reshape(prod(x.shape[:leading]), -1) for x in (old, value, new))
    cuts = row_slices(len(start), start.shape[1], BLOCK.get(old.device.type, LARGE))
    blocks = [(rows.start, rows.stop) for rows in cuts]

    def block(i: int, j: int) -> Tensor:
        w = start[i:j].to(wide(old.dtype), copy=True)
        recipe.begin(w, i, j)
        return w

    if recipe.surveys:
        recipe = recipe.settled([recipe.survey(block(i, j), i, j) for i, j in blocks])
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for i, j in blocks:
        w = block(i, j)
        change = recipe.change(w, i, j)
        exact = w if change is None else w + change
        after[i:j] = exact
        sums += _along(before[i:j], exact, after[i:j])
    return new, _ratio(sums)


def share_of(old: Tensor, exact: Tensor, new: Tensor) -> float:
    """The share of the change to `exact` that `new` has."""
    return _ratio(_along(old, exact, new))


@exactly
def _along(old: Tensor, exact: Tensor, new: Tensor) -> Tensor:
    """How far a weight went along its exact change, and the square of that."""
    base = old.to(exact.dtype)
    change = (exact - base).flatten()
    there = new.to(exact.dtype, copy=True).sub_(base).flatten()
    return torch.stack([there @ change, change @ change]).to("cpu", torch.float64)


def _ratio(sums: Tensor) -> float:
    kept, whole = sums.tolist()
    return kept / whole if whole else 1.0


def _whole(weight: Tensor, changes: Changes) -> Tensor:
    """What a weight is after it was replaced as a whole, where it is."""
    value = weight
    for change, times in changes:
        if change.action == "full":
            new = change.values.to(weight.dtype)
            value = new if times == 1.0 else value + times * (new - value)
    return value


def _recipe(value: Tensor, changes: Changes) -> tuple[Recipe, int]:
    """What becomes of the rows of a weight, and how many of its dimensions make these."""
    rest = [(c, times) for c, times in changes if c.action != "full"]
    rows = tuple(
        Rows(c.spec["indices"], c.values.to(value.device), times)
        for c, times in rest
        if c.action == "rows"
    )
    updates = tuple(c.update(times) for c, times in rest if c.action == "update")
    return Recipe(rows, updates), max([1, *(c.leading for c, _ in rest)])
