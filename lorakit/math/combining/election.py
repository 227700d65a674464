"""The election of a sign for every element, and the mean of the updates that agree with it.

Law: with the sign `g = sign(sum D_j)`, an element of the mean is that of the `D_i` of sign g. An
element that is zero has none, and does not count; weights count, since they are in `D_i`.

Source: Yadav et al. 2023 (TIES-Merging, arXiv 2306.01708), elect and disjoint merge.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

from lorakit.math.namespace import Array, array_namespace


def agreeing(updates: Sequence[Array], majority: str) -> list[Array]:
    """Where each update has the sign that has the majority, as booleans.

    The majority is that of the sum ("total") or of the number of updates ("frequency"); where there
    is none it is positive.
    """
    xp = array_namespace(*updates)
    votes = reduce(add, updates if majority == "total" else (xp.sign(x) for x in updates))
    positive = votes >= 0
    return [xp.where(positive, x > 0, x < 0) for x in updates]


def elected(updates: Sequence[Array], majority: str) -> Array:
    """The mean, element by element, over the updates that have the sign of the majority."""
    xp = array_namespace(*updates)
    agree = agreeing(updates, majority)
    zero = xp.zeros_like(updates[0])
    total = reduce(add, (xp.where(a, x, zero) for a, x in zip(agree, updates, strict=True)))
    number = reduce(add, (xp.astype(a, zero.dtype) for a in agree))
    return total / xp.where(number > 0, number, xp.ones_like(number))


def summed(updates: Sequence[Array], majority: str) -> Array:
    """The sum: no election."""
    return reduce(add, updates)
