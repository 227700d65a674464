"""Does a merge that is killed at any moment, and run again, end as if nothing had happened?

Run: python -m tests.faults.kill [--times 100]. Kills `lorakit merge` (SIGKILL, and in one way of
running it SIGINT) at moments spread over its whole run, in several ways of running it; every third
is killed again on the way. After each kill the output is absent, partial or complete; after the run
that follows, every file of it has the bytes of an undisturbed run, nothing lies beside it, and the
base is untouched.
"""

import argparse
import collections
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import synthetic
from tests.faults.scene import Scene, check, make

MIB = 1 << 20


def scenes(folder: Path, gigabytes: float) -> dict[str, Scene]:
    """The ways of running it. In `one`, the base is a single file of more than a checkpoint."""
    shards = make(folder / "shards", synthetic.Model(gigabytes, hidden=1024), shards=4, rank=16)
    one = make(folder / "one", synthetic.Model(3 * gigabytes, hidden=1024), shards=1, rank=16)
    return {
        "durable": Scene(shards),
        "--no-fsync": Scene(shards, ("--no-fsync",)),
        "--overwrite": Scene(shards, ("--no-fsync",), overwrite=True),
        "one file": Scene(shards, ("--no-fsync",), alone=True),
        "one file, --overwrite": Scene(shards, alone=True, overwrite=True),
        "many checkpoints": Scene(shards, ("--no-fsync",), checkpoint=4 * MIB),
        "many durable checkpoints": Scene(shards, checkpoint=16 * MIB),
        "4 workers, --checksum": Scene(shards, ("--no-fsync", "--checksum", "--jobs", "4")),
        "new dtype": Scene(shards, ("--no-fsync", "--dtype", "float16"), checkpoint=8 * MIB),
        "base in one file": Scene(one, ("--no-fsync",)),
        "Ctrl-C": Scene(shards),
    }


def seconds(scene: Scene, *options: str) -> float:
    """How long a run takes that nothing disturbs."""
    check(bool(scene.inputs and scene.expected), "nothing is there")
    scene.clear()
    start = time.perf_counter()
    scene.must_succeed([*scene.command(), *options])
    return time.perf_counter() - start


def kill_after(scene: Scene, delay: float, sent: int = signal.SIGKILL) -> bool:
    """Start the command and send it a signal after so many seconds; whether it ended by that."""
    ended_by_it = [130, -sent] if sent == signal.SIGINT else [-sent]  # 130 once Python is up
    with scene.started() as child:
        try:
            child.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            child.send_signal(sent)
            _, said = child.communicate(timeout=60)
            check(child.returncode != 130 or "Traceback" not in said, said)
            if sent == signal.SIGINT and "init_import_site" in said:
                ended_by_it.append(1)  # of Python, while it starts
    # 0: it was faster; 7: the kill before this one came so late that the output exists.
    check(child.returncode in (0, 7, *ended_by_it), f"exit code {child.returncode}")
    return child.returncode in ended_by_it


def disturb(scene: Scene, delays: list[float], counts: collections.Counter[str], sent: int) -> None:
    """Kill the command after each of these times, then run it to the end."""
    scene.clear()
    for delay in delays:
        killed = kill_after(scene, delay, sent)
        counts["kills"] += killed
        counts[f"then {scene.check_disturbed()}"] += killed
    counts[f"then exit code {scene.go_on()}"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    whole: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="lorakit-kill-") as tmp:
        found = scenes(Path(tmp), args.gigabytes)
        each = -(-args.times // len(found))
        for name, scene in found.items():
            first, last = 0.7 * seconds(scene, "--dry-run"), 1.05 * seconds(scene)
            counts: collections.Counter[str] = collections.Counter()
            for i in range(each):
                delay = first + (i + random.random()) / each * (last - first)
                again = [random.uniform(first, last)] if i % 3 == 2 else []
                sent = signal.SIGINT if name == "Ctrl-C" else signal.SIGKILL
                disturb(scene, [delay, *again], counts, sent)
            shown = ", ".join(f"{k} {v}" for k, v in sorted(counts.items()))
            sys.stdout.write(f"{name}: kills from {first:.2f} to {last:.2f} s; {shown}\n")
            sys.stdout.flush()
            whole += counts
    sys.stdout.write(f"{whole['kills']} kills, every result identical to an undisturbed run\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
