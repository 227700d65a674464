"""The rows of a matrix some at a time, so that what is made of them stays small."""

from collections.abc import Iterator

CHUNK = 1 << 22  # elements


def row_slices(rows: int, cols: int, size: int = CHUNK) -> Iterator[slice]:
    """The rows of a matrix, so many at a time that they have at most `size` elements."""
    step = max(1, size // max(cols, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
