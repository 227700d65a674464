"""What bounds a merge here: the disk, the way to the GPU and back, or the arithmetic?

Run: python -m tests.bench.rates [--folder DISK] [--devices cpu cuda]. Rates of the disk are those
of several threads on a file of the size of the base, written and made durable, then read from the
disk where its cache can be dropped; those of the bus are of page-locked memory. The merge is
all-linear, durable and, with --fast, not. A GPU pays where the merge on the CPU is slower than both
the disk and the bus.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

from tests.bench.child import (
    alternate,
    machine,
    merge,
    middle,
    parser,
    run,
    say,
    scratch,
    synthetic,
    table,
)

PIECE = 32 << 20  # bytes that one thread moves at once
BUS = """
import sys, time
import torch

nbytes, rounds = 256 << 20, 8
there = torch.empty(nbytes, dtype=torch.uint8, device=sys.argv[1])
here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
name = torch.cuda.get_device_name(sys.argv[1])
rates = []
for target, source in ((there, here), (here, there)):
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    rates.append(rounds * nbytes / (time.perf_counter() - start) / 1e9)
print(name, *rates, sep="\\n")
"""


def disk(path: Path, nbytes: int, threads: int) -> dict[str, float]:
    """GB/s of a file that is written and synced, and then read, from the disk if it can be."""
    block = memoryview(os.urandom(1 << 20) * (PIECE >> 20))
    starts = range(0, nbytes, PIECE)
    os.sync()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.posix_fallocate(fd, 0, nbytes)

        def written(at: int) -> None:
            os.pwrite(fd, block[: min(PIECE, nbytes - at)], at)

        def read(at: int) -> None:
            os.preadv(fd, [bytearray(min(PIECE, nbytes - at))], at)

        rates = {"disk, written": timed(written, starts, threads, nbytes)}
        start = perf_counter()
        os.fsync(fd)
        seconds = nbytes / 1e9 / rates["disk, written"] + perf_counter() - start
        rates["disk, written and synced"] = nbytes / 1e9 / seconds
        rates["disk, read from its cache"] = timed(read, starts, threads, nbytes)
        os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_DONTNEED)
        rates["disk, read"] = timed(read, starts, threads, nbytes)
    finally:
        os.close(fd)
        path.unlink()
    return rates


def timed(work: Callable[[int], None], starts: range, threads: int, nbytes: int) -> float:
    """GB/s of doing this for all pieces, by several threads."""
    start = perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, starts))
    return nbytes / 1e9 / (perf_counter() - start)


def bus(device: str, folder: Path) -> dict[str, float]:
    """GB/s to the first GPU of a name and back; the GPU is told."""
    out = folder / "bus"
    run([sys.executable, "-c", BUS, device], output=out)
    name, to, back = out.read_text().splitlines()
    say(f"{device}: {name}")
    return {f"host to {device}": float(to), f"{device} to host": float(back)}


def merges(folder: Path, args: argparse.Namespace) -> list[list[object]]:
    """A line for the merge on each device."""
    base, adapter, out = folder / "base", folder / "all", folder / "out"
    how = ["--no-fsync"] if args.fast else []
    commands = {f"merge, {d}": merge(base, adapter, out, "--device", d, *how) for d in args.devices}
    size = sum(f.stat().st_size for f in base.iterdir()) / 1e9
    taken = alternate(commands, out, args.runs)
    return [
        [name, middle([size / r.seconds for r in runs]), f"{max(r.peak for r in runs):.0f}"]
        for name, runs in taken.items()
    ]


def main() -> None:
    """Measure and print the table."""
    asked = parser(__doc__, gigabytes=4)
    asked.add_argument("--devices", nargs="+", default=["cpu"], help="cpu, cuda, cuda:1 …")
    asked.add_argument("--hidden", type=int, default=4096)
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument("--fast", action="store_true", help="do not sync")
    args = asked.parse_args()
    threads = min(16, os.cpu_count() or 1)
    rows: list[list[object]] = []
    with scratch(args.folder) as folder:
        say(machine())
        for device in (d for d in args.devices if d != "cpu"):
            rows += [[what, f"{rate:.2f}", ""] for what, rate in bus(device, folder).items()]
        found = disk(folder / "file", int(args.gb * 1e9), threads)
        rows += [[what, f"{rate:.2f}", ""] for what, rate in found.items()]
        shape = ["--dtype", args.dtype, "--shards", args.shards, "--hidden", args.hidden]
        synthetic(folder, args.gb, *shape, "--rank", args.rank)
        rows += merges(folder, args)
    say(f"{args.gb:g} GB {args.dtype}, rank {args.rank}, {threads} threads for the disk")
    table(["what", "GB/s", "peak MB of the host"], rows)


if __name__ == "__main__":
    main()
