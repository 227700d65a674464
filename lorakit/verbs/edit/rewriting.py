"""An adapter file written again: tensors copied byte for byte, or multiplied, padded and rounded.

Law: a tensor that is neither multiplied, padded nor of another dtype has the bytes that it had.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorakit.adapter.load import read_stored
from lorakit.errors import MisfitError
from lorakit.math.cast import Array, bytes_of, narrow, storage, widen
from lorakit.math.rows import CHUNK, row_slices
from lorakit.math.stacked import by_expert
from lorakit.store.header import format_header
from lorakit.store.writing import write_tensors
from lorakit.tensors import BITS, Source, TensorInfo
from lorakit.verbs.job import RunOptions


@dataclass(frozen=True)
class Rewritten:
    """A tensor of the result: what it is, what it is made of, and by how much it is multiplied.

    `experts` is how many share it, 0 for none; `up` says that it holds B, whose ranks are columns;
    `packing` how those of several experts lie there. More ranks than it had are zero.
    """

    info: TensorInfo
    origin: TensorInfo
    factor: float = 1.0
    up: bool = False
    experts: int = 0
    packing: str = "peft"

    @property
    def copied(self) -> bool:
        """Whether it is taken over as it is."""
        same = (self.info.dtype, self.info.shape) == (self.origin.dtype, self.origin.shape)
        return same and self.factor == 1.0

    def blocks(self, source: Source) -> Iterator[tuple[Array, int]]:
        """Its values from the first to the last, some rows at a time, and how many were rounded.

        Raises:
            MisfitError: a number does not fit the dtype.
        """
        if self.info.shape != self.origin.shape:
            yield self._rounded(self._padded(read_stored(source, self.origin)))
            return
        rows, width = self.origin.matrix(1)
        whole = bool(self.origin.nbytes % max(rows, 1))
        for some in row_slices(rows, width, rows * width if whole else CHUNK):
            count = some.stop - some.start
            if self.copied:
                raw = np.empty(self.origin.nbytes * count // rows, np.uint8)
                source.read_rows(self.origin.name, some.start, some.stop, raw)
                yield raw, 0
            else:
                values = np.empty((count, width), storage(self.origin.dtype))
                source.read_rows(self.origin.name, some.start, some.stop, values.view(np.uint8))
                yield self._rounded(values)

    def _rounded(self, x: Array) -> tuple[Array, int]:
        if self.factor == 1.0 and self.info.dtype == self.origin.dtype:
            return x, 0
        wide = np.empty(x.shape, np.float64)
        widen(x, wide)
        wide *= self.factor
        out = np.empty(x.shape, storage(self.info.dtype))
        narrow(wide, out)
        back = out.astype(np.float64)
        lost = (back != wide) & ~np.isnan(wide)
        if not np.isfinite(back[lost]).all():
            raise MisfitError(
                f"{self.origin.name!r} does not fit {out.dtype.name}: its largest number is "
                f"{np.abs(wide[lost]).max():.3g}.",
                hint="Pass --dtype float32.",
                tensor=self.origin.name,
            )
        return out, int(np.count_nonzero(lost))

    def _padded(self, x: Array) -> Array:
        """The values with ranks of zeros behind those that each expert has."""
        out = np.zeros(self.info.shape, x.dtype)
        count = max(self.experts, 1)
        if self.up:
            into, of = ((y.reshape(len(y), -1)) for y in (out, x))
            target, given = (by_expert(y, count, self.packing) for y in (into, of))
            target[..., : given.shape[-1]] = given
        else:
            target, given = (y.reshape(count, len(y) // count, -1) for y in (out, x))
            target[:, : given.shape[1]] = given
        return out


def castable(info: TensorInfo) -> bool:
    """Whether a tensor holds floats that `--dtype` is about."""
    return info.dtype.startswith(("F", "BF")) and BITS[info.dtype] >= 8 and info.dtype != "F8_E8M0"


def header_of(tensors: Sequence[Rewritten]) -> bytes:
    """The first bytes of the file that these make."""
    return format_header([t.info for t in tensors])


def rewrite(path: Path, tensors: Sequence[Rewritten], source: Source, options: RunOptions) -> int:
    """Write them to a file in their order; how many numbers were rounded.

    Raises:
        MisfitError: a number does not fit its dtype.
        ResourceError: the disk is full.
    """
    rounded = 0

    def blocks() -> Iterator[Array]:
        nonlocal rounded
        for block, lost in (found for t in tensors for found in t.blocks(source)):
            rounded += lost
            yield bytes_of(block)

    infos = [t.info for t in tensors]
    write_tensors(path, infos, blocks(), sync=options.sync, report=options.report)
    return rounded


def count_rounded(tensors: Sequence[Rewritten], source: Source) -> int:
    """How many numbers a writing would round; nothing that is copied is read.

    Raises:
        MisfitError: a number does not fit its dtype.
    """
    return sum(lost for t in tensors if not t.copied for _, lost in t.blocks(source))
