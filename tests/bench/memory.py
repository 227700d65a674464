"""How much memory does a merge take, for bases and tensors of any size?

Peak resident memory of the whole process, all-linear rank 16. The first four cases have rows of the
same width, so they must agree; the others show wider rows, and an updated embedding whose factors
are large themselves. A case's files are removed before the next is made.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.child import machine, merge, parser, remove, run, say, scratch, synthetic, table

WIDE = 8192  # hidden size of a 70B model


@dataclass(frozen=True)
class Case:
    """A base to make, and the adapters to merge into it one after the other."""

    name: str
    gigabytes: float
    options: tuple[object, ...]
    adapters: tuple[str, ...] = ("all",)
    alike: bool = True


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The bases of the table."""
    hidden = ("--hidden", args.hidden)
    many = max(2, round(args.large * 4))
    tall = round(args.tensor * 1e9 / 2 / args.hidden)
    wide = round(args.tensor * 1e9 / 2 / args.wide)
    big = f"with one {args.tensor:g} GB tensor"
    yield Case(f"{args.small:g} GB, 4 shards", args.small, (*hidden, "--shards", 4))
    yield Case(f"{args.large:g} GB, {many} shards", args.large, (*hidden, "--shards", many))
    yield Case(f"{args.large:g} GB, one file", args.large, (*hidden, "--shards", 1))
    one = ("--shards", 1, "--no-head", "--vocabulary")
    yield Case(f"{args.large:g} GB, one file {big}", args.large, (*hidden, *one, tall))
    rows = f"{args.large:g} GB, one file {big}, rows of {args.wide}"
    wider = ("--hidden", args.wide, *one, wide)
    yield Case(rows, args.large, wider, ("all", "embed"), alike=False)


def measured(case: Case, folder: Path, runs: int) -> Iterator[tuple[str, float, float]]:
    """Name, least and most MB of every merge of a case."""
    synthetic(folder, case.gigabytes, *case.options)
    for adapter in case.adapters:
        peaks = []
        for _ in range(runs):
            remove(folder / "out")
            os.sync()
            peaks.append(
                run(merge(folder / "base", folder / adapter, folder / "out", "--no-fsync")).peak
            )
        label = f"{case.name}, embedding updated too" if adapter == "embed" else case.name
        yield label, min(peaks), max(peaks)
    remove(folder)


def main() -> None:
    """Run the cases and print the table."""
    asked = parser(__doc__)
    asked.add_argument("--small", type=float, default=1, help="GB (default %(default)s)")
    asked.add_argument("--large", type=float, default=8, help="GB (default %(default)s)")
    asked.add_argument("--tensor", type=float, default=4.3, help="GB (default %(default)s)")
    asked.add_argument("--hidden", type=int, default=2048)
    asked.add_argument("--wide", type=int, default=WIDE)
    asked.add_argument("--runs", type=int, default=3)
    args = asked.parse_args()
    rows, alike = [], []
    with scratch(args.folder) as folder:
        for case in cases(args):
            for label, low, high in measured(case, folder / "case", args.runs):
                rows.append([label, f"{low:.1f}", f"{high:.1f}"])
                alike += [high] * case.alike
    say(machine())
    table(["base", f"least peak MB of {args.runs} runs", "most"], rows)
    say(f"Largest / smallest of the first {len(alike)}: {max(alike) / min(alike):.3f}")


if __name__ == "__main__":
    main()
