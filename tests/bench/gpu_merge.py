"""How near does a merge on a GPU come to the slower of the two directions of its bus?

Run: python -m tests.bench.gpu_merge [--folder /dev/shm] [--device cuda:0]. Merges from and to a RAM
disk, in this process, so that neither the disk nor starting up counts: rank 16, rank 256, eight
adapters at once; bfloat16, float16 and float32 bases. The CPU stands beside it. Memory of the
device is what torch took of it at most.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from tests.bench.child import machine, parser, remove, say, scratch, synthetic, table
from tests.bench.rates import bus

RAM = Path("/dev/shm")


def cases(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, Path, list[Path]]]:
    """A name, a base and the adapters to merge into it; removed before the next is made."""
    wanted = [("BF16", 16, 1), ("BF16", 256, 1), ("BF16", 16, 8), ("F16", 16, 1), ("F32", 16, 1)]
    for dtype, rank, count in wanted:
        shape = ["--dtype", dtype, "--shards", args.shards, "--hidden", args.hidden]
        synthetic(folder / "case", args.gb, *shape, "--rank", rank)
        adapters = [folder / "case/all"] * count
        yield f"{dtype}, rank {rank} × {count}", folder / "case/base", adapters
        remove(folder / "case")


def rate(base: Path, adapters: list[Path], out: Path, run: Any) -> float:
    """GB/s of a merge, of which the plan is not counted."""
    import lorakit

    remove(out)
    job = lorakit.plan_merge(base, adapters)
    start = perf_counter()
    job.run(out, run)
    return float(job.plan.nbytes / 1e9 / (perf_counter() - start))


def measured(
    base: Path, adapters: list[Path], out: Path, args: argparse.Namespace
) -> tuple[float, float, float]:
    """GB/s on the device, of the first round none; MB of its memory; GB/s on the CPU."""
    import torch

    import lorakit

    options = {"sync": False, "jobs": args.jobs, "max_memory": args.max_memory}
    there = lorakit.RunOptions(device=args.device, **options)
    rate(base, adapters, out, there)
    torch.cuda.reset_peak_memory_stats(args.device)
    found = median(rate(base, adapters, out, there) for _ in range(args.runs))
    peak = torch.cuda.max_memory_reserved(args.device) / 1e6
    here = lorakit.RunOptions(**options)
    return found, peak, median(rate(base, adapters, out, here) for _ in range(args.runs))


def main() -> None:
    """Run the cases and print the table."""
    asked = parser(__doc__, gigabytes=8)
    asked.set_defaults(folder=RAM)
    asked.add_argument("--device", default="cuda:0")
    asked.add_argument("--hidden", type=int, default=4096)
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument("--jobs", type=int)
    asked.add_argument("--max-memory", type=int, metavar="BYTES")
    args = asked.parse_args()
    rows = []
    with scratch(args.folder) as folder:
        say(f"{machine()}, {os.cpu_count()} cores; {args.gb:g} GB on {args.folder}")
        there = bus(args.device, folder)
        say(", ".join(f"{what} {rate:.1f} GB/s" for what, rate in there.items()))
        slower = min(there.values())
        for name, base, adapters in cases(folder, args):
            gpu, peak, cpu = measured(base, adapters, folder / "out", args)
            cells = (f"{gpu:.2f}", f"{gpu / slower:.2f}", f"{peak:.0f}", f"{cpu:.2f}")
            rows.append([name, *cells])
            sys.stderr.write(f"{rows[-1]}\n")
    columns = ["base, adapters", "GB/s", "of the bus", "MB of the device", "GB/s on the CPU"]
    table(columns, rows)


if __name__ == "__main__":
    main()
