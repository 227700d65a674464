"""Tensors that are read or computed: as a file has them, moved, widened, and multiplied, which is
undone.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import isclose

import numpy as np

from lorakit.adapter.delta import Values
from lorakit.adapter.load import read_stored
from lorakit.errors import MisfitError
from lorakit.math.cast import Array, code_of, narrow, storage, widen, working
from lorakit.tensors import Source, TensorInfo


def common(values: Iterable[float]) -> float:
    """The most frequent of these but for 0, which no other is a multiple of; 1 if all are 0."""
    counts = Counter(v for v in values if v)
    return counts.most_common(1)[0][0] if counts else 1.0


def stored(part: Source, info: TensorInfo) -> Values:
    """A tensor of a file, as it is."""
    return Values(info.dtype, info.shape, lambda: read_stored(part, info), info.name)


def moved(
    old: Values, change: Callable[[Array], Array], shape: tuple[int, ...] = (), key: str = ""
) -> Values:
    """A tensor whose numbers are only moved, perhaps into another shape, once it is read."""
    return Values(
        old.dtype, shape or old.shape, lambda: np.ascontiguousarray(change(old.read())), key
    )


def computed(values: Array) -> Values:
    """Numbers that are there already."""
    return Values(code_of(values.dtype), values.shape, lambda: values)


def widened(values: Values) -> Array:
    """The numbers of a tensor in float32; in float64 where they are."""
    raw = values.read()
    wide = np.empty(raw.shape, working(values.dtype))
    widen(np.ascontiguousarray(raw), wide)
    return wide


def times(old: Values, factor: float) -> tuple[Values, float]:
    """A tensor times a number, and by how much rounding moves it, relative to its norm. What takes
    another product back gives the tensor that there was.

    Raises:
        MisfitError: a number does not fit the dtype.
    """
    if factor == 1.0:
        return old, 0.0
    if old.product and isclose(old.product[1] * factor, 1.0, rel_tol=1e-12):
        return old.product[0], 0.0
    exact = widened(old).astype(np.float64) * factor
    out = np.empty(old.shape, storage(old.dtype))
    narrow(exact, out)
    back = widened(computed(out))
    if not np.isfinite(back).all() and np.isfinite(exact).all():
        raise MisfitError(
            f"{old.key!r} times {factor:.3g} does not fit {out.dtype.name}: its largest number "
            f"becomes {np.abs(exact).max():.3g}.",
            hint="Give it another dtype with `lorakit edit --dtype float32` first.",
        )
    size = float(np.linalg.norm(exact)) or 1.0
    made = replace(computed(out), product=(old, factor))
    return made, float(np.linalg.norm(back - exact)) / size
