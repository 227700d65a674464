"""What adapters hold whole, and not as a change: saved modules, biases, rows of tokens.

Law: such a tensor of the result is that of the one adapter that has it, or the same in all that
have it; where they differ, the user says what it shall be, or nothing is written.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.load import LazyRows, read_array, stored_pieces
from lorakit.adapter.weights import rounded, widest
from lorakit.errors import MisfitError, UsageError
from lorakit.formats.peft import full_key, rows_key, saves
from lorakit.math.cast import Array
from lorakit.math.rows import row_slices
from lorakit.store.equal import same_bytes
from lorakit.tensors import TensorInfo
from lorakit.verbs.making import Taken

WAYS = ("average", "drop")


@dataclass(frozen=True)
class Holder:
    """An adapter that has a tensor whole, and how much of it is wanted."""

    adapter: Adapter
    number: int
    weight: float
    info: TensorInfo
    indices: tuple[int, ...] | None = None  # of token rows


@dataclass(frozen=True)
class Whole:
    """The whole tensors of the result, and what its config says of them."""

    taken: Sequence[Taken]
    facts: Mapping[str, Any]
    notes: Sequence[str]


def whole(
    adapters: Sequence[Adapter], weights: Sequence[float], modules: set[str], way: str
) -> Whole:
    """What becomes of everything that the adapters hold whole.

    `modules` are those with updates in the result. `way` is for tensors that differ: "average" by
    the weights, the number of the adapter whose is taken (from 1), or "" for a question; "drop"
    leaves out all that is held whole.

    Raises:
        MisfitError: tensors differ, and nothing says which to take; or their shapes do.
        UsageError: the way is none of these.
    """
    check_way(way, len(adapters))
    if way == "drop":
        return Whole((), _facts(adapters, {}, modules, drop=True), _dropped(adapters))
    taken, notes = [], []
    for name, holders in _full(adapters, weights).items():
        key = full_key(name, wrapped=name.rpartition(".")[0] in modules)
        taken.append(_one(key, name, holders, way))
        if len(holders) == 1 and len(adapters) > 1:
            notes.append(f"{name!r} is held whole by adapter {holders[0].number} alone: taken.")
    tokens: dict[str, list[int]] = {}
    alone = all(a.config.peft_type == "TRAINABLE_TOKENS" for a in adapters)
    for module, holders in _rows(adapters, weights).items():
        rows = _joined(module, holders, way)
        tokens[module] = list(rows)
        taken.append(_of_rows(rows_key(module, alone=alone), rows, holders))
    if odd := [m for m in tokens if m in modules | _held(adapters)]:
        notes.append(
            f"{odd[0]!r} has token rows beside an update, or a whole table: merge it, PEFT does "
            "not load that."
        )
    return Whole(taken, _facts(adapters, tokens, modules, drop=False), notes)


def check_way(way: str, count: int) -> None:
    """Refuse a way that is none.

    Raises:
        UsageError: naming those that there are.
    """
    if way in ("", *WAYS) or (way.isdecimal() and 1 <= int(way) <= count):
        return
    raise UsageError(
        f"--whole {way}: it is {', '.join(WAYS)}, or the number of an adapter, 1 to {count}."
    )


def _full(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Holder]]:
    found: dict[str, list[Holder]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True), 1):
        for name, info in adapter.full.items():
            found.setdefault(name, []).append(Holder(adapter, number, weight, info))
    return found


def _rows(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Holder]]:
    found: dict[str, list[Holder]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True), 1):
        for module in adapter.modules.values():
            if info := module.roles.get("rows"):
                indices = adapter.config.token_rows(module.name) or []
                if len(indices) != info.rows:
                    raise MisfitError(
                        f"{info.name!r} has {info.rows} rows, the config names {len(indices)}.",
                        hint="Look at trainable_token_indices in adapter_config.json.",
                        file=adapter.path,
                        tensor=info.name,
                    )
                here = Holder(adapter, number, weight, info, tuple(indices))
                found.setdefault(module.name, []).append(here)
    return found


def _one(key: str, name: str, holders: Sequence[Holder], way: str) -> Taken:
    """A tensor that replaces the base's."""
    first = holders[0]
    _check_shapes(name, holders, first.info.shape)
    if all(
        same_bytes(first.adapter.source, first.info, h.adapter.source, h.info) for h in holders[1:]
    ):
        return _of(key, first)
    if way.isdecimal() and (chosen := [h for h in holders if h.number == int(way)]):
        return _of(key, chosen[0])
    if way != "average":
        _ask(name, holders)
    dtype = widest([h.info.dtype for h in holders])
    shares = _shares(name, holders)

    held = [(LazyRows(h.adapter.source, h.info.name, "float64"), share) for h, share in shares]

    def values() -> Iterator[Array]:
        for some in row_slices(first.info.rows, first.info.cols):
            yield rounded(np.asarray(sum(share * rows[some] for rows, share in held)), dtype)

    return Taken(TensorInfo(key, dtype, first.info.shape), values)


