"""Whether two tensors have the same bytes, read block by block."""

from lorakit.tensors import Source, TensorInfo

BLOCK = 1 << 20  # bytes


def same_bytes(one: Source, a: TensorInfo, other: Source, b: TensorInfo) -> bool:
    """Whether `a` in `one` and `b` in `other` agree in dtype, shape and every byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if not a.nbytes:
        return True
    rows = max(1, BLOCK * a.rows // a.nbytes)
    if a.nbytes % a.rows:  # elements narrower than a byte, and rows that begin within one
        rows = a.rows
    for start in range(0, a.rows, rows):
        stop = min(start + rows, a.rows)
        nbytes = a.nbytes * (stop - start) // a.rows
        left, right = bytearray(nbytes), bytearray(nbytes)
        one.read_rows(a.name, start, stop, left)
        other.read_rows(b.name, start, stop, right)
        if left != right:
            return False
    return True
