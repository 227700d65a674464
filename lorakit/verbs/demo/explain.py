"""One number of a merged checkpoint, traced back to the base and the adapters it is made of."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lorakit.adapter.adapter import open_adapter
from lorakit.adapter.load import LazyRows, read_array
from lorakit.store.checkpoint import open_checkpoint


def explain(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    merged: Path,
    place: tuple[str, int, int],
) -> Iterator[str]:
    """Lines that say how the number at `place` (linear module, row, column) came about.

    The sum is in float64; the last line has what is stored.
    """
    module, row, column = place
    name = f"{module}.weight"
    start = float(LazyRows(open_checkpoint(str(base)), name, "float64")[row : row + 1][0, column])
    yield f"{name}[{row}, {column}]"
    yield f"  {start:+.9f}  in the base"
    total = start
    for path, weight in adapters:
        adapter = open_adapter(path)
        pair = adapter.modules[module]
        a = read_array(adapter.source, pair.a.name, "float64")
        b = read_array(adapter.source, pair.b.name, "float64")
        rank = a.shape[0]
        scaling = adapter.config.scaling(module, rank)
        change = weight * scaling * float(b[row] @ a[:, column])
        total += change
        yield (
            f"  {change:+.9f}  {path.name}: {weight:g} * alpha/rank ({scaling:g}) * "
            f"B[{row}] @ A[:, {column}], rank {rank}"
        )
    result = open_checkpoint(str(merged))
    stored = float(LazyRows(result, name, "float64")[row : row + 1][0, column])
    yield f"  {total:+.9f}  the sum"
    yield f"  {stored:+.9f}  stored, the nearest {result.infos[name].dtype}"
