"""What folds blocks: the CPU, or devices that blocks are sent to and come back from.

Law: an executor decides where and when a block is folded, never what comes out of it: the same
device gives the same bytes for any number of workers, any memory and any interruption. So whatever
it multiplies at once is fixed by the plan, however large the blocks are that it moves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lorakit.engine.encode import encode_block, settled
from lorakit.engine.figures import Figures
from lorakit.engine.fold import Slab, blocks_of, fold_block, survey_block
from lorakit.engine.machine import available_cores
from lorakit.engine.plan import Fold, Plan
from lorakit.engine.preflight import fitting_jobs
from lorakit.errors import UsageError
from lorakit.math.cast import Array, storage
from lorakit.math.recipe import Recipe
from lorakit.store.checkpoint import Part
from lorakit.tensors import Source

Rows = tuple[int, int]
OpenRecipe = Callable[[Fold], Recipe]
Folded = tuple[Array, tuple[Figures, ...]]  # rows as they are written; figures in their order


@dataclass(frozen=True)
class Inputs:
    """What the folds of a plan are made from: `sources` by their name in it, and their recipes."""

    sources: Mapping[str, Part]
    open_recipe: OpenRecipe


class Lane(Protocol):
    """The way of one worker to one device and back. Not for two threads at once."""

    @property
    def place(self) -> str:
        """Which device this is; lanes to the same one share what was brought there."""
        ...

    def bring(self, fold: Fold, open_recipe: OpenRecipe) -> Recipe:
        """The recipe of a fold, with its arrays where `fold` needs them."""
        ...

    def settle(self, fold: Fold, recipe: Recipe, source: Source, blocks: Sequence[Rows]) -> Recipe:
        """The recipe that knows the whole weight, which it is shown block by block."""
        ...

    def fold(self, fold: Fold, recipe: Recipe, source: Source, rows: Rows) -> Folded:
        """The finished rows. The array is the lane's: write it before the next call."""
        ...


class Executor(Protocol):
    """Where the folds of a run are done."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        ...

    def blocks(self, fold: Fold) -> Iterator[Rows]:
        """The blocks of rows that a fold is done in."""
        ...

    def lanes(self) -> Sequence[Lane]:
        """The lanes of a new worker, one to each device."""
        ...

    def session(self) -> AbstractContextManager[object]:
        """What holds while blocks are folded."""
        ...


class CpuLane:
    """The buffers of one worker, and the functions of `lorakit.engine.fold` on them. `finished` is
    where it leaves finished rows, if it matters.
    """

    place = "cpu"

    def __init__(self, finished: Array | None = None) -> None:
        self._slab = Slab(finished)

    def bring(self, fold: Fold, open_recipe: OpenRecipe) -> Recipe:
        """The recipe, read from the adapters."""
        return open_recipe(fold)

    def settle(self, fold: Fold, recipe: Recipe, source: Source, blocks: Sequence[Rows]) -> Recipe:
        """The recipe that knows the whole weight, if it needs to."""
        if fold.unit:
            return settled(fold, recipe, source, self._slab)
        if not recipe.surveys:
            return recipe
        return recipe.settled([survey_block(fold, recipe, source, b, self._slab) for b in blocks])

    def fold(self, fold: Fold, recipe: Recipe, source: Source, rows: Rows) -> Folded:
        """The finished rows and their figures."""
        folding = encode_block if fold.unit else fold_block
        data, figures = folding(fold, recipe, source, rows, self._slab)
        return data, (figures,)


class Cpu:
    """Every worker folds its own blocks, with NumPy."""

    name = "cpu"

    def blocks(self, fold: Fold) -> Iterator[Rows]:
        """Blocks that stay in the cache."""
        return blocks_of(fold)

    def lanes(self) -> Sequence[Lane]:
        """The one lane of a new worker."""
        return (CpuLane(),)

    def session(self) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()


def fold_whole(
    fold: Fold,
    recipe: Recipe,
    source: Source,
    *,
    lane: Lane | None = None,
    blocks: Sequence[Rows] | None = None,
) -> Array:
    """All rows of a fold, in the shape of its tensor and the storage dtype of its output.

    `lane` and `blocks` are of one executor; by default the CPU folds.
    """
    lane = lane or CpuLane()
    blocks = tuple(blocks_of(fold)) if blocks is None else blocks
    recipe = lane.settle(fold, lane.bring(fold, lambda _: recipe), source, blocks)
    whole = np.empty((fold.rows, fold.cols), storage(fold.tensor.dtype))
    for rows in blocks:
        whole[slice(*rows)] = lane.fold(fold, recipe, source, rows)[0]
    return whole.reshape(fold.tensor.shape)


def executor_for(
    plan: Plan, device: str, jobs: int | None, limit: int | None, inputs: Inputs | None = None
) -> tuple[Executor, int]:
    """What folds on a device of this name ("cpu", "cuda", "cuda:N"), and how many workers it has.

    `jobs` are asked for, `limit` is how many bytes of memory may be taken. With `inputs`, workers
    on the CPU have processes, where this one may be forked.

    Raises:
        UsageError: there is no such device.
        ResourceError: even one worker needs more memory.
    """
    if device == "cpu":
        jobs = fitting_jobs(plan, jobs or available_cores(), limit)
        return _on_cpu(plan, jobs, inputs), jobs
    if any(f.unit for f in plan.folds):
        raise UsageError(
            "weights are quantised again on the CPU only.",
            hint="Leave --device out, or merge with --quant keep-touched.",
        )
    from lorakit.engine.gpu import gpus

    return gpus(plan, device, jobs, limit)


def _on_cpu(plan: Plan, jobs: int, inputs: Inputs | None) -> Executor:
    if jobs == 1 or inputs is None or not plan.folds:
        return Cpu()
    from lorakit.engine.processes import Processes, may_fork

    return Processes(plan, inputs, jobs) if may_fork() else Cpu()
