"""What a layer has while adapters are attached: their changes, and hooks that apply them.

The seat is a module of the layer, so that the tensors of adapters move with the model, and an
optimiser that is given `model.parameters()` finds those that are trained. It has no part in the
state dict. Hooks are plain functions that look at the seat: a copy of the model has its own.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import UsageError
from lorakit.runtime.change import Change, Changes, Unsaved, changed
from lorakit.runtime.effective import effective
from lorakit.runtime.fitting import SEAT
from lorakit.runtime.offloaded import value_of

OUTER = "lorakit_outer_"  # before the name of a parameter that a module around its own has set
Rows = tuple[bool, ...]  # of a batch: which are meant
_TURN = threading.Lock()  # to give a layer other weights, or its own again


@dataclass(frozen=True)
class Use:
    """How much of an adapter is applied, and to which rows of a batch; None: all."""

    weight: float = 1.0
    rows: Rows | None = None


class Seat(Unsaved):
    """The changes of a layer by adapter, and which of them are applied."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.changes: list[tuple[str, Change]] = []
        self.on_output: dict[Rows | None, list[tuple[Change, float]]] = {}
        self.in_weight: dict[tuple[str, str], list[tuple[Change, float]]] = {}
        self.merged = False
        self.before = False
        self.within: set[int] = set()  # the threads whose forward sees the changed weights
        self.handles = [
            layer.register_forward_hook(_after, with_kwargs=True),
            layer.register_load_state_dict_pre_hook(_check_loading),
            layer.register_load_state_dict_post_hook(_refresh),
        ]
        layer.add_module(SEAT, self)

    def add(self, layer: nn.Module, adapter: str, change: Change) -> None:
        """Take in a change."""
        self.add_module(str(1 + max(map(int, self._modules), default=-1)), change)
        self.changes.append((adapter, change))
        if change.path is None and not self.before:
            self.before = True
            self.handles.append(layer.register_forward_pre_hook(_before))
            self.handles.append(layer.register_forward_hook(_restore, always_call=True))

    def drop(self, layer: nn.Module, adapter: str) -> None:
        """Forget the changes of an adapter; with the last of all, go."""
        for number, module in list(self._modules.items()):
            if any(module is c for name, c in self.changes if name == adapter):
                del self._modules[number]
        self.changes = [(name, c) for name, c in self.changes if name != adapter]
        if not self.changes:
            for handle in self.handles:
                handle.remove()
            _give_back(layer)
            del layer._modules[SEAT]

    def apply(
        self, layer: nn.Module, active: Mapping[str, Sequence[Use]], *, merged: bool = False
    ) -> None:
        """Make these adapters the ones that are applied; or none, while some are merged."""
        _give_back(layer)
        self.merged = merged
        self.on_output, self.in_weight = {}, {}
        # Norms are those of the weight that is there.
        whole = {c.parameter for name, c in self.changes if name in active and c.action == "full"}
        # Rows are replaced before anything is added to them.
        for name, change in sorted(self.changes, key=lambda pair: pair[1].action != "rows"):
            for use in active.get(name, ()):
                if change.path and not (change.parameter in whole and change.has_norms):
                    self.on_output.setdefault(use.rows, []).append((change, use.weight))
                else:
                    there = self.in_weight.setdefault((change.inside, change.parameter), [])
                    there.append((change, use.weight))


def seat_of(layer: nn.Module) -> Seat:
    """The seat of a layer, a new one if it has none."""
    found: Seat | None = layer._modules.get(SEAT)
    return found if found is not None else Seat(layer)


def seats_in(model: nn.Module) -> list[tuple[nn.Module, Seat]]:
    """The layers of a model that have seats."""
    return [(m, m._modules[SEAT]) for m in model.modules() if SEAT in m._modules]


def _after(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    for rows, changes in layer.lorakit.on_output.items():
        _check_there(changes)
        x = args[0] if args else next(iter(kwargs.values()))
        if rows is None:
            output = changed(layer, x, output, changes)
        else:
            there = _expanded(rows, x)
            part = changed(layer, x[there], output[there], changes)
            output = output.index_copy(0, there, part)
    return output


def _before(layer: nn.Module, args: Any) -> None:
    """Let the layer see the changed weights under their names; its parameters stay as they are."""
    for changes in layer.lorakit.in_weight.values():
        _check_there(changes)
    owners = ((layer.get_submodule(i), p, c) for (i, p), c in layer.lorakit.in_weight.items())
    weights = [effective(value_of(owner, p), c) for owner, p, c in owners]
    if torch.compiler.is_compiling():
        _show(layer, weights)
        return
    with _TURN:
        layer.lorakit.within.add(threading.get_ident())
        _show(layer, weights)


def _check_there(changes: Changes) -> None:
    """Refuse factors that accelerate took away: it does not bring them back for a forward."""
    if any(p.is_meta for change, _ in changes for p in change._parameters.values()):
        raise UsageError(
            "the model was offloaded after an adapter was attached to it.",
            hint="Unload it, and attach it to the model that is offloaded.",
        )


def _show(layer: nn.Module, weights: Sequence[Tensor]) -> None:
    for (inside, parameter), weight in zip(layer.lorakit.in_weight, weights, strict=True):
        owner = layer.get_submodule(inside)
        object.__setattr__(owner, parameter, weight)
        if inside:
            object.__setattr__(owner, OUTER + parameter, weight)


def _restore(layer: nn.Module, args: Any, output: Any) -> None:
    """Give the layer its own weights again, unless a forward of another thread needs the others."""
    if torch.compiler.is_compiling():
        _hide(layer)
        return
    with _TURN:
        layer.lorakit.within.discard(threading.get_ident())
        if not layer.lorakit.within:
            _hide(layer)


def _give_back(layer: nn.Module) -> None:
    """Give a layer its own weights again whose forward was interrupted (Ctrl-C calls no hooks)."""
    layer.lorakit.within.clear()
    _hide(layer)


def _hide(layer: nn.Module) -> None:
    for inside, parameter in layer.lorakit.in_weight:
        owner = layer.get_submodule(inside)
        if inside:
            owner.__dict__.pop(OUTER + parameter, None)
        outer = owner.__dict__.get(OUTER + parameter)
        if outer is None:
            owner.__dict__.pop(parameter, None)
        else:
            object.__setattr__(owner, parameter, outer)


def _check_loading(layer: nn.Module, *_: Any) -> None:
    """Refuse other weights where what is kept of the present ones could not follow."""
    seat = layer.lorakit
    if seat.merged:
        raise UsageError("adapters are merged.", hint="Call unmerge_adapter, then load again.")
    if taken := [name for name, c in seat.changes if "taken" in c.spec]:
        raise UsageError(
            f"what the initialisation of {taken[0]!r} took out is that of the weights at hand.",
            hint="Call unload, load the weights, and attach it again.",
        )


def _refresh(layer: nn.Module, _: Any) -> None:
    """Compute again what is kept of a weight that was loaded."""
    for _, change in layer.lorakit.changes:
        change.refresh(layer)


def _expanded(rows: Rows, x: Tensor) -> Tensor:
    """The numbers of these rows of a batch in an input that may hold each as several (beams, or the
    tokens of all rows below one another).
    """
    times, rest = divmod(len(x), len(rows))
    if rest or not times:
        raise UsageError(f"adapters are named for {len(rows)} rows, the batch has {len(x)}.")
    chosen = torch.tensor([n for n, on in enumerate(rows) if on], device=x.device)
    return (chosen[:, None] * times + torch.arange(times, device=x.device)).flatten()
