"""What the system says while an input is read, in one clear line."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import SCARCE, InputError, scarce

LFS = b"version https://git-lfs"


@contextmanager
def reading(file: object) -> Iterator[None]:
    """Turn what the system says into an error that names the file.

    Raises:
        InputError: it is not there, may not be read, or the disk fails.
        ResourceError: there are too few descriptors, or too little memory.
    """
    try:
        yield
    except OSError as e:
        if e.errno in SCARCE:
            raise scarce(e, file) from e
        raise InputError(f"cannot be read: {e.strerror or e}.", file=file) from e


def check_file(path: Path) -> None:
    """Refuse a pipe, a socket or a device: whoever opens one may wait for ever.

    Raises:
        InputError: it is one, or cannot be looked at.
    """
    with reading(path):
        mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError("is no file, but a pipe, a socket or a device.", file=path)


def check_pointer(head: bytes, path: Path) -> None:
    """Refuse what git leaves in the place of a large file that was not fetched; `head` is how the
    file begins.

    Raises:
        InputError: it is that.
    """
    if head.startswith(LFS):
        raise InputError("is a git-lfs pointer, not the file.", hint="Run: git lfs pull", file=path)


def read_file(path: Path) -> bytes:
    """The bytes of a small file.

    Raises:
        InputError: as `reading` and `check_file`.
    """
    check_file(path)
    with reading(path):
        return path.read_bytes()
