"""Every wrong input is refused with its exit code and one line, and docs/reference/exit-codes.md
shows that line.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit import errors
from tests.cli.wrong_inputs import WRONG
from tests.pages import ROOT, matches

PAGE = (ROOT / "docs/reference/exit-codes.md").read_text()
ROW = re.compile(
    r"^\| (?P<title>[^|]*?) \| (?P<ticks>`+) ?(?P<line>Error: .*?) ?(?P=ticks) \|$", re.M
)
SECTION = re.compile(r"^## (\d+): ", re.M)


def shown() -> dict[str, tuple[int, str]]:
    """Of every row of the page: the exit code of its section, and the line."""
    _, *parts = SECTION.split(PAGE)
    sections = zip(map(int, parts[::2]), parts[1::2], strict=True)
    return {
        row["title"]: (code, row["line"]) for code, text in sections for row in ROW.finditer(text)
    }


EXPECTED = shown()
# The command, which Ctrl-C reaches as it opens the adapter.
INTERRUPTED = """
import signal, sys
from lorakit.cli import main
def press(event, args):
    if event == "open" and str(args[0]).endswith("style/adapter_model.safetensors"):
        signal.raise_signal(signal.SIGINT)
sys.addaudithook(press)
main()
"""


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file in a folder."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def test_the_page_and_the_wrong_inputs_are_the_same():
    assert EXPECTED.keys() == WRONG.keys()
    assert PAGE.count("`Error:") + PAGE.count("`` Error:") == len(EXPECTED) + 1


@pytest.mark.parametrize("title", WRONG)
def test_a_wrong_input_ends_with_its_code_and_the_line_that_the_page_shows(title, run, folder):
    command = WRONG[title]()
    before = files(folder)
    ran = run(*command)
    lines = [line for line in ran.err.splitlines() if line.startswith("Error:")]
    code, line = EXPECTED[title]
    assert (ran.code, len(lines)) == (code, 1), ran.err
    assert matches(f"{line}\n", f"{lines[0]}\n"), f"{lines[0]}\n--- is shown as ---\n{line}"
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert files(folder) == before  # nothing was written, nothing left behind


@pytest.mark.parametrize("title", [t for t, (code, _) in EXPECTED.items() if code != 2])
def test_with_json_the_same_is_one_object_on_stdout(title, run):
    ran = run(*WRONG[title](), *([] if title.startswith("demo") else ["--json"]))
    if title.startswith("demo"):
        return
    (line,) = ran.out.splitlines()
    error = json.loads(line)["error"]
    (kind,) = (k for k in errors.LorakitError.__subclasses__() if k.exit_code == ran.code)
    assert error["code"] == kind.code
    assert error["message"] in ran.err
    assert error["hint"] in ran.err


def test_every_exit_code_is_in_the_table_of_the_page():
    table = PAGE[: PAGE.index("Every failure")]
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)}
    classes = [errors.LorakitError, *errors.LorakitError.__subclasses__()]
    assert told == {0, 130, *(c.exit_code for c in classes)}


def test_an_interrupted_command_ends_with_130_and_one_line(folder):
    command = [sys.executable, "-c", INTERRUPTED, "merge", "base", "style", "-o", "merged"]
    child = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 130
    assert child.stderr.strip() == "Interrupted. The same command goes on where it stopped."


def test_a_reader_that_goes_away_is_no_traceback(folder):
    command = f"{sys.executable} -m lorakit inspect base base base --json | true"
    child = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.stderr == ""


def test_a_traceback_is_shown_on_request_only(run, monkeypatch):
    assert "Traceback" not in run("verify", "base").err
    monkeypatch.setenv("LORAKIT_DEBUG", "1")
    assert "Traceback" in run("verify", "base").err
