"""Deltas in the names and the layout of a format: renamed, fused, and where it cannot hold them as
they are, computed.

Law: the update of every module is the same, bit for bit where nothing is said to be rounded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.adapter.delta import Delta, Values
from lorakit.adapter.files.fusing import fused
from lorakit.adapter.files.parts import as_lora, by_row, computed, scaling_of
from lorakit.errors import MisfitError
from lorakit.formats.spelling import NUMBER, SPELLINGS, Number, Place, Spelling, place_of
from lorakit.math.cast import narrow, storage, widen
from lorakit.math.surgery import Factors, pruned

Array = NDArray[Any]


@dataclass(frozen=True)
class Step:
    """What became of a module: its name in the file that is written, those that it was made of, and
    how: "renamed", "swapped", "split", "fused", "computed" or "folded". `error` is by how much
    rounding moves a factor, relative to its norm.
    """

    name: str
    modules: tuple[str, ...]
    how: str = "renamed"
    error: float = 0.0


@dataclass(frozen=True)
class Tensors:
    """The tensors of one module of the file that is written, by name, and what was done."""

    step: Step
    values: dict[str, Values] = field(default_factory=dict)
    delta: Delta | None = None

    def kept(self) -> "Tensors":
        """The same with its tensors in memory."""
        return replace(self, values={n: computed(v.read()) for n, v in self.values.items()})


def spelled(
    deltas: Sequence[Delta], to: str, family: str, *, fold: bool = False, number: Number = NUMBER
) -> Iterator[Tensors]:
    """The modules of a file of the format `to`; `fold` multiplies scalings into the factors.

    number: dtype and shape of an alpha that has to be made.

    Raises:
        MisfitError: the family has no such module, or the format cannot hold what is done to one.
    """
    spelling = replace(SPELLINGS[to], number=number)
    places = {id(d): _place(d, to, family) for d in deltas}
    alone = [d for d in deltas if places[id(d)].found is None]
    rows = [d for d in deltas if places[id(d)].found is not None]
    for delta in alone:
        yield _written(_fitting(_unfused(delta), spelling), places[id(delta)].name, spelling, fold)
    for found, parts in by_row(rows, lambda d: _found(places[id(d)])).values():
        one, exact = fused(found, parts, spelling)
        name = places[id(next(iter(parts.values())))].name
        modules = tuple(p.module for p in parts.values())
        made = _written(_fitting(one, spelling), name, spelling, fold)
        how = "fused" if len(found.row.parts) > 1 else one.how
        error = made.step.error if exact else max(made.step.error, 2.0**-8)
        yield replace(made, step=Step(name, modules, how, error))


def _place(delta: Delta, to: str, family: str) -> Place:
    place = place_of(to, family, delta.component, delta.module)
    if place is None:
        raise MisfitError(f"{delta.module!r} is no module of {family}.", tensor=delta.module)
    return place


def _found(place: Place) -> Any:
    return place.found


def _unfused(delta: Delta) -> Delta:
    """A part of a fused projection without the ranks that are of other parts."""
    if delta.how != "split" or delta.algo != "lora":
        return delta
    alpha = delta.alpha_value
    part = Factors(delta.tensors["a"].read(), delta.tensors["b"].read(), alpha)
    kept = pruned(part)
    if kept is None or kept is part:
        return delta
    tensors = {**delta.tensors, "a": computed(kept.a), "b": computed(kept.b)}
    return replace(delta, tensors=tensors, alpha=kept.alpha)


def _fitting(delta: Delta, spelling: Spelling) -> Delta:
    """The delta in a form that the format holds.

    Raises:
        MisfitError: there is none.
    """
    if delta.algo != "lora" and delta.algo not in spelling.algos:
        delta = as_lora(delta)
    if "mid" in delta.tensors and not spelling.cores:
        delta = as_lora(delta)
    if "magnitude" not in delta.tensors:
        return delta
    return replace(delta, tensors={**delta.tensors, "magnitude": _norms(delta, spelling)})


def _norms(delta: Delta, spelling: Spelling) -> Values:
    """DoRA's norms in the shape that the format has for them."""
    old = delta.tensors["magnitude"]
    by_inputs = len(old.shape) > 1 and old.shape[0] == 1 and not _leading(old, delta)
    kernel = len(delta.tensors["a"].shape) - 2
    if spelling.alpha:
        if by_inputs:
            return old
        shape = (int(np.prod(old.shape)), 1, *(1,) * kernel)
    else:
        if by_inputs:
            raise MisfitError(
                f"{delta.module!r} has DoRA norms of its inputs, which {spelling.name} has not.",
                hint="Bake them into the base, or write kohya or comfyui.",
            )
        size = int(np.prod(old.shape))
        shape = (1, size, *(1,) * kernel) if kernel else (size,)
    if shape == old.shape:
        return old
    return Values(old.dtype, shape, lambda: old.read().reshape(shape))


