"""Weights in pickles (`.bin`, `.pt`, `.pth`, `.ckpt`), read on request and without running them.

Law: nothing that a file names is called, but what torch's weights-only loader allows by itself. A
zip archive is mapped into memory, so that its weights are read when they are asked for; a legacy
pickle is read whole. torch is imported only here, when a pickle is opened.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.store.reading import LFS, check_file, check_pointer

if TYPE_CHECKING:
    from lorakit.store.memory import MemorySource

CONVERT = "Convert it to safetensors where you trust it."
_ZIP = b"PK\x03\x04"
# How torch says which function or class it did not call.
_GLOBAL = re.compile(r"GLOBAL (\S{1,200})")
# What a corrupt file was seen to raise out of torch.load and zipfile.
_CORRUPT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def open_pickle(path: Path, *, allow: bool) -> "MemorySource":
    """The tensors of a pickle, by name, without running any code that it names.

    A `state_dict` inside is taken for the whole; values that are no tensors are left out.

    Raises:
        InputError: pickles are not allowed, torch is missing, or the file is corrupt, asks to run
            code, or is anything else than names with tensors.
    """
    if not allow:
        raise InputError(
            "is a pickle, which can run code when it is loaded.",
            hint="--allow-pickle reads it with torch's weights-only loader, which runs none; "
            "or convert it to safetensors.",
            file=path,
        )
    check_file(path)
    from lorakit.store.memory import MemorySource

    tensors = _tensors(_load(path), path)
    source = MemorySource(tensors, name=path.name)
    _check_sizes(tensors, path)
    return source


def _load(path: Path) -> Any:
    """Whatever the file holds, made of the types that torch allows."""
    try:
        import torch
    except ImportError as e:
        hint = "pip install 'lorakit[torch]'"
        raise InputError("is a pickle, and reading it needs torch.", hint=hint, file=path) from e
    mapped = _is_archive(path)
    try:
        # torch warns of pickle protocols it may not know; what it cannot read it refuses anyway.
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _CORRUPT as e:
        raise _refusal(e, path) from e


def _is_archive(path: Path) -> bool:
    """Whether this is the zip archive of torch >= 1.6 rather than a bare pickle."""
    try:
        with path.open("rb") as f:
            head = f.read(len(LFS))
        check_pointer(head, path)
        if not head.startswith(_ZIP):
            return False
        with zipfile.ZipFile(path) as archive:
            packed = [m for m in archive.infolist() if m.compress_type != zipfile.ZIP_STORED]
    except _CORRUPT as e:
        raise _refusal(e, path) from e
    if packed:  # torch never compresses; unpacked, a few MB could fill the memory
        raise InputError(f"is a compressed archive ({packed[0].filename!r}); refused.", file=path)
    return True


def _refusal(error: Exception, path: Path) -> InputError:
    """One line for what torch says in ten."""
    if found := _GLOBAL.search(str(error)):
        return InputError(
            f"asks to run {found[1]!r} when it is loaded; refused.", hint=CONVERT, file=path
        )
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"cannot be read: {error.strerror}.", file=path)
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    reason = f"{type(error).__name__}: {text}".partition("\n")[0].rstrip(": ")[:200]
    return InputError(f"is truncated, or no pickle of weights ({reason}).", file=path)


def _tensors(loaded: Any, path: Path) -> dict[str, Any]:
    """The named tensors in what was loaded, perhaps one level down under `state_dict`."""
    import torch

    if not isinstance(loaded, dict):
        what = type(loaded).__name__
        raise InputError(f"holds a {what}, not tensors by name.", hint=CONVERT, file=path)
    if isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    for key, value in loaded.items():
        if any(isinstance(v, torch.Tensor) for v in _members(value)):
            raise InputError(f"has tensors one level down, under {key!r}.", hint=CONVERT, file=path)
    tensors = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not tensors or not all(isinstance(k, str) for k in tensors):
        keys = ", ".join(repr(k)[:60] for k in list(loaded)[:5]) or "nothing"
        raise InputError(f"has no tensors by name. Found: {keys}.", file=path)
    return tensors


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _check_sizes(tensors: Mapping[str, Any], path: Path) -> None:
    # torch grows a storage to what a tensor claims to need, with whatever memory holds there.
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() > size:
            raise InputError(
                f"claims more bytes for {name!r} than the {size:,} it has.", file=path, tensor=name
            )
