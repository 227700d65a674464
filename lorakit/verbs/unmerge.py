"""unmerge: take adapters out of a merged checkpoint, with the sign of their deltas turned.

Rounding is not invertible: a number of the result differs from the original base by at most half a
unit in the last place of the merged number plus half a unit of its own, which the report states.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.errors import InputError, UsageError
from lorakit.folder.manifest import read_manifest
from lorakit.naming.embeddings import is_table
from lorakit.verbs.job import Job, RunOptions
from lorakit.verbs.merge import REQUANTIZE, Adapters, opened_adapters, plan_merge, weights_for
from lorakit.verbs.report import Report

# Roles of what a weight is multiplied with.
ACTING = {"through_a", "ia3_rows", "ia3_inputs", "oft"}


def unmerge(
    merged: str | Path,
    adapters: Adapters,
    output: str | Path,
    *,
    run: RunOptions | None = None,
    **options: Any,
) -> Report:
    """Write `merged - sum of weight * delta` to `output`; the report of what was done.

    `options` are those of `lorakit.plan_merge`.

    Raises:
        InputError: an adapter did something that cannot be taken out.
    """
    from lorakit.verbs.merge.planned import plan_any

    return plan_any("unmerge", merged, adapters, output, **options).run(output, run)


def plan_unmerge(
    merged: str | Path,
    adapters: Adapters,
    *,
    weights: Sequence[float] | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> Job:
    """The plan of an unmerge; `weights` are those of the merge.

    Raises:
        InputError: an adapter did something that cannot be taken out.
        UsageError: the weights do not go with the adapters.
    """
    done = _options_of(merged)
    _check_codes(merged, done, str(options.get("quant", "")))
    part = options.get("component", "")
    given = opened_adapters(adapters, part, base=str(merged), allow_pickle=allow_pickle)
    own = [_saved_unasked(adapter) for adapter in given]
    opened = [
        replace(a, full={n: i for n, i in a.full.items() if n not in names})
        for a, names in zip(given, own, strict=True)
    ]
    for adapter in opened:
        _check_invertible(adapter, base_is_residual=bool(options.get("base_is_residual")))
    turned = [-w for w in weights_for(weights, len(opened))]
    options = {**options, "weights": turned, "allow_pickle": allow_pickle}
    if options.get("untie"):
        raise UsageError("--untie is for merging.")
    job = plan_merge(merged, opened, **options)
    notes = [
        f"{a.name}: {names[0]!r} is taken for the base's own, which PEFT saves beside its update."
        for a, names in zip(given, own, strict=True)
        if names
    ]
    if (dtype := done.get("dtype", "keep")) != "keep":
        notes.append(
            f"the merge wrote {dtype}: what it rounded for that alone, in tensors that no adapter "
            "changes too, is not in the bound."
        )
    return replace(job, plan=replace(job.plan, verb="unmerge"), asides=notes)


def _options_of(merged: str | Path) -> Mapping[str, Any]:
    """The options of the merge that wrote a result, by its manifest; none where that is silent."""
    said: Mapping[str, Any] = {}
    with suppress(InputError, OSError):
        said = read_manifest(Path(merged))
    done = said.get("options")
    return done if isinstance(done, dict) else {}


def _check_codes(merged: str | Path, done: Mapping[str, Any], quant: str) -> None:
    """Refuse a result whose weights were quantised again, or are to be."""
    if REQUANTIZE in (quant, done.get("quant")):
        raise InputError(
            "weights were quantised again with the delta in them, which cannot be taken out of "
            "their codes.",
            hint="Use the base itself.",
            file=merged,
        )


def _saved_unasked(adapter: Adapter) -> list[str]:
    """The embeddings and heads that PEFT saved whole because one of them has factors: they did not
    learn, so that a merge left them as they were.
    """
    tables = [n for n in adapter.full if is_table(n)]
    adapted = {m.name for m in adapter.modules.values() if m.low_rank}
    if not any(f"{module}.weight" in tables for module in adapted):
        return []
    return [n for n in tables if not adapter.saves(n)]


def _check_invertible(adapter: Adapter, *, base_is_residual: bool) -> None:
    norms = {"magnitude", "magnitude_inputs"}
    dora = next((m for m in adapter.modules.values() if norms & m.roles.keys()), None)
    rows = next((m for m in adapter.modules.values() if "rows" in m.roles), None)
    acting = next((m for m in adapter.modules.values() if ACTING & m.roles.keys()), None)
    what = ""
    if acting:
        what = f"multiplied {acting.name!r} (IA3, GLoRA or OFT); what it was is gone"
    elif dora:
        what = f"rescaled {dora.name!r} (DoRA); the norms of the original are gone"
    elif rows or adapter.full:
        name = rows.name if rows else next(iter(adapter.full))
        what = f"replaced {name!r} as a whole or in rows; the original is gone"
    elif adapter.config.residual and not base_is_residual:
        what = (
            f"took a part out of every weight first ({adapter.config.residual}), and that is gone"
        )
    elif adapter.config.layer_replication:
        what = "replicated layers"
    if what:
        raise InputError(
            f"cannot be taken out: it {what}.", hint="Use the base itself.", file=adapter.path
        )
