"""verify: hold a result against its manifest, its base and its adapters.

The plan is made again from the inputs that the manifest names. Untouched bytes must equal the
base's, every one of them. Of every folded tensor, blocks of rows (all of them with `full`) are
computed again in float64, and each stored number must lie within half a unit in the last place of
that, plus what float32 arithmetic can be off: (rank + 4) * 2^-24 of the sum of the absolute terms.
Where a weight was quantised again, as near to it as the grid allows, plus the same.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.engine.plan import Fold, OutputFile
from lorakit.errors import DifferenceError
from lorakit.folder.manifest import read_manifest
from lorakit.store.checkpoint import Part
from lorakit.store.equal import same_bytes
from lorakit.store.reading import reading
from lorakit.store.safetensors import SafetensorsFile
from lorakit.verbs.base.sources import sources_of
from lorakit.verbs.job import Job
from lorakit.verbs.merge import Adapters
from lorakit.verbs.verify.beside import check_beside
from lorakit.verbs.verify.files import Tally, check_copies, opened, sampled
from lorakit.verbs.verify.grids import check_grids
from lorakit.verbs.verify.loftq import check_loftq
from lorakit.verbs.verify.pipeline import check_kept, parts_of
from lorakit.verbs.verify.replanned import made_by, replanned


@dataclass(frozen=True)
class Verified:
    """What was checked, and every difference in one line; `wrong_rounded` counts numbers that are
    within the bound but not the nearest to the exact result.
    """

    copied_bytes: int
    folded_tensors: int
    checked_numbers: int
    wrong_rounded: int
    differences: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return asdict(self)


class ResultError(DifferenceError):
    """A result is not what its manifest says; `verified` is what was found."""

    def __init__(self, verified: Verified, output: Path) -> None:
        (first, *others) = verified.differences
        more = f" ({len(others)} more differences.)" if others else ""
        hint = "The result was changed or damaged: make it again."
        super().__init__(first + more, hint=hint, file=output)
        self.verified = verified

    def to_dict(self) -> dict[str, Any]:
        """The error with every difference."""
        return {**super().to_dict(), **self.verified.to_dict()}


def verify(
    output: str | Path,
    *,
    full: bool = False,
    base: str | Path = "",
    adapters: Adapters = (),
    allow_pickle: bool = False,
) -> Verified:
    """What agrees and what does not, between a result and what its manifest says it is made of.

    Of a whole pipeline, every model that has a manifest, and every other file against the base's.
    `base` and `adapters` say where the inputs are now, if not where the manifest has them. `full`
    computes every number of every folded tensor again instead of some blocks of each.

    Raises:
        InputError: there is no manifest, or an input is gone or not the one that it names.
        ResultError: something differs; the error's `verified` has all that was found.
    """
    output, tally, base = Path(output), Tally(), str(base)
    listed = [adapters] if isinstance(adapters, str | Path | Adapter) else adapters
    places = [str(a.path if isinstance(a, Adapter) else a) for a in listed]
    now = {"adapters": places, "allow_pickle": allow_pickle}
    with reading(output):
        if made_by(output) == "loftq":
            manifest = read_manifest(output)
            check_loftq(output, manifest, tally, full=full, base=base, allow_pickle=allow_pickle)
        elif parts := parts_of(output):
            for part in parts:
                where = str(Path(base) / part.name) if base else ""
                job = _verify_one(part, tally, full=full, base=where, **now)
            check_kept(output, job.base.located.path.parent, parts, tally)
        else:
            _verify_one(output, tally, full=full, base=base, **now)
    return _found(tally, output)


def _verify_one(output: Path, tally: Tally, *, full: bool, **now: Any) -> Job:
    """Check the result of one merge; `now` says where its inputs are."""
    job, manifest = replanned(output, **now)
    sources = dict(sources_of(job.base, job.adapters))
    for file in job.plan.files:
        path = output / file.name if output.is_dir() else output
        expected = manifest["files"].get(file.name, {})
        _check_file(path, file, expected, (job, sources, tally), full=full)
    if not tally.differences:  # else the parts of a weight may not be there
        check_grids(output, job, sources, tally, full=full)
    if output.is_dir():
        tally.differences += check_beside(output, job, manifest.get("beside", {}))
    return job


def _found(tally: Tally, output: Path) -> Verified:
    found = Verified(
        tally.copied, tally.folded, tally.numbers, tally.wrong, tuple(tally.differences)
    )
    if found.differences:
        raise ResultError(found, output)
    return found


def _check_file(
    path: Path,
    file: OutputFile,
    expected: Mapping[str, Any],
    context: tuple[Job, dict[str, Part], Tally],
    *,
    full: bool,
) -> None:
    job, sources, tally = context
    written = opened(path, file, expected, tally)
    if written is None:
        return
    check_copies(written, file, sources, tally)
    for step in file.steps:
        if isinstance(step, Fold) and not step.unit:
            _check_fold(written, step, sources[step.source], job, tally, full=full)


def _check_fold(
    written: SafetensorsFile, fold: Fold, source: Part, job: Job, tally: Tally, *, full: bool
) -> None:
    from lorakit.verbs.base.recompute import check_rows, prepared

    if not fold.recipe and fold.tensor.dtype == fold.origin.dtype:
        tally.copied += fold.nbytes
        if not same_bytes(source, fold.origin, written, fold.tensor):
            tally.differences.append(f"{fold.tensor.name!r} in {written.name} differs.")
        return
    tally.folded += 1
    recipe = prepared(fold, source, [a.source for a in job.adapters])
    for rows in sampled(fold, full=full):
        numbers, wrong, off = check_rows(fold, recipe, source, written, rows)
        tally.numbers += numbers
        tally.wrong += wrong
        if off:
            tally.differences.append(
                f"{fold.tensor.name!r} in {written.name}: {off:,} of {numbers:,} numbers in rows "
                f"{rows[0]} to {rows[1]} are not the base plus the deltas."
            )
            return
