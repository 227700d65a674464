"""A safetensors file of which some tensors are seen in another length: zeros follow what is there,
or its end is left out.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lorakit.store.checkpoint import Checkpoint, Part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import TensorInfo


class Padded(SafetensorsFile):
    """The file at `path`, with its tensors of these names as in `seen`: each of one row (1, n)."""

    def __init__(self, path: Path, seen: Mapping[str, TensorInfo]) -> None:
        super().__init__(path)
        self._seen = {n: seen.get(n, i) for n, i in self.on_disk.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What every tensor is seen as."""
        return self._seen

    def read_rows(self, name: str, start: int, stop: int, into: Any, *, leading: int = 1) -> None:
        """Fill `into` with rows of a tensor; one in another length is read whole."""
        there, seen = self.on_disk[name], self.infos[name]
        if there is seen:
            return super().read_rows(name, start, stop, into, leading=leading)
        row = bytearray(max(there.nbytes, seen.nbytes))
        super().read_rows(name, 0, 1, memoryview(row)[: there.nbytes])
        memoryview(into).cast("B")[:] = row[: seen.nbytes]
        return None


def padded(base: Checkpoint, seen: Collection[TensorInfo]) -> Checkpoint:
    """The checkpoint with these tensors in their new lengths."""
    if not seen:
        return base
    by_name = {i.name: i for i in seen}
    return base.with_parts([_padded(part, by_name) for part in base.parts])


def can_pad(part: Part, name: str) -> bool:
    """Whether a tensor of a weight file is one row that can be seen in another length."""
    shape = part.infos[name].shape
    return type(part) is SafetensorsFile and len(shape) == 2 and shape[0] == 1


def _padded(part: Part, seen: Mapping[str, TensorInfo]) -> Part:
    if not isinstance(part, SafetensorsFile) or part.infos.keys().isdisjoint(seen):
        return part
    return Padded(part.path, seen)
