"""int8: a byte an element and a float32 scale for each row, what LLM.int8() loads.

Law: bytes and scales are those of bitsandbytes on a CPU, bit for bit: of the weight rounded to
float16 first, as transformers does. A row of zeros has scale 0 and codes 0.

When it runs, the inputs of the layer are quantised as well, which nothing here can make up for.

Sources: Dettmers et al. 2022 (LLM.int8(), arXiv 2208.07339); bitsandbytes 0.50,
bitsandbytes/backends/default/ops.py (int8_vectorwise_quant), bitsandbytes/_ops.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.math.cast import narrow, widen
from lorakit.quant.codec import (
    CHUNK,
    Array,
    Quantised,
    Single,
    flattened,
    float_dtype,
    settle,
    singles,
    target,
)
from lorakit.tensors import TensorInfo

_SHARE = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes writes it


@dataclass(frozen=True)
class Int8:
    """Rows of bytes."""

    name: str = "int8"
    bits: int = 8

    def quantise(self, w: Array) -> Quantised:
        """The bytes, of the shape of the weight, and the largest magnitude of each row.

        Raises:
            InputError: NaN, inf or more than float16 holds; no matrix, or no float dtype.
        """
        rows = flattened(w).reshape(_matrix(w.shape))
        codes, scales = np.empty(rows.shape, np.int8), np.empty(rows.shape[0], np.float32)
        step = max(1, CHUNK // rows.shape[1])
        buffer = np.empty(min(step, len(rows)) * rows.shape[1], np.float32)
        for start in range(0, len(rows), step):
            cut = slice(start, start + step)
            _quantise(_halved(rows[cut], buffer), codes[cut], scales[cut])
        return Quantised(w.shape, {"codes": codes, "scales": scales})

    def dequantise(self, q: Quantised, dtype: str = "float32", *, out: Any = None) -> Array:
        """The values of the codes, computed in float32 and rounded once to `dtype`.

        `out` is float32 of the shape of the weight and takes the rounded values.
        """
        kind = float_dtype(dtype)
        found = target(q.shape, kind, out).reshape(_matrix(q.shape))
        step = max(1, CHUNK // found.shape[1])
        for start in range(0, len(found), step):
            cut = slice(start, start + step)
            values = q.arrays["codes"][cut] * q.arrays["scales"][cut, None]
            values *= _SHARE
            settle(values, found[cut], kind)
        return found.reshape(q.shape)

    def tensors(
        self, name: str, q: Quantised, *, dtype: str = "float16", padded: bool = False
    ) -> dict[str, Array]:
        """The tensors of a pre-quantised checkpoint, for a weight of this name.

        This layout tells neither the model's `dtype` nor anything whose length varies.
        """
        scales, layout = _beside(name)
        zero = np.zeros((), np.uint8)  # the layout of rows
        return {name: q.arrays["codes"], scales: q.arrays["scales"], layout: zero}

    def infos(
        self, name: str, shape: tuple[int, ...], *, dtype: str = "float16"
    ) -> list[TensorInfo]:
        """What `tensors` will give for a weight of this shape, in its order."""
        scales, layout = _beside(name)
        return [
            TensorInfo(name, "I8", shape),
            TensorInfo(scales, "F32", shape[:1]),
            TensorInfo(layout, "U8", ()),
        ]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise InputError(f"int8 has a scale for each row of a matrix, and this is {shape}")
    return shape


def _beside(name: str) -> tuple[str, str]:
    """The names of the scales and of the number of the layout."""
    module = name.removesuffix("weight")
    return f"{module}SCB", f"{module}weight_format"


def _halved(rows: Array, buffer: Single) -> Single:
    """The rows rounded to float16, in float32."""
    wide = singles(rows, buffer)
    if rows.dtype == np.float16:
        return wide
    half = np.empty(rows.shape, np.float16)
    narrow(np.ascontiguousarray(wide), half)
    found = buffer[: rows.size].reshape(rows.shape)
    widen(half, found)
    return found


def _quantise(rows: Single, codes: Array, scales: Single) -> None:
    np.maximum(rows.max(1), -rows.min(1), out=scales)
    np.abs(scales, out=scales)  # of a row of zeros it may be -0
    if not np.isfinite(scales).all():
        raise InputError("the weight holds NaN, inf or more than float16 can, which int8 needs")
    inverse = 1 / np.where(scales > 0, scales, np.float32(1)) * np.float32(127)  # rounded twice
    scaled = rows * inverse[:, None]
    np.copyto(codes, np.rint(scaled, out=scaled), casting="unsafe")
