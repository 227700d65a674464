"""How many singular values are kept.

Law: the rank is the smallest that meets the target, at least 1, and never more than there are
values. The tool of kohya-ss, whose ranks `kohya` gives, keeps one more than that.

Source: kohya-ss/sd-scripts, networks/resize_lora.py, for what its options --dynamic_method and
--dynamic_param come to.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lorakit.errors import UsageError
from lorakit.math.namespace import Array

KINDS = ("rank", "energy", "sv_ratio", "sv_cumulative", "sv_fro")
# A target that is missed by this share is met: the rounding of a sum must not cost a rank.
_ROUNDING = 1e-12
_NOTHING = 1e-6  # the largest singular value with which kohya cuts an update to rank 1


@dataclass(frozen=True)
class Rule:
    """How many singular values are kept.

    rank: `value` of them. energy: so many that the sum of their squares is the share `value` of
    that of all. sv_cumulative: the same of their plain sum. sv_fro: the same of the norm, the root
    of the sum of squares. sv_ratio: those that are larger than the largest divided by `value`.

    Raises:
        UsageError: there is no such rule, or the value is out of its range: 1 and more for a rank
            and a ratio, above 0 and at most 1 for a share.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"no rule is called {self.kind!r}; there are {', '.join(KINDS)}")
        if self.kind == "rank" and not (self.value >= 1 and self.value == int(self.value)):
            raise UsageError(f"a rank is a whole number of 1 or more, not {self.value:g}")
        if self.kind == "sv_ratio" and not self.value >= 1:
            raise UsageError(f"sv_ratio is a number of 1 or more, not {self.value:g}")
        if self.kind in _POWERS and not 0 < self.value <= 1:
            raise UsageError(f"{self.kind} is a share, above 0 and at most 1, not {self.value:g}")


def chosen(s: Array, rule: Rule, *, limit: int | None = None, kohya: bool = False) -> int:
    """The rank that a rule gives for the falling singular values `s`, at most `limit`.

    kohya: as kohya's tool has it, one more than is needed, and 1 where no value exceeds 1e-6. It
    takes the values of `b @ a` without the scaling, which matters for the latter only.

    Raises:
        UsageError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"at most rank {limit} would be nothing; the limit must be 1 or more")
    values = [float(v) for v in s]
    found = _needed(values, rule)
    if kohya and values and values[0] <= _NOTHING:
        found = 1
    elif kohya and rule.kind != "rank":
        found += 1
    return max(1, min(found, len(values), found if limit is None else limit))


def _needed(values: Sequence[float], rule: Rule) -> int:
    """The smallest number of values, at least 1, that meets a rule."""
    largest = max(values, default=0.0)
    if rule.kind == "rank":
        return int(rule.value)
    if not largest:
        return 1
    if rule.kind == "sv_ratio":
        return max(1, sum(v > largest / rule.value for v in values))
    power, target = _POWERS[rule.kind]
    sums = list(accumulate((v / largest) ** power for v in values))
    return 1 + bisect_left(sums, target(rule.value) * sums[-1] * (1 - _ROUNDING))


# Of which power of the values the share is taken, and which share of their sum meets the target.
_POWERS: dict[str, tuple[int, Callable[[float], float]]] = {
    "energy": (2, lambda value: value),
    "sv_cumulative": (1, lambda value: value),
    "sv_fro": (2, lambda value: value**2),
}
