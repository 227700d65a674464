"""Two codes of four bits in a byte, the first in the upper half; and the values of codes.

Law: `values(pack(codes))` is `levels[codes]`, whatever the levels.
"""

import numpy as np
from numpy.typing import NDArray

from lorakit.quant.codec import Single

Codes = NDArray[np.uint8]
Pairs = NDArray[np.uint64]  # two float32 each


def pack(codes: Codes, out: Codes) -> None:
    """Put an even number of codes below 16 into half as many bytes."""
    pairs = codes.view("<u2")  # the first code is in the lower half
    joined = pairs << np.uint16(4)
    joined |= pairs >> np.uint16(8)
    np.copyto(out, joined, casting="unsafe")  # which keeps the lower byte


def pairs(levels: Single) -> Pairs:
    """For each byte, the values of its two codes."""
    both = np.empty((16, 16, 2), np.float32)
    both[:, :, 0], both[:, :, 1] = levels[:, None], levels
    return both.reshape(-1, 2).view(np.uint64)[:, 0]


def permuted(order: NDArray[np.uint8]) -> Codes:
    """For each byte, the byte with both codes replaced by `order` of them."""
    return (order[:, None] << np.uint8(4) | order).reshape(-1).astype(np.uint8)


def values(packed: Codes, table: Pairs, out: Single) -> None:
    """The values of both codes of every byte, in `out`, which is twice as long."""
    np.take(table, packed.astype(np.intp), out=out.view(np.uint64), mode="wrap")


def looked_up(levels: Single, codes: Codes, out: Single) -> Single:
    """The level of each code, in `out`."""
    if len(levels) == 16 and codes.size % 2 == 0:
        packed = np.empty(codes.size // 2, np.uint8)
        pack(codes, packed)
        values(packed, pairs(levels), out)
    else:
        np.take(levels, codes, out=out, mode="clip")
    return out


def fields(words: NDArray[np.int32], bits: int) -> Codes:
    """The codes of 2, 4 or 8 bits in each word, the first in the lowest: the last dimension is
    32 / bits times as long.
    """
    parts = np.ascontiguousarray(words).view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    found: Codes = parts[..., None] >> shifts & np.uint8(2**bits - 1)
    return found.reshape(*parts.shape[:-1], -1)


def words(codes: Codes, bits: int) -> NDArray[np.int32]:
    """The inverse of `fields`; a last word that is not full has zeros above."""
    in_word, inside = 32 // bits, 8 // bits
    spare = -codes.shape[-1] % in_word
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, spare)]) if spare else codes
    parts = np.ascontiguousarray(padded).reshape(*codes.shape[:-1], -1, inside)
    joined = parts[..., 0].copy()
    for place in range(1, inside):
        joined |= parts[..., place] << np.uint8(place * bits)
    return joined.view("<i4")
