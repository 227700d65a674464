"""Compares two merged checkpoints with each other and with float64 algebra on the tensors on disk.

Run by tests.bench.merge_vs_peft: python -m tests.bench.difference BASE ADAPTER ONE OTHER ROWS.
Every element of both is compared; of each changed tensor, ROWS rows are held against the algebra.
An element is wrongly rounded when a neighbour of it in its dtype is nearer to the exact number.
Prints JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any


class Tensors:
    """The tensors of a folder of safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files = [safe_open(f, "pt") for f in sorted(folder.glob("*.safetensors"))]
        self.where = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Any:
        return self.where[name].get_tensor(name)


def wrongly_rounded(got: Any, exact: Any) -> int:
    """How many of `got`, of a 16- or 32-bit float dtype, are not the nearest to `exact` (float64).

    Adding one to the bits of a float, or taking one off, gives its neighbours in size.
    """
    import torch

    bits = got.view(torch.int16 if got.element_size() == 2 else torch.int32)
    error = (got.double() - exact).abs()
    nearer = torch.zeros_like(error, dtype=torch.bool)
    for step in (-1, 1):
        nearer |= ((bits + step).view(got.dtype).double() - exact).abs() < error
    return int(nearer.sum())


def algebra(base: Any, adapter: Tensors, module: str, scaling: float, rows: Any) -> Any:
    """Rows of the merged weight, in float64."""
    start = f"base_model.model.{module}"
    a, b = adapter[f"{start}.lora_A.weight"], adapter[f"{start}.lora_B.weight"]
    return base[rows].double() + scaling * (b[rows].double() @ a.double())


def compare(base: Path, adapter: Path, folders: list[Path], count: int) -> dict[str, int]:
    """What differs, and what is wrongly rounded in each."""
    import torch

    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    before, factors = Tensors(base), Tensors(adapter)
    results = [Tensors(f) for f in folders]
    found = dict.fromkeys(("elements", "changed", "different", "sampled", "one", "other"), 0)
    for name in before.where:
        w, one, other = before[name], results[0][name], results[1][name]
        module = name.removesuffix(".weight")
        found["elements"] += w.numel()
        found["different"] += int((one != other).sum())
        if f"base_model.model.{module}.lora_A.weight" not in factors.where:
            continue
        rows = torch.linspace(0, w.shape[0] - 1, min(count, w.shape[0])).round().long()
        exact = algebra(w, factors, module, scaling, rows)
        found["changed"] += w.numel()
        found["sampled"] += exact.numel()
        found["one"] += wrongly_rounded(one[rows], exact)
        found["other"] += wrongly_rounded(other[rows], exact)
    return found


def main(base: str, adapter: str, one: str, other: str, rows: str) -> None:
    """Print the comparison."""
    found = compare(Path(base), Path(adapter), [Path(one), Path(other)], int(rows))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
