"""A plan together with what it reads: ready to be shown, or run into an output."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapter.adapter import AdapterFile
from lorakit.engine.plan import Fold, Plan
from lorakit.engine.preflight import check_disk
from lorakit.errors import InputError, OutputError, ResourceError, UsageError
from lorakit.store.checkpoint import Checkpoint, Part
from lorakit.store.hashing import sha256_of
from lorakit.store.hub import expected_sha256
from lorakit.store.workspace import Workspace, built, is_file
from lorakit.tensors import bytes_in
from lorakit.verbs.beside import Beside
from lorakit.verbs.report import Report, report_of
from lorakit.verbs.sources import recipe_of, sources_of

if TYPE_CHECKING:
    from lorakit.adapter.load import Recent


@dataclass(frozen=True)
class RunOptions:
    """How a plan is run; nothing here changes a byte of the output, but for the device, which may
    round a rare number to the other side.

    jobs: workers, None for one a core; max_memory: bytes (or a text like "2GB"), None for what is
    available; sync: make every file durable; checksum: note the sha256 of every file; device:
    "cpu", "cuda" (all there are) or "cuda:N". "torch:cpu" is torch's CPU by the way of a GPU, for
    tests of that.
    """

    jobs: int | None = None
    max_memory: int | None = None
    overwrite: bool = False
    sync: bool = True
    checksum: bool = False
    report: Callable[[int], None] = lambda _: None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs is {self.jobs}: a run takes 1 worker or more.")
        if self.max_memory is not None:  # a text like 2GB as well
            object.__setattr__(self, "max_memory", bytes_in(self.max_memory))

    def reporting(self, report: Callable[[int], None]) -> "RunOptions":
        """The same, with `report` called with bytes as they are written."""
        return replace(self, report=report)

    def building(
        self, output: Path, identity: Mapping[str, Any], *, keep: bool = False
    ) -> AbstractContextManager[Workspace]:
        """A workspace that becomes the output in the end, as `lorakit.store.workspace.built`."""
        return built(output, identity, overwrite=self.overwrite, sync=self.sync, keep=keep)

    def replacing(self) -> "RunOptions":
        """The same, in place of what is there."""
        return replace(self, overwrite=True)


@dataclass(frozen=True)
class Job:
    """What `plan_merge` returns: the plan, its inputs, and what will lie beside the weights."""

    plan: Plan
    base: Checkpoint
    adapters: Sequence[AdapterFile]  # not what they are, which grows with the model
    beside: Beside
    asides: Sequence[str] = ()  # notes that depend on what lies around here, and change no bytes

    @property
    def parts(self) -> dict[str, "Job"]:
        """The plans by the folder of the output that each writes: this one."""
        return {"": self}

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return [*self.plan.notes, *self.asides]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files of the result."""
        return self.plan.nbytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return self.plan.to_dict()

    def run(self, output: str | Path, options: RunOptions | None = None) -> Report:
        """Write the output; what was done.

        Raises:
            MisfitError: an adapter has NaN or Inf.
            ResourceError: there is not enough disk or memory, found before anything is written.
            OutputError: the output exists, lies inside an input, or is being written by another.
            UsageError: there is no such device.
        """
        from lorakit.engine.executor import Inputs, executor_for
        from lorakit.engine.run import Run

        options = options or RunOptions()
        output = Path(output)
        check_place(output, [self.base.located.path, *(a.path for a in self.adapters)])
        inputs = Inputs(self._sources, self._open_recipe)
        asked = options.device, options.jobs, options.max_memory
        executor, jobs = executor_for(self.plan, *asked, inputs)
        self._check_hub_hashes(base=options.checksum)
        self._check_adapters()
        self.beside.check()
        stamps = [p.stat().st_mtime_ns for p in self._files()]
        identity = {"plan": self.plan.hash, "inputs": stamps}
        with options.building(output, identity, keep=True) as workspace:
            self._check_disk(workspace)
            run = Run(
                self.plan,
                inputs,
                workspace,
                sync=options.sync,
                checksum=options.checksum,
                report=options.report,
                executor=executor,
            )
            done = run.run(jobs)
            report = report_of(self.plan, done)
            self.beside.write(workspace.folder, self.plan, report, sync=options.sync)
        return report

    def _check_disk(self, workspace: Workspace) -> None:
        try:
            there = workspace.nbytes()
            check_disk(self.plan, workspace.output, self.beside.nbytes, there=there)
        except ResourceError:
            if not workspace.records:
                workspace.discard()
            raise

    def _check_hub_hashes(self, *, base: bool) -> None:
        """Hold what lies in the hub's cache against the sha256 that the hub promised for it.

        Adapters are hashed anyway; a base costs a reading of its own, so it is hashed on request.
        """
        hashed = {a.path: a.sha256 for a in self.adapters}
        if base:
            hashed |= {p: sha256_of(p) for p in self._files() if p not in hashed}
        for path, found in hashed.items():
            if expected_sha256(path) not in (None, found):
                raise InputError(
                    "is not what the hub has: its sha256 differs from the one the hub recorded.",
                    hint="Remove it from the cache and fetch it again.",
                    file=path,
                )

    def _check_adapters(self) -> None:
        from lorakit.adapter.load import check_finite

        for adapter in self.adapters:
            check_finite(adapter.source, adapter.path)

    def _open_recipe(self, fold: Fold) -> Any:
        return recipe_of(fold, self._sources, [a.source for a in self.adapters], self._recent)

    @cached_property
    def _recent(self) -> "Recent":
        from lorakit.adapter.load import Recent

        return Recent()

    @cached_property
    def _sources(self) -> dict[str, Part]:
        return dict(sources_of(self.base, self.adapters))

    def _files(self) -> list[Path]:
        return [*self.base.files, *(a.path for a in self.adapters)]


def check_place(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is, holds, or lies inside an input.

    Raises:
        OutputError: saying which input.
    """
    there = output.absolute().resolve()
    for path in inputs:
        given = path.resolve()
        folder = given if given.is_dir() else given.parent
        inside = not is_file(there) and folder in there.parents and given.is_dir()
        if there == given or given.is_relative_to(there) or inside:
            raise OutputError(
                "the output is, holds or lies inside an input, which is never written to.",
                hint=f"Place it outside {folder}.",
                file=output,
            )


def check_folder(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is no folder, or has to do with an input.

    Raises:
        UsageError, OutputError: saying why.
    """
    if is_file(output):
        raise UsageError("the result is a folder: name one, not a file.")
    check_place(output, inputs)
