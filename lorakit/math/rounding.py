"""Sums rounded into the dtype of a file, and what of them the file then holds.

Law: float16 gets each sum rounded once, to nearest even, as if it had been exact. A float32 sum
rounded again gives the same, except where it fell exactly half-way between two float16 numbers, as
one in 8,192 does: then it has lost the side on which it lay. Those are rounded from float64, which
holds such a sum exactly unless one term is 2^29 times the other.
"""

import numpy as np
from numpy.typing import NDArray

from lorakit.math.cast import CHUNK, Array, Scratch, narrow, widen

_F16, _F32 = np.dtype(np.float16), np.dtype(np.float32)
_CUT = 13  # the bits of a float32 that a normal float16 has no room for
_KEPT = np.uint32(-1 << _CUT & 0xFFFFFFFF)
_HALF = np.uint32(1 << _CUT - 1)
_LARGEST, _SMALLEST_NORMAL = np.float32(65504), np.float32(2.0**-14)
_REBIAS = np.uint16((127 - 15 << 10) % 2**16)  # from the exponents of float32 to those of float16


@np.errstate(all="ignore")
def round_sum(w: Array, change: Array, out: Array, held: Array, scratch: Scratch) -> None:
    """Round `w + change` into `out`, a float of their shape, and into `held` what `out` then holds.

    `w` is float32 or float64; `held` is of the dtype of the sum, and overflow as in `narrow`. All
    are contiguous.
    """
    if held.dtype != _F32 or out.dtype != _F16:
        np.add(w, change, out=held)
        narrow(held, out, scratch)
        widen(out, held, scratch)
        return
    flat = [x.reshape(-1) for x in (w, change, out, held)]
    for start in range(0, w.size, CHUNK):
        _round_half(*[x[start : start + CHUNK] for x in flat], scratch=scratch)


def _round_half(w: Array, change: Array, out: Array, held: Array, *, scratch: Scratch) -> None:
    """The same for at most CHUNK numbers, from float32 to float16."""
    at = _round_by_carry(w, change, out, held, scratch)
    exact = w[at].astype(np.float64) + change[at]
    out[at] = near = exact.astype(np.float16)  # rounded once: not by way of float32
    held[at] = near


def _round_by_carry(
    w: Array, change: Array, out: Array, held: Array, scratch: Scratch
) -> NDArray[np.intp] | slice:
    """Do what `round_sum` does, but for the numbers at the places that it returns: those half-way,
    subnormal ones, and all if there is one beyond float16.

    Half of what is cut off, added to the bits of a float32, carries into the bits that are kept.
    """
    total, size = scratch.single[: w.size], scratch.bits[: w.size].view(np.float32)
    np.add(w, change, out=total)
    np.abs(total, out=size)
    if not size.max(initial=0) <= _LARGEST:  # NaN is not
        return slice(None)
    bits, kept, doubtful = total.view(np.uint32), held.view(np.uint32), scratch.mask[: w.size]
    bits += _HALF
    np.bitwise_and(bits, _KEPT, out=kept)
    np.equal(bits, kept, out=doubtful)
    doubtful |= np.less(size, _SMALLEST_NORMAL, out=bits.view(np.bool_)[: w.size])
    np.right_shift(kept, np.uint32(_CUT), out=bits)
    words = out.view(np.uint16)
    np.copyto(words, bits, casting="unsafe")
    words -= _REBIAS  # modulo 2^16: the exponent's upper bits, which did not fit, are not missed
    words |= _signs(held, scratch)
    return np.flatnonzero(doubtful)


def _signs(x: Array, scratch: Scratch) -> NDArray[np.uint16]:
    """The sign bits of a two-byte float."""
    negative = scratch.magic.view(np.bool_)[: x.size]
    signs = scratch.bits.view(np.uint16)[: x.size]
    np.copyto(signs, np.less(x, np.float32(0), out=negative))
    signs *= np.uint16(0x8000)  # which NumPy does faster than a shift
    return signs
