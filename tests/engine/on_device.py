"""Folding by the way of a GPU, on torch's CPU everywhere and on a GPU where there is one."""

from typing import Any

import numpy as np
import pytest

from lorakit.engine.device import devices
from lorakit.engine.executor import Cpu, Executor, fold_whole
from lorakit.engine.figures import Figures, total
from lorakit.engine.gpu import Gpus
from lorakit.engine.plan import Fold
from lorakit.engine.room import Share
from lorakit.math.recipe import Recipe
from lorakit.store.memory import MemorySource
from lorakit.tensors import TensorInfo

Array = np.ndarray[Any, Any]
LARGEST = 16.0  # of the terms of a sum in these tests
every_device = pytest.mark.parametrize(
    "device", ["torch:cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)]
)


def gpus(device: str, *, tiles: int = 4, lanes: int = 2, jobs: int = 2) -> Gpus:
    """The executor on a device, with so much of a run under way at once."""
    pytest.importorskip("torch")
    return Gpus(devices(device), Share(jobs, tiles, lanes))


def fold_of(array: Array, dtype: str = "", leading: int = 1) -> tuple[Fold, MemorySource]:
    """A fold of a weight in memory into a dtype, its own by default."""
    source = MemorySource({"w": array})
    info = source.infos["w"]
    tensor = TensorInfo("w", dtype or info.dtype, info.shape)
    return Fold(tensor, "base", info, leading=leading), source


def folded(
    executor: Executor, array: Array, recipe: Recipe, dtype: str = "", leading: int = 1
) -> Array:
    """The whole result."""
    fold, source = fold_of(array, dtype, leading)
    (lane, *_) = executor.lanes()
    with executor.session():
        return fold_whole(fold, recipe, source, lane=lane, blocks=list(executor.blocks(fold)))


def figures(executor: Executor, array: Array, recipe: Recipe, dtype: str = "") -> Figures:
    """What is said of the result."""
    fold, source = fold_of(array, dtype)
    (lane, *_) = executor.lanes()
    with executor.session():
        blocks = list(executor.blocks(fold))
        brought = lane.settle(fold, lane.bring(fold, lambda _: recipe), source, blocks)
        return total(f for b in blocks for f in lane.fold(fold, brought, source, b)[1])


def by_cpu(array: Array, recipe: Recipe, dtype: str = "", leading: int = 1) -> Array:
    """The whole result, as the CPU folds it."""
    with np.errstate(all="ignore"):
        return folded(Cpu(), array, recipe, dtype, leading)


def ordered(array: Array) -> Array:
    """Numbers as integers of which neighbours differ by one; NaN is beyond everything."""
    width = array.dtype.itemsize
    bits = array.reshape(-1).view(f"i{width}").astype(np.int64)
    with np.errstate(all="ignore"):
        missing = np.isnan(array.reshape(-1).astype(np.float64))
    lowest = -(1 << (8 * width - 1))
    found = np.where(bits < 0, lowest - bits, bits)
    return np.where(missing, np.iinfo(np.int64).max // 4, found)


def assert_near(ours: Array, theirs: Array) -> None:
    """At most one unit in the last place apart, in at most 0.1 % of the numbers.

    Where a sum is float32 or float64, or nearly cancels, its own rounding shows: more units, of a
    smaller number.
    """
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    wide = np.float64 if ours.dtype == np.float64 else np.float32
    slack = 64 * float(np.finfo(wide).eps) * LARGEST
    with np.errstate(all="ignore"):
        near = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).reshape(-1) <= slack
    if ours.dtype.itemsize < 4:
        apart = np.abs(ordered(ours) - ordered(theirs))
        near |= apart <= 1
        assert np.count_nonzero(apart) <= max(1e-3 * apart.size, 1)
    assert near.all()
