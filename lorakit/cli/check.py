"""`lorakit check`."""

import click

from lorakit.cli import options, parsing, printable, show


@click.command()
@click.argument("adapter", type=options.place)
@click.option(
    "--for",
    "consumer",
    type=parsing.Word("vllm sglang peft llama.cpp mlx diffusers comfyui"),
    required=True,
    metavar="WHAT",
    help="vllm, sglang, peft, llama.cpp, mlx, diffusers or comfyui.",
)
@click.option(
    "--base", type=options.place, default="", metavar="BASE", help="Of an adapter in GGUF."
)
@options.pickles
@options.as_json
@options.quiet
def command(
    adapter: str, *, consumer: str, base: str, allow_pickle: bool, as_json: bool, quiet: bool
) -> None:
    """Say whether ADAPTER loads there as it is, and completely; if not, what to run.

    Reads headers only. Exit code 8 if something is in the way.

    \b
    lorakit check my-lora/ --for vllm
    """
    from lorakit.verbs.check import UnloadableError, check

    try:
        found = check(adapter, consumer, base=base, allow_pickle=allow_pickle)
    except UnloadableError as error:
        if not (as_json or quiet):
            rows = [(o.what, o.then) for o in error.checked.obstacles]
            show.table(f"{consumer} and {printable(adapter)}", ("in the way", "then"), rows)
        raise
    if as_json:
        show.result(found.to_dict())
    elif not quiet:
        click.echo(
            f"{consumer} loads {printable(adapter)} as it is: {found.format}, {found.family}, "
            f"{found.modules} modules."
        )
