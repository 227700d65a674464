"""How long does LoftQ take, beside PEFT's own way and for a whole model, and in how much memory?

One weight of 4096 x 4096, nf4, rank 16, five iterations, one thread: lorakit beside the algorithm
of PEFT (its loop, with bitsandbytes' quantiser and `torch.linalg.svd`), processor seconds. Then the
whole command on layers of a 7B model. Run: python -m tests.bench.loftq [--layers N] [--no-peft]
"""

import json
import subprocess
import sys
import time

from tests.bench.child import lorakit, machine, parser, run, say, scratch, synthetic, table

ITERATIONS, RANK, SIDE = 5, 16, 4096


def ours(weight: object) -> tuple[float, float]:
    """Processor seconds, and the norm of what is left."""
    from lorakit.math.loftq import Setting, split
    from lorakit.quant.table import codec

    start = time.process_time()
    found = split(weight, codec("nf4"), Setting(RANK, iterations=ITERATIONS, dtype="float32"))
    return time.process_time() - start, found.norm


def theirs(weight: object) -> tuple[float, float]:
    """The same of PEFT's algorithm: quantise what the update leaves, decompose what that leaves."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    start, w = time.process_time(), torch.from_numpy(weight)
    rest = w.clone()
    for _ in range(ITERATIONS):
        values = dequantize_4bit(*quantize_4bit(rest, quant_type="nf4"))
        u, s, v = torch.linalg.svd(w - values, full_matrices=False)
        root = s[:RANK].sqrt()
        low = (u[:, :RANK] * root) @ (root[:, None] * v[:RANK])
        rest = w - low
    taken = time.process_time() - start
    return taken, float(torch.linalg.vector_norm(w - values - low, dtype=torch.float64))


def quantisers(weight: object) -> tuple[float, float]:
    """Processor seconds of quantising once: lorakit, bitsandbytes."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    from lorakit.quant.table import codec

    grid, w = codec("nf4"), torch.from_numpy(weight)
    found = []
    for quantise in (lambda: grid.quantise(weight), lambda: quantize_4bit(w, quant_type="nf4")):
        times = []
        for _ in range(3):
            start = time.process_time()
            quantise()
            times.append(time.process_time() - start)
        found.append(min(times))
    return found[0], found[1]


def one_weight(*, peft: bool) -> None:
    """Print the table of one weight; run in a process of its own, with one thread."""
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    draws = np.random.default_rng(0)
    weight = draws.standard_normal((SIDE, SIDE), dtype=np.float32) * np.float32(0.02)
    with threadpool_limits(1):
        ways = {"lorakit": ours(weight), **({"PEFT's algorithm": theirs(weight)} if peft else {})}
        quick, slow = quantisers(weight)
    rows = [(name, f"{cpu:.2f}", f"{norm:.5f}") for name, (cpu, norm) in ways.items()]
    table(("5 iterations, rank 16", "cpu s", "norm left"), rows)
    say(f"quantising to nf4 once: {quick:.3f} s, bitsandbytes {slow:.3f} s ({slow / quick:.1f} x)")


def main() -> None:
    """Print the tables."""
    made = parser(__doc__, gigabytes=0.0)
    made.add_argument("--layers", type=int, default=32)
    made.add_argument("--no-peft", action="store_true", help="leave out what takes minutes")
    made.add_argument("--one", action="store_true", help="one weight only, in this process")
    args = made.parse_args()
    if args.one:
        one_weight(peft=not args.no_peft)
        return
    say(machine())
    alone = ["--no-peft"] if args.no_peft else []
    subprocess.run([sys.executable, "-m", "tests.bench.loftq", "--one", *alone], check=True)
    with scratch(args.folder) as folder:
        shape = ("--hidden", "4096", "--layers", str(args.layers), "--dtype", args.dtype)
        synthetic(folder, 0, *shape, "--shards", "8")
        given = ("--rank", str(RANK), "--no-fsync", "--quiet", "-o", folder / "out")
        taken = run(lorakit("loftq", folder / "base", *given))
        ratio = json.loads((folder / "out/lorakit.json").read_text())["tensors"].values()
        left = max(r["norm"] / r["plain"] for r in ratio)
    row = (f"{args.layers} layers", taken.seconds, f"{taken.cpu:.0f}", f"{taken.peak:.0f}")
    table(("lorakit loftq, 7B shapes", "wall s", "cpu s", "peak MB"), [row])
    say(f"largest share that base and adapter leave of plain quantisation: {left:.4f}")


if __name__ == "__main__":
    main()
