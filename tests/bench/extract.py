"""How long does it take to get a LoRA out of a full fine-tune, and in how much memory?

Whole commands on a synthetic base and a merge into it with all-linear rank 16 (whose rounding is a
difference of full rank), durable writes left out. Run: python -m tests.bench.extract [--gb GB]
"""

import os

from tests.bench.child import (
    lorakit,
    machine,
    merge,
    middle,
    parser,
    remove,
    run,
    say,
    scratch,
    synthetic,
    table,
)

RANKS = (16, 64, 256)


def main() -> None:
    """Print a table of every rank."""
    made = parser(__doc__, gigabytes=2.0)
    made.add_argument("--runs", type=int, default=3)
    args = made.parse_args()
    with scratch(args.folder) as folder:
        synthetic(folder, args.gb, "--dtype", args.dtype, "--shards", args.shards)
        base, tuned, out = folder / "base", folder / "tuned", folder / "out"
        run(merge(base, folder / "all", tuned, "--no-fsync"))
        rows = []
        for rank in RANKS:
            taken = []
            for _ in range(args.runs):
                remove(out)
                os.sync()
                given = ("--rank", str(rank), "-o", out, "--no-fsync", "--quiet")
                taken.append(run(lorakit("extract", base, tuned, *given)))
            cpu, peak = (max(getattr(r, what) for r in taken) for what in ("cpu", "peak"))
            seconds = middle([r.seconds for r in taken])
            rows.append((f"extract, rank {rank}", seconds, f"{cpu:.1f}", f"{peak:.0f}"))
    say(machine())
    table(("command", "wall s", "user + sys s", "peak MB"), rows)


if __name__ == "__main__":
    main()
