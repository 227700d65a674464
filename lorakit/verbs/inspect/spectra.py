"""The singular values of an adapter, weight by weight, from its factors.

Law: they are those of the dense deltas, or with DoRA of their low-rank parts.
"""

from dataclasses import dataclass, replace
from math import fsum, sqrt

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.weights import Adapted, adapted
from lorakit.engine.working import swept
from lorakit.math.cast import Array
from lorakit.math.factored import effective_rank, spectrum
from lorakit.math.ranks import Rule, chosen

LEVELS = (0.9, 0.99)  # shares of the energy whose ranks are told


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight's update.

    norm: the Frobenius norm; share: of the energy (squared norm) of the whole adapter. rank_90,
    rank_99: how many of the largest values hold so much of the energy. Of a stack of experts, the
    largest value and the ranks are those of the expert that has the most, and the effective rank is
    their mean; `values` has a row for each expert.
    """

    name: str
    rank: int
    norm: float
    share: float
    largest: float
    effective_rank: float
    rank_90: int
    rank_99: int
    values: tuple[tuple[float, ...], ...]


def spectra(
    adapter: Adapter, *, packing: str = "peft", jobs: int | None = None
) -> tuple[Spectrum, ...]:
    """The spectra of all updates of an adapter, in the order of its modules; in float64.

    Raises:
        InputError: its factors are not plain, or hold NaN or Inf.
    """
    weights = list(adapted(adapter, packing=packing).values())
    found = swept(_spectrum, weights, jobs)
    energy = fsum(one.norm**2 for one in found)
    return tuple(replace(one, share=one.norm**2 / energy if energy else 0.0) for one in found)


def _spectrum(one: Adapted) -> Spectrum:
    with one.naming():
        found = [spectrum(low) for low in one.lows("float64")]
    rank_90, rank_99 = (max(_needed(s, level) for s in found) for level in LEVELS)
    values = tuple(tuple(s.tolist()) for s in found)
    return Spectrum(
        one.form.key,
        one.rank,
        sqrt(fsum(v**2 for s in values for v in s)),
        0.0,
        max((s[0] for s in values if s), default=0.0),
        fsum(effective_rank(s) for s in found) / len(found),
        rank_90,
        rank_99,
        values,
    )


def _needed(values: Array, level: float) -> int:
    """How many of falling values hold a share of the energy; 0 of zeros."""
    return chosen(values, Rule("energy", level)) if values.any() else 0
