"""`lorakit init`."""

from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, show

if TYPE_CHECKING:
    from lorakit.verbs.initialising import Row
    from lorakit.verbs.making import Report


class Pair(click.ParamType[tuple[str, float]]):
    """REGEX=NUMBER."""

    name = "pair"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """The pattern and its number."""
        if isinstance(value, tuple):
            return value
        pattern, _, number = str(value).rpartition("=")
        options.Pattern().convert(pattern, param, ctx)
        try:
            return pattern, self.kind(number)
        except ValueError:
            self.fail(f"{value!r} is not REGEX=NUMBER.", param, ctx)


wanted = options.together(
    click.option(
        "--rank", type=click.IntRange(min=1), required=True, metavar="R", help="Of every update."
    ),
    click.option("--alpha", type=float, metavar="A", help="lora_alpha. Default: the rank."),
    click.option(
        "--method",
        default="kaiming",
        show_default=True,
        metavar="M",
        help="kaiming, gaussian, orthogonal, random; from the weights: mica, and pissa, "
        "pissa-fast, olora, which change the base; from statistics: eva, and corda, which does; "
        "loftq, which quantises it (see lorakit loftq).",
    ),
    click.option(
        "--target-modules",
        default="all-linear",
        show_default=True,
        metavar="NAMES",
        help="all-linear, names or ends of names with commas between, or a pattern.",
    ),
    click.option(
        "--exclude-modules", default="", metavar="NAMES", help="Leave these out, named likewise."
    ),
    click.option("--layers", default="", metavar="0-7,12", help="Only layers of these numbers."),
    click.option("--experts", is_flag=True, help="The experts of mixtures as well."),
    click.option(
        "--rslora", is_flag=True, help="Rank-stabilised scaling: alpha over root of rank."
    ),
    click.option("--dora", is_flag=True, help="Magnitudes beside the factors (DoRA)."),
    click.option(
        "--rank-pattern",
        type=Pair(int),
        multiple=True,
        metavar="REGEX=R",
        help="Another rank for modules that this matches; may be repeated.",
    ),
    click.option(
        "--alpha-pattern",
        type=Pair(float),
        multiple=True,
        metavar="REGEX=A",
        help="Another alpha for modules that this matches; may be repeated.",
    ),
    click.option("--stats", default="", metavar="FILE", help="Second moments of inputs."),
    click.option(
        "--adapter-only",
        is_flag=True,
        help="No residual base: the adapter is read together with BASE.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of everything that is random."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="Dtype of the factors.",
    ),
    options.pickles,
)


@click.command()
@click.argument("base")
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

    ways, run = making.parted(values)
    job = plan_init(base, **values)
    if done := making.ran(job, ways, run):
        _show(done, ways, pair=job.pair)
    return None


def _quantise(base: str, values: dict[str, Any]) -> None:
    """LoftQ as it is without options of its own, which `lorakit loftq` has."""
    from lorakit.cli.loftq import quantise
    from lorakit.verbs.loftq import options_of_init

    quantise(base, options_of_init(values))


def _show(done: "Report[Row]", ways: dict[str, Any], *, pair: bool) -> None:
    rows = [
        (
            name,
            len(group),
            " x ".join(map(str, group[0].shape)),
            making.span([r.rank for r in group]),
            f"{group[0].scaling:g}",
        )
        for name, group in making.grouped(done.rows, lambda r: r.name, verbose=ways["verbose"])
    ]
    show.table("init", ("module", "count", "shape", "rank", "scaling"), rows)
    beside = " and what is left of the base" if pair and not ways["dry_run"] else ""
    click.echo(
        f"{len(done.rows)} weights; the adapter{beside}: {making.ending(done.written, ways)}"
    )
