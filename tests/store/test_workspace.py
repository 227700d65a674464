"""An output is absent, marked partial, or complete, and nothing that is there is lost."""

import contextlib
import os
import stat
from pathlib import Path

import pytest

from lorakit.errors import OutputError
from lorakit.store.workspace import Workspace, is_file
from tests.store.workspace_scene import PLAN, REPLACED, built, names


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
