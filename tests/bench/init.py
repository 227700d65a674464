"""How much quicker do adapters begin here than by whole decompositions, and how good are they?

Single-threaded, each beside what PEFT 0.21 calls for the same (torch.linalg.qr or svd of the whole
weight) in the same process; then whole commands on a base of the shapes of a 7B model whose weights
are holes in a file: headers are all that is read of it. Run: python -m tests.bench.init [--size N]
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lorakit.math.initial import METHODS, Start
from lorakit.math.lowrank import LowRank
from lorakit.store.header import format_header
from lorakit.tensors import TensorInfo
from tests.bench.child import lorakit, machine, middle, parser, remove, run, say, scratch, table
from tests.bench.svd import timed
from tests.bench.synthetic import Model

RANK = 16
WHOLE = {"olora": "qr", "pissa": "svd", "pissa-fast": "svd", "mica": "svd"}
SEVEN = Model(0, hidden=4096, layers=32)


def weights(size: int) -> Iterator[tuple[str, np.ndarray]]:
    """The flattest spectrum there is, and one that falls as those of trained weights do."""
    w = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    yield "Gaussian", w
    yield "falling", w * np.arange(1, size + 1, dtype=np.float32) ** -0.5


def begun(name: str, w: np.ndarray) -> LowRank:
    """The factors of a weight."""
    return METHODS[name].function(Start(w.shape, RANK, 1.0, 0, weight=lambda: w))


def rows_of(kind: str, w: np.ndarray) -> Iterator[tuple[object, ...]]:
    """A row for each method: seconds, how many times quicker, what is left beyond the least."""
    import torch

    tensor = torch.from_numpy(w)
    _, qr = timed(lambda: torch.linalg.qr(tensor))
    (_, s, _), svd = timed(lambda: torch.linalg.svd(tensor, full_matrices=False))
    least = np.sqrt((s.double().numpy()[RANK:] ** 2).sum())
    for name, whole in WHOLE.items():
        low, seconds = timed(partial(begun, name, w), 1 if name == "mica" else 3)
        full, excess = (qr if whole == "qr" else svd), ""
        if "pissa" in name:
            left = w.astype("f8") - low.b.astype("f8") @ low.a
            excess = f"{np.linalg.norm(left) / least - 1:.1e}"
        times = f"{full / seconds:.0f}"
        yield f"{name}, {kind}", f"{seconds:.3f}", f"{whole} {full:.1f}", times, excess


def hollow(folder: Path) -> Path:
    """A base of the shapes of a 7B model that takes no disk."""
    folder.mkdir()
    infos = [TensorInfo(n, "BF16", s) for n, s in SEVEN.shapes.items()]
    header = format_header(infos, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(len(header) + sum(i.nbytes for i in infos))
    (folder / "config.json").write_text(json.dumps(SEVEN.config))
    return folder


def command_rows(folder: Path, runs: int) -> Iterator[tuple[object, ...]]:
    """Whole commands that look at no weights."""
    base, out = hollow(folder / "base"), folder / "out"
    for name in ("kaiming", "gaussian", "orthogonal"):
        taken = []
        for _ in range(runs):
            remove(out)
            given = ("--rank", str(RANK), "--method", name, "-o", out, "--no-fsync", "--quiet")
            taken.append(run(lorakit("init", base, *given)))
        cpu, peak = (max(getattr(r, what) for r in taken) for what in ("cpu", "peak"))
        yield name, middle([r.seconds for r in taken]), f"{cpu:.1f}", f"{peak:.0f}"


def main() -> None:
    """Print both tables."""
    import torch
    from threadpoolctl import threadpool_limits

    made = parser(__doc__)
    made.add_argument("--size", type=int, default=4096)
    made.add_argument("--runs", type=int, default=3)
    args = made.parse_args()
    with scratch(args.folder) as folder:
        commands = list(command_rows(folder, args.runs))
    torch.set_num_threads(1)
    with threadpool_limits(1):
        rows = [row for kind, w in weights(args.size) for row in rows_of(kind, w)]
    say(machine())
    columns = ("method", "cpu s", "whole, s", "times", "left beyond the least")
    table(columns, rows)
    table(("7B, rank 16, all-linear", "wall s", "user + sys s", "peak MB"), commands)


if __name__ == "__main__":
    main()