def _leading(old: Values, delta: Delta) -> bool:
    """Whether (1, out, 1, 1) is PEFT's shape for norms of a convolution's outputs."""
    kernel = len(delta.tensors["a"].shape) - 2
    return bool(kernel) and old.shape[1] == delta.tensors["b"].shape[0]


def _written(delta: Delta, name: str, spelling: Spelling, fold: bool) -> Tensors:
    values, how, error = dict(delta.tensors), delta.how, 0.0
    scaling = scaling_of(delta) if delta.algo in ("lora", "loha", "lokr") else 1.0
    if spelling.alpha:
        if delta.algo == "lora" or (delta.algo in ("loha", "lokr") and delta.alpha is not None):
            values["alpha"] = _alpha(delta, scaling, spelling.number)
        elif isinstance(delta.alpha, Values):
            values["alpha"] = delta.alpha
    elif fold and scaling != 1.0:
        values, error = _folded(values, scaling)
        how, delta = "folded", replace(delta, tensors=values, alpha=None, rslora=False)
    keys = {name + spelling.ending(delta.algo, r): v for r, v in values.items()}
    return Tensors(Step(name, (delta.module,), how, error), keys, delta)


def _alpha(delta: Delta, scaling: float, number: Number) -> Values:
    """The alpha of a module as a tensor: its own, where it has one that says the same."""
    if isinstance(delta.alpha, Values) and not delta.rslora:
        return delta.alpha
    value = scaling * delta.rank if delta.algo == "lora" else delta.alpha_value
    dtype, shape = number
    found = np.array(value, np.float64).astype(storage(dtype)).reshape(shape)
    kept = float(found.astype(np.float64).reshape(())) == value
    return computed(found if kept else np.array(value, np.float32))


def _folded(values: dict[str, Values], scaling: float) -> tuple[dict[str, Values], float]:
    """Factors with a scaling in them: a power of two in B, the rest in A, and by how much rounding
    moves A, relative to its norm.

    Source: the rule of huggingface/diffusers, src/diffusers/loaders/lora_conversion_utils.py.
    """
    down, up = scaling, 1.0
    while down * 2 < up:
        down, up = down * 2, up / 2
    a, error = times(values["a"], down)
    b, _ = times(values["b"], up)
    beside = dict(values)
    if "bias" in values:
        beside["bias"], _ = times(values["bias"], scaling)
    return {**beside, "a": a, "b": b}, error


def times(old: Values, factor: float) -> tuple[Values, float]:
    """A tensor times a number, and by how much rounding moves it, relative to its norm."""
    if factor == 1.0:
        return old, 0.0
    raw = old.read()
    wide = np.empty(raw.shape, np.float32)
    widen(np.ascontiguousarray(raw), wide)
    exact = wide.astype(np.float64) * factor
    out, back = np.empty(raw.shape, storage(old.dtype)), np.empty(raw.shape, np.float32)
    narrow(exact.astype(np.float32), out)
    widen(out, back)
    size = float(np.linalg.norm(exact)) or 1.0
    return computed(out), float(np.linalg.norm(back - exact)) / size
