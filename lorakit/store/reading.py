"""What the system says while an input is read, in one clear line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import InputError


@contextmanager
def reading(file: object) -> Iterator[None]:
    """Turn what the system says into an error that names the file.

    Raises:
        InputError: it is not there, may not be read, or the disk fails.
    """
    try:
        yield
    except OSError as e:
        raise InputError(f"cannot be read: {e.strerror or e}.", file=file) from e


def read_file(path: Path) -> bytes:
    """The bytes of a small file.

    Raises:
        InputError: as `reading`.
    """
    with reading(path):
        return path.read_bytes()
