"""What a shell and somebody who waits are told: paths to complete, how far it is."""

import os
import subprocess
import sys

import pytest

from lorakit.cli import cli, show
from lorakit.formats.consumers import CONSUMERS
from lorakit.math.combining.methods import METHODS as COMBINING
from lorakit.math.initial import METHODS as STARTS
from lorakit.quant.table import CODECS
from tests.cli.spoil import tensor, write
from tests.pages import ROOT


def started(command, folder, **env):
    """What a command prints where there is no terminal."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True).stdout


def completions(folder, line):
    """What bash is given for the last word of a line."""
    words = line.split(" ")
    env = {
        "_LORAKIT_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [sys.executable, "-c", "from lorakit.cli import main; main()"]
    return started(command, folder, **env).split("\n")[:-1]


@pytest.mark.parametrize(
    "line",
    [
        "lorakit merge ba",
        "lorakit merge base st",
        "lorakit merge base style -o ou",
        "lorakit merge base style --init-adapter st",
        "lorakit verify out --adapter st",
        "lorakit init base --stats st",
        "lorakit convert style --base ba",
    ],
)
def test_a_shell_completes_paths(folder, line):
    assert completions(folder, line) == [f"file,{line.split()[-1]}"]


def test_a_shell_completes_names_of_commands_and_options(folder):
    assert completions(folder, "lorakit me") == ["plain,merge"]
    assert completions(folder, "lorakit merge base style --dt") == ["plain,--dtype"]


@pytest.mark.parametrize(
    ("command", "option", "known"),
    [
        ("check", "--for", CONSUMERS),
        ("combine", "--method", COMBINING),
        ("init", "--method", (*STARTS, "loftq")),
        ("loftq", "--quant", CODECS),
    ],
)
def test_a_shell_completes_the_words_that_an_option_knows(command, option, known):
    found = next(p for p in cli.get_command(None, command).params if option in p.opts)
    words = [item.value for item in found.type.shell_complete(None, found, "")]
    assert sorted(words) == sorted(known)
    first = words[0]
    assert first in [i.value for i in found.type.shell_complete(None, found, first[:2])]


@pytest.mark.parametrize(
    ("way", "told"), [(show.progress, "MB/s"), (show.steps, "50 of 200 weights")]
)
def test_who_has_no_terminal_gets_a_line_now_and_then(monkeypatch, capsys, way, told):
    monkeypatch.setattr(show, "EVERY", 0.0)
    with way(200, quiet=False) as advance:
        advance(50)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("25 %, ")
    assert told in line
    with way(200, quiet=True) as advance:
        advance(50)
    assert capsys.readouterr().err == ""


def test_a_table_has_one_row_a_line_whatever_runners_of_ci_say_of_colours(folder):
    name = "a." * 200 + "weight"
    write(folder / "long.safetensors", {name: tensor((1,))})
    command = [sys.executable, "-m", "lorakit", "inspect", "long.safetensors"]
    assert name in started(command, folder, FORCE_COLOR="1")
