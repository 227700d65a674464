"""A plan together with what it reads: ready to be shown, or run into an output."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapter.adapter import AdapterFile
from lorakit.engine.plan import Fold, Plan
from lorakit.engine.preflight import check_links, check_room
from lorakit.errors import OutputError, UsageError
from lorakit.store.checkpoint import Checkpoint, Part
from lorakit.store.hashing import sha256_of
from lorakit.store.hub import check_promise
from lorakit.store.output import is_file, named
from lorakit.store.workspace import Workspace, built
from lorakit.tensors import bytes_in
from lorakit.verbs.base.sources import recipe_of, sources_of
from lorakit.verbs.beside import Beside
from lorakit.verbs.report import Report, report_of

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

    @property
    def inputs(self) -> list[Path]:
        """The paths that it reads."""
        adapters = (path for a in self.adapters for path in a.files)
        return [*self.base.places, *adapters, *self.beside.copies.values()]

    @property
    def linked(self) -> list[Path]:
        """The weight files of the base, where some of the result are links to them."""
        return self.base.files if any(f.link for f in self.plan.files) else []

    @property
    def stamps(self) -> list[int]:
        """When each weight file was changed last."""
        files = (*self.base.files, *(a.path for a in self.adapters))
        return [p.stat().st_mtime_ns for p in files]

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
        output = check_place(output, self.inputs)
        inputs = Inputs(self._sources, self._open_recipe)
        asked = options.device, options.jobs, options.max_memory
        executor, jobs = executor_for(self.plan, *asked, inputs)
        for path in self.base.files if options.checksum else ():
            check_promise(path, partial(sha256_of, path))
        self._check_adapters()
        self.beside.check()
        check_links(self.linked, output)
        identity = {"plan": self.plan.hash, "inputs": self.stamps}
        with options.building(output, identity, keep=True) as workspace:
            check_room(self.plan, workspace, self.beside.nbytes)
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
        return replace(report, notes=tuple(self.notes))

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


def check_place(output: str | Path, inputs: Iterable[Path]) -> Path:
    """The place of an output, unless it is, holds, or lies inside an input, or what that leads to.

    Raises:
        UsageError, OutputError: there can be no output; or saying which input.
    """
    output = named(output)
    ours = {Path(os.path.abspath(output)), Path(os.path.realpath(output))}
    for path in dict.fromkeys(p for i in inputs for p in (i, *_links(i))):
        folder = path.is_dir()
        for given in _places(path):
            inside = folder and any(given in o.parents and not is_file(o) for o in ours)
            if inside or any(given.is_relative_to(o) for o in ours):
                raise OutputError(
                    "the output is, holds or lies inside an input, which is never written to.",
                    hint=f"Place it outside {given if folder else given.parent}.",
                    file=output,
                )
    return output


def check_folder(output: str | Path, inputs: Iterable[Path]) -> Path:
    """The same, of an output that has to be a folder."""
    if is_file(named(output)):
        raise UsageError("the result is a folder: name one, not a file.")
    return check_place(output, inputs)


def _links(folder: Path) -> list[Path]:
    """The files in a folder that are links; what they lead to is read with it."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [p for p in found if p.is_symlink() and not p.is_dir()]


def _places(path: Path) -> list[Path]:
    """Where a path is, and where each link leads that it follows."""
    found = [Path(os.path.abspath(path))]
    while (here := found[-1]).is_symlink() and here not in found[:-1]:
        found.append(Path(os.path.abspath(here.parent / here.readlink())))
    return [*found, Path(os.path.realpath(path))]
