"""What every quantised layout of a checkpoint offers: its weights, a few rows at a time, and those
that lie the other way round than the parameters do.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from lorakit.math.cast import storage
from lorakit.quant.codec import Array, Single
from lorakit.tensors import Source, TensorInfo

# What, in the place of `weight`, tells that its codes mean something else.
OTHERS = ("weight_zero_point", "weight_scale_2", "weight_global_scale", "weight_g_idx")


class Stored(Protocol):
    """One weight that a checkpoint stores in a quantised layout."""

    @property
    def info(self) -> TensorInfo:
        """Its name, and dtype and shape of its values; the dtype is the model's, where the layout
        says it, else "".
        """
        ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """What it is made of on disk, its codes first; nothing else needs these."""
        ...

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """Put rows `start` to `stop` into `out`, float32 and contiguous: (stop - start, columns).

        The last dimension makes the columns, all others together the rows. Each value is computed
        in float32. `source` has the tensors.
        """
        ...


# Finds the weights of a layout in a checkpoint; it is given its `quantization_config`, if any.
Find = Callable[[Source, Mapping[str, Any]], Iterator[Stored]]


def taken(source: Source, name: str, start: int, stop: int) -> Array:
    """Rows of a tensor, in its dtype on disk: (stop - start, columns)."""
    info = source.infos[name]
    found = np.empty((stop - start, info.cols), storage(info.dtype))
    source.read_rows(name, start, stop, found.view(np.uint8))
    return found


def kept(source: Source, name: str, start: int, stop: int) -> Array:
    """The same, kept for the next who asks: for layouts in which a row of the weight lies across
    many of a tensor. Not to be written to.
    """
    which: Any = source
    return _kept(which, name, start, stop)


@lru_cache(maxsize=4)  # the tensors of a weight: a run is done weight by weight
def _kept(source: Any, name: str, start: int, stop: int) -> Array:
    found = taken(source, name, start, stop)
    found.flags.writeable = False
    return found


def whole(source: Source, name: str) -> Array:
    """All of a small tensor, in its dtype and shape on disk."""
    info = source.infos[name]
    return taken(source, name, 0, info.rows).reshape(info.shape)


@dataclass(frozen=True)
class Turned:
    """The transpose of a stored matrix.

    bitsandbytes and GPTQ take the Conv1D layers of transformers, which are (in, out), for the
    linear layers (out, in) that they are.

    Source: huggingface/transformers v5.23, src/transformers/integrations/bitsandbytes.py.
    """

    info: TensorInfo
    matrix: Stored

    @property
    def tensors(self) -> tuple[str, ...]:
        """As `Stored.tensors`."""
        return self.matrix.tensors

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`: columns of the matrix, which is computed once for all of them."""
        given: Any = source, self.matrix
        out[:] = _computed(*given)[:, start:stop].T


def turned(matrix: Stored) -> Turned:
    """The transpose of a stored matrix."""
    return Turned(matrix.info.but(shape=matrix.info.shape[::-1]), matrix)


@lru_cache(maxsize=1)
def _computed(source: Any, matrix: Any) -> Single:
    """All values of a matrix. Not to be written to."""
    found = np.empty(matrix.info.shape, np.float32)
    matrix.values(source, 0, len(found), found)
    found.flags.writeable = False
    return found
