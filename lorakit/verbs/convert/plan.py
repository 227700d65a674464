"""A conversion planned: what each module of the result is made of, its tensors, config and notes.

Law: every tensor of the adapter is in a module, replaces a tensor of the base, or is of use in
training only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.new_config import STACKS_SINCE, WRITTEN, Saved, config_of
from lorakit.adapter.pieces import Piece
from lorakit.errors import InputError, MisfitError
from lorakit.formats.peft import factor_key, full_key, levels, rows_key
from lorakit.math.experts import alpha_for
from lorakit.tensors import BITS, TensorInfo
from lorakit.verbs.base.placing import landed_in
from lorakit.verbs.base.targets import Matched, Options, context_of, match
from lorakit.verbs.convert.assembly import Made, assembled
from lorakit.verbs.convert.building import Factory, shapes_of
from lorakit.verbs.convert.changes import Change, change_of, notes_on
from lorakit.verbs.convert.cutting import Cut, cuts
from lorakit.verbs.convert.renaming import Renaming


@dataclass(frozen=True)
class Planned:
    """The tensors of the result in the order of its file, and where each comes from: a module and
    a role of it, or (with no module) a tensor of the adapter.
    """

    tensors: Mapping[str, tuple[TensorInfo, Made | None, str]]
    made: Sequence[Made]
    config: Mapping[str, Any]
    changes: Sequence[Change]
    notes: Sequence[str]
    factory: Factory


def planned(adapter: Adapter, renaming: Renaming, options: Options) -> Planned:
    """The plan of a conversion; `options` say how the adapter is read.

    Raises:
        MisfitError: a tensor has no place in the base, or none under the names that are wanted.
        InputError: the adapter cannot be had in that form.
    """
    matched = match(renaming.base, [adapter], options)
    if sizes := _resized(matched, renaming):
        renaming = renaming.resized(sizes)
    called: dict[str, str] = {}
    found = list(_cuts(adapter, matched, renaming, options, called))
    goals = {
        id(g): g
        for tensor in dict.fromkeys(c.tensor for c in found)
        for g in renaming.goals(tensor)
    }
    factory = Factory(adapter.source, options.expert_packing)
    made = [_as_layer(m, renaming) for m in assembled([*goals.values()], found, factory)]
    for one in made:
        _check_possible(adapter, one)
    saved, exact = _saved(adapter, made, called)
    copies, renames = _copies(adapter, matched, renaming, made)
    tensors = {**dict(_factors(made)), **copies}
    _check_used(adapter, made, copies)
    version = _version(adapter, made, called)
    config = config_of(adapter.config.raw, saved, renames, version=version)
    notes = [*matched.notes, *notes_on(adapter, made, config, exact=exact)]
    if renaming.names != "disk":
        notes.append(f"the names of the model are those of {renaming.runtime.by}.")
    order = sorted(tensors, key=lambda n: (-BITS[tensors[n][0].dtype], n))
    changes = [change_of(m) for m in made]
    return Planned({n: tensors[n] for n in order}, made, config, changes, notes, factory)


def _resized(matched: Matched, renaming: Renaming) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors that the adapter replaces by larger ones and adapts as well."""
    return {
        name: target.full[0].tensors[0].shape
        for name, target in matched.targets.items()
        if target.full
        and target.updates
        and target.full[0].tensors[0].shape != renaming.info(name).shape
    }


def _cuts(
    adapter: Adapter,
    matched: Matched,
    renaming: Renaming,
    options: Options,
    called: dict[str, str],
) -> Iterator[Cut]:
    """The cuts of all updates; `called` is told what the config calls each module."""
    context = context_of(renaming.base, adapter, options)
    for here in (h for target in matched.targets.values() for h in target.updates):
        source = here.piece.source
        if source is None:
            continue  # the bias of a module, which goes with that
        info = renaming.info(here.place.tensor)
        plain = landed_in(here, info, context)
        bare = "experts" in here.piece.spec
        called[source.a.name] = here.piece.target if bare else source.wrapped
        yield from cuts(here, plain)


def _as_layer(made: Made, renaming: Renaming) -> Made:
    """A module with DoRA or a bias as a layer, where it is one: parameters have neither."""
    goal, roles = made.goal, {role for m in made.sources for role in m.roles}
    if goal.layer or goal.parameter != "weight" or not roles & {"magnitude", "bias"}:
        return made
    if f"{goal.module}.weight" in renaming.runtime.others:
        return made
    return replace(made, goal=replace(goal, layer=True))


