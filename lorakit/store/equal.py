"""Whether two tensors have the same bytes, read block by block."""

from lorakit.tensors import Source, TensorInfo

BLOCK = 1 << 20  # bytes


def same_bytes(one: Source, a: TensorInfo, other: Source, b: TensorInfo) -> bool:
    """Whether `a` in `one` and `b` in `other` agree in dtype, shape and every byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = a.nbytes // max(a.rows, 1)
    rows = max(1, BLOCK // max(step, 1))
    for start in range(0, a.rows if a.nbytes else 0, rows):
        stop = min(start + rows, a.rows)
        left, right = bytearray((stop - start) * step), bytearray((stop - start) * step)
        one.read_rows(a.name, start, stop, left)
        other.read_rows(b.name, start, stop, right)
        if left != right:
            return False
    return True
