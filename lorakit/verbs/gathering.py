"""Several adapters of one model, weight by weight: what each does there, and whether they are of
one model at all.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.weights import Adapted, adapted
from lorakit.errors import InputError, MisfitError
from lorakit.math.cast import Array
from lorakit.math.lowrank import LowRank
from lorakit.math.truncated import seed_of, top
from lorakit.store.checkpoint import Checkpoint
from lorakit.verbs.base.dense import Against

DENOISERS = {"unet", "transformer"}  # of which a pipeline has one
LAYER = re.compile(r"(?:.*?\.)?\d+\.")
SPARE = 16  # ranks beyond twice its own that are kept of a delta that is not low-rank


@dataclass(frozen=True)
class Source:
    """The part of one adapter in a weight: `against` gives its delta where that needs the base."""

    one: Adapted
    weight: float
    against: Against | None = None

    def lows(self, dtype: str, rank: int) -> tuple[list[LowRank], float]:
        """The update of each expert, and the share of its energy that is in it."""
        if self.against is None:
            return self.one.lows(dtype), 1.0
        low, share = self.nearest(self.against.delta(self.one), rank)
        return [low], share

    def nearest(self, dense: Array, rank: int = 0) -> tuple[LowRank, float]:
        """The update of somewhat more than twice its rank (or `rank`) that is nearest to its delta,
        and the share of the energy that is in it.
        """
        size = 2 * max(rank, self.one.rank) + SPARE
        found = top(dense, size, seed=seed_of(self.one.form.key))
        u, s, vt = found.spectral.u, found.spectral.s, found.spectral.vt
        return LowRank(vt, u * s.astype(u.dtype)), float(found.captured)


def gathered(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    base: Checkpoint | None = None,
    base_is_residual: bool = False,
    packing: str = "peft",
    plain: bool = False,
) -> dict[str, list[Source]]:
    """What the adapters do to each weight, by its key, in the order of names; with `plain`, their
    factors alone, whatever the base would make of them.

    Raises:
        MisfitError: they are not of one model.
        InputError: an adapter cannot be had as plain factors, or not without its base.
    """
    _check_layers(adapters)
    found: dict[str, list[Source]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        adapter.config.check(base_is_residual=True)
        there = adapted(adapter, packing=packing)
        against = None
        if not plain:
            against = _against(adapter, there, base, base_is_residual=base_is_residual)
        for key, one in there.items():
            found.setdefault(key, []).append(Source(one, weight, against))
    for sources in found.values():
        _check_alike(sources)
    if len(adapters) > 1:
        _check_common(adapters, found)
    return dict(sorted(found.items(), key=lambda item: (item[1][0].one.form.name, item[0])))


def _against(
    adapter: Adapter,
    there: Mapping[str, Adapted],
    base: Checkpoint | None,
    *,
    base_is_residual: bool,
) -> Against | None:
    """What gives an adapter's deltas, where its factors alone do not."""
    mutated = adapter.config.mutation
    why = "has DoRA magnitudes, whose deltas depend on the base."
    if mutated and not base_is_residual:
        why = f"was trained on a base that its initialisation ({mutated}) had changed."
    elif not any(one.dora for one in there.values()):
        return None
    if base is None:
        other = ", or --base-is-residual to combine it for that changed base" if mutated else ""
        raise InputError(why, hint=f"Pass the original with --base BASE{other}.", file=adapter.path)
    return Against(base, adapter, base_is_residual=base_is_residual)


def _check_layers(adapters: Sequence[Adapter]) -> None:
    stacks = [a.config.layer_replication for a in adapters]
    other = next((a for a, s in zip(adapters, stacks, strict=True) if s != stacks[0]), None)
    if other:
        raise MisfitError(
            f"its layer_replication is {other.config.layer_replication}, that of the first adapter "
            f"{stacks[0]}: their layers are not the same.",
            hint="Merge them one by one, each into its own stack.",
            file=other.path,
        )


def _check_alike(sources: Sequence[Source]) -> None:
    first = sources[0].one
    for other in (s.one for s in sources[1:]):
        if other.form != first.form:
            have = [f"{list(x.form.shape)}" for x in (first, other)]
            counts = [
                f"{x.form.experts} experts of " * bool(x.form.experts) for x in (first, other)
            ]
            raise MisfitError(
                f"{first.form.key!r} is {counts[0]}{have[0]} in the first adapter, {counts[1]}"
                f"{have[1]} in this one.",
                hint="They are of different models: compare both with `lorakit inspect`.",
                file=other.adapter.path,
                tensor=other.piece.tensors[0].name,
            )


def _layers(keys: Iterable[str]) -> set[str]:
    """The layers in which weights lie, by their names to the first number."""
    return {found[0] for key in keys if (found := LAYER.match(key))}


def _is_beside(adapter: Adapter, adapters: Sequence[Adapter]) -> bool:
    """Whether an adapter is for other models of a pipeline than all others are."""
    others = {model for a in adapters if a is not adapter for model in a.parts}
    known = all(a.parts for a in adapters) and not others & adapter.parts.keys()
    return known and len(DENOISERS & {*others, *adapter.parts}) < 2


def _check_common(adapters: Sequence[Adapter], found: Mapping[str, Sequence[Source]]) -> None:
    """Refuse an adapter that has neither a weight nor a numbered layer in common with any other,
    and is not known to be for another model of one pipeline.
    """
    for adapter in (a for a in adapters if not _is_beside(a, adapters)):
        mine = {k for k, s in found.items() if any(x.one.adapter is adapter for x in s)}
        others = {k for k, s in found.items() if any(x.one.adapter is not adapter for x in s)}
        if mine and not (mine & others or _layers(mine) & _layers(others)):
            first, other = min(mine), min(others, default="")
            raise MisfitError(
                f"no other adapter has any of its {len(mine)} modules; the first is {first!r}, "
                f"another has {other!r}.",
                hint="If only the names differ, convert both first: lorakit convert ADAPTER -o OUT "
                "--names disk --base BASE.",
                file=adapter.path,
            )
