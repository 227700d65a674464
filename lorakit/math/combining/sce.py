"""SCE: select elements by variance, calculate a coefficient for each update, erase minorities.

Law: with `c_i = |D_i|^2 / sum |D_j|^2` of the selected elements, the combination is, element by
element, `sum c_i D_i / sum c_i` over the updates of the elected sign: a mean, in which a larger
update counts for more. Elements that were not selected are zero. One dense matrix is held at a
time: of variances, then of the combination.

Source: Wan et al. 2024 (FuseChat, arXiv 2408.07990); that the coefficients of those that agree are
made to add up to 1 is as in mergekit.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

from lorakit.math.combining.election import agreeing
from lorakit.math.combining.elementwise import compressed
from lorakit.math.combining.factors import svd, wanted_rank
from lorakit.math.combining.setting import Combined, Setting
from lorakit.math.combining.sparse import count
from lorakit.math.combining.tasks import Task, blocks, filled, in_order, tasks
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Array, array_namespace

Selected = Callable[[int, int], list[Array]]  # of each update the rows from start to stop


def sce(parts: Sequence[LowRank], weights: Sequence[float], setting: Setting) -> Combined:
    """The combination of the share `density` of elements in which the updates vary most.

    A lone update has no variance and is left whole, whatever the density.
    """
    if len(parts) == 1:
        return svd(parts, weights, setting)
    line = tasks(parts, weights)
    selected = _selected(line, setting.density)
    shares = _shares(selected, line)

    def rows(start: int, stop: int) -> Array:
        return _joined(selected(start, stop), shares, setting.majority)

    dense = filled(rows, line[0].shape, line[0].a)
    return compressed(dense, wanted_rank(parts, setting), setting)


def _selected(line: Sequence[Task], density: float) -> Selected:
    """The updates, zero wherever their variance is not among the largest."""

    def whole(start: int, stop: int) -> list[Array]:
        return [task.rows(start, stop) for task in line]

    if density == 1:
        return whole
    shape = line[0].shape
    size = shape[0] * shape[1]
    place = size - count(density, size)
    (least,) = in_order(lambda i, j: _variance(whole(i, j)), shape, line[0].a, [place])

    def chosen(start: int, stop: int) -> list[Array]:
        updates = whole(start, stop)
        xp = array_namespace(*updates)
        varies = _variance(updates) >= least
        return [xp.where(varies, x, xp.zeros_like(x)) for x in updates]

    return chosen


def _variance(updates: Sequence[Array]) -> Array:
    mean = reduce(add, updates) / len(updates)
    return reduce(add, [(x - mean) ** 2 for x in updates]) / len(updates)


def _shares(selected: Selected, line: Sequence[Task]) -> list[float]:
    """The energy of each update as a share of that of all, in float64."""
    energies = [0.0] * len(line)
    for start, stop in blocks(line[0].shape):
        for i, x in enumerate(selected(start, stop)):
            xp = array_namespace(x)
            energies[i] += float(xp.sum(x * x, dtype=xp.float64))
    total = sum(energies)
    return [e / total if total > 0 else 1 / len(line) for e in energies]


def _joined(updates: Sequence[Array], shares: Sequence[float], majority: str) -> Array:
    xp = array_namespace(*updates)
    agree = [xp.astype(a, updates[0].dtype) for a in agreeing(updates, majority)]
    held = reduce(add, [share * a for share, a in zip(shares, agree, strict=True)])
    summed = [s * a * x for s, a, x in zip(shares, agree, updates, strict=True)]
    return reduce(add, summed) / xp.where(held > 0, held, xp.ones_like(held))
