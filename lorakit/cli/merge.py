"""`lorakit merge`."""

import gc
import time
from typing import Any

import click

from lorakit.cli import options, show


@click.command()
@click.argument("base", type=options.place)
@click.argument("adapters", type=options.place, nargs=-1, required=True)
@options.matching
@options.untie
@options.quant
@options.folding
def command(base: str, adapters: tuple[str, ...], **values: Any) -> None:
    """Fold ADAPTERS into BASE and write the result to OUT.

    The result has the base's tensors, names, order, dtypes and shards, its config and tokenizer, a
    model card, and lorakit.json with what was done. Every tensor of every adapter is used, or
    nothing is written.

    \b
    lorakit merge llama/ my-lora/ -o merged/
    lorakit merge org/base@rev style/ detail/ --weight 0.8 --weight 0.3 -o merged/
    """
    merge_command("merge", base, adapters, values)


def merge_command(verb: str, base: str, adapters: tuple[str, ...], values: dict[str, Any]) -> None:
    """What merge and unmerge do: plan, and print or run it."""
    from lorakit.engine.heap import steady
    from lorakit.verbs.merge.planned import plan_any

    start = time.monotonic()
    ways, run = options.parted(values)
    values["weights"] = values.pop("weights") or None
    job = plan_any(verb, base, adapters, ways.output, **values)
    ways.notes(job.notes)
    if ways.dry_run:
        from lorakit.cli.plans import show_plan

        return show_plan(job, run, ways)
    steady()
    gc.freeze()  # what the plan holds stays to the end; collecting among it would stop all workers
    with show.progress(job.nbytes, quiet=ways.quiet) as report:
        done = job.run(ways.output, run.reporting(report))
    from lorakit.cli.plans import show_report

    show_report(done, ways, verb=verb, seconds=time.monotonic() - start)
    return None
