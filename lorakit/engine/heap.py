"""How the C library keeps memory that is free: without this, the peak of a run depends on how its
threads happen to meet.
"""

import ctypes

# Of glibc's malloc.h.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
LARGE = 128 << 10  # bytes


def steady() -> None:
    """Have buffers above 128 KiB given back as soon as they are free, and threads share one heap.

    For the whole process, so for commands only. Nothing happens where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGE)
    mallopt(M_ARENA_MAX, 1)
