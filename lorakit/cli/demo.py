"""`lorakit demo`."""

import contextlib
import tempfile
from pathlib import Path

import click

from lorakit.cli import options, printable


@click.command()
@click.option(
    "--keep",
    type=options.place,
    metavar="DIR",
    help="Leave the files in this new folder and run nothing on them.",
)
def command(*, keep: str | None) -> None:
    """Make a tiny base and two adapters, merge, check and combine them, explain one number.

    Needs no network, no GPU and no torch.

    \b
    lorakit demo
    lorakit demo --keep try-it/
    """
    from lorakit.verbs.demo import demo

    if keep:
        demo(keep)
        made, base = map(printable, (keep, str(Path(keep) / "base")))
        click.echo(f"Made {made}: base, style and detail. Try: lorakit inspect {base}")
        return
    with tempfile.TemporaryDirectory(prefix="lorakit-demo-") as folder:
        demo(folder)
        with contextlib.chdir(folder):
            _tour()


def _tour() -> None:
    merge = "merge base style detail -o merged"
    _run("What is this adapter?", "inspect style")
    _run("What would a merge do? Headers only.", f"{merge} --dry-run")
    _run("Merge two adapters, the second at half strength.", f"{merge} --weight 1 --weight 0.5")
    _run("Is the result what it should be? Every number, in float64.", "verify merged --full")
    _explain()
    _run("One adapter out of both.", "combine style detail -o both --weight 1 --weight 0.5")
    _run("How alike are the adapters?", "compare style detail")
    _run("In half of the ranks.", "resize both -o small --rank 6")
    click.secho("\nNext: lorakit demo --keep try-it/, and lorakit merge --help.", bold=True)


def _run(why: str, command: str) -> None:
    from lorakit.cli import cli

    click.secho(f"\n{why}", bold=True)
    click.secho(f"$ lorakit {command}", fg="green")
    cli.main(args=command.split(), standalone_mode=False)


def _explain() -> None:
    """One number of the result, from the numbers that it is made of."""
    from lorakit.verbs.demo.explain import explain

    click.secho("\nWhere one number of the result comes from:", bold=True)
    for line in explain(
        Path("base"),
        [(Path("style"), 1.0), (Path("detail"), 0.5)],
        Path("merged"),
        ("model.layers.1.self_attn.q_proj", 3, 5),
    ):
        click.echo(f"  {line}")
