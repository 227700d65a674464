"""merge on state dicts in memory: the same plan and the same arithmetic, without files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.load import check_finite
from lorakit.engine.executor import Cpu, Executor, Lane, executor_for, fold_whole
from lorakit.engine.layout import Output, lay_out
from lorakit.engine.plan import Plan
from lorakit.errors import UsageError
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.hub import Located
from lorakit.store.memory import MemorySource, like
from lorakit.verbs.base.deciding import decided
from lorakit.verbs.base.sources import adapter_number, recipe_of, sources_of
from lorakit.verbs.base.targets import Options


def merge_in_memory(
    base: Mapping[str, Any],
    adapters: Sequence[Adapter],
    options: Options,
    *,
    dtype: str = "keep",
    device: str = "cpu",
) -> dict[str, Any]:
    """A new state dict: merged tensors of the same library and device, the others unchanged.

    `device` is where they are folded, as in `RunOptions`.

    Raises:
        MisfitError: an adapter does not fit the state dict.
        UsageError: there is no such device.
    """
    for adapter in adapters:
        check_finite(adapter.source, adapter.path)
    source = MemorySource(base, name="state dict")
    checkpoint = Checkpoint(Located(Path("state dict")), [source])
    sources = dict(sources_of(checkpoint, adapters))
    (outs,) = decided(checkpoint, adapters, options, dtype).outputs.values()
    pattern = next((v for v in base.values() if hasattr(v, "dtype")), None)
    if pattern is None:
        raise UsageError("the state dict has no tensors.")
    made = _Made(base, pattern, sources, adapters, _executor(outs, device))
    with threadpool_limits(1, "blas"), made.executor.session():  # as in a run: the same bits
        return {o.tensor.name: made.value(o) for o in outs}


def _executor(outs: Sequence[Output], device: str) -> Executor:
    if device == "cpu":
        return Cpu()
    plan = Plan("merge", [], {}, [lay_out("state dict", outs, None, link=False)])
    return executor_for(plan, device, jobs=1, limit=None)[0]


@dataclass
class _Made:
    """What values of the new state dict are made from, and who makes them."""

    base: Mapping[str, Any]
    pattern: Any
    sources: Mapping[str, Any]
    adapters: Sequence[Adapter]
    executor: Executor

    def value(self, out: Output) -> Any:
        """One tensor of the new state dict; the very object of the base where nothing changes."""
        of_base = adapter_number(out.source) is None
        if of_base and not out.recipe and out.tensor == out.origin:
            return self.base[out.tensor.name]
        fold = out.fold(out.tensor)
        recipe = recipe_of(fold, self.sources, [a.source for a in self.adapters])
        blocks = list(self.executor.blocks(fold))
        array = fold_whole(fold, recipe, self.sources[out.source], lane=self._lane, blocks=blocks)
        pattern = self.base.get(out.tensor.name, self.pattern)
        return like(pattern, np.ascontiguousarray(array), out.tensor.dtype)

    @cached_property
    def _lane(self) -> Lane:
        return self.executor.lanes()[0]
