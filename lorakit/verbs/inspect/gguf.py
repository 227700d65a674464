"""What a file of GGUF is, from its header, without the base that its names and rows depend on."""

from collections import Counter
from pathlib import Path
from typing import Any

from lorakit.adapter.files.gguf import ENDINGS, alpha_of, text_of
from lorakit.store.gguf import gguf_reader

Rows = list[tuple[str, tuple[int, ...], str, int]]


def facts_of_gguf(path: Path) -> tuple[str, dict[str, Any], Rows]:
    """The kind of a file ("adapter", or "base" for a model), facts by name, and of every tensor its
    name, shape, dtype and bytes.

    Raises:
        UsageError: the gguf package is not installed.
        InputError: it is no such file, or corrupt.
    """
    reader = gguf_reader(path)
    rows = [
        (t.name, tuple(map(int, reversed(t.shape))), t.tensor_type.name, int(t.n_bytes))
        for t in reader.tensors
    ]
    facts: dict[str, Any] = {
        "format": "gguf",
        "model": text_of(reader, "general.architecture") or "not said",
        "tensors": len(rows),
        "parameters": sum(int(t.n_elements) for t in reader.tensors),
    }
    if text_of(reader, "general.type") != "adapter":
        return "base", facts, rows
    ranks = Counter(shape[-1] for name, shape, *_ in rows if name.endswith(ENDINGS["b"]) and shape)
    facts |= {
        "modules": sum(ranks.values()),
        "rank": {str(r): n for r, n in ranks.most_common()},
        "alpha": alpha_of(reader, path) or "none, a scaling of 1",
    }
    return "adapter", facts, rows
