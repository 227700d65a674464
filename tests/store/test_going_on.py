"""What a run that stopped leaves: the next one of the same plan goes on with it, and no other
touches it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.errors import OutputError
from lorakit.store.journal import JOURNAL, read_journal
from lorakit.store.workspace import Workspace
from tests.store.workspace_scene import PLAN, REPLACED, built, names

OTHER = {"plan": "b", "inputs": [1, 2]}
ROOT = Path(__file__).parent.parent.parent

# Holds a workspace until it is killed, or told to end.
HOLDER = """
import sys
from pathlib import Path
from lorakit.store.workspace import Workspace
space = Workspace(Path(sys.argv[1]), {"plan": "a", "inputs": [1, 2]})
(space.folder / "part").write_bytes(b"built")
space.record({"file": "part", "done": True})
"""
WAIT = """
print("held", flush=True)
sys.stdin.read()
"""
FORK = """
import os
waiting, told = os.pipe()
if not os.fork():
    os.write(told, b"x")
    sys.stdin.read()
    os._exit(0)
os.read(waiting, 1)
"""


def abandoned(output: Path, identity=PLAN, *records) -> None:
    """What a run leaves that was killed after these records."""
    space = Workspace(output, identity)
    (space.folder / "part.partial").write_bytes(b"half")
    for record in records:
        space.record(record)
    space.release()


def test_a_second_run_of_the_same_plan_goes_on(tmp_path):
    out = tmp_path / "out"
    abandoned(out, PLAN, {"file": "x", "steps": 3}, {"file": "x", "steps": 5})
    space = Workspace(out, PLAN)
    assert space.records == [PLAN, {"file": "x", "steps": 3}, {"file": "x", "steps": 5}]
    assert (space.folder / "part.partial").read_bytes() == b"half"
    space.record({"file": "x", "done": True})
    assert len(read_journal(space.folder / JOURNAL)) == 4
    space.release()


def test_what_json_writes_otherwise_is_the_same_plan_again(tmp_path):
    plan = {"weights": (1.0, -0.5), "parts": {"by": (1, ("a", "b"))}, 3: None}
    abandoned(tmp_path / "out", plan, {"file": "x", "steps": 1})
    assert Workspace(tmp_path / "out", plan).records[1:] == [{"file": "x", "steps": 1}]
    with pytest.raises(OutputError):
        Workspace(tmp_path / "out", {**plan, "weights": (1.0, 0.5)})


def test_another_plan_is_refused_and_nothing_of_the_first_is_lost(tmp_path):
    out = tmp_path / "out"
    abandoned(out)
    with pytest.raises(OutputError, match="unfinished run with other inputs or options") as caught:
        Workspace(out, OTHER)
    assert "--overwrite" in caught.value.hint
    assert Workspace(out, PLAN).records == [PLAN]
    assert (tmp_path / "out.partial" / "part.partial").read_bytes() == b"half"


def test_another_plan_starts_over_when_told_to(tmp_path):
    out = tmp_path / "out"
    abandoned(out, PLAN, {"file": "x", "steps": 3})
    with pytest.raises(OutputError):
        Workspace(out, OTHER)
    space = Workspace(out, OTHER, overwrite=True)  # the refusal above holds no lock
    assert space.records == []
    assert names(space.folder) == [JOURNAL]
    assert read_journal(space.folder / JOURNAL) == [OTHER]


@pytest.mark.parametrize("damage", ['{"file":"x","st', "\0\0\0\0\n", "7\n", "[]\n", '{"a":1}{}\n'])
def test_a_journal_is_read_as_far_as_it_is_whole(tmp_path, damage):
    out = tmp_path / "out"
    abandoned(out, PLAN, {"file": "x", "steps": 3})
    journal = tmp_path / "out.partial" / JOURNAL
    with journal.open("a") as f:
        f.write(damage)
    space = Workspace(out, PLAN)
    assert space.records == [PLAN, {"file": "x", "steps": 3}]
    space.record({"file": "x", "steps": 4})
    assert read_journal(journal) == [PLAN, {"file": "x", "steps": 3}, {"file": "x", "steps": 4}]


def test_a_run_that_cannot_go_on_begins_anew(tmp_path):
    out = tmp_path / "out"
    abandoned(out, PLAN, {"file": "x", "steps": 3})
    space = Workspace(out, PLAN, keep=False)
    assert space.records == []
    assert names(space.folder) == [JOURNAL]
    assert read_journal(space.folder / JOURNAL) == [PLAN]


@pytest.mark.parametrize("length", [0, 5])
def test_a_journal_without_a_whole_line_starts_over(tmp_path, length):
    out = tmp_path / "out"
    abandoned(out)
    os.truncate(tmp_path / "out.partial" / JOURNAL, length)
    space = Workspace(out, PLAN)
    assert names(space.folder) == [JOURNAL]
    assert read_journal(space.folder / JOURNAL) == [PLAN]


def test_a_kill_before_the_new_output_took_the_name_of_the_old_is_mended(tmp_path):
    out = tmp_path / "out"
    built(out, {"old": b"1"}).commit(sync=False)
    built(out, {"new": b"2"}, overwrite=True).release()
    out.rename(tmp_path / REPLACED.format("out"))
    space = Workspace(out, PLAN, overwrite=True)
    assert space.records == [PLAN]
    space.commit(sync=False)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_after_the_output_got_its_name_leaves_only_what_is_swept(tmp_path, overwrite):
    out = tmp_path / "out"
    built(out, {"new": b"2"}).commit(sync=False)
    (out / JOURNAL).write_text(json.dumps(PLAN) + "\n")
    replaced = tmp_path / REPLACED.format("out")
    replaced.mkdir()
    (replaced / "old").write_text("1")
    if overwrite:
        Workspace(out, PLAN, overwrite=True).release()
    else:
        with pytest.raises(OutputError, match="exists"):
            Workspace(out, PLAN)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new"]


@pytest.mark.parametrize("left", [[], [JOURNAL]])
def test_a_kill_after_a_lone_file_got_its_name_leaves_only_what_is_swept(tmp_path, left):
    out = tmp_path / "out.safetensors"
    out.write_text("weights")
    folder = tmp_path / "out.safetensors.partial"
    folder.mkdir()
    for name in left:
        (folder / name).write_text(json.dumps(PLAN) + "\n")
    with pytest.raises(OutputError, match="exists"):
        Workspace(out, PLAN)
    assert names(tmp_path) == ["out.safetensors"]


def holding(output: Path, script: str = HOLDER + WAIT) -> subprocess.Popen:
    """Another process that holds the workspace of an output."""
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(output)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    return child


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_process_is_refused_and_after_a_kill_goes_on(tmp_path, overwrite):
    out = tmp_path / "out"
    with holding(out) as child:
        with pytest.raises(OutputError, match="another process is writing") as caught:
            Workspace(out, PLAN, overwrite=overwrite)
        assert caught.value.exit_code == 7
        assert sorted(names(tmp_path / "out.partial")) == [JOURNAL, "part"]
        child.kill()
        child.wait()
        space = Workspace(out, PLAN, overwrite=overwrite)
    assert space.records == [PLAN, {"file": "part", "done": True}]
    space.commit(sync=False)
    assert names(out) == ["part"]


def test_a_fork_that_outlives_a_killed_process_holds_nothing(tmp_path):
    with holding(tmp_path / "out", HOLDER + FORK + WAIT) as child:
        child.kill()
        child.wait()
        Workspace(tmp_path / "out", PLAN).commit(sync=False)  # while the fork waits for an input


def test_two_workspaces_of_one_process_exclude_each_other_too(tmp_path):
    first = Workspace(tmp_path / "out", PLAN)
    with pytest.raises(OutputError, match="another process"):
        Workspace(tmp_path / "out", PLAN)
    first.release()
    Workspace(tmp_path / "out", PLAN).release()