def _check_possible(adapter: Adapter, made: Made) -> None:
    """Refuse what a module of this form cannot hold."""
    roles = {role for m in made.sources for role in m.roles}
    for role, what in (("magnitude", "DoRA"), ("bias", "a bias of lora_B")):
        if role in roles and not made.goal.layer:
            _refuse(adapter, made, f"has {what}, which PEFT has for layers but not for parameters")
    if made.taken:
        return
    raw = adapter.config.raw
    opaque = any(g.cut.opaque for one in made.groups for g in one)
    if opaque or raw.get("use_bdlora") or adapter.config.enable_lora or adapter.config.residual:
        _refuse(adapter, made, "is a variant whose factors cannot be cut, stacked or turned")
    if "magnitude" in roles:
        parts = [b for g in made.groups[0] for b in g.blocks if "magnitude" in b.cut.module.roles]
        if sum(b.rows[1] - b.rows[0] for b in parts) != made.goal.shape[0]:
            _refuse(adapter, made, "has DoRA in some of its rows only")


def _refuse(adapter: Adapter, made: Made, why: str) -> None:
    names = [m.name for m in made.sources]
    raise InputError(
        f"{names[0]!r} {why}, so there is no {made.goal.name!r} of it.",
        hint="Keep its form: --names disk, or --experts as it has them now.",
        file=adapter.path,
        tensor=made.sources[0].a.name,
    )


def _saved(
    adapter: Adapter, made: Sequence[Made], called: Mapping[str, str]
) -> tuple[list[Saved], bool]:
    """What the config tells of each module, and whether all scalings are kept to the last bit."""
    config, found, all_exact = adapter.config, [], True
    for one in made:
        first = one.sources[0]
        alpha, exact = config.scaling(called[first.a.name], 1), True  # over a rank of one: alpha
        root = one.rank**0.5 if config.rslora else one.rank
        if alpha / root != one.scaling:
            alpha, exact = alpha_for(one.scaling, one.rank, rslora=config.rslora)
        all_exact &= exact
        name = one.goal.module.rpartition(".")[0] if first.inner else one.goal.name
        found.append(Saved(name, one.rank, alpha, one.goal.layer))
    return found, all_exact


def _factors(made: Sequence[Made]) -> Iterator[tuple[str, tuple[TensorInfo, Made, str]]]:
    goals = [m.goal for m in made if not m.goal.layer]
    depth = levels((g.module, g.parameter) for g in goals)
    for one in made:
        goal, inner = one.goal, bool(one.taken and one.taken.inner)
        level = 0 if goal.layer else depth[goal.module, goal.parameter]
        for role, (dtype, shape) in shapes_of(one).items():
            key = factor_key(goal.module, role, inner=inner, level=level)
            yield key, (TensorInfo(key, dtype, shape), one, role)


def _copies(
    adapter: Adapter, matched: Matched, renaming: Renaming, made: Sequence[Made]
) -> tuple[dict[str, tuple[TensorInfo, None, str]], dict[str, str]]:
    """Full tensors and token rows under their new names, and the old modules of these by name."""
    adapted = {m.goal.module for m in made}
    alone = adapter.config.peft_type == "TRAINABLE_TOKENS"
    found: dict[str, tuple[TensorInfo, None, str]] = {}
    renames = {}
    for name, piece in _whole(matched):
        new, info = renaming.one_name(name), piece.tensors[0]
        if new is None:
            raise MisfitError(
                f"{info.name!r} replaces {name!r}, which is not one parameter under the names that "
                "are wanted.",
                hint="Keep the names of the disk: --names disk.",
                file=adapter.path,
                tensor=info.name,
            )
        module = new.rpartition(".")[0]
        renames[piece.module] = module
        if piece.action == "rows":
            key = rows_key(module, alone=alone)
        else:
            key = full_key(new, wrapped=module in adapted)
        found[key] = (replace(info, name=key, start=0), None, info.name)
    return found, renames


def _whole(matched: Matched) -> Iterator[tuple[str, Piece]]:
    for target in matched.targets.values():
        yield from ((target.name, p) for p in (*target.full, *target.rows))


def _check_used(adapter: Adapter, made: Sequence[Made], copies: Mapping[str, Any]) -> None:
    """Refuse to leave out a tensor."""
    used = {origin for _, _, origin in copies.values()} | set(adapter.unused)
    used |= {i.name for m in made for s in m.sources for r, i in s.roles.items() if r != "rows"}
    if left := sorted(adapter.source.infos.keys() - used):
        raise MisfitError(
            f"{len(left)} tensors have no place in the result; the first is {left[0]!r}.",
            hint="Compare names with `lorakit inspect`.",
            file=adapter.path,
            tensor=left[0],
        )


def _version(adapter: Adapter, made: Sequence[Made], called: Mapping[str, str]) -> str | None:
    """The release of PEFT to name, where readers would otherwise take stacks or scalings for what
    an older one wrote.
    """
    stacks = any(m.goal.experts for m in made)
    old = adapter.config.version[:3] < STACKS_SINCE
    scaled = any(
        adapter.config.scaling(called[m.taken.a.name], m.rank) != m.scaling for m in made if m.taken
    )
    return WRITTEN if (stacks and old) or scaled else None
