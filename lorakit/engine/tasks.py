"""A plan cut into tasks for workers, and the book-keeping of which steps of a file are done.

Tasks are made as they are asked for, so their number costs nothing. A step is done when all its
tasks are; what a later run may skip are the steps before the first that is not.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lorakit.engine.executor import Executor, Inputs, Lane, OpenRecipe, Rows
from lorakit.engine.figures import Done, Figures, total
from lorakit.engine.plan import Copy, Fold, OutputFile
from lorakit.math.recipe import Recipe
from lorakit.store.checkpoint import Part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.store.writing import PartialFile, copy_range

COPY_CHUNK = 32 << 20  # bytes


@dataclass
class Progress:
    """Which steps of a file are done; `folded` holds the figures of those that were folds.

    This run folds on `device`, those that did the first `skipped` steps folded on `before`.
    """

    file: OutputFile
    left: list[int]  # tasks of every step that are still to do; -1: not yet begun
    device: str = "cpu"
    before: Sequence[str] = ()
    skipped: int = 0
    first: int = 0  # the first step that is not done
    bytes_done: int = 0  # of the steps before it
    folded: dict[str, Figures] = field(default_factory=dict)
    claimed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, step: int, tasks: int) -> None:
        """Note that a step is cut into so many tasks."""
        with self.lock:
            self.left[step] = tasks
            self._advance()

    def task_done(self, step: int) -> None:
        """Note one finished task of a step."""
        with self.lock:
            self.left[step] -= 1
            self._advance()

    def fold_done(self, name: str, figures: Figures) -> None:
        """Note what folding did to a tensor, before its last task counts as done."""
        with self.lock:
            self.folded[name] = figures

    def _advance(self) -> None:
        while self.first < len(self.left) and self.left[self.first] == 0:
            self.bytes_done += self.file.steps[self.first].nbytes
            self.first += 1

    @property
    def done(self) -> bool:
        """Whether every step is."""
        return self.first == len(self.left)

    def claim(self) -> bool:
        """True for the first who asks: the one that may finish the file."""
        with self.lock:
            first, self.claimed = not self.claimed, True
            return first

    def skip(self, steps: int, done: Done) -> None:
        """Take over from an earlier run that did the first `steps`."""
        self.left[:steps] = [0] * steps
        self.skipped, self.before = steps, done.devices
        self.folded.update(done.figures)
        self._advance()

    def snapshot(self) -> tuple[int, Done]:
        """How many steps are done from the start on, and what there is to say of them."""
        with self.lock:
            done = {s.tensor.name for s in self.file.steps[: self.first] if isinstance(s, Fold)}
            ours = any(isinstance(s, Fold) for s in self.file.steps[self.skipped : self.first])
            devices = {*self.before, *([self.device] if ours else [])}
            figures = {n: f for n, f in self.folded.items() if n in done}
            return self.first, Done(figures, devices=tuple(sorted(devices)))


@dataclass
class Opened:
    """A fold under way: its recipe, loaded by whichever worker is first on a device, and the parts
    of its figures.
    """

    fold: Fold
    open_recipe: OpenRecipe
    blocks: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: dict[int, Sequence[Figures]] = field(default_factory=dict)
    _recipes: dict[str, Recipe] = field(default_factory=dict)

    def recipe(self, lane: Lane) -> Recipe:
        """The recipe where a lane leads to; read from the adapters on first use there."""
        with self.lock:
            if lane.place not in self._recipes:
                self._recipes[lane.place] = lane.bring(self.fold, self.open_recipe)
            return self._recipes[lane.place]

    def settle(self, source: Part, lane: Lane, blocks: Sequence[Rows]) -> None:
        """Show the recipe the whole weight, if it needs to see it."""
        recipe = lane.settle(self.fold, self.recipe(lane), source, blocks)
        self._recipes[lane.place] = recipe

    def finished(self, block: int, figures: Sequence[Figures]) -> Figures | None:
        """Note the figures of a block; those of the tensor once all are there."""
        with self.lock:
            self.parts[block] = figures
            if len(self.parts) < self.blocks:
                return None
            self._recipes.clear()
            return total(f for b in sorted(self.parts) for f in self.parts[b])


@dataclass(frozen=True)
class Task:
    """Some work of one step, for one worker; tasks take `turns` at the devices."""

    out: PartialFile
    progress: Progress
    step: int
    source: Part
    work: "Copy | Opened"
    blocks: tuple[Rows, ...] = ()
    turn: int = 0

    def run(self, lanes: Sequence[Lane]) -> int:
        """Do it; the number of bytes written.

        Raises:
            InputError: the source is shorter than it was when the plan was made.
        """
        if isinstance(self.work, Copy):
            return self._copy(self.work)
        lane = lanes[self.turn % len(lanes)]
        if self.work.fold.whole:
            self.work.settle(self.source, lane, self.blocks)
        return sum(self._fold(self.work, rows, lane) for rows in self.blocks)

    def _copy(self, copy: Copy) -> int:
        assert isinstance(self.source, SafetensorsFile)
        copy_range(self.source, self.out, copy.start, copy.stop, to=copy.to)
        return copy.nbytes

    def _fold(self, opened: Opened, rows: Rows, lane: Lane) -> int:
        fold = opened.fold
        data, figures = lane.fold(fold, opened.recipe(lane), self.source, rows)
        start, stop = fold.extent(rows)
        self.out.write(data.view("u1"), fold.tensor.start + start)
        if (whole := opened.finished(rows[0], figures)) is not None:
            self.progress.fold_done(fold.tensor.name, whole)
        return stop - start


@dataclass(frozen=True)
class Cutter:
    """What turns steps into tasks: where they read, what they need, and who folds."""

    inputs: Inputs
    executor: Executor

    def tasks(self, progress: Progress, out: PartialFile) -> Iterator[Task]:
        """The tasks of all steps of a file that are not done, in the order of its bytes."""
        for number, step in enumerate(progress.file.steps):
            if number < progress.first:
                continue
            works = self._cut(step)
            progress.begin(number, len(works))
            source = self.inputs.sources[step.source]
            for turn, (work, blocks) in enumerate(works, number):
                yield Task(out, progress, number, source, work, blocks, turn)

    def _cut(self, step: Copy | Fold) -> list[tuple[Copy | Opened, tuple[Rows, ...]]]:
        if isinstance(step, Copy):
            return [(part, ()) for part in _chunks(step)]
        blocks = tuple(self.executor.blocks(step))
        opened = Opened(step, self.inputs.open_recipe, len(blocks))
        return [(opened, blocks)] if step.whole else [(opened, (b,)) for b in blocks]


def _chunks(step: Copy) -> Iterator[Copy]:
    moved = step.to - step.start
    for start in range(step.start, step.stop, COPY_CHUNK):
        yield Copy(step.source, start, min(start + COPY_CHUNK, step.stop), start + moved)
