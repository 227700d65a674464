"""Files whose sizes are known beforehand, filled weight by weight, each from a whole weight: the
tensors made of one may lie in several files.

Law: the same plan gives the same bytes, whatever the number of workers or the interruptions. A line
of the journal says that the tensors of a weight lie where they belong; a run that is killed goes on
with the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from lorakit.adapter.load import read_stored
from lorakit.engine.plan import Copy, Fold, OutputFile, Plan
from lorakit.engine.working import in_order
from lorakit.math.cast import Array, bytes_of
from lorakit.store.checkpoint import Part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.store.workspace import Workspace
from lorakit.store.writing import PartialFile, copy_range, make_folder, partial_path
from lorakit.tensors import TensorInfo
from lorakit.verbs.job import RunOptions

# What is made of a weight: figures as plain data, and its tensors by name.
Compute = Callable[[str], tuple[dict[str, Any], Mapping[str, Array]]]
MADE_OF = "made_of"  # in a recipe: the weight that a tensor is made of


@dataclass
class Filling:
    """One run of such a plan into a workspace; `compute` is called with the names of weights."""

    plan: Plan
    sources: Mapping[str, Part]
    compute: Compute
    workspace: Workspace
    options: RunOptions
    _outs: dict[str, PartialFile] = field(default_factory=dict)

    def run(self, jobs: int) -> dict[str, dict[str, Any]]:
        """Fill every file; the figures of every weight.

        Raises:
            LorakitError: the first thing that went wrong; what is done stays for the next run.
        """
        records = self.workspace.records
        rows = {r["weight"]: r["row"] for r in records if "weight" in r}
        copied = {r["copied"] for r in records if "copied" in r}
        todo = [w for w in weights_of(self.plan) if w not in rows]
        with self._opened(keep=any("reserved" in r for r in records)):
            for _ in rows:
                self.options.report(1)
            for file in self.plan.files:
                if file.name in self._outs and file.name not in copied:
                    self._copy(file)
                    self._done([file.name], {"copied": file.name})
            places = _places(self.plan)
            for weight, row in in_order(todo, lambda w: self._make(w, places[w]), jobs):
                self._done({name for name, _ in places[weight]}, {"weight": weight, "row": row})
                rows[weight] = row
                self.options.report(1)
            for out in self._outs.values():
                out.commit(sync=self.options.sync)
        return {w: rows[w] for w in weights_of(self.plan)}

    @contextmanager
    def _opened(self, *, keep: bool) -> Iterator[None]:
        """All files under their partial names, all their space reserved, but for finished ones."""
        with ExitStack() as stack:
            for file in self.plan.files:
                path = self.workspace.folder / file.name
                if keep and path.exists() and not partial_path(path).exists():
                    continue
                make_folder(path.parent, sync=self.options.sync)
                out = PartialFile(path, file.size, keep=keep)
                self._outs[file.name] = stack.enter_context(out)
            if not keep:
                self._done(self._outs, {"reserved": True})
            yield

    def _copy(self, file: OutputFile) -> None:
        """The header, and what is taken over as it is."""
        out = self._outs[file.name]
        out.write(file.header, 0)
        for step in file.steps:
            source = self.sources[step.source]
            if isinstance(step, Copy):
                assert isinstance(source, SafetensorsFile)
                copy_range(source, out, step.start, step.stop, to=step.to)
            elif MADE_OF not in step.recipe:
                values = read_stored(source, step.origin)
                out.write(bytes_of(values), step.tensor.start)

    def _make(self, weight: str, places: Sequence[tuple[str, TensorInfo]]) -> dict[str, Any]:
        row, arrays = self.compute(weight)
        for name, info in places:
            data = bytes_of(arrays[info.name])
            assert data.nbytes == info.nbytes, info.name
            self._outs[name].write(data, info.start)
        return row

    def _done(self, files: Any, line: dict[str, Any]) -> None:
        """Journal what these files hold by now, once that is durable."""
        if self.options.sync:
            for name in files:
                self._outs[name].sync()
        self.workspace.record(line, sync=self.options.sync)


def weights_of(plan: Plan) -> list[str]:
    """The weights that a plan makes tensors of, in its order."""
    made = (s.recipe.get(MADE_OF) for s in plan.folds)
    return list(dict.fromkeys(w for w in made if w is not None))


def _places(plan: Plan) -> dict[str, list[tuple[str, TensorInfo]]]:
    """Where the tensors of each weight belong: files, names and offsets."""
    found: dict[str, list[tuple[str, TensorInfo]]] = {}
    for file in plan.files:
        for step in file.steps:
            if isinstance(step, Fold) and MADE_OF in step.recipe:
                found.setdefault(step.recipe[MADE_OF], []).append((file.name, step.tensor))
    return found
