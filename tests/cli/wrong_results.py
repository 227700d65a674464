"""Outputs and results that are wrong, made as in `wrong_files`."""

import fcntl
import json
import os
import shutil
from pathlib import Path

from lorakit.store.header import format_header
from lorakit.tensors import TensorInfo
from tests.cli.spoil import (
    CONFIG,
    INDEX,
    LAST,
    LAYER,
    MERGE,
    SHARD,
    WEIGHTS,
    edit,
    flip,
    merged,
    put,
    read,
    tensor,
    write,
)


def no_disk() -> list[str]:
    free = shutil.disk_usage(".").free
    info = TensorInfo(f"{LAYER}.weight", "BF16", (64, 64))
    ballast = TensorInfo("ballast", "U8", (free + (1 << 30),))
    header = format_header([info, ballast], {})
    with Path("huge.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(len(header) + info.nbytes + ballast.nbytes)  # sparse: takes no space
    one = {n: t for n, t in read(WEIGHTS).items() if LAYER in n}
    write(WEIGHTS, one)
    return ["merge", "huge.safetensors", "style", "-o", "merged"]


def exists() -> list[str]:
    merged()
    return MERGE


HELD: list[int] = []  # locks that are held until the process ends


def two_writers() -> list[str]:
    Path("merged.partial").mkdir()
    HELD.append(os.open("merged.partial", os.O_RDONLY))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)
    return MERGE


def unfinished() -> list[str]:
    Path("merged.partial").mkdir()
    Path("merged.partial/.lorakit-journal").write_text('{"plan":"of something else"}\n')
    Path("merged.partial/model.safetensors.partial").write_text("half done")
    return MERGE


def no_folder() -> list[str]:
    Path("file").write_text("")
    return ["merge", "base", "style", "-o", "file/merged"]


def no_file() -> list[str]:
    Path("merged.safetensors").mkdir()
    return ["merge", "base", "style", "-o", "merged.safetensors", "--overwrite"]


def replaced_layers() -> list[str]:
    put(WEIGHTS, {"base_model.model.lm_head.weight": tensor((512, 64))})
    return ["unmerge", "base", "style", "-o", "back"]


def dora() -> list[str]:
    put(WEIGHTS, {f"base_model.model.{LAYER}.lora_magnitude_vector": tensor((64,))})
    edit(CONFIG, use_dora=True)
    return ["unmerge", "base", "style", "-o", "back"]


def pissa() -> list[str]:
    edit(CONFIG, init_lora_weights="pissa")
    return ["unmerge", "base", "style", "-o", "back"]


def changed_number() -> list[str]:
    merged()
    path = Path("merged/model-00001-of-00003.safetensors")
    info, _ = read(path)[f"{LAYER}.weight"]
    flip(path, info.extent[1] - 1)
    return ["verify", "merged"]


def changed_copy() -> list[str]:
    merged()
    path = Path("merged/model-00003-of-00003.safetensors")
    flip(path, path.stat().st_size - 1)
    return ["verify", "merged"]


def lost_file() -> list[str]:
    merged()
    Path("merged/model-00003-of-00003.safetensors").unlink()
    return ["verify", "merged"]


def stray_file() -> list[str]:
    merged()
    shutil.copy(LAST, "merged/model.safetensors")
    return ["verify", "merged"]


def other_index() -> list[str]:
    merged()
    index = json.loads(INDEX.read_text())
    index["weight_map"]["lm_head.weight"] = SHARD.name
    Path("merged", INDEX.name).write_text(json.dumps(index))
    return ["verify", "merged"]


def other_fact() -> list[str]:
    merged("--dtype", "float32")
    edit(Path("merged/config.json"), torch_dtype="bfloat16")
    return ["verify", "merged"]


def hub_base_gone() -> list[str]:
    merged()
    path = Path("merged/lorakit.json")
    base, adapter = json.loads(path.read_text())["inputs"]
    place = {"path": "/gone/snapshots/0123abc/sub", "repo": "org/m", "revision": "0123abc"}
    edit(path, inputs=[base | place, adapter])
    return ["verify", "merged"]


def strange_manifest() -> list[str]:
    merged()
    edit(Path("merged/lorakit.json"), inputs=[{"path": 3}])
    return ["verify", "merged"]


def other_adapter() -> list[str]:
    merged()
    return ["verify", "merged", "--adapter", "detail"]


def base_gone() -> list[str]:
    merged()
    Path("base").rename("moved")
    return ["verify", "merged"]
