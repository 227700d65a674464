"""Small plans and what runs them: weights on disk, recipes in memory, no adapters and no verbs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.engine.executor import Inputs
from lorakit.engine.figures import Done
from lorakit.engine.layout import Old, Output, lay_out
from lorakit.engine.plan import Fold, Plan
from lorakit.engine.run import Run
from lorakit.math.cast import code_of, storage
from lorakit.math.decomposed import Decomposed
from lorakit.math.lowrank import LowRank
from lorakit.math.recipe import Recipe
from lorakit.math.updates import Added
from lorakit.store.header import format_header
from lorakit.store.safetensors import SafetensorsFile
from lorakit.store.workspace import Workspace
from lorakit.tensors import TensorInfo

Array = np.ndarray[Any, Any]


def save(path: Path, tensors: Mapping[str, Array], **metadata: str) -> SafetensorsFile:
    """A safetensors file of arrays of any dtype, in this order."""
    infos = [TensorInfo(n, code_of(a.dtype), a.shape) for n, a in tensors.items()]
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())
    path.write_bytes(format_header(infos, metadata) + data)
    return SafetensorsFile(path)


def read(path: Path) -> dict[str, Array]:
    """All tensors of a file, by the code under test's own header but not its reader."""
    raw, infos = path.read_bytes(), SafetensorsFile(path).infos
    return {
        n: np.frombuffer(raw[slice(*i.extent)], storage(i.dtype)).reshape(i.shape)
        for n, i in infos.items()
    }


def gaussian(seed: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def low_rank(seed: int, shape: tuple[int, int], rank: int = 3, scaling: float = 0.7) -> LowRank:
    a, b = gaussian(seed, (rank, shape[1])), gaussian(seed + 1, (shape[0], rank))
    return LowRank(a, b, scaling)


def plain(seed: int, shape: tuple[int, int], weight: float = 1.0, **low: Any) -> Recipe:
    return Recipe(updates=(Added(low_rank(seed, shape, **low), weight),))


def by_column(seed: int, shape: tuple[int, int]) -> Recipe:
    """A DoRA whose output units are columns: it has to see every row before it changes one."""
    magnitude = np.abs(gaussian(seed + 2, (shape[1],))) + 1
    return Recipe(updates=(Decomposed(low_rank(seed, shape), magnitude, axis=1),))


@dataclass
class Case:
    """Files to read and the recipe of every tensor that is to be folded."""

    files: list[SafetensorsFile]
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)  # of tensors that change it
    link: bool = False

    @cached_property
    def plan(self) -> Plan:
        """The plan, as `lorakit.verbs.base.planning` would make it."""
        written = [
            lay_out(
                file.name,
                [self.output(file, info) for info in file.infos.values()],
                Old(file.name, file.header, file.infos, file.metadata),
                link=self.link,
            )
            for file in self.files
        ]
        return Plan("test", [], {}, written)

    def output(self, file: SafetensorsFile, info: TensorInfo) -> Output:
        recipe = self.recipes.get(info.name)
        named = {"of": info.name} if recipe else {}
        whole = bool(recipe and recipe.surveys)
        dtype = self.dtypes.get(info.name, info.dtype)
        return Output(replace(info, dtype=dtype), file.name, info, named, whole)

    @property
    def inputs(self) -> Inputs:
        return Inputs({f.name: f for f in self.files}, self.open_recipe)

    def open_recipe(self, fold: Fold) -> Recipe:
        return self.recipes.get(fold.tensor.name, Recipe())

    def run(
        self,
        output: Path,
        *,
        jobs: int = 2,
        report: Callable[[int], None] = lambda _: None,
        commit: bool = True,
        **options: Any,
    ) -> dict[str, Done]:
        """Run the plan into an output, the way `lorakit.verbs.job` does; nothing is synced."""
        plan = self.plan
        space = Workspace(output, {"plan": plan.hash})
        options = {"sync": False} | options
        try:
            done = Run(plan, self.inputs, space, report=report, **options).run(jobs)
            if commit:
                space.commit(sync=False)
        finally:
            space.release()
        return done


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    found: Iterable[Path] = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}
