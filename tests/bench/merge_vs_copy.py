"""How much longer than `cp -r` does a merge take?

Warm page cache, alternating runs; the copy and the merge of one round are compared with each other.
The durable pairs include the time until the data is on the disk (`sync FILE...` after the copy).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from tests.bench.child import (
    Command,
    Ran,
    alternate,
    machine,
    merge,
    middle,
    parser,
    ratio,
    say,
    scratch,
    synthetic,
    table,
)

START = 0.5  # seconds of start-up that the goals allow a merge beside the copying
COPY, DURABLE_COPY = "cp -r", "cp -r, sync"
SYNCED = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
PARTS = {"all": "all-linear", "qv": "q and v only"}


def commands(
    folder: Path, out: Path, options: Sequence[str], *, durable: bool
) -> dict[str, Command]:
    """The copy and the merges that are compared with it."""
    base = folder / "base"
    copy: Command = ["sh", "-c", SYNCED, "sh", base, out] if durable else ["cp", "-r", base, out]
    found: dict[str, Command] = {DURABLE_COPY if durable else COPY: copy}
    for part, name in PARTS.items():
        how = [] if durable else ["--no-fsync"]
        label = " ".join(["merge", *how]) + f", {name}"
        found[label] = merge(base, folder / part, out, *how, *options)
    return found


def rows(taken: Mapping[str, Sequence[Ran]], copy: str) -> list[list[object]]:
    """The lines of the table for one copy and its merges."""
    found: list[list[object]] = []
    for name, runs in taken.items():
        times: list[object] = ["", ""]
        if name != copy:
            times = [
                f"{ratio(runs, taken[copy]):.2f}",
                f"{ratio(runs, taken[copy], less=START):.2f}",
            ]
        cpu, peak = median(r.cpu for r in runs), max(r.peak for r in runs)
        found.append([name, middle([r.seconds for r in runs]), *times, f"{cpu:.2f}", f"{peak:.0f}"])
    return found


def main() -> None:
    """Run the rounds and print the table."""
    asked = parser(__doc__, gigabytes=2.1)
    asked.add_argument("--hidden", type=int, default=2048)
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--runs", type=int, default=5)
    asked.add_argument("--jobs", type=int, help="passed on to merge")
    asked.add_argument("--only", choices=["fast", "durable"], help="one half of the table")
    args = asked.parse_args()
    options = ["--jobs", str(args.jobs)] if args.jobs else []
    found: list[list[object]] = []
    with scratch(args.folder) as folder:
        shape = ["--dtype", args.dtype, "--shards", args.shards, "--hidden", args.hidden]
        synthetic(folder, args.gb, *shape, "--rank", args.rank)
        size = sum(f.stat().st_size for f in (folder / "base").iterdir()) / 1e9
        for half in ("fast", "durable"):
            if args.only in (None, half):
                chosen = commands(folder, folder / "out", options, durable=half == "durable")
                taken = alternate(chosen, folder / "out", args.runs)
                found += rows(taken, next(iter(chosen)))
    say(machine())
    say(
        f"{size:.2f} GB {args.dtype}, {args.shards} shards, rank {args.rank}, "
        f"warm cache, median of {args.runs} (least–most)"
    )
    columns = ["run", "wall s", "× copy", f"(wall − {START} s) / copy", "user + sys s", "peak MB"]
    table(columns, found)


if __name__ == "__main__":
    main()
