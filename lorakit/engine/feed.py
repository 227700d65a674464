"""Which worker does which task next.

A kernel lets one thread at a time write to a file; the others wait for it, busily. So workers write
to different files as long as there are some, and then help where the fewest are.
"""

import threading
from collections.abc import Iterable, Iterator

from lorakit.engine.tasks import Task


class Feed:
    """The tasks of a run, from those of every file; they are made as they are asked for."""

    def __init__(self, files: Iterable[Iterator[Task]]) -> None:
        self._coming = iter(files)
        self._begun: list[_File] = []
        self._lock = threading.Lock()

    def tasks(self) -> Iterator[Task]:
        """Those of one worker, as long as there are any."""
        while (file := self._next()) is not None:
            yield from file
            with self._lock:
                file.workers -= 1

    def _next(self) -> "_File | None":
        with self._lock:
            if (tasks := next(self._coming, None)) is not None:
                self._begun.append(_File(tasks))
            self._begun = [f for f in self._begun if not f.ended]
            file = min(self._begun, key=lambda f: f.workers, default=None)
            if file is not None:
                file.workers += 1
            return file


class _File:
    """The tasks of one file, for any number of workers."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self.workers = 0
        self.ended = False
        self._tasks = tasks
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        with self._lock:
            try:
                return next(self._tasks)
            except StopIteration:
                self.ended = True
                raise
