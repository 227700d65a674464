"""What do more workers give, and what other block sizes?

Alternating runs of the same merge, all-linear, --no-fsync. Block and step (elements read and
written at once, and multiplied at once) are constants of lorakit.engine.plan; `--blocks` and
`--steps` try others, as powers of two.
"""

import os
import sys
from pathlib import Path
from statistics import median

from tests.bench.child import (
    Command,
    alternate,
    machine,
    merge,
    middle,
    parser,
    say,
    scratch,
    synthetic,
    table,
)

TRY = (
    "import lorakit.engine.plan as plan; from lorakit.cli import main; "
    "plan.{constant} = 1 << {power}; main()"
)


def commands(folder: Path, jobs: list[int], sizes: dict[str, list[int]]) -> dict[str, Command]:
    """The merges that are compared."""
    base, adapter, out = folder / "base", folder / "all", folder / "out"
    found = {f"--jobs {n}": merge(base, adapter, out, "--no-fsync", "--jobs", str(n)) for n in jobs}
    plain = merge(base, adapter, out, "--no-fsync")
    for constant, powers in sizes.items():
        for power in powers:
            code = TRY.format(constant=constant, power=power)
            found[f"{constant} 2^{power}"] = [sys.executable, "-c", code, *plain[3:]]
    return found


def main() -> None:
    """Run the rounds and print the table."""
    asked = parser(__doc__, gigabytes=2.1)
    asked.add_argument("--hidden", type=int, default=2048)
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument("--jobs", type=int, nargs="*", default=[1, 2, 3, 4])
    asked.add_argument("--blocks", type=int, nargs="*", default=[], metavar="POWER")
    asked.add_argument("--steps", type=int, nargs="*", default=[], metavar="POWER")
    args = asked.parse_args()
    with scratch(args.folder) as folder:
        shape = ["--dtype", args.dtype, "--shards", args.shards, "--hidden", args.hidden]
        synthetic(folder, args.gb, *shape)
        chosen = commands(folder, args.jobs, {"BLOCK": args.blocks, "STEP": args.steps})
        taken = alternate(chosen, folder / "out", args.runs)
    first = median(r.seconds for r in next(iter(taken.values())))
    rows = []
    for name, runs in taken.items():
        seconds = [r.seconds for r in runs]
        cpu, peak = median(r.cpu for r in runs), max(r.peak for r in runs)
        speed = f"{first / median(seconds):.2f}"
        rows.append([name, middle(seconds), speed, f"{cpu:.2f}", f"{peak:.0f}"])
    say(machine())
    say(f"{args.gb} GB {args.dtype}, all-linear, rank 16, load {os.getloadavg()[0]:.1f}")
    table(["merge", "wall s", "times the first", "user + sys s", "peak MB"], rows)


if __name__ == "__main__":
    main()
