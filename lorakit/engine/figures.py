"""What folding did to a tensor: how much of the delta the stored numbers kept, and what was lost.

Figures of a tensor are sums over its blocks in the order of the rows, so they too are the same
whatever the number of workers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Figures(NamedTuple):
    """Sums over some rows of a folded tensor; `landed` is the change of the stored numbers.

    landed_delta: sum of landed * delta; delta_delta: sum of delta squared; max_change: the largest
    absolute landed; max_value: the largest absolute stored number; overflowed: how many finite
    numbers became infinite or NaN in the stored dtype. Of what is put on a grid of codes,
    error_error: sum of the squares of what that took from the exact result, landed - delta;
    max_error: the largest of it; gridded: of how many numbers.
    """

    landed_delta: float = 0.0
    delta_delta: float = 0.0
    max_change: float = 0.0
    max_value: float = 0.0
    overflowed: int = 0
    error_error: float = 0.0
    max_error: float = 0.0
    gridded: int = 0

    @property
    def retained(self) -> float:
        """The share of the delta that survived rounding: 1 is all of it, 0 is none."""
        return self.landed_delta / self.delta_delta if self.delta_delta else 1.0

    @property
    def delta(self) -> float:
        """The norm of the delta."""
        return math.sqrt(self.delta_delta)

    @property
    def error(self) -> float:
        """The norm of what a grid took from the exact result."""
        return math.sqrt(self.error_error)


def total(parts: Iterable[Figures]) -> Figures:
    """The figures of all the rows, from those of its blocks in order."""
    parts = list(parts)
    return Figures(
        math.fsum(p.landed_delta for p in parts),
        math.fsum(p.delta_delta for p in parts),
        max((p.max_change for p in parts), default=0.0),
        max((p.max_value for p in parts), default=0.0),
        sum(p.overflowed for p in parts),
        math.fsum(p.error_error for p in parts),
        max((p.max_error for p in parts), default=0.0),
        sum(p.gridded for p in parts),
    )


# Bits of the mantissa as stored, without the leading one.
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E4M3FNUZ": 3}


def unit(dtype: str, value: float) -> float:
    """The unit in the last place of a number of this size in a dtype (two bits where unlisted)."""
    _, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 - MANTISSA.get(dtype, 2))


@dataclass(frozen=True)
class Done:
    """What there is to say of a file: the figures of its folded tensors, its sha256 if that was
    asked for, and on which devices it was folded.
    """

    figures: Mapping[str, Figures]
    sha256: str = ""
    devices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A part of a line of the journal, in which figures are their numbers in order."""
        figures = {n: tuple(f) for n, f in self.figures.items()}
        return {"figures": figures, "sha256": self.sha256, "devices": list(self.devices)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Done":
        """What `to_dict` gave, of a line of the journal."""
        figures = {n: Figures(*numbers) for n, numbers in data["figures"].items()}
        return Done(figures, data.get("sha256", ""), tuple(data.get("devices", ())))
