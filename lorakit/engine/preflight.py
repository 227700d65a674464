"""Whether there is room: disk for the output, memory for the workers; asked before anything is
written.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lorakit.engine.machine import available_memory
from lorakit.engine.plan import BLOCK, STEP, Fold, Plan
from lorakit.errors import OutputError, ResourceError
from lorakit.store.workspace import Workspace
from lorakit.tensors import BITS, size

PROCESS = 64 << 20  # bytes that Python, NumPy and the headers take before any work
SCRATCH = 11 << 20  # bytes of a worker's buffers for casts, and of what its arena has to spare
ENCODING = 24  # arrays of float32 of one step of rows that are read from codes, and made codes
FORK = 5 << 20  # bytes that a worker's process comes to have for itself of what it shared


def peak_memory(plan: Plan, jobs: int) -> int:
    """Bytes of memory that a run of the plan takes at most with this many workers."""
    folds = plan.folds
    slab = max((_slab(f) for f in folds), default=0)
    forks = jobs * FORK if folds and jobs > 1 else 0
    return PROCESS + forks + jobs * slab + (jobs + 1) * factors_memory(plan)


def factors_memory(plan: Plan) -> int:
    """Bytes of the largest factors of a tensor."""
    return max((int(f.recipe.get("nbytes", 0)) for f in plan.folds), default=0)


def fitting_jobs(plan: Plan, jobs: int, limit: int | None) -> int:
    """The largest number of workers, at most `jobs`, whose memory stays in the limit.

    `limit` is in bytes; None means what the machine has available.

    Raises:
        ResourceError: even one worker needs more.
    """
    room = limit if limit is not None else available_memory()
    if peak_memory(plan, 1) > room:
        raise ResourceError(
            f"needs {size(peak_memory(plan, 1))} of memory, {size(room)} are "
            + ("allowed." if limit is not None else "available."),
            hint="Raise --max-memory." if limit is not None else "Free some.",
        )
    return max(n for n in range(1, jobs + 1) if peak_memory(plan, n) <= room)


def free_disk(output: Path) -> int:
    """Bytes that are free where an output is built: beside it, whatever is there now."""
    return shutil.disk_usage(_around(output)).free


def check_disk(plan: Plan, output: Path, extras: int, *, there: int = 0) -> None:
    """Refuse a run whose output does not fit on the disk.

    `extras` are bytes of small files, `there` bytes that an earlier run of the plan wrote already.

    Raises:
        ResourceError: with what is needed and what is free.
    """
    free, needed = free_disk(output), plan.nbytes + extras - there
    if needed > free:
        raise ResourceError(
            f"the output needs {size(needed)} of disk, {size(free)} are free.",
            hint="Free some, or place --output elsewhere.",
            file=output,
        )


def check_room(plan: Plan, workspace: Workspace, extras: int = 0) -> None:
    """The same for a workspace, which is gone where no run has begun in it.

    Raises:
        ResourceError: with what is needed and what is free.
    """
    try:
        check_disk(plan, workspace.output, extras, there=workspace.nbytes())
    except ResourceError:
        if not workspace.records:
            workspace.discard()
        raise


def check_links(sources: Iterable[Path], output: Path) -> None:
    """Refuse hard links to files that are not on the disk on which the output is built.

    Raises:
        OutputError: naming the first.
    """
    device = _around(output).stat().st_dev
    for path in sources:
        if path.stat().st_dev != device:
            raise OutputError(
                f"is on another file system than {path}, which cannot be linked to from there.",
                hint="Leave out --link.",
                file=output,
            )


def _around(output: Path) -> Path:
    """The folder that is there of those around an output."""
    return next(p for p in output.absolute().parents if os.path.isdir(p))


def _slab(fold: Fold) -> int:
    if fold.unit:
        written = fold.extent((0, min(fold.block_rows, fold.rows)))[1]
        step = min(fold.step_rows, fold.rows) * fold.cols
        return written + step * 4 * ENCODING + SCRATCH
    elements = max(BLOCK, fold.cols)
    read, written = BITS[fold.origin.dtype] // 8, BITS[fold.tensor.dtype] // 8
    wide = 8 if "F64" in (fold.origin.dtype, fold.tensor.dtype) else 4
    steps = 12 if fold.whole else 6  # arrays of one arithmetic step
    step = (elements if fold.whole else max(STEP, fold.cols)) * wide * steps
    return elements * (read + written) + step + SCRATCH
