"""The array API of arrays: NumPy itself, or array-api-compat for another library; and the way to
another device and back.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # of one array namespace: NumPy, torch, ...
Send = Callable[[Array], Array]  # brings an array to where it is to be worked on


def array_namespace(*arrays: Any) -> Any:
    """The functions for these arrays. NumPy 2 has them all; wrapping it costs 80 ms of import."""
    if all(isinstance(a, np.ndarray) for a in arrays):
        return np
    from array_api_compat import array_namespace as wrapped

    return wrapped(*arrays)


def is_finite(x: Array) -> bool:
    """Whether no number of an array is NaN or Inf."""
    xp = array_namespace(x)
    return bool(xp.all(xp.isfinite(x)))


def here(x: Array) -> Array:
    """The array as it is: what is to be worked on where it lies."""
    return x


def on_cpu(x: Array) -> Array:
    """The array in NumPy."""
    if isinstance(x, np.ndarray):
        return x
    from array_api_compat import to_device

    return np.asarray(to_device(x, "cpu"))
