"""From the pieces of an adapter to the tensors on disk that they change.

In this order: the name as it is, the same thing in another spelling or packing that the family of
the base is known for, one rewrite of the front of all remaining names, transformers' own table.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import Piece, known_by_looks
from lorakit.configs import model_type
from lorakit.errors import MisfitError
from lorakit.naming.original import Original
from lorakit.naming.places import Disk, Place, places
from lorakit.naming.resolve import Rewrite, Wanted, resolve
from lorakit.naming.runtime import by_transformers
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.landing import Context, height_of, landing


@dataclass(frozen=True)
class Base:
    """What is known of a base before a byte of its weights is read."""

    infos: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = ""

    @cached_property
    def disk(self) -> Disk:
        """Its tensors by their canonical names."""
        return Disk(self.infos, self.model_type)

    @cached_property
    def original(self) -> Original:
        """Its tensors by the names of the original code of an image or video model."""
        return Original(self.infos)

    @cached_property
    def by_transformers(self) -> Mapping[str, Sequence[Place]]:
        """Where each parameter of the model is, by transformers where that is installed."""
        found = by_transformers(self.config, self.disk)
        return found.places if found else {}


def base_of(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Base:
    """A base by its tensors and config; its model type by its looks where the config is silent."""
    return Base(infos, config, model_type(config) or known_by_looks(infos))


@dataclass(frozen=True)
class Landed:
    """A piece, a place where it (or some of it) lands, and the rows of the whole weight."""

    piece: Piece
    place: Place
    height: int = 0


@dataclass(frozen=True)
class Placed:
    """Where every piece lands, the rewrite that found some, and the pieces without a place."""

    landed: Sequence[Landed]
    rewrite: Rewrite | None
    left: Sequence[Piece]


def placed(todo: Sequence[Piece], base: Base, context: Context) -> Placed:
    """The places of an adapter's pieces.

    Raises:
        MisfitError: names are ambiguous, or an expert of a stack is missing.
        InputError: the base's family permutes the weights concerned.
    """
    found = {id(p): here for p in todo if (here := known(p, base, context))}
    rest = [p for p in todo if id(p) not in found]
    exact = [p for p in todo if id(p) in found and found[id(p)][0].place.tensor in p.names]
    rewrite, ambiguous = None, None
    try:
        rewrite, rewritten = _rewritten(rest, exact, base, context)
        found |= rewritten
    except MisfitError as error:
        ambiguous = error
    for piece in rest:
        if id(piece) not in found and (here := _by_transformers(piece, base, context)):
            found[id(piece)] = here
    found |= _with_their_weight(todo, found, base)
    if ambiguous and any(id(p) not in found for p in rest):
        raise ambiguous
    landed = [here for p in todo for here in found.get(id(p), ())]
    _check_experts(landed, base, context.adapter)
    return Placed(landed, rewrite, [p for p in todo if id(p) not in found])


def _with_their_weight(
    todo: Sequence[Piece], found: Mapping[int, list[Landed]], base: Base
) -> dict[int, list[Landed]]:
    """Updates of a layer of which the adapter has the whole weight too, in another shape than the
    base: they land where that does.
    """
    there = {
        p.module: [here.place for here in found[id(p)]]
        for p in todo
        if p.action == "full" and id(p) in found and p.target == f"{p.module}.weight"
    }
    return {
        id(p): _landed(p, there[p.module], base)
        for p in todo
        if p.action == "update" and "weight" in p.parameters
        if id(p) not in found and p.module in there
    }


def known(piece: Piece, base: Base, context: Context) -> list[Landed]:
    """Where a piece lands by its own name, whatever its shape, or by that of a known family."""
    if name := next((n for n in piece.names if n in base.infos), None):
        return _landed(piece, [Place(name)], base)
    for parameter in piece.parameters:
        found = _landed(piece, places(piece.module, parameter, base.disk, _out(piece)), base)
        if found and _fit(found, base, context):
            return found
    return _by_original(piece, base, context)


def _by_original(piece: Piece, base: Base, context: Context) -> list[Landed]:
    """Where a piece lands in a file that the original code of its family has saved."""
    component = context.adapter.component
    for parameter in piece.parameters:
        there = base.original.places(component, piece.module, parameter, _out(piece))
        found = _landed(piece, there, base)
        if found and _fit(found, base, context):
            return found
    return []


def _by_transformers(piece: Piece, base: Base, context: Context) -> list[Landed]:
    for name in piece.names:
        found = _landed(piece, base.by_transformers.get(name, []), base)
        if found and _fit(found, base, context):
            return found
    return []


def _landed(piece: Piece, there: Sequence[Place], base: Base) -> list[Landed]:
    height = height_of(there, [base.infos[p.tensor] for p in there]) if there else 0
    return [Landed(piece, p, height) for p in there]


def _fit(found: Sequence[Landed], base: Base, context: Context) -> bool:
    """Whether a piece fits everywhere; one that is no update takes a whole tensor or none."""
    experts = {here.place.expert for here in found} - {None}
    if experts and len(experts) != found[0].piece.spec.get("experts"):
        return False
    for here in found:
        info, place = base.infos[here.place.tensor], here.place
        if here.piece.action != "update" and place != Place(place.tensor):
            return False
        if here.piece.action == "full" and info.shape[1:] != here.piece.tensors[0].shape[1:]:
            return False
        if landing(here.piece, place, info, here.height, context) is None:
            return False
    return True


def _out(piece: Piece) -> int:
    """The output rows of a piece's own tensors."""
    if piece.source is None:
        return piece.tensors[0].rows
    return piece.source.out


