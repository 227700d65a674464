"""Adapters put on a model, given other tensors, and taken off.

Law: state dict, class, and the names, identity and bits of the model's own parameters are those of
the model without adapters, before, during and after; `detach` leaves nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.factors import residual
from lorakit.adapter.load import check_finite, read_array
from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.formats.peft import saves
from lorakit.math.lowrank import transpose
from lorakit.naming.embeddings import is_head
from lorakit.runtime.change import Change
from lorakit.runtime.choosing import BASE
from lorakit.runtime.fitting import Fitted, fitted, parameters_in
from lorakit.runtime.offloaded import device_of, is_offloaded, value_of
from lorakit.runtime.quantised import dequantised, is_quantised
from lorakit.runtime.seat import Use, seat_of, seats_in
from lorakit.runtime.state import (
    STATE,
    Loaded,
    State,
    activate,
    check_for_good,
    check_unmerged,
    check_whole,
    drop,
    forget_compiled,
    found_in,
    leave,
    state_of,
    unwrapped,
)
from lorakit.verbs.base.targets import Options
from lorakit.verbs.choices import listed
from lorakit.verbs.merge import opened_adapters

DTYPES = ("float32", "float64")  # of factors


@dataclass(frozen=True)
class Attachment:
    """What `attach` did: the parameters that the adapter changes, how many numbers it has itself,
    and what the user should know.
    """

    name: str
    tensors: tuple[str, ...]
    parameters: int
    notes: tuple[str, ...] = ()


def attach(
    model: nn.Module,
    adapter: str | Path | Adapter,
    name: str = "default",
    *,
    trainable: bool = False,
    dtype: str | torch.dtype = "float32",
    **options: Any,
) -> Attachment:
    """Put an adapter on a model; what was done. The first one is active, others are chosen.

    adapter: a path, hub id or open adapter. trainable: its tensors take gradients, and all that the
    model had is frozen until `detach`. dtype: of the factors, "float32" or "float64"; the layer's
    input is cast to it and the result back. `options` are the fields of
    `lorakit.verbs.base.targets.Options` that tell how adapter and base meet (key_map,
    allow_unmatched, base_is_residual, mha_factor, expert_packing, expert_orientation),
    allow_pickle, and component, for a part of an adapter of several models.

    The norms of DoRA are taken of the weights at hand, again in each step of a trainable adapter.

    Raises:
        MisfitError: a tensor of the adapter has no place in the model, or is NaN or Inf.
        InputError: the adapter or a layer is of a kind that is refused, or the model is on meta.
        UsageError: the name is taken, an adapter is merged, others are active for a while only, or
            one was attached to a part of the model, or to one that it is a part of.
    """
    model, state = unwrapped(model), state_of(model)
    check_unmerged(state)
    check_for_good(state)
    _check_one_model(model, state)
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}, not one of {', '.join(DTYPES)}.")
    if name in state.adapters or name == BASE:
        raise UsageError(f"there is an adapter {name!r} already.", hint="Choose another name.")
    opened = _opened(adapter, options)
    wanted = Options((1.0,), **options)
    loaded, changes, notes = _loaded(model, opened, wanted, trainable=trainable, dtype=dtype)
    if trainable:
        own = [p for p in parameters_in(model).values() if p.requires_grad]
        state.frozen += [p.requires_grad_(False) for p in dict.fromkeys(own)]
    for host, change in changes:
        seat_of(host).add(host, name, change)
    forget_compiled()
    uses = state.active if state.adapters else {name: [Use()]}
    state.adapters[name] = loaded
    model.__dict__[STATE] = state
    activate(model, uses)
    places = tuple(dict.fromkeys(c.place for _, c in changes))
    return Attachment(name, places, sum(p.numel() for p in loaded.tensors.values()), tuple(notes))


def swap_adapter(
    model: nn.Module,
    adapter: str | Path | Adapter,
    name: str = "default",
    *,
    key_map: str | Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Give an attached adapter the tensors of another of the same modules and ranks, in place.

    Nothing that was compiled is compiled again. Where the scaling is another, B is multiplied by
    the ratio of the two. key_map: of the other's names, by default that of the first; `options`
    are allow_pickle and component as `attach` has them, all else is as it was attached.

    Raises:
        MisfitError: the two do not have the same tensors in the same shapes.
        UsageError, InputError: as `attach`.
    """
    state = found_in(model, name)
    check_unmerged(state)
    old = state.adapters[name]
    opened = _opened(adapter, options)
    if options:
        raise UsageError(f"swap_adapter has no option {next(iter(options))!r}.")
    asked = old.options if key_map is None else replace(old.options, key_map=tuple(listed(key_map)))
    loaded, changes, _ = _loaded(model, opened, asked, trainable=False, dtype=old.dtype)
    there = {c.key: (layer, c) for layer, s in seats_in(model) for n, c in s.changes if n == name}
    new = {c.key: c for _, c in changes}
    if differing := sorted(there.keys() ^ new.keys(), key=str):
        raise MisfitError(
            f"{len(differing)} of its tensors are not those of {name!r}; the first is for "
            f"{differing[0][0]!r}.",
            hint="Attach it under a name of its own.",
            file=opened.path,
            tensor=differing[0][0],
        )
    with torch.no_grad():
        for key, (layer, change) in there.items():
            change.become(new[key])
            change.refresh(layer)
    # B has the old scalings, so the config stays; that of what the file holds is another.
    named = {n: new[k].names[r] for k, (_, c) in there.items() for r, n in c.names.items()}
    dtypes = {n: loaded.dtypes.get(named.get(n, ""), d) for n, d in old.dtypes.items()}
    state.adapters[name] = replace(old, dtypes=dtypes)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter off that is not active.

    Raises:
        UsageError: there is no such adapter, or it is active or merged.
    """
    state = found_in(model, name)
    check_unmerged(state)
    check_for_good(state)
    if name in state.active:
        raise UsageError(
            f"the adapter {name!r} is active.",
            hint="Choose others with set_adapter first, or take all off with detach.",
        )
    drop(model, [name])


def unload(model: nn.Module) -> nn.Module:
    """The model as it was before anything was attached, to the bit; merged adapters come out.

    Raises:
        UsageError: a merge for good did not end, and what it changed is not there any more.
    """
    model, state = unwrapped(model), state_of(model)
    check_whole(state)
    state.take_back()
    return leave(model)


detach = unload  # the other name of what undoes `attach`


def _check_one_model(model: nn.Module, state: State) -> None:
    """Refuse a model whose layers have adapters that were attached to another: a part, or all."""
    there = {name for _, seat in seats_in(model) for name, _ in seat.changes}
    if others := sorted(there - state.adapters.keys()):
        raise UsageError(
            f"the adapter {others[0]!r} was attached to a part of this model, or to one that this "
            "is a part of.",
            hint="Attach all to the same model: unload it there first.",
        )


def _opened(adapter: str | Path | Adapter, options: dict[str, Any]) -> Adapter:
    allow, component = bool(options.pop("allow_pickle", False)), options.pop("component", "")
    (found,) = opened_adapters([adapter], component, allow_pickle=allow, factors=True)
    check_finite(found.source, found.path)
    return found


def _loaded(
    model: nn.Module, adapter: Adapter, options: Options, *, trainable: bool, dtype: str
) -> tuple[Loaded, list[tuple[nn.Module, Change]], list[str]]:
    places, notes = fitted(unwrapped(model), adapter, options)
    tensors: dict[str, nn.Parameter] = {}
    changes = []
    for place in places:
        there = place.owner._parameters[place.parameter]
        device = device_of(place.owner, place.parameter)
        for name in (n for n in place.names.values() if n not in tensors):
            values = torch.from_numpy(read_array(adapter.source, name, dtype)).to(device)
            if place.action == "full":  # else it would be cast whenever the layer is called
                values = values.to(there.dtype)
            learns = trainable and not _unasked(place, adapter.config.raw)
            tensors[name] = nn.Parameter(values, requires_grad=learns)
        if _unasked(place, adapter.config.raw) and _same(place, tensors[name]):
            continue
        if place.action == "residual":
            change = Change(*_taken_out(place))
        else:
            change = Change(place, tensors)
            change.dropout = float(adapter.config.raw.get("lora_dropout") or 0) * trainable
        if why := _lacking(place, change):
            raise InputError(
                f"{place.tensor!r} {why}.",
                hint="Attach it to a model that is whole and not quantised.",
                file=adapter.path,
                tensor=place.tensor,
            )
        change.refresh(place.owner)
        changes.append((place.host, change))
    dtypes = {name: adapter.source.infos[name].dtype for name in tensors}
    loaded = Loaded(adapter.config.raw, tensors, dtypes, options, dtype, trainable)
    return loaded, changes, notes


def _lacking(place: Fitted, change: Change) -> str:
    """Why a change cannot be made of what is there of a parameter; "" where it can."""
    owner, name = place.owner, place.parameter
    if is_offloaded(owner, name) and place.action in ("full", "rows"):
        return "is offloaded, and the adapter replaces it"
    if change.path is None and owner._parameters[name] is None:
        return "is in the adapter, and its layer has none"
    if change.path is None and is_quantised(owner) and name == "weight":
        return "is quantised, and what the adapter does to it needs the weight"
    return ""


def _same(place: Fitted, values: Tensor) -> bool:
    return bool(torch.equal(values, value_of(place.owner, place.parameter)))


def _unasked(place: Fitted, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of an embedding (or head) that PEFT put into the file for its factors'
    sake, or because it was resized: it does not learn.
    """
    module, _, parameter = place.tensor.rpartition(".")
    table = isinstance(place.owner, nn.Embedding) or is_head(f"{module}.weight")
    asked = any(saves(m, module) for m in config.get("modules_to_save") or ())
    asked |= parameter == "bias" and config.get("bias", "none") != "none"
    return place.action == "full" and table and not asked


def _taken_out(place: Fitted) -> tuple[Fitted, dict[str, nn.Parameter]]:
    """What an initialisation took out of a weight, as one more update with factors of its own."""
    weight = dequantised(place.owner, place.parameter)
    update: Any = residual(place.spec, weight.float().cpu().numpy())
    turned = place.spec["transposed"]
    low = transpose(update.low) if turned else update.low
    plain = {"adapter": 0, "a": "a", "b": "b", "scaling": low.scaling, "weight": update.weight}
    values = {role: torch.tensor(getattr(low, role), device=weight.device) for role in "ab"}
    spec = {**plain, "magnitude": None, "enabled": None, "transposed": turned, "taken": True}
    found = {r: nn.Parameter(v.contiguous(), requires_grad=False) for r, v in values.items()}
    return replace(place, action="update", spec=spec), found
