"""How long do the commands take that read no weights, and what do they import?

The base has the tensor names of an 80-layer model (723) in 100 shards with an index; its tensors
are tiny, as only headers are read. Medians, after one run that fills the caches.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.bench.child import (
    Command,
    lorakit,
    machine,
    middle,
    parser,
    run,
    say,
    scratch,
    synthetic,
    table,
)

HEAVY = ("torch", "transformers", "scipy", "numpy", "ml_dtypes", "huggingface_hub", "rich")


def commands(folder: Path, shards: int) -> dict[str, Command]:
    """What is timed."""
    base, adapter = folder / "base", folder / "all"
    index = base / "model.safetensors.index.json"
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "lorakit --help": lorakit("--help"),
        "lorakit merge --help": lorakit("merge", "--help"),
        f"lorakit inspect, {shards} shards": lorakit("inspect", base),
        "lorakit inspect, the index": lorakit("inspect", index),
        "lorakit inspect, the adapter": lorakit("inspect", adapter),
        f"lorakit merge --dry-run, {shards} shards": lorakit(
            "merge", base, adapter, "-o", folder / "out", "--dry-run"
        ),
    }


def imported(command: Command) -> set[str]:
    """Every module that a Python command imports, by `-X importtime`."""
    python, *rest = map(str, command)
    ran = subprocess.run(
        [python, "-X", "importtime", *rest], check=True, capture_output=True, text=True
    )
    lines = [x for x in ran.stderr.splitlines() if x.startswith("import time:")]
    return {x.rpartition("|")[2].strip() for x in lines}


def row(name: str, command: Command, runs: int) -> Sequence[object]:
    """The line of one command."""
    taken = [run(command) for _ in range(runs + 1)][1:]
    modules = imported(command)
    heavy = ", ".join(h for h in HEAVY if h in modules) or "none"
    peak = median(t.peak for t in taken)
    seconds = middle([t.seconds for t in taken])
    return [name, seconds, f"{peak:.0f}", len(modules), heavy]


def main() -> None:
    """Time the commands and print the table."""
    asked = parser(__doc__)
    asked.add_argument("--shards", type=int, default=100)
    asked.add_argument("--layers", type=int, default=80)
    asked.add_argument("--runs", type=int, default=10)
    args = asked.parse_args()
    with scratch(args.folder) as folder:
        tiny = ["--hidden", 64, "--vocabulary", 512]
        synthetic(folder, 0, *tiny, "--layers", args.layers, "--shards", args.shards)
        found = [row(n, c, args.runs) for n, c in commands(folder, args.shards).items()]
    say(machine())
    columns = ["command", f"wall s, median of {args.runs} (least–most)", "peak MB", "modules"]
    table([*columns, "heavy ones"], found)


if __name__ == "__main__":
    main()
