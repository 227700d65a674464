"""Running a plan: workers that read, fold and write; a finisher that makes it durable behind them.

Every file grows under a partial name in the workspace. Each time enough of it is done, the finisher
syncs it and writes to the journal how far it is; when all of it is, it gets its name. So a run that
is killed anywhere goes on from the last line of the journal.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorakit.engine.executor import Cpu, Executor, Inputs
from lorakit.engine.feed import Feed
from lorakit.engine.figures import Done
from lorakit.engine.plan import OutputFile, Plan
from lorakit.engine.tasks import Cutter, Progress, Task
from lorakit.store.hashing import sha256_of
from lorakit.store.safetensors import SafetensorsFile
from lorakit.store.workspace import Workspace
from lorakit.store.writing import PartialFile, link_file, partial_path, sync_path

CHECKPOINT = 256 << 20  # bytes of a file between two lines of the journal


@dataclass
class Run:
    """One run of a plan into a workspace. `report` is called with bytes as they are written."""

    plan: Plan
    inputs: Inputs
    workspace: Workspace
    sync: bool = True
    checksum: bool = False
    report: Callable[[int], None] = lambda _: None
    checkpoint: int = CHECKPOINT
    executor: Executor = field(default_factory=Cpu)

    def __post_init__(self) -> None:
        self.done: dict[str, Done] = {}
        self._stop = threading.Event()
        self._finishing: queue.SimpleQueue[tuple[Progress, PartialFile, bool] | None] = (
            queue.SimpleQueue()
        )
        self._open: list[PartialFile] = []

    def run(self, jobs: int) -> dict[str, Done]:
        """Write every file of the plan that is not written yet; what there is to say of each.

        Raises:
            LorakitError: the first thing that went wrong; what is done stays for the next run.
        """
        from threadpoolctl import threadpool_limits

        earlier = {r["file"]: r for r in self.workspace.records if "file" in r}  # the last of each
        self._cutter = Cutter(self.inputs, self.executor)
        self._feed = Feed(self._tasks(f, earlier.get(f.name, {})) for f in self.plan.files)
        with threadpool_limits(1, "blas"), self.executor.session():
            self._run_threads(jobs)
        return self.done

    def _run_threads(self, jobs: int) -> None:
        try:
            with ThreadPoolExecutor(jobs + 1) as pool:  # which waits for all of them in the end
                try:
                    with self._stopping():
                        finisher = pool.submit(self._finish)
                        for worker in [pool.submit(self._work) for _ in range(jobs)]:
                            worker.result()
                finally:  # whenever Ctrl-C came: nothing else ends the finisher
                    self._finishing.put(None)
        finally:
            for out in self._open:
                out.close()
        finisher.result()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Whatever is raised within stops all threads at their next task."""
        try:
            yield
        except BaseException:
            self._stop.set()
            raise

    def _work(self) -> None:
        with self._stopping():
            lanes = self.executor.lanes()
            for task in self._feed.tasks():
                if self._stop.is_set():
                    return
                self.report(task.run(lanes))
                self._task_done(task)

    def _task_done(self, task: Task) -> None:
        before = task.progress.bytes_done
        task.progress.task_done(task.step)
        passed = task.progress.bytes_done // self.checkpoint > before // self.checkpoint
        if passed and not task.progress.done:
            self._finishing.put((task.progress, task.out, False))
        if task.progress.done and task.progress.claim():
            self._finishing.put((task.progress, task.out, True))

    def _tasks(self, file: OutputFile, record: Mapping[str, Any]) -> Iterator[Task]:
        """The tasks of a file that are not done, from where its line of the journal stands."""
        path = self.workspace.folder / file.name
        if record.get("done") and _has_size(path, file.size):
            self.done[file.name] = self._taken_over(record, path)
            self.report(file.size)
        elif file.link:
            yield from self._linked(file)
        else:
            yield from self._begin(file, record)

    def _linked(self, file: OutputFile) -> Iterator[Task]:
        source = self.inputs.sources[file.link]
        assert isinstance(source, SafetensorsFile)
        path = self.workspace.folder / file.name
        link_file(source.path, path)
        self.done[file.name] = Done({}, sha256_of(path) if self.checksum else "")
        yield from ()

    def _taken_over(self, record: Mapping[str, Any], path: Path) -> Done:
        """What an earlier run did, with what this run promises and that one did not."""
        done = Done.from_dict(record)
        if self.sync and record.get("boot"):
            sync_path(path)
        if self.checksum and not done.sha256:
            return replace(done, sha256=sha256_of(path))
        return done

    def _begin(self, file: OutputFile, record: Mapping[str, Any]) -> Iterator[Task]:
        path = self.workspace.folder / file.name
        keep = "steps" in record and _has_size(partial_path(path), file.size)
        if record and not keep:  # else, after a kill from here on, a new file would be taken for it
            self._record({"file": file.name, "steps": 0, "figures": {}})
        out = PartialFile(path, file.size, keep=keep)
        self._open.append(out)
        progress = Progress(file, [-1] * len(file.steps), self.executor.name)
        if keep:
            progress.skip(record["steps"], Done.from_dict(record))
            self.report(progress.bytes_done)
        out.write(file.header, 0)
        yield from self._cutter.tasks(progress, out)
        if progress.done and progress.claim():
            self._finishing.put((progress, out, True))

    def _finish(self) -> None:
        with self._stopping():
            while (item := self._finishing.get()) is not None:
                progress, out, last = item
                if not self._stop.is_set():
                    (self._close if last else self._checkpoint)(progress, out)

    def _checkpoint(self, progress: Progress, out: PartialFile) -> None:
        """Journal how far a file is, once that much of it is durable."""
        steps, done = progress.snapshot()
        if out.fd < 0:
            return
        if self.sync:
            out.sync()
        self._record({"file": progress.file.name, "steps": steps, **done.to_dict()})

    def _close(self, progress: Progress, out: PartialFile) -> None:
        out.commit(sync=self.sync)
        _, done = progress.snapshot()
        done = replace(done, sha256=sha256_of(out.path) if self.checksum else "")
        self._record({"file": progress.file.name, "done": True, **done.to_dict()})
        self.done[progress.file.name] = done

    def _record(self, line: dict[str, Any]) -> None:
        self.workspace.record(line, sync=self.sync)


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size
