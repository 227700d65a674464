"""From plain data in a plan to the arrays that do the work: factors are read when their tensor
comes up.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lorakit.adapter.factors import factored, residual
from lorakit.errors import MisfitError
from lorakit.math.cast import Array, storage, widen
from lorakit.math.recipe import Recipe, Rows
from lorakit.math.rows import row_slices
from lorakit.math.updates import Toward, Update
from lorakit.tensors import Source, TensorInfo

DIVERGED = "The training diverged; use an earlier save."  # what to do about NaN and Inf
RECENT = 4  # both factors of both stacks of a layer


class Recent(threading.local):
    """The factors of all experts of the layer at hand, read once for the tensors of its experts.

    Every thread has its own, for each is at another layer.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, str, str], Array] = {}

    def read(self, sources: Sequence[Source], number: int, name: str, dtype: str) -> Array:
        """A whole tensor, widened to `dtype`; not to be written to."""
        key = (number, name, dtype)
        found = self._arrays.pop(key, None)
        self._arrays[key] = read_array(sources[number], name, dtype) if found is None else found
        while len(self._arrays) > RECENT:
            del self._arrays[next(iter(self._arrays))]
        return self._arrays[key]


def load_recipe(
    plain: Mapping[str, Any],
    sources: Sequence[Source],
    dtype: str = "float32",
    weight: "LazyRows | None" = None,
    recent: Recent | None = None,
) -> Recipe:
    """The recipe that a plan describes; `sources` are the adapters' tensors in their order.

    Factors are widened to `dtype` ("float64" for a check); only float64 factors are rounded to it.
    `weight` is what will be folded into, which some updates are computed from. `recent` keeps what
    other recipes are likely to read next.
    """

    def read(number: int, name: str) -> Array:
        return read_array(sources[number], name, dtype)

    def again(number: int, name: str) -> Array:
        assert recent is not None
        return recent.read(sources, number, name, dtype)

    rows = tuple(
        Rows(np.asarray(r["indices"]), read(r["adapter"], r["tensor"]), r["weight"])
        for r in plain.get("rows", ())
    )
    updates: list[Update] = []
    for update in plain.get("updates", ()):
        if "toward" in update:
            values = LazyRows(
                sources[update["adapter"]], update["toward"], leading=update["leading"]
            )
            replaced = frozenset(update.get("replaced", ()))
            updates.append(Toward(values, update["weight"], replaced))
        elif "residual" in update:
            assert weight is not None
            updates.append(residual(update, weight))
        else:
            shared = recent is not None and "experts" in update
            updates.append(factored(update, again if shared else read))
    return Recipe(rows, tuple(updates)).summed()


def read_array(source: Source, name: str, dtype: str = "float32") -> Array:
    """A whole tensor, widened to `dtype`."""
    info = source.infos[name]
    return LazyRows(source, name, dtype)[0 : info.rows].reshape(info.shape)


def read_stored(source: Source, info: TensorInfo) -> Array:
    """A whole tensor, as it is stored."""
    out = np.empty(info.shape, storage(info.dtype))
    source.read_rows(info.name, 0, info.rows, out.reshape(-1).view(np.uint8))
    return out


def stored_pieces(source: Source, info: TensorInfo) -> Iterator[Array]:
    """A tensor as it is stored, some rows at a time, each (rows, cols)."""
    for rows in row_slices(info.rows, info.cols):
        out = np.empty((rows.stop - rows.start, info.cols), storage(info.dtype))
        source.read_rows(info.name, rows.start, rows.stop, out.view(np.uint8))
        yield out


class LazyRows:
    """The rows of a tensor on disk, read as they are sliced: `lazy[start:stop]`, (stop - start,
    cols). The first `leading` dimensions make the rows.
    """

    def __init__(self, source: Source, name: str, dtype: str = "float32", leading: int = 1) -> None:
        self.source = source
        self.info = source.infos[name]
        self.dtype = dtype
        self.leading = leading

    def __getitem__(self, rows: slice) -> Array:
        height, width = self.info.matrix(self.leading)
        start, stop, _ = rows.indices(height)
        raw = np.empty((stop - start, width), storage(self.info.dtype))
        into = raw.view(np.uint8)
        self.source.read_rows(self.info.name, start, stop, into, leading=self.leading)
        if raw.dtype == self.dtype:
            return raw
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
        slices = row_slices(info.rows, info.cols)
        bad = sum(int(np.count_nonzero(~np.isfinite(lazy[rows]))) for rows in slices)
        if bad:
            raise MisfitError(
                f"{info.name!r} has {bad:,} NaN or Inf of {info.numel:,}.",
                hint=DIVERGED,
                file=file,
                tensor=info.name,
            )
