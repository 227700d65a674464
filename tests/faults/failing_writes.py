"""What becomes of a command when any single write, sync or rename is its last, or fails?

Run: python -m tests.faults.failing_writes [--every N]. A library between the command, a merge or
any other that writes, and the system (shim.c; needs cc) counts every operation that changes a file
of the output. Each of them in turn

- is the moment of a kill, before it or, for writes, half-way through it;
- fails once with ENOSPC, EIO or EDQUOT;
- fails with ENOSPC as do all that follow, as on a disk that is full.

After a kill or a failure the base is untouched and the output absent, partial or complete; a
failure is one line on stderr and exit code 5 (no space) or 7; the run that follows ends with the
bytes of an undisturbed run and leaves nothing else.
"""

import argparse
import collections
import errno
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.faults.forks import Forks
from tests.faults.pipeline import make_pipeline
from tests.faults.scene import INPUTS, SMALL, Scene, check, check_said, make

FOREVER = str(1 << 40)
# How an operation is disturbed: what the environment says besides its number.
WAYS: dict[str, dict[str, str]] = {
    "killed before": {},
    "killed half-way": {"FAULT_TORN": "1"},
    "ENOSPC": {"FAULT_ERRNO": str(errno.ENOSPC)},
    "EIO": {"FAULT_ERRNO": str(errno.EIO)},
    "EDQUOT": {"FAULT_ERRNO": str(errno.EDQUOT)},
    "ENOSPC half-way": {"FAULT_ERRNO": str(errno.ENOSPC), "FAULT_TORN": "1"},
    "ENOSPC from there on": {"FAULT_ERRNO": str(errno.ENOSPC), "FAULT_LAST": FOREVER},
    "EIO from there on": {"FAULT_ERRNO": str(errno.EIO), "FAULT_LAST": FOREVER},
}
# Every other command that writes, but for conversions to runtime names: each loads transformers.
OTHERS = {
    "merge into a pipeline": "merge pipe image",
    "unmerge": "unmerge merged all",
    "combine": "combine all qv --weight 0.7 --weight -0.3",
    "resize": "resize all --rank 2",
    "edit": "edit all --keep q_proj --alpha 3",
    "extract": "extract base merged --rank 4",
    "convert": "convert all --to mlx --base base",
    "convert to GGUF": "convert all --to gguf --base base",
    "init": "init base --rank 4",
    "init with PiSSA": "init base --rank 4 --method pissa",
    "loftq": "loftq base --rank 4",
}


@dataclass(frozen=True)
class Operation:
    """One line of the library's log."""

    name: str
    path: str
    to: str


def compiled(folder: Path) -> Path | None:
    """The library, compiled into a folder; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    target = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-shared", "-fPIC", "-O2", str(source), "-o", str(target), "-ldl"]
    subprocess.run(command, check=True)
    return target


def scenes(folder: Path, forks: Forks) -> dict[str, Scene]:
    """The ways of running it, with many lines in the journal."""
    make(folder, SMALL)
    often = 1 << 16
    leave_unfinished(Scene(folder, ("--jobs", "1"), checkpoint=often, forks=forks))
    quick = ("--no-fsync",)
    return {
        "durable": Scene(folder, checkpoint=often, forks=forks),
        "in a new folder": Scene(folder, name="new/out", forks=forks),
        "one file": Scene(folder, quick, alone=True, checkpoint=often, forks=forks),
        "--overwrite": Scene(folder, quick, overwrite=True, forks=forks),
        "one file, --overwrite": Scene(folder, alone=True, overwrite=True, forks=forks),
        "after another run": Scene(folder, quick, unfinished=True, checkpoint=often, forks=forks),
    }


def others(folder: Path, forks: Forks) -> dict[str, Scene]:
    """Every other command that writes, on the inputs that `scenes` has made."""
    make_pipeline(folder)
    merge = Scene(folder, ("--no-fsync",), forks=forks)
    merge.place.mkdir(exist_ok=True)
    merge.must_succeed(merge.command(folder / "merged"))
    return {name: _other(folder, forks, words.split()) for name, words in OTHERS.items()}


def _other(folder: Path, forks: Forks, words: list[str]) -> Scene:
    verb = tuple(str(folder / w) if w in INPUTS else w for w in words)
    return Scene(folder, forks=forks, verb=verb, name="out.gguf" if "gguf" in verb else "out")


def leave_unfinished(scene: Scene) -> None:
    """Keep what a run of another adapter leaves when it is killed in its second half."""
    scene.clear()
    command = scene.command(adapter="qv")
    code, _ = scene.run(command, FAULT_DIR=str(scene.place), FAULT_AT="40")
    check(code == -9, f"exit code {code}")
    shutil.copytree(scene.place / "out.partial", scene.folder / "unfinished")


def operations(scene: Scene) -> list[Operation]:
    """What an undisturbed run does to files, in order."""
    log = scene.folder / "operations.log"
    log.unlink(missing_ok=True)
    check(bool(scene.expected and scene.inputs), "nothing is there")
    scene.clear()
    code, said = scene.run(FAULT_DIR=str(scene.place), FAULT_LOG=str(log))
    check(code == 0, said)
    return [Operation(*line.split("\t")) for line in log.read_text().splitlines()]


def disturb(scene: Scene, number: int, way: Mapping[str, str]) -> str:
    """Disturb an operation, run again to the end; the state in between."""
    scene.clear()
    code, said = scene.run(FAULT_DIR=str(scene.place), FAULT_AT=str(number), **way)
    if code == 0:  # done in another way, or of no consequence
        scene.check_complete()
        return "done"
    if "FAULT_ERRNO" in way:
        full = int(way["FAULT_ERRNO"]) in (errno.ENOSPC, errno.EDQUOT)
        check_said(code, said, [5 if full else 7])
    else:
        check(code == -9, f"exit code {code}: {said}")
    state = scene.check_disturbed()
    scene.go_on()
    return state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--every", type=int, default=1, help="disturb only every Nth operation")
    args = parser.parse_args()
    disturbed = 0
    with tempfile.TemporaryDirectory(prefix="lorakit-fail-") as tmp:
        library = compiled(Path(tmp))
        if library is None:
            sys.stdout.write("no C compiler: nothing was tested\n")
            return 0
        with Forks(LD_PRELOAD=str(library)) as forks:
            for name, scene in {**scenes(Path(tmp), forks), **others(Path(tmp), forks)}.items():
                count = len(operations(scene))
                for way, env in WAYS.items():
                    states: collections.Counter[str] = collections.Counter()
                    for number in range(1, count + 1, args.every):
                        states[disturb(scene, number, env)] += 1
                    shown = ", ".join(f"{s} {n}" for s, n in sorted(states.items()))
                    sys.stdout.write(f"{name}: {states.total()} of {count} {way}: {shown}\n")
                    sys.stdout.flush()
                    disturbed += states.total()
    sys.stdout.write(f"{disturbed} disturbances, every result identical to an undisturbed run\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
