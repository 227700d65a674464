"""What processes fold is what this one folds; what becomes of them when something goes wrong."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorakit.engine.executor import Cpu, Inputs
from lorakit.engine.processes import Processes
from lorakit.errors import InputError, ResourceError
from lorakit.store.workspace import Workspace
from tests.engine.cases import Case, by_column, contents, gaussian, plain, save

# pytest itself may have threads of the libraries that it has imported; none of them holds a lock.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
JOBS = [1, 2, 3]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    shape = (3000, 700)  # a few blocks
    weights = {name: gaussian(i, shape, np.float16) for i, name in enumerate("abcd")}
    more = {"wide": gaussian(9, (3, 600_000), np.float16), "kept": gaussian(8, (50, 50))}
    files = [save(folder / "one.safetensors", weights), save(folder / "two.safetensors", more)]
    recipes = {"a": plain(1, shape), "b": by_column(2, shape), "c": plain(3, shape)}
    return Case(files, recipes | {"wide": plain(4, (3, 600_000))}, {"c": "F32", "d": "F64"})


def run(case: Case, out: Path, jobs: int, inputs: Inputs | None = None) -> dict:
    plan = case.plan
    return case.run(out, executor=Processes(plan, inputs or case.inputs, jobs), jobs=jobs)


@pytest.mark.parametrize("jobs", JOBS)
def test_bytes_and_figures_are_those_of_one_process(case, tmp_path, jobs):
    done = case.run(tmp_path / "alone", executor=Cpu(), jobs=1)
    assert run(case, tmp_path / "out", jobs) == done
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_no_process_and_no_descriptor_is_left(case, tmp_path):
    case.run(tmp_path / "first")  # the sources are open from here on
    before = len(os.listdir("/proc/self/fd"))
    run(case, tmp_path / "out", 2)
    assert len(os.listdir("/proc/self/fd")) == before
    assert _children() == []


def test_an_error_in_a_process_is_raised_here_as_it_is(case, tmp_path):
    def open_recipe(fold):
        raise InputError("the adapter is gone.", file="adapter", hint="Look for it.")

    with pytest.raises(InputError, match=r"adapter: the adapter is gone\. Look for it\.") as caught:
        run(case, tmp_path / "out", 2, replace(case.inputs, open_recipe=open_recipe))
    assert "in open_recipe" in caught.value.__notes__[0]  # where it was, for LORAKIT_DEBUG
    assert _children() == []


def test_a_process_that_is_killed_stops_the_run_and_the_next_goes_on(case, tmp_path):
    def open_recipe(fold):
        if fold.tensor.name == "c":
            os.kill(os.getpid(), signal.SIGKILL)
        return case.open_recipe(fold)

    with pytest.raises(ResourceError, match="was killed, most likely because memory ran out"):
        run(case, tmp_path / "out", 2, replace(case.inputs, open_recipe=open_recipe))
    assert _children() == []
    case.run(tmp_path / "alone", executor=Cpu(), jobs=1)
    run(case, tmp_path / "out", 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_bug_in_a_process_is_no_lack_of_memory(case, tmp_path, capfd):
    def open_recipe(fold):
        raise KeyError("nonsense")

    with pytest.raises(RuntimeError, match="a process of this run failed"):
        run(case, tmp_path / "out", 2, replace(case.inputs, open_recipe=open_recipe))
    assert "KeyError: 'nonsense'" in capfd.readouterr().err
    assert _children() == []


def test_what_a_process_shares_has_room_for_every_block(tmp_path):
    """One row of more numbers than a block, and one that becomes four times as large."""
    file = save(tmp_path / "base.safetensors", {"w": gaussian(0, (2, 1 << 20), np.float16)})
    case = Case([file], {"w": plain(1, (2, 1 << 20))}, {"w": "F64"})
    case.run(tmp_path / "alone", executor=Cpu(), jobs=1)
    run(case, tmp_path / "out", 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_process_dies_with_the_one_that_it_works_for(tmp_path):
    """Killed, so that nothing of Python ends it."""
    script = """
import os, signal, sys
from pathlib import Path
from tests.engine.cases import Case, gaussian, plain, save
from tests.engine.test_processes import run

file = save(Path(sys.argv[1]) / "base.safetensors", {"w": gaussian(0, (3000, 700))})
case = Case([file], {"w": plain(1, (3000, 700))})

def report(_):
    os.kill(os.getpid(), signal.SIGKILL)

from lorakit.engine.processes import Processes
plan = case.plan
case.run(Path(sys.argv[1]) / "out", executor=Processes(plan, case.inputs, 2), report=report)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    said, _ = child.communicate(timeout=60)  # which ends when the last to hold the pipe does
    assert (child.returncode, said) == (-signal.SIGKILL, b"")
    space = Workspace(tmp_path / "out", {"plan": "another"}, overwrite=True)  # nobody holds it
    space.release()


def test_only_a_process_alone_in_itself_is_forked():
    """Asked in a process of its own, since this one has threads and torch."""
    script = """
import multiprocessing, sys, threading
from lorakit.engine.executor import Cpu, Inputs, executor_for
from lorakit.engine.plan import Plan
from tests.engine.test_preflight import plan_of

def chosen(jobs=2, plan=plan_of((9, 9)), inputs=Inputs({}, None)):
    return type(executor_for(plan, "cpu", jobs, None, inputs)[0]).__name__

found = [chosen(), chosen(jobs=1), chosen(plan=Plan("test", [], {}, [])), chosen(inputs=None)]
other = threading.Thread(target=lambda: found.append(chosen()))
other.start()
other.join()
with multiprocessing.get_context("fork").Pool(1) as pool:
    found.append(pool.apply(chosen))
sys.modules["torch"] = sys
print(*found, chosen())
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split() == ["Processes", *["Cpu"] * 6]


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
