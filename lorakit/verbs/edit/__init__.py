"""edit: an adapter with modules renamed, dropped or made stronger, its scalings told otherwise.

Law: whatever is not asked for stays as it is, tensors to the byte; unless a strength is asked for,
every delta stays, up to the rounding that is told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter, open_adapter
from lorakit.adapter.config import NAME
from lorakit.adapter.new_config import format_config
from lorakit.adapter.weight_file import PEFT
from lorakit.errors import InputError, UsageError
from lorakit.folder.companions import beside_adapter
from lorakit.store.writing import write_file
from lorakit.tensors import CODES
from lorakit.verbs.choices import READING, check_choices, listed
from lorakit.verbs.edit.config import edited_config
from lorakit.verbs.edit.rewriting import (
    Rewritten,
    castable,
    count_rounded,
    header_of,
    rewrite,
)
from lorakit.verbs.edit.selection import Held, held, namer, renamed, selected
from lorakit.verbs.edit.strengths import Scaled, Strength, scaled
from lorakit.verbs.job import RunOptions, check_folder

CHOICES = {"dtype": ("keep", *CODES), "expert_packing": READING["expert_packing"]}


@dataclass(frozen=True)
class Change:
    """What became of one thing that the adapter has: `how` is "kept", "renamed" or "dropped",
    `kind` "update", "rows", "whole" or "training"; ranks and scalings are those of updates.
    """

    name: str
    new_name: str
    how: str
    kind: str
    rank_before: int = 0
    rank: int = 0
    scaling_before: float = 0.0
    scaling: float = 0.0
    factor: float = 1.0  # B was multiplied by it


@dataclass(frozen=True)
class Edited:
    """What an edit did, or would do.

    changes: a line for each update and whole tensor; tensors_before, tensors: how many; written:
    bytes of the weight file; rounded: numbers that are not exactly what was asked for.
    """

    changes: Sequence[Change]
    tensors_before: int
    tensors: int
    written: int
    rounded: int
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def counts(self) -> dict[str, int]:
        """How many updates and whole tensors were kept, renamed and dropped."""
        hows = [c.how for c in self.changes]
        return {how: hows.count(how) for how in ("kept", "renamed", "dropped")}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "notes": list(self.notes), **self.counts}


@dataclass(frozen=True)
class Editing:
    """What `plan_edit` returns: the tensors and the config of the result, ready to be run."""

    adapter: Adapter
    tensors: Sequence[Rewritten]
    changes: Sequence[Change]
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    notes: Sequence[str]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the weight file."""
        return len(header_of(self.tensors)) + sum(t.info.nbytes for t in self.tensors)

    def preview(self) -> Edited:
        """What a run would do; factors that change are read, nothing is written."""
        return self._report(count_rounded(self.tensors, self.adapter.source))

    def run(self, output: str | Path, options: RunOptions | None = None) -> Edited:
        """Write the result to a folder; what was done.

        Raises:
            OutputError: the output exists, lies inside an input, or is being written by another.
            MisfitError: a number does not fit its dtype.
            ResourceError: the disk is full.
        """
        options, output = options or RunOptions(), self.check(output)
        identity = {"edit": dict(self.options), "adapter": self.adapter.sha256}
        with options.building(output, identity) as workspace:
            source, path = self.adapter.source, workspace.folder / PEFT
            rounded = rewrite(path, self.tensors, source, options)
            for name, data in self._beside().items():
                write_file(workspace.folder / name, data, sync=options.sync)
        return self._report(rounded)

    def check(self, output: str | Path) -> Path:
        """The place of the output, which is a folder and has nothing to do with the adapter.

        Raises:
            UsageError, OutputError: saying why it is none.
        """
        return check_folder(output, self.adapter.files)

    def _beside(self) -> dict[str, bytes]:
        """The small files that go along, and the config, which comes last."""
        return beside_adapter(self.adapter.path.parent) | {NAME: format_config(self.config)}

    def _report(self, rounded: int) -> Edited:
        before = len(self.adapter.source.infos)
        return Edited(
            self.changes, before, len(self.tensors), self.nbytes, rounded, tuple(self.notes)
        )


def edit(
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    run: RunOptions | None = None,
    **options: Any,
) -> Edited:
    """Write the edited adapter to the folder `output`; what was done.

    `options` are those of `plan_edit`. Tensors that nothing is asked of are copied byte for byte;
    others are computed in float64 and rounded once, to nearest even, which is exact for factors
    that are powers of two.

    Raises:
        UsageError, InputError, MisfitError: as `plan_edit`.
        OutputError, ResourceError: see `lorakit.errors`.
    """
    return plan_edit(adapter, **options).run(output, run)


