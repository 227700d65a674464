"""Weights that were quantised again: whether their values are as near to the exact result as the
grid allows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.engine.fold import steps_of
from lorakit.engine.plan import Fold
from lorakit.math.cast import Array
from lorakit.math.recipe import Recipe
from lorakit.quant.stored.tensor import StoredTensor
from lorakit.store.checkpoint import Part, open_checkpoint
from lorakit.tensors import Source
from lorakit.verbs.base.recompute import exact_rows, prepared
from lorakit.verbs.base.sources import grid_of
from lorakit.verbs.job import Job
from lorakit.verbs.verify.files import Tally, sampled

Rows = tuple[int, int]
# How far a scale may be off in its dtype, where float32 arithmetic decided to which side it went.
NEAR = {"F32": 2.0**-20, "F16": 2.0**-10, "BF16": 2.0**-7}


def check_grids(
    output: Path, job: Job, sources: Mapping[str, Part], tally: Tally, *, full: bool
) -> None:
    """Hold the values of every such weight against the base plus the deltas."""
    folds = [f for f in job.plan.folds if f.unit]
    written = open_checkpoint(output) if folds else None
    for fold in folds:
        source = sources[fold.source]
        grid = grid_of(fold, source)
        tally.folded += 1
        if written and grid.codes:
            recipe = prepared(fold, source, [a.source for a in job.adapters])
            _check(_Weight(fold, recipe, source, grid), written, tally, full=full)


@dataclass(frozen=True)
class _Weight:
    """A weight computed again in float64, and put on its grid."""

    fold: Fold
    recipe: Recipe
    source: Source
    grid: StoredTensor

    def surveyed(self, rows: Rows) -> Any:
        """What the scales of these rows follow from."""
        w, exact, _ = exact_rows(self.fold, self.recipe, self.source, rows)
        return self.grid.survey(w.astype(np.float32), exact.astype(np.float32), rows[0])

    def settled(self) -> "_Weight":
        """The same that knows its scales, if those depend on all rows."""
        if not self.grid.coupled:
            return self
        seen = [self.surveyed(rows) for rows in steps_of(self.fold)]
        return replace(self, grid=self.grid.settled(seen))

    def rows(self, rows: Rows, out: Array) -> tuple[Array, Array, Array]:
        """Of some rows the exact result, the values nearest to it, and how far both may be off;
        `out` has room for the codes of a block.
        """
        _, exact, slack = exact_rows(self.fold, self.recipe, self.source, rows)
        grid, at = self.grid, rows[0] % self.fold.block_rows
        if not grid.coupled:
            grid = grid.settled([self.surveyed(rows)], rows[0])
        nearest = grid.encode(exact.astype(np.float32), rows[0], out, at).astype(np.float64)
        scales = grid.source.infos[grid.weight.remade[-1]].dtype
        return exact, nearest, slack + NEAR.get(scales, NEAR["F32"]) * np.abs(nearest)


def _check(weight: _Weight, written: Source, tally: Tally, *, full: bool) -> None:
    weight, fold = weight.settled(), weight.fold
    out = np.empty(fold.extent((0, min(fold.block_rows, fold.rows)))[1], np.uint8)
    for rows in sampled(fold, full=full):
        exact, nearest, slack = weight.rows(rows, out)
        with np.errstate(all="ignore"):  # a damaged scale may be anything
            held = weight.grid.held(written, *rows).astype(np.float64)
        differ = ~(np.abs(held - nearest) <= slack)  # by more than their scales may
        off = differ & ~(np.abs(held - exact) <= np.abs(nearest - exact) + slack)
        tally.numbers += held.size
        tally.wrong += int(np.count_nonzero(differ))
        if off.any():
            tally.differences.append(
                f"{fold.origin.name!r}: {np.count_nonzero(off):,} of {held.size:,} values in rows "
                f"{rows[0]} to {rows[1]} are not the base plus the deltas, as near as their grid "
                "has it."
            )
            return
