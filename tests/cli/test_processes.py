"""A command computes in processes of its own, whether it shows a bar or not."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

# Runs the command and says whether other processes worked for it: they took memory; and how many
# threads NumPy's BLAS has.
COMMAND = """
import resource, sys
from threadpoolctl import threadpool_info
from lorakit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print("forked", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0)
print("threads", max(i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"))
"""


def run(*arguments: object, terminal: bool) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    errors = theirs if terminal else subprocess.DEVNULL
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, check=True, env=env
    )
    os.close(theirs)
    os.close(ours)
    return ran.stdout


@pytest.mark.parametrize("terminal", [True, False])
def test_every_worker_of_a_merge_has_one(tmp_path: Path, terminal: bool) -> None:
    run("demo", "--keep", tmp_path, terminal=terminal)
    base, adapter = tmp_path / "base", tmp_path / "style"
    for jobs, forked in ((2, True), (1, False)):
        out = tmp_path / f"out{jobs}"
        said = run("merge", base, adapter, "-o", out, "--jobs", jobs, terminal=terminal)
        assert f"forked {forked}" in said
        assert "threads 1\n" in said  # others of OpenBLAS would wait in a busy loop
