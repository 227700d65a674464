"""The importance matrix of llama.cpp: mean squares of the inputs of weights, by their GGUF names.

Both of its formats are read: the older one of plain numbers, and GGUF (with the `gguf` package).

Source: ggml-org/llama.cpp, tools/imatrix (imatrix.cpp, README.md).
"""

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import InputError
from lorakit.store.gguf import gguf_reader
from lorakit.store.reading import read_file

MAX_ENTRIES, MAX_NAME, MAX_VALUES = 1_000_000, 1024, 1 << 28
SUFFIXES = (".dat", ".imatrix", ".gguf")


def read_imatrix(path: Path) -> dict[str, "array[float]"]:
    """Mean squares of the inputs of each weight, (in,); stacked experts are left out.

    Raises:
        InputError: it is no importance matrix, or ends too early.
        UsageError: it is GGUF, and the package is not installed.
    """
    raw = read_file(path)
    found = dict(_of_gguf(path) if raw[:4] == b"GGUF" else _of_plain(raw, path))
    if not found:
        raise InputError("has no importance matrix in it.", file=path)
    return found


def _of_plain(raw: bytes, path: Path) -> Iterator[tuple[str, "array[float]"]]:
    at = 0

    def number(most: int) -> int:
        nonlocal at
        value = int(struct.unpack_from("<i", raw, at)[0])
        if not 0 <= value <= most:
            raise InputError("is no importance matrix of llama.cpp.", file=path)
        at += 4
        return value

    try:
        for _ in range(number(MAX_ENTRIES)):
            length = number(MAX_NAME)
            name, at = raw[at : at + length].decode(), at + length
            calls, count = number(1 << 30), number(MAX_VALUES)
            values = array("f", raw[at : at + 4 * count])
            if len(values) < count:
                raise InputError("ends too early.", hint="Fetch the file again.", file=path)
            at += 4 * count
            yield name, array("f", (v / max(calls, 1) for v in values))
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise InputError("is no importance matrix of llama.cpp.", file=path) from error


def _of_gguf(path: Path) -> Iterator[tuple[str, "array[float]"]]:
    tensors = {t.name: t.data.reshape(-1) for t in gguf_reader(path).tensors}
    for name, sums in tensors.items():
        weight = name.removesuffix(".in_sum2")
        counts = tensors.get(f"{weight}.counts")
        if weight != name and counts is not None and counts.size == 1:
            yield weight, array("f", (float(v) / max(float(counts[0]), 1.0) for v in sums))
