"""Options that commands share."""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.parsing import DeviceName, Pair, Pattern, Place, Size
from lorakit.cli.show import Ways
from lorakit.tensors import CODES

if TYPE_CHECKING:
    from lorakit.verbs.job import RunOptions

# Values of `writing` that go into RunOptions as they are.
RUN = ("jobs", "max_memory", "overwrite", "checksum", "device")


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator out of several options, shown in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


place = Place()
unit = click.FloatRange(0, 1, min_open=True)  # a share
ANYWHERE = "a folder, or a file (.safetensors, .gguf)"
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress, no closing lines.")
verbose = click.option("-v", "--verbose", is_flag=True, help="A line for every tensor.")
pickles = click.option(
    "--allow-pickle", is_flag=True, help="Read .bin files, with torch's weights-only loader."
)
key_map = click.option(
    "--key-map",
    type=Pattern(pair=True),
    multiple=True,
    metavar="REGEX=REPL",
    help="Rename adapter modules before they are looked up; may be repeated.",
)
expert_packing = click.option(
    "--expert-packing",
    type=click.Choice(["peft", "unsloth"]),
    default="peft",
    show_default=True,
    help="How B of fused experts is packed; Unsloth had its own until 2026-09.",
)
expert_orientation = click.option(
    "--expert-orientation",
    type=click.Choice(["auto", "in-out", "out-in"]),
    default="auto",
    show_default=True,
    help="Which way round square fused experts are, where the adapter does not say.",
)
no_fsync = click.option(
    "--no-fsync",
    is_flag=True,
    help="Leave durability to the system: faster, for scratch output.",
)
overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace an output that exists, in one step at the end."
)
weights = click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="Strength of an adapter, once for each; may be negative. Default: 1.",
)
exact = click.option("--exact", is_flag=True, help="A full SVD where a randomised one would do.")
jobs = click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", help="Workers. Default: one a core."
)


def working(does: str) -> Callable[[Any], Any]:
    """What a command may take of the machine, and what there works on matrices."""
    return together(
        jobs,
        click.option("--max-memory", type=Size(), help="Refuse to take more than this."),
        click.option(
            "--device",
            type=DeviceName(),
            default="cpu",
            show_default=True,
            metavar="cpu|cuda[:N]",
            help=f"What {does}; cuda is every GPU there is.",
        ),
    )


def writing(
    dry_run: str, *running: Callable[[Any], Any], where: str = ANYWHERE
) -> Callable[[Any], Any]:
    """Where a result goes, how the command runs, and what is told of it; see `parted`."""
    return together(
        click.option(
            "-o",
            "--output",
            type=place,
            required=True,
            metavar="OUT",
            help=f"Where the result goes: {where}.",
        ),
        click.option("--dry-run", is_flag=True, help=dry_run),
        overwrite,
        *running,
        no_fsync,
        as_json,
        quiet,
        verbose,
    )


def dtype(of: str, *, keep: bool = True) -> Callable[[Any], Any]:
    """The option for a dtype to write: by default that of the input or, without `keep`, float32."""
    names = ["keep", *CODES] if keep else list(CODES)
    return click.option(
        "--dtype",
        type=click.Choice(names),
        default=names[0],
        show_default=True,
        help=f"Dtype of {of}.",
    )


def seed(of: str) -> Callable[[Any], Any]:
    """The option for where random numbers start."""
    return click.option("--seed", type=int, default=0, show_default=True, help=f"Of {of}.")


def targets(means: str = "") -> Callable[[Any], Any]:
    """The option for the modules of a base that get an update."""
    return click.option(
        "--target-modules",
        default="all-linear",
        show_default=True,
        metavar="NAMES",
        help=f"{means}all-linear, names or ends of names with commas between, or a pattern.",
    )


# Of a command that makes updates for a base.
strength = together(
    click.option(
        "--rank", type=click.IntRange(min=1), required=True, metavar="R", help="Of every update."
    ),
    click.option("--alpha", type=float, metavar="A", help="lora_alpha. Default: the rank."),
)
layers = click.option(
    "--layers", default="", metavar="0-7,12", help="Only layers of these numbers."
)
rslora = click.option(
    "--rslora", is_flag=True, help="Rank-stabilised scaling: alpha over root of rank."
)
patterns = together(
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
)
factors = dtype("the factors", keep=False)
# Of a command that sets adapters against each other.
bases = together(
    click.option(
        "--base",
        type=place,
        default="",
        metavar="BASE",
        help="The base, where deltas depend on it: DoRA, PiSSA, OLoRA.",
    ),
    click.option(
        "--base-is-residual",
        is_flag=True,
        help="Adapters that PiSSA, OLoRA … began are for the one base that these left.",
    ),
)
# Of merge and unmerge.
folding = writing(
    "Print the plan; read headers only, write nothing.",
    working("folds"),
    click.option(
        "--checksum",
        is_flag=True,
        help="Note the sha256 of every weight file in lorakit.json, and hold a base from the hub "
        "against the hub's.",
    ),
    where="a folder, or a file that ends in .safetensors",
)
untie = click.option(
    "--untie",
    is_flag=True,
    help="Give embedding and output head a tensor each where only one side changes.",
)
quant = click.option(
    "--quant",
    type=click.Choice(["keep", "dequantize", "keep-touched", "requantize"]),
    default="keep",
    show_default=True,
    help="Of a quantised base, write every weight as its values (dequantize), or only those that "
    "change (keep-touched), or write those as codes again, which loses most of a small delta "
    "(requantize). With keep, none may change.",
)
matching = together(
    weights,
    dtype("the floating-point tensors of the result"),
    key_map,
    click.option(
        "--allow-unmatched",
        type=Pattern(),
        default="",
        metavar="REGEX",
        help="Leave out adapter places that the base lacks and that this matches.",
    ),
    click.option(
        "--component",
        default="",
        metavar="NAME",
        help="Of an adapter for several models of a pipeline, take that for this one: unet, "
        "text_encoder …",
    ),
    click.option(
        "--base-is-residual", is_flag=True, help="BASE is what PiSSA, OLoRA … left of the original."
    ),
    click.option(
        "--init-adapter",
        type=place,
        default="",
        metavar="ADAPTER",
        help="The adapter before training, where that was a CorDA, LoRA-GA or pissa_niter start.",
    ),
    expert_packing,
    expert_orientation,
    click.option(
        "--mha-factor",
        type=click.IntRange(1, 2),
        help="How often the out_proj of a MultiheadAttention is updated. "
        "Default: 2, as PEFT up to 0.21.2 trained it.",
    ),
    click.option(
        "--max-shard-size", type=Size(), help="Cut the result into new shards of at most this size."
    ),
    click.option("--link", is_flag=True, help="Hard-link weight files in which nothing changes."),
    pickles,
)


def parted(values: dict[str, Any]) -> tuple[Ways, "RunOptions"]:
    """How to show a result, and the RunOptions; the values of both are taken out."""
    from lorakit.verbs.job import RunOptions

    ways = Ways(**{field.name: values.pop(field.name) for field in fields(Ways)})
    run = {name: values.pop(name) for name in RUN if name in values}
    return ways, RunOptions(sync=not values.pop("no_fsync"), **run)
