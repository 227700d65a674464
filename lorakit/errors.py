"""Every way in which lorakit refuses or fails, one class for each exit code.

LorakitError          1   failed
├── UsageError        2   the request itself makes no sense
├── InputError        3   an input is corrupt, hostile or of a kind that is refused
├── MisfitError       4   the adapter does not fit the base
├── ResourceError     5   not enough disk or memory
├── HubError          6   hub or network
├── OutputError       7   the output exists, is busy or cannot be placed there
└── DifferenceError   8   verify or compare found differences
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # how the system says that it runs short


class LorakitError(Exception):
    """What went wrong, in one line, and what to type next.

    `file` and `tensor` say where, `hint` is the way out; all are shown on the command line and
    in the JSON of `--json`.
    """

    exit_code = 1
    code = "failed"

    def __init__(
        self, message: str, *, hint: str = "", file: object = "", tensor: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.file = str(file)
        self.tensor = tensor

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        return f"{where}{self.message}" + (f" {self.hint}" if self.hint else "")

    def to_dict(self) -> dict[str, str]:
        """The error as the `error` object of `--json`."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "file": self.file,
            "tensor": self.tensor,
        }


class UsageError(LorakitError):
    """The request itself makes no sense (exit 2)."""

    exit_code = 2
    code = "usage"


class InputError(LorakitError):
    """An input is corrupt, hostile, or of a kind that lorakit refuses by name (exit 3)."""

    exit_code = 3
    code = "input"


class MisfitError(LorakitError):
    """The adapter does not fit the base, or not every tensor of it found its place (exit 4)."""

    exit_code = 4
    code = "misfit"


class ResourceError(LorakitError):
    """Not enough disk or memory (exit 5)."""

    exit_code = 5
    code = "resource"


class HubError(LorakitError):
    """The hub or the network did not give what was asked for (exit 6)."""

    exit_code = 6
    code = "hub"


class OutputError(LorakitError):
    """The output exists, is busy, or cannot be placed there (exit 7)."""

    exit_code = 7
    code = "output"


class DifferenceError(LorakitError):
    """A check found differences (exit 8)."""

    exit_code = 8
    code = "difference"


def scarce(error: OSError, file: object = "") -> ResourceError:
    """The system's word for too few descriptors, or too little memory, in one clear line."""
    memory = error.errno == errno.ENOMEM
    hint = "Lower --jobs." if memory else "Raise the limit (ulimit -n)."
    return ResourceError(f"{error.strerror}.", hint=hint, file=file)


@contextmanager
def about(file: object) -> Iterator[None]:
    """Give errors that do not say where they come from this file."""
    try:
        yield
    except LorakitError as error:
        error.file = error.file or str(file)
        raise
