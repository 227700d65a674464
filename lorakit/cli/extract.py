"""`lorakit extract`."""

from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, parsing, show

if TYPE_CHECKING:
    from lorakit.verbs.extract.weight import Row
    from lorakit.verbs.making import Report

wanted = options.together(
    click.option(
        "--adapter",
        type=options.place,
        default="",
        metavar="ADAPTER",
        help="Instead of TUNED: an adapter (DoRA, PiSSA …) whose change is wanted as plain LoRA.",
    ),
    click.option(
        "--rank",
        type=click.IntRange(min=1),
        required=True,
        metavar="R",
        help="The rank of each update; with --energy, the largest.",
    ),
    click.option(
        "--energy",
        type=options.unit,
        metavar="E",
        help="As few ranks as hold this share of the squared norm of a difference.",
    ),
    options.exact,
    click.option(
        "--min-diff",
        type=click.FloatRange(min=0),
        default=0.0,
        metavar="X",
        help="Leave out weights whose largest difference is below X.",
    ),
    click.option(
        "--clamp-quantile",
        type=click.FloatRange(0.5, 1, min_open=True),
        metavar="Q",
        help="Cut factors off at this quantile of their values, as kohya's tool does at 0.99.",
    ),
    click.option(
        "--target-modules",
        type=parsing.Pattern(),
        default="",
        metavar="REGEX",
        help="Only modules whose name this matches get factors.",
    ),
    click.option(
        "--exclude-modules",
        type=parsing.Pattern(),
        default="",
        metavar="REGEX",
        help="Modules whose name this matches get none.",
    ),
    click.option(
        "--other",
        type=click.Choice(["save", "drop"]),
        default=None,
        help="Tensors that differ and get no factors: carry them whole, or leave them out.",
    ),
    options.factors,
    options.expert_packing,
    options.pickles,
)


@click.command()
@click.argument("base", type=options.place)
@click.argument("tuned", type=options.place, default="")
@wanted
@making.writing
def command(base: str, tuned: str, **values: Any) -> None:
    """Write the LoRA that brings BASE near TUNED, a full fine-tune of it.

    \b
    lorakit extract llama/ my-finetune/ -o lora/ --rank 64
    lorakit extract llama/ --adapter my-dora/ -o plain/ --rank 32
    """
    from lorakit.verbs.extract import plan_extract

    ways, run = options.parted(values)
    values["other"] = values["other"] or ""
    job = plan_extract(base, tuned, **values)
    if done := making.ran(job, ways, run):
        _show(done, ways)


def _show(done: "Report[Row]", ways: show.Ways) -> None:
    rows = [
        (
            name,
            len(group),
            making.span([r.rank for r in group]),
            making.share(min(r.retained for r in group)),
            f"{max(r.residual for r in group):.3g}",
            f"{max(r.largest for r in group):.3g}",
        )
        for name, group in making.grouped(done.rows, verbose=ways.verbose)
    ]
    columns = ("module", "count", "rank", "least kept", "norm left", "largest change")
    show.table("extract", columns, rows)
    same = f", {done.left_out} left out" if done.left_out else ""
    click.echo(
        f"{len(done.rows)} weights{same}, each keeps {making.least(done.retained)} of the energy "
        f"of its difference; {ways.ending(done.written)}"
    )
