"""`lorakit unmerge`."""

from typing import Any

import click

from lorakit.cli import options
from lorakit.cli.merge import merge_command


@click.command()
@click.argument("merged", type=options.place)
@click.argument("adapters", type=options.place, nargs=-1, required=True)
@options.matching
@options.folding
def command(merged: str, adapters: tuple[str, ...], **values: Any) -> None:
    """Take ADAPTERS out of MERGED again and write the result to OUT.

    Rounding cannot be undone: the closing lines say how far the result may be from the base at
    most. What an adapter replaced as a whole, and DoRA, cannot be taken out; keep the base for
    those.

    \b
    lorakit unmerge merged/ my-lora/ -o base-again/
    """
    merge_command("unmerge", merged, adapters, values)
