"""How many singular values are kept.

Law: the rank is the smallest that meets the target, at least 1, and never more than there are. The
tool of kohya-ss, which `kohya` follows, keeps one more than that.

Source: kohya-ss/sd-scripts, networks/resize_lora.py (its options --dynamic_method and
--dynamic_param), as its ranks come out; the four rules are its own, but for `energy`.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from typing import Any

from lorakit.errors import UsageError

Array = Any

KINDS = ("rank", "energy", "sv_ratio", "sv_cumulative", "sv_fro")
# A share that is missed by this much is met: the rounding of a sum must not cost a rank.
_ROUNDING = 1e-12
_NOTHING = 1e-6  # of kohya: a module whose largest singular value is no more is cut to rank 1


_SHARE = (lambda v: 0 < v <= 1, "above 0 and at most 1")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "rank": (lambda v: v >= 1 and v == int(v), "a whole number from 1 on"),
    "energy": _SHARE,
    "sv_ratio": (lambda v: v >= 1, "at least 1"),
    "sv_cumulative": _SHARE,
    "sv_fro": _SHARE,
}


@dataclass(frozen=True)
class Rule:
    """How many singular values are kept.

    rank: `value` of them. energy: so many that the sum of their squares is the share `value` of
    all, in (0, 1]. sv_cumulative: the same of the values themselves. sv_fro: the same of the norm,
    the root of the sum of squares. sv_ratio: those larger than the largest over `value`, which
    is at least 1.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"no rule is called {self.kind!r}; there are {', '.join(KINDS)}.")
        fits, told = _RANGES[self.kind]
        if not (isfinite(self.value) and fits(self.value)):
            raise UsageError(f"{self.kind} {self.value:g} is not {told}.")


def chosen(
    s: Sequence[float] | Array, rule: Rule, *, limit: int | None = None, kohya: bool = False
) -> int:
    """The number of singular values that a rule keeps of `s`, which fall; `limit` at most.

    With `kohya`, what kohya's resize_lora.py keeps, `limit` being its --new_rank.
    """
    values = [float(x) for x in s]
    if rule.kind == "rank":
        rank = int(rule.value)
    elif not values or values[0] == 0.0 or (kohya and values[0] <= _NOTHING):
        rank = 1
    elif kohya:
        rank = max(1, min(_kohya_index(values, rule), len(values) - 1)) + 1
    else:
        rank = _needed(values, rule)
    return max(1, min(rank, len(values), limit or len(values)))


def _needed(values: Sequence[float], rule: Rule) -> int:
    """The least number that meets the target."""
    if rule.kind == "sv_ratio":
        return sum(v > values[0] / rule.value for v in values) or 1
    sums, target = _shares(values, rule)
    return bisect_left(sums, target - _ROUNDING) + 1


def _kohya_index(values: Sequence[float], rule: Rule) -> int:
    """The index that the tool goes by, before it adds one."""
    if rule.kind == "sv_ratio":
        return sum(v > values[0] / rule.value for v in values)
    sums, target = _shares(values, rule)
    return bisect_left(sums, target) + 1


def _shares(values: Sequence[float], rule: Rule) -> tuple[list[float], float]:
    """The shares that the first one, two ... values hold, and the one that is wanted."""
    power = 1 if rule.kind == "sv_cumulative" else 2
    top = values[0]
    sums = list(accumulate((v / top) ** power for v in values))
    return [x / sums[-1] for x in sums], rule.value**2 if rule.kind == "sv_fro" else rule.value
