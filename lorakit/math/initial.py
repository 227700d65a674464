"""What an adapter starts from: the factors of one weight before any training.

Law: the same name and seed give the same factors on every machine. Methods that do not change the
base start with an update of nothing, but for `random`; the others are for a base that lost the
update, `w - scaling * b @ a` of the factors as they are stored.

Sources: huggingface/peft v0.21.2, src/peft/tuners/lora/layer.py, and the papers in the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np

from lorakit.errors import InputError, UsageError
from lorakit.math.cast import Array
from lorakit.math.factored import recompose
from lorakit.math.krylov import largest
from lorakit.math.lowrank import LowRank, sent
from lorakit.math.namespace import Send, here, on_cpu
from lorakit.math.residual import tail
from lorakit.math.truncated import top

DAMPING = 0.01  # of CorDA: this share of the mean of the diagonal is added to the diagonal
AGAIN = 8  # passes, which bring what is left to 1e-5 of the least there is, even of noise
SINGULAR = 1e-6  # of the norm: vectors of smaller singular values are no matter of Gram matrices


@dataclass(frozen=True)
class Start:
    """The weight that is to have factors, (out, in); of an embedding (dim, vocabulary).

    `weight` and `moments` (second moments of the inputs, (in, in) or (in,)) are asked for only by
    methods that need them. `send` brings matrices to where they are decomposed.
    """

    shape: tuple[int, int]
    rank: int
    scaling: float
    seed: int
    embedding: bool = False
    weight: Callable[[], Array] | None = None
    moments: Callable[[], Array] | None = None
    send: Send = here

    @cached_property
    def rng(self) -> np.random.Generator:
        """What random numbers are drawn from, on the CPU."""
        return np.random.default_rng(self.seed)

    def normal(self, *shape: int) -> Array:
        """Standard normal numbers."""
        return self.rng.standard_normal(shape, dtype=np.float32)

    def uniform(self, bound: float, *shape: int) -> Array:
        """Numbers spread evenly from -bound to bound."""
        found: Array = (2 * self.rng.random(shape, dtype=np.float32) - 1) * np.float32(bound)
        return found

    def none(self, *shape: int) -> Array:
        """Zeros."""
        return np.zeros(shape, np.float32)

    def known(self) -> Array:
        """The weight in float32, (out, in).

        Raises:
            InputError: it holds NaN or inf.
        """
        assert self.weight is not None
        w = np.ascontiguousarray(self.weight(), np.float32)
        if not np.isfinite(w).all():
            raise InputError("the weight holds NaN or Inf")
        return w


def kaiming(start: Start) -> LowRank:
    """A uniform within one over the root of the inputs, B zero; PEFT's default."""
    (out, inner), rank = start.shape, start.rank
    if start.embedding:
        return LowRank(start.none(rank, inner), start.normal(out, rank), start.scaling)
    a = start.uniform(1 / sqrt(inner), rank, inner)
    return LowRank(a, start.none(out, rank), start.scaling)


def gaussian(start: Start) -> LowRank:
    """A normal with a deviation of one over the rank, B zero."""
    if start.embedding:
        return kaiming(start)
    (out, inner), rank = start.shape, start.rank
    a = start.normal(rank, inner) / np.float32(rank)
    return LowRank(a, start.none(out, rank), start.scaling)


def random(start: Start) -> LowRank:
    """Both factors random, so that the update is one of noise: for debugging."""
    (out, inner), rank = start.shape, start.rank
    if start.embedding:
        return LowRank(start.normal(rank, inner), start.normal(out, rank), start.scaling)
    a = start.uniform(1 / sqrt(inner), rank, inner)
    return LowRank(a, start.uniform(1 / sqrt(rank), out, rank), start.scaling)


