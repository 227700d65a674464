"""How much faster, smaller and closer to the algebra is a merge than PEFT's?

PEFT's way is what its documentation shows: from_pretrained, PeftModel.from_pretrained,
merge_and_unload, save_pretrained, on the CPU. Both are timed as whole commands, warm cache,
alternating. Then the two results are compared with each other and with float64 algebra.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from tests.bench.child import (
    Command,
    Ran,
    machine,
    merge,
    middle,
    parser,
    ratio,
    remove,
    run,
    say,
    scratch,
    synthetic,
    table,
)

QUIETLY = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
OURS, UNSYNCED = "lorakit merge", "lorakit merge --no-fsync"
THEIRS = "PEFT: load, merge_and_unload, save_pretrained"


def commands(folder: Path, dtype: str) -> dict[str, tuple[Command, Path]]:
    """The merges, and where each writes. PEFT's saving does not wait for the disk."""
    base, adapter = folder / "base", folder / "all"
    ours, theirs = folder / "ours", folder / "theirs"
    peft = [sys.executable, "-m", "tests.bench.peft_merge", base, adapter, theirs]
    return {
        OURS: (merge(base, adapter, ours), ours),
        UNSYNCED: (merge(base, adapter, ours, "--no-fsync"), ours),
        THEIRS: ([*peft, TORCH_NAMES[dtype]], theirs),
    }


def compete(folder: Path, dtype: str, rounds: int) -> dict[str, list[Ran]]:
    """What each took in every round, after one that is discarded; the last outputs stay."""
    taken: dict[str, list[Ran]] = {OURS: [], UNSYNCED: [], THEIRS: []}
    for number in range(rounds + 1):
        for name, (command, out) in commands(folder, dtype).items():
            remove(out)
            os.sync()
            ran = run(command, output=folder / "parts.json")
            if number:
                taken[name].append(ran)
    return taken


def show(taken: Mapping[str, list[Ran]]) -> None:
    """The table of times and memory."""
    rows: list[list[object]] = []
    for name, runs in taken.items():
        times = ratio(taken[THEIRS], runs)
        cpu, peak = median(r.cpu for r in runs), max(r.peak for r in runs)
        faster = f"{times:.1f}" if name != THEIRS else ""
        rows.append([name, middle([r.seconds for r in runs]), faster, f"{cpu:.1f}", f"{peak:,.0f}"])
    table(["run", "wall s", "times faster", "user + sys s", "peak MB"], rows)


def show_parts(path: Path) -> None:
    """Where PEFT's time went, in its last run."""
    parts = json.loads(path.read_text().splitlines()[-1])
    say("PEFT's parts: " + ", ".join(f"{n} {s:.1f} s" for n, s in parts.items()))


def show_difference(folder: Path, rows: int) -> None:
    """The table of what differs and what is wrongly rounded."""
    paths = [folder / n for n in ("base", "all", "ours", "theirs")]
    out = folder / "difference.json"
    run([sys.executable, "-m", "tests.bench.difference", *paths, str(rows)], output=out)
    found = json.loads(out.read_text())
    say(
        f"{found['different']:,} of {found['elements']:,} elements differ between the two; "
        f"{found['changed']:,} are in changed tensors."
    )
    shares = [[n, found[k], f"{found[k] / found['sampled']:.5%}"] for n, k in KEYS.items()]
    table(["result", f"wrongly rounded of {found['sampled']:,}", "share"], shares)


KEYS = {"lorakit": "one", "PEFT": "other"}


def main() -> None:
    """Run both, print two tables."""
    asked = parser(__doc__, gigabytes=2.1)
    asked.add_argument("--hidden", type=int, default=2048)
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument("--rows", type=int, default=64, help="of each tensor, held against algebra")
    args = asked.parse_args()
    os.environ |= QUIETLY
    with scratch(args.folder) as folder:
        shape = ["--dtype", args.dtype, "--shards", args.shards, "--hidden", args.hidden]
        synthetic(folder, args.gb, *shape, "--rank", args.rank)
        say(machine())
        say(f"{args.gb} GB {args.dtype}, {args.shards} shards, all-linear, rank {args.rank}")
        show(compete(folder, args.dtype, args.runs))
        show_parts(folder / "parts.json")
        show_difference(folder, args.rows)


if __name__ == "__main__":
    main()
