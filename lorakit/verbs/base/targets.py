"""Which tensors of a base an adapter changes, and how: every piece of every adapter finds one
place.

Law: the pieces that come in are, each exactly once, in a target, dropped on request, or in the
error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import Piece, pieces
from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.formats.families import FAMILIES
from lorakit.formats.patterns import search
from lorakit.formats.peft import saves
from lorakit.formats.single_file import family_of
from lorakit.naming.embeddings import TASK_HEADS, embeddings_in, is_head
from lorakit.naming.places import Place
from lorakit.naming.quantised import is_read, packed_for, scale_beside
from lorakit.naming.resolve import nearest, renamed
from lorakit.naming.scaled import scale_left_out
from lorakit.tensors import FOLDABLE, TensorInfo
from lorakit.verbs.base.lacking import is_idle, lacking
from lorakit.verbs.base.landing import Context
from lorakit.verbs.base.notes import notes_on
from lorakit.verbs.base.placing import Base, Landed, known, placed
from lorakit.verbs.choices import listed

# The way out of a base that is quantised; by values, where those can be read.
PLAIN = "Take the 16-bit base"
BY_VALUES = f"{PLAIN}, or write plain weights with --quant dequantize or --quant keep-touched."


@dataclass(frozen=True)
class Options:
    """What a user may say about how adapters meet a base.

    expert_packing: "peft" or "unsloth"; expert_orientation: "auto", "in-out" or "out-in".
    """

    weights: tuple[float, ...] = ()
    key_map: tuple[str, ...] = ()
    allow_unmatched: str = ""
    base_is_residual: bool = False
    mha_factor: int | None = None
    untie: bool = False
    expert_packing: str = "peft"
    expert_orientation: str = "auto"
    init_given: bool = False  # the last adapter is another as it was before training

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_map", tuple(listed(self.key_map)))
        if self.mha_factor not in (None, 1, 2):
            raise UsageError(
                f"mha_factor is {self.mha_factor}.",
                hint="Give 1 or 2, or leave it out to go by the release of PEFT.",
            )

    @property
    def residuals(self) -> bool:
        """Whether to compute what an initialisation took out of the base."""
        return not (self.base_is_residual or self.init_given)

    def to_dict(self) -> dict[str, Any]:
        """What of it belongs in a plan, whose inputs have the weights: the same, whether defaults
        were spelled out or not.
        """
        left = ("weights", *(() if self.init_given else ("init_given",)))
        kept = {n: v for n, v in asdict(self).items() if n not in left}
        return {**kept, "key_map": list(self.key_map)}


@dataclass
class Target:
    """All that happens to one tensor: what it starts from, which rows are new, which updates are
    added.
    """

    name: str
    full: list[Piece] = field(default_factory=list)
    rows: list[Piece] = field(default_factory=list)
    updates: list[Landed] = field(default_factory=list)

    @property
    def pieces(self) -> list[Piece]:
        """Every piece, in the order in which they act."""
        return [*self.full, *self.rows, *(here.piece for here in self.updates)]

    def add(self, here: Landed) -> None:
        """Note one more piece that lands in the tensor."""
        if here.piece.action == "update":
            self.updates.append(here)
        else:
            (self.full if here.piece.action == "full" else self.rows).append(here.piece)


@dataclass(frozen=True)
class Matched:
    """The targets by tensor name, heads that the base does not have among them."""

    targets: dict[str, Target]
    notes: Sequence[str] = ()


def match(base: Base, adapters: Sequence[Adapter], options: Options) -> Matched:
    """The place of every piece of every adapter among the tensors on disk.

    Raises:
        MisfitError: a piece has no place, or one of another shape; two replace the same tensor.
        InputError: an adapter is of a kind that is refused, or a target is quantised.
    """
    found: tuple[dict[str, Target], list[str]] = {}, []
    for number, adapter in enumerate(adapters):
        adapter.config.check(
            base_is_residual=options.base_is_residual, init_adapter=options.init_given
        )
        _match_one(base, adapter, number, options, found)
    return Matched(*found)


def context_of(base: Base, adapter: Adapter, options: Options) -> Context:
    """What decides how an adapter's updates land where shapes do not."""
    return Context(base.model_type, adapter, options.expert_packing, options.expert_orientation)


