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
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import UsageError
from lorakit.runtime.change import Change, Changes, effective, recipe_of, whole_of, wide
from lorakit.runtime.fitting import parameters_in
from lorakit.runtime.quantised import dequantised, is_quantised, requantise
from lorakit.runtime.seat import seats_in
from lorakit.runtime.state import State, activate, leave, state_of, unwrapped

Undo = Callable[[], Any]  # plain functions and data, so that copies of a model have their own
Slot = tuple[nn.Module, str]  # a module and the name of a parameter of it
BLOCK = {"cpu": 1 << 20}  # elements that are folded at once, by the device
LARGE = 1 << 26  # on any other
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
    changes: Changes

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


def _rounded(old: Tensor, changes: Changes, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A weight with changes in it in a dtype, and the share of the change that this kept. It is
    computed row block by row block, which saves memory and (in the caches) time.
    """
    value = whole_of(old, changes)
    if value.shape != old.shape:
        return effective(old, changes).to(dtype), 1.0
    recipe, leading = recipe_of(value, changes)
    new = torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)
    before, start, after = (x.reshape(prod(x.shape[:leading]), -1) for x in (old, value, new))
    step = max(1, BLOCK.get(old.device.type, LARGE) // max(start.shape[1], 1))
    blocks = [(i, min(i + step, len(start))) for i in range(0, len(start), step)]

    def block(i: int, j: int) -> Tensor:
        w = start[i:j].to(wide(old.dtype), copy=True)
        recipe.begin(w, i, j)
        return w

    if recipe.surveys:
        recipe = recipe.settled([recipe.survey(block(i, j), i, j) for i, j in blocks])
    sums = torch.zeros(2, dtype=torch.float64)
    for i, j in blocks:
        w = block(i, j)
        change = recipe.change(w, i, j)
        exact = w if change is None else w + change
        after[i:j] = exact
        sums += _along(before[i:j], exact, after[i:j])
    return new, _share(sums)


def _along(old: Tensor, exact: Tensor, new: Tensor) -> Tensor:
    """How far a weight went along its exact change, and the square of that."""
    base = old.to(exact.dtype)
    change = (exact - base).flatten()
    there = new.to(exact.dtype, copy=True).sub_(base).flatten()
    return torch.stack([there @ change, change @ change]).to("cpu", torch.float64)


def _share(sums: Tensor) -> float:
    kept, whole = sums.tolist()
    return kept / whole if whole else 1.0


def _fold(fold: Fold, *, alone: bool, keep: bool) -> tuple[float, Undo]:
    """Fold into a parameter, which stays itself where it is alone; the share retained, the way
    back.
    """
    (module, name), parameter = fold.slot, fold.parameter
    old = dequantised(module, name)
    if is_quantised(module) and name == "weight":
        exact, _ = _rounded(old, fold.changes, wide(old.dtype))
        undo = requantise(module, exact)
        return _share(_along(old, exact, dequantised(module))), undo
    new, share = _rounded(old, fold.changes, old.dtype)
    if alone and new.shape == old.shape:
        kept = _replaced(parameter, new, keep=keep)
        return share, partial(_put_back, module, name, parameter, kept)
    module._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
    return share, partial(_put_back, module, name, parameter)


def _replaced(parameter: nn.Parameter, new: Tensor, *, keep: bool = False) -> Tensor | None:
    """Give a parameter other values; its own ones, on the CPU, where they are to be kept."""
    if keep and parameter.device.type == "cpu" and parameter.stride() == new.stride():
        kept, parameter.data = parameter.data, new  # nothing is copied
        return kept
    kept = parameter.detach().to("cpu", copy=True) if keep else None
    parameter.data.copy_(new)
    return kept


def _put_back(
    module: nn.Module, name: str, parameter: nn.Parameter, bits: Tensor | None = None
) -> None:
    module._parameters[name] = parameter
    if bits is not None:
        _replaced(parameter, bits, keep=True)


def _dequantised(fold: Fold, dtype: torch.dtype | None) -> tuple[nn.Module, float]:
    """The linear layer that takes the place of a quantised one."""
    layer = fold.slot[0]
    old = dequantised(layer)
    new, share = _rounded(old, fold.changes, dtype or old.dtype)
    plain = nn.Linear(*reversed(old.shape), bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(new, requires_grad=False), layer.bias
    return plain.train(layer.training), share


def _untied(model: nn.Module) -> Undo:
    """Let the config say that embeddings are not shared; the way back."""
    config = getattr(model, "config", None)
    was = getattr(config, "tie_word_embeddings", None)
    if was:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return partial(setattr, config, "tie_word_embeddings", was) if was else dict
