"""LoftQ: a quantised weight and a low-rank update that together stay close to the weight.

Law: of all iterations that one is kept whose remainder is least, and its factors are those of what
the kept codes leave, measured on the values that a loader will compute from them. With one
iteration the codes are those of plain quantisation.

Sources: Li et al. 2023 (LoftQ, arXiv 2310.08659), algorithm 1; low rank first and the best iterate:
Guo et al. 2023 (LQ-LoRA, arXiv 2311.12023). With moments of the inputs the update is the best for
the outputs: Zhang et al. 2024 (QERA, arXiv 2410.06040), in the form without an inverse, whose left
factor is the leading left singular vectors of the weighted remainder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any, Protocol

import numpy as np

from lorakit.errors import InputError, UsageError
from lorakit.math.cast import Array
from lorakit.math.factored import decompose, norm, recompose
from lorakit.math.lowrank import LowRank, sent
from lorakit.math.namespace import Send, here, on_cpu
from lorakit.math.product import multiply
from lorakit.math.rows import row_slices
from lorakit.math.truncated import top

STARTS = ("quant", "lowrank")
WARM = 1  # passes of the search where vectors of the iteration before are known


class Quantiser(Protocol):
    """What rounds a weight to few values."""

    def quantise(self, w: Array) -> Any:
        """Codes and scales."""
        ...

    def dequantise(self, q: Any, dtype: str = "float32", *, out: Any = None) -> Array:
        """Their values, rounded to a dtype."""
        ...


@dataclass(frozen=True)
class Setting:
    """How a weight is split.

    scaling: of the update as it will be applied. start: "quant" quantises first, "lowrank" takes
    the leading part of the weight out before. dtype: in which a loader computes the values of the
    codes. exact: full decompositions. send: brings remainders to where they are decomposed; codes
    are made on the CPU.
    """

    rank: int
    scaling: float = 1.0
    iterations: int = 5
    start: str = "quant"
    dtype: str = "bfloat16"
    seed: int = 0
    exact: bool = False
    send: Send = here

    def __post_init__(self) -> None:
        if self.rank < 1 or self.iterations < 1:
            raise UsageError("the rank and the number of iterations are at least 1.")
        if self.start not in STARTS:
            raise UsageError(f"the start {self.start!r} is none of {', '.join(STARTS)}.")
        if not self.scaling > 0:
            raise UsageError(f"a scaling of {self.scaling:g} leaves the update no part in it.")


@dataclass(frozen=True)
class Split:
    """A weight in two parts. Norms are Frobenius norms of the (weighted) remainder."""

    quantised: Any
    low: LowRank  # `scaling * b @ a` is the low-rank part
    plain: float  # of plain quantisation, without an update
    norms: Sequence[float]  # after each iteration
    best: int  # which one was kept
    root: Array | None = None  # what remainders were weighted with

    @property
    def norm(self) -> float:
        """Of what both parts leave."""
        return self.norms[self.best]

    def norm_with(self, a: Array, b: Array) -> float:
        """Of what is left with these in place of the factors, which are the same rounded: that is
        at right angles to what both parts leave.
        """
        wide, (old_a, old_b) = np.float64, (self.low.a, self.low.b)
        a, b = a.astype(wide), b.astype(wide)
        rows = np.concatenate([a, a - old_a])
        if self.root is not None:
            rows = rows * self.root if self.root.ndim == 1 else rows @ self.root
        more = LowRank(rows, np.concatenate([b - old_b, old_b], axis=1), self.low.scaling)
        return hypot(self.norm, norm(more))


def split(w: Array, grid: Quantiser, setting: Setting, *, moments: Array | None = None) -> Split:
    """The parts of a weight (out, in), float32.

    `moments` are second moments of the inputs: (in,) of each, or (in, in); then remainders are
    weighted by their root. Factors are balanced, float32.

    Raises:
        InputError: the weight or the moments hold NaN or inf, or have another shape.
    """
    root, rest = _root(moments, w.shape[1]), np.empty(w.shape, np.float32)
    near = None if root is None else setting.send(root)
    found: list[tuple[float, Any, LowRank]] = []
    norms: list[float] = []
    plain, low, right = 0.0, None, None
    if setting.start == "lowrank":
        low, right, _ = _best(w, near, setting, None)
        _left(w, None, grid, setting, rest)
        plain = _weighted_norm(rest, root)
    for _ in range(setting.iterations):
        codes = _left(w, low, grid, setting, rest)
        if low is None:
            plain = _weighted_norm(rest, root)
        low, right, left = _best(rest, near, setting, right)
        norms.append(left)
        if not found or left < found[0][0]:
            found = [(left, codes, low)]
    _, codes, low = found[0]
    best, low = int(np.argmin(norms)), _scaled(low, setting.scaling)
    return Split(codes, low, plain, tuple(norms), best, root)


def _left(w: Array, low: LowRank | None, grid: Quantiser, setting: Setting, out: Array) -> Any:
    """The codes of a weight without its low-rank part; `out` takes what they leave of it all."""
    if low is None:
        codes = grid.quantise(w)
    else:
        multiply(low.b, low.a, out)
        codes = grid.quantise(np.subtract(w, out, out=out))
    grid.dequantise(codes, setting.dtype, out=out)
    np.subtract(w, out, out=out)
    return codes


def _best(
    rest: Array, root: Array | None, setting: Setting, start: Array | None
) -> tuple[LowRank, Array, float]:
    """The update that leaves least of a remainder, vectors to begin the next one with, and the norm
    of what is left.
    """
    near = setting.send(rest)
    weighted = near if root is None else near * root if root.ndim == 1 else near @ root
    passes = WARM if start is not None else None
    options = {"seed": setting.seed, "exact": setting.exact, "start": start, "passes": passes}
    found = top(weighted, setting.rank, **options)  # type: ignore[arg-type]
    spectral = found.spectral
    if root is None:
        return sent(recompose(spectral), on_cpu), spectral.vt.T, found.residual
    low = LowRank(spectral.u.T @ near, spectral.u)
    return sent(recompose(decompose(low)), on_cpu), spectral.vt.T, found.residual


def _scaled(low: LowRank, scaling: float) -> LowRank:
    """The same update, read with this scaling: as much is taken out of either factor."""
    share = np.float32(sqrt(scaling))
    return LowRank(low.a / share, low.b / share, scaling)


def _root(moments: Array | None, width: int) -> Array | None:
    """A root of the second moments: `root @ root.T` is what they are.

    Raises:
        InputError: they are not of these inputs, or no moments.
    """
    if moments is None:
        return None
    m = np.asarray(moments, np.float64)
    if m.shape not in ((width,), (width, width)) or not np.isfinite(m).all():
        raise InputError(
            f"moments of shape {list(m.shape)} are not those of {width} inputs, or not finite."
        )
    if m.ndim == 1:
        if (m < 0).any():
            raise InputError("second moments are negative.")
        return np.sqrt(m).astype(np.float32)
    values, vectors = np.linalg.eigh((m + m.T) / 2)
    if values[0] < -1e-6 * max(values[-1], 0.0):
        raise InputError("the matrix of second moments has negative eigenvalues.")
    root: Array = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
    return root


def _weighted_norm(rest: Array, root: Array | None) -> float:
    """The Frobenius norm of a (weighted) remainder, summed in float64."""
    total = 0.0
    for some in row_slices(*rest.shape):
        rows = rest[some]
        if root is not None:
            rows = rows * root if root.ndim == 1 else rows @ root
        total += float(np.einsum("ij,ij->", rows, rows, dtype=np.float64))
    return sqrt(total)
