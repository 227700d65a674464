"""Deltas in the names and the layout of a format: renamed, fused, and where it cannot hold them as
they are, computed.

Law: the update of every module is the same, bit for bit where nothing is said to be rounded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lorakit.adapter.delta import Delta, Values
from lorakit.adapter.files.fusing import fused, stays_apart
from lorakit.adapter.files.parts import as_lora, by_inputs, by_row, scaling_of
from lorakit.adapter.files.values import computed, times
from lorakit.errors import MisfitError
from lorakit.formats.spelling import (
    Number,
    Place,
    Spelling,
    clip_name,
    place_apart,
    place_of,
)
from lorakit.formats.templates import Found
from lorakit.math.cast import storage
from lorakit.math.surgery import Factors, pruned


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
    deltas: Sequence[Delta], spelling: Spelling, family: str, *, fold: bool = False
) -> Iterator[Tensors]:
    """The modules of a file that is spelled so; `fold` multiplies scalings into the factors.

    Raises:
        MisfitError: the family has no such module, or the format cannot hold what is done to one.
    """

    def write(delta: Delta, name: str) -> Tensors:
        return _written(_fitting(delta, spelling), name, spelling, fold=fold)

    places = {id(d): _place(d, spelling, family) for d in deltas}
    for delta in (d for d in deltas if places[id(d)].found is None):
        made = write(_unfused(delta), places[id(delta)].name)
        yield _in_transformers_5(made, family) if spelling.flat_clip else made
    pairs = [(d, found) for d in deltas if (found := places[id(d)].found)]
    for found, parts in by_row(pairs):
        if apart := _apart(found, parts, spelling.name, family):
            yield from (write(d, name) for d, name in apart)
            continue
        one, exact = fused(found, parts)
        made = write(_unfused(one), places[id(next(iter(parts.values())))].name)
        modules = tuple(p.module for p in parts.values())
        how = "fused" if len(found.row.parts) > 1 else made.step.how
        error = made.step.error if exact else max(made.step.error, 2.0**-8)
        yield replace(made, step=Step(made.step.name, modules, how, error))


def _in_transformers_5(made: Tensors, family: str) -> Tensors:
    """The module under the name that a config tells of it."""
    delta = made.delta
    assert delta is not None
    name = clip_name(family, delta.component, delta.module)
    return replace(made, delta=replace(delta, module=name))


def _place(delta: Delta, spelling: Spelling, family: str) -> Place:
    to, flat = spelling.name, spelling.flat_clip
    place = place_of(to, family, delta.component, delta.module, flat_clip=flat)
    if place is None and by_inputs(delta):
        raise MisfitError(
            f"{delta.module!r} is fused, and its DoRA norms run over all of it.",
            hint="Write comfyui or kohya, which have it as a whole.",
            tensor=delta.module,
        )
    if place is None:
        raise MisfitError(f"{delta.module!r} is no module of {family}.", tensor=delta.module)
    return place


def _apart(
    found: Found, parts: Mapping[int, Delta], to: str, family: str
) -> list[tuple[Delta, str]]:
    """Parts of a fused projection that cannot be one module, with names that the format has for
    them; none if they can, or if it has no such names.
    """
    if not stays_apart(found, parts):
        return []
    places = {d.module: place_apart(to, family, d.component, d.module) for d in parts.values()}
    return [(d, place.name) for d in parts.values() if (place := places[d.module])]


def _unfused(delta: Delta) -> Delta:
    """A part of a fused projection without the ranks that are of other parts."""
    if delta.how != "split" or delta.algo != "lora":
        return delta
    part = Factors(delta.tensors["a"].read(), delta.tensors["b"].read(), delta.plain_alpha)
    kept = pruned(part)
    if kept is None or kept is part:
        return delta
    tensors = {**delta.tensors, "a": computed(kept.a), "b": computed(kept.b)}
    return replace(delta, tensors=tensors, alpha=kept.alpha, rslora=False)


def _fitting(delta: Delta, spelling: Spelling) -> Delta:
    """The delta in a form that the format holds.

    Raises:
        MisfitError: there is none.
    """
    if delta.rows or not spelling.holds(delta.algo, delta.module):
        delta = as_lora(delta)
    if "mid" in delta.tensors and not spelling.cores:
        delta = as_lora(delta)
    if "magnitude" not in delta.tensors or delta.algo != "lora":
        return delta
    return replace(delta, tensors={**delta.tensors, "magnitude": _norms(delta, spelling)})


def _norms(delta: Delta, spelling: Spelling) -> Values:
    """DoRA's norms in the shape that the format has for them."""
    old = delta.tensors["magnitude"]
    kernel = len(delta.tensors["a"].shape) - 2
    if spelling.alpha:
        if by_inputs(delta):
            return old
        shape = (int(np.prod(old.shape)), 1, *(1,) * kernel)
    else:
        if by_inputs(delta):
            raise MisfitError(
                f"{delta.module!r} has DoRA norms of its inputs, which {spelling.name} has not.",
                hint="Merge it, or convert it to kohya or comfyui.",
            )
        size = int(np.prod(old.shape))
        shape = (1, size, *(1,) * kernel) if kernel else (size,)
    if shape == old.shape:
        return old
    return Values(old.dtype, shape, lambda: old.read().reshape(shape))


def _written(delta: Delta, name: str, spelling: Spelling, *, fold: bool) -> Tensors:
    values, how, error = dict(delta.tensors), delta.how, 0.0
    scaling = scaling_of(delta) if delta.algo in ("lora", "loha", "lokr") else 1.0
    if fold and scaling != 1.0 and delta.algo == "lora":
        values, error = _folded(values, scaling)
        how, delta = "folded", replace(delta, tensors=values, alpha=None, rslora=False)
        scaling = 1.0
    if spelling.alpha:
        if delta.algo == "lora" or (delta.algo in ("loha", "lokr") and delta.alpha is not None):
            values["alpha"] = _alpha(delta, scaling, spelling.number)
        elif isinstance(delta.alpha, Values):
            values["alpha"] = delta.alpha
    elif "bias" in values and scaling != 1.0:  # PEFT scales it with the rest
        if not scaling:
            raise MisfitError(
                f"{delta.module!r} has a scaling of 0 and a bias, and {spelling.name} scales both.",
                hint="Pass --alpha fold.",
                tensor=delta.module,
            )
        values["bias"], error = times(values["bias"], 1.0 / scaling)
    front = "embedding_" if delta.embedding else ""
    ends = {r: spelling.ending(delta.algo, (front if r in ("a", "b") else "") + r) for r in values}
    keys = {name + ends[r]: v for r, v in values.items()}
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
    while 0 < abs(down) * 2 < up:
        down, up = down * 2, up / 2
    a, error = times(values["a"], down)
    b, _ = times(values["b"], up)
    return {**values, "a": a, "b": b}, error
