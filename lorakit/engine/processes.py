"""The executor on processes: every worker has one that reads and folds for it, since threads that
call NumPy thousands of times a second wait for the interpreter lock more than they compute.

A process is a fork, made before the run has threads. It has the inputs as they are open here, and
writes nothing: finished rows come back in memory that both see, and the worker writes them. So what
a kill can leave behind is the same with processes and without.
"""

import ctypes
import gc
import mmap
import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from lorakit.engine.executor import CpuLane, Folded, Inputs, Lane, OpenRecipe, Rows
from lorakit.engine.fold import blocks_of
from lorakit.engine.plan import Fold, Plan
from lorakit.errors import LorakitError, ResourceError
from lorakit.math.cast import storage
from lorakit.math.recipe import Recipe
from lorakit.tensors import Source

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
EXPECTED = (LorakitError, OSError, MemoryError)  # all else is a bug, and ends the process


class Processes:
    """Every worker has its blocks folded by a process of its own."""

    name = "cpu"

    def __init__(self, plan: Plan, inputs: Inputs, jobs: int) -> None:
        self._block = max(map(_block_bytes, plan.folds), default=1)
        self._inputs = inputs
        self._jobs = jobs
        self._lanes: list[ProcessLane] = []

    def blocks(self, fold: Fold) -> Iterator[Rows]:
        """Those of a fold in this process."""
        return blocks_of(fold)

    def lanes(self) -> Sequence[Lane]:
        """The way to the process of a new worker."""
        return (self._lanes.pop(),)

    @contextmanager
    def session(self) -> Iterator[None]:
        """The processes, which end with it."""
        with ExitStack() as held:
            gc.freeze()  # collections write to what they look at: nothing of it would stay shared
            held.callback(gc.unfreeze)
            self._lanes = [held.enter_context(self._started()) for _ in range(self._jobs)]
            yield

    @contextmanager
    def _started(self) -> Iterator["ProcessLane"]:
        memory = mmap.mmap(-1, max(1, self._block))  # shared with the fork
        ours, theirs = multiprocessing.Pipe()
        server = _Server(memory, self._inputs)
        child = multiprocessing.get_context("fork").Process(
            target=_serve, args=(ours, theirs, server), daemon=True
        )
        try:
            with _forking():
                child.start()
            theirs.close()
            yield ProcessLane(child, ours, memory)
        finally:
            ours.close()
            if child.pid:
                child.join()


@contextmanager
def _forking() -> Iterator[None]:
    """Keep Ctrl-C until afterwards: a process forked within never hears of it, and is ended.

    Raises:
        ResourceError: the system has no room for another process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    except OSError as full:
        raise ResourceError(
            f"no process could be started: {full.strerror}.", hint="Lower --jobs."
        ) from full
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ProcessLane:
    """The way of one worker to its process and back."""

    place = "cpu"

    def __init__(self, process: BaseProcess, way: Connection, memory: mmap.mmap) -> None:
        self._process = process
        self._way = way
        self._memory = np.frombuffer(memory, np.uint8)
        self._told: Fold | None = None

    def bring(self, fold: Fold, open_recipe: OpenRecipe) -> Recipe:
        """Nothing: the process opens the recipe itself."""
        return Recipe()

    def settle(self, fold: Fold, recipe: Recipe, source: Source, blocks: Sequence[Rows]) -> Recipe:
        """Have the process look at the whole weight."""
        self._ask("settle", fold, blocks)
        return recipe

    def fold(self, fold: Fold, recipe: Recipe, source: Source, rows: Rows) -> Folded:
        """The finished rows, in shared memory, and their figures."""
        figures = self._ask("fold", fold, rows)
        start, stop = fold.extent(rows)
        found = self._memory[: stop - start]
        if fold.unit:
            return found, figures
        dtype = storage(fold.tensor.dtype)
        return found.view(dtype).reshape(rows[1] - rows[0], fold.cols), figures

    def _ask(self, what: str, fold: Fold, rows: Any) -> Any:
        news, self._told = None if fold is self._told else fold, fold
        try:
            self._way.send((what, news, rows))
            answer = self._way.recv()
        except (EOFError, OSError) as gone:
            raise self._ended() from gone
        if isinstance(answer, BaseException):
            self._told = None  # for it may have failed at what was told
            raise answer
        return answer

    def _ended(self) -> Exception:
        """Why the process did."""
        self._process.join()
        if (self._process.exitcode or 0) >= 0:
            return RuntimeError("a process of this run failed; it has said how")  # a bug of ours
        return ResourceError(
            "a process of this run was killed, most likely because memory ran out.",
            hint="Lower --jobs or --max-memory: the run goes on where it stopped.",
        )


def may_fork() -> bool:
    """Whether this process may be forked: nothing but the thread that asks runs in it, and it is
    not itself the kind of process that may have no others (a worker of a pool).
    """
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    return alone and not multiprocessing.current_process().daemon


def _block_bytes(fold: Fold) -> int:
    return fold.extent((0, min(fold.block_rows, fold.rows)))[1]


class _Server:
    """What a process does: it folds as it is asked, and keeps the fold that it was told last.

    It does not look at the plan, whose pages would by that become its own: references are counted.
    """

    def __init__(self, memory: mmap.mmap, inputs: Inputs) -> None:
        self._inputs = inputs
        self._lane = CpuLane(np.frombuffer(memory, np.uint8))

    def answer(self, what: str, news: Fold | None, rows: Any) -> Any:
        """What was asked for: the figures of rows that lie in the shared memory now, or nothing."""
        if news:
            self._fold, self._recipe = news, Recipe()  # which lets go of the last one first
            self._recipe = self._lane.bring(news, self._inputs.open_recipe)
        source = self._inputs.sources[self._fold.source]
        if what == "settle":
            self._recipe = self._lane.settle(self._fold, self._recipe, source, rows)
            return None
        _, figures = self._lane.fold(self._fold, self._recipe, source, rows)
        return figures


def _serve(ours: Connection, asked: Connection, server: _Server) -> None:
    """Answer until the other end is closed."""
    ours.close()  # which is that end, and is open here too
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(EOFError, OSError):
        while True:
            asked.send(_answered(server, *asked.recv()))


def _answered(server: _Server, what: str, news: Fold | None, rows: Any) -> Any:
    try:
        return server.answer(what, news, rows)
    except EXPECTED as error:
        error.add_note(traceback.format_exc())
        return error  # and raised where it was asked
