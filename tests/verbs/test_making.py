"""An adapter that is being made is there whole in the end, or not at all."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorakit
from lorakit.errors import OutputError, ResourceError
from tests.verbs.adapters import bytes_of, pair, save
from tests.verbs.conftest import SCRATCH

COMMANDS = {
    "combine": lambda folder: lorakit.plan_combine([folder / "one", folder / "other"]),
    "resize": lambda folder: lorakit.plan_resize(folder / "one", rank=2),
}
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture
def two(tmp_path):
    """A folder with two adapters of some kilobytes."""
    tensors = {n: s for i in range(8) for n, s in pair(f"layers.{i}.q", 40, 30, 4).items()}
    for name in ("one", "other"):
        save(tmp_path / name, tensors, r=4)
    return tmp_path


@contextmanager
def files_up_to(size):
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


TAKING = {
    **COMMANDS,
    "average": lambda folder: lorakit.plan_combine(
        [folder / "one", folder / "other"], whole="average"
    ),
}


@pytest.mark.parametrize("command", TAKING)
def test_what_is_held_whole_is_never_in_memory_whole(tmp_path, command):
    tensors = pair("layers.0.q", 40, 30, 4)
    heads = {n: np.full((24_000, 1_000), n == "one", "float16") for n in ("one", "other")}
    heads["other"] += command == "combine"  # which asks what to do with heads that differ
    for name, head in heads.items():
        save(tmp_path / name, {**tensors, "lm_head.weight": head}, modules_to_save=["lm_head"])
    del heads, head
    tracemalloc.start()
    TAKING[command](tmp_path).run(tmp_path / "out", SCRATCH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    expected = 0.5 if command == "average" else 1
    assert (found["base_model.model.lm_head.weight"] == expected).all()
    assert peak < (160 if command == "average" else 44) * 1e6  # of 48 MB, or 192 MB in float64


@every_command
@pytest.mark.parametrize("size", [100, 3000, 9000])
def test_a_full_disk_leaves_nothing_behind(two, command, size):
    job = COMMANDS[command](two)
    before = sorted(two.iterdir())
    with files_up_to(size), pytest.raises(ResourceError, match="no space"):
        job.run(two / "out", SCRATCH)
    assert sorted(two.iterdir()) == before
    job.run(two / "out", SCRATCH)
    assert len(load_file(two / "out/adapter_model.safetensors")) == 16


@every_command
def test_a_weight_that_fails_leaves_nothing_behind(two, command, tmp_path):
    job = COMMANDS[command](two)
    path = two / "one/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])  # cut short once its header was read
    before = sorted(two.iterdir())
    with pytest.raises(lorakit.LorakitError, match="adapter_model"):
        job.run(two / "out", SCRATCH)
    assert sorted(two.iterdir()) == before


@every_command
def test_the_bytes_are_those_of_any_other_run(two, command):
    for name, jobs in (("one job", 1), ("three", 3)):
        COMMANDS[command](two).run(two / name, lorakit.RunOptions(jobs=jobs))
    assert bytes_of(two / "one job") == bytes_of(two / "three")


@every_command
def test_an_output_within_an_input_is_refused(two, command):
    with pytest.raises(OutputError):
        COMMANDS[command](two).run(two / "one", lorakit.RunOptions(overwrite=True))


@every_command
def test_what_a_kill_left_is_no_hindrance(two, command):
    COMMANDS[command](two).run(two / "undisturbed", SCRATCH)
    job = COMMANDS[command](two)
    killed = SCRATCH.reporting(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    child = multiprocessing.get_context("fork").Process(target=job.run, args=(two / "out", killed))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert any((two / "out.partial").iterdir())
    COMMANDS[command](two).run(two / "out", SCRATCH)
    assert bytes_of(two / "out") == bytes_of(two / "undisturbed")
    assert not (two / "out.partial").exists()


def test_a_killed_command_can_be_given_again(two):
    """Whenever it is killed, there is a whole result, or none and a second run makes it."""
    expected = None
    for delay in (0.1, 0.25, 0.4, 0.8):
        out = two / f"out{delay}"
        command = [sys.executable, "-m", "lorakit", "combine", "one", "other", "-o", out, "-q"]
        child = subprocess.Popen(command, cwd=two)
        try:
            child.wait(delay)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        wanted = 7 if out.exists() else 0  # what was left of the last two steps goes all the same
        assert subprocess.run(command, cwd=two, check=False).returncode == wanted
        expected = expected or bytes_of(out)
        assert bytes_of(out) == expected
    assert not list(two.glob("*.partial"))
