"""What a conversion from one format to another did, module by module."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorakit.adapter.files.spelling import Step


@dataclass(frozen=True)
class Reformatted:
    """What a conversion did, or would do.

    format, family, namespace: of the source; steps: a line for every module of the result; dropped:
    tensors left out on request; carried: tensors that belong to no module, taken along; written:
    bytes of the weight files; worst: the largest relative difference that the check of the written
    file found between updates, on a random input.
    """

    format: str
    family: str
    namespace: str
    to: str
    modules: int
    steps: Sequence[Step]
    dropped: Sequence[str] = ()
    carried: Sequence[str] = ()
    written: int = 0
    worst: float = 0.0
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def counts(self) -> dict[str, int]:
        """How many modules were renamed, split, fused, computed and folded."""
        hows = [s.how for s in self.steps]
        return {how: hows.count(how) for how in dict.fromkeys(hows)}

    @property
    def error(self) -> float:
        """By how much rounding moves a factor at most, relative to its norm."""
        return max((s.error for s in self.steps), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "counts": self.counts, "error": self.error}
