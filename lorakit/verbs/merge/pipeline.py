"""A merge into a whole pipeline of Diffusers: each model in the folder that it has there, all else
as it is.

Law: the folder of every model is what a merge into that alone writes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from os.path import isfile
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter, open_adapter
from lorakit.adapter.config import NAME as CONFIG
from lorakit.engine.figures import Figures
from lorakit.engine.preflight import check_disk, check_links
from lorakit.errors import MisfitError
from lorakit.folder.companions import WEIGHTS
from lorakit.store.checkpoint import open_checkpoint
from lorakit.store.writing import copy_file, link_file, make_folder, sync_path
from lorakit.verbs.job import Job, RunOptions, check_place
from lorakit.verbs.merge import weights_for
from lorakit.verbs.report import Report, summed

INDEX = "model_index.json"  # of a pipeline


def is_pipeline(base: object) -> bool:
    """Whether a base is the folder of a pipeline of Diffusers."""
    return isinstance(base, str | Path) and isfile(Path(base) / INDEX)


@dataclass(frozen=True)
class PipelineJob:
    """The plans of the models that change, by their folders, ready to be shown or run."""

    base: Path
    parts: Mapping[str, Job]
    link: bool = False

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return [f"{name}: {note}" for name, job in self.parts.items() for note in job.notes]

    @cached_property
    def copies(self) -> dict[str, Path]:
        """The files that stay as they are, by their path in the result."""
        return kept_files(self.base, self.parts)

    @property
    def inputs(self) -> list[Path]:
        """The paths that it reads."""
        parts = (path for job in self.parts.values() for path in job.inputs)
        return [self.base, *parts, *self.copies.values()]

    @property
    def linked(self) -> list[Path]:
        """The files that the result links to."""
        copies = self.copies.values() if self.link else ()
        return [*copies, *(path for job in self.parts.values() for path in job.linked)]

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(j.nbytes for j in self.parts.values()) + self._copied

    def run(self, output: str | Path, options: RunOptions | None = None) -> Report:
        """Write the whole pipeline; what was done, tensors by `folder/name`.

        Raises:
            As `Job.run`.
        """
        options, output = options or RunOptions(), check_place(output, self.inputs)
        check_links(self.linked, output)
        identity = {
            "pipeline": {name: job.plan.hash for name, job in self.parts.items()},
            "inputs": [j.stamps for j in self.parts.values()],
            "copies": {name: p.stat().st_mtime_ns for name, p in self.copies.items()},
        }
        with options.building(output, identity, keep=True) as workspace:
            first, there = next(iter(self.parts.values())), workspace.nbytes()
            check_disk(first.plan, workspace.output, self.nbytes - first.nbytes, there=there)
            earlier = workspace.records
            done = {r["done"]: _read_report(r["report"]) for r in earlier if "done" in r}
            for name, job in self.parts.items():
                if name not in done:
                    done[name] = job.run(workspace.folder / name, options.replacing())
                    line = {"done": name, "report": asdict(done[name])}
                    workspace.record(line, sync=options.sync)
            if not any("copying" in r for r in earlier):
                self._uncopy(workspace.folder)
                workspace.record({"copying": True}, sync=options.sync)
            self._copy(workspace.folder, options)
        return summed({name: done[name] for name in self.parts})

    @property
    def _copied(self) -> int:
        return sum(p.stat().st_size for p in self.copies.values())

    def _uncopy(self, folder: Path) -> None:
        """Remove copies of a run without syncs after which the machine went down."""
        for name in self.copies:
            (folder / name).unlink(missing_ok=True)

    def _copy(self, folder: Path, options: RunOptions) -> None:
        for name, source in self.copies.items():
            target = folder / name
            make_folder(target.parent, sync=options.sync)
            if self.link:
                link_file(source, target)
            elif not target.exists():  # an earlier run has copied it whole
                copy_file(source, target, sync=options.sync)
            options.report(source.stat().st_size)
        if options.sync and self.link:
            for place in {(folder / n).parent for n in self.copies}:
                sync_path(place)


def kept_files(folder: Path, changed: Collection[str]) -> dict[str, Path]:
    """The files of a pipeline by their path in it, but for those of the models that change, and of
    models in one file beside them.
    """
    found: list[Path] = []
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name in changed:
            continue
        if entry.is_dir():
            found += (p for p in entry.rglob("*") if p.is_file())
        elif not WEIGHTS.fullmatch(entry.name) and (entry.is_file() or not entry.exists()):
            found.append(entry)
    return {str(p.relative_to(folder)): p for p in sorted(found)}


def plan_pipeline(
    plan: Callable[..., Job],
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    *,
    weights: Sequence[float] | None = None,
    link: bool = False,
    **options: Any,
) -> PipelineJob:
    """The plans for the models of a pipeline that adapters change.

    plan: `plan_merge` or `plan_unmerge`, whose options `options` are.

    Raises:
        MisfitError: an adapter is for a model that the pipeline has not, or does not say for which.
        UsageError: an option makes no sense.
    """
    base = Path(base)
    weighed = weights_for(weights, len(adapters))
    pickles = bool(options.get("allow_pickle"))
    each = [_by_folder(a, base, allow_pickle=pickles) for a in adapters]
    jobs = {}
    for name in sorted({folder for found in each for folder in found}):
        here = [(found[name], w) for found, w in zip(each, weighed, strict=True) if name in found]
        given = {**options, "weights": [w for _, w in here], "link": link, "component": name}
        jobs[name] = plan(base / name, [a for a, _ in here], **given)
    return PipelineJob(base, jobs, link)


def _by_folder(
    adapter: str | Path | Adapter, base: Path, *, allow_pickle: bool
) -> dict[str, Adapter]:
    """What an adapter is to each model of the pipeline, by its folder."""
    if not isinstance(adapter, Adapter):
        folder = Path(adapter)
        inside = {p.parent.name: p.parent for p in sorted(folder.glob(f"*/{CONFIG}"))}
        if inside and not (folder / CONFIG).exists():
            found = {n: open_adapter(p, allow_pickle=allow_pickle) for n, p in inside.items()}
            return _checked(found, base, folder)
        adapter = open_adapter(adapter, allow_pickle=allow_pickle, dense=True)
    if adapter.parts:
        return _checked(dict.fromkeys(adapter.parts, adapter), base, adapter.path)
    return {_folder_of(adapter, base, allow_pickle=allow_pickle): adapter}


def _checked(found: dict[str, Adapter], base: Path, file: Path) -> dict[str, Adapter]:
    for name in found:
        if not (base / name).is_dir():
            there = next(n for n in (*found, "") if n != name)
            raise MisfitError(
                f"changes the {name}, which this pipeline has not.",
                hint=f"Merge into {base / there} with --component {there} to take that alone."
                if there
                else "Name the pipeline that it is for.",
                file=file,
            )
    return found


def _folder_of(adapter: Adapter, base: Path, *, allow_pickle: bool) -> str:
    """The one model in which all modules of an adapter are, with weights of their shapes."""
    fitting = []
    for folder in sorted(p for p in base.iterdir() if p.is_dir()):
        if any(p.suffix == ".safetensors" for p in folder.iterdir()):
            infos = open_checkpoint(str(folder), allow_pickle=allow_pickle).infos
            wanted = {
                f"{m.name}.weight": (m.b.rows, *m.a.shape[1:])
                for m in adapter.modules.values()
                if m.low_rank
            }
            if all(n in infos and infos[n].shape == shape for n, shape in wanted.items()):
                fitting.append(folder.name)
    if len(fitting) == 1:
        return fitting[0]
    what = f"fits {' and '.join(fitting)}" if fitting else "fits none of the models"
    raise MisfitError(
        f"does not say which model of the pipeline it is for, and {what}.",
        hint=f"Name the folder of that model, such as {base / 'unet'}.",
        file=adapter.path,
    )


def _read_report(plain: Mapping[str, Any]) -> Report:
    lists = {n: tuple(plain[n]) for n in ("notes", "devices")}
    figures = {n: Figures(*f) for n, f in plain["figures"].items()}
    return Report(**{**plain, **lists, "figures": figures})
