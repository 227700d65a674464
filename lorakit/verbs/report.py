"""What a run did, tensor by tensor and in sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.engine.figures import Done, Figures, total, unit
from lorakit.engine.plan import Fold, Plan


@dataclass(frozen=True)
class Report:
    """The outcome of a merge.

    tensors: of the result; folded: how many were computed; written: bytes; figures: by tensor;
    retained: share of all deltas that survived rounding; max_change: the largest change of a stored
    number; overflowed: finite numbers that the stored dtype could not hold; notes: what was
    rewritten, left out or ambiguous; sha256: by file, where asked for; undo_error: the
    most that a number can be off after an unmerge: half a unit in the last place before it and
    half a unit after it; devices: what folded; requantised: of the weights that were quantised
    again, how many, and the figures of all of them.
    """

    plan: str
    tensors: int
    folded: int
    written: int
    retained: float
    max_change: float
    overflowed: int
    figures: Mapping[str, Figures]
    notes: tuple[str, ...] = ()
    sha256: Mapping[str, str] | None = None
    undo_error: float = 0.0
    devices: tuple[str, ...] = ()
    requantised: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        figures = {n: tensor_figures(f) for n, f in self.figures.items()}
        return {**vars(self), "figures": figures}


def tensor_figures(figures: Figures) -> dict[str, float]:
    """The figures of one tensor as people read them; of codes on a grid, with the norms of the
    delta and of the error that was added to it.
    """
    found: dict[str, float] = {
        "retained": figures.retained,
        "max_change": figures.max_change,
        "max_value": figures.max_value,
        "overflowed": figures.overflowed,
    }
    if figures.gridded:
        found |= {"delta": figures.delta, "error": figures.error, "max_error": figures.max_error}
    return found


def requantised(figures: Mapping[str, Figures]) -> dict[str, float] | None:
    """The figures of all weights that were quantised again, None where none was."""
    each = [f for f in figures.values() if f.gridded]
    return {"weights": len(each), **tensor_figures(total(each))} if each else None


def report_of(plan: Plan, done: Mapping[str, Done]) -> Report:
    """The report of a finished run."""
    folds = {s.tensor.name: s for s in plan.folds}
    found = {n: f for file in plan.files for n, f in done[file.name].figures.items()}
    # Workers finish in any order. Scales of codes have no figures of their own.
    figures = {n: found[n] for n, f in folds.items() if n in found and _tells(f, found[n])}
    whole = total(figures.values())
    return Report(
        plan=plan.hash,
        tensors=sum(len(f.tensors) for f in plan.files),
        folded=sum(isinstance(s, Fold) and bool(s.recipe) for f in plan.files for s in f.steps),
        written=plan.nbytes,
        retained=whole.retained,
        max_change=whole.max_change,
        overflowed=whole.overflowed,
        figures=figures,
        notes=tuple(plan.notes),
        undo_error=max(
            (_undo_error(folds[n], f, plan.verb) for n, f in figures.items()), default=0.0
        ),
        devices=tuple(sorted({name for d in done.values() for name in d.devices})),
        requantised=requantised(figures),
        sha256={n: d.sha256 for n, d in done.items() if d.sha256} or None,
    )


def summed(reports: Mapping[str, Report]) -> Report:
    """The report of several runs as of one, tensors by `name of the run/name`."""
    each = list(reports.values())
    figures = {f"{r}/{n}": f for r, one in reports.items() for n, f in one.figures.items()}
    whole = total(figures.values())
    hashes = {f"{r}/{n}": h for r, one in reports.items() for n, h in (one.sha256 or {}).items()}
    return Report(
        plan="",
        tensors=sum(r.tensors for r in each),
        folded=sum(r.folded for r in each),
        written=sum(r.written for r in each),
        retained=whole.retained,
        max_change=whole.max_change,
        overflowed=whole.overflowed,
        figures=figures,
        notes=tuple(f"{r}: {n}" for r, one in reports.items() for n in one.notes),
        undo_error=max(r.undo_error for r in each),
        devices=tuple(sorted({d for r in each for d in r.devices})),
        requantised=requantised(figures),
        sha256=hashes or None,
    )


def _tells(fold: Fold, figures: Figures) -> bool:
    """Whether there are figures of a tensor: not of scales of codes."""
    return bool(figures.gridded or not fold.unit)


def _undo_error(fold: Fold, figures: Figures, verb: str) -> float:
    """Of a merge, what its numbers will be off in its own dtype, or are on their grid; of an
    unmerge, what they are.
    """
    if figures.gridded:
        return figures.max_error
    merged = fold.origin.dtype if verb == "unmerge" else fold.tensor.dtype
    largest = figures.max_value + figures.max_change
    return (unit(merged, largest) + unit(fold.tensor.dtype, figures.max_value)) / 2
