"""Inputs stay what they are: no output takes the place of one, or of what one leads to by links."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.errors import OutputError, UsageError
from lorakit.store.workspace import Workspace
from lorakit.verbs.job import RunOptions

REPLACE = RunOptions(overwrite=True, sync=False, jobs=1)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERIES = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def here(made, tmp_path):
    """The demo's files, which may be moved about."""
    for name in ("base", "style", "detail"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def linked(file, place):
    """Move a file to another place, and leave a link to it."""
    place.parent.mkdir(exist_ok=True)
    file.rename(place)
    file.symlink_to(os.path.relpath(place, file.parent))


def merge(here, out):
    return lorakit.merge(here / "base", here / "style", out, run=REPLACE)


def edit(here, out):
    return lorakit.edit(here / "style", out, scale=2.0, run=REPLACE)


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(here, call, place, said="which is never written to"):
    before = files(here)
    with pytest.raises(OutputError, match=said):
        call(here / place)
    assert files(here) == before


@pytest.mark.parametrize("place", ["style", "blobs", "blobs/it", "blobs/config", "hop"])
@pytest.mark.parametrize("verb", ["merge", "edit", "resize", "combine", "convert", "names"])
def test_an_adapter_of_links_is_an_input_where_it_lies_and_where_they_lead(here, verb, place):
    linked(here / "style" / WEIGHTS, here / "blobs/it")
    linked(here / "style" / CONFIG, here / "blobs/config")
    linked(here / "style" / WEIGHTS, here / "hop/link")
    base, style = here / "base", here / "style"
    calls = {
        "merge": lambda out: merge(here, out),
        "edit": lambda out: edit(here, out),
        "resize": lambda out: lorakit.resize(style, out, rank=1, run=REPLACE),
        "combine": lambda out: lorakit.combine([style, style], out, run=REPLACE),
        "convert": lambda out: lorakit.convert(style, out, to="mlx", run=REPLACE),
        "names": lambda out: lorakit.convert(style, out, base=base, names="disk", run=REPLACE),
    }
    refused(here, calls[verb], place)


@pytest.mark.parametrize("place", ["base", "data", "data/config.json", "."])
@pytest.mark.parametrize("verb", ["merge", "extract", "init", "loftq", "combine", "gguf", "names"])
def test_a_base_of_links_is_an_input_where_it_lies_and_where_they_lead(here, verb, place):
    for file in sorted((here / "base").iterdir()):
        linked(file, here / "data" / file.name)
    base, style = here / "base", here / "style"
    calls = {
        "merge": lambda out: merge(here, out),
        "extract": lambda out: lorakit.extract(base, base, out, rank=1, run=REPLACE),
        "init": lambda out: lorakit.init(base, out, rank=1, run=REPLACE),
        "loftq": lambda out: lorakit.loftq(base, out, rank=1, run=REPLACE),
        "combine": lambda out: lorakit.combine([style] * 2, out, base=base, run=REPLACE),
        "gguf": lambda out: lorakit.convert(style, out, to="gguf", base=base, run=REPLACE),
        "names": lambda out: lorakit.convert(style, out, base=base, names="disk", run=REPLACE),
    }
    refused(here, calls[verb], place)


def test_a_lone_file_that_a_shard_leads_to_is_not_overwritten(here):
    shard = "model-00001-of-00003.safetensors"
    linked(here / "base" / shard, here / "real.safetensors")
    refused(here, lambda out: merge(here, out), "real.safetensors")


def test_links_that_lead_nowhere_or_in_circles_hinder_nothing(here):
    (here / "base/.nowhere").symlink_to("gone")
    (here / "base/.circle").symlink_to(".circle")
    (here / "base/elsewhere").symlink_to(here)
    merge(here, here / "out")
    assert lorakit.verify(here / "out").differences == ()


@pytest.mark.parametrize("verb", ["init", "loftq"])
def test_statistics_are_an_input(here, verb):
    (here / "stats").mkdir()
    moments = {"model.layers.0.self_attn.q_proj": np.ones(64, "f4")}
    save_file(moments, here / "stats/stats.safetensors")
    more = {"init": {"method": "eva"}, "loftq": {}}[verb]
    more |= {"rank": 1, "stats": here / "stats/stats.safetensors", "run": REPLACE}
    more["target_modules"] = "layers.0.self_attn.q_proj"
    refused(here, lambda out: getattr(lorakit, verb)(here / "base", out, **more), "stats")


def test_a_key_map_is_an_input(here):
    (here / "map").mkdir()
    table = here / "map/map.json"
    table.write_text(json.dumps({QUERIES: QUERIES}))
    options = {"to": "peft", "key_map_file": table, "run": REPLACE}
    refused(here, lambda out: lorakit.convert(here / "style", out, **options), "map")


@pytest.mark.parametrize("place", [".", "..", "../now", "../../near"])
def test_the_current_folder_is_not_replaced(here, place):
    now = here / "near/now"
    now.mkdir(parents=True)
    (now / "mine").write_text("mine")
    with contextlib.chdir(now):
        refused(here, lambda _: edit(here, place), ".", "current folder")


def test_what_a_killed_edit_left_is_no_part_of_the_next(here):
    job = lorakit.plan_edit(here / "style", scale=2.0)
    killed = {"edit": dict(job.options), "adapter": job.adapter.sha256}
    space = Workspace(here / "out", killed)
    (space.folder / "tokenizer.json").write_text("{}")  # which the adapter does not have any more
    space.release()
    edit(here, here / "out")
    assert {p.name for p in (here / "out").iterdir()} == {WEIGHTS, CONFIG}


def test_an_output_without_a_name_is_refused(here):
    with contextlib.chdir(here / "detail"), pytest.raises(UsageError, match="no name"):
        merge(here, "")
    assert (here / "detail" / CONFIG).exists()


def test_an_output_may_be_in_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    edit(here, "~/out")
    assert (here / "home/out" / CONFIG).exists()


def test_where_a_file_system_is_mounted_is_refused_at_once(here):
    with pytest.raises(OutputError, match="mounted") as caught:
        merge(here, "/proc")
    assert "inside it" in caught.value.hint
