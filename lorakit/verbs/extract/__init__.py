"""extract: the LoRA that brings a base near a fine-tuned model, or near what another adapter makes
of it.

Law: each update of the result is the closest of its rank to the difference of a weight; whatever
else differs is carried whole on request, or nothing is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.adapter import open_adapter
from lorakit.adapter.load import read_array
from lorakit.adapter.new_config import Saved, config_of, plain_config
from lorakit.adapter.weights import Adapted, adapted
from lorakit.errors import MisfitError, UsageError
from lorakit.math.cast import Array
from lorakit.math.lowrank import delta, transpose
from lorakit.math.ranks import Rule
from lorakit.store.checkpoint import Checkpoint, open_checkpoint
from lorakit.tensors import CODES
from lorakit.verbs.base.dense import Against
from lorakit.verbs.base.planning import identity
from lorakit.verbs.base.weights import Weight, called_otherwise, task_type, weights_in
from lorakit.verbs.choices import READING, check_choices, plain
from lorakit.verbs.extract.carrying import Carried, carried
from lorakit.verbs.extract.differing import (
    alone,
    changed,
    check_alike,
    check_finite,
    check_patterns,
    tensors_in,
)
from lorakit.verbs.extract.weight import Row, Wanted, difference, memory_of, task_of
from lorakit.verbs.job import RunOptions
from lorakit.verbs.making import Draft, Making, Report, Task
from lorakit.verbs.whole import whole

CHOICES = {
    "dtype": tuple(CODES),
    "other": ("", "save", "drop"),
    "expert_packing": READING["expert_packing"],
}


def extract(
    base: str | Path,
    tuned: str | Path = "",
    output: str | Path = "",
    *,
    run: RunOptions | None = None,
    **options: Any,
) -> Report[Row]:
    """Write the LoRA of `tuned` on `base` to the folder `output`, as PEFT has it; what was done.

    Both are streamed, one weight at a time; differences are float32. `options` are those of
    `plan_extract`.

    Raises:
        UsageError, MisfitError, InputError: as `plan_extract`.
        OutputError, ResourceError: see `lorakit.errors`.
    """
    if not str(output):
        raise UsageError("extract needs an output.")
    return plan_extract(base, tuned, **options).run(output, run)


def plan_extract(
    base: str | Path,
    tuned: str | Path = "",
    *,
    adapter: str | Path = "",
    allow_pickle: bool = False,
    target_modules: str = "",
    exclude_modules: str = "",
    other: str = "",
    expert_packing: str = "peft",
    **options: Any,
) -> Making[Row]:
    """The extraction that `extract` runs.

    tuned: the fine-tuned model; or adapter: whose delta on the base is wanted as plain LoRA.
    target_modules, exclude_modules: patterns for the modules that get factors. other: what becomes
    of tensors that differ and get none, or are the tuned model's alone: "save" (whole) or "drop".
    `options` are the fields of `lorakit.verbs.extract.weight.Wanted`: rank, energy, exact,
    min_diff, clamp_quantile and dtype (a key of `lorakit.tensors.CODES`).

    Raises:
        UsageError: an option makes no sense.
        MisfitError: the models are not alike, tensors differ that can get no factors, or a pattern
            is found in no module's name.
        InputError: a weight is quantised.
    """
    wanted = Wanted(**plain(options))
    check_choices(
        {"dtype": wanted.dtype, "other": other, "expert_packing": expert_packing}, CHOICES
    )
    _check(wanted, tuned, adapter)
    checkpoint = open_checkpoint(str(base), allow_pickle=allow_pickle)
    if adapter:
        return _from_adapter(checkpoint, str(adapter), wanted, expert_packing, allow_pickle)
    other_one = open_checkpoint(str(tuned), allow_pickle=allow_pickle)
    check_patterns(checkpoint, other_one, target_modules, exclude_modules)
    weights = weights_in(checkpoint, target_modules, exclude_modules, packed=True)
    check_alike(checkpoint, other_one, weights, other)
    return _from_models(checkpoint, other_one, weights, wanted, other)


def _check(wanted: Wanted, tuned: str | Path, adapter: str | Path) -> None:
    if bool(str(tuned)) == bool(str(adapter)):
        raise UsageError("extract from a tuned model or from an adapter, one of both.")
    Rule("rank", wanted.rank)
    if wanted.energy is not None:
        Rule("energy", wanted.energy)
    if wanted.clamp_quantile is not None and not 0.5 < wanted.clamp_quantile <= 1:
        raise UsageError(
            f"clamp_quantile {wanted.clamp_quantile:g} is not above 0.5 and at most 1."
        )
    if not wanted.min_diff >= 0:
        raise UsageError(f"min_diff {wanted.min_diff:g} is not 0 or more.")


def _from_models(
    base: Checkpoint, tuned: Checkpoint, weights: Sequence[Weight], wanted: Wanted, other: str
) -> Making[Row]:
    weights = [w for w in weights if w.tensor in tuned.infos]
    rest = _rest(base, tuned, {w.tensor for w in weights})
    beside = {w.bias for w in weights} & {*rest} & base.infos.keys()
    rest = [n for n in rest if n not in beside]
    if rest and not other:
        _ask(rest, base, tuned)
    kept = carried(base, tuned, rest, beside, weights) if other == "save" else Carried()
    weights = [w for w in weights if not kept.holds(w.form.module)]
    beside = {b for b in beside if b not in kept.biases and not kept.holds(b)}
    tasks = [
        _task(base, tuned, w, wanted, beside, always=kept.wraps(w.form.module)) for w in weights
    ]
    facts: dict[str, Any] = {
        "modules_to_save": list(kept.modules) or None,
        "lora_bias": bool(beside),
    }
    facts |= {"bias": "all"} if kept.biases else {}
    draft = Draft(
        tasks,
        kept.taken(tuned),
        lambda found: _config(base, tuned, found, facts),
        [*base.places, *tuned.places],
        {"extract": asdict(wanted), "base": _known(base), "tuned": _known(tuned), "other": other},
        memory=max((memory_of(w, wanted) for w in weights), default=0),
    )
    notes = _notes(alone(base, tuned), rest if other == "drop" else [])
    return Making(draft, [*notes, *called_otherwise(base, weights)])


def _rest(base: Checkpoint, tuned: Checkpoint, known: set[str]) -> list[str]:
    """What the tuned model has otherwise, or alone, beside these weights."""
    both = tensors_in(tuned).keys() - known
    found = changed(base, tuned, [n for n in tensors_in(base) if n in both])
    return found + alone(tuned, base)


def _notes(gone: Sequence[str], dropped: Sequence[str]) -> list[str]:
    notes = [f"{len(dropped)} tensors that differ are left out, as asked."] if dropped else []
    if gone:
        notes.append(f"{len(gone)} tensors are in the base alone, first {gone[0]!r}: left out.")
    return notes


def _ask(rest: Sequence[str], base: Checkpoint, tuned: Checkpoint) -> None:
    shown = ", ".join(map(repr, rest[:3])) + (" …" if len(rest) > 3 else "")
    raise MisfitError(
        f"{len(rest)} tensors differ that get no factors: {shown}.",
        hint="Pass --other save to carry them whole (modules_to_save), or --other drop.",
        file=tuned.located.path,
        tensor=rest[0],
    )


def _task(
    base: Checkpoint,
    tuned: Checkpoint,
    weight: Weight,
    wanted: Wanted,
    biases: set[str],
    *,
    always: bool,
) -> Task[Row]:
    def gain() -> Array:
        one, other = (read_array(c, weight.bias, "float32") for c in (base, tuned))
        found: Array = other - one
        largest = float(np.abs(found).max(initial=0.0))
        check_finite(base.infos[weight.bias], largest, {"tuned": tuned.located.path})
        return found

    return task_of(
        weight,
        wanted,
        CODES[wanted.dtype],
        lambda: difference(base, tuned, weight),
        gain if weight.bias in biases else None,
        always=always,
    )


def _from_adapter(
    base: Checkpoint, reference: str, wanted: Wanted, packing: str, allow_pickle: bool
) -> Making[Row]:
    opened = open_adapter(reference, allow_pickle=allow_pickle)
    opened.config.check(base_is_residual=True)
    there = adapted(opened, packing=packing)
    against = Against(base, opened)
    found = sorted(there.values(), key=lambda one: (one.form.name, one.form.key))
    kept = whole([opened], [1.0], {one.form.module for one in found}, "")
    weights = [Weight(one.form, one.piece.tensors[0].name) for one in found]
    tasks = [
        task_of(w, wanted, CODES[wanted.dtype], _delta(one, against), _bias(one))
        for w, one in zip(weights, found, strict=True)
    ]
    facts = {**kept.facts, "lora_bias": any("bias" in one.tensors for one in found)}
    draft = Draft(
        tasks,
        kept.taken,
        lambda saved: config_of(plain_config(opened.config.raw, facts), saved, {}, version=None),
        [*base.places, *opened.files],
        {"extract": asdict(wanted), "base": _known(base), "adapter": opened.sha256},
        memory=max((memory_of(w, wanted) for w in weights), default=0),
        adapters=[opened],
    )
    return Making(draft)


def _delta(one: Adapted, against: Against) -> Callable[[], Array]:
    """What a weight gains, dense; a stack has neither DoRA nor PiSSA, and of its base no more than
    which way round it lies is needed.
    """
    if one.form.experts:
        turn = transpose if against.turned(one) else (lambda low: low)
        return lambda: np.stack([delta(turn(low)) for low in one.lows()])
    return lambda: against.delta(one)[None]


def _bias(one: Adapted) -> Callable[[], Array] | None:
    if "bias" not in one.tensors:
        return None

    def gain() -> Array:
        found = one.bias()
        assert found is not None
        return found

    return gain


def _known(checkpoint: Checkpoint) -> list[Any]:
    return [identity(p) for p in checkpoint.parts]


def _config(
    base: Checkpoint, tuned: Checkpoint, saved: Sequence[Saved], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of an adapter for this base."""
    if not (saved or facts["modules_to_save"] or facts.get("bias")):
        raise MisfitError(
            "nothing differs between both models.",
            hint="Is the tuned model the one you mean? --min-diff may leave out too much.",
            file=base.located.path,
        )
    name = base.located.repo or str(base.located.path)
    raw = {"base_model_name_or_path": name, "task_type": task_type(tuned.config or base.config)}
    return config_of(plain_config({**raw, "r": 1, "lora_alpha": 1}, facts), saved, {}, version=None)
