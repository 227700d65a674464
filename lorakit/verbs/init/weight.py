"""One weight's first factors: what is asked for, what the method is told, what comes of it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from lorakit.adapter.load import LazyRows
from lorakit.adapter.weights import Form
from lorakit.errors import InputError, UsageError
from lorakit.formats.patterns import search
from lorakit.math.cast import Array
from lorakit.math.initial import METHODS, Start
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Send
from lorakit.math.truncated import seed_of
from lorakit.store.checkpoint import Checkpoint
from lorakit.tensors import CODES
from lorakit.verbs.base.weights import Weight
from lorakit.verbs.init.statistics import Statistics
from lorakit.verbs.making import Made, Task

PLAIN = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class Wanted:
    """How an adapter begins: the rank, alpha (the rank by default), patterns of modules with ranks
    or alphas of their own (pairs or a dict), the method and its seed.
    """

    rank: int
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    method: str = "kaiming"
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            given = getattr(self, name)
            pairs = given.items() if isinstance(given, Mapping) else given
            object.__setattr__(self, name, tuple((pattern, n) for pattern, n in pairs))

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: naming the option.
        """
        if min([self.rank, *(r for _, r in self.rank_pattern)]) < 1:
            raise UsageError("a rank is 1 or more.")
        alphas = [a for a in (self.alpha, *(a for _, a in self.alpha_pattern)) if a is not None]
        if not all(0 < a < float("inf") for a in alphas):
            raise UsageError("an alpha is a number above 0.")
        if self.dora and METHODS[self.method].changes_base:
            raise UsageError(f"{self.method} changes the base, whose norms DoRA would keep.")
        if self.dora and self.method == "mica":
            raise UsageError(
                "PEFT does not load DoRA that mica began.",
                hint="Leave --dora out, or take another --method.",
            )
        odd = [r for r in (self.rank, *(r for _, r in self.rank_pattern)) if r % 2]
        if odd and self.method == "orthogonal":
            raise UsageError(f"orthogonal factors come in pairs: the rank is {odd[0]}, not even.")

    def rank_of(self, *names: str) -> int:
        """The rank of a weight that has these names."""
        return next((r for p, r in self.rank_pattern if _found(p, names)), self.rank)

    def alpha_of(self, *names: str) -> float:
        """The alpha of a weight that has these names."""
        default = self.rank if self.alpha is None else self.alpha
        return next((a for p, a in self.alpha_pattern if _found(p, names)), default)

    def scaling_of(self, *names: str) -> float:
        """What the update of a weight is multiplied with when it is read."""
        rank = self.rank_of(*names)
        return self.alpha_of(*names) / (sqrt(rank) if self.rslora else rank)

    def without_meaning(self, forms: Sequence[Form]) -> list[str]:
        """The patterns that no weight has a name for."""
        patterns = [p for p, _ in (*self.rank_pattern, *self.alpha_pattern)]
        return [p for p in patterns if not any(_found(p, f.names) for f in forms)]


def _found(pattern: str, names: Sequence[str]) -> bool:
    """Whether a pattern means one of these names: plain, as whole segments of it, so that `q` is
    not every name with that letter; else wherever it is found.
    """
    if PLAIN.fullmatch(pattern):
        return any(f".{pattern}." in f".{name}." for name in names)
    return any(search(pattern, name) for name in names)


@dataclass(frozen=True)
class Row:
    """A weight that got factors."""

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float


def row_of(weight: Weight, wanted: Wanted) -> Row:
    """What the report says of a weight; known before anything is computed."""
    form = weight.form
    return Row(form.key, form.shape, wanted.rank_of(*form.names), wanted.scaling_of(*form.names))


def task_of(
    base: Checkpoint, weight: Weight, wanted: Wanted, statistics: Statistics | None
) -> Task[Row]:
    """The factors of a weight as a task."""
    beside = ("magnitude",) if wanted.dora and weight.form.layer else ()

    def compute(send: Send) -> Made[Row]:
        lows = [
            _begun(base, weight, wanted, statistics, expert, send)
            for expert in range(max(weight.form.experts, 1))
        ]
        scaling = wanted.scaling_of(*weight.form.names)
        vectors = {"magnitude": _norms(base, weight, lows[0], scaling)} if beside else {}
        alpha = wanted.alpha_of(*weight.form.names)
        return Made(lows, row_of(weight, wanted), vectors, alpha=alpha)

    return Task(weight.form, CODES[wanted.dtype], compute, beside)


def memory_of(weight: Weight, wanted: Wanted) -> int:
    """Bytes that the factors of a weight take at most."""
    (out, inner), needs = weight.form.shape, METHODS[wanted.method].needs
    factors = 16 * wanted.rank_of(*weight.form.names) * (out + inner)
    gram = 8 * min(out, inner) ** 2 + 8 * inner**2 * ("moments" in needs)
    return factors + (6 * 4 * out * inner + 3 * gram) * bool(needs or wanted.dora)


def _begun(
    base: Checkpoint,
    weight: Weight,
    wanted: Wanted,
    statistics: Statistics | None,
    expert: int,
    send: Send,
) -> LowRank:
    """The first factors, to be stored as they are: their scaling is that of the config."""
    form = weight.form
    moments: Callable[[], Array] | None = None
    if statistics is not None:
        moments = lambda: statistics.of(form.module)  # noqa: E731
    start = Start(
        form.shape,
        wanted.rank_of(*form.names),
        wanted.scaling_of(*form.names),
        seed_of(f"{form.key}.{expert}", wanted.seed),
        embedding=form.embedding,
        weight=lambda: matrix(base, weight, expert),
        moments=moments,
        send=send,
    )
    try:
        low = METHODS[wanted.method].function(start)
    except InputError as error:
        raise InputError(
            f"{weight.tensor!r}: {error.message.rstrip('.')}.",
            hint="Leave it out with --exclude-modules.",
            file=base.located.path,
            tensor=weight.tensor,
        ) from error
    return LowRank(low.a, low.b)


def matrix(base: Checkpoint, weight: Weight, expert: int = 0) -> Array:
    """A weight in float32, (out, in), a kernel flattened; of a stack one expert."""
    info, leading = base.infos[weight.tensor], 2 if weight.form.experts else 1
    height = info.matrix(leading)[0] // max(weight.form.experts, 1)
    rows = LazyRows(base, weight.tensor, "float32", leading)
    found = rows[expert * height : (expert + 1) * height]
    return found.T if weight.turned else found


def _norms(base: Checkpoint, weight: Weight, low: LowRank, scaling: float) -> Array:
    """The norm of each output unit, of the weight with its update."""
    w = matrix(base, weight).astype(np.float64)
    if low.b.any():
        w = w + scaling * (low.b.astype(np.float64) @ low.a)
    norms: Array = np.sqrt((w**2).sum(axis=1)).astype(np.float32)
    kernel = len(weight.form.span) - 1
    return norms.reshape(1, -1, *(1,) * kernel) if kernel else norms
