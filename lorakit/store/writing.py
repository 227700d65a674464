"""Writing files so that they are absent, marked partial, or whole.

A file grows under `NAME.partial`: all its space is reserved first (a full disk shows at once),
blocks are written at their positions, and only `commit` gives it its name. File modes follow the
umask.
"""

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lorakit.errors import SCARCE, OutputError, ResourceError, scarce
from lorakit.store.header import TORCH, format_header
from lorakit.store.reading import reading
from lorakit.store.safetensors import SafetensorsFile, read_exactly
from lorakit.tensors import TensorInfo

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How a file system says that it has no such call: shared folders, some FUSE, C libraries but glibc.
LACKING = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
CHUNK = 1 << 20  # bytes, for copies without copy_file_range


@contextlib.contextmanager
def reporting(path: object) -> Iterator[None]:
    """Turn what the file system says while `path` is written into one clear line.

    Raises:
        ResourceError: the disk, a quota or a file size limit is full, or descriptors are short.
        OutputError: writing is not possible there.
    """
    try:
        yield
    except OSError as e:
        if e.errno in FULL:
            raise ResourceError(f"no space left: {e.strerror}.", hint=_way(e), file=path) from e
        if e.errno in SCARCE:
            raise scarce(e, path) from e
        raise OutputError(f"cannot be written: {e.strerror or e}.", file=path) from e


def _way(full: OSError) -> str:
    """What to do about a limit of the disk, of this process, or of the file system (FAT: 4 GiB)."""
    way = "Free some"
    if full.errno == errno.EFBIG:
        if resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY:
            return "The file system takes none so large: merge with --max-shard-size, or elsewhere."
        way = "Raise the limit (ulimit -f)"
    return f"{way} and run the same command again: it goes on where it stopped."


class PartialFile:
    """A file under construction at `NAME.partial`, of a size known beforehand.

    With `keep`, what an earlier run left there is taken over as it is. As a context it lets go of
    the file in the end; only `commit` gives it its name.
    """

    def __init__(self, path: Path, size: int, *, keep: bool = False) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.size = size
        mode = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC)
        with reporting(path):
            self.fd = os.open(self.partial, mode, 0o666)
            if not keep:
                self._reserve()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
                sync_path(self.path.parent)

    def _reserve(self) -> None:
        try:
            if self.size:
                _reserve(self.fd, self.size)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file; what is written stays under `NAME.partial`."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _reserve(fd: int, size: int) -> None:
    """Take the space of a file where the file system can, else only make it so long."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if e.errno not in LACKING:
            raise
        os.ftruncate(fd, size)


def partial_path(path: Path) -> Path:
    """Where a file grows until it gets its name."""
    return path.with_name(path.name + ".partial")


def write_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Put a small file at `path` whole, or not at all."""
    with PartialFile(path, len(data)) as out:
        out.write(data, 0)
        out.commit(sync=sync)


def write_tensors(
    path: Path,
    infos: Sequence[TensorInfo],
    blocks: Iterable[Any],
    metadata: Mapping[str, str] = TORCH,
    *,
    sync: bool,
    report: Callable[[int], None] = lambda _: None,
) -> int:
    """Put a safetensors file at `path` whole, or not at all; its bytes.

    `blocks`, of bytes, are those of the tensors one after the other.

    Raises:
        InputError: a name cannot stand in a header.
        OutputError, ResourceError: it cannot be written.
    """
    header = format_header(infos, metadata)
    with PartialFile(path, len(header) + sum(i.nbytes for i in infos)) as out:
        out.write(header, 0)
        at = len(header)
        for block in blocks:
            out.write(block, at)
            at += (size := memoryview(block).nbytes)
            report(size)
        out.commit(sync=sync)
    return out.size


def make_folder(path: Path, *, sync: bool = True) -> None:
    """Make a folder, and those that it lies in, if they are not there.

    Raises:
        OutputError, ResourceError: it cannot be made.
    """
    if path.is_file():
        raise OutputError(
            "is a file, and has to be a folder.", hint="Name another --output.", file=path
        )
    with reporting(path):
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
    for made in missing if sync else ():
        sync_path(made.parent)


def sync_path(path: Path) -> None:
    """Make a file, or the names in a folder, durable; these as far as the file system can.

    Raises:
        OutputError, ResourceError: it failed.
    """
    with reporting(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as e:
            if e.errno not in LACKING or not path.is_dir():
                raise
        finally:
            os.close(fd)


def link_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to the file that `source` is, or leads to.

    Raises:
        OutputError: they are on different file systems, or there are no links.
    """
    with reporting(target):
        target.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError as e:
            if e.errno in FULL | SCARCE:
                raise
            raise OutputError(
                f"cannot be a link to {source}: {e.strerror}.",
                hint="Leave out --link.",
                file=target,
            ) from e


def copy_file(source: Path, target: Path, *, sync: bool = True) -> None:
    """Copy a file of any kind, whole or not at all, in the kernel where it can.

    Raises:
        OutputError, ResourceError: it cannot be written.
        InputError: the source ends before its size, or cannot be read.
    """
    with reading(source):
        file = source.open("rb")
    with file:
        size = os.fstat(file.fileno()).st_size
        with PartialFile(target, size) as out:
            _copy(file.fileno(), source, out, (0, size), 0)
            out.commit(sync=sync)


def copy_range(
    source: SafetensorsFile, out: PartialFile, start: int, stop: int, *, to: int
) -> None:
    """Copy bytes `start` to `stop` of a file to offset `to`, in the kernel where it can.

    The kernel shares the blocks instead where the file system can (reflink) and both offsets lie
    alike in their pages.

    Raises:
        InputError: the source ends before `stop`, or cannot be read.
    """
    _copy(source.fd, source.path, out, (start, stop), to)


def _copy(fd: int, path: Path, out: PartialFile, span: tuple[int, int], to: int) -> None:
    start, stop = span
    with reporting(out.path):
        while start < stop:
            done = _copy_in_kernel(fd, out.fd, stop - start, start, to)
            if not done:
                done = min(stop - start, CHUNK)
                data = bytearray(done)
                read_exactly(fd, data, start, path)
                out.write(data, to)
            start, to = start + done, to + done


def _copy_in_kernel(source: int, target: int, count: int, start: int, to: int) -> int:
    """The number of bytes copied; 0 where the kernel does not do it, or the source ends."""
    try:
        return os.copy_file_range(source, target, count, start, to)
    except OSError as e:
        if e.errno in FULL:
            raise
        return 0
