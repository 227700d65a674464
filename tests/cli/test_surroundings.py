"""What surrounds a command: closed streams, terminals of few letters, files that are none."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.errors import InputError, OutputError, ResourceError
from lorakit.store.writing import write_file
from lorakit.verbs.init.statistics import Statistics
from lorakit.verbs.reformat import config_of
from tests.pages import ROOT

EDIT = ("edit", "style", "--scale", "2", "-o", "out")
MERGE = ("merge", "base", "style", "-o", "out")
INIT = ("init", "base", "--rank", "1", "-o", "out")


def child(folder, *args, **options):
    """The command in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "lorakit", *args]
    return subprocess.run(
        command, cwd=folder, env=env, text=True, encoding="latin-1", timeout=60, **options
    )


@pytest.mark.parametrize("args", [MERGE, INIT, EDIT, ("inspect", "base")], ids=lambda a: a[0])
@pytest.mark.parametrize("closed", [(2,), (1, 2), (0, 1, 2)])
def test_closed_streams_hinder_nothing(folder, args, closed):
    def close():
        for number in closed:
            os.close(number)

    assert child(folder, *args, preexec_fn=close).returncode == 0
    if "out" in args and args[0] == "merge":
        assert lorakit.verify(folder / "out").differences == ()


@pytest.mark.parametrize("args", [("merge", "--help"), ("compare", "style", "detail")])
def test_a_terminal_without_the_letters_gets_others(folder, args):
    ran = child(folder, *args, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("args", [MERGE, EDIT], ids=lambda a: a[0])
def test_a_pipe_beside_the_weights_is_not_waited_for(folder, args):
    for name in ("base", "style"):
        os.mkfifo(folder / name / "pipe")
    assert child(folder, *args).returncode == 0
    assert not (folder / "out/pipe").exists()


@pytest.mark.parametrize(
    "name", ["base/config.json", "style/adapter_config.json", "style/adapter_model.safetensors"]
)
def test_a_pipe_in_the_place_of_an_input_is_refused(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    ran = child(folder, *MERGE, capture_output=True)
    assert ran.returncode == 3


def test_a_pipe_beside_a_pipeline_is_not_waited_for(folder):
    (folder / "pipe").mkdir()
    (folder / "base").rename(folder / "pipe/text_encoder")
    (folder / "pipe/model_index.json").write_text("{}")
    os.mkfifo(folder / "pipe/fifo")
    assert child(folder, "merge", "pipe", "style", "-o", "out").returncode == 0
    assert not (folder / "out/fifo").exists()


@pytest.mark.parametrize("name", ["pipe.safetensors", "pipe.gguf"])
def test_inspect_does_not_wait_for_a_pipe(folder, name):
    os.mkfifo(folder / name)
    ran = child(folder, "inspect", name, capture_output=True)
    assert ran.returncode == 3
    assert "a pipe, a socket or a device" in ran.stderr


@pytest.mark.parametrize("args", [("merge", "nope", "style", "-o", "out"), ("merg",)])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_error_that_cannot_be_told_keeps_its_code(folder, args, stream):
    expected = child(folder, *args, "--json", capture_output=True)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    with open("/dev/full", "w") as full:
        ran = child(folder, *args, "--json", **{stream: full, other: subprocess.PIPE})
    assert ran.returncode == expected.returncode
    assert getattr(ran, other) == getattr(expected, other)


def test_too_few_threads_are_too_little_of_a_resource(folder, monkeypatch):
    def limit():  # a stack of each thread that is more than the memory that may be mapped
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 40, hard))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 38, 1 << 38))

    if resource.getrlimit(resource.RLIMIT_STACK)[1] != resource.RLIM_INFINITY:
        pytest.skip("stacks are limited")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)  # as it is for users
    ran = child(folder, *MERGE, "-q", preexec_fn=limit, capture_output=True)
    assert (ran.returncode, ran.stderr) == (5, "Error: can't start new thread. Lower --jobs.\n")


def test_too_few_descriptors_are_too_little_of_a_resource(tmp_path):
    save_file({"w": np.ones(2, "f4")}, tmp_path / "model.safetensors")
    lorakit.open_checkpoint(tmp_path)  # all is imported now
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(ResourceError, match="Too many open files"):
            lorakit.open_checkpoint(tmp_path)
        with pytest.raises(ResourceError, match="Too many open files"):
            write_file(tmp_path / "file", b"")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


OPENING = {
    "merge": lambda base, style: lorakit.plan_merge(base, style),
    "inspect base": lambda base, _: lorakit.inspect(base),
    "inspect": lambda _, style: lorakit.inspect(style),
    "edit": lambda _, style: lorakit.plan_edit(style, scale=2.0),
    "convert": lambda _, style: lorakit.convert(style, style.parent / "out", to="kohya"),
    "verify": lambda base, _: lorakit.verify(base),
    "statistics": lambda _, style: Statistics(style / "stats.safetensors"),
    "config": lambda base, _: config_of(base),
    "check": lambda _, style: lorakit.check(style, "peft"),
}


@pytest.mark.parametrize("verb", OPENING)
def test_a_folder_that_may_not_be_read_is_an_input_that_is_refused(outsider, verb):
    for name in ("base", "style"):
        (outsider / name).mkdir(mode=0)
    with pytest.raises(InputError, match="Permission denied"):
        OPENING[verb](outsider / "base", outsider / "style")


def test_what_lies_where_nobody_may_look_is_told_as_that(outsider):
    folder = lorakit.demo(outsider / "try")
    (outsider / "private").mkdir(mode=0)
    there = outsider / "private/deep/there"
    with pytest.raises(InputError, match="Permission denied"):
        lorakit.plan_merge(there, folder / "style")
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        lorakit.merge(folder / "base", folder / "style", there, run=lorakit.RunOptions(jobs=1))


def test_a_name_that_is_too_long_is_an_input_that_is_refused(tmp_path):
    table = {"weight_map": {"w": "x" * 300 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(table))
    for call in (lorakit.open_checkpoint, lorakit.inspect):
        with pytest.raises(InputError, match="name too long"):
            call(tmp_path)


def test_a_file_without_tensors_is_told_as_any_other(tmp_path, run):
    save_file({}, tmp_path / "empty.safetensors")
    ran = run("inspect", "empty.safetensors")
    assert (ran.code, ran.err) == (0, "")
