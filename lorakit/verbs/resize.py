"""resize: the same adapter in fewer ranks, chosen for each weight from its singular values.

Law: each update of the result is the closest one of its rank to that of the adapter (Eckart and
Young, 1936); what that leaves out is told.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter, open_adapter
from lorakit.adapter.load import check_finite
from lorakit.adapter.new_config import Saved, config_of, plain_config
from lorakit.adapter.weights import Adapted, adapted, computed
from lorakit.errors import InputError, UsageError
from lorakit.math.factored import leading, recompose, retained, spectrum
from lorakit.math.lowrank import sent
from lorakit.math.namespace import Send, on_cpu
from lorakit.math.ranks import Rule, chosen
from lorakit.tensors import CODES
from lorakit.verbs.base.releases import release_of
from lorakit.verbs.choices import READING, check_choices, plain
from lorakit.verbs.job import RunOptions
from lorakit.verbs.making import Draft, Made, Making, Report, Task
from lorakit.verbs.whole import Whole, whole

CHOICES = {"dtype": ("keep", *CODES), "expert_packing": READING["expert_packing"]}
RULES = ("energy", "sv_ratio", "sv_cumulative", "sv_fro")


@dataclass(frozen=True)
class Wanted:
    """How many ranks are kept: `rank` of each weight, or what a rule asks for, `rank` at most.

    energy: the share of the energy (sum of squared singular values) that is kept; sv_ratio:
    singular values above the largest over this; sv_cumulative: the share of their sum; sv_fro: the
    share of the Frobenius norm. uniform: one rank for all, the largest that is asked for; weights
    of fewer ranks are filled up with zeros.
    kohya_compat: the very ranks of kohya's resize_lora.py, which are one too many.
    """

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    sv_fro: float | None = None
    uniform: bool = False
    kohya_compat: bool = False
    dtype: str = "keep"

    @property
    def rule(self) -> Rule:
        """The rule that was asked for.

        Raises:
            UsageError: none was, or several.
        """
        asked = [(k, v) for k in RULES if (v := getattr(self, k)) is not None]
        if len(asked) > 1:
            raise UsageError(f"{' and '.join(_option(k) for k, _ in asked)}: choose one.")
        if asked:
            return Rule(*asked[0])
        if self.rank is None:
            raise UsageError(f"say how far: --rank, or {', '.join(_option(k) for k in RULES)}.")
        return Rule("rank", self.rank)


@dataclass(frozen=True)
class Row:
    """A weight: its rank before and after, and the share of its energy that was kept."""

    name: str
    rank_before: int
    rank: int
    retained: float


def resize(
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    run: RunOptions | None = None,
    **options: Any,
) -> Report[Row]:
    """Write the adapter in other ranks to the folder `output`, as PEFT has it; what was done.

    `options` are those of `plan_resize`. No delta is formed: the factors are decomposed (float32,
    the small matrix between them float64), cut, balanced, and rounded once.

    Raises:
        InputError, UsageError: as `plan_resize`.
        OutputError, ResourceError: see `lorakit.errors`.
    """
    return plan_resize(adapter, **options).run(output, run)


def plan_resize(
    adapter: str | Path | Adapter,
    *,
    allow_pickle: bool = False,
    base_is_residual: bool = False,
    expert_packing: str = "peft",
    **options: Any,
) -> Making[Row]:
    """The resize that `resize` runs. `options` are the fields of `Wanted`.

    base_is_residual: an adapter that was initialised from its base is for the base that this left.

    Raises:
        UsageError: an option makes no sense.
        InputError: the adapter cannot be had as plain factors.
    """
    wanted = Wanted(**plain(options))
    rule = wanted.rule
    check_choices({"dtype": wanted.dtype, "expert_packing": expert_packing}, CHOICES)
    opened = open_adapter(adapter, allow_pickle=allow_pickle)
    _check(opened, base_is_residual=base_is_residual)
    found = adapted(opened, packing=expert_packing)
    limit = wanted.rank
    if wanted.uniform and found:
        limit = _largest(list(found.values()), rule, wanted)
        rule = Rule("rank", limit)
    kept = whole([opened], [1.0], {one.form.module for one in found.values()}, "")
    ordered = sorted(found.values(), key=lambda one: (one.form.name, one.form.key))
    release, _ = release_of(ordered)
    draft = Draft(
        [_task(one, rule, limit, wanted) for one in ordered],
        kept.taken,
        lambda saved: _config(opened, saved, kept, release),
        opened.files,
        {"resize": asdict(wanted), "adapter": opened.sha256},
        memory=max((_memory(one) for one in ordered), default=0),
        adapters=[opened],
    )
    return Making(draft, _notes(opened, ordered))


def _task(one: Adapted, rule: Rule, limit: int | None, wanted: Wanted) -> Task[Row]:
    dtype = CODES.get(wanted.dtype, computed(one.dtype))
    beside = tuple(role for role in ("bias", "magnitude") if role in one.tensors)

    def compute(send: Send) -> Made[Row]:
        wide = "float64" if one.dtype == "F64" else "float32"
        lows, shares = [], []
        for low in one.lows(wide):
            rank_of = partial(_chosen, low.scaling, rule, limit, wanted)
            found, values = leading(sent(low, send), rank_of)
            lows.append(sent(recompose(found), on_cpu))
            shares.append(retained(on_cpu(values), found.rank))
        rank = limit if wanted.uniform and limit else max(x.rank for x in lows)
        row = Row(one.form.key, one.rank, rank, min(shares))
        vectors = {"bias": one.bias(wide), "magnitude": one.magnitude(wide)}
        kept: dict[str, Any] = {role: v for role in beside if (v := vectors[role]) is not None}
        return Made(lows, row, kept, rank=rank)

    return Task(one.form, dtype, compute, beside)


def _largest(found: Sequence[Adapted], rule: Rule, wanted: Wanted) -> int:
    """The largest rank that a rule gives any weight; a plain rank needs no numbers for that."""
    if rule.kind == "rank":
        return min(int(rule.value), max(min(one.rank, *one.form.shape) for one in found))
    check_finite(found[0].adapter.source, found[0].adapter.path)
    return max(
        _chosen(low.scaling, rule, wanted.rank, wanted, spectrum(low))
        for one in found
        for low in one.lows()
    )


def _chosen(scaling: float, rule: Rule, limit: int | None, wanted: Wanted, s: Any) -> int:
    """The rank of an update with these singular values; kohya's tool has them unscaled."""
    s, kohya = on_cpu(s), wanted.kohya_compat
    return chosen(s / abs(scaling) if kohya and scaling else s, rule, limit=limit, kohya=kohya)


