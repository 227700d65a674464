"""Which tensors of a base an adapter changes, and how: every piece of every adapter finds one
place.

Law: the pieces that come in are, each exactly once, in a target, dropped on request, or in the
error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import (
    Piece,
    fits,
    out_proj_factor,
    pieces,
    square_transposed,
    transposed,
)
from lorakit.errors import InputError, MisfitError
from lorakit.formats.patterns import search
from lorakit.naming.embeddings import embeddings_in, is_head
from lorakit.naming.resolve import Rewrite, Wanted, nearest, renamed, resolve
from lorakit.tensors import FOLDABLE, TensorInfo

# Names that a packed weight's tensors have where a plain one has `weight`.
PACKED = ("qweight", "weight_packed", "weight_blocks", "weight.absmax")
# Names of scales beside a weight that is stored on a grid.
SCALES = ("weight_scale_inv", "weight_scale", "SCB", "weight.absmax", "weight_scale_2")
# Heads that transformers puts on a model by the task alone; PEFT saves them unasked.
TASK_HEADS = {
    "SEQ_CLS": ("score", "classifier"),
    "TOKEN_CLS": ("score", "classifier"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class Options:
    """What a user may say about how adapters meet a base."""

    weights: tuple[float, ...] = ()
    key_map: tuple[str, ...] = ()
    allow_unmatched: str = ""
    base_is_residual: bool = False
    mha_factor: int | None = None
    untie: bool = False


@dataclass
class Target:
    """All that happens to one tensor: what it starts from, which rows are new, which updates are
    added.
    """

    name: str
    full: list[Piece] = field(default_factory=list)
    rows: list[Piece] = field(default_factory=list)
    updates: list[Piece] = field(default_factory=list)

    @property
    def pieces(self) -> list[Piece]:
        """Every piece, in the order in which they act."""
        return [*self.full, *self.rows, *self.updates]


@dataclass(frozen=True)
class Matched:
    """The targets by tensor name, heads that the base does not have among them."""

    targets: dict[str, Target]
    notes: Sequence[str] = ()


def match(disk: Mapping[str, TensorInfo], adapters: Sequence[Adapter], options: Options) -> Matched:
    """The place of every piece of every adapter among the tensors on disk.

    Raises:
        MisfitError: a piece has no place, or one of another shape; two replace the same tensor.
        InputError: an adapter is of a kind that is refused, or a target is quantised.
    """
    targets: dict[str, Target] = {}
    notes: list[str] = []
    for number, adapter in enumerate(adapters):
        adapter.config.check(base_is_residual=options.base_is_residual)
        _match_one(disk, adapter, number, options, (targets, notes))
    return Matched(targets, notes)


def _match_one(
    disk: Mapping[str, TensorInfo],
    adapter: Adapter,
    number: int,
    options: Options,
    into: tuple[dict[str, Target], list[str]],
) -> None:
    targets, notes = into
    weight = options.weights[number]
    todo = [
        replace(p, module=renamed(p.module, options.key_map))
        for p in pieces(adapter, number, weight=weight, mha_factor=options.mha_factor)
    ]
    todo, dropped = _drop(todo, options.allow_unmatched, disk)
    places, rewrite, left = _places(todo, _with_tied_head(disk, todo))
    added = {p.target: p for p in left if _may_be_new(p, adapter)}
    if unplaced := [p for p in left if p.target not in added]:
        _raise_unplaced(unplaced, todo, disk, adapter)
    for piece, name in [*places, *((p, n) for n, p in added.items())]:
        target = targets.setdefault(name, Target(name))
        kind = {"full": target.full, "rows": target.rows, "update": target.updates}[piece.action]
        kind.append(piece)
    notes += _notes(adapter, rewrite, dropped)
    notes += _attention_note(adapter, options)


def _with_tied_head(
    disk: Mapping[str, TensorInfo], todo: Sequence[Piece]
) -> Mapping[str, TensorInfo]:
    """The tensors on disk, and the head that pieces ask for where the one embedding may be it."""
    embeddings = embeddings_in(disk)
    asked = {p.target for p in todo if is_head(p.target)}
    if len(embeddings) != 1 or any(is_head(n) for n in disk):
        return disk
    return {**disk, **{n: replace(disk[embeddings[0]], name=n) for n in asked}}


def _places(
    todo: Sequence[Piece], disk: Mapping[str, TensorInfo]
) -> tuple[list[tuple[Piece, str]], Rewrite | None, list[Piece]]:
    """Where each piece goes; full tensors follow the rewrite of the others, or stay unplaced."""
    wanted = {id(p): Wanted(p.module, p.parameters, _fits(p)) for p in todo}
    leading = [p for p in todo if p.action != "full"] or list(todo)
    resolved = resolve([wanted[id(p)] for p in leading], disk)
    names = {id(p): resolved.tensors.get(wanted[id(p)]) for p in leading}
    for piece in todo:
        if names.get(id(piece)) is None:
            ways = (None, resolved.rewrite) if resolved.rewrite else (None,)
            found = (n for way in ways for n in wanted[id(piece)].names(way) if n in disk)
            names[id(piece)] = next(found, None)
    placed = [(p, n) for p in todo if (n := names[id(p)])]
    return placed, resolved.rewrite, [p for p in todo if not names[id(p)]]


def _fits(piece: Piece) -> Callable[[tuple[int, ...]], bool]:
    if piece.action == "full":
        return lambda shape: shape[1:] == piece.tensors[0].shape[1:]
    return lambda shape: fits(piece, shape)


def _drop(
    todo: Sequence[Piece], allowed: str, disk: Mapping[str, TensorInfo]
) -> tuple[list[Piece], list[Piece]]:
    if not allowed:
        return list(todo), []
    missing = [p for p in todo if p.target not in disk and search(allowed, p.target)]
    return [p for p in todo if p not in missing], missing


def _may_be_new(piece: Piece, adapter: Adapter) -> bool:
    """Whether a full tensor that the base lacks is a head that the training put on it."""
    raw = adapter.config.raw
    heads = (*(raw.get("modules_to_save") or ()), *TASK_HEADS.get(str(raw.get("task_type")), ()))
    segments = f".{piece.module}."
    return piece.action == "full" and any(f".{h}." in segments for h in heads)


def _raise_unplaced(
    left: Sequence[Piece], todo: Sequence[Piece], disk: Mapping[str, TensorInfo], adapter: Adapter
) -> None:
    first = left[0]
    for packed in PACKED:
        if f"{first.module}.{packed}" in disk:
            raise InputError(
                f"the weight of {first.module!r} is quantised ({packed}), which this version does "
                "not fold into.",
                hint="Merge into the 16-bit base, or dequantise it first.",
                tensor=f"{first.module}.{packed}",
            )
    near = nearest(first.target, disk)
    kind = "modules" if first.action != "full" else "tensors"
    raise MisfitError(
        f"{len(left)} of the adapter's {len(todo)} {kind} are not in the base; the first is "
        f"{first.target!r}"
        + (f", the base has {' and '.join(map(repr, near[:2]))}." if near else "."),
        hint="Compare names with `lorakit inspect`, map them with --key-map 'REGEX=REPLACEMENT', "
        "or leave some out with --allow-unmatched REGEX.",
        file=adapter.path,
        tensor=first.tensors[0].name,
    )


def _attention_note(adapter: Adapter, options: Options) -> list[str]:
    """A line on the 2x rule, where it decides something."""
    count = sum(m.inner for m in adapter.modules.values())
    if not count or options.mha_factor is not None:
        return []
    factor = out_proj_factor(adapter, None)
    return [
        f"{adapter.path.parent.name}: the out_proj of each MultiheadAttention ({count}) is updated "
        f"{'twice, as PEFT up to 0.21.2 trained it' if factor == 2 else 'once'}; "
        f"--mha-factor {3 - factor} does otherwise."
    ]


def _notes(adapter: Adapter, rewrite: Rewrite | None, dropped: Sequence[Piece]) -> list[str]:
    notes = []
    name = adapter.path.parent.name
    if rewrite:
        notes.append(f"{name}: module names are rewritten {rewrite} to find them in the base.")
    if dropped:
        notes.append(
            f"{name}: {len(dropped)} places left out on request, first {dropped[0].target!r}."
        )
    if adapter.unused:
        notes.append(f"{name}: {len(adapter.unused)} tensors are of use in training only.")
    for module in adapter.modules.values():
        if module.low_rank and (patterns := adapter.config.overlapping(module.wrapped)):
            notes.append(
                f"{name}: the alpha patterns {patterns} disagree on {module.name!r}; "
                "the first counts, as in PEFT."
            )
        said = adapter.config.rank(module.wrapped) if module.low_rank else None
        if said and not adapter.config.enable_lora and said != module.a.shape[0]:
            notes.append(
                f"{name}: {module.name!r} has rank {module.a.shape[0]}, its config says {said}; "
                "the tensors count."
            )
    return notes


def oriented(
    piece: Piece, shape: tuple[int, ...], name: str, context: tuple[str, Adapter]
) -> dict[str, Any]:
    """The plain data of an update on a weight of this shape; `context` is the base's model type and
    the adapter.

    Raises:
        MisfitError: the factors do not fit the shape.
    """
    model_type, adapter = context
    if not fits(piece, shape):
        have = " x ".join(str(list(t.shape)) for t in reversed(piece.tensors[:2]))
        raise MisfitError(
            f"{piece.target!r} is {list(shape)} in the base, the adapter has {have}.",
            hint="It was trained on another model: compare both with `lorakit inspect`.",
            file=adapter.path,
            tensor=name,
        )
    if piece.source is None:
        return piece.spec
    square = square_transposed(piece.module, model_type, adapter.config.fan_in_fan_out)
    turned = transposed(piece.source, shape, square=square, enabled=piece.spec["enabled"])
    return {**piece.spec, "transposed": bool(turned)}


def check_foldable(info: TensorInfo, disk: Mapping[str, TensorInfo]) -> None:
    """Refuse to fold into numbers that are codes on a grid.

    Raises:
        InputError: the tensor is no floating-point weight, or scales lie beside it.
    """
    module = info.name.rpartition(".")[0]
    scale = next((s for s in SCALES if f"{module}.{s}" in disk), None)
    if info.dtype not in FOLDABLE or scale:
        how = f"{info.dtype}, with {scale}" if scale else info.dtype
        raise InputError(
            f"{info.name!r} is quantised ({how}), which this version does not fold into.",
            hint="Merge into the 16-bit base, or dequantise it first.",
            tensor=info.name,
        )
