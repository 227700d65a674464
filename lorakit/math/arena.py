"""Memory for buffers that are used over and over, in huge pages where the system gives them.

Looking up ordinary pages takes a tenth to a quarter of the time of a pass over a buffer, most of it
in a virtual machine. NumPy asks for huge ones (madvise(2)) for what has 4 MiB or more; smaller
buffers get them as parts of such an allocation.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

HUGE = 4 << 20  # bytes from which on NumPy asks for huge pages
SIZE = 8 << 20  # bytes of an allocation; what is never touched takes no memory
ALIGNED = 64  # bytes: a line of the cache


class Arena:
    """Gives out parts of large allocations, which are given back when none of its parts is left."""

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def take(self, count: int, dtype: Any = np.uint8) -> NDArray[Any]:
        """An array (count,) of its own; its contents are whatever was there."""
        nbytes = count * np.dtype(dtype).itemsize
        if nbytes >= HUGE:
            return np.empty(count, dtype)
        if self._free.nbytes < nbytes:
            self._free = np.empty(SIZE, np.uint8)
        taken, self._free = self._free[:nbytes], self._free[-(-nbytes // ALIGNED) * ALIGNED :]
        return taken.view(dtype)
