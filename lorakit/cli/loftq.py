"""`lorakit loftq`."""

from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, parsing, show
from lorakit.tensors import size

if TYPE_CHECKING:
    from lorakit.verbs.loftq import Report

quantising = options.together(
    click.option(
        "--quant",
        type=parsing.Word("nf4 fp4 int8 uniform normal-float"),
        default="nf4",
        show_default=True,
        metavar="Q",
        help="nf4, fp4, int8, which bitsandbytes loads; uniform, normal-float.",
    ),
    click.option("--bits", type=int, metavar="N", help="2, 3, 4 or 8 for the latter two."),
    click.option("--iters", type=click.IntRange(min=1), metavar="N", help="Default: 5."),
    click.option(
        "--start",
        type=click.Choice(["quant", "lowrank"]),
        default="quant",
        show_default=True,
        help="Quantise first, or take the leading part of a weight out first.",
    ),
    click.option(
        "--absmax",
        type=click.Choice(["plain", "search"]),
        default="plain",
        show_default=True,
        help="The scale of a block: its largest number, or the one of least error.",
    ),
    click.option("--double-quant", is_flag=True, help="Quantise the scales as well."),
    click.option("--block", type=int, metavar="N", help="Elements that share a scale."),
    click.option(
        "--save",
        type=click.Choice(["quantized", "dequantized", "adapter-only"]),
        default="quantized",
        show_default=True,
        help="The base as bitsandbytes loads it, its values in the dtype of BASE, or none.",
    ),
    click.option(
        "--stats",
        type=options.place,
        default="",
        metavar="FILE",
        help="Statistics of inputs, or an imatrix.",
    ),
    click.option("--exact", is_flag=True, help="Whole decompositions: slow, to the last digit."),
)
adapting = options.together(
    options.strength,
    options.rslora,
    options.targets("What is quantised: "),
    click.option("--skip", default="", metavar="NAMES", help="Leave these as they are."),
    options.layers,
    options.patterns,
    options.seed("the searches"),
    options.factors,
    options.pickles,
)


@click.command()
@click.argument("base", type=options.place)
@adapting
@quantising
@making.writing
def command(base: str, **values: Any) -> None:
    """Quantise BASE and write an adapter that makes up for most of what that loses.

    OUT/base and OUT/adapter belong together; transformers and PEFT load them as they are.

    \b
    lorakit loftq llama/ -o out/ --rank 16
    lorakit loftq llama/ -o out/ --rank 64 --absmax search --double-quant --stats imatrix.gguf
    """
    quantise(base, values)


def quantise(base: str, values: dict[str, Any]) -> None:
    """Run it with these options; `lorakit init --method loftq` comes here too."""
    from lorakit.verbs.loftq import plan_loftq

    ways, run = options.parted(values)
    job = plan_loftq(base, **values)
    job.check(ways.output)
    ways.notes(job.notes)
    if ways.dry_run:
        _preview(job, ways)
        return
    with show.steps(len(job.weights), quiet=ways.quiet) as report:
        done = job.run(ways.output, run.reporting(report))
    if not ways.told(done):
        _show(done, ways)


def _preview(job: Any, ways: show.Ways) -> None:
    """The plan: what would be written; nothing is computed."""
    if ways.as_json:
        return show.result({"dry_run": True, "plan": job.plan.to_dict()})
    rows = [
        (name, len(group), " x ".join(map(str, group[0].form.shape)))
        for name, group in making.grouped(
            job.weights, verbose=ways.verbose, name=lambda w: w.form.name
        )
    ]
    show.table("would be quantised", ("module", "count", "shape"), rows)
    click.echo(f"{size(job.plan.nbytes)} in {len(job.plan.files)} files; nothing was written")
    return None


def _show(done: "Report", ways: show.Ways) -> None:
    rows = [
        (
            name.removesuffix(".weight"),
            len(group),
            " x ".join(map(str, group[0].shape)),
            making.span([r.rank for r in group]),
            making.span([r.kept for r in group]),
            f"{max(r.ratio for r in group):.4f}",
        )
        for name, group in making.grouped(done.rows, verbose=ways.verbose)
    ]
    columns = ("module", "count", "shape", "rank", "kept", "left of plain")
    show.table("loftq", columns, rows)
    click.echo(
        f"{len(done.rows)} weights; base and adapter together are off by {done.ratio:.4f} of what "
        f"plain quantisation is: {ways.ending(done.written)}"
    )
