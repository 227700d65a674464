"""The updates of an adapter, cut into blocks of the matrices on disk.

A cut is what one pair of factors (or one expert of a stack of them) changes in one matrix on disk:
rows and columns of it, and which rows of the factors those are.

Law: the cuts of an adapter's updates are all of their rows and columns, each once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.adapter.module import Module
from lorakit.verbs.base.placing import Landed
from lorakit.verbs.convert.goals import Span


@dataclass(frozen=True, slots=True)
class Cut:
    """A block of a matrix on disk, `rows` by `cols` of it, and the factors that change it.

    With `turned`, B spans the columns and A the rows. `begin` is the first row of the factors
    (after turning) that the block has.
    """

    module: Module
    tensor: str
    rows: Span
    cols: Span
    scaling: float
    rank: int
    slot: int | None = None  # of a stack on disk
    expert: int | None = None  # of a stack in the adapter
    experts: int = 0
    turned: bool = False
    begin: int = 0
    whole: bool = False  # a layer by itself, as it is: every tensor of it goes along
    opaque: bool = False  # its factors are no plain matrices of rows and columns on disk

    @property
    def source(self) -> tuple[str, int | None]:
        """What it has its factors from."""
        return self.module.a.name, self.expert


def cuts(here: Landed, plain: Mapping[str, Any]) -> Iterator[Cut]:
    """The cuts of an update that lands as the plain data of `lorakit.verbs.base.landing` says."""
    if "experts" in plain:
        yield from _of_experts(here, plain)
        return
    module, place = _module(here), here.place
    out, inner = module.b.shape[0], module.a.shape[1]
    rank, scaling = module.a.shape[0], plain["scaling"]
    if plain.get("columns"):  # of one expert in a stack that lies (in, out)
        begin = place.at or 0
        cols = (begin, begin + out)
        yield Cut(
            module, place.tensor, (0, inner), cols, scaling, rank, slot=place.slot, turned=True
        )
        return
    start, stop = plain.get("rows") or (0, out)
    at = place.at or 0
    whole = "at" not in plain and not plain.get("rows")
    yield Cut(
        module,
        place.tensor,
        (at, at + stop - start),
        (0, inner),
        scaling,
        rank,
        slot=place.slot,
        begin=start,
        whole=whole,
        opaque=whole and _is_opaque(module, plain),
    )


def _is_opaque(module: Module, plain: Mapping[str, Any]) -> bool:
    turned = module.embedding or plain.get("transposed") or len(module.a.shape) > 2
    return bool(turned or plain.get("blocks") or plain.get("enabled") or "diag" in module.roles)


def _of_experts(here: Landed, plain: Mapping[str, Any]) -> Iterator[Cut]:
    module, count = _module(here), plain["experts"]
    out, inner, rank = module.b.shape[0], module.a.shape[1], module.a.shape[0] // count
    height, width = (inner, out) if plain["turned"] else (out, inner)
    one = plain.get("expert")
    numbers = [one] if one is not None else range(count)
    for number in numbers:
        start, stop = plain.get("rows") or (0, height)
        yield Cut(
            module,
            here.place.tensor,
            (0, stop - start),
            (0, width),
            plain["scaling"],
            rank,
            slot=number if plain.get("stacked") else None,
            expert=number,
            experts=count,
            turned=plain["turned"],
            begin=start,
        )


def _module(here: Landed) -> Module:
    assert here.piece.source is not None
    return here.piece.source
