"""Making an adapter: weights computed one after the other by workers, written in their order as
they come, the config last.

Law: the same draft gives the same bytes, whatever the number of workers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.config import NAME
from lorakit.adapter.load import check_finite
from lorakit.adapter.new_config import Saved, format_config
from lorakit.adapter.weight_file import PEFT
from lorakit.adapter.weights import Form, roles_of, rounded
from lorakit.engine.machine import available_cores
from lorakit.engine.sending import sender
from lorakit.engine.working import in_order, jobs_within
from lorakit.errors import MisfitError
from lorakit.formats.peft import factor_key, levels
from lorakit.math.cast import Array, bytes_of
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Send
from lorakit.store.growing import GrowingFile
from lorakit.store.writing import write_file
from lorakit.tensors import TensorInfo
from lorakit.verbs.job import RunOptions, check_folder

Row = TypeVar("Row")


@dataclass(frozen=True)
class Made(Generic[Row]):
    """A weight of the result: the update of each expert (one for a plain weight), vectors beside
    them by role, and a row for the report. `alpha` is for factors that are to be read with a
    scaling; None for those that are to be read with 1. `rank` is what the file has at least.
    """

    lows: Sequence[LowRank]
    row: Row
    beside: Mapping[str, Array] = field(default_factory=dict)
    alpha: float | None = None
    rank: int = 0


@dataclass(frozen=True)
class Task(Generic[Row]):
    """A weight to be made: where it lies, the dtype of its factors, and how it is computed, told
    what brings matrices to where they are decomposed.

    What computes to None is left out of the result.
    """

    form: Form
    dtype: str
    compute: Callable[[Send], Made[Row] | None]
    beside: tuple[str, ...] = ()  # the roles that it has beside its factors


@dataclass(frozen=True)
class Taken:
    """A tensor that is not an update: under which name, and its values, some rows at a time."""

    info: TensorInfo
    values: Callable[[], Iterable[Array]]


@dataclass(frozen=True)
class Draft(Generic[Row]):
    """An adapter to be made. `config` gives that of the result from what it tells of each weight;
    `memory` is what a worker takes at most, in bytes; `identity` tells it from another.
    """

    tasks: Sequence[Task[Row]]
    taken: Sequence[Taken]
    config: Callable[[Sequence[Saved]], Mapping[str, Any]]
    inputs: Sequence[Path]
    identity: Mapping[str, Any]
    memory: int = 0
    adapters: Sequence[Adapter] = ()  # what is read, and must be finite
    files: Mapping[str, bytes] = field(default_factory=dict)  # small ones that lie beside

    def check(self, output: str | Path) -> Path:
        """The place of the output, which is a folder and has nothing to do with an input.

        Raises:
            UsageError, OutputError: saying why it is none.
        """
        return check_folder(output, self.inputs)

    def run(self, output: str | Path, options: RunOptions | None = None) -> "Written[Row]":
        """Write the adapter to a folder; the rows of its weights, and its size.

        Raises:
            OutputError: the output exists, lies inside an input, or is being written by another.
            ResourceError: the disk is full, or there is too little memory.
            MisfitError: an adapter holds NaN or Inf.
        """
        options, output = options or RunOptions(), self.check(output)
        jobs = self._jobs(options)
        self._check_finite()
        with sender(options.device) as send:
            return self._run(output, options, jobs, send)

    def _run(self, output: Path, options: RunOptions, jobs: int, send: Send) -> "Written[Row]":
        with options.building(output, self.identity) as workspace:
            written = self._write(workspace.folder / PEFT, self._made(jobs, send), options)
            for name, data in self.files.items():
                write_file(workspace.folder / name, data, sync=options.sync)
            config = format_config(self.config(written.saved))
            write_file(workspace.folder / NAME, config, sync=options.sync)
        return written

    def rows(self, options: RunOptions | None = None) -> "list[Row]":
        """The rows of the report alone: everything is computed, nothing is written."""
        options = options or RunOptions()
        jobs, rows = self._jobs(options), []
        self._check_finite()
        with sender(options.device) as send:
            for _, made in self._made(jobs, send):
                rows.append(made.row)
                options.report(1)
        return rows

    def _check_finite(self) -> None:
        for adapter in self.adapters:
            check_finite(adapter.source, adapter.path)

    def _jobs(self, options: RunOptions) -> int:
        wanted = options.jobs or available_cores()
        return jobs_within(self.memory, wanted, options.max_memory)

    def _write(
        self,
        path: Path,
        done: "Iterator[tuple[Task[Row], Made[Row]]]",
        options: RunOptions,
    ) -> "Written[Row]":
        keys = _keys([t.form for t in self.tasks])
        names = [k for task in self.tasks for k in keys(task).values()]
        rows, saved, count = [], [], len(self.taken)
        with GrowingFile(path, [*names, *(t.info.name for t in self.taken)]) as out:
            for group in _by_name(done):
                rank = max(r for _, m in group for r in (m.rank, *(x.rank for x in m.lows)))
                for task, made in group:
                    _add(out, task, made, keys(task), rank)
                    rows.append(made.row)
                    saved.append(_saved(task.form, made, rank))
                    count += len(keys(task))
                    options.report(1)
            for one in self.taken:
                out.add(one.info, map(bytes_of, one.values()))
            out.commit(sync=options.sync)
        return Written(rows, saved, count, out.size)

    def _made(self, jobs: int, send: Send) -> "Iterator[tuple[Task[Row], Made[Row]]]":
        """The weights in their order, but for those that computed to nothing."""
        made = in_order(self.tasks, lambda task: task.compute(send), jobs)
        return ((task, one) for task, one in made if one is not None)


@dataclass(frozen=True)
class Written(Generic[Row]):
    """An adapter that was written: the rows of its weights, and what its config tells of them."""

    rows: Sequence[Row]
    saved: Sequence[Saved]
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Report(Generic[Row]):
    """What a verb that makes an adapter did: a row for every weight, the number of tensors and the
    size of the weight file in bytes (0 before it is written), and how many weights computed to
    nothing.
    """

    rows: Sequence[Row]
    tensors: int
    written: int
    left_out: int
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def retained(self) -> float:
        """The least share of its energy that any weight has."""
        return min((getattr(row, "retained", 1.0) for row in self.rows), default=1.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "retained": self.retained}


@dataclass(frozen=True)
class Making(Generic[Row]):
    """An adapter planned: its draft, what to say before and (of its rows) after it is made."""

    draft: Draft[Row]
    notes: Sequence[str] = ()
    closing: Callable[[Sequence[Row]], Sequence[str]] = lambda _: ()

    def preview(self, options: RunOptions | None = None) -> Report[Row]:
        """What a run would do, ranks and energies included; nothing is written."""
        return self._report(self.draft.rows(options), 0, 0)

    def run(self, output: str | Path, options: RunOptions | None = None) -> Report[Row]:
        """Write the result to a folder; what was done.

        Raises:
            OutputError, ResourceError, MisfitError: as `Draft.run`.
        """
        done = self.draft.run(output, options)
        return self._report(done.rows, done.tensors, done.nbytes)

    def _report(self, rows: Sequence[Row], tensors: int, written: int) -> Report[Row]:
        left = len(self.draft.tasks) - len(rows)
        sides = [note for a in self.draft.adapters for note in a.one_sided]
        return Report(rows, tensors, written, left, (*self.notes, *sides, *self.closing(rows)))


def _by_name(
    made: Iterator[tuple[Task[Row], Made[Row]]],
) -> Iterator[list[tuple[Task[Row], Made[Row]]]]:
    """Weights that a config has one name for, and hence one rank."""
    group: list[tuple[Task[Row], Made[Row]]] = []
    for task, one in made:
        if group and group[0][0].form.name != task.form.name:
            yield group
            group = []
        group.append((task, one))
    if group:
        yield group


def _keys(forms: Sequence[Form]) -> Callable[[Task[Any]], dict[str, str]]:
    """What the tensors of a weight are called, by role."""
    depth = levels((f.module, f.parameter) for f in forms if not f.layer)

    def keys(task: Task[Any]) -> dict[str, str]:
        form = task.form
        level = 0 if form.layer else depth[form.module, form.parameter]
        pair = ("embedding_a", "embedding_b") if form.embedding else ("a", "b")
        return {
            role: factor_key(form.module, role, inner=form.inner, level=level)
            for role in (*pair, *task.beside)
        }

    return keys


def _add(
    out: GrowingFile, task: Task[Any], made: Made[Any], keys: Mapping[str, str], rank: int
) -> None:
    arrays = _arrays(task, made, task.dtype, rank)
    if odd := [r for r in keys if not np.isfinite(arrays[r]).all()]:
        largest = np.abs(_arrays(task, made, "F64", rank)[odd[0]]).max()
        raise MisfitError(
            f"{keys[odd[0]]!r} does not fit {arrays[odd[0]].dtype.name}: its largest number is "
            f"{largest:.3g}.",
            hint="Pass --dtype float32.",
            tensor=keys[odd[0]],
        )
    for role, name in keys.items():
        out.add(TensorInfo(name, task.dtype, arrays[role].shape), [bytes_of(arrays[role])])


def _arrays(task: Task[Any], made: Made[Any], dtype: str, rank: int) -> dict[str, Array]:
    """The tensors of a weight by role, rounded; factors with a scaling of one may be balanced."""
    found = roles_of(task.form, made.lows, dtype, rank=rank, balance=made.alpha is None)
    return found | {r: rounded(made.beside[r], dtype) for r in task.beside}


def _saved(form: Form, made: Made[Any], rank: int) -> Saved:
    alpha = float(rank) if made.alpha is None else made.alpha
    return Saved(form.name, rank, alpha, form.layer)
