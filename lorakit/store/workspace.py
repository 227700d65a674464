"""Where an output is built: `OUT.partial/`, renamed to OUT as the very last act.

The folder is locked while a process works in it (the kernel drops the lock when the process dies,
so a kill leaves nothing to clean), and holds a journal that is bound to the plan: a second run of
the same plan goes on, another plan is refused. Nothing of this remains in a finished output; what
a kill between the last two steps leaves behind, the next command on that output sweeps away.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lorakit.errors import OutputError
from lorakit.store.journal import (
    JOURNAL,
    append,
    encoded,
    holding,
    not_synced,
    open_journal,
    read_journal,
)
from lorakit.store.output import is_file, named, remove, remove_replaced, replaced_path
from lorakit.store.writing import LACKING, make_folder, partial_path, reporting, sync_path


class Workspace:
    """The folder in which one output grows, held by this process alone.

    `output` is a folder, or a file (`lorakit.store.output.is_file`); then `extras` of a finished
    run lie beside it. `identity` says which plan on which inputs this is, in what JSON can hold;
    `records` are the lines that hold of an earlier run's journal, which without `keep` is gone.

    Raises:
        OutputError: the output exists (without `overwrite`) or cannot be replaced, another process
            writes it, or an unfinished run of another plan is there.
    """

    def __init__(
        self,
        output: Path,
        identity: Mapping[str, Any],
        *,
        overwrite: bool = False,
        keep: bool = True,
    ) -> None:
        self.output = output = named(output)
        self.folder = partial_path(output)
        self._overwrite, self._keep = overwrite, keep
        _workspaces.add(self)
        try:
            with reporting(output):
                sweep(output)
                self._check_free()
                make_folder(self.folder.parent)
                self.folder.mkdir(exist_ok=True)
                self._lock = _lock(self.folder, output)
                self._check_free()  # somebody may have finished it just before
                self.records = holding(self._resume(identity))
                self._journal = open_journal(self.folder / JOURNAL)
            if not self.records:
                self._append(identity)
        except BaseException:
            self.release()
            raise

    def record(self, line: Mapping[str, Any], *, sync: bool = True) -> None:
        """Append a line to the journal, durably; without `sync`, one that holds until the machine
        goes down.
        """
        self._append(line if sync else not_synced(line), sync=sync)

    def _append(self, line: Mapping[str, Any], *, sync: bool = False) -> None:
        with reporting(self.folder / JOURNAL):
            append(self._journal, line)
            if sync:
                os.fdatasync(self._journal)

    def commit(self, *, sync: bool) -> None:
        """Give the finished output its name.

        Raises:
            OutputError: something took that name meanwhile, or it cannot be given.
        """
        with reporting(self.output):
            self._check_free()
            if sync:
                sync_path(self.folder)
            if is_file(self.output):
                self._commit_file()
            else:
                self._commit_folder()
            if sync:
                sync_path(self.output.parent)
            sweep(self.output)
        self.release()

    def nbytes(self) -> int:
        """Bytes that an earlier run has taken from the disk already."""
        found = (p.stat() for p in self.folder.rglob("*") if p.is_file())
        return sum(s.st_blocks * 512 for s in found)

    def release(self) -> None:
        """Let go of the lock and the journal; what was built stays for the next run.

        Where nothing was, the folder goes.
        """
        _remove_if_empty(self.folder, getattr(self, "_lock", -1))
        self._close()

    def discard(self) -> None:
        """Remove everything that was built."""
        with contextlib.suppress(OSError):
            self._clear()
        self.release()

    def _close(self) -> None:
        for name in ("_journal", "_lock"):
            if (fd := getattr(self, name, -1)) >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def _commit_folder(self) -> None:
        if os.path.lexists(self.output):
            remove_replaced(self.output)
            self.output.rename(replaced_path(self.output))
        self.folder.rename(self.output)

    def _commit_file(self) -> None:
        for extra in sorted(self.folder.iterdir()):
            if extra.name not in (self.output.name, JOURNAL):
                extra.replace(self.output.with_name(f"{self.output.stem}.{extra.name}"))
        (self.folder / self.output.name).replace(self.output)
        _remove_if_empty(self.folder, self._lock)

    def _check_free(self) -> None:
        if os.path.lexists(self.output) and not self._overwrite:
            raise OutputError(
                "the output exists.", hint="Pass --overwrite or another --output.", file=self.output
            )
        if is_file(self.output) and self.output.is_dir() and not self.output.is_symlink():
            raise OutputError(
                "is a folder, and the result is a file.",
                hint="Remove it, or name another --output.",
                file=self.output,
            )

    def _resume(self, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
        identity = json.loads(encoded(identity))  # as it is read back: tuples are lists there
        if any(self.folder.iterdir()) and not (self.folder / JOURNAL).exists():
            raise OutputError(
                "is needed to build the output in, and holds something else.",
                hint="Move it away.",
                file=self.folder,
            )
        records = read_journal(self.folder / JOURNAL)
        if records and records[0] != identity and not self._overwrite:
            raise OutputError(
                "an unfinished run with other inputs or options is there.",
                hint="Pass --overwrite to discard it, or run its own command again to finish it.",
                file=self.folder,
            )
        if self._keep and records and records[0] == identity:
            return records
        self._clear()
        return []

    def _clear(self) -> None:
        """Empty the folder, the journal last: without it, the rest would count as foreign."""
        for leftover in sorted(self.folder.iterdir(), key=lambda p: p.name == JOURNAL):
            remove(leftover)


@contextlib.contextmanager
def built(
    output: Path,
    identity: Mapping[str, Any],
    *,
    overwrite: bool = False,
    sync: bool = True,
    keep: bool = False,
) -> Iterator[Workspace]:
    """A workspace whose folder gets the name of the output in the end.

    If anything is raised within, what was built is removed; with `keep` it stays for the next run.

    Raises:
        OutputError: as `Workspace` and its `commit`.
    """
    workspace = Workspace(output, identity, overwrite=overwrite, keep=keep)
    try:
        yield workspace
        workspace.commit(sync=sync)
    except BaseException:
        (workspace.release if keep else workspace.discard)()
        raise


_workspaces: WeakSet[Workspace] = WeakSet()


def _let_go() -> None:
    """In a fork, which would hold the lock for as long as it outlives this process."""
    for workspace in _workspaces:
        workspace._close()


os.register_at_fork(after_in_child=_let_go)


def sweep(output: Path) -> bool:
    """Whether an output is there; what a kill between its last two steps left of them goes."""
    if not os.path.lexists(output):
        return False
    remove_replaced(output)
    if output.is_dir():
        remove(output / JOURNAL)
    if _is_empty(folder := partial_path(output)):
        with contextlib.suppress(OutputError):  # somebody has just begun there
            lock = _lock(folder, output)
            _remove_if_empty(folder, lock)
            os.close(lock)
    return True


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and {f.name for f in folder.iterdir()} <= {JOURNAL}


def _remove_if_empty(folder: Path, lock: int) -> None:
    """Remove the folder if nothing was built in it and it is the one that `lock` holds."""
    with contextlib.suppress(OSError):
        if lock >= 0 and _leads_to(folder, lock) and _is_empty(folder):
            remove(folder)


def _lock(folder: Path, output: Path) -> int:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    if not (_is_ours(fd) and _leads_to(folder, fd)):  # or just renamed to the output by another
        os.close(fd)
        raise OutputError(
            "another process is writing this output.", hint="Wait for it to end.", file=output
        )
    return fd


def _is_ours(fd: int) -> bool:
    """Whether nobody else has the lock; where the file system has none, nobody has."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in {*LACKING, errno.ENOLCK}:
            os.close(fd)
            raise
    return True


def _leads_to(folder: Path, fd: int) -> bool:
    return folder.exists() and os.path.samestat(os.fstat(fd), folder.stat())
