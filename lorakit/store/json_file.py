"""Small JSON files that somebody else has written."""

import json
from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.store.reading import check_pointer, read_file, reading

LARGEST = 64 << 20  # bytes


def read_json(path: Path, *, ascii_only: bool = False) -> dict[str, Any]:
    """A JSON object from a small file. Halves of a surrogate pair, which no UTF-8 has, are for who
    writes them in ASCII again (`ascii_only`).

    Raises:
        InputError: the file is huge or holds anything else.
    """
    with reading(path):
        size = path.stat().st_size
    if size > LARGEST:
        raise InputError(f"has {size:,} bytes; refused.", file=path)
    raw = read_file(path)
    check_pointer(raw, path)
    try:
        value = json.loads(raw)
        if b"\\u" in raw and not ascii_only:  # halves of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise InputError(f"is not valid JSON: {str(e)[:100]}.", file=path) from None
    if not isinstance(value, dict):
        raise InputError("is not a JSON object.", file=path)
    return value
