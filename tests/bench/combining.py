"""How much faster is `svd` on factors than peft's add_weighted_adapter, and how near to the best?

One layer, four adapters to the rank of one of them, one thread, alternating in one process. peft
is timed as its documentation shows, on a model of that one layer.
"""

import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lorakit.math.combining.methods import METHODS, combined
from lorakit.math.combining.setting import Setting
from lorakit.math.lowrank import LowRank, delta
from tests.bench.child import machine, parser, say, table

WEIGHTS = [0.5, 0.25, -0.3, 1.0]
REPEATS = 20  # of ours, for each of peft's


def adapters(size: int, rank: int) -> list[LowRank]:
    """Four updates, drawn from a seed."""
    rng = np.random.default_rng(0)
    shape = (rank, size), (size, rank)
    return [
        LowRank(*(rng.standard_normal(s, dtype=np.float32) / size**0.5 for s in shape), 2.0)
        for _ in WEIGHTS
    ]


def peft_model(parts: Sequence[LowRank]) -> Any:
    """A model of one linear layer with these adapters, named by their numbers."""
    import torch
    from peft import LoraConfig, PeftModel

    torch.set_num_threads(1)
    out, inner = parts[0].shape
    rank = parts[0].rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])
    model = PeftModel(torch.nn.Sequential(torch.nn.Linear(inner, out, bias=False)), config, "0")
    for number, part in enumerate(parts):
        if number:
            model.add_adapter(str(number), config)
        layer = model.base_model.model[0]
        layer.lora_A[str(number)].weight.data = torch.from_numpy(part.a)
        layer.lora_B[str(number)].weight.data = torch.from_numpy(part.b)
    return model


def theirs(model: Any, rank: int) -> LowRank:
    """peft's combination."""
    names = [str(i) for i in range(len(WEIGHTS))]
    model.add_weighted_adapter(names, WEIGHTS, "sum", "svd", svd_rank=rank)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["sum"].weight, layer.lora_B["sum"].weight
    found = LowRank(a.detach().numpy(), b.detach().numpy(), layer.scaling["sum"])
    model.delete_adapter("sum")
    return found


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that a call took, and what it gave."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def against_peft(size: int, rank: int, rounds: int) -> None:
    """Show the ratio of the times and both errors."""
    parts, setting = adapters(size, rank), Setting(rank=rank)
    model = peft_model(parts)
    fast: list[float] = []
    slow: list[float] = []
    ratios = []
    for _ in range(rounds):
        seconds, other = timed(lambda: theirs(model, rank))
        slow.append(seconds)
        runs = [timed(lambda: combined("svd", parts, WEIGHTS, setting)) for _ in range(REPEATS)]
        fast.append(median(s for s, _ in runs))
        ratios.append(slow[-1] / fast[-1])
    found = runs[-1][1]
    total = sum(w * delta(p, "float64") for w, p in zip(WEIGHTS, parts, strict=True))
    whole = float(np.linalg.norm(total))
    ours, peft = (
        float(np.linalg.norm(total - delta(low, "float64"))) / whole for low in (found.low, other)
    )
    optimum = max(0.0, 1 - found.retained) ** 0.5
    rows = [
        ["lorakit, on factors", f"{median(fast) * 1000:.2f} ms", f"{ours:.9f}"],
        ["peft, dense SVD", f"{median(slow):.2f} s", f"{peft:.9f}"],
        ["the optimum, from the spectrum", "", f"{optimum:.9f}"],
    ]
    table(["svd", "time", "relative error"], rows)
    say(f"{median(ratios):,.0f} times faster")


def every_method(size: int, rank: int) -> None:
    """Show the time and the peak memory of each method at density 0.5, in dense matrices."""
    parts, setting = adapters(size, rank), Setting(density=0.5)
    matrix = 4 * size * size
    rows: list[list[object]] = []
    for name, method in METHODS.items():
        if name.endswith("_svd"):
            continue
        seconds, _ = timed(lambda name=name: combined(name, parts, WEIGHTS, setting))
        tracemalloc.start()
        combined(name, parts, WEIGHTS, setting)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows.append([name, f"{seconds * 1000:,.1f}", f"{peak / matrix:.2f}", method.dense])
    table(["method", "ms", "peak, dense float32 matrices", "dense"], rows)


def main(arguments: Sequence[str]) -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--size", type=int, default=4096)
    arguments_of.add_argument("--rank", type=int, default=16)
    arguments_of.add_argument("--rounds", type=int, default=1, help="0 leaves peft out")
    options = arguments_of.parse_args(arguments)
    say(machine())
    with threadpool_limits(1):
        if options.rounds:
            against_peft(options.size, options.rank, options.rounds)
        every_method(options.size, options.rank)


if __name__ == "__main__":
    main(sys.argv[1:])
