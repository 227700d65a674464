"""Work done by several workers, one BLAS thread each, and taken over in its order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from lorakit.engine.machine import available_cores, available_memory
from lorakit.engine.preflight import PROCESS
from lorakit.errors import ResourceError
from lorakit.tensors import size

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(
    tasks: Iterable[Task], compute: Callable[[Task], Result], jobs: int
) -> Iterator[tuple[Task, Result]]:
    """Every task with what it computed to; no more are under way than there are workers.

    Raises:
        LorakitError: what the first task that failed raised; those after it are not begun.
    """
    from threadpoolctl import threadpool_limits

    waiting: deque[tuple[Task, Future[Result]]] = deque()
    todo = iter(tasks)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                for task in islice(todo, jobs - len(waiting)):
                    waiting.append((task, pool.submit(compute, task)))
                if not waiting:
                    return
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def swept(
    compute: Callable[[Task], Result], tasks: Iterable[Task], jobs: int | None = None
) -> list[Result]:
    """What every task computes to, in their order; by default one worker a core."""
    return [result for _, result in in_order(tasks, compute, jobs or available_cores())]


def jobs_within(memory: int, wanted: int, limit: int | None) -> int:
    """The number of workers, at most `wanted`, that take no more memory than there is.

    memory: bytes of one worker at most. limit: bytes, None for what the machine has available.

    Raises:
        ResourceError: there is too little for one.
    """
    room = limit if limit is not None else available_memory()
    if PROCESS + memory > room:
        raise ResourceError(
            f"needs {size(PROCESS + memory)} of memory, {size(room)} are there.",
            hint="Raise --max-memory, or free some.",
        )
    return max(1, min(wanted, (room - PROCESS) // max(memory, 1)))
