"""lorakit with a line in the journal every so many bytes: python -m tests.faults.often BYTES ...

The usual number is in the hundreds of megabytes; with a small one, a small merge goes through what
otherwise only a large one does.
"""

import sys
from functools import partial

import lorakit.cli
from lorakit.engine import run as engine


def main(args: list[str]) -> None:
    engine.Run = partial(engine.Run, checkpoint=int(args[0]))  # type: ignore[misc,assignment]
    lorakit.cli.main(args[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
