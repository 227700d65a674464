"""What is in weight files: values in float64, dtypes, and the bytes as they lie there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_tensors(path: Path) -> dict[str, Array]:
    """Every tensor of a file, or of the safetensors files and pickles in a folder, in float64."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in _files(path, "*.safetensors"):
        found |= load_file(file)
    for file in _files(path, "*.bin"):
        found |= torch.load(file, weights_only=True)
    return {name: values.to(torch.float64).numpy() for name, values in found.items()}


def read_files(path: Path) -> dict[str, dict[str, Stored]]:
    """The tensors of every safetensors file in a folder, by file and name, in their order there."""
    return {f.name: dict(_entries(f.read_bytes())) for f in _files(path, "*.safetensors")}


def read_dtypes(path: Path) -> dict[str, str]:
    """The safetensors code (`BF16` ...) of the dtype of every tensor in a file or a folder."""
    files = [dict(_entries(f.read_bytes())) for f in _files(path, "*.safetensors")]
    return {name: stored.dtype for file in files for name, stored in file.items()}


def _entries(data: bytes) -> Iterator[tuple[str, Stored]]:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + size + at for at in entry["data_offsets"])
        yield name, Stored(entry["dtype"], tuple(entry["shape"]), data[start:stop])


def _files(path: Path, pattern: str) -> list[Path]:
    return sorted(path.glob(pattern)) if path.is_dir() else [path] if path.match(pattern) else []


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))
