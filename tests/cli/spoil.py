"""What spoils the demo's files: tensors put in and taken out, configs edited, bytes flipped."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.cli import main
from lorakit.store.header import format_header, parse_header
from lorakit.tensors import TensorInfo

SHARD = Path("base/model-00002-of-00003.safetensors")
LAST = Path("base/model-00003-of-00003.safetensors")
INDEX = Path("base/model.safetensors.index.json")
WEIGHTS = Path("style/adapter_model.safetensors")
CONFIG = Path("style/adapter_config.json")
MERGE = ["merge", "base", "style", "-o", "merged"]
LAYER = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, tuple[TensorInfo, bytes]]


def read(path: Path) -> Tensors:
    raw = path.read_bytes()
    infos, _ = parse_header(raw[8 : 8 + int.from_bytes(raw[:8], "little")], len(raw), path)
    return {n: (i, raw[i.extent[0] : i.extent[1]]) for n, i in infos.items()}


def write(path: Path, tensors: Tensors) -> None:
    infos = [TensorInfo(n, i.dtype, i.shape) for n, (i, _) in tensors.items()]
    path.write_bytes(format_header(infos, {}) + b"".join(d for _, d in tensors.values()))


def tensor(shape: tuple[int, ...], dtype: str = "F32") -> tuple[TensorInfo, bytes]:
    info = TensorInfo("", dtype, shape)
    return info, bytes(info.nbytes)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(path: Path, tensors: Tensors) -> None:
    """Put more tensors into a weight file; None takes one out."""
    both = {**read(path), **tensors}
    write(path, {n: t for n, t in both.items() if t})


def flip(path: Path, byte: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1
    path.write_bytes(raw)


def declare(header: dict[str, Any], data: int) -> list[str]:
    """A base of one file with this header and so many bytes of data."""
    text = json.dumps(header).encode()
    Path("bad.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return ["merge", "bad.safetensors", "style", "-o", "merged"]


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def configured(**changes: Any) -> Callable[[], list[str]]:
    """The demo's adapter with other fields in its config."""

    def spoil() -> list[str]:
        edit(CONFIG, **changes)
        return MERGE

    return spoil


def plain(*command: str) -> Callable[[], list[str]]:
    """A command that is wrong by itself."""
    return lambda: list(command)


def merged(*options: str) -> None:
    """Leave the result of a merge in the folder."""
    with contextlib.suppress(SystemExit):
        main([*MERGE, "--quiet", *options])
    assert Path("merged").is_dir()
