"""Adapters folded into the weights of a live model, and taken out again to the bit.

Law: after `unmerge_adapter` every parameter is the same object with the same bits as before
`merge_adapter`. The originals of what is touched are kept on the CPU meanwhile, which is as much
memory as the touched weights take.

Arithmetic is that of a merge of files: all changes summed in float32, rounded once to the dtype of
the weight. A weight that several modules share and that does not change in all of them alike is
shared no more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lorakit.engine.device import full_precision
from lorakit.errors import MisfitError, UsageError
from lorakit.runtime.effective import rounded, share_of
from lorakit.runtime.exact import wide
from lorakit.runtime.facts import Undo, inseparable, resized, tell_quantised, untied
from lorakit.runtime.fitting import parameters_in
from lorakit.runtime.folds import Fold, Slot, alike, check_present, folds_of, slots_of
from lorakit.runtime.quantised import dequantised, is_quantised, requantise
from lorakit.runtime.seat import seats_in
from lorakit.runtime.state import (
    State,
    activate,
    check_for_good,
    check_whole,
    leave,
    state_of,
    unwrapped,
)

QUANT = ("requantize", "dequantize")


@dataclass(frozen=True)
class Merged:
    """What a merge did: the adapters with their weights, and of each touched parameter the share of
    its change that the dtype (or the codes) of the weight kept.
    """

    weights: Mapping[str, float]
    retained: Mapping[str, float]


def merge_adapter(model: nn.Module) -> Merged:
    """Fold the active adapters into the weights, to be taken out again; what was done.

    Layers of bitsandbytes are dequantised, folded, and quantised again in the same way.

    Raises:
        UsageError: no adapter is active, some are merged already, or others are active for a while
            only.
    """
    model, state = unwrapped(model), _ready(model)
    check_whole(state)
    state.inseparable = _inseparable(model, state)
    try:
        done: Merged = _merge(model, state)
    except BaseException:
        state.take_back()
        raise
    return done


def unmerge_adapter(model: nn.Module) -> None:
    """Take merged adapters out again: the bits are the original ones, the adapters are active.

    Raises:
        UsageError: none is merged.
    """
    state = state_of(model)
    if not state.merged:
        raise UsageError("no adapter is merged.")
    state.take_back()
    activate(model, state.active)


def merge_and_unload(model: nn.Module, *, quant: str = "requantize") -> nn.Module:
    """The model with the active adapters in its weights and nothing else of any adapter.

    Originals are not kept, so the peak is the model and one weight. If it stops half way (out of
    memory, Ctrl-C), the model answers as before, and calling it again does the rest. With
    quant="dequantize", layers of bitsandbytes that are touched become linear layers of 16 bits.

    Raises:
        UsageError: no adapter is active.
        MisfitError: weights part that this kind of model shares again when it is loaded.
    """
    if quant not in QUANT:
        raise UsageError(f"quant is {quant!r}, not one of {', '.join(QUANT)}.")
    model, state = unwrapped(model), state_of(model)
    shared = state.inseparable if state.merged else _inseparable(model, _ready(model))
    if shared:
        raise MisfitError(
            f"changes {shared!r}, which this kind of model shares again when it is loaded.",
            hint="Keep the adapter beside the model, or use merge_adapter while it is in memory.",
            tensor=shared,
        )
    plain: dict[str, nn.Module] = {}
    if state.merged and quant == "dequantize":
        unmerge_adapter(model)
    if not state.merged:
        try:
            _merge(model, _ready(model), plain if quant == "dequantize" else None, keep=False)
        except BaseException:
            _apply_rest(model, state)
            raise
    leave(model)
    for path, layer in plain.items():
        model.set_submodule(path, layer)
    if plain:
        tell_quantised(model)
    return model


def _ready(model: nn.Module) -> State:
    state = state_of(model)
    check_for_good(state)
    if state.merged:
        raise UsageError(
            f"merged already: {', '.join(map(repr, state.merged))}.",
            hint="Call unmerge_adapter first.",
        )
    if not state.active:
        raise UsageError("no adapter is active.", hint="Attach one, or choose with set_adapter.")
    check_present(folds_of(model, state))
    return state


def _inseparable(model: nn.Module, state: State) -> str:
    """A parameter that is shared, and will be no more, in a kind of model that shares it always."""
    model = unwrapped(model)
    slots, folds = slots_of(model), {f.slot: f for f in folds_of(model, state)}
    parted = [f.place for f in folds.values() if not alike(f, folds, slots[id(f.parameter)])]
    return inseparable(model, parted)


@full_precision()
@torch.no_grad()  # type: ignore[untyped-decorator]
def _merge(
    model: nn.Module, state: State, plain: dict[str, nn.Module] | None = None, *, keep: bool = True
) -> Merged:
    retained = {}
    slots = slots_of(model)
    folds = {f.slot: f for f in folds_of(model, state)}
    done: set[Slot] = set()
    state.folded = state.folded if state.spoiled else set()
    dtype = next((p.dtype for p in parameters_in(model).values() if p.is_floating_point()), None)
    for fold in folds.values():
        if fold.slot in done:
            continue
        there = slots[id(fold.parameter)]
        together = alike(fold, folds, there)
        if together:
            done |= set(there)
        if plain is not None and is_quantised(fold.slot[0]):
            plain[fold.place.rpartition(".")[0]], share = _dequantised(fold, dtype)
        else:
            rows = _rows(fold)
            share, undo = _fold(fold, there if together else [], keep=keep)
            state.originals.append(undo)
            state.originals += [] if together or state.inseparable else untied(model)
            layers = [layer for layer, _ in there if together or layer is fold.slot[0]]
            if rows != _rows(fold):
                state.originals += resized(model, fold.place, layers, rows, _rows(fold))
            state.folded |= {fold.slot, *(there if together else ())}
        if not keep:
            state.originals.clear()
        retained[fold.place] = share
    state.merged = {n: uses[0].weight for n, uses in state.active.items()}
    for layer, seat in seats_in(model):
        seat.apply(layer, {}, merged=True)
    return Merged(dict(state.merged), retained)


def _apply_rest(model: nn.Module, state: State) -> None:
    """Apply what is not in the weights yet, and that alone."""
    state.spoiled = bool(state.folded)
    for layer, seat in seats_in(model) if state.spoiled else ():
        slots = [(layer.get_submodule(c.inside), c.parameter) for _, c in seat.changes]
        pairs = zip(slots, seat.changes, strict=True)
        seat.changes = [pair for slot, pair in pairs if slot not in state.folded]
        seat.apply(layer, state.active)


def _rows(fold: Fold) -> int:
    """How many rows a parameter has; 0 where it has none, or codes in the place of numbers."""
    parameter = fold.parameter
    codes = is_quantised(fold.slot[0]) and fold.slot[1] == "weight"
    return 0 if codes or not parameter.ndim else len(parameter)


def _fold(fold: Fold, there: Sequence[Slot], *, keep: bool) -> tuple[float, Undo]:
    """Fold into a parameter, which stays itself where it changes `there`, everywhere that it is;
    the share retained, the way back.
    """
    (module, name), parameter = fold.slot, fold.parameter
    old = dequantised(module, name)
    if is_quantised(module) and name == "weight":
        exact, _ = rounded(old, fold.changes, wide(old.dtype))
        undo = requantise(module, exact)
        return share_of(old, exact, dequantised(module)), undo
    new, share = rounded(old, fold.changes, old.dtype)
    if there and new.shape == old.shape:
        kept = _replaced(parameter, new, keep=keep)
        return share, partial(_put_back, there, parameter, kept)
    fresh = nn.Parameter(new, requires_grad=parameter.requires_grad)
    for where, called in there or [fold.slot]:
        where._parameters[called] = fresh
    return share, partial(_put_back, there or [fold.slot], parameter)


def _replaced(parameter: nn.Parameter, new: Tensor, *, keep: bool = False) -> Tensor | None:
    """Give a parameter other values; its own ones, on the CPU, where they are to be kept."""
    if keep and parameter.device.type == "cpu" and parameter.stride() == new.stride():
        kept, parameter.data = parameter.data, new  # nothing is copied
        return kept
    kept = parameter.detach().to("cpu", copy=True) if keep else None
    parameter.data.copy_(new)
    return kept


def _put_back(there: Sequence[Slot], parameter: nn.Parameter, bits: Tensor | None = None) -> None:
    """Give modules their own parameter again, in the dtype that the model has by now."""
    for module, name in there:
        now = module._parameters[name]
        if now is not parameter:
            parameter.data = parameter.data.to(now.device, now.dtype)
        module._parameters[name] = parameter
    if bits is not None:
        _replaced(parameter, bits.to(parameter.dtype), keep=True)


def _dequantised(fold: Fold, dtype: torch.dtype | None) -> tuple[nn.Module, float]:
    """The linear layer that takes the place of a quantised one."""
    layer = fold.slot[0]
    old = dequantised(layer)
    new, share = rounded(old, fold.changes, dtype or old.dtype)
    plain = nn.Linear(*reversed(old.shape), bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(new, requires_grad=False), layer.bias
    return plain.train(layer.training), share
