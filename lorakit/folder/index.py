"""The index of a sharded checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path

from lorakit.store.reading import read_file


def format_index(weight_map: Mapping[str, str], total: int, old: Path | None) -> bytes:
    """The index that places every tensor; `total` is the bytes of all tensors.

    Other metadata of the base's index is kept, and its very bytes where nothing changed.
    """
    before = json.loads(read_file(old)) if old else {}
    known = before.get("metadata")
    metadata = {**(known if isinstance(known, dict) else {}), "total_size": total}
    after = {**before, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    if old and before == after:
        return read_file(old)
    return json.dumps(after, indent=2, ensure_ascii=False).encode() + b"\n"


def shard_name(stem: str, number: int, count: int) -> str:
    """`stem-00001-of-00003.safetensors`; without numbers where there is only one."""
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number:05}-of-{count:05}.safetensors"
