"""What a quantised layout can do, and what it makes of a weight.

Law: a codec is plain data, so the same weight gives the same arrays on any number of threads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import InputError
from lorakit.math.cast import narrow, storage, widen
from lorakit.tensors import CODES, TensorInfo

Array = NDArray[Any]
Dtype = np.dtype[Any]
Single = NDArray[np.float32]

# Elements quantised at a time: with its copies a chunk stays within the cache of one core.
CHUNK = 1 << 17
_FLOATS: dict[str, Dtype] = {name: storage(code) for name, code in CODES.items()}


@dataclass(frozen=True, eq=False)
class Quantised:
    """A weight in the arrays of a layout; which they are is the codec's matter."""

    shape: tuple[int, ...]
    arrays: Mapping[str, Array]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all arrays."""
        return sum(a.nbytes for a in self.arrays.values())


class Codec(Protocol):
    """A way to write a weight in few bits."""

    @property
    def name(self) -> str:
        """Its name in the table."""
        ...

    @property
    def bits(self) -> int:
        """How many bits the code of one element has, scales not counted."""
        ...

    def quantise(self, w: Array) -> Quantised:
        """The codes and scales of a weight of any float dtype up to float32.

        Raises:
            InputError: NaN or inf, or another dtype.
        """
        ...

    def dequantise(self, q: Quantised, dtype: str = "float32", *, out: Any = None) -> Array:
        """The values of the codes, computed in float32 and rounded once to `dtype`.

        `out` is float32 of the shape of the weight and takes the rounded values.
        """
        ...


@runtime_checkable
class Packed(Codec, Protocol):
    """A codec whose arrays are loaded as they are, from a pre-quantised checkpoint."""

    def tensors(
        self, name: str, q: Quantised, *, dtype: str = ..., padded: bool = ...
    ) -> dict[str, Array]:
        """The tensors of a weight of this name, in a model of `dtype`; `padded` gives each the
        length that `infos` says.
        """
        ...

    def infos(self, name: str, shape: tuple[int, ...], *, dtype: str = ...) -> list[TensorInfo]:
        """What `tensors` will give for a weight of this shape, padded, in its order."""
        ...


def float_dtype(name: str) -> Dtype:
    """The dtype of a model of this name.

    Raises:
        InputError: it is none of float32, float16 and bfloat16.
    """
    if name not in _FLOATS:
        raise InputError(f"weights of dtype {name!r} are not {', '.join(_FLOATS)}")
    return _FLOATS[name]


def flattened(w: Array) -> Array:
    """The elements of a weight in their order on disk.

    Raises:
        InputError: they are not floats, or there are none.
    """
    if w.dtype not in _FLOATS.values():
        raise InputError(f"a weight of dtype {w.dtype.name} cannot be quantised")
    if w.size == 0:
        raise InputError(f"a weight of shape {w.shape} has nothing to quantise")
    return w.reshape(-1)


def singles(chunk: Array, buffer: Single) -> Single:
    """The chunk in float32: itself, or its copy in the buffer. Exact."""
    if chunk.dtype == np.float32:
        return chunk
    found = buffer[: chunk.size].reshape(chunk.shape)
    widen(chunk, found)
    return found


def settle(values: Single, out: Array, dtype: Dtype) -> None:
    """Put float32 values into `out`, rounded once to `dtype`; `out` is of it, or float32.

    `values` may be `out` itself.
    """
    if out.dtype == dtype:
        if values is not out:
            narrow(values, out)
        return
    rounded = np.empty(values.shape, dtype)
    narrow(values, rounded)
    widen(rounded, out)


def target(shape: tuple[int, ...], dtype: Dtype, out: Any) -> Array:
    """Where the values go: `out`, flat, or a new array of the dtype."""
    if out is None:
        return np.empty(int(np.prod(shape)), dtype)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out must be float32, contiguous and of shape {shape}")
    flat: Array = out.reshape(-1)
    return flat
