"""`lorakit convert`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, printable, show
from lorakit.tensors import size

if TYPE_CHECKING:
    from lorakit.verbs.changes import Change
    from lorakit.verbs.converting import Converted

wanted = options.together(
    click.option(
        "--to",
        type=click.Choice(["peft"]),
        default="peft",
        show_default=True,
        help="The format of the result.",
    ),
    click.option(
        "--names",
        type=click.Choice(["disk", "runtime-v5"]),
        required=True,
        help="Names of the tensors of BASE on disk, or of its model in transformers 5.",
    ),
    click.option(
        "--experts",
        type=click.Choice(["auto", "fused", "split"]),
        default="auto",
        show_default=True,
        help="Experts of a layer in one stack, or one by one; auto: as the names have them.",
    ),
    click.option(
        "--base", required=True, metavar="BASE", help="The checkpoint that the adapter is for."
    ),
)
reading = options.together(
    options.key_map, options.expert_packing, options.expert_orientation, options.pickles
)
writing = options.together(
    options.output,
    click.option(
        "--dry-run", is_flag=True, help="Print which module becomes which; write nothing."
    ),
    options.overwrite,
    options.no_fsync,
    options.as_json,
    options.quiet,
    options.verbose,
)


@click.command()
@click.argument("adapter")
@wanted
@reading
@writing
def command(adapter: str, **values: Any) -> None:
    """Write ADAPTER under other names, with the same delta for every tensor of BASE.

    Adapters of transformers 4 have a module for each expert; those of transformers 5 have experts
    in stacks, and other names for some models. Either becomes the other, without rounding.

    \b
    lorakit convert v4-lora/ -o v5-lora/ --names runtime-v5 --base mixtral/
    lorakit convert v5-lora/ -o served/ --names disk --base org/mixtral
    """
    from lorakit.verbs.convert import plan_convert
    from lorakit.verbs.job import RunOptions

    shown = ("output", "dry_run", "as_json", "quiet", "verbose")
    ways = {name: values.pop(name) for name in shown}
    run = RunOptions(overwrite=values.pop("overwrite"), sync=not values.pop("no_fsync"))
    output = Path(ways["output"])
    job = plan_convert(adapter, **values)
    job.check(output)
    if not ways["quiet"]:
        show.notes(job.notes)
    if ways["dry_run"]:
        return _show(job.report(), ways)
    with show.progress(job.nbytes, quiet=ways["quiet"]) as report:
        done = job.run(output, run.reporting(report))
    return _show(done, ways)


def _show(done: "Converted", ways: dict[str, Any]) -> None:
    if ways["as_json"]:
        extra = {"dry_run": True} if ways["dry_run"] else {"output": ways["output"]}
        return show.result({**extra, **done.to_dict()})
    if ways["quiet"] and not ways["dry_run"]:
        return None
    if ways["dry_run"] or ways["verbose"]:
        columns = ("how", "modules", "was", "is", "rank")
        show.table(f"convert to {done.names}", columns, _rows(done.changes, ways["verbose"]))
    counts = ", ".join(f"{n} {how}" for how, n in done.counts.items() if n)
    rounded = f", {done.rounded:,} numbers rounded" if done.rounded else ""
    where = "; nothing was written" if ways["dry_run"] else f" -> {printable(ways['output'])}"
    click.echo(
        f"{done.tensors_before} tensors became {done.tensors}, modules: {counts}{rounded}; "
        f"{size(done.written)}{where}"
    )
    return None


def _rows(changes: Sequence["Change"], verbose: bool) -> list[tuple[Any, ...]]:
    """A row for each kind of module, its numbers replaced by `*`; or for each module."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for change in changes:
        names = dict.fromkeys(n if verbose else making.kind(n) for n in change.sources)
        rank = str(change.rank)
        if change.rank != change.rank_before:
            rank = f"{change.rank_before} -> {rank}"
        new = change.name if verbose else making.kind(change.name)
        found[change.how, ", ".join(names), new, rank] += 1
    return [(how, count, old, new, rank) for (how, old, new, rank), count in found.items()]