def _memory(one: Adapted) -> int:
    """Bytes that resizing a weight takes at most: its factors, their bases and the result."""
    (out, inner), count = one.form.shape, max(one.form.experts, 1)
    return 8 * 6 * count * one.rank * (out + inner)


def _check(adapter: Adapter, *, base_is_residual: bool) -> None:
    adapter.config.check(base_is_residual=True)
    if adapter.config.mutation and not base_is_residual:
        raise InputError(
            f"was initialised with {adapter.config.mutation!r}, and is read together with what "
            "that took out of its base: in other ranks that would be something else.",
            hint="Pass --base-is-residual if it is for the base that was left, or make it plain "
            "first: lorakit extract BASE --adapter ADAPTER -o OUT.",
            file=adapter.path,
        )


def _config(
    adapter: Adapter, saved: Sequence[Saved], kept: Whole, release: str | None
) -> dict[str, Any]:
    raw = adapter.config.raw
    if not saved:  # token rows alone
        return {**raw, **kept.facts}
    facts = {"use_dora": bool(raw.get("use_dora")), "peft_version": release, **kept.facts}
    return config_of(plain_config(raw, facts), saved, {}, version=None)


def _notes(adapter: Adapter, found: Sequence[Adapted]) -> list[str]:
    dora = sum(one.dora for one in found)
    if not dora:
        return []
    return [
        f"{dora} weights have DoRA magnitudes, which stay; energies are those of their low-rank "
        "parts."
    ]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
