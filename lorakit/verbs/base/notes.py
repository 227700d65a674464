"""What a merge tells its user about an adapter: names rewritten, places left out, ranks and factors
that the config and the file disagree on.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.parameters import parameters_of
from lorakit.adapter.pieces import Piece, out_proj_factor
from lorakit.errors import InputError
from lorakit.folder.manifest import read_manifest
from lorakit.verbs.base.placing import Placed


def _attention(adapter: Adapter, mha_factor: int | None) -> list[str]:
    """A line on the 2x rule, where it decides something."""
    count = sum(m.inner for m in adapter.modules.values())
    if not count or mha_factor is not None:
        return []
    factor = out_proj_factor(adapter.config, None)
    return [
        f"{adapter.name}: the out_proj of each MultiheadAttention ({count}) is updated "
        f"{'twice, as PEFT up to 0.21.2 trained it' if factor == 2 else 'once'}; "
        f"--mha-factor {3 - factor} does otherwise."
    ]


def _disagreements(adapter: Adapter) -> Iterator[str]:
    """Lines on scalings and ranks that the config does not say plainly, one for all alike."""
    bare = parameters_of(adapter)
    doubts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, module in adapter.modules.items():
        if not module.low_rank:
            continue
        target = f"{module.name}.{bare[key]}" if key in bare else module.wrapped
        if patterns := adapter.config.overlapping(target):
            why = f"the alpha patterns {patterns} disagree on ", "; the first counts, as in PEFT"
            doubts[why].append(target)
        said = None if key in bare or adapter.config.enable_lora else adapter.config.rank(target)
        if said and said != (rank := module.a.shape[0]):
            why = "", f" has rank {rank}, its config says {said}; the tensors count"
            doubts[why].append(module.name)
    for (before, after), names in doubts.items():
        others = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        yield f"{adapter.name}: {before}{names[0]!r}{after}{others}."


def notes_on(
    adapter: Adapter, found: Placed, dropped: Sequence[Piece], mha_factor: int | None
) -> list[str]:
    """What the user should know of how an adapter meets the base, before anything is written."""
    notes = []
    name = adapter.name
    if found.rewrite:
        notes.append(
            f"{name}: module names are rewritten {found.rewrite} to find them in the base."
        )
    elif other := [h for h in found.landed if h.place.tensor not in h.piece.names]:
        first = other[0]
        notes.append(
            f"{name}: {len({h.piece.target for h in other})} of its names are others on disk, "
            f"first {first.piece.target!r}, which is {first.place.tensor!r}."
        )
    if dropped:
        notes.append(
            f"{name}: {len(dropped)} places left out on request, first {dropped[0].target!r}."
        )
    if adapter.unused:
        notes.append(f"{name}: {len(adapter.unused)} tensors are of use in training only.")
    notes += _plain_among_dora(adapter)
    return [*notes, *_disagreements(adapter), *_attention(adapter, mha_factor)]


def _plain_among_dora(adapter: Adapter) -> list[str]:
    """A line on modules without a magnitude, where others have one."""
    adapted = [m for m in adapter.modules.values() if m.low_rank]
    plain = [m.name for m in adapted if "magnitude" not in m.roles]
    if not plain or len(plain) == len(adapted):
        return []
    return [
        f"{adapter.name}: {len(plain)} of {len(adapted)} modules have no DoRA magnitude, first "
        f"{plain[0]!r}: they are merged as plain LoRA."
    ]


def on_base(base: Path, adapters: Sequence[Adapter]) -> list[str]:
    """Lines on adapters that may be meant for another base than the one at this path."""
    return [*_other_bases(base, adapters), *_merged_already(base, adapters)]


def _other_bases(base: Path, adapters: Sequence[Adapter]) -> Iterator[str]:
    """A line on each adapter whose config names another folder, which is there, as its base.

    Where a base and its adapter were moved together, it is the one beside the adapter.
    """
    for adapter in adapters:
        named = Path(adapter.config.base)
        beside = adapter.path.parent.parent / named.name
        # Not Path.exists, to which a folder that may not be looked into is an error.
        there = next((p for p in (named, beside) if os.path.exists(p)), None)
        if named.is_absolute() and there and not there.samefile(base):
            yield f"{adapter.name}: its config names the base {there}, not this one."


def _merged_already(base: Path, adapters: Sequence[Adapter]) -> Iterator[str]:
    """A line on each adapter that was merged into this base before, by its manifest."""
    said: Mapping[str, Any] = {}
    with suppress(InputError):
        said = read_manifest(base)
    inputs = said.get("inputs") if said.get("verb") == "merge" else ()
    known = {i.get("adapter") for i in inputs or () if isinstance(i, dict) and _is_added(i)}
    for adapter in adapters:
        if adapter.sha256 in known:
            yield (
                f"{adapter.name}: the base is the result of a merge of this very adapter, which is "
                "added once more."
            )


def _is_added(said: Mapping[str, Any]) -> bool:
    """Whether an input was added, and not taken out, as an initialisation does."""
    weight = said.get("weight")
    return isinstance(weight, int | float) and weight > 0