def _match_one(
    base: Base,
    adapter: Adapter,
    number: int,
    options: Options,
    into: tuple[dict[str, Target], list[str]],
) -> None:
    targets, notes = into
    weight, context = options.weights[number], context_of(base, adapter, options)
    todo = [
        replace(p, module=renamed(p.module, options.key_map))
        for p in pieces(adapter, number, weight=weight, mha_factor=options.mha_factor)
    ]
    _check_one_model(adapter, base)
    base = replace(base, infos=_with_tied_head(base.infos, todo))
    todo, dropped = _drop(todo, options.allow_unmatched, base, context)
    todo = [_rescaled(p, adapter, base, notes) for p in todo]
    found = placed(todo, base, context)
    added = {p.target: p for p in found.left if _may_be_new(p, adapter, base.infos)}
    left = [p for p in found.left if p.target not in added]
    if unplaced := [p for p in left if not is_idle(p, adapter)]:
        _raise_unplaced(unplaced, todo, base, adapter)
    for here in found.landed:
        targets.setdefault(here.place.tensor, Target(here.place.tensor)).add(here)
    for name, piece in added.items():
        targets.setdefault(name, Target(name)).add(Landed(piece, Place(name)))
    notes += [
        *notes_on(adapter, found, dropped, options.mha_factor),
        *lacking(adapter, found, base),
    ]
    if added:
        first = next(iter(added))
        notes.append(f"{adapter.name}: tensors new to the base ({len(added)}), first {first!r}.")


def _check_one_model(adapter: Adapter, base: Base) -> None:
    """Refuse an adapter of several models of a pipeline where the base is one of them."""
    if len(adapter.parts) > 1 and not base.original.family:
        raise MisfitError(
            f"is for {', '.join(adapter.parts)}, and the base is only one of them.",
            hint=f"Say which, such as --component {next(iter(adapter.parts))}, or merge into the "
            "folder of the whole pipeline.",
            file=adapter.path,
        )


def _rescaled(piece: Piece, adapter: Adapter, base: Base, notes: list[str]) -> Piece:
    """A piece with the scale of its embedding taken out, where PEFT trained it without that."""
    if piece.source is None or not piece.source.embedding or piece.action != "update":
        return piece
    version = str(adapter.config.raw.get("peft_version") or "") or None
    scale = scale_left_out(base.config, piece.module, version)
    if scale == 1.0:
        return piece
    notes.append(
        f"{adapter.name}: the update of {piece.module!r} is divided by the scale of "
        f"that embedding, {scale:.4g}, which PEFT before 0.18 trained it without"
        + ("." if version else " (the config names no release, so it is older).")
    )
    return replace(piece, spec={**piece.spec, "scaling": piece.spec["scaling"] / scale})


def _with_tied_head(
    disk: Mapping[str, TensorInfo], todo: Sequence[Piece]
) -> Mapping[str, TensorInfo]:
    """The tensors on disk, and the head that pieces ask for where the one embedding may be it."""
    embeddings = embeddings_in(disk)
    asked = {p.target for p in todo if is_head(p.target)}
    if len(embeddings) != 1 or any(is_head(n) for n in disk):
        return disk
    return {**disk, **{n: replace(disk[embeddings[0]], name=n) for n in asked}}


def _drop(
    todo: Sequence[Piece], allowed: str, base: Base, context: Context
) -> tuple[list[Piece], list[Piece]]:
    if not allowed:
        return list(todo), []
    missing = [p for p in todo if search(allowed, p.target) and not known(p, base, context)]
    return [p for p in todo if p not in missing], missing


