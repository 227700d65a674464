"""What the commands that make an adapter have in common: where it goes, how it is told."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.cli import options, printable, show
from lorakit.tensors import size

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


def progress(count: int, ways: dict[str, Any]) -> AbstractContextManager[Callable[[int], None]]:
    """A bar over so many weights, or lines, where they may be shown."""
    return show.steps(count, quiet=ways["quiet"])


def kind(name: str) -> str:
    """A module's name with its numbers replaced by `*`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def grouped(
    rows: Iterable[Any], name: Callable[[Any], str], *, verbose: bool
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


def ending(written: int, ways: dict[str, Any]) -> str:
    """How large the result is and where it lies."""
    if ways["dry_run"]:
        return "nothing was written"
    return f"{size(written)} -> {printable(ways['output'])}"


def ran(job: Job, ways: dict[str, Any], run: "RunOptions") -> "Report[Any] | None":
    """Run a job, or with --dry-run preview it; the report, None where nothing is to be shown of it.

    Notes are shown before, those on what came out afterwards.
    """
    job.draft.check(ways["output"])
    show.notes(() if ways["quiet"] else job.notes)
    with progress(len(job.draft.tasks), ways) as report:
        run = run.reporting(report)
        done = job.preview(run) if ways["dry_run"] else job.run(ways["output"], run)
    show.notes(() if ways["quiet"] else done.notes[len(job.notes) :])
    if ways["as_json"]:
        as_json(done.to_dict(), ways)
        return None
    return None if ways["quiet"] and not ways["dry_run"] else done


def as_json(report: dict[str, Any], ways: dict[str, Any]) -> None:
    """A report as one JSON object on stdout, with where it went."""
    extra = {"dry_run": True} if ways["dry_run"] else {"output": ways["output"]}
    show.result({**extra, **report})
