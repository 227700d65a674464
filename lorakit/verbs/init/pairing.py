"""An adapter and what it leaves of its base, in one folder: both appear, or neither does.

Law: what is left of the base is computed from the factors as they are stored, so that both together
are the base, up to one rounding of the residual. A run that was killed goes on: the adapter is made
once, and the residual base is resumed as any merge.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.store.checkpoint import Checkpoint
from lorakit.store.workspace import Workspace, sweep
from lorakit.verbs.init.weight import Row
from lorakit.verbs.job import Job, RunOptions
from lorakit.verbs.making import Making, Report
from lorakit.verbs.merge import plan_merge

ADAPTER, BASE = "adapter", "base"


def run_pair(
    making: Making[Row],
    base: Checkpoint,
    output: str | Path,
    options: RunOptions,
    *,
    allow_pickle: bool = False,
) -> Report[Row]:
    """Write the adapter to `output/adapter` and the residual base to `output/base`.

    Raises:
        OutputError, ResourceError, MisfitError: as `Draft.run` and `Job.run`.
        InputError: a weight holds NaN or Inf.
    """
    output = making.draft.check(output)
    inside = options.replacing()  # what an earlier run left there
    with options.building(output, making.draft.identity, keep=True) as workspace:
        report, made = _adapter(_placed(making, output), workspace, inside)
        job = _residual(base, workspace, output, allow_pickle=allow_pickle)
        if not sweep(workspace.folder / BASE) or made:
            job.run(workspace.folder / BASE, inside.reporting(lambda _: None))
    return replace(report, notes=(*report.notes, *job.plan.notes))


def _placed(making: Making[Row], output: Path) -> Making[Row]:
    """The same, with a config that names the residual base, which is the one to load."""
    name = {"base_model_name_or_path": str(output.absolute() / BASE)}
    draft = making.draft
    return replace(making, draft=replace(draft, config=lambda s: {**draft.config(s), **name}))


def _adapter(
    making: Making[Row], workspace: Workspace, options: RunOptions
) -> tuple[Report[Row], bool]:
    """What was made of the adapter, and whether that was now."""
    folder = workspace.folder / ADAPTER
    earlier = [r[ADAPTER] for r in workspace.records if ADAPTER in r]
    if earlier and folder.exists():
        return _report(earlier[-1], making), False
    report = making.run(folder, options)
    workspace.record({ADAPTER: report.to_dict()}, sync=options.sync)
    return report, True


def _report(said: Mapping[str, Any], making: Making[Row]) -> Report[Row]:
    rows = [Row(**{**r, "shape": tuple(r["shape"])}) for r in said["rows"]]
    return Report(rows, said["tensors"], said["written"], said["left_out"], making.notes)


def _residual(base: Checkpoint, workspace: Workspace, output: Path, *, allow_pickle: bool) -> Job:
    """The merge that takes the adapter out; its manifest names the place where that will lie."""
    adapter = workspace.folder / ADAPTER
    job = plan_merge(base.located.path, adapter, weights=[-1.0], allow_pickle=allow_pickle)
    first, second = job.beside.references
    there = {**second, "path": str(output.absolute() / adapter.name)}
    return replace(job, beside=replace(job.beside, references=(first, there)))
