"""The table of combination methods. A new one is a function or rule in a file here, and a row.

Law: every method gives a lone update of weight w as w times itself (at density 1), does not depend
on the order of the updates, and takes updates of different ranks and scalings.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from lorakit.errors import UsageError
from lorakit.math.combining import elementwise, factors
from lorakit.math.combining.knots import knots
from lorakit.math.combining.sce import sce
from lorakit.math.combining.setting import Combined, Setting, check, in_dtype_of, widened
from lorakit.math.combining.spherical import slerp
from lorakit.math.combining.tsv import tsv
from lorakit.math.lowrank import LowRank

Function = Callable[[Sequence[LowRank], Sequence[float], Setting], Combined]


@dataclass(frozen=True)
class Method:
    """A way to make one update out of several."""

    function: Function
    paper: str  # where it is defined
    dense: bool = False  # whether a dense matrix of the size of the weight is formed
    uses: tuple[str, ...] = ("rank",)  # the fields of the setting that count


_ELECTED = ("rank", "density", "majority", "seed", "exact")
_SUMMED = ("rank", "density", "seed", "exact")
_TIES = Method(elementwise.TIES.combined, "arXiv 2306.01708", dense=True, uses=_ELECTED)
_DARE_LINEAR = Method(
    elementwise.DARE_LINEAR.combined, "arXiv 2311.03099", dense=True, uses=_SUMMED
)
_DARE_TIES = Method(elementwise.DARE_TIES.combined, "arXiv 2311.03099", dense=True, uses=_ELECTED)
_PRUNE = Method(elementwise.MAGNITUDE_PRUNE.combined, "arXiv 2306.01708", dense=True, uses=_SUMMED)

METHODS: dict[str, Method] = {
    "linear": Method(factors.linear, "arXiv 2212.04089"),
    "cat": Method(factors.cat, "arXiv 2212.04089"),
    "svd": Method(factors.svd, "Eckart and Young 1936"),
    "ties": _TIES,
    "ties_svd": _TIES,
    "dare_linear": _DARE_LINEAR,
    "dare_linear_svd": _DARE_LINEAR,
    "dare_ties": _DARE_TIES,
    "dare_ties_svd": _DARE_TIES,
    "magnitude_prune": _PRUNE,
    "magnitude_prune_svd": _PRUNE,
    "slerp": Method(slerp, "Shoemake 1985"),
    "della": Method(
        elementwise.DELLA.combined, "arXiv 2406.11617", dense=True, uses=(*_ELECTED, "epsilon")
    ),
    "breadcrumbs": Method(
        elementwise.BREADCRUMBS.combined, "arXiv 2312.06795", dense=True, uses=(*_SUMMED, "gamma")
    ),
    "sce": Method(sce, "arXiv 2408.07990", dense=True, uses=_ELECTED),
    "knots": Method(knots, "arXiv 2410.19735", uses=("rank", "density", "majority")),
    "tsv": Method(tsv, "arXiv 2412.00081"),
}


def combined(
    method: str, parts: Sequence[LowRank], weights: Sequence[float], setting: Setting
) -> Combined:
    """One update out of several of the same weight, by a method of the table.

    Factors of any float dtype are widened without rounding, and the result is float32 (float64 if
    an input is). A rank above the smaller side of the weight is lowered to it; `wanted_rank` tells.

    Raises:
        UsageError: an unknown method, or weights or a rank that make no sense.
        MisfitError: updates of different shapes.
        InputError: NaN or infinity in an update.
    """
    if method not in METHODS:
        raise unknown(method, METHODS)
    check(parts, weights)
    wide = widened(parts)
    found = METHODS[method].function(wide, [float(w) for w in weights], setting)
    return replace(found, low=in_dtype_of(wide[0], found.low))


def unknown(method: str, known: Collection[str]) -> UsageError:
    """The error for a method that does not exist, naming the nearest that does."""
    near = get_close_matches(method, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
    return UsageError(f"there is no combination method {method!r}.", hint=hint)
