"""Conversion between the dtypes of files and the dtype of the arithmetic, block by block.

Law: `widen` is exact and `narrow` rounds once, to nearest even, so `narrow(widen(x)) == x` for
every x (a NaN stays a NaN, but may change its payload and sign). Both are bit-equal to `astype`
of NumPy and ml_dtypes from float32, and many times faster for float16 and the one-byte floats.
From float64 they are the correct rounding, where ml_dtypes rounds twice (by way of float32).

Rounding to odd first makes a second rounding harmless where the first keeps two more bits:
Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE Trans. Computers 57(4),
2008. Overflow and the special values are those of IEEE 754 and of ml_dtypes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lorakit.errors import InputError
from lorakit.math.arena import Arena
from lorakit.tensors import NAMES

Array = NDArray[Any]
Dtype = np.dtype[Any]

_STORAGE: dict[str, Dtype] = {c: np.dtype(getattr(ml_dtypes, n, n)) for c, n in NAMES.items()}
_F16, _F32, _F64, _BF16 = (_STORAGE[code] for code in ("F16", "F32", "F64", "BF16"))
_BYTE_FLOATS = frozenset(dtype for code, dtype in _STORAGE.items() if code.startswith("F8_"))
_CODES = {dtype: code for code, dtype in _STORAGE.items()}

# Elements converted at a time: the buffers of a conversion fit the cache of one core, and with
# fewer its dozen calls would cost more than what they do.
CHUNK = 1 << 17


class Scratch:
    """The buffers of a conversion, 29 bytes an element of CHUNK. One for each thread.

    Not cleared, so what is not needed never becomes resident: to and from float32 about half of it,
    for bfloat16 all.
    """

    def __init__(self, arena: Arena | None = None) -> None:
        arena = arena or Arena()
        self.bits: NDArray[np.uint32] = arena.take(CHUNK, np.uint32)
        self.magic: NDArray[np.uint32] = arena.take(CHUNK, np.uint32)
        self.single: NDArray[np.float32] = arena.take(CHUNK, np.float32)
        self.mask: NDArray[np.bool_] = arena.take(CHUNK, np.bool_)
        self.index: NDArray[np.intp] = arena.take(CHUNK, np.intp)
        self.double: NDArray[np.float64] = arena.take(CHUNK, np.float64)


def storage(code: str) -> Dtype:
    """The dtype under which the bytes of a tensor of safetensors dtype `code` are viewed.

    Raises:
        InputError: elements narrower than a byte, or a code that safetensors does not have.
    """
    if code not in _STORAGE:
        raise InputError(f"a tensor of dtype {code!r} cannot be read as numbers")
    return _STORAGE[code]


def code_of(dtype: Dtype) -> str:
    """The safetensors code of a dtype; the inverse of `storage`.

    Raises:
        InputError: safetensors has no code for it.
    """
    if dtype not in _CODES:
        raise InputError(f"safetensors has no dtype for arrays of {dtype.str} ({dtype.name})")
    return _CODES[dtype]


def bytes_of(values: Array) -> NDArray[np.uint8]:
    """The bytes of an array as a file has them; its own memory where that is in their order."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def working(*codes: str) -> Dtype:
    """The dtype of the arithmetic on tensors of these codes: float64 if one is, else float32."""
    return _F64 if "F64" in codes else _F32


def widen(raw: Array, out: Array, scratch: Scratch | None = None) -> None:
    """Convert `raw`, of a storage dtype, into `out`, float32 or float64 of its shape. Exact.

    In a loop pass a `scratch`: touching fresh memory costs more than the conversion.

    Raises:
        InputError: `out` cannot hold every value of the dtype of `raw`.
    """
    if raw.dtype in _BYTE_FLOATS:
        index = (scratch or Scratch()).index
        _by_chunk(lambda raw, out: _widen_byte(raw, out, index[: raw.size]), raw, out)
    elif raw.dtype == _F16 and out.dtype == _F32:
        _by_chunk(_widen_half, raw, out)
    elif raw.dtype == out.dtype or raw.dtype.itemsize < out.dtype.itemsize:
        _copy(raw, out)
    else:
        raise InputError(f"{raw.dtype.name} does not fit {out.dtype.name} without rounding")


