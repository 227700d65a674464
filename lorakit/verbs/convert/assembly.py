"""Modules of a converted adapter, put together from cuts of the old one; nothing is read here but,
where a module is split, which of its ranks are zero.

Law: the delta of a module made is, in each of its rows and columns, that of the cuts that lie
there, and every row and column of every cut lies in one module.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lorakit.adapter.module import Module
from lorakit.errors import MisfitError
from lorakit.verbs.convert.cutting import Cut
from lorakit.verbs.convert.goals import Goal, Span, Window

Ranks = Mapping[tuple[str, Span, Span], tuple[int, ...]]


class Values(Protocol):
    """What has to be known of the numbers of factors."""

    def supports(self, cut: Cut, spans: Sequence[Span], by_rows: bool) -> Sequence[Sequence[int]]:
        """The ranks of a module that matter to each of some rows (or columns) of its update."""
        ...

    def same_a(self, one: Cut, other: Cut) -> bool:
        """Whether two modules have the very same A."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of B and columns of A of a cut, and the row and column of the goal where they begin."""

    cut: Cut
    rows: Span
    cols: Span
    at: tuple[int, int]

    @property
    def area(self) -> int:
        """How many numbers of the delta it is."""
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])

    @property
    def key(self) -> tuple[str, Span, Span]:
        """The part of a module that it is, whichever expert's."""
        return self.cut.module.a.name, self.rows, self.cols


@dataclass(frozen=True)
class Group:
    """Blocks that share their ranks: of one pair of factors side by side, or of one A."""

    blocks: Sequence[Block]
    ranks: tuple[int, ...]  # of the factors' own
    factor: float = 1.0  # of B, where the scaling is not the module's

    @property
    def cut(self) -> Cut:
        """Where the factors are from, or A of several and the scaling."""
        return self.blocks[0].cut


@dataclass(frozen=True)
class Made:
    """A module of the result: its goal, the groups of each expert (one "expert" for a layer), rank
    and scaling; or the module whose tensors it takes over as they are.
    """

    goal: Goal
    groups: Sequence[Sequence[Group]]
    rank: int
    scaling: float
    taken: Module | None = None

    @property
    def sources(self) -> list[Module]:
        """The modules that it is made of, each once."""
        if self.taken:
            return [self.taken]
        blocks = (b for groups in self.groups for g in groups for b in g.blocks)
        found = {b.cut.module.a.name: b.cut.module for b in blocks}
        return list(found.values())


def assembled(goals: Sequence[Goal], cuts: Sequence[Cut], values: Values) -> list[Made]:
    """What becomes of the cuts, in the order of the goals.

    Raises:
        MisfitError: some of a cut lies in no goal.
    """
    there: dict[tuple[str, int | None], list[Cut]] = defaultdict(list)
    for cut in cuts:
        there[cut.tensor, cut.slot].append(cut)
    blocks = {id(g): _blocks(g, there) for g in goals}
    _check_all(cuts, [b for per in blocks.values() for one in per for b in one])
    ranks = _ranks(list(blocks.values()), values)
    return [_made(g, blocks[id(g)], ranks, values) for g in goals if any(blocks[id(g)])]


def _blocks(goal: Goal, there: Mapping[tuple[str, int | None], Sequence[Cut]]) -> list[list[Block]]:
    """The blocks of each expert of a goal."""
    found: list[list[Block]] = [[] for _ in range(goal.experts or 1)]
    for window in goal.windows:
        for cut in there.get((window.tensor, window.slot), ()):
            if block := _block(cut, window):
                found[window.expert or 0].append(block)
    return found


def _block(cut: Cut, window: Window) -> Block | None:
    """What of a cut a window shows."""
    if cut.opaque:
        return Block(cut, cut.rows, cut.cols, (0, 0))
    span = cut.cols if window.axis else cut.rows
    first, last = max(span[0], window.span[0]), min(span[1], window.span[1])
    if first >= last:
        return None
    own, at = (first - span[0], last - span[0]), window.at + first - window.span[0]
    if window.axis:
        rows = (cut.begin, cut.begin + cut.rows[1] - cut.rows[0])
        return Block(cut, rows, own, (cut.rows[0], at))
    width = cut.cols[1] - cut.cols[0]
    return Block(cut, (cut.begin + own[0], cut.begin + own[1]), (0, width), (at, cut.cols[0]))


