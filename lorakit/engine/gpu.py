"""The executor on devices of torch: blocks travel from page-locked memory through the streams of a
device and back, a few at a time.

Every worker reads its block from the disk and writes it there itself, so that reading, copying in,
folding, copying out and writing all go on at once. Where a device runs out of memory, less of it is
used from there on: fewer tiles of a block, then fewer blocks.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from lorakit.engine.chunk import Chunk, figures_of, fold, is_doubtful, survey, tile_rows
from lorakit.engine.device import Device, Passage, Tensor, devices, full_precision
from lorakit.engine.executor import Folded, Lane, OpenRecipe, Rows
from lorakit.engine.figures import Figures
from lorakit.engine.plan import Fold, Plan
from lorakit.engine.room import SPARE, Share, fitting_share
from lorakit.errors import ResourceError
from lorakit.math.cast import storage, working
from lorakit.math.recipe import Recipe
from lorakit.tensors import Source, size

T = TypeVar("T")


class Stage:
    """What a device has room for: how many tiles at once, from how many workers.

    Shared by all workers, and only ever smaller.
    """

    def __init__(self, device: Device, share: Share) -> None:
        self.device = device
        self.share = share
        self._inside = 0
        self._changed = threading.Condition()

    def attempt(self, work: Callable[[Share], T]) -> T:
        """What `work` returns, with as small a share as it takes.

        Raises:
            ResourceError: the device is full of other things.
        """
        while True:
            with self._entered() as share:
                try:
                    return work(share)
                except RuntimeError as error:
                    if not self.device.is_full(error):
                        raise
                    said = str(error).partition("\n")[0]
            self._shrink(share, said)  # no sooner: the error held on to what was allocated

    @contextmanager
    def _entered(self) -> Iterator[Share]:
        with self._changed:
            self._changed.wait_for(lambda: self._inside < self.share.lanes)
            self._inside += 1
            share = self.share
        try:
            yield share
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _shrink(self, tried: Share, said: str) -> None:
        self.device.give_back()
        with self._changed:
            if self.share != tried:
                return
            smaller = tried.smaller()
            if smaller is None:
                raise ResourceError(
                    f"{self.device.name} has no memory left: {said}",
                    hint="Free some, or leave --device out: the run goes on where it stopped.",
                )
            self.share = smaller


class Staging:
    """Page-locked memory of one worker: a block as read and as written, and its figures."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, purpose: str, nbytes: int) -> Tensor:
        """So many bytes, (nbytes,) uint8; their contents are whatever was there."""
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.nbytes < nbytes:
            self._buffers.pop(purpose, None)
            buffer = self._buffers[purpose] = self._new(nbytes)
        return buffer[:nbytes]

    def _new(self, nbytes: int) -> Tensor:
        try:
            return self._device.staging(nbytes)
        except RuntimeError as error:
            if not self._device.is_full(error):
                raise
            raise ResourceError(
                f"{size(nbytes)} of memory could not be locked for copies.",
                hint="Lower --max-memory or --jobs: the run goes on where it stopped.",
            ) from error


