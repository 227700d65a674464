"""`lorakit resize`."""

from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, show

if TYPE_CHECKING:
    from lorakit.verbs.making import Report
    from lorakit.verbs.resize import Row

wanted = options.together(
    click.option(
        "--rank",
        type=click.IntRange(min=1),
        metavar="R",
        help="The rank of each weight; with a rule below, the largest that it may ask for.",
    ),
    click.option(
        "--energy", type=options.unit, metavar="E", help="Keep this share of the squared norm."
    ),
    click.option(
        "--sv-ratio",
        type=click.FloatRange(min=1),
        metavar="P",
        help="Keep singular values above the largest over P.",
    ),
    click.option(
        "--sv-cumulative", type=options.unit, metavar="P", help="Keep this share of their sum."
    ),
    click.option("--sv-fro", type=options.unit, metavar="P", help="Keep this share of the norm."),
    click.option(
        "--uniform", is_flag=True, help="One rank for all weights: the largest that any asks for."
    ),
    click.option(
        "--kohya-compat",
        is_flag=True,
        help="The very ranks that kohya's resize_lora.py chooses, one more than is needed.",
    ),
    making.dtype,
    click.option(
        "--base-is-residual",
        is_flag=True,
        help="An adapter that PiSSA, OLoRA … began is for the base that these left.",
    ),
    options.expert_packing,
    options.pickles,
)


@click.command()
@click.argument("adapter", type=options.place)
@wanted
@making.writing
def command(adapter: str, **values: Any) -> None:
    """Write ADAPTER in other ranks, each update the closest to what it was.

    \b
    lorakit resize my-lora/ -o small/ --rank 16
    lorakit resize my-lora/ -o small/ --energy 0.95 --rank 64
    """
    from lorakit.verbs.resize import plan_resize

    ways, run = options.parted(values)
    job = plan_resize(adapter, **values)
    if done := making.ran(job, ways, run):
        _show(done, ways)


def _show(done: "Report[Row]", ways: show.Ways) -> None:
    rows = [
        (
            name,
            len(group),
            making.span([r.rank_before for r in group]),
            making.span([r.rank for r in group]),
            making.share(min(r.retained for r in group)),
        )
        for name, group in making.grouped(done.rows, verbose=ways.verbose)
    ]
    show.table("resize", ("module", "count", "was", "rank", "least kept"), rows)
    click.echo(
        f"{len(done.rows)} weights, each keeps {making.least(done.retained)} of its energy; "
        f"{ways.ending(done.written)}"
    )