def _of(key: str, holder: Holder) -> Taken:
    info = holder.info
    named = TensorInfo(key, info.dtype, info.shape)
    return Taken(named, lambda: stored_pieces(holder.adapter.source, info))


def _joined(module: str, holders: Sequence[Holder], way: str) -> dict[int, Array]:
    """The token rows of one embedding by their indices, rising, from all that have some."""
    _check_shapes(module, holders, holders[0].info.shape[1:], rows=True)
    found: dict[int, list[tuple[Holder, Array]]] = defaultdict(list)
    for holder in holders:
        values = read_array(holder.adapter.source, holder.info.name, "float64")
        for index, row in zip(holder.indices or (), values, strict=True):
            found[index].append((holder, row))
    return {i: _row(f"{module}[{i}]", found[i], way) for i in sorted(found)}


def _of_rows(key: str, rows: Mapping[int, Array], holders: Sequence[Holder]) -> Taken:
    dtype = widest([h.info.dtype for h in holders])
    info = TensorInfo(key, dtype, (len(rows), holders[0].info.cols))
    return Taken(info, lambda: [rounded(np.stack(list(rows.values())), dtype)])


def _row(name: str, held: Sequence[tuple[Holder, Array]], way: str) -> Array:
    holders, rows = zip(*held, strict=True)
    if all(np.array_equal(rows[0], r) for r in rows[1:]):
        first: Array = rows[0]
        return first
    for holder, row in held:
        if way == str(holder.number):
            return row
    if way != "average":
        _ask(name, holders)
    shares = zip(_shares(name, holders), rows, strict=True)
    return np.asarray(sum(s * r for (_, s), r in shares))


def _shares(name: str, holders: Sequence[Holder]) -> list[tuple[Holder, float]]:
    """The weights of those that hold it, so that they sum up to one."""
    total = math.fsum(h.weight for h in holders)
    if not total:
        raise UsageError(f"the weights of the adapters that hold {name!r} sum up to 0: no average.")
    return [(h, h.weight / total) for h in holders]


def _check_shapes(
    name: str, holders: Sequence[Holder], shape: tuple[int, ...], *, rows: bool = False
) -> None:
    for holder in holders:
        there = holder.info.shape[1:] if rows else holder.info.shape
        if there != shape:
            raise MisfitError(
                f"{name!r} is {list(shape)} in one adapter and {list(there)} in another.",
                hint="They are of different models, or vocabularies; --whole drop leaves it out.",
                file=holder.adapter.path,
                tensor=holder.info.name,
            )


def _ask(name: str, holders: Sequence[Holder]) -> None:
    numbers = " and ".join(str(h.number) for h in holders)
    raise MisfitError(
        f"adapters {numbers} hold {name!r} whole, and differ; whose shall it be?",
        hint="Pass --whole N for that of adapter N, --whole average, or --whole drop.",
        tensor=name,
    )


def _facts(
    adapters: Sequence[Adapter],
    tokens: Mapping[str, list[int]],
    modules: set[str],
    *,
    drop: bool,
) -> dict[str, Any]:
    """What a config says of tensors that are held whole."""
    saved = _saved(adapters, modules)
    biases = [b for a in adapters if (b := a.config.raw.get("bias") or "none") != "none"]
    facts: dict[str, Any] = {
        "modules_to_save": None if drop else list(dict.fromkeys(saved)) or None,
        "bias": "none" if drop or not biases else biases[0],
        "trainable_token_indices": dict(tokens) or None,
    }
    if tokens and all(a.config.peft_type == "TRAINABLE_TOKENS" for a in adapters):
        del facts["trainable_token_indices"]
        facts["token_indices"] = next(iter(tokens.values()))
    return facts


def _saved(adapters: Sequence[Adapter], modules: set[str]) -> list[str]:
    """The modules to save: PEFT adapts none of these, so that those with updates (`modules`) are
    not among them, and what they hold whole lies inside the wrappers of their factors.
    """
    found: list[str] = []
    for name in (n for a in adapters for n in _listed(a.config.raw.get("modules_to_save"))):
        if not any(saves(name, m) for m in modules):
            found.append(name)
            continue
        meant = sorted(h for h in _held(adapters) if saves(name, h))
        found += [h for h in meant if not any(f"{m}.".startswith(f"{h}.") for m in modules)]
    return found


def _held(adapters: Sequence[Adapter]) -> set[str]:
    """The modules of which adapters hold tensors whole."""
    return {n.rpartition(".")[0] for a in adapters for n in a.full}


def _listed(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _dropped(adapters: Sequence[Adapter]) -> list[str]:
    names = [n for a in adapters for n in a.full]
    names += [m.name for a in adapters for m in a.modules.values() if "rows" in m.roles]
    count = len(dict.fromkeys(names))
    return [f"{count} tensors that adapters hold whole are left out, as asked."] if count else []
