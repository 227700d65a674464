"""Markdown pages as tests read them: fenced blocks, commands with the output shown under them.

In output that is shown, `...` (or `…`) stands for anything: alone on a line for any lines, inside a
line for any part of it.
"""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>.*)\n(?P<body>(?:.*\n)*?)(?P=indent)```$", re.M)
TIMEOUT = 120  # seconds a command may take


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is written in, its text, the line of the page it starts on."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Example:
    """A command of a console block and the output shown under it."""

    command: str
    shown: str
    may_fail: bool  # `$ echo $?` follows


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["language"].strip(), textwrap.dedent(m["body"]), text[: m.start()].count("\n") + 2)
        for m in FENCE.finditer(text)
    ]


def examples(text: str) -> list[Example]:
    """The commands of a console block; one whose line ends in a backslash goes on in the next."""
    before, *parts = re.split(r"^\$ ", text, flags=re.M)
    assert before == "", f"output before the first command: {before!r}"
    split = [re.match(r"((?:.*\\\n)*.*)\n?(?s:(.*))", part).groups() for part in parts]
    followers = [command for command, _ in split[1:]] + [""]
    return [
        Example(command, shown, follower.strip() == "echo $?")
        for (command, shown), follower in zip(split, followers, strict=True)
    ]


def matches(shown: str, printed: str) -> bool:
    """Whether what is printed is what is shown, up to dots and blanks at the ends of lines."""
    pattern = ""
    for line in shown.rstrip().splitlines():
        if line.strip() in {"...", "…"}:
            pattern += r"(?:.*\n)*?"
        else:
            pieces = re.split(r"\.\.\.|…", line.rstrip())
            pattern += ".*?".join(map(re.escape, pieces)) + r"\n"
    text = "".join(f"{line.rstrip()}\n" for line in printed.rstrip().splitlines())
    return re.fullmatch(pattern, text) is not None


class Shell:
    """Runs commands in one folder, with a `lorakit` and a `python` that are this interpreter's."""

    def __init__(self, folder: Path, tools: Path) -> None:
        self.folder = folder
        self.status = 0  # `$?`
        self.environment = {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "100",
            "LC_ALL": "C.UTF-8",
            "NO_COLOR": "1",
            "TERM": "dumb",
        }
        python = shlex.quote(sys.executable)
        for name, arguments in {"lorakit": "-m lorakit", "python": ""}.items():
            (tools / name).write_text(f'#!/bin/sh\nexec {python} {arguments} "$@"\n')
            (tools / name).chmod(0o755)

    def run(self, example: Example) -> None:
        """Run a command; fail if it prints anything else than is shown, or fails unforeseen."""
        child = subprocess.run(
            ["bash", "-c", f"(exit {self.status})\n{example.command}"],
            cwd=self.folder,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        self.status = child.returncode
        told = f"$ {example.command}\n{child.stdout}"
        assert matches(example.shown, child.stdout), f"{told}--- is shown as ---\n{example.shown}"
        assert example.may_fail or self.status == 0, f"{told}--- exit code {self.status}"
