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


class Written(Stored, Protocol):
    """One that can be written again with other values, in the same tensors.

    Rows are those of `Stored.values`; `w` has their values before, `new` after.
    """

    @property
    def remade(self) -> tuple[str, ...]:
        """Those of its tensors that the values decide: its codes, then scales."""
        ...

    @property
    def unit(self) -> int:
        """Rows whose scales depend on no others, and whose codes are whole bytes."""
        ...

    @property
    def span(self) -> int:
        """Rows whose codes, and scales, lie together on disk; 0 where those of any unit do."""
        ...

    @property
    def coupled(self) -> bool:
        """Whether the scales of a unit depend on other rows all the same."""
        ...

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Any:
        """What the scales of these rows follow from.

        Raises:
            InputError: there is NaN or Inf among the new values.
        """
        ...

    def settle(self, source: Source, start: int, seen: list[Any]) -> Any:
        """The scales of rows from `start` on, of which these are the surveys."""
        ...

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `lorakit.math.grid.Grid.encode`."""
        ...

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """One of the tensors of scales, for the rows that they are of."""
        ...


# Finds the weights of a layout in a checkpoint; it is given its `quantization_config`, if any.
Find = Callable[[Source, Mapping[str, Any]], Iterator[Written]]


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
    matrix: Written

    @property
    def tensors(self) -> tuple[str, ...]:
        """As `Stored.tensors`."""
        return self.matrix.tensors

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`: columns of the matrix, which is computed once for all of them."""
        given: Any = source, self.matrix
        out[:] = _computed(*given)[:, start:stop].T

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        return self.matrix.remade

    @property
    def unit(self) -> int:
        """As `Written.unit`: it is written as a whole."""
        return self.info.shape[0]

    @property
    def span(self) -> int:
        """As `Written.span`."""
        return self.info.shape[0]

    @property
    def coupled(self) -> bool:
        """As `Written.coupled`."""
        return self.matrix.coupled

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Any:
        """As `Written.survey`."""
        return self.matrix.survey(source, _turned(w), _turned(new), 0)

    def settle(self, source: Source, start: int, seen: list[Any]) -> Any:
        """As `Written.settle`."""
        return self.matrix.settle(source, 0, seen)

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        return _turned(self.matrix.encode(source, _turned(new), 0, scales, out, 0))

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """As `Written.beside`."""
        return self.matrix.beside(source, name, scales)


def _turned(x: Single) -> Single:
    return np.ascontiguousarray(x.T)


def turned(matrix: Written) -> Turned:
    """The transpose of a stored matrix."""
    return Turned(matrix.info.but(shape=matrix.info.shape[::-1]), matrix)


@lru_cache(maxsize=1)
def _computed(source: Any, matrix: Any) -> Single:
    """All values of a matrix. Not to be written to."""
    found = np.empty(matrix.info.shape, np.float32)
    matrix.values(source, 0, len(found), found)
    found.flags.writeable = False
    return found
