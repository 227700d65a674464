"""`lorakit inspect`."""

from typing import TYPE_CHECKING

import click

from lorakit.cli import options, printable, show
from lorakit.tensors import size

if TYPE_CHECKING:
    from lorakit.verbs.inspect import Inspected

ROWS = 20  # kinds of tensors that are shown without -v


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

    found = (inspect(p, allow_pickle=allow_pickle) for p in paths)
    if as_json:
        return show.result({"inspected": [f.to_dict() for f in found]})
    for one in found:
        _show(one, verbose=verbose)
    return None


def _show(one: "Inspected", *, verbose: bool) -> None:
    click.echo(printable(f"{one.path}: {one.kind}"))
    facts = {n: _text(n, v) for n, v in one.facts.items()}
    if one.dtypes:
        facts["dtypes"] = ", ".join(f"{d} {size(n)}" for d, n in one.dtypes.items())
    for name, text in facts.items():
        click.echo(printable(f"  {name:<12}{text}"))
    rows = one.groups if verbose else one.groups[:ROWS]
    if rows:
        show.table("", ("tensor", "count", "shape", "dtype"), rows)
    if len(rows) < len(one.groups):
        click.echo(f"  … {len(one.groups) - len(rows)} more kinds of tensors; -v shows them")
    show.notes(one.notes)


def _text(name: str, value: object) -> str:
    if not isinstance(value, int):
        return str(value)
    return size(value) if name == "bytes" else f"{value:,}"
