"""A conversion run: the file of the result written, tensor by tensor, and what is said of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.config import NAME
from lorakit.adapter.new_config import format_config
from lorakit.adapter.weight_file import PEFT
from lorakit.folder.companions import beside_adapter
from lorakit.math.cast import bytes_of
from lorakit.math.rows import row_slices
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.header import format_header
from lorakit.store.writing import PartialFile, write_file
from lorakit.verbs.convert.changes import Change
from lorakit.verbs.convert.plan import Planned
from lorakit.verbs.job import RunOptions, check_folder

CHUNK = 1 << 24  # bytes that are copied at a time


@dataclass(frozen=True)
class Converted:
    """What a conversion did, or would do.

    changes: a line for every module; tensors_before, tensors: how many; written: bytes of the
    weight file; rounded: numbers that a scaling made the dtype round; notes: what else changed.
    """

    names: str
    changes: Sequence[Change]
    tensors_before: int
    tensors: int
    written: int
    rounded: int = 0
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def counts(self) -> dict[str, int]:
        """How many modules were kept, renamed, fused and split."""
        hows = [c.how for c in self.changes]
        return {how: hows.count(how) for how in ("kept", "renamed", "fused", "split")}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "notes": list(self.notes), **self.counts}


@dataclass(frozen=True)
class Conversion:
    """What `plan_convert` returns: the plan and its inputs, ready to be shown or run."""

    adapter: Adapter
    base: Checkpoint
    planned: Planned
    options: Mapping[str, Any]

    @property
    def notes(self) -> list[str]:
        """What changes beside names."""
        return list(self.planned.notes)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight file."""
        return len(self._header()) + sum(i.nbytes for i, _, _ in self.planned.tensors.values())

    def report(self) -> Converted:
        """What a run would do."""
        return Converted(
            names=self.options["names"],
            changes=self.planned.changes,
            tensors_before=len(self.adapter.source.infos),
            tensors=len(self.planned.tensors),
            written=self.nbytes,
            rounded=self.planned.factory.rounded,
            notes=tuple(self.notes),
        )

    def run(self, output: str | Path, options: RunOptions | None = None) -> Converted:
        """Write the result to a folder; what was done.

        Raises:
            OutputError: the output exists, lies inside an input, or is being written by another.
            ResourceError: the disk is full.
        """
        options, output = options or RunOptions(), self.check(output)
        identity = {"convert": dict(self.options), "adapter": self.adapter.sha256}
        with options.building(output, identity) as workspace:
            self.planned.factory.rounded = 0
            self._write(workspace.folder / PEFT, options)
            self._write_beside(workspace.folder, sync=options.sync)
        return self.report()

    def check(self, output: str | Path) -> Path:
        """The place of the output, which is a folder and has nothing to do with an input.

        Raises:
            UsageError, OutputError: saying why it is none.
        """
        return check_folder(output, [*self.base.places, *self.adapter.files])

    def _header(self) -> bytes:
        return format_header([i for i, _, _ in self.planned.tensors.values()])

    def _write(self, path: Path, options: RunOptions) -> None:
        header, at = self._header(), {}
        end = len(header)
        for name, (info, _, _) in self.planned.tensors.items():
            at[name], end = end, end + info.nbytes
        with PartialFile(path, end) as out:
            out.write(header, 0)
            for name, (info, made, origin) in self.planned.tensors.items():
                if made is None:
                    self._copy(origin, out, at[name])
                    options.report(info.nbytes)
                elif made.taken:
                    self._copy(made.taken.roles[origin].name, out, at[name])
                    options.report(info.nbytes)
            self._write_made(out, at, options)
            out.commit(sync=options.sync)

    def _write_made(self, out: PartialFile, at: Mapping[str, int], options: RunOptions) -> None:
        keys: dict[int, dict[str, str]] = {}
        for name, (_, made, role) in self.planned.tensors.items():
            if made is not None and not made.taken:
                keys.setdefault(id(made), {})[role] = name
        for made in (m for m in self.planned.made if not m.taken):
            for role, array in self.planned.factory.build(made).items():
                data = bytes_of(array)
                out.write(data, at[keys[id(made)][role]])
                options.report(data.nbytes)

    def _copy(self, name: str, out: PartialFile, to: int) -> None:
        """Copy the bytes of a tensor, some rows at a time."""
        source, info = self.adapter.source, self.adapter.source.infos[name]
        width = info.nbytes // max(info.rows, 1)
        for some in row_slices(info.rows, width, CHUNK):
            data = bytearray((some.stop - some.start) * width)
            source.read_rows(name, some.start, some.stop, data)
            out.write(data, to + some.start * width)

    def _write_beside(self, folder: Path, *, sync: bool) -> None:
        for name, data in self._beside().items():
            write_file(folder / name, data, sync=sync)

    def _beside(self) -> dict[str, bytes]:
        """The small files that go along, and the config, which comes last."""
        return beside_adapter(self.adapter.path.parent) | {NAME: format_config(self.planned.config)}
