"""How much quicker are the decompositions here than a full SVD, and how good?

Single-threaded, each beside torch.linalg.svd of the same matrix in the same process. The matrices:
iid Gaussian (the flattest spectrum there is), and what rounding to 4 bits leaves of it. Run:
python -m tests.bench.svd [--rows 4096 --cols 11008]
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lorakit.math.factored import cosines, decompose, inner, norm, recompose
from lorakit.math.lowrank import LowRank
from lorakit.math.truncated import top
from tests.bench.child import machine, parser, say, table

RANKS = (16, 64, 256)


def timed(work: Callable[[], Any], rounds: int = 1) -> tuple[Any, float]:
    """What it returns, and the least processor seconds that it took."""
    best, found = float("inf"), None
    for _ in range(rounds):
        start = time.process_time()
        found = work()
        best = min(best, time.process_time() - start)
    return found, best


def residue(w: np.ndarray) -> np.ndarray:
    """What rounding to sixteen levels of each block of 64 leaves."""
    blocks = w.reshape(-1, 64)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 7.5
    left: np.ndarray = (blocks - scale * np.round(blocks / scale)).reshape(w.shape)
    return left


def dense_rows(name: str, w: np.ndarray) -> list[tuple[object, ...]]:
    """A row for each rank: seconds, how many times quicker, and what is left beyond the least."""
    import torch

    (_, s, _), full = timed(lambda: torch.linalg.svd(torch.from_numpy(w), full_matrices=False))
    squares = s.double().numpy() ** 2
    rows = []
    for rank in RANKS:
        found, seconds = timed(lambda rank=rank: top(w, rank))
        excess = found.residual / np.sqrt(squares[rank:].sum()) - 1
        ratio = f"{full / seconds:.0f}"
        rows.append(
            (f"{name}, rank {rank}", f"{seconds:.2f}", f"{full:.1f}", ratio, f"{excess:.1e}")
        )
    return rows


def factored_rows(size: int) -> list[tuple[object, ...]]:
    """Resizing and comparing adapters, beside the same on dense deltas."""
    import torch

    rng = np.random.default_rng(0)

    def update(rank: int) -> LowRank:
        shapes = ((rank, size), (size, rank))
        return LowRank(*(rng.standard_normal(x, dtype=np.float32) for x in shapes))

    x, y, wide = update(16), update(16), update(64)
    dense = torch.from_numpy(wide.b @ wide.a)
    _, full = timed(lambda: torch.linalg.svd(dense))
    _, quick = timed(lambda: recompose(decompose(wide), 16), 5)
    _, told = timed(lambda: (norm(x), inner(x, y), cosines([x, y])), 5)
    one, other = x.b @ x.a, y.b @ y.a
    _, slow = timed(lambda: (np.linalg.norm(one), float((one * other).sum())))
    return [
        ("resize 64 to 16", f"{1e3 * quick:.1f}", f"{1e3 * full:.0f}", f"{full / quick:.0f}"),
        ("norm, inner, cosine", f"{1e3 * told:.2f}", f"{1e3 * slow:.0f}", f"{slow / told:.0f}"),
    ]


def main() -> None:
    """Print both tables."""
    import torch
    from threadpoolctl import threadpool_limits

    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=4096)
    made.add_argument("--cols", type=int, default=11008)
    args = made.parse_args()
    torch.set_num_threads(1)
    w = np.random.default_rng(0).standard_normal((args.rows, args.cols), dtype=np.float32)
    say(machine())
    with threadpool_limits(1):
        columns = ("matrix", "seconds", "full SVD", "times", "left beyond the least")
        table(columns, dense_rows("Gaussian", w) + dense_rows("rounding to 4 bits", residue(w)))
        table(("factors", "ms", "dense ms", "times"), factored_rows(args.rows))


if __name__ == "__main__":
    main()
