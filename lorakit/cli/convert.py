"""`lorakit convert`."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lorakit.cli import making, options, parsing, printable, show
from lorakit.tensors import size

if TYPE_CHECKING:
    from lorakit.verbs.convert.changes import Change
    from lorakit.verbs.convert.run import Converted
    from lorakit.verbs.job import RunOptions
    from lorakit.verbs.reformat.report import Reformatted

wanted = options.together(
    click.option(
        "--to",
        type=click.Choice(["peft", "diffusers", "kohya", "comfyui", "mlx", "gguf"]),
        default="peft",
        show_default=True,
        help="The format of the result.",
    ),
    click.option(
        "--family", default="", metavar="F", help="Of the model, where the names do not tell it."
    ),
    click.option(
        "--alpha",
        type=click.Choice(["keep", "fold"]),
        default="keep",
        show_default=True,
        help="Carry scalings where the format has a place for them, or put them into the factors.",
    ),
    click.option(
        "--drop", type=parsing.Pattern(), default="", help="Leave these modules and tensors out."
    ),
    click.option(
        "--keep-unknown", is_flag=True, help="Take tensors along that belong to no module."
    ),
    click.option(
        "--names",
        type=click.Choice(["disk", "runtime-v5"]),
        help="Of a language model: names of the tensors of BASE on disk, or of its model in "
        "transformers 5.",
    ),
    click.option(
        "--experts",
        type=click.Choice(["auto", "fused", "split"]),
        default="auto",
        show_default=True,
        help="Experts of a layer in one stack, or one by one; auto: as the names have them.",
    ),
    click.option(
        "--base",
        type=options.place,
        metavar="BASE",
        help="What the adapter is for: with --names, for GGUF and torchtune, and for flattened "
        "names that no family has.",
    ),
    click.option(
        "--key-map-file",
        "--keymap",
        type=options.place,
        default="",
        metavar="FILE",
        help="A JSON object: modules of ADAPTER, and the names to read them under.",
    ),
    click.option(
        "--clip-prefix",
        type=click.Choice(["text_model", "flat"]),
        default="text_model",
        show_default=True,
        help="Modules of CLIP as they are called everywhere, or flat: as in transformers 5.",
    ),
    click.option(
        "--fix-split-qkv-alpha",
        is_flag=True,
        help="Multiply alphas of fused projections that kohya's split_qkv trained in parts.",
    ),
    click.option(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="Of the training, for torchtune, which does not store it.",
    ),
)
reading = options.together(
    options.key_map, options.expert_packing, options.expert_orientation, options.pickles
)
writing = options.writing("Print which module becomes which; write nothing.")
# Options that are for other formats, not for other names.
OF_FORMATS = (
    *("family", "alpha", "drop", "keep_unknown", "lora_alpha"),
    *("key_map_file", "clip_prefix", "fix_split_qkv_alpha"),
)


@click.command()
@click.argument("adapter", type=options.place)
@wanted
@reading
@writing
def command(adapter: str, **values: Any) -> None:
    """Write ADAPTER, a LoRA file of any format, in the format --to, and say what became of it.

    With --names, an adapter of a language model gets other names: those of transformers 4 have a
    module for each expert; those of transformers 5 have experts in stacks, and other names for
    some models. Either becomes the other, without rounding.

    \b
    lorakit convert kohya.safetensors -o lora/ --to diffusers
    lorakit convert lora/ -o comfy.safetensors --to comfyui
    lorakit convert v4-lora/ -o v5-lora/ --names runtime-v5 --base mixtral/
    """
    ways, run = options.parted(values)
    given = values["base"] and values["to"] == "peft"
    if values["names"] or (given and not _needs_base(adapter, values)):
        return _rename(adapter, values, ways, run)
    return _reformat(adapter, values, ways, run)


def _reformat(adapter: str, values: dict[str, Any], ways: show.Ways, run: "RunOptions") -> None:
    from lorakit.verbs.reformat import plan_reformat

    options = {name: values[name] for name in (*OF_FORMATS, "to", "allow_pickle", "key_map")}
    job = plan_reformat(adapter, **options, base=values["base"] or "")
    job.check(ways.output)
    done = job.report() if ways.dry_run else job.run(ways.output, run)
    ways.notes(done.notes)
    if not ways.told(done):
        _show_formats(done, ways)


def _show_formats(done: "Reformatted", ways: show.Ways) -> None:
    if ways.dry_run or ways.verbose:
        kinds: Counter[tuple[str, str, str]] = Counter()
        for step in done.steps:
            names = (step.modules[0], step.name)
            old, new = names if ways.verbose else map(making.kind, names)
            more = f" and {len(step.modules) - 1} more" if len(step.modules) > 1 else ""
            kinds[step.how, old + more, new] += 1
        rows = [(how, count, old, new) for (how, old, new), count in kinds.items()]
        show.table(f"convert to {done.to}", ("how", "modules", "was", "is"), rows)
    counts = ", ".join(f"{n} {how}" for how, n in done.counts.items())
    lost = f"; {len(done.dropped)} dropped" if done.dropped else ""
    lost += f"; {len(done.carried)} unknown tensors taken along" if done.carried else ""
    lost += f"; rounding moves a factor by {done.error:.1e} at most" if done.error else ""
    click.echo(
        f"{done.format}, {done.family}: {done.modules} modules became {len(done.steps)}: "
        f"{counts}{lost}; {ways.ending(done.written)}"
    )


def _needs_base(adapter: str, values: dict[str, Any]) -> bool:
    from lorakit.verbs.reformat import needs_base

    return needs_base(adapter, allow_pickle=values["allow_pickle"])


def _rename(adapter: str, values: dict[str, Any], ways: show.Ways, run: "RunOptions") -> None:
    from lorakit.verbs.convert import plan_convert

    if not (values["names"] and values["base"]):
        missing = "--base" if values["names"] else "--names"
        raise click.UsageError(f"--names and --base go together: {missing} is missing.")
    for name in OF_FORMATS:
        del values[name]
        if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with --names.")
    job = plan_convert(adapter, **values)
    job.check(ways.output)
    ways.notes(job.notes)
    if ways.dry_run:
        done = job.report()
    else:
        with show.progress(job.nbytes, quiet=ways.quiet) as report:
            done = job.run(ways.output, run.reporting(report))
    if not ways.told(done):
        _show(done, ways)


def _show(done: "Converted", ways: show.Ways) -> None:
    if ways.dry_run or ways.verbose:
        columns = ("how", "modules", "was", "is", "rank")
        show.table(f"convert to {done.names}", columns, _rows(done.changes, ways.verbose))
    counts = ", ".join(f"{n} {how}" for how, n in done.counts.items() if n)
    rounded = f", {done.rounded:,} numbers rounded" if done.rounded else ""
    where = "; nothing was written" if ways.dry_run else f" -> {printable(ways.output)}"
    click.echo(
        f"{done.tensors_before} tensors became {done.tensors}, modules: {counts}{rounded}; "
        f"{size(done.written)}{where}"
    )


def _rows(changes: Sequence["Change"], verbose: bool) -> list[tuple[Any, ...]]:
    """A row for each kind of module, its numbers replaced by `*`; or for each module."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for change in changes:
        names = dict.fromkeys(n if verbose else making.kind(n) for n in change.sources)
        rank = str(change.rank)
        if change.rank != change.rank_before:
            rank = f"{change.rank_before} -> {rank}"
        new = change.name if verbose else making.kind(change.name)
        found[change.how, ", ".join(names), new, rank] += 1
    return [(how, count, old, new, rank) for (how, old, new, rank), count in found.items()]