def _rewritten(
    rest: Sequence[Piece], exact: Sequence[Piece], base: Base, context: Context
) -> tuple[Rewrite | None, dict[int, list[Landed]]]:
    """Places by one rewrite of the fronts of names; full tensors follow that of the others."""
    wanted = {id(p): Wanted(p.module, p.parameters, _fits(p, context)) for p in (*exact, *rest)}
    pieces = [*exact, *rest]
    leading = [p for p in pieces if p.action != "full"] or pieces
    resolved = resolve([wanted[id(p)] for p in leading], base.infos)
    found = {}
    for piece in rest:
        names = [resolved.tensors.get(wanted[id(piece)])]
        if resolved.rewrite:
            names += wanted[id(piece)].names(resolved.rewrite)
        if name := next((n for n in names if n in base.infos), None):
            found[id(piece)] = _landed(piece, [Place(name)], base)
    return resolved.rewrite, found


def _fits(piece: Piece, context: Context) -> Callable[[tuple[int, ...]], bool]:
    if piece.action == "full":
        return lambda shape: shape[1:] == piece.tensors[0].shape[1:]
    if piece.action == "rows":
        return lambda shape: shape[1:] == piece.tensors[-1].shape[1:]
    return lambda shape: _lands(piece, shape, context)


def _lands(piece: Piece, shape: tuple[int, ...], context: Context) -> bool:
    info = TensorInfo("", "U8", shape)
    return landing(piece, Place(""), info, height_of([Place("")], [info]), context) is not None


def landed_in(here: Landed, info: TensorInfo, context: Context) -> dict[str, Any]:
    """The plain data of an update in a tensor.

    Raises:
        MisfitError: it does not fit there.
    """
    found = landing(here.piece, here.place, info, here.height, context)
    if found is None:
        have = " x ".join(str(list(t.shape)) for t in reversed(here.piece.tensors[:2]))
        raise MisfitError(
            f"{here.place.tensor!r} is {list(info.shape)} in the base, the adapter has {have}.",
            hint="It was trained on another model: compare both with `lorakit inspect`.",
            file=context.adapter.path,
            tensor=here.place.tensor,
        )
    return found


def _check_experts(landed: Sequence[Landed], base: Base, adapter: Adapter) -> None:
    """Refuse an adapter that has some experts of a stack, if its config says that it has all."""
    for (stack, leaf), numbers in _experts(landed).items():
        count = _count(stack, leaf, landed, base)
        for number in sorted(set(range(count)) - set(numbers)):
            if adapter.config.targets(f"{stack}.{number}.{leaf}"):
                raise MisfitError(
                    f"lacks '{stack}.{number}.{leaf}', and has {len(numbers)} of these {count} "
                    "experts.",
                    hint="Save the adapter again; if it is meant to be so, name the modules it has "
                    "in target_modules of adapter_config.json.",
                    file=adapter.path,
                    tensor=numbers[min(numbers)],
                )


def _experts(landed: Sequence[Landed]) -> Mapping[tuple[str, str], dict[int, str]]:
    """(stack, leaf) -> number of an expert with an update of its own -> a tensor of that."""
    found: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for piece in (here.piece for here in landed):
        if piece.source is not None and (split := _expert(piece.module)):
            stack, number, leaf = split
            found[stack, leaf][number] = piece.tensors[0].name
    return found


def _expert(module: str) -> tuple[str, int, str] | None:
    stack, _, rest = module.rpartition(".experts.")
    number, _, leaf = rest.partition(".")
    return (f"{stack}.experts", int(number), leaf) if stack and number.isdecimal() else None


def _count(stack: str, leaf: str, landed: Sequence[Landed], base: Base) -> int:
    """How many experts a stack has on disk."""
    here = next(
        h for h in landed if (s := _expert(h.piece.module)) and (s[0], s[2]) == (stack, leaf)
    )
    if here.place.slot is not None:
        return base.infos[here.place.tensor].rows
    return 1 + max(_numbers(here.place.tensor, base), default=-1)


def _numbers(tensor: str, base: Base) -> Iterator[int]:
    """The numbers of all experts beside the one that this tensor belongs to."""
    stack, _, rest = tensor.rpartition(".experts.")
    prefix, leaf = f"{stack}.experts.", rest.partition(".")[2]
    number = 0
    while f"{prefix}{number}.{leaf}" in base.infos:
        yield number
        number += 1
