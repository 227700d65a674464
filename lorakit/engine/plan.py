"""A plan: everything that a run will do, decided from headers, as plain data.

Law: the same plan gives the same bytes, whatever the number of workers, the memory or the
interruptions. Block boundaries are therefore part of it, and its hash is what a second run must
match to go on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lorakit import __version__
from lorakit.tensors import TensorInfo

BLOCK = 1 << 19  # elements read and written at once
STEP = 1 << 17  # elements in one arithmetic step: its arrays fit the cache of one core
CODED = 3 << 13  # the same of codes: their many arrays are too small for pages of their own


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes `start` to `stop` of a source file go to offset `to`, unchanged."""

    source: str  # a key of the run's sources
    start: int
    stop: int
    to: int

    @property
    def nbytes(self) -> int:
        """The number of bytes that it writes."""
        return self.stop - self.start

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"copy": self.source, "bytes": [self.start, self.stop], "to": self.to}


@dataclass(frozen=True, slots=True)
class Fold:
    """One tensor, computed in blocks of rows from the rows of another of the same shape.

    `tensor` is as it will be written, its place included; `source` and `origin` say where its rows
    come from. The recipe is plain data that this room does not look into. With `whole`, its blocks
    depend on each other. The first `leading` dimensions make the rows: 2 for stacked matrices.

    With a `unit`, the tensor is one of those of a quantised weight, `origin` the values of that,
    and rows are the weight's: so many, or several times as many, are encoded at once. The part of
    the tensor that `span` rows have is a run of bytes; 0 where that of any unit is.
    """

    tensor: TensorInfo
    source: str
    origin: TensorInfo
    recipe: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    leading: int = 1
    unit: int = 0
    span: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, as for a TensorInfo."""
        read = self.source, self.origin, self.recipe, self.whole, self.leading
        return Fold, (self.tensor, *read, self.unit, self.span)

    @property
    def nbytes(self) -> int:
        """The number of bytes that it writes."""
        return self.tensor.nbytes

    @property
    def rows(self) -> int:
        """The rows of the matrix that it works on."""
        return self._values.matrix(self.leading)[0]

    @property
    def cols(self) -> int:
        """The columns of that matrix."""
        return self._values.matrix(self.leading)[1]

    @property
    def block_rows(self) -> int:
        """Rows in one block; of units, whole steps."""
        if self.span:
            return self.span
        step = self.step_rows if self.unit else 1
        return step * max(1, BLOCK // max(1, step * self.cols))

    @property
    def step_rows(self) -> int:
        """Rows in one arithmetic step."""
        unit = max(1, self.unit)
        step = CODED if self.unit else STEP
        return unit * max(1, step // max(1, unit * self.cols))

    @property
    def _values(self) -> TensorInfo:
        return self.origin if self.unit else self.tensor

    def extent(self, rows: tuple[int, int]) -> tuple[int, int]:
        """The bytes of the tensor, from its first, that a block of rows makes."""
        start, stop = (self.nbytes * r // max(1, self.rows) for r in rows)
        return start, stop

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        units = {"unit": self.unit, "span": self.span} if self.unit else {}
        return {
            **units,
            "fold": self.tensor.name,
            "dtype": self.tensor.dtype,
            "shape": list(self.tensor.shape),
            "to": self.tensor.start,
            "from": [self.source, self.origin.name, self.origin.dtype],
            "block_rows": self.block_rows,
            "step_rows": self.step_rows,
            "leading": self.leading,
            "recipe": dict(self.recipe),
        }


Step = Copy | Fold


@dataclass(frozen=True)
class OutputFile:
    """A weight file to be written: its header, its size, and the steps that fill it.

    `link` names a source file whose bytes it has, if it may be a hard link to that.
    """

    name: str
    header: bytes
    size: int
    tensors: tuple[str, ...]
    steps: tuple[Step, ...]
    link: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the header by its hash."""
        return {
            "name": self.name,
            "size": self.size,
            "header_sha256": hashlib.sha256(self.header).hexdigest(),
            "tensors": len(self.tensors),
            "link": self.link,
            "steps": [s.to_dict() for s in self.steps],
        }


@dataclass(frozen=True)
class Plan:
    """What a verb will write, from which inputs, with which options.

    `inputs` and `options` identify the run; `notes` are what the user should know before it.
    """

    verb: str
    inputs: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    files: Sequence[OutputFile]
    extras: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def folds(self) -> list[Fold]:
        """The tensors that are computed."""
        return [s for f in self.files for s in f.steps if isinstance(s, Fold)]

    @property
    def nbytes(self) -> int:
        """Bytes of weights that are written, headers included; links are free."""
        return sum(f.size for f in self.files if not f.link)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON."""
        return {
            "verb": self.verb,
            "version": __version__,
            "inputs": [dict(i) for i in self.inputs],
            "options": dict(self.options),
            "extras": dict(self.extras),
            "notes": list(self.notes),
            "files": [f.to_dict() for f in self.files],
        }

    @cached_property
    def hash(self) -> str:
        """The sha256 of the plan: same hash, same output."""
        found = hashlib.sha256(_text(replace(self, files=()).to_dict()))
        for file in self.files:  # step by step: all of it would be the largest thing in memory
            found.update(_text(replace(file, steps=()).to_dict()))
            for step in file.steps:
                found.update(_text(step.to_dict()))
        return found.hexdigest()


def _text(plain: Mapping[str, Any]) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
