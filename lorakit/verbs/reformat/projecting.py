"""Whether two deltas of a module are one update: by what they make of a random input, and without
forming either.
"""

import numpy as np

from lorakit.adapter.delta import Delta
from lorakit.adapter.files.parts import as_lora
from lorakit.adapter.load import DIVERGED
from lorakit.errors import MisfitError
from lorakit.math.cast import Array

# What the rounding of factors to a dtype may do to an update.
NEAR = {"F64": 1e-6, "F32": 1e-5, "F16": 4e-3, "BF16": 3e-2}
COARSE = 0.3


class Differing(Exception):  # noqa: N818 - it says what was found
    """Two updates differ."""


def differing(one: Delta, other: Delta) -> float:
    """By how much two updates differ, relative to the first.

    Raises:
        Differing: by more than the rounding of their dtypes.
        MisfitError: the first has NaN or Inf.
    """
    if "a" not in as_plain(one).tensors:
        return _same_tensors(one, other)
    left, right = as_plain(one), as_plain(other)
    x = np.random.default_rng(0).standard_normal(left.tensors["a"].shape[1:])
    y, z = _projected(left, x), _projected(right, x)
    if y.shape != z.shape:
        raise Differing(f"{y.size} outputs, and {z.size}")
    if not np.isfinite(y).all():
        raise MisfitError(f"{one.module!r} has NaN or Inf.", hint=DIVERGED)
    size = float(np.linalg.norm(y)) or 1.0
    error = float(np.linalg.norm(y - z)) / size
    dtypes = {one.tensors[r].dtype for r in one.tensors} | {d.dtype for d in other.tensors.values()}
    if not error <= max((NEAR.get(d, COARSE) for d in dtypes), default=COARSE):
        raise Differing(f"off by {error:.2g}")
    for role in ("magnitude", "bias"):
        _check_beside(role, one, other)
    return error


def as_plain(delta: Delta) -> Delta:
    """The delta as plain factors, where it has such."""
    return as_lora(delta) if delta.algo in ("lora", "loha", "lokr") else delta


def _projected(delta: Delta, x: Array) -> Array:
    a, b = (delta.tensors[r].read().astype(np.float64) for r in "ab")
    with np.errstate(all="ignore"):
        found: Array = delta.scaling * (b.reshape(len(b), -1) @ (a * x).reshape(len(a), -1).sum(1))
    return found


def _same_tensors(one: Delta, other: Delta) -> float:
    for role, values in one.tensors.items():
        if role not in other.tensors or not np.array_equal(
            values.read().ravel(), other.tensors[role].read().ravel()
        ):
            raise Differing(f"another {role}")
    return 0.0


def _check_beside(role: str, one: Delta, other: Delta) -> None:
    left, right = (_flat(d, role) for d in (one, other))
    if left is None or right is None:
        there = left if right is None else right
        same = there is None or not there.any()
    else:
        same = left.shape == right.shape and np.allclose(left, right, rtol=1e-2)
    if not same:
        raise Differing(f"another {role}")


def _flat(delta: Delta, role: str) -> Array | None:
    if role not in delta.tensors:
        return None
    found: Array = delta.tensors[role].read().astype(np.float64).ravel()
    return found


def is_empty(delta: Delta) -> bool:
    """Whether a part of a fused projection has nothing but zeros: it is left out where parts are
    apart, and one that was not trained is such where they are not.
    """
    return delta.algo == "lora" and not delta.tensors["b"].read().any()
