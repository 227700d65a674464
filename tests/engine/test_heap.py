"""What a command asks of the C library changes no result, and may be asked again."""

import ctypes
import sys

import numpy as np

from lorakit.engine.heap import LARGE, M_MMAP_THRESHOLD, steady


def test_a_process_works_on_and_may_ask_again():
    for _ in range(2):
        steady()
        assert np.ones(LARGE).sum() == LARGE


def test_glibc_takes_what_it_is_asked():
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        assert libc.mallopt(M_MMAP_THRESHOLD, LARGE) in (0, 1)  # musl has it too, and does nothing
