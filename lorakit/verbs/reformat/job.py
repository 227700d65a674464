"""One LoRA file as another format: what becomes of every module, written, and checked.

Law: every tensor of the source is in a module of the result, is carried, or is dropped on request;
the update of each module is that of the source, up to the rounding that the report names.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.adapter.config import NAME as CONFIG
from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.delta import Delta, Opened, Values
from lorakit.adapter.files.gguf import read_as, read_gguf, write_gguf
from lorakit.adapter.files.joints import check_norms
from lorakit.adapter.files.reading import METADATA, open_file
from lorakit.adapter.files.saving import (
    HASHES,
    SOURCE,
    adapter_metadata,
    folders_of,
    hashes,
    is_scaled,
    number_of,
    said_of,
    source_of,
    with_biases,
    write_values,
)
from lorakit.adapter.files.spelling import Step, Tensors, spelled
from lorakit.adapter.new_config import format_config
from lorakit.errors import LorakitError, UsageError, about
from lorakit.formats.patterns import search
from lorakit.formats.recognise import LANGUAGE
from lorakit.formats.spelling import SPELLINGS, clip_name
from lorakit.store.checkpoint import open_part
from lorakit.store.output import is_file, named
from lorakit.store.reading import read_file
from lorakit.store.writing import make_folder, write_file
from lorakit.verbs.job import RunOptions, check_place
from lorakit.verbs.reformat.agreeing import disagreements
from lorakit.verbs.reformat.formats import FORMATS, Format
from lorakit.verbs.reformat.options import ReformatOptions
from lorakit.verbs.reformat.projecting import Differing, differing, is_empty
from lorakit.verbs.reformat.report import Reformatted
from lorakit.verbs.reformat.respelling import notes_of, unlike


@dataclass(frozen=True)
class Reformatting:
    """What `plan_reformat` returns: the source, read, and what it is to become."""

    path: Path
    opened: Opened
    wanted: ReformatOptions
    dropped: Sequence[str] = ()
    carried: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)  # of the base, for GGUF

    @property
    def to(self) -> str:
        """The format of the result."""
        return self.wanted.to

    @property
    def form(self) -> Format:
        """How that is written."""
        return FORMATS[self.to]

    @property
    def fold(self) -> bool:
        """Whether scalings are multiplied into the factors."""
        return self.wanted.alpha == "fold"

    def check(self, output: str | Path) -> Path:
        """The place of the output, which suits the format and has nothing to do with the input.

        Raises:
            UsageError, OutputError: saying why it is none.
        """
        output = named(output)
        if self.form.config and is_file(output):
            raise UsageError(f"{self.to} has a folder: name one, not a file.")
        if is_file(output) and output.suffix != self.form.suffix:
            raise UsageError(f"a file in {self.to} ends in {self.form.suffix}.")
        config = self.path.parent / CONFIG
        inputs = [self.path, *([config] if config.exists() else []), *self.wanted.inputs]
        return check_place(output, inputs)

    def report(self) -> Reformatted:
        """What a run would do; nothing is written."""
        return self._report([t.step for t in self.made()])

    def run(self, output: str | Path, options: RunOptions | None = None) -> Reformatted:
        """Write the result, and hold it against the source; what was done.

        Raises:
            OutputError: the output exists, lies inside an input, or is being written by another.
            ResourceError: the disk is full.
            MisfitError: the format cannot hold a module.
            LorakitError: what was written is not what was read; nothing is left.
        """
        options, output = options or RunOptions(), self.check(output)
        made = list(self.made())
        identity = {"reformat": [str(self.path.absolute()), self.wanted.to_dict()]}
        with options.building(output, identity) as workspace:
            written = self._write(workspace.folder, workspace.output, made, options)
            worst = self._check(workspace.folder, workspace.output)
        return self._report([t.step for t in made], written, worst)

    @cached_property
    def deltas(self) -> list[Delta]:
        """The modules that are taken."""
        drop = self.wanted.drop
        return [d for d in self.opened.deltas if not (drop and search(drop, d.module))]

    def made(self) -> Sequence[Tensors]:
        """The modules of the result.

        Raises:
            MisfitError: the format cannot hold one.
        """
        with about(self.path):
            return self._spelled()

    def _spelled(self) -> Sequence[Tensors]:
        if self.form.tensors:
            return self.form.tensors(self.deltas, self.config)
        number = number_of(self.opened.metadata)
        flat = self.wanted.clip_prefix == "flat"
        spelling = replace(SPELLINGS[self.to], number=number, flat_clip=flat)
        made = list(spelled(self.deltas, spelling, self.opened.family, fold=self.fold))
        if spelling.alpha:
            return made
        check_norms(self.deltas, self.to)
        return with_biases(made, spelling.endings["bias"])

    def _report(self, steps: Sequence[Step], written: int = 0, worst: float = 0.0) -> Reformatted:
        one = self.opened
        return Reformatted(
            one.format,
            one.family,
            one.namespace,
            self.to,
            len(one.deltas),
            steps,
            self.dropped,
            self.carried,
            written,
            worst,
            notes_of(one, self.deltas, self.wanted),
        )

    def _write(
        self, folder: Path, output: Path, made: Sequence[Tensors], options: RunOptions
    ) -> int:
        """Write the weight files, one for each component of a PEFT adapter; their bytes."""
        if self.unchanged(made):
            return self._copy(folder, output, options)
        name = self._name(output)
        if self.to == "gguf":
            return write_gguf(folder / name, made, self.config, sync=options.sync)
        total = 0
        for place, some in folders_of(made, self.to).items():
            values = {n: v for t in some for n, v in t.values.items()}
            values |= {n: self.opened.extras[n] for n in self.carried}
            there = folder / place
            make_folder(there, sync=options.sync)
            metadata = self._metadata(some, values)
            total += write_values(
                there / name, values, metadata, sync=options.sync, report=options.report
            )
            if self.form.config:
                said = {**self.opened.config, **said_of(self.opened.config, self.carried)}
                config = format_config(self.form.config(some, said))
                write_file(there / CONFIG, config, sync=options.sync)
        return total

    def _again(self, folder: Path, output: Path) -> Iterator[tuple[Path, Opened]]:
        """What was written, read again."""
        for path in folder.glob("*.gguf"):
            yield folder, read_gguf(path, self.config)
        for place in sorted(p.parent for p in folder.rglob("*.safetensors")):
            path = place / output.name if is_file(output) else place
            family = LANGUAGE if self.to == "peft" else self.opened.family
            yield place, open_file(path, family=family)

    def unchanged(self, made: Sequence[Tensors]) -> bool:
        """Whether the result is the file itself: its names are those that the format has for these
        modules, and a config beside it says nothing that the result would not have.
        """
        whole = self.path.suffix == ".safetensors" and not self.wanted.respells
        alone = self.form.config or not self.opened.config
        if not (whole and alone and self.to == self.opened.format):
            return False
        config = AdapterConfig(self.opened.config, self.path.parent / CONFIG)
        if self.to == "peft" and any(disagreements(self.deltas, config)):
            return False
        infos = open_part(self.path).infos
        given = {n: i.shape for n, i in infos.items() if n not in self.carried}
        return not unlike(given, made, self.to)

    def _copy(self, folder: Path, output: Path, options: RunOptions) -> int:
        data = read_file(self.path)
        write_file(folder / self._name(output), data, sync=options.sync)
        if self.form.config:
            config = read_file(self.path.parent / CONFIG)
            write_file(folder / CONFIG, config, sync=options.sync)
        return len(data)

    def _name(self, output: Path) -> str:
        if is_file(output):
            return output.name
        return self.form.file or output.name + self.form.suffix

    def _metadata(self, made: Sequence[Tensors], values: Mapping[str, Values]) -> dict[str, str]:
        before = self.opened.metadata
        found = {k: v for k, v in before.items() if k not in (METADATA, SOURCE)}
        if self.to in ("diffusers", "peft"):
            found |= source_of(self.deltas, before)
        if self.to == "diffusers" and not self.fold and any(is_scaled(t) for t in made):
            found[METADATA] = json.dumps(adapter_metadata(made), indent=2, sort_keys=True)
        if HASHES & found.keys():
            found |= hashes(values, found)
        return {"format": "pt", **found}

    def _check(self, folder: Path, output: Path) -> float:
        """Read what was written and compare the update of every module, on a random input.

        Raises:
            LorakitError: one is another.
        """
        worst = 0.0
        wanted = {(d.component, self._read_again(d)): d for d in self.deltas}
        for place, again in self._again(folder, output):
            for delta in again.deltas:
                key = _key(delta, place, folder, self)
                if key not in wanted and is_empty(delta):
                    continue
                try:
                    with about(self.path):
                        worst = max(worst, differing(wanted.pop(key), delta))
                except (KeyError, Differing) as error:
                    raise LorakitError(
                        f"{delta.module!r} was not written as it was read ({error}).",
                        hint="This is a fault of lorakit: please report it.",
                        file=output,
                        tensor=delta.module,
                    ) from error
        left = [d for d in wanted.values() if not is_empty(d)]
        if left:
            raise LorakitError(
                f"{left[0].module!r} was not written.",
                hint="This is a fault of lorakit: please report it.",
                file=output,
            )
        return worst

    def _read_again(self, delta: Delta) -> str:
        """What a module is called in what was written; names of PEFT are read as they are."""
        if self.to == "gguf":
            return read_as(delta.module, self.config)
        if self.to != "peft" or self.wanted.clip_prefix != "flat":
            return delta.module
        return clip_name(self.opened.family, delta.component, delta.module)


def _key(delta: Delta, place: Path, folder: Path, job: Reformatting) -> tuple[str, str]:
    """What a delta that was read again was called in the source."""
    if job.to != "peft":
        return delta.component, delta.module
    inside = place.relative_to(folder).as_posix()
    component = inside if inside != "." else job.deltas[0].component
    return component, delta.module
