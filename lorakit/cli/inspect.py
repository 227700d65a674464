"""`lorakit inspect`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, printable, show
from lorakit.errors import UsageError
from lorakit.tensors import size

if TYPE_CHECKING:
    from lorakit.verbs.inspect.kinds import Inspected
    from lorakit.verbs.inspect.spectra import Spectrum

ROWS = 20  # kinds of tensors that are shown without -v


@click.command()
@click.argument("paths", type=options.place, nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--spectrum", is_flag=True, help="The singular values of an adapter too; reads its factors."
)
@click.option(
    "--plot",
    type=options.place,
    default="",
    metavar="FILE",
    help="Draw singular values, and norms by layer, to a .png, .svg or .pdf (needs matplotlib).",
)
@options.overwrite
@options.expert_packing
@options.pickles
@options.as_json
@options.verbose
def command(paths: tuple[str, ...], *, as_json: bool, verbose: bool, **values: Any) -> None:
    """Say what each PATH is: base, adapter, index or a file of tensors. Reads headers only.

    \b
    lorakit inspect my-lora/ llama/
    lorakit inspect my-lora/ --spectrum --plot my-lora.png
    """
    from lorakit.verbs.inspect import inspect

    if values["plot"] and len(paths) > 1:
        raise UsageError(f"--plot draws one adapter; {len(paths)} paths are given.")
    found = (inspect(p, **values) for p in paths)
    if as_json:
        return show.result({"inspected": [f.to_dict() for f in found]})
    for one in found:
        _show(one, verbose=verbose)
    if values["plot"]:
        click.echo(f"drawn -> {printable(values['plot'])}")
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
    if one.spectra is not None:
        _show_spectra(one.spectra, verbose=verbose)
    show.notes(one.notes)


def _show_spectra(spectra: Sequence["Spectrum"], *, verbose: bool) -> None:
    """Of each kind of module the means, of ranks that are needed the largest, of shares the sum."""
    columns = ("module", "count", "rank", "norm", "share", "largest", "eff. rank", "90 %", "99 %")
    rows = [
        (
            name.removesuffix(".weight"),
            len(group),
            making.span([s.rank for s in group]),
            f"{sum(s.norm for s in group) / len(group):.3g}",
            f"{100 * sum(s.share for s in group):.1f} %",
            f"{max(s.largest for s in group):.3g}",
            f"{sum(s.effective_rank for s in group) / len(group):.1f}",
            max(s.rank_90 for s in group),
            max(s.rank_99 for s in group),
        )
        for name, group in making.grouped(spectra, verbose=verbose)
    ]
    show.table("singular values", columns, rows)


def _text(name: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "nothing"
    if isinstance(value, dict):
        return ", ".join(f"{v} ({n}×)" if len(value) > 1 else str(v) for v, n in value.items())
    if not isinstance(value, int):
        return str(value)
    return size(value) if name == "bytes" else f"{value:,}"
