"""Statistics of the inputs of modules: a safetensors file with a tensor a module, or an importance
matrix of llama.cpp.

In a safetensors file a tensor is called as the module, or that with `.second_moment`: (in, in), or
(in,) for the diagonal. With `.rms`, (in,), it has the roots of the latter.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.load import read_array
from lorakit.errors import InputError, MisfitError
from lorakit.formats.llama_cpp import llama_cpp_name
from lorakit.math.cast import Array
from lorakit.store.checkpoint import Part, open_part
from lorakit.store.imatrix import SUFFIXES, read_imatrix
from lorakit.store.reading import reading
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.weights import Weight

RMS = ".rms"
ENDS = ("", ".second_moment", RMS)


class Statistics:
    """The second moments in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            there = path.is_file()
        if not there:
            raise InputError(
                "is not there.", hint="Name a .safetensors file, or an imatrix.", file=path
            )
        self._theirs = path.suffix in SUFFIXES

    @cached_property
    def _part(self) -> Part:
        return open_part(self.path)

    @cached_property
    def _imatrix(self) -> Mapping[str, Any]:
        return read_imatrix(self.path)

    def check(self, widths: Mapping[str, int]) -> None:
        """Refuse a file that lacks a module, or has it with another number of inputs.

        Raises:
            MisfitError: naming the first.
        """
        for module, width in widths.items():
            shape = self._shape(module)
            if shape not in ((width,), (width, width)):
                have = "has nothing of" if shape is None else f"has {list(shape)} for"
                raise MisfitError(
                    f"{have} {module!r}, which has {width} inputs.",
                    hint="The statistics are of another model, or of other modules.",
                    file=self.path,
                    tensor=module,
                )

    def of(self, module: str) -> Array:
        """The second moments of a module's inputs, float64."""
        if self._theirs:
            return np.array(self._imatrix[_weight(module)], np.float64)
        info = self._info(module)
        assert info is not None
        found = read_array(self._part, info.name, "float64")
        return np.square(found) if info.name == module + RMS else found

    def _shape(self, module: str) -> tuple[int, ...] | None:
        if self._theirs:
            found = self._imatrix.get(_weight(module))
            return None if found is None else (len(found),)
        info = self._info(module)
        return None if info is None else info.shape

    def _info(self, module: str) -> TensorInfo | None:
        names = (f"{module}{end}" for end in ENDS)
        return next((self._part.infos[n] for n in names if n in self._part.infos), None)


def statistics_of(weights: Sequence[Weight], file: str | Path) -> Statistics:
    """The second moments in a file that has them for all of these weights.

    Raises:
        InputError, MisfitError: as `Statistics`.
    """
    found = Statistics(Path(file))
    found.check({w.form.module: w.form.shape[1] for w in weights})
    return found


def _weight(module: str) -> str:
    return f"{llama_cpp_name(module)}.weight"
