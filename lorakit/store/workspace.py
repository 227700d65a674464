"""Where an output is built: `OUT.partial/`, renamed to OUT as the very last act.

The folder is locked while a process works in it (the kernel drops the lock when the process dies,
so a kill leaves nothing to clean), and holds a journal that is bound to the plan: a second run of
the same plan goes on, another plan is refused. Nothing of this remains in a finished output; what
a kill between the last two steps leaves behind, the next command on that output sweeps away.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import OutputError
from lorakit.store.writing import reporting, sync_folder

JOURNAL = ".lorakit-journal"


class Workspace:
    """The folder in which one output grows, held by this process alone.

    `output` is a folder, or a file when it ends in `.safetensors`; then `extras` of a finished
    run lie beside it. `identity` says which plan on which inputs this is; `records` are the
    journal's lines from an earlier run of the same.

    Raises:
        OutputError: the output exists (without `overwrite`), another process writes it, or an
            unfinished run of another plan is there.
    """

    def __init__(
        self, output: Path, identity: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self._old = output.with_name("." + output.name + ".lorakit-replaced")
        self._sweep()
        if os.path.lexists(output) and not overwrite:
            raise OutputError(
                "the output exists.", hint="Pass --overwrite or another --output.", file=output
            )
        with reporting(output):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder, output)
            self.records = self._resume(identity, overwrite=overwrite)
            self._journal = os.open(
                self.folder / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        if not self.records:
            self.record(identity)

    def record(self, line: Mapping[str, Any], *, sync: bool = False) -> None:
        """Append a line to the journal; with `sync`, durably."""
        with reporting(self.folder / JOURNAL):
            os.write(self._journal, json.dumps(line, separators=(",", ":")).encode() + b"\n")
            if sync:
                os.fdatasync(self._journal)

    def commit(self, *, sync: bool) -> None:
        """Give the finished output its name."""
        with reporting(self.output):
            if sync:
                sync_folder(self.folder)
            if is_file(self.output):
                self._commit_file()
            else:
                self._commit_folder()
            self._sweep()
            if sync:
                sync_folder(self.output.parent)
        self.release()

    def nbytes(self) -> int:
        """Bytes that an earlier run has taken from the disk already."""
        found = (p.stat() for p in self.folder.rglob("*") if p.is_file())
        return sum(s.st_blocks * 512 for s in found)

    def release(self) -> None:
        """Let go of the lock and the journal; what is there stays for the next run."""
        for name in ("_journal", "_lock"):
            if (fd := getattr(self, name, -1)) >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def discard(self) -> None:
        """Remove everything that was built."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def _commit_folder(self) -> None:
        if os.path.lexists(self.output):
            _remove(self._old)
            self.output.rename(self._old)
        self.folder.rename(self.output)
        _remove(self._old)

    def _commit_file(self) -> None:
        for extra in sorted(self.folder.iterdir()):
            if extra.name not in (self.output.name, JOURNAL):
                extra.replace(self.output.with_name(f"{self.output.stem}.{extra.name}"))
        (self.folder / self.output.name).replace(self.output)
        _remove(self.folder)

    def _resume(self, identity: Mapping[str, Any], *, overwrite: bool) -> list[dict[str, Any]]:
        if any(self.folder.iterdir()) and not (self.folder / JOURNAL).exists():
            raise OutputError(
                "is needed to build the output in, and holds something else.",
                hint="Move it away.",
                file=self.folder,
            )
        records = read_journal(self.folder / JOURNAL)
        if records and records[0] != identity and not overwrite:
            raise OutputError(
                "an unfinished run with other inputs or options is there.",
                hint="Pass --overwrite to discard it, or run its own command again to finish it.",
                file=self.folder,
            )
        if records and records[0] == identity:
            return records
        for leftover in self.folder.iterdir():
            _remove(leftover)
        return []

    def _sweep(self) -> None:
        if not os.path.lexists(self.output):
            return
        _remove(self._old)
        if self.output.is_dir():
            _remove(self.output / JOURNAL)
        if self.folder.is_dir() and [f.name for f in self.folder.iterdir()] == [JOURNAL]:
            with contextlib.suppress(OutputError):
                os.close(_lock(self.folder, self.output))  # else somebody has just begun there
                _remove(self.folder)


def is_file(output: Path) -> bool:
    """Whether an output of this name is one file rather than a folder."""
    return output.suffix == ".safetensors"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's lines; a last line that a kill cut short is left out, and cut off the file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _lock(folder: Path, output: Path) -> int:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = folder.exists() and os.path.samestat(os.fstat(fd), folder.stat())
    except BlockingIOError:
        same = False
    if not same:  # held by another process, or just renamed to the output by it
        os.close(fd)
        raise OutputError(
            "another process is writing this output.", hint="Wait for it to end.", file=output
        )
    return fd


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
