"""`lorakit init`."""

from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, parsing, show

if TYPE_CHECKING:
    from lorakit.verbs.init.weight import Row
    from lorakit.verbs.making import Report

wanted = options.together(
    options.strength,
    click.option(
        "--method",
        type=parsing.Word(
            "kaiming gaussian random orthogonal mica pissa pissa-fast olora eva corda loftq"
        ),
        default="kaiming",
        show_default=True,
        metavar="M",
        help="kaiming, gaussian, orthogonal, random; from the weights: mica, and pissa, "
        "pissa-fast, olora, which change the base; from statistics: eva, and corda, which does; "
        "loftq, which quantises it (see lorakit loftq).",
    ),
    options.targets(),
    click.option(
        "--exclude-modules", default="", metavar="NAMES", help="Leave these out, named likewise."
    ),
    options.layers,
    click.option("--experts", is_flag=True, help="The experts of mixtures as well."),
    options.rslora,
    click.option("--dora", is_flag=True, help="Magnitudes beside the factors (DoRA)."),
    options.patterns,
    click.option(
        "--stats",
        type=options.place,
        default="",
        metavar="FILE",
        help="Second moments of inputs.",
    ),
    click.option(
        "--adapter-only",
        is_flag=True,
        help="No residual base: the adapter is read together with BASE.",
    ),
    options.seed("everything that is random"),
    options.factors,
    options.pickles,
)


@click.command()
@click.argument("base", type=options.place)
@wanted
@making.writing
def command(base: str, **values: Any) -> None:
    """Write a fresh adapter for BASE, ready to be trained.

    Methods that change the base write OUT/adapter and OUT/base, which together are BASE.

    \b
    lorakit init llama/ -o lora/ --rank 16 --alpha 32
    lorakit init llama/ -o pissa/ --rank 64 --method pissa
    """
    if values["method"] == "loftq":
        return _quantise(base, values)
    from lorakit.verbs.init import plan_init

    ways, run = options.parted(values)
    job = plan_init(base, **values)
    if done := making.ran(job, ways, run):
        _show(done, ways, pair=job.pair)
    return None


def _quantise(base: str, values: dict[str, Any]) -> None:
    """LoftQ as it is without options of its own, which `lorakit loftq` has."""
    from lorakit.cli.loftq import quantise
    from lorakit.verbs.loftq import options_of_init

    quantise(base, options_of_init(values))


def _show(done: "Report[Row]", ways: show.Ways, *, pair: bool) -> None:
    rows = [
        (
            name,
            len(group),
            " x ".join(map(str, group[0].shape)),
            making.span([r.rank for r in group]),
            f"{group[0].scaling:g}",
        )
        for name, group in making.grouped(done.rows, verbose=ways.verbose)
    ]
    show.table("init", ("module", "count", "shape", "rank", "scaling"), rows)
    beside = " and what is left of the base" if pair and not ways.dry_run else ""
    click.echo(f"{len(done.rows)} weights; the adapter{beside}: {ways.ending(done.written)}")
