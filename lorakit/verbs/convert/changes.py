"""What a conversion did to each module, and what its user should know beside."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.verbs.convert.assembly import Made


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the report: what a module was, and what it is."""

    sources: tuple[str, ...]
    name: str
    how: str  # kept, renamed, fused or split
    rank_before: int
    rank: int


def notes_on(
    adapter: Adapter, made: Sequence[Made], config: Mapping[str, Any], *, exact: bool
) -> Iterator[str]:
    """Lines on what changes beside names. `exact` says that all scalings are the very same."""
    raw = adapter.config.raw
    if config.get("peft_version") != raw.get("peft_version"):
        yield (
            f"the config names PEFT {config.get('peft_version')}, by which readers know the layout."
        )
    if raw.get("lora_dropout") and not config.get("lora_dropout"):
        yield "lora_dropout is 0 now: PEFT has none for parameters. It mattered in training only."
    folded = {m.goal.name for m in made for one in m.groups for g in one if g.factor != 1.0}
    if folded:
        yield (
            f"{len(folded)} modules have parts with scalings of their own, which are multiplied "
            f"into B; the first is {min(folded)!r}."
        )
    if padded := [m for m in made if m.goal.experts and not _is_even(m)]:
        yield (
            f"{len(padded)} stacks have experts of lower rank or none, filled up with zeros; the "
            f"first is {padded[0].goal.name!r}."
        )
    if not exact:
        yield "an alpha has no float64 with just the old scaling; it is off in the last bit."


def _is_even(made: Made) -> bool:
    return all(sum(len(g.ranks) for g in one) == made.rank for one in made.groups)


def change_of(made: Made) -> Change:
    """The line on a module."""
    sources = made.sources
    cut = [g.cut for one in made.groups for g in one]
    before = cut[0].rank if cut else made.rank
    return Change(tuple(m.name for m in sources), made.goal.name, _how(made), before, made.rank)


def _how(made: Made) -> str:
    same = made.goal.module == made.sources[0].name
    if not made.taken:
        found = [g.cut for one in made.groups for g in one]
        if len(made.sources) > 1 or (made.goal.experts and not found[0].experts):
            return "fused"
        blocks = [b for one in made.groups for g in one for b in g.blocks]
        area = sum(b.area for b in blocks)
        count = max(found[0].experts, 1)
        whole = found[0].module.b.shape[0] * found[0].module.a.shape[1] * count
        if area < whole:
            return "split"
    return "kept" if same else "renamed"
