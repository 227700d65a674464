"""merge on state dicts in memory: the same plan and the same arithmetic, without files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.load import LazyRows, check_finite, load_recipe
from lorakit.engine.fold import Slab, fold_rows
from lorakit.engine.layout import Output
from lorakit.errors import UsageError
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.hub import Located
from lorakit.store.memory import MemorySource, like
from lorakit.verbs.deciding import decided
from lorakit.verbs.planning import sources_of
from lorakit.verbs.targets import Options


def merge_in_memory(
    base: Mapping[str, Any], adapters: Sequence[Adapter], options: Options, *, dtype: str = "keep"
) -> dict[str, Any]:
    """A new state dict: merged tensors of the same library and device, the others unchanged.

    Raises:
        MisfitError: an adapter does not fit the state dict.
    """
    for adapter in adapters:
        check_finite(adapter.source, adapter.path)
    source = MemorySource(base, name="state dict")
    checkpoint = Checkpoint(
        Located(Path("state dict"), None, None), [source], folder=None, left_out=()
    )
    sources = dict(sources_of(checkpoint, adapters))
    (outs,) = decided(checkpoint, adapters, options, dtype).outputs.values()
    pattern = next((v for v in base.values() if hasattr(v, "dtype")), None)
    if pattern is None:
        raise UsageError("the state dict has no tensors.")
    with threadpool_limits(1, "blas"):  # as in a run: the same bits on any number of cores
        return {o.tensor.name: _value(o, base, sources, adapters, pattern) for o in outs}


def _value(
    out: Output,
    base: Mapping[str, Any],
    sources: Mapping[str, Any],
    adapters: Sequence[Adapter],
    pattern: Any,
) -> Any:
    if not out.recipe and out.source.startswith("base/") and out.tensor == out.origin:
        return base[out.tensor.name]
    fold = out.fold(out.tensor)
    wide = "float64" if "F64" in (out.tensor.dtype, out.origin.dtype) else "float32"
    weight = LazyRows(sources[out.source], out.origin.name, wide)
    recipe = load_recipe(out.recipe, [a.source for a in adapters], wide, weight)
    array = fold_rows(fold, recipe, sources[out.source], Slab())
    return like(base.get(out.tensor.name, pattern), np.ascontiguousarray(array), out.tensor.dtype)
