"""Where every byte of the output goes: headers, offsets, and runs of untouched bytes joined into
copies.

A file whose tensors keep names, dtypes, shapes and order keeps its very header, so that untouched
runs stay at their offsets. A new header is padded until they are page-aligned with where they came
from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.engine.plan import Copy, Fold, OutputFile, Step
from lorakit.store.header import format_header
from lorakit.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to be written: as `tensor` says, from `origin` in `source`.

    Without a recipe and with the dtype of its origin it is a copy, where `source` has bytes on
    disk.
    """

    tensor: TensorInfo
    source: str
    origin: TensorInfo
    recipe: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    leading: int = 1  # dimensions that make the rows
    unit: int = 0  # as of a Fold
    span: int = 0

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of its origin, and lie in a file."""
        same = self.tensor.dtype == self.origin.dtype and self.origin.start > 0
        return same and not self.recipe

    def stays(self, source: str) -> bool:
        """Whether it is a copy of the tensor of its own name in that source."""
        return self.copied and (self.source, self.origin.name) == (source, self.tensor.name)

    def fold(self, placed: TensorInfo) -> Fold:
        """The step that computes it, as the tensor `placed`."""
        how = self.recipe, self.whole, self.leading, self.unit, self.span
        return Fold(placed, self.source, self.origin, *how)


@dataclass(frozen=True)
class Old:
    """A file that the output may take its header from; `source` is its name in the sources."""

    source: str
    header: bytes
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def lay_out(name: str, outputs: Sequence[Output], old: Old | None, *, link: bool) -> OutputFile:
    """The file that holds `outputs` in this order, as a list of steps.

    With `link`, a file that would be the same as `old` byte for byte becomes a link to it.
    """
    header = _header(outputs, old)
    steps: list[Step] = []
    position = len(header)
    for out in outputs:
        placed = out.tensor.but(start=position)
        if not out.copied:
            steps.append(out.fold(placed))
        elif out.tensor.nbytes:
            _append_copy(steps, Copy(out.source, *out.origin.extent, to=position))
        position += out.tensor.nbytes
    same = old is not None and header == old.header and all(o.stays(old.source) for o in outputs)
    return OutputFile(
        name,
        header,
        position,
        tuple(o.tensor.name for o in outputs),
        tuple(steps),
        link=old.source if link and same and old else "",
    )


def _header(outputs: Sequence[Output], old: Old | None) -> bytes:
    if old is None:
        return format_header([o.tensor for o in outputs])
    kept = [_layout(i) for i in old.infos.values()]
    if kept == [_layout(o.tensor) for o in outputs]:
        return old.header
    return format_header([o.tensor for o in outputs], old.metadata, start=len(old.header))


def _layout(info: TensorInfo) -> tuple[str, str, tuple[int, ...]]:
    return info.name, info.dtype, info.shape


def _append_copy(steps: list[Step], copy: Copy) -> None:
    last = steps[-1] if steps else None
    if isinstance(last, Copy) and (last.source, last.stop) == (copy.source, copy.start):
        steps[-1] = replace(last, stop=copy.stop)  # adjacent in the source, hence in the output
    else:
        steps.append(copy)


def split(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """The outputs in their order, cut into shards of at most `limit` bytes of data.

    A tensor larger than the limit gets a shard of its own.
    """
    shards: list[list[Output]] = [[]]
    room = limit
    for out in outputs:
        if out.tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(out)
        room -= out.tensor.nbytes
    return shards
