"""`lorakit edit`."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, parsing, printable, show
from lorakit.tensors import size

if TYPE_CHECKING:
    from lorakit.verbs.edit import Change, Edited

wanted = options.together(
    click.option(
        "--keep",
        type=parsing.Pattern(),
        multiple=True,
        metavar="REGEX",
        help="Keep only the modules in whose name this is found; may be repeated.",
    ),
    click.option(
        "--drop",
        type=parsing.Pattern(),
        multiple=True,
        metavar="REGEX",
        help="Leave out the modules in whose name this is found; may be repeated.",
    ),
    click.option(
        "--rename",
        type=parsing.Pattern(pair=True),
        multiple=True,
        metavar="REGEX=REPL",
        help="Rename modules; may be repeated, in order.",
    ),
    click.option("--scale", type=float, metavar="W", help="Multiply every delta by W."),
    click.option(
        "--alpha",
        type=float,
        metavar="A",
        help="Have the config say alpha A, and rescale B so that every delta stays.",
    ),
    click.option(
        "--keep-factors",
        is_flag=True,
        help="With --alpha: leave B as it is, so that the strength changes.",
    ),
    click.option(
        "--bake",
        is_flag=True,
        help="Multiply scalings into B: alpha becomes the rank, rank stabilisation goes.",
    ),
    click.option(
        "--flatten",
        is_flag=True,
        help="One rank and one alpha for all, for servers that ignore patterns.",
    ),
    options.dtype("the floating-point tensors of the result"),
    options.expert_packing,
    options.pickles,
)
writing = options.writing("Say what would become of each module; write nothing.", where="a folder")


@click.command()
@click.argument("adapter", type=options.place)
@wanted
@writing
def command(adapter: str, **values: Any) -> None:
    """Write ADAPTER with modules renamed or left out, or its scalings told in another way.

    What is not asked for stays as it is, to the byte.

    \b
    lorakit edit my-lora/ -o attention/ --keep self_attn
    lorakit edit my-lora/ -o served/ --flatten
    """
    from lorakit.verbs.edit import plan_edit

    ways, run = options.parted(values)
    told = {k: v for k, v in values.items() if v is not None and v is not False}  # 0.0 is told
    job = plan_edit(adapter, **told)
    job.check(ways.output)
    ways.notes(job.notes)
    if ways.dry_run:
        done = job.preview()
    else:
        with show.progress(job.nbytes, quiet=ways.quiet) as report:
            done = job.run(ways.output, run.reporting(report))
    if not ways.told(done):
        _show(done, ways)


def _show(done: "Edited", ways: show.Ways) -> None:
    if ways.dry_run or ways.verbose:
        columns = ("how", "count", "was", "is", "rank", "scaling")
        show.table("edit", columns, _rows(done.changes, verbose=ways.verbose))
    counts = ", ".join(f"{n} {how}" for how, n in done.counts.items() if n)
    rounded = f"; {done.rounded:,} numbers rounded" if done.rounded else ""
    where = "nothing was written" if ways.dry_run else f"-> {printable(ways.output)}"
    click.echo(
        f"{done.tensors_before} tensors became {done.tensors}, modules: {counts}{rounded}; "
        f"{size(done.written)}{',' * ways.dry_run} {where}"
    )


def _rows(changes: Sequence["Change"], *, verbose: bool) -> list[tuple[Any, ...]]:
    """A row for each kind of module, its numbers replaced by `*`; or for each module."""
    found: Counter[tuple[str, ...]] = Counter()
    for one in changes:
        names = [n if verbose else making.kind(n) for n in (one.name, one.new_name)]
        rank = _became(one.rank_before, one.rank) if one.rank else ""
        scaling = _became(f"{one.scaling_before:.4g}", f"{one.scaling:.4g}") if one.rank else ""
        found[one.how, *names, rank, scaling] += 1
    return [(how, count, *rest) for (how, *rest), count in found.items()]


def _became(before: object, after: object) -> str:
    return str(after) if before == after else f"{before} -> {after}"
