"""A plan cut into tasks for workers, and the book-keeping of which steps of a file are done.

Tasks are made as they are asked for, so their number costs nothing. A step is done when all its
tasks are; what a later run may skip are the steps before the first that is not.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from lorakit.engine.figures import Figures, total
from lorakit.engine.fold import Slab, blocks_of, fold_block, survey_block
from lorakit.engine.plan import Copy, Fold, OutputFile
from lorakit.math.recipe import Recipe
from lorakit.store.checkpoint import Part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.store.writing import PartialFile, copy_range

COPY_CHUNK = 32 << 20  # bytes

OpenRecipe = Callable[[Fold], Recipe]


@dataclass
class Progress:
    """Which steps of a file are done; `folded` holds the figures of those that were folds."""

    file: OutputFile
    left: list[int]  # tasks of every step that are still to do; -1: not yet begun
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

    def skip(self, steps: int, folded: Mapping[str, Figures]) -> None:
        """Take over from an earlier run that did the first `steps`."""
        self.left[:steps] = [0] * steps
        self.folded.update(folded)
        self._advance()

    def snapshot(self) -> tuple[int, dict[str, dict[str, float]]]:
        """How many steps are done from the start on, and the figures of the folds among them."""
        with self.lock:
            done = {s.tensor.name for s in self.file.steps[: self.first] if isinstance(s, Fold)}
            return self.first, {n: f.to_dict() for n, f in self.folded.items() if n in done}


@dataclass
class Opened:
    """A fold under way: its recipe, loaded by whichever worker is first, and the parts of its
    figures.
    """

    fold: Fold
    open_recipe: OpenRecipe
    blocks: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: dict[int, Figures] = field(default_factory=dict)
    _recipe: Recipe | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe; read from the adapters on first use."""
        with self.lock:
            if self._recipe is None:
                self._recipe = self.open_recipe(self.fold)
            return self._recipe

    def settle(self, source: Part, slab: Slab) -> None:
        """Show the recipe the whole weight, if it needs to see it."""
        recipe = self.recipe
        if recipe.surveys:
            blocks = blocks_of(self.fold)
            seen = [survey_block(self.fold, recipe, source, rows, slab) for rows in blocks]
            self._recipe = recipe.settled(seen)

    def finished(self, block: int, figures: Figures) -> Figures | None:
        """Note the figures of a block; those of the tensor once all are there."""
        with self.lock:
            self.parts[block] = figures
            if len(self.parts) < self.blocks:
                return None
            self._recipe = None
            return total(self.parts[b] for b in sorted(self.parts))


@dataclass(frozen=True)
class Task:
    """Some work of one step, for one worker."""

    out: PartialFile
    progress: Progress
    step: int
    source: Part
    work: "Copy | Opened"
    blocks: tuple[tuple[int, int], ...] = ()

    def run(self, slab: Slab) -> int:
        """Do it; the number of bytes written.

        Raises:
            InputError: the source is shorter than it was when the plan was made.
        """
        if isinstance(self.work, Copy):
            return self._copy(self.work)
        if self.work.fold.whole:
            self.work.settle(self.source, slab)
        return sum(self._fold(self.work, rows, slab) for rows in self.blocks)

    def _copy(self, copy: Copy) -> int:
        assert isinstance(self.source, SafetensorsFile)
        copy_range(self.source, self.out, copy.start, copy.stop, to=copy.to)
        return copy.nbytes

    def _fold(self, opened: Opened, rows: tuple[int, int], slab: Slab) -> int:
        fold = opened.fold
        data, figures = fold_block(fold, opened.recipe, self.source, rows, slab)
        step = fold.nbytes // max(1, fold.rows)
        self.out.write(data.view("u1"), fold.tensor.extent[0] + rows[0] * step)
        if (whole := opened.finished(rows[0], figures)) is not None:
            self.progress.fold_done(fold.tensor.name, whole)
        return (rows[1] - rows[0]) * step


def tasks_of(
    progress: Progress, out: PartialFile, sources: dict[str, Part], open_recipe: OpenRecipe
) -> Iterator[Task]:
    """The tasks of all steps of a file that are not done, in the order of its bytes."""
    for number, step in enumerate(progress.file.steps):
        if number < progress.first:
            continue
        works = _cut(step, open_recipe)
        progress.begin(number, len(works))
        for work, blocks in works:
            yield Task(out, progress, number, sources[step.source], work, blocks)


def _cut(
    step: Copy | Fold, open_recipe: OpenRecipe
) -> list[tuple[Copy | Opened, tuple[tuple[int, int], ...]]]:
    if isinstance(step, Copy):
        starts = range(step.start, step.stop, COPY_CHUNK)
        moved = step.to - step.start
        ends = [min(s + COPY_CHUNK, step.stop) for s in starts]
        return [(Copy(step.source, s, e, s + moved), ()) for s, e in zip(starts, ends, strict=True)]
    blocks = tuple(blocks_of(step))
    opened = Opened(step, open_recipe, len(blocks))
    return [(opened, blocks)] if step.whole else [(opened, (b,)) for b in blocks]
