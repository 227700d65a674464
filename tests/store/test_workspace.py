"""An output is absent, marked partial, or complete; one process builds it; a kill costs nothing."""

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.errors import OutputError
from lorakit.store.workspace import JOURNAL, Workspace, is_file, read_journal
from lorakit.store.writing import write_file

PLAN = {"plan": "a", "inputs": [1, 2]}
OTHER = {"plan": "b", "inputs": [1, 2]}
REPLACED = ".{}.lorakit-replaced"
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


def built(output: Path, files: dict[str, bytes], **options) -> Workspace:
    """A workspace in which these files lie, ready to be committed."""
    space = Workspace(output, PLAN, **options)
    for name, data in files.items():
        write_file(space.folder / name, data, sync=False)
    return space


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def abandoned(output: Path, identity=PLAN, *records) -> None:
    """What a run leaves that was killed after these records."""
    space = Workspace(output, identity)
    (space.folder / "part.partial").write_bytes(b"half")
    for record in records:
        space.record(record)
    space.release()


@pytest.mark.parametrize("sync", [True, False])
def test_an_output_is_partial_until_it_is_committed_and_then_complete(tmp_path, sync):
    out = tmp_path / "out"
    space = built(out, {"a": b"1", "b": b"2"})
    assert names(tmp_path) == ["out.partial"]
    space.commit(sync=sync)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["a", "b"]


@pytest.mark.parametrize("sync", [True, False])
def test_a_lone_file_is_committed_with_its_extras_beside_it(tmp_path, sync):
    out = tmp_path / "out.safetensors"
    space = built(out, {"out.safetensors": b"weights", "lorakit.json": b"{}"})
    assert names(tmp_path) == ["out.safetensors.partial"]
    space.commit(sync=sync)
    assert names(tmp_path) == ["out.lorakit.json", "out.safetensors"]
    assert is_file(out)
    assert not is_file(tmp_path / "out")


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        built(tmp_path / "deep" / "out", {"a": b"1"}).commit(sync=False)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {"deep": 0o777 & ~mask, "out": 0o777 & ~mask, "a": 0o666 & ~mask}


def test_an_output_that_exists_is_not_touched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(OutputError, match="the output exists") as caught:
        Workspace(out, PLAN)
    assert caught.value.exit_code == 7
    assert "--overwrite" in caught.value.hint
    assert names(tmp_path) == ["out"]


def test_a_dangling_link_counts_as_an_output_that_exists(tmp_path):
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists"):
        Workspace(out, PLAN)


def test_overwriting_replaces_the_whole_output_at_the_end(tmp_path):
    out = tmp_path / "out"
    built(out, {"old": b"1", "both": b"1"}).commit(sync=False)
    space = built(out, {"new": b"2", "both": b"2"}, overwrite=True)
    assert names(out) == ["both", "old"]
    space.commit(sync=True)
    assert names(tmp_path) == ["out"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {"new": b"2", "both": b"2"}


def test_overwriting_a_link_replaces_the_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs")
    out = tmp_path / "out"
    out.symlink_to("theirs")
    built(out, {"a": b"1"}, overwrite=True).commit(sync=False)
    assert not out.is_symlink()
    assert names(tmp_path) == ["out", "theirs"]
    assert names(tmp_path / "theirs") == ["file"]


def test_overwriting_a_lone_file_replaces_it(tmp_path):
    out = tmp_path / "out.safetensors"
    for data in (b"old", b"new"):
        built(out, {"out.safetensors": data, "lorakit.json": data}, overwrite=True).commit(
            sync=False
        )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "out.safetensors": b"new",
        "out.lorakit.json": b"new",
    }


def test_a_folder_is_not_replaced_by_a_file_and_nothing_is_built(tmp_path):
    out = tmp_path / "out.safetensors"
    out.mkdir()
    with pytest.raises(OutputError, match="is a folder, and the result is a file"):
        Workspace(out, PLAN, overwrite=True)
    assert names(tmp_path) == ["out.safetensors"]