def _check_all(cuts: Sequence[Cut], blocks: Sequence[Block]) -> None:
    found: Counter[int] = Counter()
    for block in blocks:
        found[id(block.cut)] += block.area
    for cut in cuts:
        size = (cut.rows[1] - cut.rows[0]) * (cut.cols[1] - cut.cols[0])
        if found[id(cut)] != size:
            raise MisfitError(
                f"of the {size} numbers that {cut.module.name!r} changes in {cut.tensor!r}, "
                f"{found[id(cut)]} have a place under the names that are wanted.",
                hint="Keep the names of the disk: --names disk.",
                tensor=cut.module.a.name,
            )


def _ranks(goals: Sequence[Sequence[Sequence[Block]]], values: Values) -> Ranks:
    """The ranks that the parts of a module need, where goals have only some rows or columns."""
    parts: dict[str, dict[tuple[Span, Span], Cut]] = defaultdict(dict)
    shared = set()
    for blocks in (one for goal in goals for one in goal):
        seen = Counter(b.cut.source for b in blocks)
        shared |= {source[0] for source, count in seen.items() if count > 1}
        for block in blocks:
            parts[block.cut.module.a.name][block.rows, block.cols] = block.cut
    found: dict[tuple[str, Span, Span], tuple[int, ...]] = {}
    for name, there in parts.items():
        if len(there) < 2 or name in shared:
            continue
        by_rows = len({cols for _, cols in there}) == 1
        spans = [rows if by_rows else cols for rows, cols in there]
        chosen = values.supports(next(iter(there.values())), spans, by_rows)
        found |= {(name, *p): tuple(r) for p, r in zip(there, chosen, strict=True)}
    return found


def _made(goal: Goal, blocks: Sequence[Sequence[Block]], ranks: Ranks, values: Values) -> Made:
    if (cut := _taken_over(goal, blocks)) is not None:
        return Made(goal, (), cut.rank, cut.scaling, cut.module)
    groups = [list(_groups(one, ranks)) for one in blocks]
    if all(_share(one, values) for one in groups):
        groups = [[replace(g[0], blocks=[b for x in g for b in x.blocks])] for g in groups]
    rank = max(sum(len(g.ranks) for g in one) for one in groups)
    scalings = Counter(g.cut.scaling for one in groups for g in one)
    ((scaling, _),) = scalings.most_common(1)
    if not scaling:  # an alpha of zero: no other can be had from it
        scaling = next((s for s in scalings if s), 0.0)
    return Made(goal, [[_rescaled(g, scaling) for g in one] for one in groups], rank, scaling)


def _taken_over(goal: Goal, blocks: Sequence[Sequence[Block]]) -> Cut | None:
    """The one module that a goal is another name of."""
    if goal.experts or goal.turned or len(goal.windows) != 1 or len(blocks[0]) != 1:
        return None
    block = blocks[0][0]
    whole = block.cut.whole and (block.rows, block.cols) == (block.cut.rows, block.cut.cols)
    return block.cut if whole else None


def _groups(blocks: Sequence[Block], ranks: Ranks) -> Iterator[Group]:
    by_source: dict[tuple[str, int | None], list[Block]] = defaultdict(list)
    for block in blocks:
        by_source[block.cut.source].append(block)
    for together in by_source.values():
        columns = {(b.cols, b.at[1]) for b in together}
        rows = {(b.rows, b.at[0]) for b in together}
        shared = len(columns) == 1 or len(rows) == 1
        for part in [together] if shared else [[b] for b in together]:
            yield Group(part, ranks.get(part[0].key, tuple(range(part[0].cut.rank))))


def _share(groups: Sequence[Group], values: Values) -> bool:
    """Whether all groups have one and the same A, scaling and columns, so that their ranks are one:
    gate and up that were split from a stack.
    """
    if len(groups) < 2:
        return False
    cuts = [g.cut for g in groups]
    alike = {(c.scaling, c.rank, c.experts, g.ranks) for c, g in zip(cuts, groups, strict=True)}
    columns = {(b.cols, b.at[1]) for g in groups for b in g.blocks}
    plain = not any(c.experts or c.turned for c in cuts)
    return (
        plain
        and len(alike) == len(columns) == 1
        and all(values.same_a(cuts[0], c) for c in cuts[1:])
    )


def _rescaled(group: Group, scaling: float) -> Group:
    if group.cut.scaling == scaling:
        return group
    return replace(group, factor=group.cut.scaling / scaling)
