"""fold: low-rank updates into one weight, for export scripts that have both in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lorakit.adapter.load import read_array
from lorakit.engine.executor import fold_whole
from lorakit.engine.plan import Fold
from lorakit.errors import MisfitError
from lorakit.math.lowrank import LowRank, flatten
from lorakit.math.recipe import Recipe
from lorakit.math.updates import Added
from lorakit.store.memory import MemorySource, like


def fold(weight: Any, updates: Sequence[LowRank], weights: Sequence[float] | None = None) -> Any:
    """`weight + sum of weights[i] * delta(updates[i])`, in the library, dtype and device of
    `weight`.

    `weight` is (out, in), or the kernel (out, in, k, ...) of a convolution; factors may be of any
    float dtype, NumPy or torch. The same arithmetic as `merge`: float32 (float64 for a float64
    weight), all updates summed, rounded once to nearest even.

    Raises:
        MisfitError: an update is not of the shape of the weight.
    """
    source = MemorySource({"weight": weight})
    info = source.infos["weight"]
    wide = "float64" if info.dtype == "F64" else "float32"
    low = [_widened(u, wide) for u in updates]
    for update in low:
        if update.shape != (info.rows, info.cols):
            raise MisfitError(
                f"the weight is {list(info.shape)}, an update is {list(update.shape)}.",
                hint="Transpose the update with lorakit.transpose if the layer stores (in, out).",
            )
    factors = weights if weights is not None else [1.0] * len(low)
    added = [Added(u, w) for u, w in zip(low, factors, strict=True)]
    recipe = Recipe(updates=added).summed()
    with threadpool_limits(1, "blas"):  # as in a run: the same bits on any number of cores
        merged = fold_whole(Fold(info, "", info), recipe, source)
    return like(weight, np.ascontiguousarray(merged), info.dtype)


def _widened(update: LowRank, dtype: str) -> LowRank:
    source = MemorySource({"a": update.a, "b": update.b})
    a, b = (read_array(source, name, dtype) for name in ("a", "b"))
    return flatten(a, b, update.scaling)
