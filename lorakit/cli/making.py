"""What the commands that make an adapter have in common: where it goes, how it is told."""

import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.cli import options, show

if TYPE_CHECKING:
    from lorakit.verbs.job import RunOptions
    from lorakit.verbs.making import Draft, Report

NOTHING = 1e-9  # a share of energy that rounding makes
writing = options.writing(
    "Say what would be made, weight by weight; write nothing.",
    options.working("decomposes"),
    where="a folder",
)
dtype = options.dtype("the factors of the result")


class Job(Protocol):
    """An adapter planned."""

    @property
    def draft(self) -> "Draft[Any]":
        """The draft of it."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know."""
        ...

    def preview(self, options: "RunOptions | None" = None) -> "Report[Any]":
        """What a run would do."""
        ...

    def run(self, output: str | Path, options: "RunOptions | None" = None) -> "Report[Any]":
        """Make it."""
        ...


def kind(name: str) -> str:
    """A module's name with its numbers replaced by `*`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def grouped(
    rows: Iterable[Any], *, verbose: bool, name: Callable[[Any], str] = attrgetter("name")
) -> list[tuple[str, Sequence[Any]]]:
    """Rows by the kind of module, or each alone."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(name(row) if verbose else kind(name(row)), []).append(row)
    return list(found.items())


def span(values: Sequence[int]) -> str:
    """One number, or the least and the largest."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def share(value: float) -> str:
    """A share of energy for people: never 100 % where something is lost."""
    lost = 1.0 - value
    if lost < NOTHING:
        return "all"
    return f"{100 * value:.2f} %" if lost > 5e-5 else f"all but {100 * lost:.0e} %"


def least(value: float) -> str:
    """The least share of energy, in a sentence: what each weight keeps."""
    return "all" if 1.0 - value < NOTHING else f"at least {100 * value:.4g} %"


def ran(job: Job, ways: show.Ways, run: "RunOptions") -> "Report[Any] | None":
    """Run a job, or with --dry-run preview it; the report, None where nothing is to be shown of it.

    Notes are shown before, those on what came out afterwards.
    """
    job.draft.check(ways.output)
    ways.notes(job.notes)
    with show.steps(len(job.draft.tasks), quiet=ways.quiet) as report:
        run = run.reporting(report)
        done = job.preview(run) if ways.dry_run else job.run(ways.output, run)
    ways.notes(done.notes[len(job.notes) :])
    return None if ways.told(done) else done