def _may_be_new(piece: Piece, adapter: Adapter, disk: Mapping[str, TensorInfo]) -> bool:
    """Whether a full tensor that the base lacks is a head that the training put on it: of what it
    has, in whatever packing, nothing is new.
    """
    raw = adapter.config.raw
    heads = (*(raw.get("modules_to_save") or ()), *TASK_HEADS.get(str(raw.get("task_type")), ()))
    above = list(accumulate(piece.module.split("."), "{}.{}".format))
    there = next((m for m in above if any(saves(h, m) for h in heads)), "")
    if piece.action != "full" or not there or any(s.isdigit() for s in there.split(".")):
        return False
    return not any(_has(n, piece.module) for n in disk)


def _has(name: str, module: str) -> bool:
    """Whether a tensor lies in a module, whose name may have another front on disk."""
    parts = module.split(".")
    tails = [".".join(parts[i:]) for i in range(max(1, len(parts) - 1))]
    return any(f".{tail}." in f".{name}" for tail in tails)


def _raise_unplaced(
    left: Sequence[Piece], todo: Sequence[Piece], base: Base, adapter: Adapter
) -> None:
    first = left[0]
    if packed := packed_for(first.module, base.infos, base.model_type):
        raise InputError(
            f"the weight of {first.module!r} is quantised ({packed!r}), which nothing can be "
            "added to.",
            hint=BY_VALUES if is_read(packed, base.infos) else f"{PLAIN}.",
            tensor=packed,
        )
    _check_biases(left, todo, adapter)
    near = nearest(first.target, base.infos)
    kind = "modules" if first.action != "full" else "tensors"
    raise MisfitError(
        f"{len(left)} of the adapter's {len(todo)} {kind} are not in the base; the first is "
        f"{first.target!r}"
        + (f", the base has {' and '.join(map(repr, near[:2]))}." if near else "."),
        hint=_way_out(first, todo, base, adapter),
        file=adapter.path,
        tensor=first.tensors[0].name,
    )


def _check_biases(left: Sequence[Piece], todo: Sequence[Piece], adapter: Adapter) -> None:
    """Refuse biases of B whose layers are in the base, and have none there."""
    there = {p.module for p in todo if p not in left}
    if not all(p.parameters == ("bias",) and p.module in there for p in left):
        return
    raise MisfitError(
        f"has biases (lora_bias) for {len(left)} layers that have none in the base, first "
        f"{left[0].module!r}.",
        hint="The model has no place for them: use the adapter unmerged, or merge it without them "
        "with --allow-unmatched '[.]bias$'.",
        file=adapter.path,
        tensor=left[0].tensors[0].name,
    )


def _way_out(first: Piece, todo: Sequence[Piece], base: Base, adapter: Adapter) -> str:
    if {"act", "inputs", "through"} & first.spec.keys() and family_of([first.module]):
        return "It changes all of a weight that this base has in parts: merge it into one file."
    if not base.original.family and (family := family_of([p.module for p in todo])):
        return (
            f"Its names are those of {FAMILIES[family].title}'s own code: lorakit convert "
            f"{adapter.path.parent} -o OUT --to diffusers gives it those of Diffusers."
        )
    return (
        "Compare names with `lorakit inspect`, map them with --key-map 'REGEX=REPLACEMENT', or "
        "leave some out with --allow-unmatched REGEX."
    )


def check_foldable(
    info: TensorInfo, disk: Mapping[str, TensorInfo], hint: str = f"{PLAIN}."
) -> None:
    """Refuse to fold into numbers that are codes on a grid; `hint` is the way out if it is one that
    can be read.

    Raises:
        InputError: the tensor is no floating-point weight, or scales lie beside it.
    """
    scale = scale_beside(info, disk)
    if info.dtype not in FOLDABLE or scale:
        how = f"{info.dtype}, with {scale}" if scale else info.dtype
        raise InputError(
            f"{info.name!r} is quantised ({how}), which nothing can be added to.",
            hint=hint if is_read(info.name, disk) else f"{PLAIN}.",
            tensor=info.name,
        )
