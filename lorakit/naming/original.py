"""Where a module of Diffusers' names lies in a file that the original code of its family has saved:
fused projections, and halves of rows that change places.

Law: the places of a module cover each of its rows exactly once, or there are none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lorakit.formats.single_file import COMPONENTS, Spot, family_of, spots
from lorakit.naming.places import Place
from lorakit.tensors import TensorInfo

MATRIX = 2  # dimensions


@dataclass(frozen=True)
class Original:
    """A base as it lies on disk, whose names may be those of the original code."""

    infos: Mapping[str, TensorInfo]

    @cached_property
    def family(self) -> str:
        """The family whose original names these are, "" for none."""
        wide = [n for n, i in self.infos.items() if len(i.shape) >= MATRIX]
        return family_of([n.rpartition(".")[0] for n in wide if n.endswith(".weight")])

    def places(self, component: str, module: str, parameter: str, out: int) -> list[Place]:
        """Where the weight or bias of a module lies, [] if nowhere.

        `component` "" is for the denoiser, or for that which the name begins with; `out` is the
        number of rows of the module.
        """
        if not self.family:
            return []
        if not component:
            first, _, rest = module.partition(".")
            component, module = (first, rest) if first in COMPONENTS else ("", module)
        for spot in spots(component, module, self.family):
            weight, name = self._tensor(spot, "weight"), self._tensor(spot, parameter)
            if weight and name:
                return _windows(name, self.infos[weight].shape, spot, out)
        return []

    def _tensor(self, spot: Spot, parameter: str) -> str:
        """The tensor of a parameter; fused attentions, norms and what is turned have own names."""
        if spot.found.row.turned or spot.found.row.bare:
            return spot.module if parameter == "weight" and spot.module in self.infos else ""
        names = [f"{spot.module}.{parameter}", f"{spot.module}_{parameter}"]
        names += [f"{spot.module}.scale"] * (parameter == "weight")  # of norms
        return next((n for n in names if n in self.infos), "")


def _windows(name: str, shape: tuple[int, ...], spot: Spot, out: int) -> list[Place]:
    """The rows of a weight of this shape (or of its bias) that a module has."""
    row, part = spot.found.row, spot.found.part or 0
    if len(shape) < MATRIX:
        return [Place(name)]
    height, width = shape[0], shape[1]
    if len(row.parts) > 1:
        sizes = row.sizes(height, width)
        return [Place(name, at=sum(sizes[:part]))] if sizes[part] == out else []
    if row.swaps(height, width):
        half = height // 2
        return [Place(name, rows=(0, half), at=half), Place(name, rows=(half, height), at=0)]
    return [Place(name, turned=row.turned)]