class DeviceLane:
    """The way of one worker to one device and back."""

    def __init__(self, stage: Stage, staging: Staging) -> None:
        self._stage = stage
        self._device = stage.device
        self._staging = staging
        self._passage: Passage = self._device.passage()
        self.place = self._device.place

    def bring(self, fold: Fold, open_recipe: OpenRecipe) -> Recipe:
        """The recipe, with its arrays on the device."""
        recipe = open_recipe(fold)
        return self._stage.attempt(lambda _: recipe.on(self._device.to_device))

    def settle(self, fold: Fold, recipe: Recipe, source: Source, blocks: Sequence[Rows]) -> Recipe:
        """The recipe that knows the whole weight, if it needs to, shown tile by tile."""
        if not recipe.surveys:
            return recipe
        seen = [tile for rows in blocks for tile in self._survey(fold, recipe, source, rows)]

        def settled(_: Share) -> Recipe:
            with self._passage.computing():
                found = recipe.settled(seen)
            self._passage.settled()
            return found

        return self._stage.attempt(settled)

    def _survey(self, fold: Fold, recipe: Recipe, source: Source, rows: Rows) -> list[list[Any]]:
        host = self._read(fold, source, rows)
        found: list[list[Any]] = []

        def surveyed(chunk: Chunk) -> None:
            with self._passage.computing():
                seen = survey(chunk, recipe)
            self._passage.settled()
            found.extend(seen)

        self._part_by_part(fold, host, rows, surveyed)
        return found

    def fold(self, fold: Fold, recipe: Recipe, source: Source, rows: Rows) -> Folded:
        """The finished rows and their figures; where nothing is to be done, what was read."""
        host = self._read(fold, source, rows)
        shape, dtype = (rows[1] - rows[0], fold.cols), storage(fold.tensor.dtype)
        if fold.tensor.dtype == fold.origin.dtype and not (recipe.rows or recipe.updates):
            return host.numpy().view(dtype).reshape(shape), (Figures(),)
        step = fold.cols * dtype.itemsize
        # Where it has the same size, what is written takes the place of what was read.
        same = step * shape[0] == host.nbytes
        out = host if same else self._staging.take("write", step * shape[0])
        figures: list[Figures] = []

        def folded(chunk: Chunk) -> None:
            start = (chunk.start - rows[0]) * step
            target = out[start : start + chunk.raw.shape[0] * step]
            figures.extend(self._through(chunk, recipe, target))

        self._part_by_part(fold, host, rows, folded)
        return out.numpy().view(dtype).reshape(shape), tuple(figures)

    def _read(self, fold: Fold, source: Source, rows: Rows) -> Tensor:
        """Rows of the fold's origin, as bytes in page-locked memory."""
        nbytes = (rows[1] - rows[0]) * fold.cols * storage(fold.origin.dtype).itemsize
        host = self._staging.take("read", nbytes)
        source.read_rows(fold.origin.name, *rows, host.numpy(), leading=fold.leading)
        return host

    def _part_by_part(
        self, fold: Fold, host: Tensor, rows: Rows, work: Callable[[Chunk], None]
    ) -> None:
        """Send rows to the device, as many at a time as it has room for, and `work` on them."""
        tile = tile_rows(fold)
        step = host.nbytes // (rows[1] - rows[0])
        wide = str(working(fold.origin.dtype, fold.tensor.dtype))
        types = getattr(self._device.torch, wide), self._device.dtype(fold.tensor.dtype)
        stored = self._device.dtype(fold.origin.dtype)
        at = rows[0]

        def part(share: Share) -> int:
            stop = min(at + share.tiles * tile, rows[1])
            raw = self._passage.enter(host[(at - rows[0]) * step : (stop - rows[0]) * step])
            raw = raw.view(stored).reshape(stop - at, fold.cols)
            work(Chunk(raw, at, tile, *types))
            return stop

        while at < rows[1]:
            at = self._stage.attempt(part)

    def _through(self, chunk: Chunk, recipe: Recipe, target: Tensor) -> tuple[Figures, ...]:
        """Fold a chunk into `target`, bytes of the host; its figures.

        The target is written to last: it may hold what a second attempt has to read.
        """
        torch = self._device.torch
        largest = torch.finfo(chunk.dtype).max
        for careful in (False, True):
            with self._passage.computing():
                out, numbers = fold(chunk, recipe, careful=careful)
                out = out.reshape(-1).view(torch.uint8)
                said = self._staging.take("figures", numbers.nbytes).view(torch.float64)
                said.copy_(numbers, non_blocking=True)
            self._passage.settled()
            if careful or not is_doubtful(said.numpy(), largest):
                break
        self._passage.leave(out, target)
        return figures_of(said.numpy())


class Gpus:
    """Blocks of whole tiles go to the devices in turn."""

    def __init__(self, devices: Sequence[Device], share: Share, limit: int | None = None) -> None:
        self._share = share
        self._limit = limit
        self.stages = [Stage(device, share) for device in devices]
        self.name = ", ".join(sorted({device.name for device in devices}))

    def blocks(self, fold: Fold) -> Iterator[Rows]:
        """Blocks of as many tiles as there is room for, the same for every run of this share."""
        step = self._share.tiles * tile_rows(fold)
        for start in range(0, fold.rows if fold.tensor.numel else 0, step):
            yield start, min(start + step, fold.rows)

    def lanes(self) -> Sequence[Lane]:
        """The lanes of a new worker; they share its memory, since it folds one block at a time."""
        staging = Staging(self.stages[0].device)
        return [DeviceLane(stage, staging) for stage in self.stages]

    @contextmanager
    def session(self) -> Iterator[None]:
        """Products in full float32, and no more memory of the devices than is allowed."""
        with ExitStack() as held:
            held.enter_context(full_precision())
            for stage in self.stages:
                held.enter_context(stage.device.limited(self._limit))
            yield
            for stage in self.stages:
                stage.device.give_back()


def gpus(plan: Plan, text: str, jobs: int | None, limit: int | None) -> tuple[Gpus, int]:
    """The executor on the devices that a text means, and the number of workers.

    `limit` is how many bytes may be taken of the host's memory, and as many of each device's.

    Raises:
        UsageError: no such device, or no torch that could use it.
        ResourceError: even one worker with one tile needs more memory.
    """
    there = devices(text)
    free = min(int((1 - SPARE) * d.free_memory()) for d in there)
    share = fitting_share(plan, jobs, limit, free)
    return Gpus(there, share, limit), share.jobs
