"""Options that commands share, and the parsing of sizes and patterns."""

import re
from collections.abc import Callable
from typing import Any

import click

from lorakit.errors import UsageError
from lorakit.tensors import bytes_in


class Size(click.ParamType[int]):
    """A number of bytes: 500MB, 2GB, 1.5GiB, 100000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes that a text like 1.5GiB means."""
        try:
            return bytes_in(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)


class Pattern(click.ParamType[str]):
    """A regular expression; with `pair`, one with what replaces it: REGEX=REPL."""

    name = "regex"

    def __init__(self, *, pair: bool = False) -> None:
        self.pair = pair

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, once it is known to be what it should."""
        if not (value or self.pair):
            return ""  # as by default
        import regex

        pattern, equals, replacement = str(value).partition("=")
        if self.pair and not equals:
            self.fail(f"{value!r} is not REGEX=REPLACEMENT.", param, ctx)
        try:
            regex.sub(pattern if self.pair else str(value), replacement if self.pair else "", "")
        except regex.error as error:
            self.fail(f"{value!r} is no regular expression: {error}.", param, ctx)
        return str(value)


class DeviceName(click.ParamType[str]):
    """What folds: cpu, cuda for every GPU there is, or cuda:N. torch is not asked yet."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, once it is the name of something that could be there."""
        if not re.fullmatch(r"cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r} is no device. Write cpu, cuda or cuda:0.", param, ctx)
        return str(value)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator out of several options, shown in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


output = click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="Where the result goes: a folder, or a file (.safetensors, .gguf).",
)
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


def device(does: str) -> Callable[[Any], Any]:
    """The option for what works on matrices."""
    return click.option(
        "--device",
        type=DeviceName(),
        default="cpu",
        show_default=True,
        metavar="cpu|cuda[:N]",
        help=f"What {does}; cuda is every GPU there is.",
    )


writing = together(
    output,
    click.option(
        "--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing."
    ),
    overwrite,
    click.option(
        "--jobs", type=click.IntRange(min=1), metavar="N", help="Workers. Default: one a core."
    ),
    click.option("--max-memory", type=Size(), help="Refuse to take more than this."),
    device("folds"),
    click.option(
        "--checksum",
        is_flag=True,
        help="Note the sha256 of every weight file in lorakit.json, and hold a base from the hub "
        "against the hub's.",
    ),
    no_fsync,
    as_json,
    quiet,
    verbose,
)
untie = click.option(
    "--untie",
    is_flag=True,
    help="Give embedding and output head a tensor each where only one side changes.",
)
matching = together(
    click.option(
        "--weight",
        "weights",
        type=float,
        multiple=True,
        metavar="W",
        help="Strength of an adapter, once for each; may be negative. Default: 1.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
        default="keep",
        show_default=True,
        help="Dtype of the floating-point tensors of the result.",
    ),
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


def run_options(values: dict[str, Any]) -> Any:
    """The RunOptions among a command's values, which are taken out of them."""
    from lorakit.verbs.job import RunOptions

    return RunOptions(
        jobs=values.pop("jobs"),
        max_memory=values.pop("max_memory"),
        overwrite=values.pop("overwrite"),
        sync=not values.pop("no_fsync"),
        checksum=values.pop("checksum"),
        device=values.pop("device"),
    )
