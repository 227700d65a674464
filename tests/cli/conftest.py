"""The demo's files in the folder that a test of the command line runs in, and a way to run it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from lorakit.cli import main
from lorakit.verbs.demo import demo


@dataclass(frozen=True)
class Ran:
    """What a command printed, and the code that it ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object that a command with --json printed."""
        assert self.out.endswith("\n")
        (line,) = self.out.splitlines()
        found = json.loads(line)
        assert found["version"] == 1
        return found


Run = Callable[..., Ran]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`base`, `style` and `detail`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return demo(tmp_path)


@pytest.fixture
def run(folder, capsys) -> Run:
    """`run("merge", "base", ...)`, in this process."""

    def command(*args: str) -> Ran:
        with pytest.raises(SystemExit) as end:
            main(list(args))
        printed = capsys.readouterr()
        return Ran(end.value.code or 0, printed.out, printed.err)

    return command
