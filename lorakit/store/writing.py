"""Writing files so that they are absent, marked partial, or whole.

A file grows under `NAME.partial`: all its space is reserved first (a full disk shows at once),
blocks are written at their positions, and only `commit` gives it its name. File modes follow the
umask.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import OutputError, ResourceError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CHUNK = 1 << 20  # bytes, for copies without copy_file_range


@contextlib.contextmanager
def reporting(path: object) -> Iterator[None]:
    """Turn what the file system says while `path` is written into one clear line.

    Raises:
        ResourceError: the disk, a quota or a file size limit is full.
        OutputError: writing is not possible there.
    """
    try:
        yield
    except OSError as e:
        if e.errno in FULL:
            raise ResourceError(
                f"no space left: {e.strerror}.",
                hint="Free some and run the same command again: it goes on where it stopped.",
                file=path,
            ) from e
        raise OutputError(f"cannot be written: {e.strerror or e}.", file=path) from e


class PartialFile:
    """A file under construction at `NAME.partial`, of a size known beforehand.

    With `keep`, a file of that size from an earlier run is taken over as it is; `kept` says if so.
    """

    def __init__(self, path: Path, size: int, *, keep: bool = False) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.size = size
        mode = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC)
        with reporting(path):
            self.fd = os.open(self.partial, mode, 0o666)
            self.kept = keep and os.fstat(self.fd).st_size == size
            if not self.kept:
                os.ftruncate(self.fd, 0)
                if size:
                    os.posix_fallocate(self.fd, 0, size)

    def write(self, data: Any, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data).cast("B")
        with reporting(self.path):
            while view:
                done = os.pwrite(self.fd, view, offset)
                view, offset = view[done:], offset + done

    def sync(self) -> None:
        """Make what was written so far durable."""
        with reporting(self.path):
            os.fdatasync(self.fd)

    def commit(self, *, sync: bool) -> None:
        """Give the file its name, and with `sync` make it durable first."""
        with reporting(self.path):
            if sync:
                os.fsync(self.fd)
            self.close()
            self.partial.rename(self.path)
            if sync:
                sync_folder(self.path.parent)

    def close(self) -> None:
        """Let go of the file; what is written stays under `NAME.partial`."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def write_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Put a small file at `path` whole, or not at all."""
    out = PartialFile(path, len(data))
    try:
        out.write(data, 0)
        out.commit(sync=sync)
    finally:
        out.close()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def link_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to the file that `source` is, or leads to.

    Raises:
        OutputError: they are on different file systems, or there are no links.
    """
    with reporting(target):
        target.unlink(missing_ok=True)
        os.link(source.resolve(), target)


def copy_range(source: int, out: PartialFile, start: int, stop: int, *, to: int) -> None:
    """Copy bytes `start` to `stop` of a descriptor to offset `to`, in the kernel where it can.

    The kernel shares the blocks instead where the file system can (reflink) and both offsets lie
    alike in their pages.

    Raises:
        EOFError: the source ends before `stop`.
    """
    with reporting(out.path):
        while start < stop:
            try:
                done = os.copy_file_range(source, out.fd, stop - start, start, to)
            except OSError as e:
                if e.errno in FULL:
                    raise
                done = _copy_through_memory(source, out.fd, start, min(stop, start + CHUNK), to)
            if not done:
                raise EOFError(start)
            start, to = start + done, to + done


def _copy_through_memory(source: int, target: int, start: int, stop: int, to: int) -> int:
    data = os.pread(source, stop - start, start)
    done = 0
    while done < len(data):
        done += os.pwrite(target, memoryview(data)[done:], to + done)
    return done
