"""A command that is disturbed, a merge if nothing is said, and what must hold after every
disturbance.

Run by the commands of this folder, and in short by tests/engine/test_faults.py.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.bench import synthetic
from tests.faults.forks import Forks

ROOT = Path(__file__).parent.parent.parent
# Four shards of 100 kB, for runs in which every single operation is disturbed.
SMALL = synthetic.Model(0, hidden=64, vocabulary=512, layers=2)
INPUTS = ("base", "all", "qv", "merged", "pipe", "image")


class BrokenPromiseError(AssertionError):
    """A promise was not kept."""


@dataclass(frozen=True)
class Scene:
    """One command, in a folder of its own.

    options: of the command; verb: the command itself, with its inputs, where it is no merge; name:
    of its output; alone: the output is a single file; overwrite: there is an older
    output, which is replaced; unfinished: there is an unfinished run of another adapter, which is
    discarded; checkpoint: bytes between two lines of the journal, None for the usual number; forks:
    what runs the command without starting Python anew.
    """

    folder: Path
    options: tuple[str, ...] = ()
    alone: bool = False
    overwrite: bool = False
    unfinished: bool = False
    checkpoint: int | None = None
    forks: Forks | None = None
    verb: tuple[str, ...] = ()
    name: str = "out"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def place(self) -> Path:
        """The folder in which the output lies, alone but for its own companions."""
        return self.folder / "place"

    @property
    def out(self) -> Path:
        return self.place / ("out.safetensors" if self.alone else self.name)

    def command(self, out: Path | None = None, adapter: str = "all") -> list[str]:
        start = ["-m", "lorakit"]
        if self.checkpoint:
            start = ["-m", "tests.faults.often", str(self.checkpoint)]
        given = [*(self.verb or ("merge", self.base, self.folder / adapter))]
        given += ["-q", "-o", out or self.out, *self.options]
        if self.overwrite or self.unfinished:
            given.append("--overwrite")
        return [sys.executable, *start, *map(str, given)]

    @contextlib.contextmanager
    def started(
        self, command: Sequence[str] | None = None, **env: str
    ) -> Iterator["subprocess.Popen[str]"]:
        """The command as a child, which is killed if it is still running in the end."""
        child = subprocess.Popen(
            command or self.command(),
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_interrupts,
        )
        try:
            yield child
        finally:
            child.kill()
            child.communicate()

    def run(self, command: Sequence[str] | None = None, **env: str) -> tuple[int, str]:
        """The exit code of the command and what it said on stderr."""
        if self.forks:
            return self.forks.run((command or self.command())[2:], env)
        with self.started(command, **env) as child:
            _, said = child.communicate(timeout=120)
            return child.returncode, said

    def clear(self) -> None:
        """Put the place back to where it was before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(exist_ok=True)
        if self.unfinished:
            shutil.copytree(self.folder / "unfinished", self.place / "out.partial")
        if self.overwrite:
            older = self.older
            copy = shutil.copytree if older.is_dir() else shutil.copy2
            copy(older, self.out)
            if self.alone:
                shutil.copy2(older.with_name("older.lorakit.json"), self.place / "out.lorakit.json")

    @cached_property
    def older(self) -> Path:
        """An output of another adapter."""
        older = self.folder / ("older.safetensors" if self.alone else "older")
        if not older.exists():
            self.must_succeed(self.command(older, adapter="qv"))
        return older

    @cached_property
    def expected(self) -> dict[str, str]:
        """Every file that lies in the place after a run that nothing disturbs."""
        self.clear()
        self.must_succeed()
        return hashes(self.place)

    @cached_property
    def before(self) -> dict[str, str]:
        """Every file of the place before the command."""
        self.clear()
        return hashes(self.place)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Every file of what a command may read, which is never written to."""
        return self._inputs()

    def must_succeed(self, command: Sequence[str] | None = None) -> None:
        code, said = self.run(command)
        check(code == 0, f"exit code {code}: {said}")

    def check_inputs(self) -> None:
        check(self._inputs() == self.inputs, "an input was changed")

    def check_disturbed(self) -> str:
        """After a disturbance, an output is absent, partial or complete; which it is."""
        self.check_inputs()
        if not self.out.exists():
            return "partial" if any(self.place.iterdir()) else "absent"
        if self.overwrite and self._is(self.before):
            return "older"
        check(self._is(self.expected), "an output is there that is neither the old nor the new")
        return "complete"

    def check_complete(self) -> None:
        """After a run to the end, every file is as if nothing had happened, and none is stray."""
        self.check_inputs()
        found = hashes(self.place)
        stray = sorted(found.keys() - self.expected.keys())
        check(not stray, f"stray files: {stray[:5]}")
        wrong = sorted(n for n, digest in self.expected.items() if found.get(n) != digest)
        check(not wrong, f"other bytes than without a disturbance: {wrong[:5]}")

    def go_on(self) -> int:
        """Run the command again after a disturbance, to the end; its exit code.

        It is 7 where the disturbance came after the last step, so that the output is complete.
        """
        state = self.check_disturbed()
        code, said = self.run()
        done = code == 7 and state == "complete" and "the output exists" in said
        check(code == 0 or done, f"the second run ended with {code}: {said}")
        self.check_complete()
        return code

    def _inputs(self) -> dict[str, str]:
        there = {name: hashes(self.folder / name) for name in INPUTS}
        return {f"{name}/{p}": found for name in there for p, found in there[name].items()}

    def _is(self, files: Mapping[str, str]) -> bool:
        """Whether the weight files that have their names are those of a finished output."""
        inside = {p: self.place / p for p in files}
        known = [p for p in files if p.endswith((".safetensors", ".gguf"))]
        return all(inside[p].exists() and digest(inside[p]) == files[p] for p in known)


def make(folder: Path, model: synthetic.Model, shards: int = 4, rank: int = 4) -> Path:
    """Write the base and the adapters of a scene."""
    tensors = synthetic.base(folder / "base", model, shards)
    for targets in ("all", "qv"):
        synthetic.adapter(folder / targets, tensors, targets, rank)
    return folder


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def check(holds: bool, words: str) -> None:
    if not holds:
        raise BrokenPromiseError(words)


def check_said(code: int, said: str, codes: Sequence[int]) -> None:
    """A command that failed says so in one line, with one of these codes and no traceback."""
    check(code in codes, f"exit code {code}: {said}")
    check(said.startswith("Error: ") and said.count("\n") == 1, f"more than one line: {said}")


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """What every file and every folder is, by its path; folders and links by what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = "folder" if path.is_dir() else digest(path)
        found[str(path.relative_to(folder))] = f"link to {kind}" if path.is_symlink() else kind
    return found