def plan_edit(
    adapter: str | Path | Adapter,
    *,
    keep: str | Sequence[str] = (),
    drop: str | Sequence[str] = (),
    rename: str | Sequence[str] = (),
    dtype: str = "keep",
    allow_pickle: bool = False,
    expert_packing: str = "peft",
    **strength: Any,
) -> Editing:
    """The edit that `edit` runs, from headers alone.

    keep, drop: regular expressions; of the first, what matches none goes, of the second, what
    matches any; they are searched for in the names of modules, and of tensors that are held whole.
    rename: "REGEX=REPL", each in turn, for the paths of modules. dtype: of all tensors of floats,
    "keep" or a key of `lorakit.tensors.CODES`. `strength` are the fields of
    `lorakit.verbs.edit.strengths.Strength`: scale, alpha, keep_factors, bake and flatten.

    Raises:
        UsageError: nothing is asked for, a pattern is found nowhere, or nothing would be left.
        InputError: an adapter of this kind cannot be had in that form, or it is for several models.
    """
    wanted = Strength(**strength)
    keep, drop, rename = listed(keep), listed(drop), listed(rename)
    asked = {"keep": keep, "drop": drop, "rename": rename, "dtype": dtype}
    if not (keep or drop or rename or strength or dtype != "keep"):
        raise UsageError("nothing is asked for.", hint="`lorakit edit --help` has what can be.")
    wanted.check()
    check_choices({"dtype": dtype, "expert_packing": expert_packing}, CHOICES)
    opened = open_adapter(adapter, allow_pickle=allow_pickle)
    _check_one(opened)
    things = held(opened)
    stays, gone = selected(things, keep, drop)
    stays = renamed(stays, rename)
    weights, rslora = scaled(opened, stays, wanted)
    tensors = _tensors(opened, things, stays, weights, CODES.get(dtype, ""), expert_packing)
    return Editing(
        opened,
        tensors,
        [*(_change(o, weights) for o in stays), *(_dropped(o) for o in gone)],
        edited_config(
            opened, stays, gone, [*weights.values()], rslora=rslora, flatten=wanted.flatten
        ),
        {**asked, **asdict(wanted), "expert_packing": expert_packing},
        [*opened.one_sided, *_notes(stays, list(weights.values()), wanted)],
    )


def _check_one(adapter: Adapter) -> None:
    """Refuse a file for several models, which one adapter of PEFT cannot be."""
    if len(adapter.parts) > 1 and not (adapter.path.parent / NAME).is_file():
        raise InputError(
            f"is for {', '.join(adapter.parts)}, and edit writes an adapter of one model.",
            hint=f"lorakit convert {adapter.path} -o OUT --to peft makes one of each.",
            file=adapter.path,
        )


def _tensors(
    adapter: Adapter,
    before: Sequence[Held],
    after: Sequence[Held],
    weights: Mapping[str, Scaled],
    dtype: str,
    packing: str,
) -> list[Rewritten]:
    """The tensors of the result, in the order of the adapter's file."""
    name_of = namer(before, after)
    found = {}
    for one in after:
        for role, info in one.roles.items():
            new = replace(info, name=name_of(one, role), start=0)
            if dtype and castable(info):
                new = replace(new, dtype=dtype)
            made = Rewritten(new, info)
            found[info.name] = _scaled(made, role, weights[one.key], packing) if one.key else made
    return [found[name] for name in adapter.source.infos if name in found]


def _scaled(tensor: Rewritten, role: str, one: Scaled, packing: str) -> Rewritten:
    """A factor of a weight with the scaling and the rank that it gets."""
    up = role in ("b", "embedding_b")
    factor = one.factor if up or role == "bias" else 1.0
    shape = list(tensor.info.shape)
    if role in ("a", "b", "embedding_a", "embedding_b") and one.rank != one.new_rank:
        shape[up] = shape[up] // one.rank * one.new_rank
    info = replace(tensor.info, shape=tuple(shape))
    return replace(tensor, info=info, factor=factor, up=up, experts=one.experts, packing=packing)


def _change(one: Held, weights: Mapping[str, Scaled]) -> Change:
    how = "kept" if one.new == one.module else "renamed"
    change = Change(one.name, one.new_name, how, one.kind)
    if not (found := weights.get(one.key)):
        return change
    return replace(
        change,
        rank_before=found.rank,
        rank=found.new_rank,
        scaling_before=found.scaling,
        scaling=found.new_scaling,
        factor=found.factor,
    )


def _dropped(one: Held) -> Change:
    return Change(one.name, "", "dropped", one.kind)


def _notes(things: Sequence[Held], weights: Sequence[Scaled], wanted: Strength) -> list[str]:
    notes = []
    whole = [o.name for o in things if o.kind in ("rows", "whole")]
    if whole and wanted.scale != 1.0:
        notes.append(
            f"{len(whole)} tensors that replace the base's stay as they are, first {whole[0]!r}."
        )
    padded = [o for o in weights if o.new_rank != o.rank]
    if padded:
        notes.append(
            f"{len(padded)} updates are filled up with zeros to rank {padded[0].new_rank}."
        )
    stronger = [o for o in weights if wanted.keep_factors and o.new_scaling != o.scaling]
    if stronger:
        notes.append(f"{len(stronger)} updates change their strength, as asked.")
    return notes
