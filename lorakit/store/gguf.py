"""Files of GGUF, read by the package gguf where that is installed."""

from pathlib import Path
from typing import Any

from lorakit.errors import InputError, UsageError
from lorakit.store.reading import check_file


def package() -> Any:
    """The package gguf.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "GGUF needs the package gguf.", hint="pip install 'lorakit[gguf]'"
        ) from error
    return gguf


def gguf_reader(path: Path) -> Any:
    """The GGUFReader of a file.

    Raises:
        UsageError: the gguf package is not installed.
        InputError: it is no such file, or corrupt.
    """
    check_file(path)
    try:
        return package().GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise InputError(f"is no GGUF file: {error}.", file=path) from error
