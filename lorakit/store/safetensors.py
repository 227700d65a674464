"""One safetensors file, read with `pread`: a truncated or shrinking file is an error, never a
SIGBUS.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.store.header import MAX_HEADER, REDOWNLOAD, parse_header
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
        self.size, self.header = _read_header(path, max_header)
        self._infos, self.metadata = parse_header(self.header[8:], self.size, path)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What every tensor is, by name, in the order of the bytes."""
        return self._infos

    @property
    def name(self) -> str:
        """The file's name, without folders."""
        return self.path.name

    @property
    def fd(self) -> int:
        """A descriptor for reading, opened on first use and kept until `close`."""
        with self._opening:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._fd

    def close(self) -> None:
        """Give the descriptor back; the next read opens the file again."""
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def read_rows(self, name: str, start: int, stop: int, into: Any) -> None:
        """Fill `into` with the bytes of rows `start` to `stop` of the tensor `name`."""
        info = self._infos[name]
        step = info.nbytes // max(info.rows, 1)
        read_exactly(self.fd, into, info.extent[0] + start * step, self.path)


def read_exactly(fd: int, into: Any, offset: int, file: object) -> None:
    """Fill the buffer `into` from `offset` of a file.

    Raises:
        InputError: the file ends before the buffer is full.
    """
    view = memoryview(into).cast("B")
    while view:
        got = os.preadv(fd, [view], offset)
        if not got:
            raise InputError(
                f"ended at byte {offset:,} while it was being read.", hint=REDOWNLOAD, file=file
            )
        view, offset = view[got:], offset + got


def _read_header(path: Path, limit: int) -> tuple[int, bytes]:
    try:
        with path.open("rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(
                    f"is truncated or no safetensors file: {size:,} bytes"
                    + (f", its header alone should have {length:,}." if size >= 8 else "."),
                    hint=REDOWNLOAD,
                    file=path,
                )
            if length > limit:
                raise InputError(
                    f"has a header of {length:,} bytes; more than {limit:,} are refused.",
                    file=path,
                )
            header = bytearray(8 + length)
            read_exactly(f.fileno(), header, 0, path)
    except OSError as e:
        raise InputError(f"cannot be read: {e.strerror}.", file=path) from e
    return size, bytes(header)
