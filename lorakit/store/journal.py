"""The journal of an output that grows: a line for each thing done, in JSON.

Law: a line holds if it is whole; and where what it tells of was not synced, for as long as the
machine stays up.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOURNAL = ".lorakit-journal"
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


def open_journal(path: Path) -> int:
    """A descriptor to append lines to."""
    return os.open(path, _APPEND, 0o666)


def append(journal: int, line: Mapping[str, Any]) -> None:
    """Write a line after the others."""
    text = memoryview(encoded(line))
    while text:
        text = text[os.write(journal, text) :]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's lines; what a kill or a crash left unfinished at its end is cut off."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    records, whole = [], 0
    for line in raw.splitlines(keepends=True):
        if (record := _record(line)) is None:
            os.truncate(path, whole)
            break
        records.append(record)
        whole += len(line)
    return records


def encoded(line: Mapping[str, Any]) -> bytes:
    """A line as it is written."""
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def not_synced(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line that holds until the machine goes down."""
    return {**line, "boot": _boot()}


def holding(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that still hold."""
    now = _boot()
    return [r for r in records if r.get("boot", now) == now]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _boot() -> str:
    """What is another after the machine went down."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
