"""Runs commands in forks of a process that has everything imported: a tenth of the time each.

Run: python -m tests.faults.forks, which answers lines of JSON on stdin with lines on stdout; or use
`Forks`, which starts it.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent.parent


class Forks:
    """A process that runs commands in forks of itself; `env` is what it is started with."""

    def __init__(self, **env: str) -> None:
        one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a fork has one thread only
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"],
            cwd=ROOT,
            env={**os.environ, **one, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
        """The exit code of `module argument ...`, as after python -m, and what stderr got."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([list(command), dict(env)]) + "\n")
        self._server.stdin.flush()
        code, said = json.loads(self._server.stdout.readline())
        return code, said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()


def load() -> dict[str, Any]:
    """The modules that may be run, by name, with all that a merge imports on its way, and most of
    what other commands do.
    """
    import scipy.linalg  # noqa: F401
    import threadpoolctl
    import yaml  # noqa: F401

    import lorakit.cli.merge
    import lorakit.cli.unmerge
    import lorakit.engine.run
    import lorakit.store.workspace
    import lorakit.verbs.merge.planned
    import tests.faults.often

    threadpoolctl.threadpool_info()
    return {"lorakit": lorakit.cli.main, "tests.faults.often": tests.faults.often.main}


def serve() -> None:
    mains = load()
    with tempfile.TemporaryFile("w+") as errors:
        for line in sys.stdin:
            (module, *args), env = json.loads(line)
            errors.seek(0)
            errors.truncate()
            child = os.fork()
            if not child:
                os.dup2(errors.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.environ.update(env)
                _end(mains[module], args)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            sys.stdout.write(json.dumps([code, errors.read()]) + "\n")
            sys.stdout.flush()


def _end(main: Any, args: list[str]) -> None:
    """Run a command and end this process with its code, as Python would."""
    code: Any = 1
    try:
        main(args)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
