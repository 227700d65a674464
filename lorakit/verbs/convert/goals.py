"""The modules that a converted adapter has, and which numbers on disk each of them changes.

A tensor on disk is a matrix, or a stack of them with one slot for each expert. A goal is made of
windows onto such matrices: rows or columns of one, and where in the goal's own matrix they lie.

Law: the windows of a goal cover each row of its matrices (or column) once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorakit.naming.families import FUSED
from lorakit.naming.places import Place
from lorakit.tensors import TensorInfo

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a matrix on disk, in a goal.

    `axis` 0 counts rows, 1 columns; the other is whole.
    """

    tensor: str
    span: Span  # of the matrix on disk
    at: int = 0  # where it begins in the goal's matrix
    slot: int | None = None  # of a stack on disk
    expert: int | None = None  # of a goal that is a stack
    axis: int = 0


@dataclass(frozen=True)
class Goal:
    """A module of the result, or a bare parameter of one.

    `shape` is that of (one of) its matrices as they lie on disk, and `turned` says that A spans
    their first dimension. `layer` says that PEFT adapts it as a module and not as a parameter.
    """

    module: str
    parameter: str
    shape: tuple[int, int]
    windows: Sequence[Window]
    layer: bool = True
    experts: int = 0  # 0: no stack
    turned: bool = False

    @property
    def name(self) -> str:
        """What the patterns of a config are held against."""
        return self.module if self.layer else f"{self.module}.{self.parameter}".lstrip(".")


def is_stack(info: TensorInfo, spelling: str) -> bool:
    """Whether a tensor holds all experts, by its shape and canonical name."""
    stem, _, leaf = spelling.rpartition(".")
    return len(info.shape) == 3 and stem.endswith("experts") and not leaf.endswith("_bias")


def windows_of(there: Sequence[Place], infos: Sequence[TensorInfo], rows: int) -> Iterator[Window]:
    """The windows of a parameter at these places; it has `rows` output rows where it is a part."""
    for place, info in zip(there, infos, strict=True):
        at = place.rows[0] if place.rows else 0
        if place.at is not None and rows:
            yield Window(place.tensor, (place.at, place.at + rows))
        else:
            yield Window(place.tensor, (0, info.rows), at)


def stack_windows(there: Sequence[Place], infos: Sequence[TensorInfo]) -> Iterator[Window]:
    """The windows of a stack whose experts are slots of the tensors, or a tensor each."""
    for place, info in zip(there, infos, strict=True):
        at = place.rows[0] if place.rows else 0
        if place.expert is not None:
            yield Window(place.tensor, (0, info.rows), at, expert=place.expert)
        else:
            for slot in range(info.rows):
                yield Window(place.tensor, (0, info.shape[1]), at, slot=slot, expert=slot)


def split(goal: Goal, leaf: str, *, in_first: bool) -> Iterator[Goal]:
    """A stack as one module for each expert, and for each of gate and up.

    `leaf` is the canonical name of the parameter; `in_first` says that its matrices are (in, out).
    """
    parts = FUSED.get(leaf, (leaf,))
    axis = 1 if in_first else 0
    height = goal.shape[axis] // len(parts)
    stem = goal.module if goal.module.endswith("experts") else _experts_beside(goal.module)
    own: dict[int, list[Window]] = {}
    for window in goal.windows:
        assert window.expert is not None
        own.setdefault(window.expert, []).append(window)
    for expert, windows in own.items():
        for number, part in enumerate(parts):
            span = (number * height, (number + 1) * height)
            shape = (goal.shape[0], height) if in_first else (height, goal.shape[1])
            there = [w for one in windows if (w := _within(one, span, axis))]
            yield Goal(f"{stem}.{expert}.{part}", "weight", shape, there, turned=in_first)


def _experts_beside(module: str) -> str:
    return f"{module.rpartition('.')[0]}.experts".lstrip(".")


def _within(window: Window, span: Span, axis: int) -> Window | None:
    """What of a window lies in a span of the goal's rows (or columns), seen from there."""
    if axis == 1:
        return replace(window, span=span, at=0, expert=None, axis=1)
    start, stop = window.at, window.at + window.span[1] - window.span[0]
    first, last = max(start, span[0]), min(stop, span[1])
    if first >= last:
        return None
    begin = window.span[0] + first - start
    cut = (begin, begin + last - first)
    return replace(window, span=cut, at=first - span[0], expert=None)
