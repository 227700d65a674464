"""One safetensors file, read with `pread`: a truncated or shrinking file is an error, never a
SIGBUS, and a file that was replaced since its header was read is never mistaken for it.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.store.header import MAX_HEADER, REDOWNLOAD, parse_header
from lorakit.store.reading import LFS, check_file, check_pointer, reading
from lorakit.tensors import TensorInfo


class SafetensorsFile:
    """A `Source` over one file. Opening it reads the header, nothing else.

    Raises:
        InputError: there is no such file, or its header is not one (`lorakit.store.header`).
    """

    def __init__(self, path: Path, *, max_header: int = MAX_HEADER) -> None:
        self.path = path
        self._fd = -1
        self._opening = threading.Lock()
        self._limit = max_header
        self._stamp, header = _read_header(path, max_header)
        self.size = self._stamp.st_size
        self._infos, self.metadata = parse_header(header[8:], self.size, path)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What every tensor is, by name, in the order of the bytes."""
        return self._infos

    @property
    def on_disk(self) -> Mapping[str, TensorInfo]:
        """What the header says, whatever a subclass makes of it."""
        return self._infos

    @property
    def header(self) -> bytes:
        """The header as it lies in the file, its length before it. Read anew, not kept: of a large
        model it is the size of a plan.

        Raises:
            InputError: the file is gone, or is not the one whose header was read.
        """
        stamp, header = _read_header(self.path, self._limit)
        _check_same(stamp, self._stamp, self.path)
        return header

    @property
    def name(self) -> str:
        """The file's name, without folders."""
        return self.path.name

    @property
    def fd(self) -> int:
        """A descriptor for reading, opened on first use and kept until `close`.

        Raises:
            InputError: the file is gone, or is not the one whose header was read.
        """
        with self._opening:
            if self._fd < 0:
                self._fd = self._reopened()
            return self._fd

    def close(self) -> None:
        """Give the descriptor back; the next read opens the file again."""
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def read_rows(self, name: str, start: int, stop: int, into: Any, *, leading: int = 1) -> None:
        """Fill `into` with the bytes of rows `start` to `stop` of the tensor `name`.

        Raises:
            InputError: the bytes are not there any more, or cannot be read.
        """
        info = self._infos[name]
        step = info.nbytes // max(info.matrix(leading)[0], 1)
        read_exactly(self.fd, into, info.start + start * step, self.path)

    def _reopened(self) -> int:
        with reading(self.path):
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check_same(os.fstat(fd), self._stamp, self.path)
        except InputError:
            os.close(fd)
            raise
        return fd


def read_exactly(fd: int, into: Any, offset: int, file: object) -> None:
    """Fill the buffer `into` from `offset` of a file.

    Raises:
        InputError: the file ends before the buffer is full, or cannot be read.
    """
    whole = memoryview(into)
    view = whole.cast("B") if whole.nbytes else memoryview(b"")  # of no bytes there is no cast
    while view:
        with reading(file):
            got = os.preadv(fd, [view], offset)
        if not got:
            raise InputError(
                f"ended at byte {offset:,} while it was being read.", hint=REDOWNLOAD, file=file
            )
        view, offset = view[got:], offset + got


def _check_same(now: os.stat_result, then: os.stat_result, path: Path) -> None:
    if _identity(now) != _identity(then):
        raise InputError(
            "changed while it was being read.", hint="Run the command again.", file=path
        )


def _identity(stamp: os.stat_result) -> tuple[int, ...]:
    return stamp.st_dev, stamp.st_ino, stamp.st_size, stamp.st_mtime_ns


def _no_header(head: bytes, size: int, length: int, path: Path) -> InputError:
    """What is the matter with a file that has no room for the header that it begins with."""
    if head.lstrip().startswith(b"{"):
        return InputError("is JSON, not weights.", hint="Name the folder around it.", file=path)
    needed = f", its header alone should have {length:,}." if size >= 8 else "."
    said = f"is truncated or no safetensors file: {size:,} bytes{needed}"
    return InputError(said, hint=REDOWNLOAD, file=path)


def _read_header(path: Path, limit: int) -> tuple[os.stat_result, bytes]:
    check_file(path)
    with reading(path), path.open("rb", buffering=0) as f:
        stamp = os.fstat(f.fileno())
        size = stamp.st_size
        head = f.read(len(LFS))
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > size - 8:
            check_pointer(head, path)
            raise _no_header(head, size, length, path)
        if length > limit:
            raise InputError(
                f"has a header of {length:,} bytes; more than {limit:,} are refused.", file=path
            )
        header = bytearray(8 + length)
        read_exactly(f.fileno(), header, 0, path)
    return stamp, bytes(header)
