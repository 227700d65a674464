"""merge: fold adapters into a base, decided from headers, streamed block by block."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter, open_adapter
from lorakit.adapter.config import MUTATING
from lorakit.adapter.models import side_by_side
from lorakit.engine.plan import OutputFile, Plan
from lorakit.errors import MisfitError, UsageError
from lorakit.store.checkpoint import Checkpoint, open_checkpoint
from lorakit.store.padded import padded
from lorakit.tensors import CODES, bytes_in
from lorakit.verbs.base.deciding import Decided, decided
from lorakit.verbs.base.heads import without_old_head
from lorakit.verbs.base.notes import on_base
from lorakit.verbs.base.planning import Result, files, identity
from lorakit.verbs.base.skipping import with_new
from lorakit.verbs.base.sources import adapter_number
from lorakit.verbs.base.targets import Options
from lorakit.verbs.beside import beside_of, changed_facts, left_out, tokenizer_note
from lorakit.verbs.choices import READING, check_choices
from lorakit.verbs.job import Job, RunOptions

REQUANTIZE = "requantize"
QUANT = ("keep", "dequantize", "keep-touched", REQUANTIZE)
CHOICES = {"dtype": ("keep", *CODES), "quant": QUANT, **READING}
OF_FILES = ("quant", "max_shard_size", "link", "alone", "init_adapter")  # options, that is
Adapters = str | Path | Adapter | Sequence[str | Path | Adapter]


def merge(
    base: str | Path | Mapping[str, Any],
    adapters: Adapters,
    output: str | Path | None = None,
    *,
    run: RunOptions | None = None,
    **options: Any,
) -> Any:
    """Write `base + sum of weight * delta` to `output`; the report of what was done.

    `base` and `adapters` are paths or hub ids; a base may be the folder of a whole pipeline of
    Diffusers, of which every model takes what is for it. With a state dict (name -> NumPy array or
    torch tensor) as the base and no output, the merged state dict is returned instead; tensors that
    no adapter touches are the very same objects. `options` are those of `plan_merge`; without
    files, those of matching, `weights`, `dtype` and `allow_pickle` apply, and of `run` the device.

    Arithmetic is float32 (float64 for float64 tensors), rounded once, to nearest even.

    Raises:
        InputError: an input is corrupt or refused by name.
        MisfitError: an adapter does not fit the base, or has NaN or Inf.
        ResourceError, OutputError, HubError: see `lorakit.errors`.
    """
    if isinstance(base, Mapping):
        if output is not None:
            raise UsageError(
                "a state dict is merged in memory, and no output is written.",
                hint="Leave the output out: what is returned is the merged state dict.",
            )
        from lorakit.verbs.merge.memory import merge_in_memory

        part, pickles = options.pop("component", ""), options.pop("allow_pickle", False)
        opened = opened_adapters(adapters, part, allow_pickle=pickles)
        weights = weights_for(options.pop("weights", None), len(opened))
        dtype = options.pop("dtype", "keep")
        check_choices({**options, "dtype": dtype}, CHOICES)
        _check_no_files({name: options.pop(name, "") for name in OF_FILES})
        device = run.device if run else "cpu"
        return merge_in_memory(
            base, opened, Options(weights, **options), dtype=dtype, device=device
        )
    if output is None:
        raise UsageError("merge needs an output, unless the base is a state dict.")
    from lorakit.verbs.merge.planned import plan_any

    return plan_any("merge", base, adapters, output, **options).run(output, run)


def _check_no_files(options: Mapping[str, Any]) -> None:
    """Refuse options that are of files, where there are none."""
    for name, value in options.items():
        if value and value != "keep":
            raise UsageError(f"{name} is for files, and the base is a state dict.")


def plan_merge(
    base: str | Path,
    adapters: Adapters,
    *,
    weights: float | Sequence[float] | None = None,
    dtype: str = "keep",
    max_shard_size: int | str | None = None,
    link: bool = False,
    allow_pickle: bool = False,
    alone: str = "",
    quant: str = "keep",
    init_adapter: str | Path = "",
    component: str = "",
    **options: Any,
) -> Job:
    """The plan of a merge, from headers alone; `.run(output)` executes it.

    weights: one an adapter, 1 by default, negative allowed. dtype: of the floating-point tensors of
    the result, "keep" or a key of `lorakit.tensors.CODES`. max_shard_size: bytes or a text like
    "2GB", None for the base's own. link: hard links for files that stay. alone: the name of an
    output of one file. quant: weights of a quantised base become their values, "dequantize" all,
    "keep-touched" those that change; or with "requantize" these codes again. init_adapter: the
    adapter before training, where that changed the base for good. component: which part of an
    adapter of several models is meant. `options`: fields of `lorakit.verbs.base.targets.Options`.

    Raises:
        As `merge`, and UsageError: an option makes no sense.
    """
    check_choices({**options, "dtype": dtype, "quant": quant}, CHOICES)
    checkpoint = open_checkpoint(str(base), allow_pickle=allow_pickle)
    opened = opened_adapters(adapters, component, base=str(base), allow_pickle=allow_pickle)
    weighed = weights_for(weights, len(opened))
    if init_adapter:
        opened, weighed = with_init(opened, weighed, init_adapter)
        options["init_given"] = True
    chosen = Options(weighed, **options)
    form = Result(dtype, bytes_in(max_shard_size or 0) or None, link, alone, quant)
    checkpoint, written, facts, notes = _decided(checkpoint, opened, chosen, form)
    beside = beside_of(checkpoint, opened, weighed, facts, count=len(written), alone=bool(alone))
    plan = Plan(
        "merge",
        inputs=_inputs(checkpoint, opened, weighed),
        options={**asdict(form), "component": component or _part(opened), **chosen.to_dict()},
        files=written,
        extras=beside.to_dict(),
        notes=[*notes, *tokenizer_note(beside, opened)],
    )
    asides = on_base(checkpoint.located.path, opened)
    return Job(plan, checkpoint, [a.file for a in opened], beside, asides)


def _decided(
    base: Checkpoint, adapters: Sequence[Adapter], options: Options, form: Result
) -> tuple[Checkpoint, list[OutputFile], dict[str, Any], list[str]]:
    """The base as it is read, the files to write, the config facts that change, and what the user
    should know.
    """
    changed: Mapping[str, Any] = {}
    said: Sequence[str] = ()
    if form.quant == REQUANTIZE:
        from lorakit.verbs.merge.requantised import requantised

        base, found, by_file, said = requantised(base, adapters, options, form.dtype)
    else:
        if form.quant != "keep":
            from lorakit.verbs.merge.quantised import plain_base

            base, changed, said = plain_base(base, adapters, options, form)
        found = decided(base, adapters, options, form.dtype)
        by_file = found.outputs
    facts = changed_facts(base, adapters, found.outputs, found.tie, form.dtype)
    facts |= {**found.layers.facts(base.config), **changed}
    facts |= with_new(base.config, changed, _new_heads(base, found))
    notes = [*said, *found.notes, *left_out(base)]
    if named := facts.get("architectures"):
        by_file, gone = without_old_head(by_file)
        notes += [f"{n!r} is left out: a {named[0]} has no such head." for n in gone]
    written = files(base, by_file, form)
    return padded(base, found.padded), written, facts, notes


def _new_heads(base: Checkpoint, found: Decided) -> list[str]:
    """The weights that the base has not: what an adapter adds, and a head that was shared."""
    outs = (o for there in found.outputs.values() for o in there)
    theirs = (o.tensor.name for o in outs if adapter_number(o.source) is not None)
    names = [*theirs, *([found.tie.head] if found.tie.untied else [])]
    return sorted(n for n in names if n.endswith(".weight") and n not in base.infos)


def _inputs(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float]
) -> list[dict[str, Any]]:
    """What the inputs of a plan are known by."""
    pairs = zip(adapters, weights, strict=True)
    known = [{"adapter": a.sha256, "weight": w} for a, w in pairs]
    return [{"base": [identity(p) for p in base.parts]}, *known]


def with_init(
    opened: Sequence[Adapter], weights: Sequence[float], init: str | Path
) -> tuple[list[Adapter], tuple[float, ...]]:
    """The adapters and their weights, with the initial one taken away from the one it became.

    Raises:
        UsageError: not exactly one of the adapters was trained on a changed base.
    """
    changed = [i for i, a in enumerate(opened) if a.config.init.startswith(MUTATING)]
    if len(changed) != 1:
        raise UsageError(
            f"--init-adapter belongs to one adapter whose initialisation changed the base, "
            f"{len(changed)} of these did."
        )
    return [*opened, open_adapter(init)], (*weights, -weights[changed[0]])


def opened_adapters(
    adapters: Any,
    component: str = "",
    *,
    base: str = "",
    allow_pickle: bool = False,
    factors: bool = False,
) -> list[Adapter]:
    """The adapters, opened where they are not yet; of such for several models, that for one.

    `base` is a checkpoint whose names may be theirs, flattened. `factors` refuses differences of
    whole weights, which can only be merged, and gives those for several models names that tell
    these apart.
    """
    if adapters is None or isinstance(adapters, Mapping):
        raise UsageError(
            f"a {type(adapters).__name__} is given where an adapter is.",
            hint="Give a path, a hub id, an open adapter, or a list of these.",
        )
    listed = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    if not listed:
        raise UsageError("no adapter is given.")
    options: dict[str, Any] = {"allow_pickle": allow_pickle, "dense": not factors, "base": base}
    opened = [part_for(open_adapter(a, **options), component) for a in listed]
    return side_by_side(opened) if factors else opened


def _part(adapters: Sequence[Adapter]) -> str:
    """Which model of a file for several one of these is, "" where none is."""
    return next((a.part for a in adapters if a.part), "")


def part_for(adapter: Adapter, component: str) -> Adapter:
    """What an adapter of several models of a pipeline is to one of them ("": all); others as they
    are.

    Raises:
        MisfitError: it has nothing for that model.
    """
    if component and adapter.parts and component not in adapter.parts:
        raise MisfitError(
            f"has nothing for the {component}, only for {', '.join(adapter.parts)}.",
            hint="Say which with --component.",
            file=adapter.path,
        )
    return adapter.parts.get(component, adapter)


def weights_for(weights: Any, count: int) -> tuple[float, ...]:
    """One finite weight for each adapter, 1 where none are given; a number is that of the only one.

    Raises:
        UsageError: there are more or fewer weights than adapters, or one is no finite number.
    """
    alone = isinstance(weights, Real) or getattr(weights, "ndim", 1) == 0
    listed = [weights] if alone else () if weights is None else weights
    try:
        found = tuple(map(float, [None] if isinstance(listed, str | Mapping) else listed))
    except (TypeError, ValueError) as error:
        raise UsageError(f"weights are {weights!r}, no number or list of numbers.") from error
    found = found or (1.0,) * count
    if len(found) != count:
        raise UsageError(f"{len(found)} weights are given for {count} adapters.")
    if not all(math.isfinite(w) for w in found):
        raise UsageError(f"a weight is not finite: {found}.")
    return found
