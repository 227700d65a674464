"""A checkpoint in which quantised weights are seen as the values that their codes stand for."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.math.cast import narrow, storage
from lorakit.naming.quantised import MARKS
from lorakit.quant.stored.tensor import StoredTensor
from lorakit.quant.stored.weight import Written
from lorakit.store.checkpoint import Checkpoint, Part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import Source, TensorInfo

Weights = Mapping[str, Written]


class Unpacked(SafetensorsFile):
    """A weight file in which `weights` are seen as their values; `source` has their tensors, which
    may lie in other files too. `hidden` are tensors that are not seen.
    """

    def __init__(
        self, file: SafetensorsFile, weights: Weights, hidden: Collection[str], source: Source
    ) -> None:
        super().__init__(file.path)
        self._weights, self._source = weights, source
        self._seen = dict(_seen(self.on_disk, weights, hidden))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What every tensor is, a weight in the place of its codes."""
        return self._seen

    def read_rows(self, name: str, start: int, stop: int, into: Any, *, leading: int = 1) -> None:
        """Fill `into` with rows of a tensor; those of a weight are computed."""
        weight = self._weights.get(name)
        if weight is None:
            return super().read_rows(name, start, stop, into, leading=leading)
        info = self.infos[name]
        rows = np.frombuffer(into, storage(info.dtype)).reshape(-1, info.shape[-1])
        step = info.but(shape=info.shape[:-1]).matrix(leading)[1]
        found = rows if info.dtype == "F32" else np.empty(rows.shape, np.float32)
        weight.values(self._source, start * step, stop * step, found)
        if found is not rows:
            narrow(found, rows)
        return None

    def tensor(self, weight: str, name: str, leading: int) -> StoredTensor:
        """One of the tensors of a weight, to be made of new values."""
        return StoredTensor(self._weights[weight], self._source, name, leading)


def _seen(
    disk: Mapping[str, TensorInfo], weights: Weights, hidden: Collection[str]
) -> Iterator[tuple[str, TensorInfo]]:
    codes = {w.tensors[0]: w.info for w in weights.values()}
    for name, info in disk.items():
        if name in codes:
            yield codes[name].name, codes[name]
        elif name not in hidden:
            yield name, info


def unpacked(base: Checkpoint, weights: Weights, *, all_of_it: bool = True) -> Checkpoint:
    """The base with these weights of it seen as their values; `all_of_it` if it has no others.

    Raises:
        InputError: a weight file is no safetensors file.
    """
    hidden = {t for w in weights.values() for t in w.tensors} | (MARKS if all_of_it else set())
    return base.with_parts([_part(part, weights, hidden, base) for part in base.parts])


def _part(part: Part, weights: Weights, hidden: Collection[str], base: Checkpoint) -> Part:
    if not part.infos.keys() & hidden:
        return part
    if not isinstance(part, SafetensorsFile):
        raise InputError(
            "a quantised base is read from safetensors alone.",
            hint="Save it as safetensors, or take the 16-bit base.",
            file=base.located.path,
        )
    own = {n: w for n, w in weights.items() if w.tensors[0] in part.infos}
    return Unpacked(part, own, hidden, base)
