"""What people see: tables, figures, progress. Results go to stdout, everything else to stderr."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from lorakit.cli import printable
from lorakit.tensors import size

EVERY = 30.0  # seconds between lines of progress where there is no terminal
REDRAWN = 0.1  # seconds between two drawings of a bar
WIDE = 10_000  # columns where there is no terminal: one row a line, whatever it holds


def result(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps({"version": 1, **data}))


def notes(lines: Sequence[str]) -> None:
    """Warnings, on stderr."""
    for line in lines:
        click.echo(f"Note: {printable(line)}", err=True)


@dataclass(frozen=True)
class Ways:
    """How a command tells its result: where that lies, whether it is only tried, and as what."""

    output: str
    dry_run: bool
    as_json: bool
    quiet: bool
    verbose: bool

    def notes(self, lines: Sequence[str]) -> None:
        """Warnings, where they are wanted."""
        notes(() if self.quiet else lines)

    def told(self, done: Any) -> bool:
        """Whether nothing more is to be shown of a report: it is printed here as JSON, or nothing
        of it is wanted.
        """
        if self.as_json:
            extra = {"dry_run": True} if self.dry_run else {"output": self.output}
            result({**extra, **done.to_dict()})
        return self.as_json or (self.quiet and not self.dry_run)

    def ending(self, written: int) -> str:
        """How large the result is and where it lies."""
        if self.dry_run:
            return "nothing was written"
        return f"{size(written)} -> {printable(self.output)}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; numbers are right-aligned. Only a terminal has lines too short for it."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    click.secho(title, bold=True)
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        numbers = bool(rows) and all(str(r[i])[:1].isdigit() or str(r[i])[:1] in "-–" for r in rows)
        drawn.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(printable(str(c))) for c in row))
    plain = bool(os.environ.get("NO_COLOR"))
    wide = None if sys.stdout.isatty() else WIDE  # whatever FORCE_COLOR says
    console = Console(highlight=False, color_system=None if plain else "auto", width=wide)
    with console.capture() as text:
        console.print(drawn)
    click.echo("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A function to be called with bytes as they are done: a bar on a terminal, a line now and then
    elsewhere.
    """
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar(total) as advance:
            yield advance
    else:
        yield _lines(total, lambda done, rate: f"{rate / 1e6:.0f} MB/s")


@contextmanager
def steps(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """The same for weights: called with a number of them as they are done."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        with _drawn(total, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as advance:
            yield advance
    else:
        yield _lines(total, lambda done, rate: f"{done} of {total} weights")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    shown = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _drawn(total, *shown) as advance:
        yield advance


@contextmanager
def _drawn(total: int, *columns: Any) -> Iterator[Callable[[int], None]]:
    """A bar that is drawn anew as it advances, not by a thread: a run with one may not fork."""
    from rich.console import Console
    from rich.progress import Progress

    console, due = Console(stderr=True), 0.0
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def advance(n: int) -> None:
            nonlocal due
            bar.advance(task, n)
            if (now := time.monotonic()) >= due:
                due = now + REDRAWN
                bar.refresh()

        yield advance


def _lines(total: int, told: Callable[[int, float], str]) -> Callable[[int], None]:
    """A line now and then; `told` says how far it is, from what is done and how much a second."""
    done, start = 0, time.monotonic()
    due = start + EVERY

    def advance(n: int) -> None:
        """Count, and print a line when one is due."""
        nonlocal done, due
        done += n
        if (now := time.monotonic()) >= due:
            due = now + EVERY
            rate = max(done, 1) / (now - start)
            left = (total - done) / rate
            share = 100 * done / max(total, 1)
            click.echo(f"{share:.0f} %, {told(done, rate)}, {left:.0f} s left", err=True)

    return advance
