"""Low-rank updates, `scaling * b @ a`, and the exact operations on their factors.

Law of this module: an operation on the factors commutes with `delta`, that is
`delta(op(x)) == dense_op(delta(x))`. Written against the array API, so that the factors may be
NumPy arrays or torch tensors on any device.

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685), section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.math.namespace import Array, Send, array_namespace


@dataclass(frozen=True)
class LowRank:
    """The update `scaling * b @ a` of one weight matrix."""

    a: Array  # (rank, in), "down"
    b: Array  # (out, rank), "up"
    scaling: float = 1.0  # alpha / rank, or alpha / sqrt(rank) for rsLoRA

    @property
    def rank(self) -> int:
        """The number of rows of `a`."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the dense update, (out, in)."""
        return int(self.b.shape[0]), int(self.a.shape[1])


def delta(x: LowRank, dtype: str = "float32") -> Array:
    """The dense update, (out, in), multiplied and scaled in `dtype` whatever the factors are."""
    xp = array_namespace(x.a, x.b)
    wide = getattr(xp, dtype)
    return x.scaling * (xp.astype(x.b, wide) @ xp.astype(x.a, wide))


def sent(x: LowRank, send: Send) -> LowRank:
    """The same update, its factors where `send` brings them."""
    return replace(x, a=send(x.a), b=send(x.b))


def transpose(x: LowRank) -> LowRank:
    """The update of the transposed matrix: what a layer that stores (in, out) takes. Exact."""
    return replace(x, a=x.b.T, b=x.a.T)


def absolute(x: LowRank) -> LowRank:
    """The same of absolute values: its delta bounds that of `x`, and the rounding of it."""
    xp = array_namespace(x.a, x.b)
    return replace(x, a=xp.abs(x.a), b=xp.abs(x.b), scaling=abs(x.scaling))


def flatten(a: Array, b: Array, scaling: float = 1.0) -> LowRank:
    """A convolution's update on its kernel flattened to (out, in * k * ...). Exact.

    `a` is (rank, in, k, ...), `b` is (out, rank, 1, ...); matrices pass through.
    """
    xp = array_namespace(a, b)
    return LowRank(xp.reshape(a, (a.shape[0], -1)), xp.reshape(b, (b.shape[0], -1)), scaling)


def rows_of(low: LowRank, start: int, stop: int) -> LowRank:
    """The update of some of the output rows. Exact."""
    return LowRank(low.a, low.b[start:stop, :], low.scaling)


def in_columns(low: LowRank, start: int, width: int) -> LowRank:
    """The update of a wider matrix in whose columns, from `start` on, this one lies. Exact."""
    xp = array_namespace(low.a)
    a = xp.zeros((low.a.shape[0], width), dtype=low.a.dtype)
    a[:, start : start + low.a.shape[1]] = low.a
    return LowRank(a, low.b, low.scaling)


def cat(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Concatenated factors: `delta` is exactly the weighted sum, ranks add up."""
    xp = array_namespace(*(p.a for p in parts))
    b = [w * p.scaling * p.b for p, w in zip(parts, weights, strict=True)]
    return LowRank(a=xp.concat([p.a for p in parts]), b=xp.concat(b, axis=1))


def ungroup(x: LowRank, enabled: Sequence[bool]) -> LowRank:
    """A grouped update of a fused projection, as one plain update. Exact.

    The matrix is made of `len(enabled)` equal row blocks. Of the enabled ones, the g-th is updated
    by the g-th slice of `a` and the g-th block of `b`; the others stay. `a` is (rank * groups, in),
    `b` is (rows of the enabled blocks, rank).

    Source: huggingface/peft v0.2.0, src/peft/tuners/lora.py, MergedLinear.
    """
    xp = array_namespace(x.a, x.b)
    groups = sum(map(bool, enabled))
    height, rank = x.b.shape[0] // groups, x.a.shape[0] // groups
    b = xp.zeros((height * len(enabled), rank * groups), dtype=x.b.dtype)
    on = [i for i, e in enumerate(enabled) if e]
    for g, i in enumerate(on):
        rows = x.b[g * height : (g + 1) * height]
        b[i * height : (i + 1) * height, g * rank : (g + 1) * rank] = rows
    return replace(x, b=b)