def narrow(x: Array, out: Array, scratch: Scratch | None = None) -> None:
    """Round `x`, float32 or float64, once and to nearest even into `out`, a float of its shape.

    Values beyond the largest become what `astype` makes of them: inf, or NaN where the dtype has
    no inf. `scratch` as for `widen`.

    Raises:
        InputError: `x` is neither float32 nor float64, or `out` is not of a float dtype of files.
    """
    wide = (_F32, _F64)
    if x.dtype not in wide or out.dtype not in (*wide, *_ROUND):
        raise InputError(f"no rounding from {x.dtype.name} to {out.dtype.name}")
    if out.dtype in wide or (x.dtype, out.dtype) == (_F32, _BF16):
        _copy(x, out)  # at once: nothing is kept between, so chunks would only cost calls
        return
    round_single, buffers = _ROUND[out.dtype], scratch or Scratch()
    if x.dtype == _F32:
        _by_chunk(lambda x, out: round_single(x, out, buffers), x, out)
    else:
        _by_chunk(lambda x, out: round_single(_to_odd(x, buffers), out, buffers), x, out)


def _by_chunk(convert: Callable[[Array, Array], None], source: Array, out: Array) -> None:
    """Apply `convert(source, out)` to flat runs of at most CHUNK elements."""
    if source.shape != out.shape:
        raise ValueError(f"shapes differ: {source.shape} and {out.shape}")
    if not (source.flags.c_contiguous and out.flags.c_contiguous):
        dense = np.empty(out.shape, out.dtype)
        _by_chunk(convert, np.ascontiguousarray(source), dense)
        np.copyto(out, dense)
        return
    source, out = source.reshape(-1), out.reshape(-1)
    for start in range(0, source.size, CHUNK):
        convert(source[start : start + CHUNK], out[start : start + CHUNK])


def _copy(source: Array, out: Array) -> None:
    if source.shape != out.shape:
        raise ValueError(f"shapes differ: {source.shape} and {out.shape}")
    with np.errstate(all="ignore"):
        np.copyto(out, source, casting="unsafe")


def _widen_byte(raw: Array, out: Array, index: NDArray[np.intp]) -> None:
    np.copyto(index, raw.view(np.uint8))
    np.take(_values(raw.dtype, out.dtype), index, out=out, mode="wrap")


