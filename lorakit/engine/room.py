"""How much of a run is under way at once on devices: within the memory of the host and of each
device, whatever the size of the model.

Nothing here changes a byte of the output: blocks are whole tiles, and tiles are fixed by the plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lorakit.engine.chunk import ALIGNED, TILE
from lorakit.engine.machine import available_cores, available_memory
from lorakit.engine.plan import Fold, Plan
from lorakit.engine.preflight import PROCESS, factors_memory
from lorakit.errors import ResourceError
from lorakit.tensors import BITS, size

JOBS = 16  # workers at most, unless more are asked for: each has page-locked memory
LANES = 4  # blocks on one device at once: one enters, one is folded, one leaves, one waits
TILES = 4  # in a block, where there is room: fewer cost more in calls than the bus can wait
TORCH = 1 << 30  # bytes that torch, its libraries and the driver take of the host
FOLDED = 64  # bytes of a device for an element of a block that is folded (DoRA, and overflow)
HANDLE = 32 << 20  # bytes of a device that its linear algebra library takes for every worker
SPARE = 0.1  # of a device's free memory that is left to its own book-keeping


@dataclass(frozen=True)
class Share:
    """`jobs` workers, each with a block of `tiles` tiles; `lanes` of them on a device at once."""

    jobs: int
    tiles: int
    lanes: int

    def smaller(self) -> "Share | None":
        """The next that needs less memory of a device, as long as there is one."""
        if self.tiles > 1:
            return Share(self.jobs, self.tiles // 2, self.lanes)
        if self.lanes > 1:
            return Share(self.jobs, 1, self.lanes // 2)
        return None


def host_memory(plan: Plan, share: Share) -> int:
    """Bytes of the host's memory that a run takes at most."""
    worker = max((_moved(f, share.tiles) for f in plan.folds), default=0)
    factors = 2 * (share.jobs + 1) * factors_memory(plan)  # page-locked too, on their way
    return PROCESS + TORCH + share.jobs * worker + factors


def device_memory(plan: Plan, share: Share) -> int:
    """Bytes of each device's memory that a run takes at most."""
    moved = max((_moved(f, share.tiles, both=True) for f in plan.folds), default=0)
    folded = max((_folded(f, share.tiles) for f in plan.folds), default=0)
    factors = (share.jobs + 1) * factors_memory(plan)
    return share.lanes * moved + folded + share.jobs * HANDLE + factors


def fitting_share(plan: Plan, jobs: int | None, limit: int | None, free: int | None) -> Share:
    """The largest share for which there is room: on the host, and on a device.

    At most `jobs` workers (None: one a core, up to JOBS). `limit` is how many bytes may be taken of
    the host's memory and as many of a device's, None for what is there; `free` are those that the
    devices have, None where nobody has asked them yet. Blocks shrink first, to a tile each, then
    workers become fewer.

    Raises:
        ResourceError: even one worker with one tile needs more.
    """
    host = available_memory() if limit is None else limit
    device = min((n for n in (limit, free) if n is not None), default=1 << 62)
    shares = list(_shares(jobs or min(JOBS, available_cores())))
    for share in shares:
        if host_memory(plan, share) <= host and device_memory(plan, share) <= device:
            return share
    needs = host_memory(plan, shares[-1]), device_memory(plan, shares[-1])
    what, needed, room = (
        ("memory", needs[0], host) if needs[0] > host else ("device memory", needs[1], device)
    )
    raise ResourceError(
        f"needs {size(needed)} of {what}, there are {size(room)}.",
        hint="Free some, raise --max-memory, or leave --device out.",
    )


def _shares(jobs: int) -> Iterator[Share]:
    tiles = TILES
    while tiles:
        yield Share(jobs, tiles, min(LANES, jobs))
        tiles //= 2
    for fewer in range(jobs - 1, 0, -1):
        yield Share(fewer, 1, min(LANES, fewer))


def _moved(fold: Fold, tiles: int, *, both: bool = False) -> int:
    """Bytes of the largest block as it is read; with those as it is written, if kept apart."""
    elements = _elements(fold, tiles)
    read, written = (elements * BITS[i.dtype] // 8 for i in (fold.origin, fold.tensor))
    return read + written if both or read != written else read


def _folded(fold: Fold, tiles: int) -> int:
    return FOLDED * _elements(fold, tiles)


def _elements(fold: Fold, tiles: int) -> int:
    return min(tiles * max(TILE, ALIGNED * fold.cols), fold.tensor.numel)
