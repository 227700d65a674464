"""Adapters folded into the weights of a live model, and taken out again to the bit.

Law: after `unmerge_adapter` every parameter is the same object with the same bits as before
`merge_adapter`. The originals of what is touched are kept on the CPU meanwhile, which is as much
memory as the touched weights take.

Arithmetic is that of a merge of files: all changes summed in float32, rounded once to the dtype of
the weight. A weight that several modules share and that does not change in all of them alike is
shared no more.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import UsageError
from lorakit.runtime.change import Change, effective
from lorakit.runtime.fitting import parameters_in
from lorakit.runtime.quantised import dequantised, is_quantised, requantise
from lorakit.runtime.seat import seats_in
from lorakit.runtime.state import State, activate, leave, state_of, unwrapped

Undo = Callable[[], Any]  # plain functions and data, so that copies of a model have their own
Slot = tuple[nn.Module, str]  # a module and the name of a parameter of it
QUANT = ("requantize", "dequantize")


@dataclass(frozen=True)
class Merged:
    """What a merge did: the adapters with their weights, and of each touched parameter the share of
    its change that the dtype (or the codes) of the weight kept.
    """

    weights: Mapping[str, float]
    retained: Mapping[str, float]


@dataclass(frozen=True)
class Fold:
    """The changes of one parameter."""

    place: str
    slot: Slot
    changes: list[tuple[Change, float]]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is."""
        module, name = self.slot
        return module._parameters[name]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is the same for parameters that change alike."""
        return tuple((*map(id, c._parameters.values()), w) for c, w in self.changes)


def merge_adapter(model: nn.Module) -> Merged:
    """Fold the active adapters into the weights, to be taken out again; what was done.

    Layers of bitsandbytes are dequantised, folded, and quantised again in the same way.

    Raises:
        UsageError: no adapter is active, or some are merged already.
    """
    model, state = unwrapped(model), _ready(model)
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

    Originals are not kept, so the peak is the model and one weight. With quant="dequantize", layers
    of bitsandbytes that are touched become linear layers of 16 bits.

    Raises:
        UsageError: no adapter is active.
    """
    if quant not in QUANT:
        raise UsageError(f"quant is {quant!r}, not one of {', '.join(QUANT)}.")
    model, state = unwrapped(model), state_of(model)
    plain: dict[str, nn.Module] = {}
    if state.merged and quant == "dequantize":
        unmerge_adapter(model)
    if not state.merged:
        _merge(model, _ready(model), plain if quant == "dequantize" else None, keep=False)
    leave(model)
    for path, layer in plain.items():
        model.set_submodule(path, layer)
    return model


def _ready(model: nn.Module) -> State:
    state = state_of(model)
    if state.merged:
        raise UsageError(
            f"merged already: {', '.join(map(repr, state.merged))}.",
            hint="Call unmerge_adapter first.",
        )
    if not state.active:
        raise UsageError("no adapter is active.", hint="Attach one, or choose with set_adapter.")
    return state


@torch.no_grad()  # type: ignore[untyped-decorator]
def _merge(
    model: nn.Module, state: State, plain: dict[str, nn.Module] | None = None, *, keep: bool = True
) -> Merged:
    retained = {}
    slots = _slots(model)
    folds = {f.slot: f for f in _folds(model, state)}
    done: set[int] = set()
    dtype = next((p.dtype for p in parameters_in(model).values() if p.is_floating_point()), None)
    for fold in folds.values():
        if id(fold.parameter) in done:
            continue
        there = slots[id(fold.parameter)]
        alike = all(s in folds and folds[s].kind == fold.kind for s in there)
        if alike:
            done.add(id(fold.parameter))
        if plain is not None and is_quantised(fold.slot[0]):
            plain[fold.place.rpartition(".")[0]], share = _dequantised(fold, dtype)
        else:
            share, undo = _fold(fold, alone=alike, keep=keep)
            state.originals.append(undo)
            if not alike:
                state.originals.append(_untied(model))
        if not keep:
            state.originals.clear()
        retained[fold.place] = share
    state.merged = {n: uses[0].weight for n, uses in state.active.items()}
    for _, seat in seats_in(model):
        seat.apply({})
    return Merged(dict(state.merged), retained)


def _folds(model: nn.Module, state: State) -> Iterator[Fold]:
    for layer, seat in seats_in(model):
        by_slot: dict[tuple[str, str], list[tuple[Change, float]]] = defaultdict(list)
        for name, change in seat.changes:
            for use in state.active.get(name, ()):
                by_slot[change.inside, change.parameter].append((change, use.weight))
        for (inside, parameter), changes in by_slot.items():
            yield Fold(changes[0][0].place, (layer.get_submodule(inside), parameter), changes)


def _slots(model: nn.Module) -> dict[int, list[Slot]]:
    """Where each parameter of a model is, by its identity."""
    found: dict[int, list[Slot]] = defaultdict(list)
    for module in model.modules():
        if not isinstance(module, Change):
            for name, parameter in module._parameters.items():
                found[id(parameter)].append((module, name))
    return found


def _computed(fold: Fold) -> tuple[Tensor, Tensor]:
    """The weight as numbers, and the exact one."""
    old = dequantised(*fold.slot)
    wide = old if old.dtype == torch.float64 else old.float()
    return old, effective(wide, fold.changes)


def _fold(fold: Fold, *, alone: bool, keep: bool) -> tuple[float, Undo]:
    """Fold into a parameter, in place where it is alone; the share retained, and the way back."""
    (module, name), parameter = fold.slot, fold.parameter
    old, exact = _computed(fold)
    if is_quantised(module) and name == "weight":
        undo = requantise(module, exact)
        return _retained(old, exact, dequantised(module)), undo
    new = exact.to(old.dtype)
    share = _retained(old, exact, new)
    if alone and new.shape == old.shape:
        kept = parameter.detach().to("cpu", copy=True) if keep else None
        parameter.data.copy_(new)
        return share, partial(_put_back, module, name, parameter, kept)
    module._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
    return share, partial(_put_back, module, name, parameter)


def _put_back(
    module: nn.Module, name: str, parameter: nn.Parameter, bits: Tensor | None = None
) -> None:
    module._parameters[name] = parameter
    if bits is not None:
        parameter.data.copy_(bits)


def _dequantised(fold: Fold, dtype: torch.dtype | None) -> tuple[nn.Module, float]:
    """The linear layer that takes the place of a quantised one."""
    layer = fold.slot[0]
    old, exact = _computed(fold)
    plain = nn.Linear(*reversed(old.shape), bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(exact.to(dtype or old.dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training), _retained(old, exact, plain.weight)


def _retained(old: Tensor, exact: Tensor, new: Tensor) -> float:
    """The share of a change that its rounding kept, measured along the change."""
    if old.shape != new.shape:
        return 1.0
    change = (exact - old).flatten()
    whole = float(change @ change)
    return float((new.to(change.dtype) - old).flatten() @ change) / whole if whole else 1.0


def _untied(model: nn.Module) -> Undo:
    """Let the config say that embeddings are not shared; the way back."""
    config = getattr(model, "config", None)
    was = getattr(config, "tie_word_embeddings", None)
    if was:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return partial(setattr, config, "tie_word_embeddings", was) if was else dict
