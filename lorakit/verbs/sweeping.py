"""One function over many weights, on several workers."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lorakit.engine.machine import available_cores

T = TypeVar("T")
R = TypeVar("R")


def swept(function: Callable[[T], R], items: Sequence[T], jobs: int | None = None) -> list[R]:
    """What the function returns for each item, in their order; one worker a core by default.

    The first error ends it: what has not begun by then does not begin.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(jobs or available_cores()) as pool:
        try:
            return list(pool.map(function, items))
        finally:
            pool.shutdown(cancel_futures=True)
