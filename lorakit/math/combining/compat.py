"""The numbers of peft's `add_weighted_adapter`, for those who need the very same adapter again.

Law: given the same random masks, the result has the delta that peft gives for one module, within
the rounding of float32. Methods without "_svd" work on the factors A and B apart from each other,
so their delta is not that of the method: it has terms `B_i A_j` between adapters. Weights do not
count in the vote. Where peft fails or errs this does not follow: the result has the scaling 1,
every adapter has its weight, and a rank above the smaller side of the weight is lowered to it.

Source: huggingface/peft v0.21.2, src/peft/tuners/lora/model.py (add_weighted_adapter) and
src/peft/utils/merge_utils.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from lorakit.errors import UsageError
from lorakit.math.combining.election import agreeing
from lorakit.math.combining.factors import wanted_rank
from lorakit.math.combining.methods import unknown
from lorakit.math.combining.setting import Combined, Setting, check, in_dtype_of, widened
from lorakit.math.combining.sparse import LEAST
from lorakit.math.factored import Spectral, decompose, retained
from lorakit.math.lowrank import LowRank, cat
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.truncated import top

Draw = Callable[[tuple[int, int], float], Array]
"""Gives a mask of this shape, each element 1 with this chance and otherwise 0."""


@dataclass(frozen=True)
class _Rule:
    """How peft makes the tensors of all adapters sparse and joins them."""

    prune: str = ""  # "magnitude" or "random"
    elects: bool = False


_RULES = {
    "linear": _Rule(),
    "ties": _Rule("magnitude", elects=True),
    "dare_linear": _Rule("random"),
    "dare_ties": _Rule("random", elects=True),
    "magnitude_prune": _Rule("magnitude"),
}
NAMES = ("cat", "svd", *_RULES, *(f"{name}_svd" for name in _RULES if name != "linear"))


def compat(
    method: str,
    parts: Sequence[LowRank],
    weights: Sequence[float],
    setting: Setting,
    draw: Draw | None = None,
) -> Combined:
    """What peft makes of the updates of one module, its scaling 1.

    `draw` is called for one tensor after the other in the order in which peft draws its masks; left
    out, masks are drawn from the seed of the setting. Then the order of the adapters counts.

    Raises:
        UsageError: a method that peft does not have; ranks that differ, or a rank that is asked
            for, where peft has no use for it.
        MisfitError, InputError: as for `combined`.
    """
    if method not in NAMES:
        raise unknown(method, NAMES)
    check(parts, weights)
    parts, draw = widened(parts), draw or _drawing(setting.seed)
    if method == "cat":
        return _of_own_rank(_cat(parts, weights), setting)
    if method in _RULES:
        return _of_own_rank(_apart(_RULES[method], parts, weights, setting, draw), setting)
    if method == "svd":
        return _truncated(decompose(cat(parts, weights)), parts, setting)
    rule = _RULES[method.removesuffix("_svd")]
    dense = _joined(rule, (p.scaling * (p.b @ p.a) for p in parts), weights, setting, draw)
    rank = min(wanted_rank(parts, setting), *dense.shape)
    found = top(dense, rank, exact=True)
    return replace(_truncated(found.spectral, parts, setting), retained=found.captured)


def _drawing(seed: int) -> Draw:
    """Masks from one generator after the other."""
    rng = np.random.default_rng(seed)
    return lambda shape, density: rng.random(shape, dtype=np.float32) < density


def _cat(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    xp = array_namespace(*(p.a for p in parts))
    a = xp.concat([w * p.scaling * p.a for p, w in zip(parts, weights, strict=True)])
    return LowRank(a, xp.concat([p.b for p in parts], axis=1))


def _apart(
    rule: _Rule, parts: Sequence[LowRank], weights: Sequence[float], setting: Setting, draw: Draw
) -> LowRank:
    """The factors joined apart from each other, each with the root of the weight; the sign of the
    weight goes into A.
    """
    if len({p.rank for p in parts}) > 1:
        raise UsageError(
            "peft combines factors apart from each other, so all need the same rank; these have "
            f"{', '.join(str(p.rank) for p in parts)}.",
            hint="Leave --compat out, or pass --method svd or one with _svd.",
        )
    scaled = [w * p.scaling for p, w in zip(parts, weights, strict=True)]
    roots = [abs(f) ** 0.5 for f in scaled]
    signed = [root if f >= 0 else -root for f, root in zip(scaled, roots, strict=True)]
    a = _joined(rule, [p.a for p in parts], signed, setting, draw)
    return LowRank(a, _joined(rule, [p.b for p in parts], roots, setting, draw))


def _of_own_rank(low: LowRank, setting: Setting) -> Combined:
    if setting.rank not in (None, low.rank):
        raise UsageError(
            f"peft gives rank {low.rank} here, not {setting.rank}.",
            hint="Leave --rank out, or pass --method svd or one with _svd.",
        )
    return Combined(low, 1.0, low.rank)


def _truncated(found: Spectral, parts: Sequence[LowRank], setting: Setting) -> Combined:
    """The leading part with the singular values in B, where peft has them."""
    wanted = wanted_rank(parts, setting)
    rank = min(wanted, *parts[0].shape)
    b = found.u[:, :rank] * found.s[:rank]
    low = in_dtype_of(parts[0], LowRank(found.vt[:rank, :], b))
    return Combined(low, retained(found.s, rank), wanted)


def _joined(
    rule: _Rule, tensors: Iterable[Array], weights: Sequence[float], setting: Setting, draw: Draw
) -> Array:
    """The weighted sum of the pruned tensors, or the mean over those of the majority's sign."""
    pruned = (_pruned(rule.prune, x, setting.density, draw) for x in tensors)
    if not rule.elects:
        return reduce(add, (w * x for w, x in zip(weights, pruned, strict=True)))
    held = list(pruned)
    xp = array_namespace(*held)
    agree = agreeing(held, setting.majority)
    number = reduce(add, (xp.astype(m, held[0].dtype) for m in agree))
    total = reduce(add, (w * x * m for w, x, m in zip(weights, held, agree, strict=True)))
    return total / xp.where(number > 0, number, xp.ones_like(number))


def _pruned(prune: str, x: Array, density: float, draw: Draw) -> Array:
    if not prune or density == 1:
        return x
    xp = array_namespace(x)
    if prune == "random":
        mask = xp.asarray(draw(tuple(x.shape), density), dtype=x.dtype, device=x.device)
        return x * mask / max(density, LEAST)
    flat = xp.reshape(x, (-1,))
    kept = xp.zeros_like(flat)
    places = xp.argsort(-xp.abs(flat), stable=True)[: int(density * flat.shape[0])]
    kept[places] = flat[places]
    return xp.reshape(kept, x.shape)
