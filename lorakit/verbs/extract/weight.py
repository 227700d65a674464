"""One weight extracted: what it gains, the closest update of low rank, what that leaves out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from lorakit.adapter.load import LazyRows
from lorakit.math.cast import Array
from lorakit.math.factored import recompose
from lorakit.math.lowrank import LowRank, sent
from lorakit.math.namespace import Send, on_cpu
from lorakit.math.ranks import Rule, chosen
from lorakit.math.rows import CHUNK, row_slices
from lorakit.math.truncated import Top, seed_of, top
from lorakit.store.checkpoint import Checkpoint
from lorakit.verbs.base.weights import Weight
from lorakit.verbs.extract.differing import check_finite
from lorakit.verbs.making import Made, Task

FIRST = 16  # ranks that an energy is first looked for in; then twice as many, and so on


@dataclass(frozen=True)
class Wanted:
    """What is extracted of each weight.

    rank: at most; energy: as few ranks as hold this share of the difference's energy; exact: by a
    full decomposition; min_diff: weights whose largest difference is smaller are left out;
    clamp_quantile: factors are cut off at this quantile of theirs, as kohya's tool does.
    """

    rank: int
    energy: float | None = None
    exact: bool = False
    min_diff: float = 0.0
    clamp_quantile: float | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Row:
    """What became of a weight: its rank, the share of the energy of its difference that is in that,
    the norm of what is not, and the largest absolute difference.
    """

    name: str
    rank: int
    retained: float
    residual: float
    largest: float


Delta = Callable[[], Array]  # (experts, out, in), one for a plain weight


def difference(base: Checkpoint, tuned: Checkpoint, weight: Weight) -> Array:
    """`tuned - base` in the adapter's orientation, (experts, out, in), float32; of float64 weights
    it is rounded once.

    Raises:
        InputError: it holds NaN or Inf.
    """
    info = base.infos[weight.tensor]
    leading = 2 if weight.form.experts else 1
    double = "F64" in {c.infos[weight.tensor].dtype for c in (base, tuned)}
    wide = "float64" if double else "float32"
    one, other = (LazyRows(c, weight.tensor, wide, leading) for c in (base, tuned))
    height, width = info.matrix(leading)
    found = np.empty((height, width), np.float32)
    for rows in row_slices(height, width):
        np.subtract(other[rows], one[rows], out=found[rows])
    check_finite(info, _largest(found), {"tuned": tuned.located.path})
    stack = found.reshape(max(weight.form.experts, 1), -1, width)
    return stack.swapaxes(1, 2) if weight.turned else stack


def _largest(x: Array) -> float:
    """The largest magnitude, 0 of nothing; NaN where there is one."""
    return float(max(x.max(initial=0.0), -x.min(initial=0.0)))


def task_of(
    weight: Weight,
    wanted: Wanted,
    dtype: str,
    delta: Delta,
    bias: Callable[[], Array] | None,
    *,
    always: bool = False,
) -> Task[Row]:
    """The weight of the result, from what gives its delta (and what its bias gains); with `always`
    it has factors even where nothing differs.
    """
    always = always or bias is not None

    def compute(send: Send) -> Made[Row] | None:
        stack = delta()
        largest = _largest(stack)
        if not always and (largest == 0.0 or largest < wanted.min_diff):
            return None
        found = [_low(send(d), wanted, f"{weight.form.key}.{e}") for e, d in enumerate(stack)]
        row = Row(
            weight.form.key,
            max(low.rank for low, _ in found),
            min(t.captured for _, t in found),
            float(np.sqrt(sum(t.residual**2 for _, t in found))),
            largest,
        )
        beside = {"bias": bias()} if bias else {}
        return Made([low for low, _ in found], row, beside)

    return Task(weight.form, dtype, compute, ("bias",) if bias else ())


def memory_of(weight: Weight, wanted: Wanted) -> int:
    """Bytes that extracting a weight takes at most."""
    (out, inner), count = weight.form.shape, max(weight.form.experts, 1)
    bases = 8 * 8 * max(wanted.rank, FIRST) * (out + inner)
    return 4 * (count + 1) * out * inner + bases + 3 * 4 * CHUNK


def _low(dense: Array, wanted: Wanted, name: str) -> tuple[LowRank, Top]:
    """The update of a weight, and the decomposition that it comes from, with the figures of it."""
    seed, limit = seed_of(name), min(wanted.rank, *dense.shape)
    if wanted.energy is None:
        found = top(dense, limit, seed=seed, exact=wanted.exact)
        return _clamped(dense, sent(recompose(found.spectral), on_cpu), found, wanted)
    size = min(FIRST, limit)
    while True:
        found = top(dense, size, seed=seed, exact=wanted.exact)
        if found.captured >= wanted.energy or size == limit:
            break
        size = _next_size(found, size, limit, wanted.energy)
    share = min(1.0, wanted.energy / found.captured) if found.captured else 1.0
    rank = chosen(on_cpu(found.spectral.s), Rule("energy", share))
    low = sent(recompose(found.spectral, rank), on_cpu)
    return _clamped(dense, low, _cut(found, rank), wanted)


def _next_size(found: Top, size: int, limit: int, energy: float) -> int:
    """How many ranks to try after so many: twice as many, or four times …, in which the share could
    be if no singular value were smaller than the last that is known.
    """
    squares = on_cpu(found.spectral.s) ** 2
    known, least = float(squares.sum()), float(squares[-1])
    missing, first = energy * (known + found.residual**2) - known, size
    size *= 2
    while size < limit and (size - first) * least < missing:
        size *= 2
    return min(size, limit)


def _cut(found: Top, rank: int) -> Top:
    """The figures of a decomposition of which only the first ranks are kept."""
    squares = on_cpu(found.spectral.s) ** 2
    kept, all_of = float(squares[:rank].sum()), float(squares.sum())
    total = all_of + found.residual**2
    captured = kept / total if total else 1.0
    residual = float(np.sqrt(max(0.0, total - kept)))
    return Top(found.spectral, captured, residual, found.passes)


def _clamped(dense: Array, low: LowRank, found: Top, wanted: Wanted) -> tuple[LowRank, Top]:
    """Factors cut off at a quantile of all their values, as kohya's extraction does it, and what
    they leave of the weight.
    """
    if wanted.clamp_quantile is None:
        return low, found
    values = np.concatenate([low.a.reshape(-1), low.b.reshape(-1)])
    limit = float(np.quantile(values, wanted.clamp_quantile))
    a, b = (np.clip(x, -limit, limit) for x in (low.a, low.b))
    low = LowRank(a, b, low.scaling)
    left, energy = _left(dense, low)
    captured = max(0.0, 1 - left / energy) if energy else 1.0
    return low, replace(found, captured=captured, residual=sqrt(left))


def _left(dense: Array, low: LowRank) -> tuple[float, float]:
    """The energy that an update leaves of a weight, and that of the weight, some rows at a time."""
    left = energy = 0.0
    for rows in row_slices(*dense.shape):
        w = on_cpu(dense[rows]).astype(np.float64)
        rest = w - low.scaling * (low.b[rows] @ low.a)
        left, energy = left + float(np.vdot(rest, rest)), energy + float(np.vdot(w, w))
    return left, energy
