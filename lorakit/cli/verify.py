"""`lorakit verify`."""

import click

from lorakit.cli import options, printable, show
from lorakit.tensors import size


@click.command()
@click.argument("output", type=options.place, metavar="OUT")
@click.option("--full", is_flag=True, help="Compute every changed number again, not some blocks.")
@click.option(
    "--base",
    type=options.place,
    default="",
    metavar="PATH",
    help="Where the base is now, if it has moved.",
)
@click.option(
    "--adapter",
    "adapters",
    type=options.place,
    multiple=True,
    metavar="PATH",
    help="Where an adapter is now; for each, in order.",
)
@options.pickles
@options.as_json
@options.quiet
def command(
    output: str,
    *,
    full: bool,
    base: str,
    adapters: tuple[str, ...],
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Hold OUT against its lorakit.json, its base and its adapters.

    Every untouched byte must be the base's. Of every changed tensor some blocks, or with --full
    all, are computed again in float64. Exit code 8 if anything differs.

    \b
    lorakit verify merged/ --full
    """
    from lorakit.verbs.verify import ResultError, verify

    try:
        found = verify(output, full=full, base=base, adapters=adapters, allow_pickle=allow_pickle)
    except ResultError as error:
        differences = error.verified.differences
        if len(differences) > 1 and not (quiet or as_json):
            click.echo("\n".join(map(printable, differences)))
        raise
    if as_json:
        show.result({"output": output, **found.to_dict()})
    elif not quiet:
        share = found.wrong_rounded / max(found.checked_numbers, 1)
        click.echo(
            f"{printable(output)} is what it says: {size(found.copied_bytes)} equal to the base, "
            f"{found.folded_tensors} changed tensors, {found.checked_numbers:,} numbers computed "
            f"again in float64, {100 * share:.4f} % of them one unit in the last place off."
        )
