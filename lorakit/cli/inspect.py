"""`lorakit inspect`."""

import click

from lorakit.cli import options, printable, show
from lorakit.tensors import size


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@options.pickles
@options.as_json
@options.verbose
def command(paths: tuple[str, ...], *, allow_pickle: bool, as_json: bool, verbose: bool) -> None:
    """Say what each PATH is: base, adapter, index or a file of tensors. Reads headers only.

    \b
    lorakit inspect my-lora/ llama/
    """
    from lorakit.verbs.inspect import inspect

    found = [inspect(p, allow_pickle=allow_pickle) for p in paths]
    if as_json:
        return show.result({"inspected": [f.to_dict() for f in found]})
    for one in found:
        click.echo(printable(f"{one.path}: {one.kind}"))
        for name, value in one.facts.items():
            text = (
                size(value)
                if name == "bytes"
                else f"{value:,}"
                if isinstance(value, int)
                else value
            )
            click.echo(printable(f"  {name:<12}{text}"))
        if one.dtypes:
            click.echo(
                "  dtypes      " + ", ".join(f"{d} {size(n)}" for d, n in one.dtypes.items())
            )
        rows = one.groups if verbose else one.groups[:20]
        show.table("", ("tensor", "count", "shape", "dtype"), rows)
        if len(rows) < len(one.groups):
            click.echo(f"  … {len(one.groups) - len(rows)} more kinds of tensors; -v shows them")
        show.notes(one.notes)
    return None
