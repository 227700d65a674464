"""combine: one adapter out of several, from their factors, without the base they are for.

Law: each weight of the result is the method of the updates of the adapters that have that weight;
an adapter that lacks it takes no part there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.new_config import Saved, config_of, plain_config
from lorakit.configs import model_type
from lorakit.store.checkpoint import open_checkpoint
from lorakit.tensors import CODES
from lorakit.verbs.base.releases import release_of
from lorakit.verbs.choices import READING, check_choices, plain
from lorakit.verbs.combine.weight import Row, Wanted, memory_of, task_of
from lorakit.verbs.gathering import Source, gathered
from lorakit.verbs.job import RunOptions
from lorakit.verbs.making import Draft, Making, Report
from lorakit.verbs.merge import Adapters, opened_adapters, weights_for
from lorakit.verbs.whole import Whole
from lorakit.verbs.whole import whole as whole_of

NOISE = 1e-6  # the share of an energy that is rounding of float32
CHOICES = {
    "compat": ("", "peft"),
    "dtype": ("keep", *CODES),
    "expert_packing": READING["expert_packing"],
}


def combine(
    adapters: Adapters, output: str | Path, *, run: RunOptions | None = None, **options: Any
) -> Report[Row]:
    """Write the combination of adapters to the folder `output`, as PEFT has them; what was done.

    `options` are those of `plan_combine`. Factors are read once, the arithmetic is float32 (float64
    for float64 factors, and for the small matrices in between), and rounded once at the end.

    Raises:
        InputError, MisfitError, UsageError: as `plan_combine`.
        OutputError, ResourceError: see `lorakit.errors`.
    """
    return plan_combine(adapters, **options).run(output, run)


def plan_combine(
    adapters: Adapters,
    *,
    weights: Sequence[float] | None = None,
    base: str | Path = "",
    base_is_residual: bool = False,
    whole: str | int = "",
    allow_pickle: bool = False,
    expert_packing: str = "peft",
    **options: Any,
) -> Making[Row]:
    """The combination that `combine` runs, from headers alone.

    weights: one an adapter, 1 by default, negative allowed. base: where adapters have DoRA, or were
    initialised from the base, what their deltas are computed with; base_is_residual: they were
    trained on the very same base that is left to merge into. whole: what becomes of tensors that
    adapters hold whole and that differ: "average", the number of the adapter whose is taken (from
    1), or "drop". `options` are the fields of `lorakit.verbs.combine.weight.Wanted`: method (a key
    of `lorakit.math.combining.methods.METHODS`), rank, density, majority ("total" or "frequency"),
    gamma, epsilon, seed, exact (a full SVD), compat ("peft": the numbers of peft 0.21) and dtype
    ("keep" or a key of `lorakit.tensors.CODES`).

    Raises:
        UsageError: an option makes no sense.
        MisfitError: the adapters are not of one model, or hold tensors whole that differ.
        InputError: an adapter cannot be had as plain factors.
    """
    whole = str(whole)
    wanted = Wanted(**plain({k: v for k, v in options.items() if v is not None}))
    wanted.check()
    check_choices({**asdict(wanted), "expert_packing": expert_packing}, CHOICES)
    opened = opened_adapters(adapters, allow_pickle=allow_pickle, factors=True)
    weighed = weights_for(weights, len(opened))
    checkpoint = open_checkpoint(str(base), allow_pickle=allow_pickle) if base else None
    sources = gathered(
        opened,
        weighed,
        base=checkpoint,
        base_is_residual=base_is_residual,
        packing=expert_packing,
    )
    model = model_type(checkpoint.config) if checkpoint else ""
    release, mixed = release_of((s.one for there in sources.values() for s in there), model)
    kept = whole_of(opened, weighed, {s[0].one.form.module for s in sources.values()}, whole)
    identity = {"combine": asdict(wanted), "weights": weighed, "whole": whole}
    draft = _draft(opened, sources, wanted, kept, identity, release)
    if checkpoint:
        draft = replace(draft, inputs=[*draft.inputs, *checkpoint.places])
    return Making(draft, [*_notes(opened), *mixed, *_odd(sources), *kept.notes], _reduced)


def _draft(
    adapters: Sequence[Adapter],
    sources: Mapping[str, Sequence[Source]],
    wanted: Wanted,
    kept: Whole,
    identity: Mapping[str, Any],
    release: str | None,
) -> Draft[Row]:
    bias = any("bias" in s.one.tensors for there in sources.values() for s in there)
    facts = {"lora_bias": bias, "peft_version": release, **kept.facts}
    memory = [memory_of(s[0].one.form, s, wanted) for s in sources.values()]
    return Draft(
        [task_of(s[0].one.form, s, wanted) for s in sources.values()],
        kept.taken,
        lambda saved: _config(adapters, saved, kept, facts),
        [path for a in adapters for path in a.files],
        {**identity, "adapters": [a.sha256 for a in adapters]},
        memory=max(memory, default=0),
        adapters=adapters,
    )


def _config(
    adapters: Sequence[Adapter], saved: Sequence[Saved], kept: Whole, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of the first adapter, with what is another now."""
    raw = adapters[0].config.raw
    if not saved:  # token rows alone
        return {**raw, **kept.facts}
    return config_of(plain_config(raw, facts), saved, {}, version=None)


def _notes(adapters: Sequence[Adapter]) -> list[str]:
    bases = list(dict.fromkeys(a.config.base for a in adapters if a.config.base))
    if len(bases) < 2:
        return []
    return [f"the adapters name other bases: {', '.join(bases)}; the result names the first."]


def _odd(sources: Mapping[str, Sequence[Source]]) -> list[str]:
    """What PEFT does not load together, although each adapter is fine."""
    parts = [s.one for there in sources.values() for s in there]
    bare = [p for p in parts if p.form.embedding or not p.form.layer]
    if not bare or not any("bias" in p.tensors for p in parts):
        return []
    return [
        f"biases beside factors (lora_bias) and {bare[0].form.key!r} are in one adapter: merge it, "
        "PEFT does not load that."
    ]


def _reduced(rows: Sequence[Row]) -> list[str]:
    there = [r.reduced for r in rows if r.reduced < 1.0 - NOISE]
    if not there:
        return []
    return [
        f"{len(there)} weights have deltas that are not low-rank (DoRA): of their energy at least "
        f"{min(there):.4%} went in."
    ]
