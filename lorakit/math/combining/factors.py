"""Weighted sums of updates, on their factors: exact, or the nearest of a lower rank.

Law: with `D = sum(w_i * s_i * B_i A_i)` the delta of `cat` and of `linear` is D, and that of a
result cut to rank r is the best of rank r to D in Frobenius norm; no dense matrix is formed.

Sources: task arithmetic, Ilharco et al. 2022 (arXiv 2212.04089); the nearest matrix of
lower rank, Eckart and Young 1936.
"""

from collections.abc import Sequence

from lorakit.errors import UsageError
from lorakit.math import lowrank
from lorakit.math.combining.setting import Combined, Setting
from lorakit.math.factored import leading, recompose, retained
from lorakit.math.lowrank import LowRank


def cat(parts: Sequence[LowRank], weights: Sequence[float], setting: Setting) -> Combined:
    """The concatenated factors: exactly the weighted sum, ranks add up.

    The scaling is 1 and the factors `b` are multiplied, unless one scaling serves all of them: then
    it is kept, and both factors are untouched.

    Raises:
        UsageError: a rank below the sum of the ranks is asked for.
    """
    low = concatenated(parts, weights)
    if setting.rank is not None and setting.rank < low.rank:
        raise UsageError(
            f"'cat' gives rank {low.rank}, not {setting.rank}",
            hint="Use the method 'svd' for a result of a given rank.",
        )
    return Combined(low, 1.0, low.rank)


def linear(parts: Sequence[LowRank], weights: Sequence[float], setting: Setting) -> Combined:
    """The weighted sum, exact unless a rank is asked for."""
    return cut(concatenated(parts, weights), setting.rank)


def svd(parts: Sequence[LowRank], weights: Sequence[float], setting: Setting) -> Combined:
    """The nearest to the weighted sum, of the largest rank of the inputs unless another is asked
    for.
    """
    return cut(concatenated(parts, weights), wanted_rank(parts, setting))


def wanted_rank(parts: Sequence[LowRank], setting: Setting) -> int:
    """The rank asked for, or else the largest of the inputs."""
    return setting.rank if setting.rank is not None else max(p.rank for p in parts)


def concatenated(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted sum as one update."""
    scalings = {w * p.scaling for p, w in zip(parts, weights, strict=True)}
    if len(scalings) > 1:
        return lowrank.cat(parts, weights)
    (scaling,) = scalings
    plain = [LowRank(p.a, p.b) for p in parts]
    low = lowrank.cat(plain, [1.0] * len(plain)) if len(plain) > 1 else plain[0]
    return LowRank(low.a, low.b, scaling)


def cut(low: LowRank, rank: int | None) -> Combined:
    """The nearest update of at most `rank` (None: of any), or itself where its rank is no higher.

    A rank above the smaller side of the matrix is of no use and is lowered to that.
    """
    wanted = low.rank if rank is None else rank
    limit = min(wanted, *low.shape)
    if low.rank <= limit:
        return Combined(low, 1.0, wanted)
    spectral, values = leading(low, lambda _: limit)
    return Combined(recompose(spectral), retained(values, limit), wanted)
