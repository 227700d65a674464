"""How long do the verbs on adapters take, and in how much memory, on a whole model's set?

Whole commands, start-up and files included, on adapters of every linear layer of a 7B-shaped model
(224 modules), durable writes left out. Run: python -m tests.bench.adapters [--rank R]
"""

import os
from collections.abc import Iterator
from pathlib import Path

from tests.bench.child import (
    Command,
    lorakit,
    machine,
    middle,
    parser,
    remove,
    run,
    say,
    scratch,
    table,
)
from tests.bench.synthetic import Model, adapter

MODEL = Model(gigabytes=0, hidden=4096, layers=32)
COUNT = 4


def commands(folder: Path, out: Path, rank: int) -> Iterator[tuple[str, Command]]:
    """Every verb on adapters, with what it is given."""
    several = [folder / str(i) for i in range(COUNT)]
    end = ("-o", out, "--no-fsync", "--quiet")
    for method in ("linear", "cat", "svd"):
        yield (
            f"combine {method}, {COUNT} adapters",
            lorakit("combine", *several, "--method", method, *end),
        )
    for method in ("knots", "tsv", "slerp"):
        given = ("--density", "0.5") if method == "knots" else ()
        yield (
            f"combine {method}, {COUNT} adapters",
            lorakit("combine", *several, "--method", method, *given, *end),
        )
    yield f"resize to {rank // 4}", lorakit("resize", several[0], "--rank", str(rank // 4), *end)
    yield "resize by energy", lorakit("resize", several[0], "--energy", "0.9", *end)


def main() -> None:
    """Print a table of every verb."""
    made = parser(__doc__)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--runs", type=int, default=3)
    args = made.parse_args()
    with scratch(args.folder) as folder:
        for number in range(COUNT):
            adapter(folder / str(number), MODEL.shapes, "all", args.rank)
        out, rows = folder / "out", []
        for name, command in commands(folder, out, args.rank):
            taken = []
            for _ in range(args.runs):
                remove(out)
                os.sync()
                taken.append(run(command))
            seconds = middle([r.seconds for r in taken])
            cpu, peak = (max(getattr(r, what) for r in taken) for what in ("cpu", "peak"))
            rows.append((name, seconds, f"{cpu:.1f}", f"{peak:.0f}"))
    say(machine())
    table(("command", "wall s", "user + sys s", "peak MB"), rows)


if __name__ == "__main__":
    main()
