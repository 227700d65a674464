"""Runs commands in children and says what they took; prints Markdown tables of it.

Nothing heavy is imported here: the peak memory of a child starts at the size of the parent that
forked it (man 2 getrusage, ru_maxrss).
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

Command = Sequence[object]  # each shown as str
EVERY = 0.02  # seconds between two looks at the memory of processes


@dataclass(frozen=True)
class Ran:
    """What a command took: wall seconds, processor seconds (user and system), peak MB resident.

    Of a command with processes of its own, pages that they share count once.
    """

    seconds: float
    cpu: float
    peak: float


def run(command: Command, *, output: Path | None = None) -> Ran:
    """What a command took, its children included; stdout goes to a file or nowhere.

    Bytecode may be cached, as in any user's environment.
    """
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with (output or Path(os.devnull)).open("wb") as stdout:
        start = time.perf_counter()
        child = subprocess.Popen([str(c) for c in command], stdout=stdout, env=env)
        with _watched(child.pid) as family:
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"exit {child.returncode}: {' '.join(map(str, command))}")
    peak = max(usage.ru_maxrss, *family) * 1024 / 1e6  # the first is of the largest one alone
    return Ran(seconds, usage.ru_utime + usage.ru_stime, peak)


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """What a process and its children take together, in KiB, every EVERY seconds."""
    found, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY):
            with suppress(OSError):  # one of them has just ended
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                if children:
                    found.append(sum(_proportional(p) for p in (pid, *children)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def _proportional(pid: object) -> int:
    """KiB of a process, pages that it shares with others in equal parts (Pss of proc(5))."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next((int(r.split()[1]) for r in rows if r.startswith("Pss:")), 0)


def lorakit(*args: str | Path) -> Command:
    """The command line under test."""
    return [sys.executable, "-m", "lorakit", *args]


def merge(base: Path, adapter: Path, out: Path, *options: str) -> Command:
    """A merge that prints nothing."""
    return lorakit("merge", base, adapter, "-o", out, "--quiet", *options)


def synthetic(folder: Path, gigabytes: float, *options: object) -> Path:
    """A new base and its adapters in a folder (tests.bench.synthetic); the folder."""
    asked = [folder, str(gigabytes), *map(str, options)]
    run([sys.executable, "-m", "tests.bench.synthetic", *asked])
    return folder


def alternate(commands: Mapping[str, Command], out: Path, rounds: int) -> dict[str, list[Ran]]:
    """Every command once a round, so that what changes on the machine meets all of them alike.

    A first round is discarded: it fills the caches. Before each run the last output is removed and
    the disk at rest, so that no run pays for the pages of another.
    """
    taken: dict[str, list[Ran]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            remove(out)
            os.sync()
            ran = run(command)
            if number:
                taken[name].append(ran)
    remove(out)
    return taken


def remove(path: Path) -> None:
    """Remove a folder or a file, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def ratio(runs: Sequence[Ran], others: Sequence[Ran], *, less: float = 0.0) -> float:
    """The median over the rounds of how many times longer than the other's a run is.

    `less` seconds of start-up are taken off it first.
    """
    return median((a.seconds - less) / b.seconds for a, b in zip(runs, others, strict=True))


def middle(values: Sequence[float], digits: int = 2) -> str:
    """The median, with the smallest and the largest."""
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table; all columns but the first are right-aligned."""
    say()
    say("| " + " | ".join(columns) + " |")
    say("| --- |" + " ---: |" * (len(columns) - 1))
    for row in rows:
        say("| " + " | ".join(map(str, row)) + " |")
    say()


def say(line: str = "") -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def machine() -> str:
    """Where this runs, in words."""
    with open("/proc/cpuinfo") as f:
        model = next((row.partition(": ")[2].strip() for row in f if "model name" in row), "")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} × {model}, Linux {platform.release()}, Python {platform.python_version()}"


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-", dir=parent) as folder:
        yield Path(folder)


def parser(purpose: str | None, *, gigabytes: float | None = None) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks share."""
    made = argparse.ArgumentParser(
        description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if gigabytes is not None:
        made.add_argument("--gb", type=float, default=gigabytes, help="base (default %(default)s)")
        made.add_argument("--dtype", default="BF16", choices=["BF16", "F16", "F32"])
        made.add_argument("--shards", type=int, default=4)
    made.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="disk to work on"
    )
    return made
