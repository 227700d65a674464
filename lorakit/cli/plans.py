"""How plans and reports look."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lorakit.cli import printable, show
from lorakit.engine.machine import available_cores
from lorakit.engine.plan import Fold, Plan
from lorakit.engine.preflight import fitting_jobs, free_disk, peak_memory
from lorakit.tensors import size
from lorakit.verbs.job import Job, RunOptions, check_place
from lorakit.verbs.merge.pipeline import PipelineJob
from lorakit.verbs.report import Report, tensor_figures

ENOUGH = 0.9  # of a delta that is kept, so that nothing has to be said of it


def show_plan(job: Job | PipelineJob, run: RunOptions, ways: show.Ways) -> None:
    """The plan: as JSON the whole of it, else a table of what happens to every file. Of a pipeline,
    that of each model that changes.

    Raises:
        OutputError: the output cannot be placed where it is asked for.
        ResourceError: even one worker needs more memory than there is.
    """
    output = check_place(ways.output, job.inputs)
    needs = {name: _needs(one.plan, run, output) for name, one in job.parts.items()}
    if ways.as_json:
        plans = {n: {**needs[n], "plan": one.to_dict()} for n, one in job.parts.items()}
        found = {"parts": plans} if isinstance(job, PipelineJob) else plans[""]
        return show.result({"dry_run": True, **found})
    for name, one in job.parts.items():
        _show_one(one, needs[name], ways, name)
    if run.device != "cpu":
        memory = max(n["device_memory"] for n in needs.values())
        click.echo(f"  folds on {run.device}, in at most {size(memory)} of its memory")
    if isinstance(job, PipelineJob):
        copies = f"{len(job.copies)} files"
        click.echo(f"  {copies} of the other models and beside them are copied as they are")
    if os.path.lexists(output) and not run.overwrite:
        click.echo(f"Note: {printable(str(output))} exists; --overwrite replaces it.", err=True)
    return None


def _needs(plan: Plan, run: RunOptions, output: Path) -> dict[str, Any]:
    """What a plan is known by, and takes of disk and memory."""
    return {"hash": plan.hash, "disk": plan.nbytes, "free": free_disk(output), **_memory(plan, run)}


def _show_one(job: Job, needs: Mapping[str, Any], ways: show.Ways, name: str) -> None:
    plan, rows = job.plan, []
    for file in plan.files:
        folds = [s for s in file.steps if isinstance(s, Fold)]
        folded = sum(s.nbytes for s in folds)
        how = "link" if file.link else ("fold" if folds else "copy")
        rows.append((file.name, how, len(file.tensors), len(folds), size(folded), size(file.size)))
    columns = ("file", "how", "tensors", "folded", "of it", "size")
    of = f" to {name}" if name else ""
    show.table(f"{plan.verb}: what would be written{of}", columns, rows)
    if ways.verbose:
        _show_folds(plan.folds)
    click.echo(
        printable(f"  copied beside the weights: {', '.join(job.beside.copies) or 'nothing'}")
    )
    click.echo(
        f"  needs {size(plan.nbytes)} of disk ({size(needs['free'])} are free), "
        f"at most {size(needs['memory'])} of memory with {needs['jobs']} workers"
    )
    click.echo(f"  plan {plan.hash[:16]}; nothing was written")


def _memory(plan: Plan, run: RunOptions) -> dict[str, Any]:
    """What the run takes of memory, and how many workers it has; no device is asked."""
    if run.device == "cpu":
        jobs = fitting_jobs(plan, run.jobs or available_cores(), run.max_memory)
        return {"memory": peak_memory(plan, jobs), "jobs": jobs}
    from lorakit.engine.room import device_memory, fitting_share, host_memory

    share = fitting_share(plan, run.jobs, run.max_memory, None)
    return {
        "memory": host_memory(plan, share),
        "jobs": share.jobs,
        "device": run.device,
        "device_memory": device_memory(plan, share),
    }


def _show_folds(folds: list[Fold]) -> None:
    rows = [
        (f.tensor.name, f.origin.dtype, f.tensor.dtype, list(f.tensor.shape), _sum(f.recipe))
        for f in folds
    ]
    show.table("", ("tensor", "from", "to", "shape", "updates"), rows)


def _sum(recipe: Any) -> str:
    updates = [
        f"{u['weight'] * u.get('scaling', 1):+g} × adapter {u['adapter'] + 1}"
        + (" (DoRA)" if u.get("magnitude") else "")
        + (" (transposed)" if u.get("transposed") else "")
        for u in recipe.get("updates", ())
    ]
    rows = [
        f"{len(r['indices'])} rows of adapter {r['adapter'] + 1}" for r in recipe.get("rows", ())
    ]
    return ", ".join(updates + rows) or "cast"


def show_report(report: Report, ways: show.Ways, *, verb: str, seconds: float) -> None:
    """The closing lines that say what was done; that numbers were lost is said in any case."""
    if report.overflowed:
        click.echo(
            f"Warning: {report.overflowed:,} numbers do not fit the dtype of the result and became "
            "infinite. Write another one with --dtype float32 or bfloat16.",
            err=True,
        )
    _warn_of_grid(report)
    if ways.told(report):
        return
    if ways.verbose:
        _show_figures(report)
    rate = report.written / seconds / 1e6
    click.echo(
        f"{report.folded} of {report.tensors} tensors changed, "
        f"largest change {report.max_change:.3g}, "
        f"{100 * report.retained:.2f} % of the delta kept after rounding; "
        f"{size(report.written)} in {seconds:.1f} s ({rate:.0f} MB/s) "
        f"-> {printable(ways.output)}"
    )
    if report.retained < ENOUGH and not report.requantised:
        click.echo(
            f"Note: the dtype of the result keeps only {100 * report.retained:.0f} % of the delta; "
            "--dtype float32 or float16 keeps more.",
            err=True,
        )
    if verb == "unmerge":
        click.echo(
            f"Note: no number is off the original base by more than {report.undo_error:.3g} "
            "(rounding in the merge and here).",
            err=True,
        )


def _warn_of_grid(report: Report) -> None:
    """Say in any case that little of a delta is left in weights that were quantised again."""
    found = report.requantised
    if found and found["retained"] < ENOUGH:
        click.echo(
            f"Warning: of the delta of {found['weights']} weights, their codes keep only "
            f"{100 * found['retained']:.0f} %, with an error of {_share(found)} of it. "
            "--quant keep-touched or --quant dequantize keeps it.",
            err=True,
        )


def _share(figures: Mapping[str, float]) -> str:
    """The error that a grid added, as a share of the delta."""
    if "error" not in figures or not figures["delta"]:
        return ""
    return f"{100 * figures['error'] / figures['delta']:.0f} %"


def _show_figures(report: Report) -> None:
    rows = [
        (n, f"{f['max_change']:.3g}", f"{100 * f['retained']:.2f} %", f["overflowed"], _share(f))
        for n, f in ((n, tensor_figures(f)) for n, f in report.figures.items())
    ]
    columns = ("tensor", "largest change", "delta kept", "overflowed", "error added")
    shown = len(columns) if report.requantised else len(columns) - 1
    show.table("", columns[:shown], [row[:shown] for row in rows])
