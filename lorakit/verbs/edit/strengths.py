"""How strong an adapter is, told in another way: its scalings in the config or in its factors.

Law: the factor of a weight times its new scaling is the scaling that is wanted, which is its old
one unless a strength was asked for.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.config import LARGEST
from lorakit.errors import InputError, UsageError
from lorakit.math.experts import alpha_for
from lorakit.verbs.edit.selection import Held

SAME = 1e-15  # relative; closer scalings are one, which a root cannot give to the last bit


@dataclass(frozen=True)
class Strength:
    """What is asked of the scalings.

    scale: the delta is multiplied by it. alpha: what the config shall say, with B rescaled so that
    the delta stays, unless `keep_factors`. bake: scalings go into B, and the config says 1.
    flatten: one rank and one alpha for all.
    """

    scale: float = 1.0
    alpha: float | None = None
    keep_factors: bool = False
    bake: bool = False
    flatten: bool = False

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: saying why.
        """
        if not math.isfinite(self.scale):
            raise UsageError(f"--scale {self.scale} is no finite number.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha):
            raise UsageError(f"--alpha {self.alpha}: it is a finite number other than 0.")
        if self.keep_factors and self.alpha is None:
            raise UsageError("--keep-factors says how --alpha is meant; pass that as well.")
        if self.keep_factors and self.scale != 1.0:
            raise UsageError("--keep-factors leaves the strength to --alpha: leave out --scale.")
        if self.bake and self.alpha is not None:
            raise UsageError("--bake sets every alpha to its rank: leave out --alpha.")

    @property
    def told(self) -> bool:
        """Whether anything is asked for."""
        return self != Strength()


@dataclass(frozen=True)
class Scaled:
    """The rank, alpha and scaling of a weight before and after, and what its B is multiplied by."""

    held: Held
    name: str  # in the config
    experts: int
    rank: int
    new_rank: int
    scaling: float
    old_alpha: float
    alpha: float
    new_scaling: float
    factor: float = 1.0


def scaled(
    adapter: Adapter, things: Sequence[Held], wanted: Strength
) -> tuple[dict[str, Scaled], bool]:
    """The weights among `things` by their keys, and whether the result is rank-stabilised.

    Raises:
        InputError: an adapter of this kind has no such form.
    """
    rslora = adapter.config.rslora and not wanted.bake
    before = [_before(adapter, one) for one in things if one.kind == "update"]
    largest = max((one.rank for one in before), default=0)
    goals = [(one, *_goal(adapter, one, wanted)) for one in before]
    common = wanted.alpha
    if wanted.flatten and common is None:
        common = _common(goals, largest, rslora=rslora)
    found = {}
    for one, scaling, alpha in goals:
        rank = largest if wanted.flatten else one.rank
        alpha = float(rank) if wanted.bake else alpha if common is None else common
        now = alpha / (math.sqrt(rank) if rslora else rank)
        factor = 1.0 if math.isclose(scaling, now, rel_tol=SAME) else scaling / now
        found[one.held.key] = replace(
            one, new_rank=rank, alpha=alpha, new_scaling=now, factor=factor
        )
    _check(adapter, list(found.values()), wanted)
    return found, rslora


def _before(adapter: Adapter, held: Held) -> Scaled:
    """A weight as it is."""
    config, bare = adapter.config, bool(held.parameter)
    name = held.name if bare else held.module
    rows = adapter.modules[held.key].a.shape[0]
    rank = rows // (sum(map(bool, config.enable_lora)) or 1)
    if bare:
        rank = config.rank(name) or rows
    scaling, alpha = config.scaling(name, rank), config.scaling(name, 1)
    experts = rows // rank if bare else 0
    return Scaled(held, name, experts, rank, rank, scaling, alpha, alpha, scaling)


def _goal(adapter: Adapter, one: Scaled, wanted: Strength) -> tuple[float, float]:
    """The scaling that its delta shall have, and the alpha that gives it at its old rank."""
    alpha = wanted.alpha if wanted.keep_factors and wanted.alpha is not None else one.alpha
    alpha *= wanted.scale
    return alpha / (math.sqrt(one.rank) if adapter.config.rslora else one.rank), alpha


def _common(
    goals: Sequence[tuple[Scaled, float, float]], rank: int, *, rslora: bool
) -> float | None:
    """The alpha at this rank of the scaling that most weights have: the fewest are multiplied."""
    counts = Counter(scaling for _, scaling, _ in goals if scaling)
    if not counts:
        return None
    ((scaling, _),) = counts.most_common(1)
    given = (alpha for one, goal, alpha in goals if goal == scaling and one.rank == rank)
    return next(given, None) or alpha_for(scaling, rank, rslora=rslora)[0]


def _check(adapter: Adapter, found: Sequence[Scaled], wanted: Strength) -> None:
    """Refuse what is no edit of factors.

    Raises:
        InputError, UsageError: saying why.
    """
    config = adapter.config
    if wanted.told:
        config.check(base_is_residual=True)
    if large := next((o for o in found if not abs(o.alpha) <= LARGEST), None):
        raise UsageError(f"the alpha of {large.name!r} would be {large.alpha:.3g}.")
    if config.residual and wanted.told:
        _refuse(adapter, f"is read together with what {config.residual!r} took out of its base.")
    if wanted.scale != 1.0 and config.mutation:
        _refuse(adapter, f"is half of a delta: {config.mutation!r} changed its base.")
    if wanted.scale != 1.0 and any("magnitude" in one.held.roles for one in found):
        _refuse(adapter, "has DoRA magnitudes: its delta is no multiple of its factors.")
    blocks = config.raw.get("use_bdlora") or config.enable_lora
    if blocks and any(one.rank != one.new_rank for one in found):
        _refuse(adapter, "has factors in blocks, which cannot be padded.")
    tied = config.raw.get("ensure_weight_tying")
    embedding = any("embedding_a" in o.held.roles for o in found if o.factor != 1.0)
    if tied and embedding:
        _refuse(adapter, "ties its embeddings: A of the one is B of the other.")


def _refuse(adapter: Adapter, why: str) -> None:
    raise InputError(
        why,
        hint="Merge it into its base, with --weight for another strength.",
        file=adapter.path,
    )
