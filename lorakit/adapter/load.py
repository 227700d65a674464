"""From plain data in a plan to the arrays that do the work: factors are read when their tensor
comes up.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.adapter.factors import factored, residual
from lorakit.errors import MisfitError
from lorakit.math.cast import storage, widen
from lorakit.math.recipe import Recipe, Rows
from lorakit.math.updates import Toward, Update
from lorakit.tensors import Source

CHUNK = 1 << 22  # elements


def load_recipe(
    plain: Mapping[str, Any],
    sources: Sequence[Source],
    dtype: str = "float32",
    weight: "LazyRows | None" = None,
) -> Recipe:
    """The recipe that a plan describes; `sources` are the adapters' tensors in their order.

    Factors are widened to `dtype` ("float64" for a check); only float64 factors are rounded to it.
    `weight` is what will be folded into, which some updates are computed from.
    """

    def read(number: int, name: str) -> NDArray[Any]:
        return read_array(sources[number], name, dtype)

    rows = tuple(
        Rows(np.asarray(r["indices"]), read(r["adapter"], r["tensor"]), r["weight"])
        for r in plain.get("rows", ())
    )
    updates: list[Update] = []
    for update in plain.get("updates", ()):
        if "toward" in update:
            values = LazyRows(sources[update["adapter"]], update["toward"], leading=update["rows"])
            updates.append(Toward(values, update["weight"]))
        elif "residual" in update:
            assert weight is not None
            updates.append(residual(update, weight))
        else:
            updates.append(factored(update, read))
    return Recipe(rows, tuple(updates)).summed()


def read_array(source: Source, name: str, dtype: str = "float32") -> NDArray[Any]:
    """A whole tensor, widened to `dtype`."""
    info = source.infos[name]
    return LazyRows(source, name, dtype)[0 : info.rows].reshape(info.shape)


class LazyRows:
    """The rows of a tensor on disk, read as they are sliced: `lazy[start:stop]`, (stop - start,
    cols). The first `leading` dimensions make the rows.
    """

    def __init__(self, source: Source, name: str, dtype: str = "float32", leading: int = 1) -> None:
        self.source = source
        self.info = source.infos[name]
        self.dtype = dtype
        self.leading = leading

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        height, width = self.info.matrix(self.leading)
        start, stop, _ = rows.indices(height)
        raw = np.empty((stop - start, width), storage(self.info.dtype))
        into = raw.view(np.uint8)
        self.source.read_rows(self.info.name, start, stop, into, leading=self.leading)
        wide = np.empty(raw.shape, self.dtype)
        if raw.dtype.kind in "iub" or raw.dtype.itemsize > wide.dtype.itemsize:
            np.copyto(wide, raw, casting="same_kind" if raw.dtype.kind == "f" else "unsafe")
        else:
            widen(raw, wide)
        return wide


def check_finite(source: Source, file: object) -> None:
    """Read an adapter's tensors once and refuse NaN and Inf.

    Raises:
        MisfitError: naming the first tensor that has some, and how many.
    """
    for info in source.infos.values():
        lazy = LazyRows(source, info.name)
        step = max(1, CHUNK // max(info.cols, 1))
        bad = sum(
            int(np.count_nonzero(~np.isfinite(lazy[i : i + step])))
            for i in range(0, info.rows, step)
        )
        if bad:
            raise MisfitError(
                f"{info.name!r} has {bad:,} NaN or Inf of {info.numel:,}.",
                hint="The training diverged; use an earlier save.",
                file=file,
                tensor=info.name,
            )
