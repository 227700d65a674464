"""Which elements of an update are kept: by magnitude, at random, or by chance and magnitude.

Law: a density of 1 keeps everything, and what is drawn keeps the expectation. Elements as large as
the smallest that is kept are all kept, so that the choice does not depend on where they lie.
"""

from collections.abc import Callable

from lorakit.math.combining.setting import Setting
from lorakit.math.combining.tasks import Task, in_order
from lorakit.math.namespace import Array, array_namespace

LEAST = 2.0**-100  # a chance that float32 divides by; with less, nothing is ever kept

Sparse = Callable[[int, int], Array]  # rows from start to stop, zero where not kept
Sparsify = Callable[[Task, Setting], Sparse]


def largest(task: Task, setting: Setting) -> Sparse:
    """The share `density` of elements of the largest magnitude (TIES, arXiv 2306.01708, trim)."""
    return _band(task, setting.density, 0.0)


def middling(task: Task, setting: Setting) -> Sparse:
    """The share `density` of elements below the share `gamma` of the largest (Model Breadcrumbs,
    arXiv 2312.06795): neither outliers nor noise.

    Where both are more than everything, fewer outliers are dropped.
    """
    return _band(task, setting.density, setting.gamma)


def random(task: Task, setting: Setting) -> Sparse:
    """Each element with the chance `density`, then divided by it: `D * mask / density` (DARE, arXiv
    2311.03099).
    """

    def kept(start: int, stop: int) -> Array:
        x = task.rows(start, stop)
        xp = array_namespace(x)
        chosen = task.draw(setting.seed, start, stop) < setting.density
        return xp.where(chosen, x / max(setting.density, LEAST), xp.zeros_like(x))

    return task.rows if setting.density == 1 else kept


def ranked(task: Task, setting: Setting) -> Sparse:
    """Each element with a chance p that grows evenly with its rank r by magnitude within its row,
    then divided by it: `D * mask / p` (DELLA, arXiv 2406.11617, MAGPRUNE).

    For ranks from 0 to n - 1, `p = density + epsilon * ((2 * r + 1) / n - 1)`: from density -
    epsilon to density + epsilon, with a smaller epsilon where that would leave the range from 0 to
    1. (The epsilon of the paper is the whole width of that.)
    """
    width = min(setting.epsilon, setting.density, 1 - setting.density)

    def kept(start: int, stop: int) -> Array:
        x = task.rows(start, stop)
        xp = array_namespace(x)
        places = _places(xp.argsort(xp.abs(x), axis=1))
        centred = (2 * xp.astype(places, x.dtype) + 1) / x.shape[1] - 1
        chances = setting.density + width * centred
        chances = xp.maximum(chances, xp.full_like(chances, LEAST))
        chosen = task.draw(setting.seed, start, stop) < chances
        return xp.where(chosen, x / chances, xp.zeros_like(x))

    return task.rows if setting.density == 1 else kept


def _places(order: Array) -> Array:
    """The inverse of a permutation of each row: where an element stands in its order."""
    xp = array_namespace(order)
    rows, columns = (xp.arange(n, dtype=order.dtype, device=order.device) for n in order.shape)
    places = xp.empty_like(order)
    places[rows[:, None], order] = columns
    return places


def count(density: float, size: int) -> int:
    """How many of `size` elements are kept: the whole number below, but at least one."""
    return max(1, int(density * size))


def _band(task: Task, density: float, above: float) -> Sparse:
    if density == 1:
        return task.rows
    size = task.shape[0] * task.shape[1]
    keep = count(density, size)
    last = size - 1 - min(int(above * size), size - keep)
    ends = (last - keep + 1, last) if last < size - 1 else (last - keep + 1,)
    low, *high = in_order(lambda i, j: abs(task.rows(i, j)), task.shape, task.a, ends)

    def kept(start: int, stop: int) -> Array:
        x = task.rows(start, stop)
        xp = array_namespace(x)
        inside = xp.abs(x) >= low
        if high:
            inside &= xp.abs(x) <= high[0]
        return xp.where(inside, x, xp.zeros_like(x))

    return kept
