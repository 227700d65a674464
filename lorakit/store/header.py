"""The header of a safetensors file, read strictly and written so that it can be read strictly.

A header is accepted only if it describes the file exactly: every byte of data belongs to one
tensor, every tensor has as many bytes as its dtype and shape say, no name stands twice. What this
accepts, safetensors accepts too; the reverse does not hold (safetensors 0.8 lets duplicate names
pass).

Source: the format section of the safetensors README (huggingface/safetensors).
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

from lorakit.errors import InputError
from lorakit.tensors import BITS, TensorInfo

MAX_HEADER = 32 << 20  # bytes; the header of a 671B model split in one file is about 10 MB
MAX_TENSORS = 1_000_000
MAX_NAME = 1024  # characters
MAX_DIMS = 16
MAX_SPAN = 1 << 60  # product of a shape without its zeros, which others compute in 64 bits
PAGE = 4096
TORCH: Mapping[str, str] = {"format": "pt"}  # the metadata without which transformers reads no file

REDOWNLOAD = "Fetch the file again."


def parse_header(
    raw: bytes, size: int, file: object
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors, in the order of their bytes, and the metadata that `raw` declares.

    `raw` is the JSON text, `size` the size of the whole file in bytes.

    Raises:
        InputError: the header is not valid JSON of this format or does not describe the file.
    """
    table = _load(raw, file)
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not _texts([*metadata, *metadata.values()]):
        raise InputError("the header's __metadata__ is not a map of strings.", file=file)
    if len(table) > MAX_TENSORS:
        raise InputError(f"the header declares {len(table):,} tensors; refused.", file=file)
    start = 8 + len(raw)
    infos = sorted((_info(n, e, start, file) for n, e in table.items()), key=lambda i: i.extent)
    _check_cover(infos, start, size, file)
    return {i.name: i for i in infos}, metadata


def format_header(
    infos: Iterable[TensorInfo],
    metadata: Mapping[str, str] = TORCH,
    *,
    start: int | None = None,
) -> bytes:
    """The first bytes of a file that holds `infos` back to back in this order: length and JSON.

    Their places are ignored and laid out anew. With `start`, the header is padded with spaces
    until the data starts at an offset that is congruent to it modulo the page size, so that
    copies from a file whose data starts there stay page-aligned; else to a multiple of 8.

    Raises:
        InputError: a name cannot stand in a header, or stands twice among them.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for i in infos:
        _check_name(i.name, "")
        if i.name in table:
            raise InputError(f"no file can hold two tensors {i.name!r}.", tensor=i.name)
        table[i.name] = {
            "dtype": i.dtype,
            "shape": list(i.shape),
            "data_offsets": [end, end := end + i.nbytes],
        }
    if not metadata:
        del table["__metadata__"]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    step, goal = (8, 0) if start is None else (PAGE, start)
    text += b" " * ((goal - 8 - len(text)) % step)
    return len(text).to_bytes(8, "little") + text


def _load(raw: bytes, file: object) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        numbers = _natural if "-0" in text else int  # the only negative that looks like no other
        table = json.loads(text, object_pairs_hook=_unique, parse_int=numbers)
    except RecursionError:
        raise InputError("the header is nested too deeply; refused.", file=file) from None
    except ValueError as e:
        reason = str(e)[:100]
        raise InputError(
            f"the header is not valid: {reason}.", hint=REDOWNLOAD, file=file
        ) from None
    if not isinstance(table, dict):
        raise InputError("the header is not a JSON object.", hint=REDOWNLOAD, file=file)
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} stands in it twice")
    return table


def _natural(text: str) -> int:
    if text.startswith("-"):
        raise ValueError(f"it has the number {text[:40]}")
    return int(text)


def _texts(values: list[Any]) -> bool:
    """Whether all of them are strings that UTF-8 can hold: no halves of a surrogate pair."""
    if not all(isinstance(v, str) for v in values):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_name(name: str, file: object) -> None:
    if len(name) > MAX_NAME or not name.isprintable():
        raise InputError(f"the tensor name {name[:60]!r} is too long or not printable.", file=file)


@lru_cache(maxsize=1 << 12)
def _shared(dtype_or_shape: Any) -> Any:
    """The one object of a dtype or a shape that many tensors have."""
    return dtype_or_shape


def _info(name: str, entry: Any, start: int, file: object) -> TensorInfo:
    _check_name(name, file)
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
        sound = set(entry) == {"dtype", "shape", "data_offsets"} and isinstance(shape, list)
        sound = sound and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sound, numbers = False, []
    if not sound or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise InputError(
            "its header entry is not dtype, shape and data_offsets.", file=file, tensor=name
        )
    if what := _unsupported(dtype, shape):
        raise InputError(f"the tensor {name!r} has {what}; not supported.", file=file, tensor=name)
    kind = _shared(dtype), _shared(tuple(shape))
    info = TensorInfo(name, *kind, start + first)
    bits = info.numel * BITS[dtype]
    if bits != 8 * (last - first):
        raise InputError(
            f"the tensor {name!r} ({dtype} {shape}) has {last - first:,} bytes, "
            f"its shape needs {bits / 8:,.10g}.",
            hint=REDOWNLOAD,
            file=file,
            tensor=name,
        )
    return info


def _unsupported(dtype: str, shape: list[int]) -> str:
    if dtype not in BITS:
        return f"the dtype {dtype[:40]!r}"
    if len(shape) > MAX_DIMS:
        return f"{len(shape)} dimensions"
    return f"the shape {shape}" if prod(n or 1 for n in shape) > MAX_SPAN else ""


def _check_cover(infos: list[TensorInfo], start: int, size: int, file: object) -> None:
    for before, after in pairwise([TensorInfo("", "U8", (0,), start), *infos]):
        if before.extent[1] != after.extent[0]:
            what = "overlaps" if after.extent[0] < before.extent[1] else "leaves a hole after"
            raise InputError(
                f"the tensor {after.name!r} {what} the one before it; refused.",
                file=file,
                tensor=after.name,
            )
    end = infos[-1].extent[1] if infos else start
    if end != size:
        what = "is truncated" if size < end else "has bytes after the last tensor"
        raise InputError(
            f"{what}: {size:,} bytes, its header says {end:,}.", hint=REDOWNLOAD, file=file
        )
