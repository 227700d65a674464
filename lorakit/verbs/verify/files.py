"""What every check of a result has in common: files of the right size and header, copies equal."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.engine.fold import steps_of
from lorakit.engine.plan import Copy, Fold, OutputFile
from lorakit.errors import InputError
from lorakit.store.checkpoint import Part
from lorakit.store.hashing import sha256_of
from lorakit.store.safetensors import SafetensorsFile, read_exactly

CHUNK = 8 << 20  # bytes compared at once
SAMPLES = 3  # blocks of a tensor that are computed again


@dataclass
class Tally:
    """What was checked so far, and every difference in one line."""

    copied: int = 0
    folded: int = 0
    numbers: int = 0
    wrong: int = 0
    differences: list[str] = field(default_factory=list)


def opened(
    path: Path, file: OutputFile, expected: Mapping[str, Any], tally: Tally
) -> SafetensorsFile | None:
    """A weight file of the result; None, and a line in the tally, if it is not what was planned."""
    if not path.exists() or path.stat().st_size != file.size:
        tally.differences.append(f"{path.name} is missing or has another size.")
        return None
    if "sha256" in expected and sha256_of(path) != expected["sha256"]:
        tally.differences.append(f"{path.name} has another sha256 than when it was written.")
    try:
        written = SafetensorsFile(path)
    except InputError as error:
        tally.differences.append(str(error))
        return None
    if written.header != file.header:
        tally.differences.append(f"{path.name} has another header.")
        return None
    return written


def check_copies(
    written: SafetensorsFile, file: OutputFile, sources: Mapping[str, Part], tally: Tally
) -> None:
    """Hold what was taken over as it is against where it came from."""
    for step in file.steps:
        if isinstance(step, Copy):
            tally.copied += step.nbytes
            tally.differences += _differences(written, step, sources[step.source])


def _differences(written: SafetensorsFile, copy: Copy, source: Part) -> Iterator[str]:
    assert isinstance(source, SafetensorsFile)
    for at in range(0, copy.nbytes, CHUNK):
        length = min(CHUNK, copy.nbytes - at)
        ours, theirs = bytearray(length), bytearray(length)
        read_exactly(written.fd, ours, copy.to + at, written.path)
        read_exactly(source.fd, theirs, copy.start + at, source.path)
        if ours != theirs:
            first = copy.to + at + next(i for i in range(length) if ours[i] != theirs[i])
            name = _tensor_at(written, first)
            yield f"{name!r} in {written.name} differs from the base at byte {first:,}."
            return


def _tensor_at(file: SafetensorsFile, byte: int) -> str:
    return next(n for n, i in file.infos.items() if i.extent[0] <= byte < i.extent[1])


def sampled(fold: Fold, *, full: bool) -> list[tuple[int, int]]:
    """Blocks of rows, the same each time; without `full`: first, last and one between."""
    steps = list(steps_of(fold)) if fold.tensor.numel else []
    if full or len(steps) <= SAMPLES:
        return steps
    between = random.Random(fold.tensor.name).randrange(1, len(steps) - 1)
    return [steps[0], steps[between], steps[-1]]
