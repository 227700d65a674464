"""The place of an output: what may be one, and what else lies under names made of it."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from lorakit.errors import OutputError, UsageError
from lorakit.store.writing import FULL

FILES = (".safetensors", ".gguf")  # endings of outputs that are one file
LONGEST = 255  # bytes of a name


def named(output: str | Path) -> Path:
    """The place that is meant, by a path that ends in its name, which `.` and `..` do not.

    Raises:
        UsageError: nothing is named.
        OutputError: what is there cannot be replaced: the root, the current folder or one around
            it, or where a file system is mounted.
    """
    if not str(output):
        raise UsageError("the output has no name.", hint="Name one with --output.")
    path = Path(os.path.expanduser(output))
    path = Path(os.path.realpath(path)) if path.name in ("", "..") else path
    if not path.name:
        raise OutputError("is no place for an output.", file=output)
    if _holds_us(path):
        raise OutputError(
            "is the current folder or one around it, which would be replaced.",
            hint="Name a new folder.",
            file=output,
        )
    if os.path.ismount(path):
        raise OutputError(
            "is where a file system is mounted, and cannot be replaced.",
            hint="Name a folder inside it.",
            file=output,
        )
    return path


def is_file(output: Path) -> bool:
    """Whether an output of this name is one file rather than a folder."""
    return output.suffix in FILES


def replaced_path(output: Path) -> Path:
    """Where the old output lies while the new one gets its name."""
    name = f".{output.name}.lorakit-replaced"
    if len(os.fsencode(name)) > LONGEST:
        name = f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()}.lorakit-replaced"
    return output.with_name(name)


def remove_replaced(output: Path) -> None:
    """Remove the old output, if it lies there.

    Raises:
        OutputError: it cannot be removed.
    """
    old = replaced_path(output)
    try:
        remove(old)
    except OSError as e:
        if e.errno in FULL:
            raise
        raise OutputError(
            f"is an old output that was replaced, and cannot be removed: {e.strerror or e}.",
            hint="Remove it yourself.",
            file=old,
        ) from e


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    with contextlib.suppress(FileNotFoundError):  # another process swept it away first
        if path.is_dir() and not path.is_symlink():
            _make_writable(path)
            shutil.rmtree(path)
        else:
            path.unlink()


def _make_writable(folder: Path) -> None:
    """Let whoever owns a folder, and those in it, remove what is there."""
    with contextlib.suppress(PermissionError):
        folder.chmod(0o700)
        for parent, inside, _ in os.walk(folder):
            for name in inside:
                if not os.path.islink(path := os.path.join(parent, name)):
                    os.chmod(path, 0o700)


def _holds_us(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # the current folder is gone
        return Path.cwd().is_relative_to(os.path.realpath(path))
    return False