@cache
def _values(dtype: Dtype, wide: Dtype) -> Array:
    """The value of each of the 256 bytes of a one-byte float."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(wide)


_SIGN_AND_HALF = np.uint32(0x8FFFE000)
_REBIAS = np.float32(2.0**112)  # 127 - 15: from the exponent bias of float16 to that of float32
_TINY = np.float32(2.0**-149)


def _widen_half(raw: Array, out: Array) -> None:
    """float16 to float32, by placing its bits in a float32 and multiplying by a power of two.

    The multiplication normalises the subnormals, unless something in this process has told the
    processor to flush them to zero; and it cannot give inf or NaN. Both are left to NumPy.
    """
    signed = raw.view(np.int16)
    special = signed.max() >= 0x7C00 or raw.view(np.uint16).max() >= 0xFC00
    if special or _TINY * _REBIAS == 0:
        _copy(raw, out)
        return
    bits = out.view(np.uint32)
    np.copyto(out.view(np.int32), signed)
    bits <<= np.uint32(13)
    bits &= _SIGN_AND_HALF
    out *= _REBIAS


_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT = np.uint32(0x7F800000)
_TWO_TO_16 = np.uint32((16 + 127) << 23)
# The biased exponent E = e + 13 + 127 of the sum gives (E - 126) << 10 in the result; the 126 goes
# in with the addend, modulo 2^16 (an even number, so that ties still see the right parity).
_TIMES_2_TO_13 = np.uint32((13 << 23) + (-126 << 10) % 2**16)


def _round_half(x: Array, out: Array, scratch: Scratch) -> None:
    """float32 to float16, the rounding done by one float32 addition.

    With 2^e <= |x| < 2^(e+1), the float32 sum |x| + 2^(e+13) is |x| rounded to a multiple of
    2^(e-10), the spacing of float16 there, and its last bits count those multiples. With e never
    less than -14 this covers the subnormals; the carry into the next e comes out right by itself.
    """
    bits, magic = scratch.bits[: x.size], scratch.magic[: x.size]
    words = x.view(np.uint32)
    np.bitwise_and(words, _MAGNITUDE, out=bits)
    special = bits.max() > _TWO_TO_16
    if special:
        np.minimum(bits, _TWO_TO_16, out=bits)  # which becomes inf
    np.bitwise_and(bits, _EXPONENT, out=magic)
    np.maximum(magic, _smallest_exponents()[: x.size], out=magic)
    magic += _TIMES_2_TO_13
    total = bits.view(np.float32)
    total += magic.view(np.float32)
    magic >>= np.uint32(13)
    bits += magic
    np.right_shift(words, np.uint32(16), out=magic)
    magic &= np.uint32(0x8000)
    bits |= magic
    np.copyto(out.view(np.uint16), bits, casting="unsafe")
    if special:
        out[np.isnan(x)] = np.nan


@cache
def _smallest_exponents() -> NDArray[np.uint32]:
    """2^-14 as float32 bits, as an array: NumPy's maximum is five times slower with a scalar."""
    return np.full(CHUNK, (-14 + 127) << 23, np.uint32)


def _round_byte(x: Array, out: Array, scratch: Scratch) -> None:
    """float32 to a one-byte float: to odd into the upper 16 bits, then by a table over those.

    The upper 16 bits hold 8 bits of significand; a one-byte float has at most 4, so 6 would do.
    """
    bits, index = scratch.bits[: x.size], scratch.index[: x.size]
    words = x.view(np.uint32)
    np.bitwise_and(words, np.uint32(0xFFFF), out=bits)
    bits += np.uint32(0xFFFF)  # bit 16 is now whether the lower half was not zero
    bits |= words
    bits >>= np.uint32(16)
    np.copyto(index, bits)
    np.take(_rounded(out.dtype), index, out=out.view(np.uint8), mode="wrap")


@cache
def _rounded(dtype: Dtype) -> NDArray[np.uint8]:
    """The nearest one-byte float to each float32 whose lower 16 bits are zero."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    with np.errstate(all="ignore"):
        return upper.view(np.float32).astype(dtype).view(np.uint8)


def _round_bfloat16(x: Array, out: Array, scratch: Scratch) -> None:
    _copy(x, out)  # ml_dtypes rounds once here, and fast


def _to_odd(x: NDArray[np.float64], scratch: Scratch) -> NDArray[np.float32]:
    """`x` cut to float32, its last bit set where something was cut off (rounding to odd).

    Comparing bits compares magnitudes, because the float32 has the sign of `x`.
    """
    near, back = scratch.single[: x.size], scratch.double[: x.size]
    mask = scratch.mask[: x.size]
    _copy(x, near)
    np.copyto(back, near)
    bits, wide_bits, words = near.view(np.uint32), back.view(np.uint64), x.view(np.uint64)
    np.greater(wide_bits, words, out=mask)
    bits -= mask
    np.not_equal(wide_bits, words, out=mask)
    bits |= mask
    return near


_ROUND: dict[Dtype, Callable[[Array, Array, Scratch], None]] = {
    _F16: _round_half,
    _BF16: _round_bfloat16,
    **dict.fromkeys(_BYTE_FLOATS, _round_byte),
}