def orthogonal(start: Start) -> LowRank:
    """Random factors in two halves of a space that are at right angles, so that B A is nothing.

    Raises:
        UsageError: the rank is odd.
    """
    if start.embedding:
        return kaiming(start)
    (out, inner), rank = start.shape, start.rank
    if rank % 2:
        raise UsageError(f"orthogonal factors come in pairs: the rank is {rank}, not even.")
    q, _ = np.linalg.qr(start.normal(rank, rank))
    a = (start.normal(inner, rank // 2) @ q[0::2]).T / np.float32(10)
    b = start.normal(rank // 2, out).T @ q[1::2] / np.float32(10)
    return LowRank(np.ascontiguousarray(a), b, start.scaling)


def mica(start: Start) -> LowRank:
    """B the left singular vectors of the smallest singular values, A zero."""
    w, rank = start.known(), start.rank
    return LowRank(start.none(rank, w.shape[1]), _signed(_least(w, rank).T).T, start.scaling)


def pissa(start: Start) -> LowRank:
    """The leading part of the weight, exactly."""
    found = top(start.send(start.known()), start.rank, exact=True)
    return _applied(recompose(found.spectral), start.scaling)


def pissa_fast(start: Start) -> LowRank:
    """The leading part of the weight, by a randomised search and another that begins where that
    ended.
    """
    w = start.send(start.known())
    found = top(w, start.rank, seed=start.seed)
    if found.passes:
        found = top(w, start.rank, start=found.spectral.vt.T, passes=AGAIN)
    return _applied(recompose(found.spectral), start.scaling)


def olora(start: Start) -> LowRank:
    """The first columns of Q and rows of R of a QR decomposition, from these columns alone."""
    w = start.known()
    q, r = np.linalg.qr(w[:, : start.rank].astype(np.float64))
    signs = np.where(np.diagonal(r) < 0, -1.0, 1.0)
    q = (q * signs).astype(np.float32)
    a = on_cpu(start.send(q).T @ start.send(w))
    return LowRank(a, q, start.scaling)


def eva(start: Start) -> LowRank:
    """A the directions in which the inputs are largest, B zero.

    Raises:
        InputError: the inputs have fewer directions than the rank.
    """
    moments = _moments(start)
    vectors = largest(moments, start.rank, vectors=True)
    if float(vectors[:, 0] @ moments @ vectors[:, 0]) <= 1e-12 * float(np.trace(moments)):
        raise InputError(f"the inputs have fewer than {start.rank} directions")
    a = np.ascontiguousarray(vectors[:, ::-1].T, np.float32)
    return LowRank(_signed(a), start.none(start.shape[0], start.rank), start.scaling)


def corda(start: Start) -> LowRank:
    """The part of the weight that matters most for the inputs, by their second moments.

    With `u s vt` the leading part of `w @ c`, c the damped moments, that is `u s vt c^-1`, which is
    `u u^T w`. The moments count as multiples of their mean, so that their unit does not matter.
    """
    w, moments = start.known().astype(np.float64), _moments(start)
    mean = float(np.trace(moments)) / len(moments)
    if not mean > 0:
        raise InputError("its statistics are all zero")
    damped = moments / mean + DAMPING * np.eye(len(moments))
    near = start.send(w) @ start.send(damped)
    found = top(near, start.rank, exact=True).spectral
    u, root = on_cpu(found.u), np.sqrt(on_cpu(found.s))
    least = np.where(root > 0, root, np.inf)
    a = u.T @ w / least[:, None]
    return _applied(LowRank(_narrow(a), _narrow(u * root)), start.scaling)


def _applied(low: LowRank, scaling: float) -> LowRank:
    """The same update on the CPU, to be read with a scaling: each factor gives as much."""
    low = sent(low, on_cpu)
    share = np.float32(sqrt(scaling))
    return LowRank(low.a / share, low.b / share, scaling)


def _narrow(x: Array) -> Array:
    return x.astype(np.float32)


def _least(w: Array, rank: int) -> Array:
    """Left singular vectors of the smallest values, (out, rank), the smallest last."""
    if rank < min(w.shape):
        b = tail(w, rank).low.b[:, ::-1]
        norms = np.linalg.norm(b, axis=0)
        if norms.min() > SINGULAR * np.linalg.norm(w):
            return _narrow(b / norms)
    u = np.linalg.svd(w.astype(np.float64), full_matrices=False)[0]
    return _narrow(u[:, -rank:])


def _signed(rows: Array) -> Array:
    """Rows turned so that the largest number of each is positive."""
    peaks = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    return rows * np.where(peaks < 0, np.float32(-1), np.float32(1))


def _moments(start: Start) -> Array:
    """The second moments as a matrix.

    Raises:
        InputError: they are not those of these inputs.
    """
    assert start.moments is not None
    found, width = np.asarray(start.moments(), np.float64), start.shape[1]
    if found.shape not in ((width,), (width, width)):
        raise InputError(f"its statistics have the shape {list(found.shape)}, for {width} inputs")
    if not np.isfinite(found).all():
        raise InputError("its statistics hold NaN or Inf")
    return np.diag(found) if found.ndim == 1 else (found + found.T) / 2


@dataclass(frozen=True)
class Init:
    """A way to begin: what it needs to know, and whether the base loses what the factors get.

    `config` is the `init_lora_weights` that PEFT is told, as far as it bears on how the adapter is
    read or trained: names that would say no more than how it began are refused for kernels and
    experts. `recomputed` says that a reader can tell from the base alone what it lost.
    """

    function: Callable[[Start], LowRank]
    source: str
    needs: tuple[str, ...] = ()  # "weight", "moments"
    changes_base: bool = False
    config: object = True
    recomputed: bool = False


_WEIGHT = ("weight",)
_PISSA = "Meng et al. 2024, arXiv 2404.02948"
_OLORA = "Büyükakyüz 2024, arXiv 2406.01775"
# A new one: a function above, a row here.
METHODS = {
    "kaiming": Init(kaiming, "He et al. 2015, arXiv 1502.01852"),
    "gaussian": Init(gaussian, "Hu et al. 2021, arXiv 2106.09685", config="gaussian"),
    "random": Init(random, "huggingface/peft, init_lora_weights=False", config=False),
    "orthogonal": Init(orthogonal, "huggingface/peft, orthogonal_init"),
    "mica": Init(mica, "arXiv 2604.01694", _WEIGHT, config="mica"),
    "pissa": Init(pissa, _PISSA, _WEIGHT, changes_base=True, config="pissa", recomputed=True),
    "pissa-fast": Init(pissa_fast, _PISSA, _WEIGHT, changes_base=True),
    "olora": Init(olora, _OLORA, _WEIGHT, changes_base=True, config="olora", recomputed=True),
    "eva": Init(eva, "Paischer et al. 2024, arXiv 2410.07170", ("moments",)),
    "corda": Init(
        corda, "Yang et al. 2024, arXiv 2406.05223", ("weight", "moments"), changes_base=True
    ),
}
