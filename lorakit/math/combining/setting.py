"""What a combination is asked for, and what it gives.

Law: a setting or a combination that makes no sense is refused here, before anything is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import array_namespace, is_finite

MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class Setting:
    """The parameters of the methods; each method uses some of them (`methods.Method.uses`).

    Raises:
        UsageError: a value outside its range.
    """

    rank: int | None = None  # of the result; None is the method's own choice
    density: float = 1.0  # the share of the elements that is kept, in (0, 1]
    majority: str = "total"  # the sign with the larger sum, or by "frequency" of more adapters
    seed: int = 0  # of this module
    exact: bool = False  # a full SVD in place of a randomised one
    gamma: float = 0.01  # breadcrumbs: the share of largest elements that is dropped
    epsilon: float = 0.15  # della: how far the chance to be kept may lie from the density

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"the rank is {self.rank}; it has to be at least 1")
        if not 0 < self.density <= 1:
            raise UsageError(f"the density is {self.density}; it has to be above 0 and at most 1")
        if self.majority not in MAJORITIES:
            raise UsageError(f"the majority is {self.majority!r}, not one of {MAJORITIES}")
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}; it has to be at least 0")
        if not 0 <= self.gamma < 1:
            raise UsageError(f"gamma is {self.gamma}; it has to be at least 0 and below 1")
        if not 0 <= self.epsilon <= 1:
            raise UsageError(f"epsilon is {self.epsilon}; it has to be from 0 to 1")


@dataclass(frozen=True)
class Combined:
    """The update that a method made."""

    low: LowRank  # of float32 factors, or float64 where an input is float64
    retained: float  # the share of the energy, |.|_F ** 2, of the combination that `low` holds
    wanted_rank: int  # asked for or chosen by the method; `low` has less where that would be exact


def check(parts: Sequence[LowRank], weights: Sequence[float]) -> None:
    """Refuse what cannot be combined.

    Raises:
        UsageError: no adapter, as many weights as not adapters, or a weight that is not finite.
        MisfitError: the updates are not matrices of one shape.
        InputError: a factor or a scaling is not finite.
    """
    if not parts:
        raise UsageError("there is no adapter to combine")
    if len(parts) != len(weights):
        raise UsageError(f"{len(parts)} adapters and {len(weights)} weights; each needs its own")
    for number, weight in enumerate(weights, 1):
        if not isfinite(weight):
            raise UsageError(f"the weight of adapter {number} is {weight}")
    for number, part in enumerate(parts, 1):
        _check_part(part, number, parts[0].shape)


def _check_part(part: LowRank, number: int, shape: tuple[int, int]) -> None:
    if len(part.a.shape) != 2 or len(part.b.shape) != 2 or part.b.shape[1] != part.rank:
        shapes = f"{tuple(part.a.shape)} and {tuple(part.b.shape)}"
        raise MisfitError(f"the factors of adapter {number}, {shapes}, are no low-rank update")
    if part.shape != shape:
        raise MisfitError(
            f"adapter {number} updates a weight of shape {part.shape}, the first one of {shape}"
        )
    if not (isfinite(part.scaling) and is_finite(part.a) and is_finite(part.b)):
        raise InputError(f"the update of adapter {number} holds NaN or infinity")


def widened(parts: Sequence[LowRank]) -> list[LowRank]:
    """The same updates with factors in the dtype of the arithmetic: float64 if one of them is, else
    float32. Exact.
    """
    xp = array_namespace(*(p.a for p in parts))
    double = any(x.dtype == xp.float64 for p in parts for x in (p.a, p.b))
    dtype = xp.float64 if double else xp.float32
    return [
        replace(p, a=xp.astype(p.a, dtype, copy=False), b=xp.astype(p.b, dtype, copy=False))
        for p in parts
    ]


def in_dtype_of(part: LowRank, low: LowRank) -> LowRank:
    """An update with its factors rounded to the dtype of those of another."""
    xp, dtype = array_namespace(low.a), part.a.dtype
    return replace(
        low, a=xp.astype(low.a, dtype, copy=False), b=xp.astype(low.b, dtype, copy=False)
    )
