"""A safetensors file whose tensors become known one after the other.

Their names are known beforehand, so room for the header is kept at the front; tensors follow in the
order in which they come, and the header is written last. Law: the same tensors in the same order
give the same bytes.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from lorakit.store.header import PAGE, format_header
from lorakit.store.writing import PartialFile
from lorakit.tensors import TensorInfo

ENTRY = 160  # bytes of a header entry beside its name: dtype, up to four dimensions, two offsets


class GrowingFile:
    """A file under construction at `NAME.partial`, with room for tensors of these names.

    As a context it lets go of the file in the end; only `commit` gives it its name.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        room = sum(len(json.dumps(name, ensure_ascii=False).encode()) + ENTRY for name in names)
        self._start = -(-(room + PAGE) // PAGE) * PAGE
        self._infos: list[TensorInfo] = []
        self.size = self._start
        self._out = PartialFile(path, self._start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def add(self, info: TensorInfo, data: Iterable[Any]) -> None:
        """Append a tensor: what it is, and all its bytes, in buffers that follow each other.

        Raises:
            ResourceError: the disk is full.
        """
        at = self.size
        for part in data:
            self._out.write(part, at)
            at += memoryview(part).nbytes
        self._infos.append(info)
        self.size += info.nbytes
        assert at == self.size, info.name

    def commit(self, *, sync: bool) -> None:
        """Write the header, and give the file its name.

        Raises:
            InputError: a name cannot stand in a header, or was added twice.
        """
        header = format_header(self._infos, start=self._start)
        fill = self._start - len(header)
        self._out.write((len(header) - 8 + fill).to_bytes(8, "little"), 0)
        self._out.write(header[8:] + b" " * fill, 8)
        self._out.commit(sync=sync)