@pytest.mark.parametrize("length", [237, 238, 247])
def test_an_output_with_a_long_name_can_be_replaced(tmp_path, length):
    out = tmp_path / ("é" * (length // 2) + "n" * (length % 2))
    built(out, {"old": b"1"}).commit(sync=False)
    built(out, {"new": b"2"}, overwrite=True).commit(sync=False)
    assert names(tmp_path) == [out.name]
    assert names(out) == ["new"]


def test_an_old_output_that_is_write_protected_can_be_replaced(outsider):
    out = outsider / "out"
    built(out, {"old": b"1"}).commit(sync=False)
    (out / "sub/deep").mkdir(parents=True)
    (out / "sub/deep/old").write_text("1")
    for folder, mode in ((out / "sub/deep", 0o555), (out / "sub", 0), (out, 0o555)):
        folder.chmod(mode)
    built(out, {"new": b"2"}, overwrite=True).commit(sync=False)
    assert names(outsider) == ["out"]
    assert names(out) == ["new"]


def test_an_old_output_that_cannot_be_removed_is_named(outsider):
    out, old = outsider / "out", outsider / REPLACED.format("out")
    built(out, {"new": b"2"}).commit(sync=False)
    old.mkdir()
    outsider.chmod(0o555)
    with pytest.raises(OutputError, match="old output that was replaced") as caught:
        Workspace(out, PLAN, overwrite=True)
    assert caught.value.file == str(old)
    assert names(out) == ["new"]


def test_what_takes_the_name_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    space = built(out, {"a": b"1"})
    out.mkdir()
    with pytest.raises(OutputError, match="exists"):
        space.commit(sync=False)
    space.release()
    assert names(out) == []
    assert "a" in names(tmp_path / "out.partial")


def test_an_output_may_be_given_by_a_path_without_a_name(tmp_path):
    (tmp_path / "here/sub").mkdir(parents=True)
    with contextlib.chdir(tmp_path):
        built(Path("here/sub/.."), {"a": b"1"}, overwrite=True).commit(sync=False)
    assert names(tmp_path / "here") == ["a"]


@pytest.mark.parametrize("where", [".", "..", "sub/..", "../here"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_current_folder_and_those_around_it_are_no_place_for_an_output(
    tmp_path, where, overwrite
):
    (tmp_path / "here/sub").mkdir(parents=True)
    with contextlib.chdir(tmp_path / "here"), pytest.raises(OutputError, match="current folder"):
        Workspace(Path(where), PLAN, overwrite=overwrite)
    assert names(tmp_path) == ["here"]


def test_the_root_is_no_place_for_an_output():
    with pytest.raises(OutputError, match="no place for an output"):
        Workspace(Path("/"), PLAN, overwrite=True)


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


def test_a_partial_folder_of_somebody_else_is_refused_and_untouched(tmp_path):
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds something else") as caught:
            Workspace(tmp_path / "out", PLAN, overwrite=overwrite)
        assert caught.value.file == str(folder)
    assert names(tmp_path) == ["out.partial"]
    assert names(folder) == ["thesis.tex"]


def test_a_file_in_place_of_the_partial_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written: File exists"):
        Workspace(tmp_path / "out", PLAN)
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_a_run_that_built_nothing_leaves_nothing(tmp_path):
    Workspace(tmp_path / "out", PLAN).release()
    assert names(tmp_path) == []


def test_discarding_leaves_nothing(tmp_path):
    space = built(tmp_path / "out", {"a": b"1"})
    (space.folder / "sub").mkdir()
    space.discard()
    assert names(tmp_path) == []


def test_bytes_that_lie_there_are_counted(tmp_path):
    space = built(tmp_path / "out", {"a": bytes(1 << 20)})
    assert 1 << 20 <= space.nbytes() <= (1 << 20) + (1 << 14)


# What a kill leaves at each moment of the last steps.


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
