"""Parts of an arena never overlap, whatever is asked for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorakit.math.arena import ALIGNED, SIZE, Arena

ASKED = st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(["u1", "f4", "f8", "?"])))


@given(ASKED)
def test_what_is_written_to_one_part_is_in_no_other(asked) -> None:
    arena = Arena()
    parts = [arena.take(count, dtype) for count, dtype in asked]
    for number, part in enumerate(parts):
        part.view(np.uint8)[:] = number % 251
    for number, (part, (count, dtype)) in enumerate(zip(parts, asked, strict=True)):
        assert (part.shape, part.dtype) == ((count,), np.dtype(dtype))
        assert (part.view(np.uint8) == number % 251).all()
        assert part.ctypes.data % np.dtype(dtype).alignment == 0


def test_there_is_more_where_an_allocation_ends() -> None:
    arena = Arena()
    parts = [arena.take(SIZE // 3 + 1) for _ in range(4)]
    large, after = arena.take(2 * SIZE), arena.take(1)
    assert len({part.ctypes.data for part in (*parts, large, after)}) == 6
    assert parts[1].ctypes.data - parts[0].ctypes.data < SIZE // 3 + 1 + ALIGNED
    assert large.nbytes == 2 * SIZE
