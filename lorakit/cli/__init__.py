"""The command line. Each command parses, calls one verb and prints; nothing else.

stdout carries the result, stderr progress and warnings. A LorakitError is one line and its exit
code; anything else is a bug and keeps its traceback.
"""

import importlib
import io
import json
import os
import sys
from contextlib import suppress
from typing import Any

import click

from lorakit import __version__
from lorakit.errors import SCARCE, LorakitError, ResourceError, UsageError, scarce

# A new command: a module here, a name there.
COMMANDS = {
    "check": "say whether an adapter loads in vLLM, Diffusers, ComfyUI and others",
    "combine": "make one adapter out of several",
    "compare": "say how alike adapters are, weight by weight and over all",
    "convert": "write a LoRA file in another format, or under other names",
    "demo": "make a tiny base and adapter here, merge and verify them",
    "edit": "rename, drop or rescale modules of an adapter",
    "extract": "make the LoRA that brings a base near a fine-tuned model",
    "init": "write a fresh adapter for a base",
    "inspect": "say what a file, folder or hub repository is, from headers alone",
    "loftq": "quantise a base, with an adapter that makes up for what that loses",
    "merge": "fold adapters into a base checkpoint",
    "resize": "write an adapter in fewer ranks",
    "unmerge": "take adapters out of a merged checkpoint again",
    "verify": "hold a result against its manifest, base and adapters",
}

NO_THREAD = "can't start new thread"  # Python, where a limit on processes or memory allows no more

# For every command. click does not look at NO_COLOR (no-color.org) by itself.
SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "color": False if os.environ.get("NO_COLOR") else None,
}


class Cli(click.Group):
    """A group that imports a command's module when the command is used, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name, loaded now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lorakit.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is meant; a near miss is named."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table: importing them would cost time."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Cli, context_settings=SETTINGS)
@click.version_option(__version__)
def cli() -> None:
    """Merge, check and explain LoRA adapters on checkpoint files, offline, without a model.

    \b
    Inputs are paths or hub ids: org/name[@revision][/subfolder].
    Exit codes: 0 done, 1 failed, 2 usage, 3 input corrupt or refused, 4 adapter
    does not fit, 5 disk or memory, 6 hub, 7 output exists or is busy,
    8 differences found, 130 interrupted.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Every worker multiplies in one thread; those that OpenBLAS starts would wait in a busy loop.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _prepare_streams()
    wanted = sys.argv[1:] if args is None else args
    as_json = "--json" in wanted
    try:
        sys.exit(cli.main(args=wanted, prog_name="lorakit", standalone_mode=False))
    except LorakitError as error:
        _fail(error, as_json=as_json)
    except click.ClickException as error:
        if as_json:
            show_error(UsageError(error.format_message()))
        with suppress(OSError):
            error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        resumes = wanted[:1] in (["merge"], ["unmerge"], ["loftq"])
        more = " The same command goes on where it stopped." if resumes else ""
        with suppress(OSError):
            click.echo(f"Interrupted.{more}", err=True)
        sys.exit(130)
    except BrokenPipeError:
        _silence()
        sys.exit(1)
    except MemoryError:
        _fail(ResourceError("out of memory.", hint="Lower --jobs."), as_json=as_json)
    except RuntimeError as error:
        if str(error) != NO_THREAD:
            raise
        _fail(ResourceError(f"{error}.", hint="Lower --jobs."), as_json=as_json)
    except OSError as error:
        file = error.filename or ""
        failed = LorakitError(f"{error.strerror or error}.", file=file)
        _fail(scarce(error, file) if error.errno in SCARCE else failed, as_json=as_json)


def _prepare_streams() -> None:
    """Give streams that are closed a place to go, lest a file that is written get their number; and
    print what a terminal has no letters for in others.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(error: LorakitError, *, as_json: bool) -> Any:
    if os.environ.get("LORAKIT_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if as_json:
        show_error(error)
    with suppress(OSError):
        click.echo(f"Error: {printable(str(error))}", err=True)
    sys.exit(error.exit_code)


def show_error(error: LorakitError) -> None:
    """The one JSON object on stdout of a command that failed, if it can still be told there."""
    try:
        click.echo(json.dumps({"version": 1, "error": error.to_dict()}))
    except OSError:
        _silence()


def _silence() -> None:
    """Have stdout lead nowhere: what it could not take is not tried again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """The text in one line, with control characters of untrusted names escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
