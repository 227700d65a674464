"""`lorakit combine`."""

from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, parsing, show

if TYPE_CHECKING:
    from lorakit.verbs.combine.weight import Row
    from lorakit.verbs.making import Report

wanted = options.together(
    click.option(
        "--method",
        type=parsing.Word(
            "linear cat svd ties ties_svd dare_linear dare_linear_svd dare_ties dare_ties_svd "
            "magnitude_prune magnitude_prune_svd slerp della breadcrumbs sce knots tsv"
        ),
        default="linear",
        show_default=True,
        metavar="M",
        help="linear, cat, svd; ties, dare_linear, dare_ties, magnitude_prune (also as ties_svd "
        "…); slerp, della, breadcrumbs, sce, knots, tsv.",
    ),
    options.weights,
    click.option(
        "--rank",
        type=click.IntRange(min=1),
        metavar="R",
        help="Rank of the result. Default: as linear and cat need it, else the largest given.",
    ),
    click.option(
        "--density",
        type=options.unit,
        metavar="D",
        help="Share of each delta that pruning methods keep.",
    ),
    click.option(
        "--majority-sign",
        "majority",
        type=click.Choice(["total", "frequency"]),
        help="How ties elects signs: by the sum of values (the default), or by their number.",
    ),
    click.option(
        "--gamma", type=float, metavar="G", help="breadcrumbs: share of the largest that is cut."
    ),
    click.option(
        "--epsilon", type=float, metavar="E", help="della: how far chances spread around D."
    ),
    options.seed("the random masks of DARE, DELLA"),
    options.exact,
    click.option(
        "--compat",
        type=click.Choice(["peft"]),
        help="The numbers of PEFT's add_weighted_adapter, cross terms included.",
    ),
    click.option(
        "--whole",
        default="",
        metavar="N|average|drop",
        help="Tensors that adapters hold whole (saved modules, biases, token rows), where they "
        "differ: those of adapter N, their average, or none.",
    ),
    options.bases,
    making.dtype,
    options.expert_packing,
    options.pickles,
)


@click.command()
@click.argument("adapters", type=options.place, nargs=-1, required=True, metavar="ADAPTER...")
@wanted
@making.writing
def command(adapters: tuple[str, ...], **values: Any) -> None:
    """Make one adapter out of several, for the same base.

    \b
    lorakit combine a/ b/ -o both/ --weight 0.7 --weight 0.3
    lorakit combine a/ b/ c/ -o merged/ --method ties --density 0.3 --rank 32
    """
    from lorakit.verbs.combine import plan_combine

    ways, run = options.parted(values)
    job = plan_combine(list(adapters), **values)
    if done := making.ran(job, ways, run):
        _show(done, values["method"], ways)


def _show(done: "Report[Row]", method: str, ways: show.Ways) -> None:
    rows = [
        (
            name,
            len(group),
            making.span([len(r.ranks) for r in group]),
            making.span([r.rank for r in group]),
            making.share(min(r.retained for r in group)),
        )
        for name, group in making.grouped(done.rows, verbose=ways.verbose)
    ]
    show.table(method, ("module", "count", "adapters", "rank", "least kept"), rows)
    click.echo(
        f"{len(done.rows)} weights, each keeps {making.least(done.retained)} of the energy of its "
        f"combination; {ways.ending(done.written)}"
    )
