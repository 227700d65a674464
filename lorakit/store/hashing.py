"""The sha256 of files: what manifests note, and what the hub promises for its files."""

import hashlib
from pathlib import Path

from lorakit.store.reading import reading


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal.

    Raises:
        InputError: it cannot be read.
    """
    with reading(path), path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
